/* What one request wants of the model, after its JSON was read and its text became tokens. */
#ifndef SQZ_SERVER_ASK_H
#define SQZ_SERVER_ASK_H

#include <jansson.h>
#include <time.h>

#include "tool_calls.h"
#include "jobs.h"
#include "sampling.h"
#include "spoken.h"

enum { MOST_CHOICES = 16, MOST_TOOLS = 64 };

enum ask_kind { ASK_CHAT, ASK_COMPLETION, ASK_RESPONSE, ASK_MESSAGES };

struct prompt {
    int32_t *tokens; /* malloc'ed: those behind the context's */
    size_t n_tokens;
    struct entry *context; /* a reference, or NULL: none */
    size_t n_prefix;       /* tokens of the context, 0 without one */
    char *echo;            /* malloc'ed: its text, where that is wanted back; NULL: it is not */
};

/* What an answer is to be exact to: the context's rows as they are kept, or one kind of rows, else refused. */
enum ask_exact { ASK_EXACT_NO, ASK_EXACT_AS_KEPT, ASK_EXACT_F16, ASK_EXACT_INT8 };

struct ask {
    enum ask_kind kind;
    char id[40];
    char model[160]; /* as answers name it */
    time_t created;
    bool events, events_usage;
    struct prompt prompts[MOST_CHOICES];
    unsigned n_prompts, n_each; /* choices of each prompt */
    size_t max_tokens;
    struct sqz_sampling_options sampling;
    char *grammar;           /* malloc'ed, what sampling points to; NULL: none */
    struct sqz_bias *biases; /* malloc'ed */
    int n_likely;            /* log probabilities wanted; -1: none */
    struct stops stops;      /* stops of the client, then those of our own */
    size_t n_client_stops;
    bool tools; /* an answer may call some */
    enum call_format calls;
    bool tool_only;       /* and is nothing but a call, as the grammar sees to */
    bool plain;           /* no chat template: the answer ends where the text says so */
    bool read_map;        /* where in the document attention went is wanted */
    float budget;         /* 1: everything, exactly */
    enum ask_exact exact; /* asked for by that name: what comes next may be drafted */
    json_t *shown;        /* what a response repeats of its request; NULL: nothing */
    struct jobs *jobs;
    uint64_t reader; /* of a document that is prepared from what is read for the first prompt; 0: none */
};

void ask_free(struct ask *ask, struct library *library);

#endif
