/* Connections from one process to another; handover.h describes it. */
#define _GNU_SOURCE /* struct ucred, accept4 */
#include "handover.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/un.h>
#include <unistd.h>

#include "error.h"

/* An abstract name begins with a NUL. */
static socklen_t address_of(struct sockaddr_un *address, const char *name)
{
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    const int n = snprintf(address->sun_path + 1, sizeof address->sun_path - 1, "%s", name);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

static bool is_same_user(int end)
{
    struct ucred other;
    socklen_t n = sizeof other;
    return getsockopt(end, SOL_SOCKET, SO_PEERCRED, &other, &n) == 0 && other.uid == geteuid();
}

int handover_listen(char name[HANDOVER_NAME_MAX])
{
    struct sockaddr_un address;
    uint64_t secret[2];
    if (getrandom(secret, sizeof secret, 0) != sizeof secret) return -1;
    snprintf(name, HANDOVER_NAME_MAX, "squeeze-%016llx%016llx", (unsigned long long)secret[0],
             (unsigned long long)secret[1]);
    const int listening = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listening < 0) return -1;
    const socklen_t n = address_of(&address, name);
    if (bind(listening, (struct sockaddr *)&address, n) == 0 && listen(listening, 4) == 0) return listening;
    const int why = errno;
    close(listening);
    errno = why;
    return -1;
}

int handover_accept(int listening)
{
    const int end = accept4(listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (end >= 0 && is_same_user(end)) return end;
    if (end >= 0) close(end);
    return -1;
}

static bool is_welcomed(int end, unsigned *restarts)
{
    struct pollfd answer = {.fd = end, .events = POLLIN};
    struct handover_message message;
    int descriptor;
    errno = ETIMEDOUT;
    if (poll(&answer, 1, 10000) != 1 || handover_receive(end, &message, &descriptor) != 1) return false;
    if (descriptor >= 0) close(descriptor);
    *restarts = message.value;
    return message.kind == HANDOVER_WELCOME;
}

enum sqz_status handover_join(const char *name, int *out, unsigned *restarts, struct sqz_error *error)
{
    struct sockaddr_un address;
    if (strlen(name) >= HANDOVER_NAME_MAX)
        return sqz_error_set(error, SQZ_ERROR_IO, "%s is not a supervisor's", HANDOVER_VARIABLE);
    const socklen_t n = address_of(&address, name);
    *out = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (*out >= 0 && connect(*out, (struct sockaddr *)&address, n) == 0 && is_same_user(*out) &&
        is_welcomed(*out, restarts))
        return SQZ_OK;
    const int why = errno;
    if (*out >= 0) close(*out);
    *out = -1;
    return sqz_error_set(
        error, SQZ_ERROR_IO,
        "rank 0 does not reach the server that has started it (%s): it has to run on the same machine, "
        "the first of --hosts",
        strerror(why));
}

bool handover_send(int out, const struct handover_message *message, int descriptor)
{
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {(void *)(uintptr_t)message, sizeof *message};
    struct msghdr all = {.msg_iov = &part, .msg_iovlen = 1};
    if (descriptor >= 0) {
        memset(&control, 0, sizeof control);
        all.msg_control = control.space;
        all.msg_controllen = sizeof control.space;
        struct cmsghdr *head = CMSG_FIRSTHDR(&all);
        *head = (struct cmsghdr){
            .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof descriptor)};
        memcpy(CMSG_DATA(head), &descriptor, sizeof descriptor);
    }
    return sendmsg(out, &all, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)sizeof *message;
}

int handover_receive(int in, struct handover_message *message, int *descriptor)
{
    union {
        char space[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {message, sizeof *message};
    struct msghdr all = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space};
    *descriptor = -1;
    const ssize_t n = recvmsg(in, &all, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    const struct cmsghdr *head = CMSG_FIRSTHDR(&all);
    if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS)
        memcpy(descriptor, CMSG_DATA(head), sizeof *descriptor);
    if (n == (ssize_t)sizeof *message) return 1;
    if (*descriptor >= 0) close(*descriptor);
    *descriptor = -1;
    return -1;
}
