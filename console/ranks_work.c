/* What ranks behind the first do: open their shards, and answer nodes; ranks_comm.h. */
#include "ranks_comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend_cpu.h"
#include "common.h"
#include "error.h"
#include "ranks_exchange.h"

/* A context of rank 0's: the shards of it that are held here. */
struct held {
    uint32_t id;
    struct sqz_context *context;
    struct sqz_backend *place, *shards;
    struct sqz_bound *bound;
    struct sqz_own_rows *own; /* of every sequence: they have their rows at rank 0 */
    bool is_changed;          /* its files: it was said */
    struct held *next;
};

/* Parts of a node, one for each sequence. */
struct dealt {
    struct sqz_backend_part part[SQZ_MOST_SEQUENCES];
    struct sqz_backend_part *list[SQZ_MOST_SEQUENCES];
    struct sqz_error error[SQZ_MOST_SEQUENCES];
    struct ranks_read read;
};

static struct worker {
    struct held *held;
    char *call;
    size_t call_bytes;
    float *floats; /* out with LSE behind it, own and whole denominators */
    size_t n_floats;
    int n_threads;
    bool greeted;
    uint64_t sent_bytes;
} worker;

/* Without a word to rank 0 that could help it. */
static void give_up(const char *why)
{
    fprintf(stderr, "squeeze: rank %d: %s\n", ranks.rank, why);
    ranks_abort(1);
}

static void answer_with(const struct ranks_answer *answer)
{
    MPI_Request request;
    MPI_Isend(answer, sizeof *answer, MPI_BYTE, 0, TAG_ANSWER, ranks.work, &request);
    if (!ranks_wait(&request, 1)) give_up(ranks_lost_text());
}

/* ---- What it was started as ------------------------------------------------------------------- */

/* The program: its version and the sizes of what it sends; returns the bytes. */
static size_t put_program(char *at)
{
    const uint32_t sizes[] = {sizeof(struct ranks_call), sizeof(struct ranks_answer), sizeof(struct ranks_read),
                              sizeof(struct sqz_elsewhere_part), sizeof(struct sqz_prepare_options)};
    const size_t n = strlen(sqz_version()) + 1;
    if (at) {
        memcpy(at, sizes, sizeof sizes);
        memcpy(at + sizeof sizes, sqz_version(), n);
    }
    return sizeof sizes + n;
}

char *ranks_started_as(char **argv, size_t *bytes)
{
    size_t n = put_program(NULL);
    for (size_t i = 1; argv[i]; i++) n += strlen(argv[i]) + 1;
    char *text = malloc(n), *at = text;
    if (!text) return NULL;
    at += put_program(at);
    for (size_t i = 1; argv[i]; at += strlen(argv[i++]) + 1) memcpy(at, argv[i], strlen(argv[i]) + 1);
    *bytes = n;
    return text;
}

static void greet(const struct ranks_call *call, size_t bytes, char **argv)
{
    struct ranks_answer answer = {.status = SQZ_OK};
    const size_t of_program = put_program(NULL), there = bytes - sizeof *call;
    size_t here = 0;
    char *mine = ranks_started_as(argv, &here);
    if (!mine) give_up("out of memory");
    if (there < of_program || memcmp(call + 1, mine, of_program) != 0) {
        answer.status = SQZ_ERROR_ARGUMENT;
        snprintf(answer.message, sizeof answer.message, "another build of squeeze (%s here) than at rank 0",
                 sqz_version());
    } else if (there != here || memcmp(call + 1, mine, here) != 0) {
        answer.status = SQZ_ERROR_ARGUMENT;
        snprintf(answer.message, sizeof answer.message,
                 "other arguments than at rank 0, whose command all ranks run; start all alike: mpirun -n %d squeeze "
                 "...",
                 ranks.n);
    }
    free(mine);
    worker.greeted = true;
    answer_with(&answer);
}

/* ---- Contexts ------------------------------------------------------------------------------- */

static void held_free(struct held *h)
{
    if (h->own) h->shards->ops->free_own(h->own);
    if (h->bound) h->shards->ops->unbind(h->bound);
    sqz_backend_shards_free(h->shards);
    sqz_backend_cpu_free(h->place);
    sqz_context_free(h->context);
    free(h);
}

static enum sqz_status bring_up(struct held *h, struct sqz_error *error)
{
    uint32_t n_head = 0, head_dim = 0;
    for (uint32_t l = 0; l < sqz_context_get_meta(h->context)->n_layer; l++) {
        const struct sqz_layer_shape *shape = &sqz_context_layer(h->context, l)->shape;
        if (shape->n_head > n_head) n_head = shape->n_head;
        if (shape->head_dim > head_dim) head_dim = shape->head_dim;
    }
    enum sqz_status status = sqz_backend_cpu_create(&h->place, worker.n_threads, error);
    if (status == SQZ_OK) status = sqz_backend_shards_over(&h->shards, h->place, n_head, head_dim, true, error);
    if (status == SQZ_OK) status = h->shards->ops->bind(h->shards, h->context, &h->bound, error);
    return status == SQZ_OK ? h->shards->ops->create_own(h->shards, h->bound, 1, &h->own, error) : status;
}

