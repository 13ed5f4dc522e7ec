/*
 * FLOPs and bytes of a Transformer's operations; squeeze.h has the contract,
 * docs/analyze.md each formula with its source (QuantSpec, arXiv 2502.10424,
 * table 1, for what is counted; the exact constants are ours).
 *
 * Everything is summed over layers and steps in closed form, in doubles: ten
 * million tokens squared are 1e14, times layers and widths far below what a
 * double holds, and sums of nearly equal large numbers are avoided.
 */
#include <math.h>
#include <string.h>

#include "codes.h"
#include "error.h"
#include "squeeze_roofline.h"

/* FLOPs an element of what is no matrix product. Conventions: an exponential or a division counts as one. */
enum {
    SOFTMAX_FLOPS = 5,    /* maximum, difference, exponential, sum, division */
    NORM_FLOPS = 4,       /* square, sum, scaling by the root, weight */
    ACTIVATION_FLOPS = 5, /* SiLU: negation, exponential, sum, division; times the other half of a gated FFN */
    STATISTIC_BYTES = 4   /* flash attention keeps a log-sum-exp for each query and head as F32 */
};

/* ---- Names ------------------------------------------------------------------- */

static const struct {
    const char *name;
    enum sqz_op_class op_class;
} ops[SQZ_N_OPS] = {
    [SQZ_OP_Q] = {"W_q", SQZ_CLASS_LINEAR},
    [SQZ_OP_K] = {"W_k", SQZ_CLASS_LINEAR},
    [SQZ_OP_V] = {"W_v", SQZ_CLASS_LINEAR},
    [SQZ_OP_O] = {"W_o", SQZ_CLASS_LINEAR},
    [SQZ_OP_ROUTER] = {"router", SQZ_CLASS_LINEAR},
    [SQZ_OP_FFN_GATE] = {"FFN gate", SQZ_CLASS_LINEAR},
    [SQZ_OP_FFN_UP] = {"FFN up", SQZ_CLASS_LINEAR},
    [SQZ_OP_FFN_DOWN] = {"FFN down", SQZ_CLASS_LINEAR},
    [SQZ_OP_OUTPUT] = {"output", SQZ_CLASS_LINEAR},
    [SQZ_OP_LOOKUP] = {"lookup", SQZ_CLASS_ATTENTION},
    [SQZ_OP_CODES] = {"codes", SQZ_CLASS_ATTENTION},
    [SQZ_OP_LOGITS] = {"QK^T", SQZ_CLASS_ATTENTION},
    [SQZ_OP_VALUES] = {"weights V", SQZ_CLASS_ATTENTION},
    [SQZ_OP_SOFTMAX] = {"softmax", SQZ_CLASS_OTHER},
    [SQZ_OP_NORM] = {"norm", SQZ_CLASS_OTHER},
    [SQZ_OP_ACTIVATION] = {"activation", SQZ_CLASS_OTHER},
    [SQZ_OP_EMBEDDING] = {"embedding", SQZ_CLASS_OTHER},
};

const char *sqz_op_name(enum sqz_op op)
{
    return (unsigned)op < SQZ_N_OPS ? ops[op].name : "unknown";
}

enum sqz_op_class sqz_op_class_of(enum sqz_op op)
{
    return (unsigned)op < SQZ_N_OPS ? ops[op].op_class : SQZ_CLASS_OTHER;
}

const char *sqz_op_class_name(enum sqz_op_class op_class)
{
    static const char *const names[SQZ_N_CLASSES] = {"linear", "attention", "other", "aggregate"};
    return (unsigned)op_class < SQZ_N_CLASSES ? names[op_class] : "unknown";
}

/* ---- Arguments ------------------------------------------------------------------ */

struct bound {
    const char *name;
    double value, low, high;
};

static enum sqz_status check_bounds(const struct bound *bounds, size_t n, struct sqz_error *error)
{
    for (const struct bound *b = bounds; b < bounds + n; b++)
        if (!(b->value >= b->low && b->value <= b->high))
            return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%s is %.15g: allowed is %.15g to %.15g", b->name, b->value,
                                 b->low, b->high);
    return SQZ_OK;
}

