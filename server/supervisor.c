/* A server of ranks; supervisor.h describes it. */
#define _GNU_SOURCE /* accept4, SOCK_NONBLOCK */
#include "supervisor.h"

#include <errno.h>
#include <jansson.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/wait.h>
#include <unistd.h>

#include "address.h"
#include "clock.h"
#include "descriptors.h"
#include "error.h"
#include "handover.h"
#include "keys.h"
#include "metrics.h"
#include "relay.h"
#include "routes.h"

static const double first_pause_seconds = 0.5, long_life_seconds = 60;
/* From the end of rank 0 to the end of mpirun, which says who was lost: behind daemons on other hosts it takes some 3 s. */
static const double verdict_seconds = 6;
/* That ranks have to end behind what answers in work have. */
static const double goodbye_seconds = 3;

enum job_state {
    JOB_STARTING, /* ranks do not answer yet */
    JOB_UP,
    JOB_DYING,  /* rank 0 or mpirun has gone: not known who was lost, or mpirun has not ended */
    JOB_PAUSED, /* until it is started again */
};

struct supervisor {
    const struct supervisor_options *o;
    struct keys *keys;
    struct relays *relays;
    int epoll, listening, handover, rank; /* -1: none */
    unsigned port;
    struct ranks_job job;
    enum job_state state;
    double since, pause; /* when the state began; the last pause */
    bool was_up, told;   /* ever; that who was answered is told, in this death */
    unsigned restarts;
    char trouble[256]; /* why there is no answer */
    void (*ready)(const char *host, unsigned port, size_t n_contexts);
    void (*say)(const char *text);
};

/* ---- Answers without ranks --------------------------------------------------------------- */

static int retry_seconds(const struct supervisor *s)
{
    const double left = s->state == JOB_PAUSED ? s->pause - (sqz_clock_seconds() - s->since) : 0;
    return 2 + (int)(left > 0 ? left : 0);
}

static void set_trouble(const struct supervisor *s, struct fault *fault)
{
    fault->retry_after = retry_seconds(s);
    fault_set(fault, 503, s->was_up ? "rank_lost" : "starting", NULL, "%s", s->trouble);
}

static bool has_key(const struct supervisor *s, const struct asked *asked)
{
    char value[300], bearer[] = "Bearer ";
    const char *argument;
    char allowed[64];
    const struct route *route = routes_find(asked->method, asked->path, &argument, allowed);
    if (!s->keys || (route && route->open)) return true;
    if (head_value(asked->head, asked->head_bytes, "Authorization", value, sizeof value) &&
        strncasecmp(value, bearer, sizeof bearer - 1) == 0)
        return keys_find(s->keys, value + sizeof bearer - 1) >= 0;
    return head_value(asked->head, asked->head_bytes, "x-api-key", value, sizeof value) &&
           keys_find(s->keys, value) >= 0;
}

static void answer_health(const struct supervisor *s, bool bodiless, struct bytes *out)
{
    struct bytes body = {0};
    json_t *root =
        json_pack("{s:s, s:s, s:i, s:i, s:i, s:i}", "status", "degraded", "reason", s->trouble, "ranks",
                  (int)s->o->job.n, "ranks_alive", 0, "restarts", (int)s->restarts, "retry_after", retry_seconds(s));
    char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
    bytes_put(&body, text ? text : "{\"status\":\"degraded\"}");
    free(text);
    json_decref(root);
    answered_body(503, "application/json", &body, retry_seconds(s), bodiless, out);
    bytes_free(&body);
}

static void answer(void *data, const struct asked *asked, struct bytes *out)
{
    const struct supervisor *s = data;
    const bool bodiless = strcmp(asked->method, "HEAD") == 0, asks = bodiless || strcmp(asked->method, "GET") == 0;
    struct fault fault = {0};
    if (asked->head && !has_key(s, asked)) {
        fault_set(&fault, 401, "invalid_api_key", NULL, "an API key is wanted: Authorization: Bearer KEY");
    } else if (asks && strcmp(asked->path, "/health") == 0) {
        answer_health(s, bodiless, out);
        return;
    } else if (asks && asked->head && strcmp(asked->path, "/metrics") == 0) {
        struct bytes body = {0};
        metrics_ranks_text(&(struct metrics_ranks){s->o->job.n, 0, s->restarts}, &body);
        answered_body(200, "text/plain; version=0.0.4; charset=utf-8", &body, 0, bodiless, out);
        bytes_free(&body);
        return;
    }
    if (!fault.status) set_trouble(s, &fault);
    answered_fault(&fault, asked->api, bodiless, out);
}

/* ---- The job --------------------------------------------------------------------------------- */

static void enter(struct supervisor *s, enum job_state state)
{
    s->state = state;
    s->since = sqz_clock_seconds();
}

