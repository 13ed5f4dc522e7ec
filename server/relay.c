/* Connections between clients and rank 0; relay.h describes it. */
#define _GNU_SOURCE /* accept4, EPOLLRDHUP */
#include "relay.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "clock.h"
#include "handover.h"

enum { MOST_HEAD_BYTES = 8 * 1024, MOST_QUEUED_BYTES = 64 * 1024, PIECE_BYTES = 16 * 1024 };
/* An answer that was said is not cut off by what its client still sends: that is read for so long. */
static const double linger_seconds = 2;
/* Rank 0 has gone from a connection without an answer: who is to blame is known by then, or it was a limit of its own. */
static const double orphan_seconds = 0.5;

struct relay;

struct side {
    struct relay *relay;
    int socket;       /* -1: none */
    uint32_t wanted;  /* events that epoll watches for */
    bool ended, shut; /* it sends no more; nothing more is sent to it */
};

struct relay {
    struct relays *all;
    struct relay *next, *before; /* a ring */
    struct side client, rank;
    struct bytes up, down; /* not yet sent to rank 0, to the client */
    struct sockaddr_storage peer;
    socklen_t peer_bytes;
    double since; /* when it came; when its end began */
    enum { RELAY_HEAD, RELAY_OPEN, RELAY_ORPHAN, RELAY_CLOSING, RELAY_DEAD } state;
    struct answered answer;
    struct asked asked; /* without its head */
};

struct relays {
    struct relays_options o;
    struct relay ring; /* head of it */
    struct relay *dead;
    size_t n;
    int rank; /* -1: none */
};

/* ---- One end ---------------------------------------------------------------------------- */

static void watch(struct side *s, uint32_t wanted)
{
    struct epoll_event event = {.events = wanted, .data.ptr = s};
    if (s->socket < 0 || s->wanted == wanted) return;
    epoll_ctl(s->relay->all->o.epoll, EPOLL_CTL_MOD, s->socket, &event);
    s->wanted = wanted;
}

static bool join(struct side *s, struct relay *r, int socket)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = s};
    *s = (struct side){.relay = r, .socket = socket, .wanted = EPOLLIN};
    if (epoll_ctl(r->all->o.epoll, EPOLL_CTL_ADD, socket, &event) == 0) return true;
    close(socket);
    s->socket = -1;
    return false;
}

static void close_side(struct side *s)
{
    if (s->socket >= 0) close(s->socket);
    s->socket = -1;
}

/* What there is, a piece at most. 0: nothing now; -1: it broke off. */
static ssize_t take(struct side *s, char *piece)
{
    const ssize_t n = recv(s->socket, piece, PIECE_BYTES, 0);
    if (n == 0) s->ended = true;
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    return n;
}

/* False: it takes no more, ever. */
static bool give(struct side *s, struct bytes *bytes)
{
    while (bytes->n && s->socket >= 0) {
        const ssize_t n = send(s->socket, bytes->data, bytes->n, MSG_NOSIGNAL);
        if (n < 0) return errno == EAGAIN || errno == EINTR;
        bytes_drop(bytes, (size_t)n);
        if (!bytes->n) bytes_free(bytes); /* connections that wait keep nothing */
    }
    return true;
}

static void shut(struct side *s)
{
    if (s->socket >= 0 && !s->shut) shutdown(s->socket, SHUT_WR);
    s->shut = true;
}

/* ---- A connection --------------------------------------------------------------------------- */

static void end_relay(struct relay *r)
{
    if (r->state == RELAY_DEAD) return;
    r->state = RELAY_DEAD;
    r->before->next = r->next;
    r->next->before = r->before;
    r->all->n--;
    close_side(&r->client);
    close_side(&r->rank);
    bytes_free(&r->up);
    bytes_free(&r->down);
    answered_free(&r->answer);
    r->next = r->all->dead; /* events of it may be in hand */
    r->all->dead = r;
}

/* All of the answer is in `down`. */
static void begin_end(struct relay *r)
{
    close_side(&r->rank);
    bytes_free(&r->up);
    r->state = RELAY_CLOSING;
    r->since = sqz_clock_seconds();
}