static enum sqz_status check_shape(const struct sqz_model_shape *s, struct sqz_error *error)
{
    const double wide = 1 << 24;
    const struct bound bounds[] = {
        {"n_layer", s->n_layer, 1, 1 << 16},
        {"n_embd", s->n_embd, 1, wide},
        {"n_head", s->n_head, 1, wide},
        {"n_head_kv", s->n_head_kv, 1, s->n_head},
        {"head_dim", s->head_dim, 1, wide},
        {"n_ff", s->n_ff, 1, wide},
        {"n_vocab", s->n_vocab, 0, wide},
        {"n_expert", s->n_expert, 0, 1 << 16},
        {"n_expert_used", s->n_expert_used, s->n_expert ? 1 : 0, s->n_expert},
        {"n_ff_shared", s->n_ff_shared, 0, wide},
        {"n_window_layer", s->n_window_layer, 0, s->n_layer},
        {"n_window_tokens", s->n_window_tokens, s->n_window_layer ? 1 : 0, UINT32_MAX},
    };
    const enum sqz_status status = check_bounds(bounds, sizeof bounds / sizeof *bounds, error);
    if (status != SQZ_OK) return status;
    if (s->n_head % s->n_head_kv != 0)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "n_head_kv is %u: allowed are divisors of the %u query heads",
                             s->n_head_kv, s->n_head);
    return SQZ_OK;
}

static enum sqz_status check_bits(const struct sqz_bit_widths *bits, struct sqz_error *error)
{
    const double least = 1e-3;
    const struct bound bounds[] = {
        {"weight bits", bits->weight, least, 64},
        {"output bits", bits->output, least, 64},
        {"KV bits", bits->kv, least, 64},
        {"activation bits", bits->activation, least, 64},
    };
    return check_bounds(bounds, sizeof bounds / sizeof *bounds, error);
}

static enum sqz_status check_work(const struct sqz_workload *work, struct sqz_error *error)
{
    const double most = 0x1p48;
    const struct bound bounds[] = {
        {"batch", (double)work->batch, 1, 0x1p32},
        {"n_context_tokens", (double)work->n_context_tokens, 0, most},
        {"n_query_tokens", (double)work->n_query_tokens, 1, most},
        {"n_steps", (double)work->n_steps, 1, most},
        {"n_logit_rows", (double)work->n_logit_rows, 0, (double)work->n_query_tokens},
        {"scores", (double)work->scores, SQZ_SCORES_TALK, SQZ_SCORES_IN_MEMORY},
    };
    return check_bounds(bounds, sizeof bounds / sizeof *bounds, error);
}

static enum sqz_status check_shares(const struct sqz_lookup_model *lookup, struct sqz_error *error)
{
    const struct bound bounds[] = {
        {"levels of the lookup", lookup->n_levels, 1, SQZ_MAX_LEVELS},
        {"budget", lookup->budget, 1e-12, 1},
        {"coded_share", lookup->coded_share, 0, 1},
        {"opened_share", lookup->opened_share, 0, 1},
    };
    const enum sqz_status status = check_bounds(bounds, sizeof bounds / sizeof *bounds, error);
    for (uint32_t i = 0; status == SQZ_OK && i < lookup->n_levels; i++) {
        const double below = i == 0 ? 1.0 : lookup->centroid_share[i - 1];
        if (!(lookup->centroid_share[i] > 0 && lookup->centroid_share[i] < below))
            return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                                 "centroid_share of level %u is %g: allowed is more than 0 "
                                 "and less than %g",
                                 i + 1, lookup->centroid_share[i], below);
    }
    return status;
}

