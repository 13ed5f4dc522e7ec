/* The server's HTTP; http.h describes it. */
#define _GNU_SOURCE /* EPOLLRDHUP */
#include "http.h"

#include <errno.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "address.h"
#include "apart.h"
#include "clock.h"
#include "error.h"
#include "handed.h"
#include "ids.h"
#include "routes.h"

/* A connection keeps this much for a request's head and a response's: longer heads are refused by the library (431,
 * 414). */
enum { CONNECTION_BYTES = 8 * 1024 + 512, N_THREADS = 4, PIECE_BYTES = 1024, MOST_BODIES_BYTES = 512 << 20 };

/* A body of more is served apart: text is cut into tokens at 0.7 MB a second. */
enum { SHORT_BODY_BYTES = 4096 };

struct link {
    struct link *next, *before;
};

/* A connection, from its beginning to its end. */
struct line {
    struct link link;
    int descriptor;
    double since; /* when it began to wait for a request's head; 0: it has one */
};

/* A request, from its head to its end. */
struct exchange {
    struct link link; /* of those with a stream */
    struct apart_work work;
    atomic_bool served; /* its route has run */
    bool here, replied; /* it has to run where connections are served; its reply has begun */
    struct http *http;
    struct MHD_Connection *connection;
    struct line *line;
    const struct route *route;
    struct call call;
    double began;
    size_t most_bytes, counted_bytes;
    bool watched, whole; /* its peer's leaving is; its body is complete */
};

struct http {
    struct server *server;
    struct MHD_Daemon *daemon;
    MHD_socket listening;
    struct handed *handed; /* NULL: it listens itself */
    pthread_mutex_t lock;
    struct link lines, streams; /* rings */
    struct apart *apart;
    atomic_size_t bodies_bytes; /* of all requests together */
    int watch;                  /* an epoll of connections whose answers are being made */
    pthread_t watcher;
    bool watching;
    atomic_bool stopping;
};

static void ring_add(struct link *ring, struct link *link)
{
    link->next = ring->next;
    link->before = ring;
    ring->next->before = link;
    ring->next = link;
}

static void ring_remove(struct link *link)
{
    if (!link->next) return;
    link->before->next = link->next;
    link->next->before = link->before;
    link->next = link->before = NULL;
}

/* ---- Who left ------------------------------------------------------------------------ */

/* Events are fetched and used under the lock under which connections are taken out: none is of one that is no more. */
static void *watch_peers(void *data)
{
    struct http *h = data;
    struct epoll_event events[64];
    while (!h->stopping) {
        struct pollfd any = {.fd = h->watch, .events = POLLIN};
        if (poll(&any, 1, 200) <= 0) continue;
        pthread_mutex_lock(&h->lock);
        const int n = epoll_wait(h->watch, events, 64, 0);
        for (int i = 0; i < n; i++) {
            struct exchange *x = events[i].data.ptr;
            stream_abort(x->call.stream);
        }
        pthread_mutex_unlock(&h->lock);
        if (n > 0) scheduler_wake(h->server->scheduler);
    }
    return NULL;
}

static void watch(struct exchange *x)
{
    struct http *h = x->http;
    struct epoll_event event = {.events = EPOLLRDHUP | EPOLLET | EPOLLONESHOT, .data.ptr = x};
    pthread_mutex_lock(&h->lock);
    ring_add(&h->streams, &x->link);
    x->watched = x->line && epoll_ctl(h->watch, EPOLL_CTL_ADD, x->line->descriptor, &event) == 0;
    pthread_mutex_unlock(&h->lock);
}

static void unwatch(struct exchange *x)
{
    struct http *h = x->http;
    pthread_mutex_lock(&h->lock);
    ring_remove(&x->link);
    if (x->watched) epoll_ctl(h->watch, EPOLL_CTL_DEL, x->line->descriptor, NULL);
    x->watched = false;
    pthread_mutex_unlock(&h->lock);
}

/* ---- Responses --------------------------------------------------------------------------- */

/* All that the page may do is load its own files and ask this server. */
static const char page_policy[] =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

