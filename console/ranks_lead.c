/* Rank 0's side: whoever holds the other shards, as engine/ asks for it; ranks_comm.h. */
#define _DEFAULT_SOURCE /* realpath */
#include "ranks_comm.h"

#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "common.h"
#include "error.h"
#include "memory.h"
#include "times.h"

enum { MOST_RANKS = 1024 };

static struct lead {
    uint32_t next_id;
    bool busy; /* in the middle of a node */
    char *call;
    size_t call_bytes;
    float *in; /* of each rank: totals, then outputs and their LSE */
    size_t in_floats;
    struct ranks_read *read; /* [n] */
    MPI_Request *request;    /* [3 n + 4] */
    double token_layers;
    uint64_t sent_bytes, most_sent_bytes;
    double partial_bytes;
} lead;

static enum sqz_status lost(struct sqz_error *error)
{
    return sqz_error_set(error, SQZ_ERROR_IO, "%s", ranks_lost_text());
}

/* ---- Contexts ------------------------------------------------------------------------------- */

static bool send_all(const void *call, size_t bytes)
{
    for (int r = 1; r < ranks.n; r++)
        MPI_Isend(call, (int)bytes, MPI_BYTE, r, TAG_CALL, ranks.work, &lead.request[r - 1]);
    return ranks_wait(lead.request, ranks.n - 1);
}

/* A call of malloc'ed memory, which is freed, that each rank answers. */
static enum sqz_status ask_all(struct ranks_call *call, size_t bytes, struct sqz_error *error)
{
    struct ranks_answer *answer = calloc((size_t)ranks.n, sizeof *answer);
    enum sqz_status status = SQZ_OK;
    if (!answer) {
        status = sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for answers");
    } else if (ranks_lost() >= 0) {
        status = lost(error);
    } else if (!send_all(call, bytes)) {
        status = lost(error);
        call = NULL; /* it may still be read */
    }
    if (status == SQZ_OK) {
        for (int r = 1; r < ranks.n; r++)
            MPI_Irecv(&answer[r], sizeof *answer, MPI_BYTE, r, TAG_ANSWER, ranks.work, &lead.request[r - 1]);
        if (!ranks_wait(lead.request, ranks.n - 1)) {
            status = lost(error);
            answer = NULL; /* it may still be written to */
        }
    }
    for (int r = 1; r < ranks.n && status == SQZ_OK; r++)
        if (answer[r].status != SQZ_OK)
            status = sqz_error_set(error, (enum sqz_status)answer[r].status, "rank %d: %.1000s", r, answer[r].message);
    free(answer);
    free(call);
    return status;
}

static enum sqz_status open_everywhere(void *user_data, const struct sqz_context *context, uint32_t *id,
                                       struct sqz_error *error)
{
    (void)user_data;
    const char *path = sqz_context_path(context);
    char *full = realpath(path, NULL);
    const size_t n = full ? strlen(full) + 1 : 0;
    struct ranks_call *call = full ? malloc(sizeof *call + n) : NULL;
    enum sqz_status status;
    *id = lead.next_id++;
    if (!call) {
        status =
            sqz_error_set(error, full ? SQZ_ERROR_MEMORY : SQZ_ERROR_IO, "%s cannot be opened by other ranks", path);
    } else {
        *call = (struct ranks_call){.kind = KIND_OPEN,
                                    .context = *id,
                                    .checksum = sqz_context_checksum(context),
                                    .of_layers = sqz_context_kind(context),
                                    .path_bytes = (uint32_t)n};
        memcpy(call + 1, full, n);
        status = ask_all(call, sizeof *call + n, error);
    }
    free(full);
    return status;
}

static void close_everywhere(void *user_data, uint32_t id)
{
    const struct ranks_call call = {.kind = KIND_CLOSE, .context = id};
    (void)user_data;
    if (ranks_lost() < 0) send_all(&call, sizeof call);
}

/* ---- Nodes ---------------------------------------------------------------------------------- */

static enum sqz_status make_room(size_t call_bytes, size_t in_floats, struct sqz_error *error)
{
    if (call_bytes > lead.call_bytes) {
        free(lead.call);
        lead.call = malloc(call_bytes);
        lead.call_bytes = lead.call ? call_bytes : 0;
    }
    if (in_floats > lead.in_floats) {
        free(lead.in);
        lead.in = malloc(in_floats * sizeof *lead.in);
        lead.in_floats = lead.in ? in_floats : 0;
    }
    return lead.call && lead.in ? SQZ_OK : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for messages");
}