static enum sqz_status check_lookup(const struct sqz_lookup_model *lookup, struct sqz_error *error)
{
    const struct bound counts[] = {
        {"levels of the lookup", lookup->n_levels, 0, 1},
        {"n_compared", lookup->n_compared, 1, 0x1p48},
        {"n_retained", lookup->n_retained, 0, 0x1p48},
        {"n_coded", lookup->n_coded, 0, 0x1p48},
        {"fan_out", lookup->n_levels == 1 ? 2.0 : lookup->fan_out, 1.001, 0x1p48},
    };
    const struct bound both[] = {
        {"centroid bits", lookup->centroid_bits, 0, 64},
        {"code_words", lookup->code_words, 0, SQZ_CODE_MAX_WORDS},
    };
    const enum sqz_status status = check_bounds(both, sizeof both / sizeof *both, error);
    if (status != SQZ_OK) return status;
    switch (lookup->kind) {
    case SQZ_LOOKUP_NONE: return SQZ_OK;
    case SQZ_LOOKUP_SHARES: return check_shares(lookup, error);
    case SQZ_LOOKUP_COUNTS: return check_bounds(counts, sizeof counts / sizeof *counts, error);
    }
    return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "kind of lookup is %d: allowed is 0 to 2", (int)lookup->kind);
}

/* ---- Workloads -------------------------------------------------------------------- */

struct sqz_workload sqz_workload_prefill(uint64_t batch, uint64_t n_tokens)
{
    return (struct sqz_workload){
        .batch = batch, .n_query_tokens = n_tokens, .n_steps = 1, .n_logit_rows = 1, .causal = true};
}

struct sqz_workload sqz_workload_decode(uint64_t batch, uint64_t n_context_tokens, uint64_t n_generated)
{
    return (struct sqz_workload){.batch = batch,
                                 .n_context_tokens = n_context_tokens,
                                 .n_query_tokens = 1,
                                 .n_steps = n_generated,
                                 .n_logit_rows = 1,
                                 .causal = true};
}

struct model {
    const struct sqz_model_shape *shape;
    const struct sqz_bit_widths *bits;
    const struct sqz_workload *work;
    struct sqz_costs *costs;
};

/* ---- What attention sees ------------------------------------------------------------- */

/* Of one sequence, one layer and all steps together. */
struct seen {
    double scores;   /* query-key pairs of one head */
    double rows;     /* key rows read of one KV head */
    double compared; /* query-centroid pairs of one head */
    double coded;    /* query-key pairs of one head that a code gives a logit */
    double centroid_rows, code_rows;
};

/* Sum over steps i of min(first + (i + 1) step, most). */
static double sum_capped(double first, double step, double n_steps, double most)
{
    const double below = fmin(fmax(floor((most - first) / step), 0), n_steps);
    return below * first + step * below * (below + 1) / 2 + (n_steps - below) * (n_steps > below ? most : 0);
}

/* Everything up to `window` tokens back (INFINITY: everything) from n_context tokens on. */
static struct seen see_all(const struct sqz_workload *work, double n_context, double window)
{
    const double q = (double)work->n_query_tokens, k = (double)work->n_steps;
    struct seen seen = {.rows = sum_capped(n_context, q, k, window + q - 1)};
    if (work->causal) seen.scores = sum_capped(n_context, 1, q * k, window);
    else seen.scores = q * sum_capped(n_context, q, k, window);
    return seen;
}

static double levels_needed(const struct sqz_lookup_model *lookup, double n_keys)
{
    if (lookup->n_levels == 1) return 1;
    return fmax(1, ceil(log(n_keys / lookup->n_compared) / log(lookup->fan_out)));
}

static double shares_compared(const struct sqz_lookup_model *lookup, double n_keys)
{
    double compared = lookup->centroid_share[lookup->n_levels - 1] * n_keys;
    for (uint32_t i = 0; i + 1 < lookup->n_levels; i++)
        compared += lookup->opened_share * lookup->centroid_share[i] * n_keys;
    return compared;
}

/* Bytes of what a KV head's codes need once a lookup, whatever the number of keys. */
static double code_table_bytes(const struct sqz_lookup_model *lookup, uint32_t head_dim)
{
    if (lookup->code_words == 0) return 0;
    return (double)sqz_code_shape_bytes(lookup->code_words, sqz_code_directions(lookup->code_words, head_dim),
                                        head_dim);
}