static enum MHD_Result queue(struct exchange *x, int status, struct MHD_Response *response, const char *type)
{
    if (!response) return MHD_NO;
    MHD_add_response_header(response, "Content-Type", type);
    MHD_add_response_header(response, "x-request-id", x->call.fault.request_id); /* as OpenAI's clients read it */
    MHD_add_response_header(response, "request-id", x->call.fault.request_id);   /* and Anthropic's */
    /* The supervisor knows one request of a connection. */
    if (x->http->server->options.supervisor >= 0) MHD_add_response_header(response, "Connection", "close");
    MHD_add_response_header(response, "X-Content-Type-Options", "nosniff");
    MHD_add_response_header(response, "Cache-Control", x->call.page ? "no-cache" : "no-store");
    if (x->call.page) {
        MHD_add_response_header(response, "ETag", x->call.etag);
        MHD_add_response_header(response, "Content-Security-Policy", page_policy);
        MHD_add_response_header(response, "Referrer-Policy", "no-referrer");
    }
    const enum MHD_Result queued = MHD_queue_response(x->connection, (unsigned)status, response);
    MHD_destroy_response(response);
    return queued;
}

/* The bytes become the response's. */
static struct MHD_Response *response_of(struct bytes *bytes)
{
    struct MHD_Response *response =
        MHD_create_response_from_buffer(bytes->n, bytes->data ? bytes->data : "", MHD_RESPMEM_MUST_COPY);
    bytes_free(bytes);
    return response;
}

static void add_retry(struct MHD_Response *response, int seconds)
{
    char text[16];
    snprintf(text, sizeof text, "%d", seconds);
    if (response && seconds > 0) MHD_add_response_header(response, "Retry-After", text);
}

static enum MHD_Result reply_fault(struct exchange *x, const char *allowed)
{
    struct fault *fault = &x->call.fault;
    struct bytes body = {0};
    fault_body(fault, x->call.api, &body);
    struct MHD_Response *response = response_of(&body);
    add_retry(response, fault->retry_after);
    if (response && allowed && *allowed) MHD_add_response_header(response, "Allow", allowed);
    if (response && fault->status == 401) MHD_add_response_header(response, "WWW-Authenticate", "Bearer");
    if (response && !x->whole) MHD_add_response_header(response, "Connection", "close");
    return queue(x, fault->status, response, "application/json");
}

/* A connection sleeps until its stream has something; the stream wakes it under its lock. */
static void wake(void *owner)
{
    MHD_resume_connection(owner);
}

static ssize_t take_piece(void *data, uint64_t position, char *buffer, size_t most)
{
    struct exchange *x = data;
    struct stream *s = x->call.stream;
    ssize_t n = 0;
    (void)position;
    pthread_mutex_lock(&s->lock);
    if (s->aborted) n = MHD_CONTENT_READER_END_WITH_ERROR;
    else if (s->out.n) {
        n = (ssize_t)(s->out.n < most ? s->out.n : most);
        memcpy(buffer, s->out.data, (size_t)n);
        bytes_drop(&s->out, (size_t)n);
        if (s->out.n == 0) bytes_free(&s->out); /* streams that say little keep nothing */
    } else if (s->finished) n = MHD_CONTENT_READER_END_OF_STREAM;
    else {
        s->sleeping = true;
        MHD_suspend_connection(x->connection);
    }
    pthread_mutex_unlock(&s->lock);
    return n;
}

static enum MHD_Result reply_events(struct exchange *x)
{
    struct MHD_Response *response =
        MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, PIECE_BYTES, take_piece, x, NULL);
    if (response) MHD_add_response_header(response, "X-Accel-Buffering", "no"); /* nginx: pass on as it comes */
    return queue(x, 200, response, "text/event-stream");
}

/* A stream that goes out whole: sleeps until it is finished. */
static enum MHD_Result reply_whole(struct exchange *x)
{
    struct stream *s = x->call.stream;
    pthread_mutex_lock(&s->lock);
    const bool finished = s->finished, aborted = s->aborted;
    if (!finished && !aborted) {
        s->sleeping = true;
        MHD_suspend_connection(x->connection);
    }
    pthread_mutex_unlock(&s->lock);
    if (aborted) return MHD_NO;
    if (!finished) return MHD_YES;
    struct MHD_Response *response = response_of(&s->out);
    add_retry(response, s->retry_after);
    return queue(x, s->status, response, "application/json");
}