/* What each end is watched for. */
static void settle(struct relay *r)
{
    const bool head = r->state == RELAY_HEAD, open = r->state == RELAY_OPEN;
    if (r->state == RELAY_DEAD) return;
    if (!give(&r->client, &r->down) || r->down.failed || r->up.failed || r->answer.in.failed) {
        end_relay(r);
        return;
    }
    if (open && !give(&r->rank, &r->up)) bytes_free(&r->up); /* it answers without having read all */
    if (open && r->client.ended && !r->up.n) shut(&r->rank);
    if (r->state == RELAY_CLOSING && !r->down.n) {
        shut(&r->client);
        if (r->client.ended) {
            end_relay(r);
            return;
        }
    }
    const bool reads = !r->client.ended && (head || r->state == RELAY_CLOSING || (open && r->up.n < MOST_QUEUED_BYTES));
    watch(&r->client, (reads ? EPOLLIN : 0) | (r->down.n ? EPOLLOUT : 0));
    if (open)
        watch(&r->rank, (!r->rank.ended && r->down.n < MOST_QUEUED_BYTES ? EPOLLIN : 0) | (r->up.n ? EPOLLOUT : 0));
}

/* A socket to rank 0, which gets its other end. */
static bool hand_over(struct relay *r)
{
    int ends[2];
    struct handover_message message = {.kind = HANDOVER_CONNECTION, .peer_bytes = (uint32_t)r->peer_bytes};
    if (r->all->rank < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) != 0) return false;
    memcpy(&message.peer, &r->peer, sizeof r->peer);
    const bool sent = handover_send(r->all->rank, &message, ends[1]);
    close(ends[1]);
    if (!sent) {
        close(ends[0]);
        return false;
    }
    return join(&r->rank, r, ends[0]);
}

static void read_line(const struct relay *r, struct asked *asked)
{
    const char *at = r->up.data, *end = at + asked->head_bytes;
    size_t n = 0;
    for (; at<end && * at> ' ' && n + 1 < sizeof asked->method; at++) asked->method[n++] = *at;
    asked->method[n] = '\0';
    while (at < end && *at == ' ') at++;
    for (n = 0; at<end && * at> ' ' && *at != '?' && n + 1 < sizeof asked->path; at++) asked->path[n++] = *at;
    asked->path[n] = '\0';
    asked->api = asked_api_of(asked->path);
}

/* A head that is too long is left to rank 0, which says so. */
static void take_head(struct relay *r)
{
    const char *end = r->up.n ? memmem(r->up.data, r->up.n, "\r\n\r\n", 4) : NULL;
    struct asked asked = {.head = r->up.data, .head_bytes = end ? (size_t)(end - r->up.data) + 2 : r->up.n};
    if (!end && r->up.n < MOST_HEAD_BYTES) {
        if (r->client.ended) end_relay(r);
        return;
    }
    read_line(r, &asked);
    r->asked = asked;
    r->asked.head = NULL;
    r->answer.api = asked.api;
    r->answer.bodiless = strcmp(asked.method, "HEAD") == 0;
    if (hand_over(r)) {
        r->state = RELAY_OPEN;
        return;
    }
    r->all->o.answer(r->all->o.data, &asked, &r->down);
    begin_end(r);
}

/* Rank 0 has ended the connection. */
static void rank_ended(struct relay *r)
{
    if (r->answer.state == ANSWER_DONE || r->answer.state == ANSWER_UNTIL_END) begin_end(r);
    else {
        close_side(&r->rank);
        r->state = RELAY_ORPHAN;
        r->since = sqz_clock_seconds();
    }
}

static void from_client(struct relay *r)
{
    char piece[PIECE_BYTES];
    const ssize_t n = take(&r->client, piece);
    if (n < 0) {
        end_relay(r);
        return;
    }
    if (r->state == RELAY_HEAD || r->state == RELAY_OPEN) bytes_append(&r->up, piece, (size_t)n);
    if (r->state == RELAY_HEAD) take_head(r);
}