struct sqz_lookup_counts sqz_lookup_reads(const struct sqz_lookup_model *lookup, const struct sqz_bit_widths *bits,
                                          uint32_t head_dim, double n_keys)
{
    struct sqz_lookup_counts n = {.retained = n_keys};
    if (lookup->kind == SQZ_LOOKUP_COUNTS && n_keys > 0) {
        n.compared = fmin(lookup->n_compared * levels_needed(lookup, n_keys), n_keys);
        n.coded = lookup->code_words ? fmin(lookup->n_coded, n_keys) : 0;
        n.retained = fmin(lookup->n_retained, n_keys);
    } else if (lookup->kind == SQZ_LOOKUP_SHARES && lookup->budget < 1 && n_keys > 0) {
        /* A centroid is as long as a key; a key comes with its value. */
        const double centroid = lookup->centroid_bits > 0 ? lookup->centroid_bits : bits->kv;
        const double pair = 2.0 * head_dim * bits->kv;
        n.compared = fmin(shares_compared(lookup, n_keys), n_keys);
        n.coded = lookup->code_words ? lookup->coded_share * n_keys : 0;
        const double codes = 32.0 * lookup->code_words * n.coded + 8 * code_table_bytes(lookup, head_dim);
        n.retained = fmax(0, lookup->budget * n_keys - (n.compared * head_dim * centroid + codes) / pair);
    }
    return n;
}

static struct seen see_selected(const struct model *m, const struct sqz_lookup_model *lookup)
{
    const double q = (double)m->work->n_query_tokens, k = (double)m->work->n_steps;
    const struct sqz_lookup_counts n =
        sqz_lookup_reads(lookup, m->bits, m->shape->head_dim, (double)m->work->n_context_tokens);
    struct seen seen = see_all(m->work, 0, INFINITY);
    seen.scores += q * k * n.retained;
    seen.rows += k * n.retained;
    seen.compared = q * k * n.compared;
    seen.coded = q * k * n.coded;
    seen.centroid_rows = k * n.compared;
    seen.code_rows = k * n.coded;
    return seen;
}

/* ---- Operations ------------------------------------------------------------------------ */

/* n products of `tokens` rows with a matrix [out][in], each with one matrix of its own. */
static void add_linear(struct sqz_op_cost *cost, double n, double tokens, double in, double out, double weight_bits,
                       double activation_bits)
{
    cost->flops += 2 * n * tokens * in * out;
    cost->weight_bytes += n * in * out * weight_bits / 8;
    cost->activation_bytes += n * tokens * (in + out) * activation_bits / 8;
}

/* Experts that at least one of the tokens takes, each token `used` of n at random. */
static double distinct_experts(double n, double used, double tokens)
{
    return used >= n ? n : -n * expm1(tokens * log1p(-used / n));
}

/* One matrix [out][in] of the FFN in every layer: of the dense one, or of the experts and the shared one. */
static void add_ffn(const struct model *m, enum sqz_op op, double in, double out, double shared_in, double shared_out)
{
    const struct sqz_model_shape *s = m->shape;
    const double n = s->n_layer * (double)m->work->n_steps;
    const double tokens = (double)m->work->batch * (double)m->work->n_query_tokens;
    struct sqz_op_cost *cost = &m->costs->op[op];
    if (s->n_expert == 0) {
        add_linear(cost, n, tokens, in, out, m->bits->weight, m->bits->activation);
        return;
    }
    const double read = distinct_experts(s->n_expert, s->n_expert_used, tokens);
    const double taken = s->n_expert_used * tokens;
    add_linear(cost, n * read, taken / read, in, out, m->bits->weight, m->bits->activation);
    if (s->n_ff_shared) add_linear(cost, n, tokens, shared_in, shared_out, m->bits->weight, m->bits->activation);
}

