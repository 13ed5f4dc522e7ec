/* Where a server listens: an address of its options, refused where strangers would reach it. */
#ifndef SQZ_SERVER_ADDRESS_H
#define SQZ_SERVER_ADDRESS_H

#include <netdb.h>

#include "server.h"

/* The host and port of the options. *found is freed by freeaddrinfo(), NULL after an error. Errors: IO; ARGUMENT (an
 * address that other machines reach, without keys and without leave). */
enum sqz_status address_find(const struct server_options *options, struct addrinfo **found, struct sqz_error *error);

#endif
