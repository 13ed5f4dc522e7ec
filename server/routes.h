/* Which route answers what. */
#ifndef SQZ_SERVER_ROUTES_H
#define SQZ_SERVER_ROUTES_H

#include "core.h"

struct route {
    const char *method, *path; /* a path that ends in '/' takes an argument behind it; with '*' the end goes along */
    void (*run)(struct call *call);
    enum api api;
    bool open;   /* without a key */
    bool upload; /* its body may be as large as an upload */
};

/* NULL: none. *argument: what stands behind the route's path. *allowed: the methods of other routes on this path, as
 * the Allow header has them; "": there is no such path. */
const struct route *routes_find(const char *method, const char *path, const char **argument, char allowed[64]);

#endif