static void watch(const struct supervisor *s, int descriptor, const int *tag)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = (void *)(uintptr_t)tag};
    epoll_ctl(s->epoll, EPOLL_CTL_ADD, descriptor, &event);
}

static void leave_rank(struct supervisor *s)
{
    relays_to(s->relays, -1);
    if (s->rank >= 0) close(s->rank);
    s->rank = -1;
}

static enum sqz_status start_job(struct supervisor *s, struct sqz_error *error)
{
    const enum sqz_status status = ranks_job_start(&s->job, &s->o->job, error);
    enter(s, JOB_STARTING);
    if (status == SQZ_OK) watch(s, s->job.said, &s->job.said);
    return status;
}

/* Rank 0 has joined, or another process of this user that knew the name: it is the first of a start alone. */
static void meet_rank(struct supervisor *s)
{
    const int rank = handover_accept(s->handover);
    if (rank < 0) return;
    const struct handover_message welcome = {.kind = HANDOVER_WELCOME, .value = s->restarts};
    if (s->rank >= 0 || s->state != JOB_STARTING || !handover_send(rank, &welcome, -1)) {
        close(rank);
        return;
    }
    s->rank = rank;
    watch(s, rank, &s->rank);
}

static void begin_death(struct supervisor *s)
{
    leave_rank(s);
    if (s->state == JOB_STARTING || s->state == JOB_UP) {
        snprintf(s->trouble, sizeof s->trouble, "a rank of %u has died; the ranks are started again", s->o->job.n);
        s->pause = s->was_up && s->state == JOB_UP && sqz_clock_seconds() - s->since > long_life_seconds ? 0 : s->pause;
        enter(s, JOB_DYING);
        s->told = false;
    }
}

static void hear_rank(struct supervisor *s)
{
    struct handover_message message;
    int descriptor, n;
    char text[128];
    while ((n = handover_receive(s->rank, &message, &descriptor)) > 0) {
        if (descriptor >= 0) close(descriptor);
        if (message.kind != HANDOVER_READY || s->state != JOB_STARTING) continue;
        const double seconds = sqz_clock_seconds() - s->since;
        enter(s, JOB_UP);
        relays_to(s->relays, s->rank);
        if (!s->was_up) s->ready(s->o->server.host, s->port, message.value);
        else {
            snprintf(text, sizeof text, "%u ranks are back after %.1f s (restart %u)", s->o->job.n, seconds,
                     s->restarts);
            s->say(text);
        }
        s->was_up = true;
    }
    if (n < 0) begin_death(s);
}

/* Who was being answered is told by whom the answer was lost. */
static void tell(struct supervisor *s)
{
    struct fault fault = {0};
    if (s->told) return;
    s->told = true;
    if (s->job.lost[0])
        snprintf(s->trouble, sizeof s->trouble, "%.160s; the ranks are started again, ask again then", s->job.lost);
    set_trouble(s, &fault);
    relays_break(s->relays, &fault);
}

/* What time does. Errors: ranks that end without having answered, the first time. */
static enum sqz_status move_job(struct supervisor *s, struct sqz_error *error)
{
    const double now = sqz_clock_seconds();
    const bool ended = ranks_job_ended(&s->job);
    char text[400];
    if (ended && (s->state == JOB_STARTING || s->state == JOB_UP)) begin_death(s);
    if (s->state == JOB_DYING) {
        if (ended || s->job.lost[0] || now - s->since > verdict_seconds) tell(s);
        if (!ended) {
            if (now - s->since > verdict_seconds) ranks_job_end(&s->job);
            return SQZ_OK;
        }
        if (!s->was_up)
            return sqz_error_set(error, SQZ_ERROR_IO, "mpirun ended (code %d) before its %u ranks answered%s%s",
                                 WIFEXITED(s->job.status) ? WEXITSTATUS(s->job.status) : 128 + WTERMSIG(s->job.status),
                                 s->o->job.n, s->job.lost[0] ? ": " : "", s->job.lost);
        s->pause = s->pause > 0 ? 2 * s->pause : first_pause_seconds;
        if (s->pause > s->o->most_pause_seconds) s->pause = s->o->most_pause_seconds;
        snprintf(text, sizeof text, "%s; in %.1f s", s->trouble, s->pause);
        s->say(text);
        enter(s, JOB_PAUSED);
    }
    if (s->state == JOB_STARTING && s->rank < 0 && now - s->since > s->o->start_seconds) {
        if (!s->job.lost[0])
            snprintf(s->job.lost, sizeof s->job.lost, "mpirun has not started %u ranks within %g s", s->o->job.n,
                     s->o->start_seconds);
        ranks_job_end(&s->job);
        begin_death(s);
        return SQZ_OK;
    }
    if (s->state != JOB_PAUSED || now - s->since < s->pause) return SQZ_OK;
    s->restarts++;
    return start_job(s, error);
}

/* ---- Start and end -------------------------------------------------------------------------------- */

