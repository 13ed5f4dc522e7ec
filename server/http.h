/* The server's HTTP: libmicrohttpd's threads, requests within limits, answers as they come. */
#ifndef SQZ_SERVER_HTTP_H
#define SQZ_SERVER_HTTP_H

#include "core.h"

struct http;

/* Listens. *port: the one it was given, or found. After a failure, too, http_stop() must be called. Errors: IO, MEMORY,
 * INTERNAL. */
enum sqz_status http_start(struct http **out, struct server *server, unsigned *port, struct sqz_error *error);
void http_quiet(struct http *http); /* no more connections are taken */
/* After every stream has ended. */
void http_stop(struct http *http);

/* Some times a second: comments into streams that say nothing, and an end to who says nothing. */
void http_tick(struct http *http);

#endif