static void add_linears(const struct model *m)
{
    const struct sqz_model_shape *s = m->shape;
    const double steps = (double)m->work->n_steps, n = s->n_layer * steps;
    const double tokens = (double)m->work->batch * (double)m->work->n_query_tokens;
    const double rows = (double)m->work->batch * (double)m->work->n_logit_rows;
    const double weight = m->bits->weight, activation = m->bits->activation;
    const double d = s->n_embd, queries = (double)s->n_head * s->head_dim, keys = (double)s->n_head_kv * s->head_dim;
    struct sqz_op_cost *op = m->costs->op;
    add_linear(&op[SQZ_OP_Q], n, tokens, d, queries, weight, activation);
    add_linear(&op[SQZ_OP_K], n, tokens, d, keys, weight, activation);
    add_linear(&op[SQZ_OP_V], n, tokens, d, keys, weight, activation);
    add_linear(&op[SQZ_OP_O], n, tokens, queries, d, weight, activation);
    if (s->n_expert) add_linear(&op[SQZ_OP_ROUTER], n, tokens, d, s->n_expert, weight, activation);
    if (s->gated_ffn) add_ffn(m, SQZ_OP_FFN_GATE, d, s->n_ff, d, s->n_ff_shared);
    add_ffn(m, SQZ_OP_FFN_UP, d, s->n_ff, d, s->n_ff_shared);
    add_ffn(m, SQZ_OP_FFN_DOWN, s->n_ff, d, s->n_ff_shared, d);
    if (s->n_vocab && rows > 0) add_linear(&op[SQZ_OP_OUTPUT], steps, rows, d, s->n_vocab, m->bits->output, activation);
}

static void add_others(const struct model *m)
{
    const struct sqz_model_shape *s = m->shape;
    const double steps = (double)m->work->n_steps, activation = m->bits->activation / 8;
    const double tokens = (double)m->work->batch * (double)m->work->n_query_tokens * steps;
    const double rows = (double)m->work->batch * (double)m->work->n_logit_rows * steps;
    const double normed = s->n_embd * (2.0 * s->n_layer * tokens + rows);
    const double width = s->n_expert ? (double)s->n_expert_used * s->n_ff + s->n_ff_shared : s->n_ff;
    const double activated = s->n_layer * tokens * width;
    struct sqz_op_cost *op = m->costs->op;
    op[SQZ_OP_NORM].flops = NORM_FLOPS * normed;
    op[SQZ_OP_NORM].activation_bytes = 2 * normed * activation;
    op[SQZ_OP_ACTIVATION].flops = ACTIVATION_FLOPS * activated;
    op[SQZ_OP_ACTIVATION].activation_bytes = (s->gated_ffn ? 3 : 2) * activated * activation;
    if (s->n_vocab) {
        op[SQZ_OP_EMBEDDING].weight_bytes = tokens * s->n_embd * m->bits->output / 8;
        op[SQZ_OP_EMBEDDING].activation_bytes = tokens * s->n_embd * activation;
    }
}

static bool scores_on_chip(const struct sqz_workload *work)
{
    return work->scores == SQZ_SCORES_ON_CHIP || (work->scores == SQZ_SCORES_TALK && work->n_query_tokens > 1);
}

/* The lookup of n layers: centroids, then codes of single keys. */
static void add_lookup(const struct model *m, double n, struct seen seen, const struct sqz_lookup_model *lookup)
{
    const struct sqz_model_shape *s = m->shape;
    const double batch = n * (double)m->work->batch, activation = m->bits->activation / 8;
    const double heads = batch * s->n_head, heads_kv = batch * s->n_head_kv, steps = (double)m->work->n_steps;
    const double queries = heads * (double)m->work->n_query_tokens * steps;
    const double centroid_bits = lookup->centroid_bits > 0 ? lookup->centroid_bits : m->bits->kv;
    const double directions = sqz_code_directions(lookup->code_words, s->head_dim);
    struct sqz_op_cost *op = m->costs->op;
    if (!(seen.compared > 0)) return;
    op[SQZ_OP_LOOKUP].flops += 2.0 * heads * s->head_dim * seen.compared;
    op[SQZ_OP_LOOKUP].kv_bytes += heads_kv * s->head_dim * seen.centroid_rows * centroid_bits / 8;
    op[SQZ_OP_LOOKUP].activation_bytes += queries * s->head_dim * activation;
    if (lookup->code_words == 0) return;
    /* A query along all directions, its number for every entry of every part; then an addition a part and key. */
    op[SQZ_OP_CODES].flops += 2.0 * queries * directions * (s->head_dim + (double)SQZ_CODE_ENTRIES) +
                              (double)SQZ_CODE_PARTS * lookup->code_words * heads * seen.coded;
    op[SQZ_OP_CODES].kv_bytes += heads_kv * (sizeof(uint32_t) * (double)lookup->code_words * seen.code_rows +
                                             steps * code_table_bytes(lookup, s->head_dim));
    op[SQZ_OP_CODES].activation_bytes += queries * s->head_dim * activation;
}