/* ---- A request's head ----------------------------------------------------------------------- */

static const char *header(const struct exchange *x, const char *name)
{
    return MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, name);
}

static const char *query(void *data, const char *name)
{
    return MHD_lookup_connection_value(data, MHD_GET_ARGUMENT_KIND, name);
}

/* Bytes of a host's name without its port. */
static size_t host_bytes(const char *host)
{
    if (*host == '[') return strcspn(host, "]") + 1;
    return strcspn(host, ":");
}

static bool is_loopback_name(const char *host)
{
    static const char *const names[] = {"localhost", "127.0.0.1", "[::1]"};
    const size_t n = host_bytes(host);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strlen(names[i]) == n && strncasecmp(host, names[i], n) == 0) return true;
    return false;
}

/* A page from elsewhere in a browser on this machine may send requests here: one that says where it is from must be
 * from here, and without keys a name that only pretends to be this machine's is none. */
static bool check_origin(struct exchange *x)
{
    const struct server *server = x->http->server;
    const char *origin = header(x, "Origin"), *host = header(x, "Host");
    if (!server->keys && !server->options.public_without_keys && host && !is_loopback_name(host))
        return fault_set(&x->call.fault, 403, "wrong_host", NULL,
                         "this server is on the loopback alone: a name of this machine is wanted, such as localhost");
    if (!origin) return true;
    const char *name = strstr(origin, "://");
    if (name && host && strcasecmp(name + 3, host) == 0) return true;
    return fault_set(&x->call.fault, 403, "wrong_origin", NULL, "requests of pages from other places are refused");
}

static bool check_key(struct exchange *x)
{
    const struct server *server = x->http->server;
    const char *bearer = header(x, "Authorization"), *key = header(x, "x-api-key");
    if (!server->keys || (x->route && x->route->open)) return true;
    if (bearer && strncasecmp(bearer, "Bearer ", 7) == 0) key = bearer + 7;
    const int number = key ? keys_find(server->keys, key) : -1;
    if (number < 0)
        return fault_set(&x->call.fault, 401, "invalid_api_key", NULL, "%s",
                         key ? "this API key is not known" : "an API key is wanted: Authorization: Bearer KEY");
    x->call.user = (unsigned)number % 1024;
    return true;
}

/* Without keys users are told apart by where they come from. */
static unsigned user_of_address(struct MHD_Connection *connection)
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CLIENT_ADDRESS);
    const unsigned char *at = NULL;
    size_t n = 0;
    unsigned hash = 2166136261u;
    if (info && info->client_addr->sa_family == AF_INET) {
        at = (const unsigned char *)&((const struct sockaddr_in *)(const void *)info->client_addr)->sin_addr;
        n = 4;
    } else if (info && info->client_addr->sa_family == AF_INET6) {
        at = (const unsigned char *)&((const struct sockaddr_in6 *)(const void *)info->client_addr)->sin6_addr;
        n = 8; /* a network */
    }
    for (size_t i = 0; i < n; i++) hash = (hash ^ at[i]) * 16777619u;
    return hash % 1024;
}

/* A body that is somewhat too large is read all the same: clients that are still sending do not see the answer. */
static bool check_length(struct exchange *x)
{
    const char *length = header(x, "Content-Length");
    if (!length) return true;
    char *end;
    errno = 0;
    const unsigned long long n = strtoull(length, &end, 10);
    if (errno || end == length || *end || n > 2 * x->most_bytes || (n > x->most_bytes && header(x, "Expect")))
        return fault_set(&x->call.fault, 413, "body_too_large", NULL, "a body of %.32s bytes: at most %zu", length,
                         x->most_bytes);
    return true;
}

