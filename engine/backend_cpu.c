/* Attention on the CPU; backend_cpu.h. */
#include "backend_cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "own_rows.h"
#include "plan.h"

/* Sequences that one call of lib/ takes together. */
enum { MOST_CALLS = 64 };

struct cpu {
    struct sqz_backend base;
    int n_threads;
    void *workspace;
    size_t workspace_bytes;
    size_t
        thread_bytes; /* of a batch, the most that any sequence's context asks for; the workspace has room for that */
    bool own_f16;     /* sequences' own rows are, whatever the context's */
    enum sqz_together together;
    struct sqz_cpu_cost cost;                       /* of CHEAPEST */
    struct sqz_joint_token joint[SQZ_BATCH_TOKENS]; /* of the node in hand */
};

/* On the CPU a context is used where it lies. */
struct sqz_bound {
    const struct sqz_context *context;
};

struct sqz_own_rows {
    const struct sqz_context *context;
    struct sqz_own_layers rows;
    float *share; /* [n_layer] that a token reads at the budget of_budget; 0: not yet known */
    float of_budget;
};

static struct cpu *cpu_of(struct sqz_backend *backend)
{
    return (struct cpu *)backend;
}

/* ---- Contexts and rows --------------------------------------------------------------- */

static enum sqz_status bind(struct sqz_backend *backend, const struct sqz_context *context, struct sqz_bound **bound,
                            struct sqz_error *error)
{
    (void)backend;
    *bound = malloc(sizeof **bound);
    if (!*bound) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a bound context");
    (*bound)->context = context;
    return SQZ_OK;
}

static void unbind(struct sqz_bound *bound)
{
    free(bound);
}

enum sqz_status sqz_backend_cpu_reserve(struct sqz_backend *backend, size_t bytes, struct sqz_error *error)
{
    struct cpu *cpu = cpu_of(backend);
    if (bytes <= cpu->workspace_bytes) return SQZ_OK;
    void *workspace = malloc(bytes);
    if (!workspace) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory: %zu bytes for attention", bytes);
    free(cpu->workspace);
    cpu->workspace = workspace;
    cpu->workspace_bytes = bytes;
    return SQZ_OK;
}

/* Scratch memory for calls on the context, alone and in a batch. */
static enum sqz_status reserve_for(struct cpu *cpu, const struct sqz_context *context, size_t capacity,
                                   struct sqz_error *error)
{
    const uint32_t n_layer = sqz_context_get_meta(context)->n_layer;
    const int n_threads = cpu->n_threads;
    size_t most = 0, thread = cpu->thread_bytes;
    for (uint32_t l = 0; l < n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        const size_t bytes = sqz_attend_workspace_bytes(layer, capacity, SQZ_QUESTION_BLOCK_TOKENS, n_threads);
        const size_t of_thread = sqz_attend_thread_bytes(layer, capacity, SQZ_QUESTION_BLOCK_TOKENS);
        if (bytes > most) most = bytes;
        if (of_thread > thread) thread = of_thread;
    }
    const size_t batch = sqz_attend_batch_workspace_bytes(thread, MOST_CALLS, n_threads);
    const enum sqz_status status = sqz_backend_cpu_reserve(&cpu->base, most > batch ? most : batch, error);
    if (status == SQZ_OK) cpu->thread_bytes = thread;
    return status;
}

static void free_own(struct sqz_own_rows *own)
{
    if (!own) return;
    sqz_own_layers_free(&own->rows);
    free(own->share);
    free(own);
}

static enum sqz_status create_own(struct sqz_backend *backend, struct sqz_bound *bound, size_t capacity,
                                  struct sqz_own_rows **out, struct sqz_error *error)
{
    struct cpu *cpu = cpu_of(backend);
    const struct sqz_context *context = bound->context;
    struct sqz_own_rows *own = calloc(1, sizeof *own);
    *out = NULL;
    if (own) own->share = calloc(sqz_context_get_meta(context)->n_layer, sizeof *own->share);
    if (!own || !own->share) {
        free(own);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sequence");
    }
    own->context = context;
    enum sqz_status status = sqz_own_layers_create(&own->rows, context, capacity, cpu->own_f16, error);
    if (status == SQZ_OK) status = reserve_for(cpu, context, capacity, error);
    if (status != SQZ_OK) {
        free_own(own);
        return status;
    }
    *out = own;
    return SQZ_OK;
}

static void copy_own(const struct sqz_own_rows *own, uint32_t l, size_t first, size_t n, uint16_t *keys,
                     uint16_t *values, size_t capacity_rows, size_t to_row)
{
    sqz_own_layers_copy(&own->rows, l, first, n, keys, values, capacity_rows, to_row);
}

static size_t most_tokens(const struct sqz_own_rows *own)
{
    return own->rows.most;
}

