/* Rank 0's connections: those that its supervisor hands over (handover.h), in place of an address to listen at. */
#ifndef SQZ_SERVER_HANDED_H
#define SQZ_SERVER_HANDED_H

#include <microhttpd.h>

#include "squeeze.h"

struct handed;

/* A thread that gives the daemon what comes over the socket. Errors: MEMORY, INTERNAL. */
enum sqz_status handed_start(struct handed **out, int socket, struct MHD_Daemon *daemon, struct sqz_error *error);
void handed_stop(struct handed *handed);

#endif