static bool check_head(struct exchange *x, const char *method, const char *path, char allowed[64])
{
    const struct server_options *o = &x->http->server->options;
    x->route = routes_find(method, path, &x->call.argument, allowed);
    if (x->route) x->call.api = x->route->api;
    x->most_bytes = x->route && x->route->upload ? o->most_upload_bytes : o->most_body_bytes;
    if (!check_origin(x) || !check_key(x)) return false;
    if (!x->route && allowed[0])
        return fault_set(&x->call.fault, 405, "method_not_allowed", NULL, "%.16s is not among the methods here: %s",
                         method, allowed);
    if (!x->route) return fault_set(&x->call.fault, 404, "not_found", NULL, "there is nothing at this path");
    return check_length(x);
}

/* ---- A request's way --------------------------------------------------------------------------- */

static struct exchange *exchange_create(struct http *h, struct MHD_Connection *connection, const char *method)
{
    struct exchange *x = calloc(1, sizeof *x);
    if (!x) return NULL;
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    x->http = h;
    x->connection = connection;
    x->line = info ? info->socket_context : NULL;
    x->began = sqz_clock_seconds();
    x->call =
        (struct call){.server = h->server, .method = method, .argument = "", .query = query, .query_data = connection};
    x->call.user = user_of_address(connection);
    id_make(x->call.fault.request_id, sizeof x->call.fault.request_id, "req_");
    if (x->line) {
        pthread_mutex_lock(&h->lock);
        x->line->since = 0;
        pthread_mutex_unlock(&h->lock);
    }
    return x;
}

/* Takes a piece of the body; one that is too large is read on for a while, so that the client sees the answer. */
static enum MHD_Result take_body(struct exchange *x, const char *data, size_t n)
{
    struct call *call = &x->call;
    x->counted_bytes += n;
    /* A kilobyte a second is what a body comes with at least. */
    const double allowed = x->http->server->options.header_seconds + (double)x->counted_bytes / 1024;
    const bool late = sqz_clock_seconds() - x->began > allowed;
    if (late || x->counted_bytes > 2 * x->most_bytes) return MHD_NO;
    if (call->fault.status) return MHD_YES;
    if (x->counted_bytes > x->most_bytes)
        fault_set(&call->fault, 413, "body_too_large", NULL, "the body is larger than %zu bytes", x->most_bytes);
    else if (atomic_fetch_add(&x->http->bodies_bytes, n) + n > MOST_BODIES_BYTES) {
        atomic_fetch_sub(&x->http->bodies_bytes, n);
        call->fault.retry_after = 2;
        fault_set(&call->fault, 503, "out_of_memory", NULL, "too many large requests at once");
    } else bytes_append(&call->body, data, n);
    if (call->fault.status) {
        atomic_fetch_sub(&x->http->bodies_bytes, call->body.n);
        bytes_free(&call->body);
    }
    return MHD_YES;
}

static void drop_body(struct exchange *x)
{
    atomic_fetch_sub(&x->http->bodies_bytes, x->call.body.n);
    bytes_free(&x->call.body);
}

static void run_route(struct exchange *x)
{
    struct call *call = &x->call;
    if (call->body.failed) fault_set(&call->fault, 503, "out_of_memory", NULL, "out of memory");
    if (!call->fault.status) x->route->run(call);
    drop_body(x);
    x->served = true;
}

static void run_apart(struct apart_work *work)
{
    struct exchange *x = (struct exchange *)((char *)work - offsetof(struct exchange, work));
    struct MHD_Connection *connection = x->connection;
    run_route(x);
    MHD_resume_connection(connection); /* take_request() is called again, and replies */
}

static enum MHD_Result reply(struct exchange *x)
{
    struct call *call = &x->call;
    x->replied = true;
    if (call->stream) {
        stream_join(call->stream, wake, x->connection);
        watch(x);
        return call->stream->events ? reply_events(x) : reply_whole(x);
    }
    if (call->fault.status) return reply_fault(x, NULL);
    const char *known = header(x, "If-None-Match");
    if (call->page && known && strstr(known, call->etag)) {
        call->status = 304;
        bytes_free(&call->reply);
    }
    return queue(x, call->status, response_of(&call->reply), call->reply_type);
}