static size_t own_bytes(const struct sqz_own_rows *own)
{
    return sqz_own_layers_bytes(&own->rows);
}

/* ---- Attention -------------------------------------------------------------------------- */

static void take(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    (void)backend;
    for (size_t i = 0; i < call->n_parts; i++) {
        struct sqz_backend_part *p = call->parts[i];
        const struct sqz_layer_shape *shape = &sqz_context_layer(p->own->context, call->node->layer)->shape;
        const struct sqz_attention_node node = sqz_node_part(call->node, shape, p->first_token, p->n_tokens);
        if (!sqz_own_layers_put(&p->own->rows, &node, p->n_own, p->n_kept, call->n_threads))
            p->status = sqz_error_set(p->error, SQZ_ERROR_INTERNAL,
                                      "rows of this sequence before row %zu are no more, those behind %zu are kept",
                                      p->n_own, p->n_kept);
    }
}

struct sqz_attend_call sqz_backend_cpu_attend_call(struct sqz_backend *backend, const struct sqz_backend_call *call,
                                                   const struct sqz_backend_part *p)
{
    const uint32_t l = call->node->layer;
    const struct sqz_layer *layer = sqz_context_layer(p->own->context, l);
    const struct sqz_attention_node node = sqz_node_part(call->node, &layer->shape, p->first_token, p->n_tokens);
    return (struct sqz_attend_call){
        .layer = layer,
        .queries = node.queries,
        .out = node.out,
        .query_token_stride = node.query_token_stride,
        .query_head_stride = node.query_head_stride,
        .out_token_stride = (size_t)layer->shape.n_head * layer->shape.head_dim,
        .out_head_stride = layer->shape.head_dim,
        .n_tokens = p->n_tokens,
        .user = &p->own->rows.layers[l],
        .n_user = p->own_elsewhere ? 0 : p->n_own + p->n_tokens,
        .n_context_tokens = sqz_meta_text_tokens(sqz_context_get_meta(p->own->context)),
        .elsewhere = p->elsewhere,
        .lse = p->lse,
        .budget = p->budget,
        .upper = p->upper,
        .log_offset = p->log_offset,
        .block_tokens = p->block_tokens,
        .n_threads = call->n_threads,
        .stats = p->stats,
        .map = p->map,
        .map_turn = p->map_turn + (size_t)l * layer->shape.n_head_kv,
        .workspace = cpu_of(backend)->workspace,
    };
}

/* ---- Together, or each by itself ------------------------------------------------------------ */

/* More tokens of one sequence share its own rows as well, in a call of their own. */
enum { MOST_JOINT_TOKENS = 64 };

/* Share of a layer that a token reads by its own selection, as calibration found it. */
static double share_of(const struct sqz_backend_part *p, uint32_t l)
{
    struct sqz_own_rows *own = p->own;
    if (own->of_budget != p->budget) memset(own->share, 0, sqz_context_get_meta(own->context)->n_layer * sizeof(float));
    own->of_budget = p->budget;
    if (own->share[l] <= 0) {
        const struct sqz_layer *layer = sqz_context_layer(own->context, l);
        const uint32_t n = layer->shape.n_head_kv;
        for (uint32_t h = 0; h < n; h++) own->share[l] += sqz_head_share_at(layer, h, p->budget) / (float)n;
    }
    return (double)own->share[l];
}

static double each_seconds(const struct cpu *cpu, const struct sqz_backend_part *p, uint32_t l, int n_threads)
{
    const struct sqz_layer *layer = sqz_context_layer(p->own->context, l);
    return (double)p->n_tokens *
           sqz_cpu_each_seconds(&cpu->cost, &layer->shape, layer->n_rows, share_of(p, l), n_threads);
}

static bool is_cheaper(const struct cpu *cpu, const struct sqz_layer *layer, size_t n_tokens, double each,
                       int n_threads)
{
    static const double clearly = 0.85; /* what was measured is off by as much, and a selection is what was asked for */
    return n_tokens > 1 &&
           sqz_cpu_all_seconds(&cpu->cost, &layer->shape, layer->n_rows, n_tokens, n_threads) < clearly * each;
}

/* Whether the part is one that goes through a context with others: not one of whose context other places have something
 * that counts for what is read here, whose rows are read by their upper plane, or whose weights are wanted. */
static bool can_join(const struct sqz_backend_part *p)
{
    return p->n_tokens <= MOST_JOINT_TOKENS && !p->elsewhere && !p->map && !p->upper;
}

/* Sets `united` of the parts that read all rows of this layer for the others' or their own tokens' sake. A part that reads
 * everything anyway goes along. */