/* Parts, then queries: rounded to F16 they would be half as long, and answers not quite those of one process. */
static void pack(const struct sqz_elsewhere_node *n)
{
    struct ranks_call *head = (struct ranks_call *)lead.call;
    struct sqz_elsewhere_part *parts = (struct sqz_elsewhere_part *)(head + 1);
    float *to = (float *)(parts + n->n_parts);
    *head = (struct ranks_call){.kind = KIND_NODE,
                                .layer = n->layer,
                                .n_parts = (uint32_t)n->n_parts,
                                .n_tokens = (uint32_t)n->n_tokens,
                                .n_head = n->n_head,
                                .head_dim = n->head_dim};
    memcpy(parts, n->parts, n->n_parts * sizeof *parts);
    for (size_t p = 0; p < n->n_parts; p++)
        for (size_t t = 0; t < n->parts[p].n_tokens; t++) {
            const float *from = n->node->queries + (n->first_token[p] + t) * n->node->query_token_stride;
            for (uint32_t h = 0; h < n->n_head; h++, to += n->head_dim)
                memcpy(to, from + h * n->node->query_head_stride, n->head_dim * sizeof *to);
        }
}

/* To the heads of the two chains. */
static bool send_down(const void *data, size_t bytes, int tag)
{
    int child[2];
    const int n = ranks_children(child);
    MPI_Request request[2];
    for (int i = 0; i < n; i++) MPI_Isend(data, (int)bytes, MPI_BYTE, child[i], tag, ranks.work, &request[i]);
    lead.sent_bytes += (size_t)n * bytes;
    return ranks_wait(request, n);
}

static enum sqz_status begin(void *user_data, const struct sqz_elsewhere_node *n, struct sqz_error *error)
{
    (void)user_data;
    const size_t heads = n->n_tokens * n->n_head;
    const size_t bytes =
        sizeof(struct ranks_call) + n->n_parts * sizeof *n->parts + heads * n->head_dim * sizeof(float);
    if (ranks_lost() >= 0) return lost(error);
    const enum sqz_status status = make_room(bytes, (size_t)ranks.n * heads * (n->head_dim + 1), error);
    if (status != SQZ_OK) return status;
    pack(n);
    lead.busy = true;
    return send_down(lead.call, bytes, TAG_CALL) ? SQZ_OK : lost(error);
}

static enum sqz_status sum(void *user_data, const struct sqz_elsewhere_node *n, float *log_total,
                           struct sqz_error *error)
{
    (void)user_data;
    const size_t heads = n->n_tokens * n->n_head;
    for (int r = 1; r < ranks.n; r++)
        MPI_Irecv(lead.in + (size_t)r * heads, (int)heads, MPI_FLOAT, r, TAG_TOTAL, ranks.work, &lead.request[r - 1]);
    if (!ranks_wait(lead.request, ranks.n - 1)) return lost(error);
    memcpy(lead.in, log_total, heads * sizeof *log_total);
    for (size_t i = 0; i < heads; i++) log_total[i] = sqz_shards_log_sum(lead.in + i, heads, (size_t)ranks.n);
    return send_down(log_total, heads * sizeof *log_total, TAG_WHOLE) ? SQZ_OK : lost(error);
}

/* Outputs of n ranks, one behind another, into the first, in the order of sqz_shards_half(). */
static void merge_ranks(float *first, size_t n, size_t heads, size_t head_dim)
{
    if (n == 1) return;
    const size_t half = sqz_shards_half(n);
    float *second = first + half * heads * (head_dim + 1);
    merge_ranks(first, half, heads, head_dim);
    merge_ranks(second, n - half, heads, head_dim);
    sqz_merge_partial(first, first + heads * head_dim, second, second + heads * head_dim, heads, head_dim);
}

static enum sqz_status merge(void *user_data, const struct sqz_elsewhere_node *n, float *out, float *lse,
                             struct sqz_error *error)
{
    (void)user_data;
    const size_t heads = n->n_tokens * n->n_head, floats = heads * (n->head_dim + 1);
    for (int r = 1; r < ranks.n; r++) {
        MPI_Irecv(lead.in + (size_t)r * floats, (int)floats, MPI_FLOAT, r, TAG_PART, ranks.work,
                  &lead.request[2 * (r - 1)]);
        MPI_Irecv(&lead.read[r], (int)ranks_read_bytes(n->n_parts), MPI_BYTE, r, TAG_READ, ranks.work,
                  &lead.request[2 * r - 1]);
    }
    if (!ranks_wait(lead.request, 2 * (ranks.n - 1))) return lost(error);
    memcpy(lead.in, out, heads * n->head_dim * sizeof *out);
    memcpy(lead.in + heads * n->head_dim, lse, heads * sizeof *lse);
    merge_ranks(lead.in, (size_t)ranks.n, heads, n->head_dim);
    memcpy(out, lead.in, heads * n->head_dim * sizeof *out);
    memcpy(lse, lead.in + heads * n->head_dim, heads * sizeof *lse);
    int changed = 0; /* the rank that has such a file */
    for (int r = 1; r < ranks.n; r++) {
        if (lead.read[r].sent_bytes & RANKS_FILE_CHANGED) changed = r;
        lead.read[r].sent_bytes &= ~RANKS_FILE_CHANGED;
        for (size_t p = 0; p < n->n_parts; p++) sqz_attention_stats_add(n->stats[p], &lead.read[r].stats[p]);
        if (lead.read[r].sent_bytes > lead.most_sent_bytes) lead.most_sent_bytes = lead.read[r].sent_bytes;
    }
    lead.token_layers += (double)n->n_tokens;
    lead.partial_bytes = (double)n->n_head * (n->head_dim + 1) * sizeof(float);
    if (lead.sent_bytes > lead.most_sent_bytes) lead.most_sent_bytes = lead.sent_bytes;
    lead.busy = false;
    if (!changed) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_IO, "rank %d: a file of the context changed while it was open; open it again",
                         changed);
}