static void from_rank(struct relay *r)
{
    char piece[PIECE_BYTES];
    const ssize_t n = take(&r->rank, piece);
    if (n > 0) answered_take(&r->answer, piece, (size_t)n, &r->down);
    if (n < 0 || r->rank.ended) rank_ended(r);
}

void relays_event(struct relays *all, void *data, uint32_t events)
{
    struct side *s = data;
    struct relay *r = s->relay;
    (void)all;
    if (r->state == RELAY_DEAD) return;
    const bool broken = events & (EPOLLERR | EPOLLHUP);
    if (s == &r->client) {
        if (broken && !(events & EPOLLIN)) end_relay(r);
        else if (events & EPOLLIN) from_client(r);
    } else if (s->socket >= 0 && (events & (EPOLLIN | EPOLLHUP | EPOLLERR))) {
        from_rank(r);
    }
    settle(r);
}

/* ---- All of them ---------------------------------------------------------------------------------- */

struct relays *relays_create(const struct relays_options *options)
{
    struct relays *all = calloc(1, sizeof *all);
    if (!all) return NULL;
    all->o = *options;
    all->rank = -1;
    all->ring.next = all->ring.before = &all->ring;
    return all;
}

static void bury(struct relays *all)
{
    while (all->dead) {
        struct relay *r = all->dead;
        all->dead = r->next;
        free(r);
    }
}

void relays_free(struct relays *all)
{
    if (!all) return;
    while (all->ring.next != &all->ring) end_relay(all->ring.next);
    bury(all);
    free(all);
}

void relays_accept(struct relays *all, int listening)
{
    for (;;) {
        struct sockaddr_storage peer = {0};
        socklen_t n = sizeof peer;
        const int one = 1, socket = accept4(listening, (struct sockaddr *)&peer, &n, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (socket < 0) return;
        struct relay *r = all->n < all->o.most ? calloc(1, sizeof *r) : NULL;
        if (!r) {
            close(socket);
            continue;
        }
        setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        *r = (struct relay){.all = all, .peer = peer, .peer_bytes = n, .since = sqz_clock_seconds()};
        r->rank = (struct side){.relay = r, .socket = -1};
        if (!join(&r->client, r, socket)) {
            free(r);
            continue;
        }
        r->next = all->ring.next;
        r->before = &all->ring;
        r->next->before = all->ring.next = r;
        all->n++;
    }
}

void relays_tick(struct relays *all)
{
    const double now = sqz_clock_seconds();
    for (struct relay *r = all->ring.next, *next; r != &all->ring; r = next) {
        next = r->next;
        const double most = r->state == RELAY_HEAD      ? all->o.header_seconds
                            : r->state == RELAY_CLOSING ? linger_seconds + (r->down.n ? all->o.header_seconds : 0)
                            : r->state == RELAY_ORPHAN && all->rank >= 0 ? orphan_seconds
                                                                         : 1e9;
        if (now - r->since > most) end_relay(r);
    }
    bury(all);
}

void relays_to(struct relays *all, int socket)
{
    all->rank = socket;
}

void relays_break(struct relays *all, const struct fault *fault)
{
    for (struct relay *r = all->ring.next, *next; r != &all->ring; r = next) {
        next = r->next;
        if (r->state != RELAY_OPEN && r->state != RELAY_ORPHAN) continue;
        for (ssize_t n = 1; n > 0 && r->state == RELAY_OPEN && !r->rank.ended;) { /* what it said last */
            char piece[PIECE_BYTES];
            n = take(&r->rank, piece);
            if (n > 0) answered_take(&r->answer, piece, (size_t)n, &r->down);
        }
        if (!r->answer.begun) {
            all->o.answer(all->o.data, &r->asked, &r->down);
            begin_end(r);
            settle(r);
        } else if (answered_break(&r->answer, fault, &r->down)) {
            begin_end(r);
            settle(r);
        } else end_relay(r);
    }
}

size_t relays_count(const struct relays *all)
{
    return all->n;
}