static void choose_ways(const struct cpu *cpu, uint32_t l, struct sqz_backend_part *const *parts, size_t n,
                        int n_threads)
{
    for (size_t i = 0; i < n; i++) {
        const struct sqz_context *context = parts[i]->own->context;
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        size_t n_tokens = 0;
        double each = 0;
        bool first = true;
        for (size_t j = 0; j < i; j++) first &= parts[j]->own->context != context;
        if (layer->n_levels == 0) continue;
        if (cpu->together == SQZ_TOGETHER_ALL) {
            parts[i]->united = !parts[i]->elsewhere; /* who has that chooses by it */
            continue;
        }
        if (!can_join(parts[i]) && !parts[i]->map && !parts[i]->elsewhere)
            parts[i]->united =
                is_cheaper(cpu, layer, parts[i]->n_tokens, each_seconds(cpu, parts[i], l, n_threads), n_threads);
        if (!first || layer->rule == SQZ_RULE_PAPER) continue; /* what the published rule reads is not known */
        for (size_t j = i; j < n; j++) {
            if (parts[j]->own->context != context || !can_join(parts[j])) continue;
            n_tokens += parts[j]->n_tokens;
            each += each_seconds(cpu, parts[j], l, n_threads);
        }
        const bool together = is_cheaper(cpu, layer, n_tokens, each, n_threads);
        for (size_t j = i; together && j < n; j++)
            if (parts[j]->own->context == context && can_join(parts[j])) parts[j]->united = true;
    }
}

/* The call of all united parts on the context of part number i that join; n_joint: entries of cpu->joint in use. */
static struct sqz_attend_call joint_call(struct cpu *cpu, const struct sqz_backend_call *call,
                                         struct sqz_backend_part *const *parts, size_t n, size_t i, size_t *n_joint)
{
    const uint32_t l = call->node->layer;
    struct sqz_attend_call c = sqz_backend_cpu_attend_call(&cpu->base, call, parts[i]);
    const struct sqz_attention_node *node = call->node;
    c.joint = cpu->joint + *n_joint;
    c.queries = node->queries;
    c.out = node->out;
    if (c.lse) c.lse -= parts[i]->first_token * c.layer->shape.n_head; /* of the node, for its tokens' numbers */
    c.user = NULL;
    c.n_tokens = c.n_user = 0;
    c.budget = 1;
    c.stats = NULL;
    for (size_t j = i; j < n; j++) {
        const struct sqz_backend_part *p = parts[j];
        if (p->own->context != parts[i]->own->context || !p->united || !can_join(p)) continue;
        for (size_t t = 0; t < p->n_tokens; t++) {
            cpu->joint[(*n_joint)++] = (struct sqz_joint_token){.at = p->first_token + t,
                                                                .user = &p->own->rows.layers[l],
                                                                .n_rows = p->own_elsewhere ? 0 : p->n_own + t + 1,
                                                                .stats = p->stats};
            c.n_tokens++;
        }
        if (!p->own_elsewhere && p->n_own + p->n_tokens > c.n_user) c.n_user = p->n_own + p->n_tokens;
    }
    return c;
}

/* ---- Attention of a node ------------------------------------------------------------------------ */

/* Few single tokens: all threads work on each in turn, so that none waits for the last head. Many jobs: each thread has
 * its own. */
static void attend_to(const struct cpu *cpu, const struct sqz_attend_call *calls, size_t n)
{
    enum { ENOUGH_JOBS = 4 }; /* a thread */
    const size_t n_threads = (size_t)calls[0].n_threads;
    size_t n_tokens = 0;
    for (size_t i = 0; i < n; i++) n_tokens += calls[i].joint ? ENOUGH_JOBS * n_threads : calls[i].n_tokens;
    if ((n > 1 || calls[0].joint) && n_tokens * calls[0].layer->shape.n_head_kv >= ENOUGH_JOBS * n_threads) {
        sqz_attend_batch(&(struct sqz_attend_batch){calls, n, calls[0].n_threads, cpu->thread_bytes, cpu->workspace});
        return;
    }
    for (size_t i = 0; i < n; i++) sqz_attend(&calls[i]);
}

/* The calls of n parts: of those that go together, of which the first has it, and of each other. */
static size_t calls_of(struct cpu *cpu, const struct sqz_backend_call *call, struct sqz_backend_part *const *parts,
                       size_t n, struct sqz_attend_call *calls)
{
    size_t n_calls = 0, n_joint = 0;
    for (size_t i = 0; i < n; i++) {
        bool first = true;
        for (size_t j = 0; j < i; j++)
            first &= parts[j]->own->context != parts[i]->own->context || !parts[j]->united || !can_join(parts[j]);
        if (!parts[i]->united || !can_join(parts[i])) {
            calls[n_calls] = sqz_backend_cpu_attend_call(&cpu->base, call, parts[i]);
            if (parts[i]->united) calls[n_calls].budget = 1;
            n_calls++;
        } else if (first) {
            calls[n_calls++] = joint_call(cpu, call, parts, n, i, &n_joint);
        }
    }
    return n_calls;
}