/* The body is complete. */
static enum MHD_Result serve(struct exchange *x)
{
    x->whole = true;
    x->call.content_type = header(x, "Content-Type");
    if (x->call.body.n > SHORT_BODY_BYTES && !x->here) {
        x->work.run = run_apart;
        MHD_suspend_connection(x->connection); /* first: it may be resumed at once */
        if (apart_put(x->http->apart, &x->work)) return MHD_YES;
        x->here = true; /* the server is stopping */
        MHD_resume_connection(x->connection);
        return MHD_YES;
    }
    run_route(x);
    return reply(x);
}

static enum MHD_Result take_request(void *data, struct MHD_Connection *connection, const char *path, const char *method,
                                    const char *version, const char *body, size_t *n_body, void **kept)
{
    struct http *h = data;
    struct exchange *x = *kept;
    (void)version;
    if (!x) {
        char allowed[64];
        *kept = x = exchange_create(h, connection, method);
        if (!x) return MHD_NO;
        return check_head(x, method, path, allowed) ? MHD_YES : reply_fault(x, allowed);
    }
    if (*n_body) {
        const size_t n = *n_body;
        *n_body = 0;
        return take_body(x, body, n);
    }
    if (!x->served) return serve(x);
    return x->replied ? reply_whole(x) : reply(x);
}

/* ---- Ends ------------------------------------------------------------------------------------------ */

static void request_ended(void *data, struct MHD_Connection *connection, void **kept,
                          enum MHD_RequestTerminationCode code)
{
    struct http *h = data;
    struct exchange *x = *kept;
    (void)connection;
    (void)code;
    if (!x) return;
    *kept = NULL;
    if (x->call.stream) {
        unwatch(x);
        stream_leave(x->call.stream);
        stream_release(x->call.stream);
        scheduler_wake(h->server->scheduler);
    }
    if (x->line) {
        pthread_mutex_lock(&h->lock);
        x->line->since = sqz_clock_seconds();
        pthread_mutex_unlock(&h->lock);
    }
    drop_body(x);
    bytes_free(&x->call.reply);
    free(x);
}

static void line_changed(void *data, struct MHD_Connection *connection, void **kept,
                         enum MHD_ConnectionNotificationCode code)
{
    struct http *h = data;
    struct line *line = *kept;
    pthread_mutex_lock(&h->lock);
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
        *kept = line = calloc(1, sizeof *line);
        if (line) {
            line->descriptor = info->connect_fd;
            line->since = sqz_clock_seconds();
            ring_add(&h->lines, &line->link);
            atomic_fetch_add(&h->server->metrics.value[METRIC_CONNECTIONS], 1);
        }
    } else if (line) {
        ring_remove(&line->link);
        free(line);
        *kept = NULL;
        atomic_fetch_sub(&h->server->metrics.value[METRIC_CONNECTIONS], 1);
    }
    pthread_mutex_unlock(&h->lock);
}

/* One that drips a request's head holds a connection for nothing. */
void http_tick(struct http *h)
{
    const double now = sqz_clock_seconds();
    pthread_mutex_lock(&h->lock);
    for (struct link *at = h->streams.next; at != &h->streams; at = at->next)
        stream_keep_alive(((struct exchange *)at)->call.stream, now, 0.9);
    for (struct link *at = h->lines.next; at != &h->lines; at = at->next) {
        const struct line *line = (struct line *)at;
        if (line->since > 0 && now - line->since > h->server->options.header_seconds)
            shutdown(line->descriptor, SHUT_RDWR);
    }
    pthread_mutex_unlock(&h->lock);
}

/* ---- Start and stop ------------------------------------------------------------------------------------ */

static void drop_message(void *data, const char *format, va_list arguments)
{
    (void)data;
    (void)format;
    (void)arguments;
}

