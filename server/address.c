/* Where a server listens; address.h describes it. */
#define _POSIX_C_SOURCE 200809L
#include "address.h"

#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "error.h"

static bool is_loopback(const struct sockaddr *address)
{
    static const struct in6_addr one = IN6ADDR_LOOPBACK_INIT;
    if (address->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)(const void *)address)->sin_addr.s_addr) >> 24 == 127;
    return address->sa_family == AF_INET6 &&
           memcmp(&((const struct sockaddr_in6 *)(const void *)address)->sin6_addr, &one, sizeof one) == 0;
}

enum sqz_status address_find(const struct server_options *o, struct addrinfo **found, struct sqz_error *error)
{
    const struct addrinfo wanted = {
        .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    char port[16];
    *found = NULL;
    snprintf(port, sizeof port, "%u", o->port);
    const int code = getaddrinfo(o->host, port, &wanted, found);
    if (code != 0) {
        *found = NULL;
        return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", o->host, gai_strerror(code));
    }
    if (is_loopback((*found)->ai_addr) || o->key_file || o->public_without_keys) return SQZ_OK;
    freeaddrinfo(*found);
    *found = NULL;
    return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                         "%s can be reached from other machines, and there are no API keys: give some with "
                         "--api-key-file, or say --public-without-keys",
                         o->host);
}