double ranks_lead_bytes(double *partial)
{
    *partial = lead.partial_bytes;
    return lead.token_layers > 0 ? (double)lead.most_sent_bytes / lead.token_layers : 0;
}

/* ---- What messages take ----------------------------------------------------------------------- */

void ranks_lead_try(uint32_t n_head, uint32_t head_dim, struct memory_probe *probe, uint32_t bytes)
{
    const size_t floats = (size_t)n_head * head_dim;
    float *memory = allocate(2 * floats + 2 * n_head, sizeof *memory); /* queries, output, LSE, denominators */
    struct sqz_attention_stats stats = {0}, *const to = &stats;
    const struct sqz_elsewhere_part part = {.context = RANKS_NO_CONTEXT, .n_tokens = 1, .block_tokens = 1, .budget = 1};
    const struct sqz_attention_node of = {
        .n_tokens = 1, .queries = memory, .query_token_stride = floats, .query_head_stride = head_dim};
    const size_t first_token = 0;
    const struct sqz_elsewhere_node n = {.layer = bytes,
                                         .n_head = n_head,
                                         .head_dim = head_dim,
                                         .n_parts = 1,
                                         .n_tokens = 1,
                                         .parts = &part,
                                         .node = &of,
                                         .first_token = &first_token,
                                         .stats = &to};
    float *out = memory + floats, *lse = out + floats;
    struct sqz_error error;
    memset(memory, 0, (2 * floats + 2 * n_head) * sizeof *memory);
    enum sqz_status status = begin(NULL, &n, &error);
    memory_probe_read_some(probe, bytes);
    if (status == SQZ_OK) status = sum(NULL, &n, lse + n_head, &error);
    memory_probe_read_some(probe, bytes);
    if (status == SQZ_OK) status = merge(NULL, &n, out, lse, &error);
    stop_on(status, &error);
    free(memory);
}

double ranks_lead_echo(int rank, size_t bytes)
{
    struct sqz_error error;
    MPI_Request request[2];
    struct ranks_call *call = allocate(1, sizeof *call + bytes);
    void *back = allocate(1, sizeof *call + bytes);
    memset(call, 0, sizeof *call + bytes);
    call->kind = KIND_ECHO;
    const double since = now_seconds();
    MPI_Irecv(back, (int)(sizeof *call + bytes), MPI_BYTE, rank, TAG_ANSWER, ranks.work, &request[0]);
    MPI_Isend(call, (int)(sizeof *call + bytes), MPI_BYTE, rank, TAG_CALL, ranks.work, &request[1]);
    if (!ranks_wait(request, 2)) stop_on(lost(&error), &error);
    const double seconds = now_seconds() - since;
    free(call);
    free(back);
    return seconds;
}

/* ---- Start and end ----------------------------------------------------------------------------- */

/* What ranks do is rank 0's command with its options: others that were given anything else would not be obeyed. */
static void say_hello(char **argv)
{
    struct sqz_error error;
    size_t n = 0;
    char *text = ranks_started_as(argv, &n);
    struct ranks_call *call = text ? malloc(sizeof *call + n) : NULL;
    if (!call) die("out of memory");
    *call = (struct ranks_call){.kind = KIND_HELLO};
    memcpy(call + 1, text, n);
    free(text);
    stop_on(ask_all(call, sizeof *call + n, &error), &error);
}

void ranks_lead_begin(char **argv)
{
    static const struct sqz_elsewhere elsewhere = {
        .open = open_everywhere, .close = close_everywhere, .begin = begin, .sum = sum, .merge = merge};
    lead.read = calloc((size_t)ranks.n, sizeof *lead.read);
    lead.request = calloc(3 * (size_t)ranks.n, sizeof *lead.request);
    if (!lead.read || !lead.request || ranks.n > MOST_RANKS) die("no room for %d ranks", ranks.n);
    say_hello(argv);
    sqz_shards_elsewhere(&elsewhere);
}

bool ranks_lead_end(void)
{
    const struct ranks_call call = {.kind = KIND_BYE};
    return !lead.busy && ranks_lost() < 0 && send_all(&call, sizeof call);
}