/* Attention of n layers that see the same. */
static void add_attention(const struct model *m, double n, struct seen seen)
{
    const struct sqz_model_shape *s = m->shape;
    const double batch = n * (double)m->work->batch, activation = m->bits->activation / 8;
    const double heads = batch * s->n_head, heads_kv = batch * s->n_head_kv;
    const double queries = heads * (double)m->work->n_query_tokens * (double)m->work->n_steps;
    const double product = 2.0 * heads * s->head_dim * seen.scores;
    struct sqz_op_cost *op = m->costs->op;
    op[SQZ_OP_LOGITS].flops += product;
    op[SQZ_OP_LOGITS].kv_bytes += heads_kv * s->head_dim * seen.rows * m->bits->kv / 8;
    op[SQZ_OP_LOGITS].activation_bytes += queries * s->head_dim * activation;
    op[SQZ_OP_VALUES].flops += product;
    op[SQZ_OP_VALUES].kv_bytes += heads_kv * s->head_dim * seen.rows * m->bits->kv / 8;
    op[SQZ_OP_VALUES].activation_bytes += queries * s->head_dim * activation;
    op[SQZ_OP_SOFTMAX].flops += SOFTMAX_FLOPS * heads * (seen.scores + seen.compared + seen.coded);
    if (scores_on_chip(m->work)) {
        op[SQZ_OP_VALUES].score_bytes += queries * STATISTIC_BYTES;
    } else {
        const double once = heads * seen.scores * activation;
        op[SQZ_OP_LOGITS].score_bytes += once;
        op[SQZ_OP_SOFTMAX].score_bytes += 2 * once;
        op[SQZ_OP_VALUES].score_bytes += once;
    }
}

enum sqz_status sqz_roofline(struct sqz_costs *costs, const struct sqz_model_shape *shape,
                             const struct sqz_bit_widths *bits, const struct sqz_workload *work,
                             const struct sqz_lookup_model *lookup, struct sqz_error *error)
{
    const struct sqz_lookup_model dense = {.kind = SQZ_LOOKUP_NONE};
    enum sqz_status status;
    memset(costs, 0, sizeof *costs);
    sqz_error_clear(error);
    if (!lookup) lookup = &dense;
    if ((status = check_shape(shape, error)) || (status = check_bits(bits, error)) ||
        (status = check_work(work, error)) || (status = check_lookup(lookup, error)))
        return status;
    const struct model m = {shape, bits, work, costs};
    const double n_context = (double)work->n_context_tokens;
    const bool selects = lookup->kind != SQZ_LOOKUP_NONE && n_context > 0;
    const double n_global = (double)shape->n_layer - shape->n_window_layer;
    const struct seen seen = selects ? see_selected(&m, lookup) : see_all(work, n_context, INFINITY);
    add_linears(&m);
    add_others(&m);
    add_attention(&m, n_global, seen);
    add_lookup(&m, n_global, seen, lookup);
    if (shape->n_window_layer)
        add_attention(&m, shape->n_window_layer, see_all(work, n_context, shape->n_window_tokens));
    return SQZ_OK;
}

/* ---- Sums and times -------------------------------------------------------------------------- */

static bool is_in(enum sqz_op op, enum sqz_op_class op_class)
{
    return op_class == SQZ_CLASS_AGGREGATE || ops[op].op_class == op_class;
}