static void attend(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct cpu *cpu = cpu_of(backend);
    struct sqz_attend_call calls[MOST_CALLS];
    for (size_t at = 0; at < call->n_parts; at += MOST_CALLS) {
        const size_t left = call->n_parts - at, n = left < MOST_CALLS ? left : MOST_CALLS;
        struct sqz_backend_part *const *parts = call->parts + at;
        if (cpu->together != SQZ_TOGETHER_EACH) choose_ways(cpu, call->node->layer, parts, n, call->n_threads);
        attend_to(cpu, calls, calls_of(cpu, call, parts, n, calls));
    }
}

static void total(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    const struct cpu *cpu = cpu_of(backend);
    struct sqz_attend_call calls[MOST_CALLS];
    float *log_total[MOST_CALLS];
    for (size_t at = 0; at < call->n_parts; at += MOST_CALLS) {
        const size_t left = call->n_parts - at, n = left < MOST_CALLS ? left : MOST_CALLS;
        for (size_t i = 0; i < n; i++) {
            calls[i] = sqz_backend_cpu_attend_call(backend, call, call->parts[at + i]);
            log_total[i] = call->parts[at + i]->log_total;
        }
        sqz_attend_totals(&(struct sqz_attend_batch){calls, n, call->n_threads, cpu->thread_bytes, cpu->workspace},
                          log_total);
    }
}

static enum sqz_status plan_reading(struct sqz_backend *backend, const struct sqz_layer_shape *shape,
                                    struct sqz_error *error)
{
    return sqz_backend_cpu_reserve(backend, sqz_causal_workspace_bytes(shape, cpu_of(backend)->n_threads), error);
}

static enum sqz_status read(struct sqz_backend *backend, const struct sqz_backend_reading *r, struct sqz_error *error)
{
    (void)error;
    const struct sqz_attention_node *node = r->node;
    if (!r->not_own) sqz_node_store_rows(node, &r->shape, r->keys, r->values, r->capacity_rows, r->first_position);
    sqz_attention_causal(&(struct sqz_causal_call){
        .shape = r->shape,
        .queries = node->queries,
        .out = node->out,
        .query_token_stride = node->query_token_stride,
        .query_head_stride = node->query_head_stride,
        .out_token_stride = (size_t)r->shape.n_head * r->shape.head_dim,
        .out_head_stride = r->shape.head_dim,
        .n_tokens = node->n_tokens,
        .first_position = r->first_position,
        .window_tokens = r->window_tokens,
        .keys = r->keys,
        .values = r->values,
        .capacity_rows = r->capacity_rows,
        .lse = r->lse,
        .not_own = r->not_own,
        .n_threads = r->n_threads,
        .workspace = cpu_of(backend)->workspace,
    });
    return SQZ_OK;
}

/* ---- The place --------------------------------------------------------------------------- */

static const struct sqz_backend_ops ops = {
    .name = "CPU",
    .steered = true,
    .bind = bind,
    .unbind = unbind,
    .create_own = create_own,
    .free_own = free_own,
    .copy_own = copy_own,
    .most_tokens = most_tokens,
    .own_bytes = own_bytes,
    .take = take,
    .attend = attend,
    .total = total,
    .plan_reading = plan_reading,
    .read = read,
};

void sqz_backend_cpu_keep_own_f16(struct sqz_backend *backend, bool f16)
{
    cpu_of(backend)->own_f16 = f16;
}

bool sqz_backend_cpu_reads_all(const struct sqz_backend *backend)
{
    return ((const struct cpu *)backend)->together == SQZ_TOGETHER_ALL;
}

void sqz_backend_cpu_set_ways(struct sqz_backend *backend, enum sqz_together together, const struct sqz_cpu_cost *cost)
{
    struct cpu *cpu = cpu_of(backend);
    cpu->together = together;
    if (cost) cpu->cost = *cost;
}

enum sqz_status sqz_backend_cpu_create(struct sqz_backend **out, int n_threads, struct sqz_error *error)
{
    struct cpu *cpu = calloc(1, sizeof *cpu);
    *out = NULL;
    if (!cpu) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for attention");
    cpu->base.ops = &ops;
    cpu->n_threads = n_threads;
    cpu->together = SQZ_TOGETHER_EACH;
    *out = &cpu->base;
    return SQZ_OK;
}

void sqz_backend_cpu_free(struct sqz_backend *backend)
{
    if (!backend) return;
    free(cpu_of(backend)->workspace);
    free(backend);
}