static enum sqz_status listen_at(struct supervisor *s, struct sqz_error *error)
{
    const struct server_options *o = &s->o->server;
    struct addrinfo *address = NULL;
    struct sockaddr_storage bound;
    socklen_t n = sizeof bound;
    const int one = 1;
    const enum sqz_status status = address_find(o, &address, error);
    if (status != SQZ_OK) return status;
    s->listening = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s->listening >= 0) setsockopt(s->listening, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    const bool listens = s->listening >= 0 && bind(s->listening, address->ai_addr, address->ai_addrlen) == 0 &&
                         listen(s->listening, 1024) == 0 &&
                         getsockname(s->listening, (struct sockaddr *)&bound, &n) == 0;
    freeaddrinfo(address);
    if (!listens) return sqz_error_set(error, SQZ_ERROR_IO, "%s, port %u: %s", o->host, o->port, strerror(errno));
    s->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)(void *)&bound)->sin6_port
                                                : ((struct sockaddr_in *)(void *)&bound)->sin_port);
    return SQZ_OK;
}

static enum sqz_status open_all(struct supervisor *s, struct sqz_error *error)
{
    const struct server_options *o = &s->o->server;
    char name[HANDOVER_NAME_MAX];
    enum sqz_status status = ranks_job_prepare(error);
    if (status == SQZ_OK && o->key_file) status = keys_read(&s->keys, o->key_file, error);
    if (status == SQZ_OK) status = listen_at(s, error);
    if (status != SQZ_OK) return status;
    raise_descriptors(2 * o->most_connections);
    s->epoll = epoll_create1(EPOLL_CLOEXEC);
    s->handover = handover_listen(name);
    if (s->epoll < 0 || s->handover < 0 || setenv(HANDOVER_VARIABLE, name, 1) != 0)
        return sqz_error_set(error, SQZ_ERROR_IO, "a socket for ranks: %s", strerror(errno));
    s->relays = relays_create(&(struct relays_options){.epoll = s->epoll,
                                                       .most = o->most_connections,
                                                       .header_seconds = o->header_seconds,
                                                       .answer = answer,
                                                       .data = s});
    if (!s->relays) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    watch(s, s->listening, &s->listening);
    watch(s, s->handover, &s->handover);
    return start_job(s, error);
}

static void turn(struct supervisor *s)
{
    struct epoll_event events[64];
    const int n = epoll_wait(s->epoll, events, 64, 50);
    for (int i = 0; i < n; i++) {
        void *from = events[i].data.ptr;
        if (from == &s->listening) relays_accept(s->relays, s->listening);
        else if (from == &s->handover) meet_rank(s);
        else if (from == &s->rank) hear_rank(s);
        else if (from == &s->job.said) ranks_job_listen(&s->job);
        else relays_event(s->relays, from, events[i].events);
    }
    relays_tick(s->relays);
}

/* Nobody comes any more, answers in work may end, ranks end, connections do. */
static void close_all(struct supervisor *s)
{
    const struct handover_message stop = {.kind = HANDOVER_STOP};
    const double since = sqz_clock_seconds();
    const double asked = s->state == JOB_UP && handover_send(s->rank, &stop, -1) ? s->o->server.stop_seconds : 0;
    if (s->listening >= 0) close(s->listening);
    snprintf(s->trouble, sizeof s->trouble, "the server is stopping");
    while (s->job.mpirun && !ranks_job_ended(&s->job)) {
        const double late = sqz_clock_seconds() - since - asked;
        if (late > (asked > 0 ? goodbye_seconds : 0)) ranks_job_end(&s->job);
        turn(s);
    }
    if (s->relays) {
        struct fault fault = {0};
        fault_of_end(&fault, NULL);
        relays_break(s->relays, &fault);
        for (int i = 0; i < 40 && relays_count(s->relays); i++) turn(s);
    }
    relays_free(s->relays);
    if (s->rank >= 0) close(s->rank);
    if (s->handover >= 0) close(s->handover);
    if (s->epoll >= 0) close(s->epoll);
    keys_free(s->keys);
}

enum sqz_status supervisor_run(const struct supervisor_options *options, bool (*stop)(void),
                               void (*ready)(const char *host, unsigned port, size_t n_contexts),
                               void (*say)(const char *text), struct sqz_error *error)
{
    struct supervisor s = {.o = options,
                           .epoll = -1,
                           .listening = -1,
                           .handover = -1,
                           .rank = -1,
                           .job = {.said = -1},
                           .ready = ready,
                           .say = say};
    sqz_error_clear(error);
    snprintf(s.trouble, sizeof s.trouble, "%u ranks are being started", options->job.n);
    enum sqz_status status = open_all(&s, error);
    while (status == SQZ_OK && !stop()) {
        turn(&s);
        status = move_job(&s, error);
    }
    close_all(&s);
    return status;
}
