/*
 * Requests that take a core for long, such as those with a document to cut into tokens: served by threads of low priority,
 * in the order in which they came. The threads of HTTP have streams to pass on, and the model's wait for one another at the
 * end of every product.
 */
#ifndef SQZ_SERVER_APART_H
#define SQZ_SERVER_APART_H

#include <stdbool.h>

struct apart;

struct apart_work {
    void (*run)(struct apart_work *work); /* it may be no more afterwards */
    struct apart_work *next;
};

struct apart *apart_create(void); /* NULL: no memory or no thread */
/* False: no more is taken; whoever has the work does it. */
bool apart_put(struct apart *apart, struct apart_work *work);
void apart_close(struct apart *apart); /* takes no more, and ends what it has */
void apart_free(struct apart *apart);

/* Answers come before what the calling thread does from now on; by nicer, 1 to 19. */
void apart_come_last(int nicer);

#endif