struct sqz_op_cost sqz_costs_sum(const struct sqz_costs *costs, enum sqz_op_class op_class)
{
    struct sqz_op_cost sum = {0};
    for (int i = 0; i < SQZ_N_OPS; i++) {
        if (!is_in((enum sqz_op)i, op_class)) continue;
        sum.flops += costs->op[i].flops;
        sum.weight_bytes += costs->op[i].weight_bytes;
        sum.activation_bytes += costs->op[i].activation_bytes;
        sum.kv_bytes += costs->op[i].kv_bytes;
        sum.score_bytes += costs->op[i].score_bytes;
    }
    return sum;
}

double sqz_op_cost_bytes(const struct sqz_op_cost *cost)
{
    return cost->weight_bytes + cost->activation_bytes + cost->kv_bytes + cost->score_bytes;
}

double sqz_op_cost_intensity(const struct sqz_op_cost *cost)
{
    const double bytes = sqz_op_cost_bytes(cost);
    return bytes > 0 ? cost->flops / bytes : 0;
}

double sqz_roof_ridge(const struct sqz_roof *roof)
{
    return roof->flops_per_second / roof->bytes_per_second;
}

double sqz_op_cost_seconds(const struct sqz_op_cost *cost, const struct sqz_roof *roof)
{
    return fmax(cost->flops / roof->flops_per_second, sqz_op_cost_bytes(cost) / roof->bytes_per_second);
}

double sqz_op_cost_attained(const struct sqz_op_cost *cost, const struct sqz_roof *roof)
{
    const double seconds = sqz_op_cost_seconds(cost, roof);
    return seconds > 0 ? cost->flops / seconds : 0;
}

double sqz_costs_seconds(const struct sqz_costs *costs, enum sqz_op_class op_class, const struct sqz_roof *roof)
{
    double seconds = 0;
    for (int i = 0; i < SQZ_N_OPS; i++)
        if (is_in((enum sqz_op)i, op_class)) seconds += sqz_op_cost_seconds(&costs->op[i], roof);
    return seconds;
}

/* ---- Sizes ----------------------------------------------------------------------------------------- */

static double layer_matrix_numbers(const struct sqz_model_shape *s)
{
    const double d = s->n_embd, attention = 2.0 * d * s->head_dim * ((double)s->n_head + s->n_head_kv);
    const double width = s->n_expert ? (double)s->n_expert * s->n_ff + s->n_ff_shared : s->n_ff;
    return s->n_layer * (attention + d * s->n_expert + (s->gated_ffn ? 3 : 2) * d * width);
}

static double output_numbers(const struct sqz_model_shape *s)
{
    return (s->tied_embeddings ? 1.0 : 2.0) * s->n_vocab * s->n_embd;
}

double sqz_shape_parameters(const struct sqz_model_shape *shape)
{
    return layer_matrix_numbers(shape) + output_numbers(shape) + (2.0 * shape->n_layer + 1) * shape->n_embd;
}

double sqz_shape_weight_bytes(const struct sqz_model_shape *shape, const struct sqz_bit_widths *bits)
{
    return (layer_matrix_numbers(shape) * bits->weight + output_numbers(shape) * bits->output) / 8;
}

double sqz_shape_kv_bytes(const struct sqz_model_shape *shape, const struct sqz_bit_widths *bits, double n_tokens)
{
    const double rows = ((double)shape->n_layer - shape->n_window_layer) * n_tokens +
                        shape->n_window_layer * fmin(n_tokens, shape->n_window_tokens);
    return 2.0 * rows * shape->n_head_kv * shape->head_dim * bits->kv / 8;
}

double sqz_speculation_tokens(double acceptance, uint32_t gamma)
{
    double tokens = 0, all_accepted = 1;
    if (acceptance >= 1) return gamma + 1.0;
    if (gamma > 64) return (1 - pow(acceptance, gamma + 1.0)) / (1 - acceptance);
    /* The series: no difference of nearly equal numbers near an acceptance of 1. */
    for (uint32_t i = 0; i <= gamma; i++) {
        tokens += all_accepted;
        all_accepted *= acceptance;
    }
    return tokens;
}
