/* The server as its routes see it, and a call of one. */
#ifndef SQZ_SERVER_CORE_H
#define SQZ_SERVER_CORE_H

#include "jobs.h"
#include "keys.h"
#include "library.h"
#include "metrics.h"
#include "request.h"
#include "scheduler.h"
#include "server.h"
#include "talk.h"

struct server {
    struct server_options options;
    struct sqz_model *model;
    struct sqz_model_info info;
    char model_id[128];
    enum call_format calls; /* as the model writes them */
    time_t started;
    struct library library;
    struct jobs *jobs;
    struct metrics metrics;
    struct scheduler *scheduler;
    struct keys *keys; /* NULL: everybody may */
};

struct call {
    struct server *server;
    const char *method;
    const char *argument;                               /* what follows the route's path; "" for nothing */
    const char *(*query)(void *data, const char *name); /* NULL: not given */
    void *query_data;
    const char *content_type; /* of the body */
    struct bytes body;
    unsigned user;
    enum api api;

    /* What comes of it: a fault, a stream, or a reply. */
    struct fault fault;
    struct stream *stream;
    int status;
    const char *reply_type; /* static */
    struct bytes reply;
    bool page; /* the reply is a file of the page, that browsers may keep while its etag is the same */
    char etag[24];
};

/* Replies with a JSON value, which it takes. */
void call_reply(struct call *call, int status, json_t *value);

/* ---- Routes, a file each for what belongs together ------------------------------------------- */

void route_page(struct call *call);
void route_page_css(struct call *call);
void route_page_js(struct call *call);
void route_page_icon(struct call *call);

void route_health(struct call *call);
void route_props(struct call *call);
void route_metrics(struct call *call);
void route_models(struct call *call);
void route_model(struct call *call);
void route_openapi(struct call *call);
void route_tokenize(struct call *call);

void route_chat(struct call *call);
void route_completions(struct call *call);
void route_responses(struct call *call);
void route_messages(struct call *call);
void route_count_tokens(struct call *call);

void route_contexts(struct call *call);
void route_create_context(struct call *call);
void route_context(struct call *call);
void route_context_text(struct call *call);
void route_change_context(struct call *call);
void route_delete_context(struct call *call);

#endif