static void open_context_here(const struct ranks_call *call)
{
    struct ranks_answer answer = {0};
    struct sqz_error error;
    struct held *h = calloc(1, sizeof *h);
    const char *path = (const char *)(call + 1);
    enum sqz_status status = h ? sqz_context_open(&h->context, path, NULL, &error)
                               : sqz_error_set(&error, SQZ_ERROR_MEMORY, "out of memory for a context");
    if (status == SQZ_OK && (!sqz_context_n_shards(h->context) || sqz_context_checksum(h->context) != call->checksum))
        status = sqz_error_set(&error, SQZ_ERROR_IO, "%s is another file here than at rank 0", path);
    if (status == SQZ_OK && sqz_context_kind(h->context) != call->of_layers)
        status =
            sqz_error_set(&error, SQZ_ERROR_FORMAT, "%s: shards here have other layers than those of rank 0", path);
    if (status == SQZ_OK) status = bring_up(h, &error);
    if (status == SQZ_OK) {
        h->id = call->context;
        h->next = worker.held;
        worker.held = h;
    } else {
        if (h) held_free(h);
        answer.status = (uint32_t)status;
        snprintf(answer.message, sizeof answer.message, "%s", error.message);
    }
    answer_with(&answer);
}

static void close_context_here(uint32_t id)
{
    for (struct held **at = &worker.held; *at; at = &(*at)->next) {
        struct held *h = *at;
        if (h->id != id) continue;
        *at = h->next;
        held_free(h);
        return;
    }
}

static struct held *find(uint32_t id)
{
    struct held *h = worker.held;
    while (h && h->id != id) h = h->next;
    return h;
}

/* ---- Nodes ----------------------------------------------------------------------------------- */

/* Sends on what came for all; the caller waits for that. */
static int pass_on(MPI_Request request[2], const void *data, size_t bytes, int tag)
{
    int child[2];
    const int n = ranks_children(child);
    for (int i = 0; i < n; i++) MPI_Isend(data, (int)bytes, MPI_BYTE, child[i], tag, ranks.work, &request[i]);
    worker.sent_bytes += (size_t)n * bytes;
    return n;
}

static void make_room(size_t n_floats)
{
    if (n_floats <= worker.n_floats) return;
    free(worker.floats);
    worker.floats = malloc(n_floats * sizeof *worker.floats);
    worker.n_floats = n_floats;
    if (!worker.floats) give_up("out of memory for a node");
}

/* In place of attention, whose result is zeros. */
static void read_instead(size_t bytes, float *out, size_t n_out)
{
    static struct memory_probe probe;
    if (!probe.n_threads && !memory_probe_open(&probe, worker.n_threads)) give_up("out of memory");
    memory_probe_read_some(&probe, bytes);
    memset(out, 0, n_out * sizeof *out);
}

/* Whether the parts are of one context and have the tokens that the call speaks of. */
static bool is_one_context(const struct ranks_call *call, const struct sqz_elsewhere_part *parts)
{
    size_t n_tokens = 0;
    bool one = call->n_parts > 0 && call->n_parts <= SQZ_MOST_SEQUENCES;
    for (uint32_t p = 0; one && p < call->n_parts; p++) {
        one = parts[p].context == parts[0].context && parts[p].n_tokens <= SQZ_BATCH_TOKENS;
        n_tokens += parts[p].n_tokens;
    }
    return one && n_tokens == call->n_tokens && n_tokens <= SQZ_BATCH_TOKENS;
}

static void deal(struct dealt *d, const struct held *h, const struct ranks_call *call,
                 const struct sqz_elsewhere_part *parts)
{
    size_t at = 0;
    memset(&d->read, 0, ranks_read_bytes(call->n_parts));
    for (uint32_t p = 0; p < call->n_parts; at += parts[p].n_tokens, p++) {
        d->list[p] = &d->part[p];
        d->part[p] = (struct sqz_backend_part){.own = h ? h->own : NULL,
                                               .first_token = at,
                                               .n_tokens = parts[p].n_tokens,
                                               .budget = parts[p].budget,
                                               .log_offset = parts[p].log_offset,
                                               .upper = parts[p].upper != 0,
                                               .block_tokens = parts[p].block_tokens,
                                               .stats = &d->read.stats[p],
                                               .error = &d->error[p]};
    }
}