/* address NULL: connections are handed over. */
static enum sqz_status listen_at(struct http *h, const struct addrinfo *address, struct sqz_error *error)
{
    const struct server_options *o = &h->server->options;
    const unsigned where = !address ? MHD_USE_NO_LISTEN_SOCKET : address->ai_family == AF_INET6 ? MHD_USE_IPv6 : 0;
    const unsigned flags = MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG | where;
    errno = 0;
    /* clang-format off */
    h->daemon = MHD_start_daemon(flags, (uint16_t)o->port, NULL, NULL, take_request, h,
        MHD_OPTION_EXTERNAL_LOGGER, drop_message, NULL,
        MHD_OPTION_SOCK_ADDR, address ? address->ai_addr : NULL,
        MHD_OPTION_THREAD_POOL_SIZE, (unsigned)N_THREADS,
        MHD_OPTION_CONNECTION_LIMIT, (unsigned)o->most_connections,
        MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONNECTION_BYTES,
        MHD_OPTION_CONNECTION_MEMORY_INCREMENT, (size_t)1024,
        MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)(2 * o->header_seconds),
        MHD_OPTION_LISTENING_ADDRESS_REUSE, 1u,
        MHD_OPTION_LISTEN_BACKLOG_SIZE, 1024u,
        MHD_OPTION_STRICT_FOR_CLIENT, 1,
        MHD_OPTION_NOTIFY_COMPLETED, request_ended, h,
        MHD_OPTION_NOTIFY_CONNECTION, line_changed, h,
        MHD_OPTION_END);
    /* clang-format on */
    if (h->daemon) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_IO, "%s, port %u: %s", o->host, o->port,
                         errno ? strerror(errno) : "the server could not be started");
}

enum sqz_status http_start(struct http **out, struct server *server, unsigned *port, struct sqz_error *error)
{
    struct addrinfo *address = NULL;
    struct http *h = calloc(1, sizeof *h);
    *out = h;
    if (!h) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    h->server = server;
    h->listening = MHD_INVALID_SOCKET;
    h->lines.next = h->lines.before = &h->lines;
    h->streams.next = h->streams.before = &h->streams;
    pthread_mutex_init(&h->lock, NULL);
    h->apart = apart_create();
    if (!h->apart) return sqz_error_set(error, SQZ_ERROR_INTERNAL, "no thread could be started");
    h->watch = epoll_create1(EPOLL_CLOEXEC);
    if (h->watch < 0) return sqz_error_set(error, SQZ_ERROR_IO, "epoll: %s", strerror(errno));
    const bool handed = server->options.supervisor >= 0;
    enum sqz_status status = handed ? SQZ_OK : address_find(&server->options, &address, error);
    if (status == SQZ_OK) status = listen_at(h, address, error);
    if (status == SQZ_OK && handed) status = handed_start(&h->handed, server->options.supervisor, h->daemon, error);
    if (address) freeaddrinfo(address);
    if (status != SQZ_OK) return status;
    h->watching = pthread_create(&h->watcher, NULL, watch_peers, h) == 0;
    if (!h->watching) return sqz_error_set(error, SQZ_ERROR_INTERNAL, "no thread could be started");
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_BIND_PORT);
    *port = info && info->port ? info->port : server->options.port;
    return SQZ_OK;
}

void http_quiet(struct http *h)
{
    handed_stop(h->handed);
    h->handed = NULL;
    if (h->daemon) h->listening = MHD_quiesce_daemon(h->daemon);
}

/* What answers said last is still on its way. */
static void drain(struct http *h)
{
    const struct timespec pause = {.tv_nsec = 20000000};
    bool left = h->watching;
    for (int i = 0; left && i < 100; i++) {
        pthread_mutex_lock(&h->lock);
        left = h->streams.next != &h->streams;
        pthread_mutex_unlock(&h->lock);
        if (left) nanosleep(&pause, NULL);
    }
}

void http_stop(struct http *h)
{
    if (!h) return;
    drain(h);
    h->stopping = true;
    if (h->watching) pthread_join(h->watcher, NULL);
    handed_stop(h->handed);
    if (h->apart) apart_close(h->apart); /* no connection sleeps for it any more */
    if (h->daemon) MHD_stop_daemon(h->daemon);
    apart_free(h->apart);
    if (h->listening != MHD_INVALID_SOCKET) close(h->listening);
    if (h->watch >= 0) close(h->watch);
    pthread_mutex_destroy(&h->lock);
    free(h);
}