static void answer_node(const struct ranks_call *call, size_t bytes)
{
    const struct sqz_elsewhere_part *parts = (const struct sqz_elsewhere_part *)(call + 1);
    const float *queries = (const float *)(parts + call->n_parts);
    const size_t heads = (size_t)call->n_tokens * call->n_head, row = (size_t)call->n_head * call->head_dim;
    const size_t parent_bytes = heads * sizeof(float);
    MPI_Request request[6];
    int n = pass_on(request, call, bytes, TAG_CALL);
    const bool one = is_one_context(call, parts), nothing = one && parts[0].context == RANKS_NO_CONTEXT;
    struct held *h = one && !nothing ? find(parts[0].context) : NULL;
    if ((!h && !nothing) ||
        bytes != sizeof *call + call->n_parts * sizeof *parts + heads * call->head_dim * sizeof *queries ||
        (h && call->layer >= sqz_context_get_meta(h->context)->n_layer))
        give_up("a node of a context that was not opened here");
    make_room(heads * call->head_dim + 3 * heads);
    float *out = worker.floats, *lse = out + heads * call->head_dim;
    float *own = lse + heads, *whole = own + heads;
    const bool all = h && parts[0].all;
    static struct dealt dealt;
    struct sqz_error error;
    deal(&dealt, h, call, parts);
    if (h) sqz_backend_cpu_set_ways(h->place, all ? SQZ_TOGETHER_ALL : SQZ_TOGETHER_EACH, NULL);
    const struct sqz_attention_node node = {.layer = call->layer,
                                            .n_tokens = call->n_tokens,
                                            .queries = queries,
                                            .query_token_stride = row,
                                            .query_head_stride = call->head_dim};
    const struct sqz_backend_call of_backend = {
        .node = &node, .parts = dealt.list, .n_parts = call->n_parts, .n_threads = worker.n_threads};
    const struct sqz_shards_step step = {&of_backend, call->n_tokens, call->n_head, call->head_dim};
    if (!all) {
        if (h) sqz_shards_total(h->shards, &step, own);
        else read_instead(call->layer, out, heads * call->head_dim + 3 * heads);
        MPI_Isend(own, (int)heads, MPI_FLOAT, 0, TAG_TOTAL, ranks.work, &request[n++]);
        MPI_Irecv(whole, (int)heads, MPI_FLOAT, ranks_parent(), TAG_WHOLE, ranks.work, &request[n++]);
        if (!ranks_wait(request, n)) give_up(ranks_lost_text());
        n = pass_on(request, whole, parent_bytes, TAG_WHOLE);
        worker.sent_bytes += heads * sizeof(float);
    }
    if (h) sqz_shards_attend(h->shards, &step, all ? NULL : whole, out, lse);
    else read_instead(call->layer, out, heads * call->head_dim + heads);
    worker.sent_bytes += heads * (call->head_dim + 1) * sizeof(float) + ranks_read_bytes(call->n_parts);
    dealt.read.sent_bytes = worker.sent_bytes;
    if (h && sqz_context_check_unchanged(h->context, &error) != SQZ_OK) {
        dealt.read.sent_bytes |= RANKS_FILE_CHANGED;
        if (!h->is_changed) fprintf(stderr, "squeeze: rank %d: %s\n", ranks.rank, error.message);
        h->is_changed = true;
    }
    MPI_Isend(out, (int)(heads * (call->head_dim + 1)), MPI_FLOAT, 0, TAG_PART, ranks.work, &request[n++]);
    MPI_Isend(&dealt.read, (int)ranks_read_bytes(call->n_parts), MPI_BYTE, 0, TAG_READ, ranks.work, &request[n++]);
    if (!ranks_wait(request, n)) give_up(ranks_lost_text());
}

/* The message back to rank 0. */
static void echo(size_t bytes)
{
    MPI_Request request;
    MPI_Isend(worker.call, (int)bytes, MPI_BYTE, 0, TAG_ANSWER, ranks.work, &request);
    if (!ranks_wait(&request, 1)) give_up(ranks_lost_text());
}

void ranks_work(char **argv)
{
    struct sqz_error error;
    if (sqz_choose_threads(&worker.n_threads, &error) != SQZ_OK) give_up(error.message);
    for (;;) {
        int source = 0, n = 0;
        if (!ranks_wait_call(&source, &n)) give_up(ranks_lost_text());
        const size_t bytes = (size_t)n;
        if (bytes > worker.call_bytes) {
            free(worker.call);
            worker.call = malloc(bytes);
            worker.call_bytes = bytes;
            if (!worker.call) give_up("out of memory for a message");
        }
        MPI_Recv(worker.call, n, MPI_BYTE, source, TAG_CALL, ranks.work, MPI_STATUS_IGNORE);
        const struct ranks_call *call = (const struct ranks_call *)worker.call;
        if (bytes < sizeof *call) give_up("a message that is too short");
        if (!worker.greeted && call->kind != KIND_HELLO) give_up("another build of squeeze than at rank 0");
        switch (call->kind) {
        case KIND_HELLO: greet(call, bytes, argv); break;
        case KIND_OPEN: open_context_here(call); break;
        case KIND_PREPARE: ranks_prepare_work(call, bytes); break;
        case KIND_CLOSE: close_context_here(call->context); break;
        case KIND_NODE:
            if (signal_caught()) give_up("interrupted"); /* behind a document, which catches signals */
            answer_node(call, bytes);
            break;
        case KIND_ECHO: echo(bytes); break;
        case KIND_BYE: return;
        default: give_up("a message of an unknown kind");
        }
    }
}
