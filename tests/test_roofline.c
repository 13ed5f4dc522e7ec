/*
 * The roofline model against numbers worked out by hand, sums over single steps, the ridge points and the two
 * observations of the talk (QuantSpec, arXiv 2502.10424), and budgets that its tables give.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <string.h>

#include "squeeze_roofline.h"

static const struct sqz_bit_widths bits16 = {16, 16, 16, 16};

/* Relative, beside sums of a few dozen terms in doubles. */
static const double tolerance = 1e-12;

#define assert_near(got, wanted) check_near(got, wanted, #got, __LINE__)

static void check_near(double got, double wanted, const char *what, int line)
{
    if (!(fabs(got - wanted) <= tolerance * fmax(fabs(wanted), 1e-300)))
        fail_msg("line %d: %s is %.17g, wanted %.17g", line, what, got, wanted);
}

static struct sqz_model_shape preset(const char *name)
{
    struct sqz_model_shape shape;
    assert_true(sqz_shape_preset(name, &shape));
    return shape;
}

static struct sqz_costs costs_of(const struct sqz_model_shape *shape, const struct sqz_workload *work,
                                 const struct sqz_lookup_model *lookup)
{
    struct sqz_costs costs;
    struct sqz_error error;
    if (sqz_roofline(&costs, shape, &bits16, work, lookup, &error) != SQZ_OK) fail_msg("%s", error.message);
    return costs;
}

static struct sqz_roof roof_of(const char *name)
{
    struct sqz_machine machine;
    assert_true(sqz_machine_preset(name, &machine));
    return (struct sqz_roof){machine.flops_per_second[machine.precision], machine.bytes_per_second};
}

/* ---- By hand -------------------------------------------------------------------- */

static const struct sqz_model_shape tiny = {.n_layer = 2,
                                            .n_embd = 8,
                                            .n_head = 2,
                                            .n_head_kv = 1,
                                            .head_dim = 4,
                                            .n_ff = 16,
                                            .n_vocab = 10,
                                            .gated_ffn = true};

static void assert_cost(const struct sqz_costs *costs, enum sqz_op op, double flops, double weights, double activations,
                        double kv, double scores)
{
    const struct sqz_op_cost *c = &costs->op[op];
    if (c->flops != flops || c->weight_bytes != weights || c->activation_bytes != activations || c->kv_bytes != kv ||
        c->score_bytes != scores) {
        fail_msg("%s: got %g, %g, %g, %g, %g; wanted %g, %g, %g, %g, %g", sqz_op_name(op), c->flops, c->weight_bytes,
                 c->activation_bytes, c->kv_bytes, c->score_bytes, flops, weights, activations, kv, scores);
    }
}

/* Three prompts of five tokens: 15 tokens, and 1 + 2 + 3 + 4 + 5 = 15 query-key pairs a head and prompt. */
static void test_prefill_by_hand(void **state)
{
    (void)state;
    const struct sqz_workload work = sqz_workload_prefill(3, 5);
    const struct sqz_costs c = costs_of(&tiny, &work, NULL);
    assert_cost(&c, SQZ_OP_Q, 2 * 2 * 15 * 8 * 8, 2 * 8 * 8 * 2, 2 * 15 * (8 + 8) * 2, 0, 0);
    assert_cost(&c, SQZ_OP_K, 2 * 2 * 15 * 8 * 4, 2 * 8 * 4 * 2, 2 * 15 * (8 + 4) * 2, 0, 0);
    assert_cost(&c, SQZ_OP_V, 1920, 128, 720, 0, 0);
    assert_cost(&c, SQZ_OP_O, 3840, 256, 960, 0, 0);
    assert_cost(&c, SQZ_OP_FFN_GATE, 7680, 512, 1440, 0, 0);
    assert_cost(&c, SQZ_OP_FFN_UP, 7680, 512, 1440, 0, 0);
    assert_cost(&c, SQZ_OP_FFN_DOWN, 7680, 512, 1440, 0, 0);
    assert_cost(&c, SQZ_OP_OUTPUT, 2 * 3 * 8 * 10, 8 * 10 * 2, 3 * (8 + 10) * 2, 0, 0);
    assert_cost(&c, SQZ_OP_LOGITS, 2 * 2 * 3 * 2 * 4 * 15, 0, 2 * 3 * 5 * 2 * 4 * 2, 2 * 3 * 1 * 5 * 4 * 2, 0);
    assert_cost(&c, SQZ_OP_VALUES, 1440, 0, 480, 240, 2 * 3 * 5 * 2 * 4); /* an F32 a query and head */
    assert_cost(&c, SQZ_OP_SOFTMAX, 5 * 2 * 3 * 2 * 15, 0, 0, 0, 0);
    assert_cost(&c, SQZ_OP_NORM, 4 * 504, 0, 2 * 504 * 2, 0, 0); /* 8 (2 layers, 2 norms, 15 tokens; 3 logit rows) */
    assert_cost(&c, SQZ_OP_ACTIVATION, 5 * 480, 0, 3 * 480 * 2, 0, 0);
    assert_cost(&c, SQZ_OP_EMBEDDING, 0, 15 * 8 * 2, 15 * 8 * 2, 0, 0);
    assert_cost(&c, SQZ_OP_LOOKUP, 0, 0, 0, 0, 0);
    assert_cost(&c, SQZ_OP_ROUTER, 0, 0, 0, 0, 0);
}

/* Two tokens behind five, three sequences: 6 + 7 keys. */
static void test_decode_by_hand(void **state)
{
    (void)state;
    const struct sqz_workload work = sqz_workload_decode(3, 5, 2);
    const struct sqz_costs c = costs_of(&tiny, &work, NULL);
    assert_cost(&c, SQZ_OP_Q, 2 * 2 * 2 * 3 * 64, 2 * 256, 2 * 2 * 3 * 16 * 2, 0, 0);
    assert_cost(&c, SQZ_OP_LOGITS, 2 * 2 * 3 * 2 * 4 * 13, 0, 2 * 2 * 3 * 8 * 2, 2 * 3 * 4 * 13 * 2, 12 * 13 * 2);
    assert_cost(&c, SQZ_OP_SOFTMAX, 5 * 12 * 13, 0, 0, 0, 2 * 12 * 13 * 2);
    const struct sqz_op_cost sum = sqz_costs_sum(&c, SQZ_CLASS_ATTENTION);
    assert_near(sum.flops, 2 * 1248);
    assert_near(sqz_op_cost_bytes(&sum), 2 * (192 + 624 + 312));
    assert_near(sqz_op_cost_intensity(&sum), 2496.0 / 2256.0);
}

/* ---- Sums over steps ------------------------------------------------------------------ */

static void add(struct sqz_op_cost *sum, const struct sqz_op_cost *cost)
{
    sum->flops += cost->flops;
    sum->weight_bytes += cost->weight_bytes;
    sum->activation_bytes += cost->activation_bytes;
    sum->kv_bytes += cost->kv_bytes;
    sum->score_bytes += cost->score_bytes;
}

static void assert_same_costs(const struct sqz_costs *a, const struct sqz_costs *b)
{
    for (int i = 0; i < SQZ_N_OPS; i++) {
        assert_near(a->op[i].flops, b->op[i].flops);
        assert_near(sqz_op_cost_bytes(&a->op[i]), sqz_op_cost_bytes(&b->op[i]));
    }
}

/* Many steps at once equal them one by one; windows, both kinds of counting, steps of several tokens. */
static void test_steps_add_up(void **state)
{
    (void)state;
    struct sqz_model_shape shape = preset("gemma-3-270m");
    for (int variant = 0; variant < 8; variant++) {
        struct sqz_workload work = sqz_workload_decode(2, variant & 1 ? 500 : 3000, 40);
        work.causal = variant & 2;
        work.n_query_tokens = variant & 4 ? 7 : 1;
        struct sqz_costs whole = costs_of(&shape, &work, NULL), sum = {{{0, 0, 0, 0, 0}}};
        for (uint64_t i = 0; i < work.n_steps; i++) {
            struct sqz_workload one = work;
            one.n_context_tokens += i * work.n_query_tokens;
            one.n_steps = 1;
            const struct sqz_costs step = costs_of(&shape, &one, NULL);
            for (int op = 0; op < SQZ_N_OPS; op++) add(&sum.op[op], &step.op[op]);
        }
        assert_same_costs(&whole, &sum);
    }
}

/* What a window shows, counted key by key. */
static void test_window_by_counting(void **state)
{
    (void)state;
    struct sqz_model_shape shape = tiny;
    shape.n_window_layer = 2;
    shape.n_window_tokens = 6;
    const struct sqz_workload work = sqz_workload_prefill(1, 20);
    const struct sqz_costs c = costs_of(&shape, &work, NULL);
    double pairs = 0;
    for (int query = 0; query < 20; query++)
        for (int key = 0; key <= query; key++) pairs += key > query - 6;
    assert_near(c.op[SQZ_OP_LOGITS].flops, 2 * 2 * 2 * 4 * pairs);
    assert_near(sqz_shape_kv_bytes(&shape, &bits16, 20), 2 * 2 * 6 * 4 * 2);
}

/* ---- Shapes --------------------------------------------------------------------------------- */

/* Published parameter counts of models without biases. */
static void test_parameters(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        double n;
    } published[] = {{"llama-2-7b", 6738415616.0},    {"llama-2-13b", 13015864320.0}, {"llama-2-70b", 68976648192.0},
                     {"llama-3-8b", 8030261248.0},    {"llama-3-70b", 70553706496.0}, {"mistral-7b", 7241732096.0},
                     {"mixtral-8x7b", 46702792704.0}, {"smollm2-135m", 134515008.0}};
    for (size_t i = 0; i < sizeof published / sizeof *published; i++) {
        const struct sqz_model_shape shape = preset(published[i].name);
        assert_near(sqz_shape_parameters(&shape), published[i].n);
    }
}

static void test_presets_are_valid(void **state)
{
    (void)state;
    struct sqz_model_shape shape, again;
    struct sqz_machine machine;
    const struct sqz_workload work = sqz_workload_decode(1, 100, 1);
    size_t n = 0;
    for (; sqz_shape_get(n, &shape); n++) {
        assert_true(sqz_shape_preset(shape.name, &again));
        costs_of(&shape, &work, NULL);
    }
    assert_true(n >= 8);
    assert_false(sqz_shape_preset("llama", &shape));
    for (n = 0; sqz_machine_get(n, &machine); n++)
        assert_true(machine.flops_per_second[machine.precision] > 0 && machine.bytes_per_second > 0);
    assert_false(sqz_machine_preset("", &machine));
}

/* Two of eight experts: one token reads two, a thousand nearly all; FLOPs follow the tokens. */
static void test_experts(void **state)
{
    (void)state;
    struct sqz_model_shape shape = preset("mixtral-8x7b");
    const double matrix = 32.0 * 4096 * 14336;
    struct sqz_workload work = sqz_workload_decode(1, 0, 1);
    struct sqz_costs c = costs_of(&shape, &work, NULL);
    assert_near(c.op[SQZ_OP_FFN_UP].weight_bytes, 2 * matrix * 2);
    assert_near(c.op[SQZ_OP_FFN_UP].flops, 2 * 2 * matrix);
    assert_near(c.op[SQZ_OP_ROUTER].flops, 2.0 * 32 * 4096 * 8);
    work.batch = 3;
    c = costs_of(&shape, &work, NULL);
    assert_near(c.op[SQZ_OP_FFN_UP].weight_bytes, 8 * (1 - 0.75 * 0.75 * 0.75) * matrix * 2);
    assert_near(c.op[SQZ_OP_FFN_UP].flops, 3 * 2 * 2 * matrix);
    shape.n_ff_shared = 14336;
    work.batch = 1;
    c = costs_of(&shape, &work, NULL);
    assert_near(c.op[SQZ_OP_FFN_UP].weight_bytes, 3 * matrix * 2);
}

static void test_bits(void **state)
{
    (void)state;
    const struct sqz_model_shape shape = preset("llama-2-7b");
    const struct sqz_bit_widths bits = {.weight = 4.5, .output = 8, .kv = 4, .activation = 16};
    const struct sqz_workload work = sqz_workload_decode(1, 1000, 1);
    struct sqz_costs wide = costs_of(&shape, &work, NULL), narrow;
    assert_int_equal(sqz_roofline(&narrow, &shape, &bits, &work, NULL, NULL), SQZ_OK);
    assert_near(narrow.op[SQZ_OP_Q].weight_bytes, wide.op[SQZ_OP_Q].weight_bytes * 4.5 / 16);
    assert_near(narrow.op[SQZ_OP_OUTPUT].weight_bytes, wide.op[SQZ_OP_OUTPUT].weight_bytes / 2);
    assert_near(narrow.op[SQZ_OP_LOGITS].kv_bytes, wide.op[SQZ_OP_LOGITS].kv_bytes / 4);
    assert_near(narrow.op[SQZ_OP_LOGITS].flops, wide.op[SQZ_OP_LOGITS].flops);
    assert_near(sqz_shape_kv_bytes(&shape, &bits16, 1), 524288); /* half a megabyte a token */
}

/* ---- Machines --------------------------------------------------------------------------------- */

static void test_ridge_points_of_the_talk(void **state)
{
    (void)state;
    const struct sqz_roof a100 = roof_of("a100"), a6000 = roof_of("a6000"), h100 = roof_of("h100");
    assert_int_equal(lround(sqz_roof_ridge(&a100)), 161);
    assert_int_equal(lround(sqz_roof_ridge(&a6000)), 403);
    assert_int_equal(lround(sqz_roof_ridge(&h100)), 485);
}

static void test_time_is_the_larger(void **state)
{
    (void)state;
    const struct sqz_roof roof = {100, 10}; /* ridge 10 */
    const struct sqz_op_cost memory = {.flops = 50, .kv_bytes = 20}, compute = {.flops = 500, .weight_bytes = 20};
    assert_near(sqz_op_cost_seconds(&memory, &roof), 2);
    assert_near(sqz_op_cost_attained(&memory, &roof), 25);
    assert_near(sqz_op_cost_seconds(&compute, &roof), 5);
    assert_near(sqz_op_cost_attained(&compute, &roof), 100);
    struct sqz_costs costs = {{{0, 0, 0, 0, 0}}};
    costs.op[SQZ_OP_LOGITS] = memory;
    costs.op[SQZ_OP_Q] = compute;
    assert_near(sqz_costs_seconds(&costs, SQZ_CLASS_AGGREGATE, &roof), 7);
    assert_near(sqz_costs_seconds(&costs, SQZ_CLASS_LINEAR, &roof), 5);
}

/* ---- The talk's observations: Llama-2-7B on an A6000 ------------------------------------------- */

static const uint64_t batches[] = {1, 2, 4, 8, 16, 32, 64, 128, 256};
static const uint64_t contexts[] = {1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15,
                                    1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20};
enum { N_BATCHES = sizeof batches / sizeof *batches, N_CONTEXTS = sizeof contexts / sizeof *contexts };

static double aggregate_intensity(const struct sqz_costs *costs)
{
    const struct sqz_op_cost sum = sqz_costs_sum(costs, SQZ_CLASS_AGGREGATE);
    return sqz_op_cost_intensity(&sum);
}

/* "All regimes lie above the ridge plane and thus are compute-bound"; the intensity grows with the context. */
static void test_prefill_is_compute_bound(void **state)
{
    (void)state;
    const struct sqz_model_shape shape = preset("llama-2-7b");
    const struct sqz_roof roof = roof_of("a6000");
    for (int b = 0; b < N_BATCHES; b++) {
        double last = 0;
        for (int s = 0; s < N_CONTEXTS; s++) {
            const struct sqz_workload work = sqz_workload_prefill(batches[b], contexts[s]);
            const struct sqz_costs costs = costs_of(&shape, &work, NULL);
            const double intensity = aggregate_intensity(&costs);
            if (!(intensity > sqz_roof_ridge(&roof)) || !(intensity > last))
                fail_msg("batch %d, context %d: intensity %g", (int)batches[b], (int)contexts[s], intensity);
            last = intensity;
        }
    }
}

/* Memory-bound throughout; weights dominate where batch and context are small, the cache everywhere else: where the
 * cache of all sequences outweighs the weights, and nowhere below. */
static void test_decode_is_memory_bound(void **state)
{
    (void)state;
    const struct sqz_model_shape shape = preset("llama-2-7b");
    const struct sqz_roof roof = roof_of("a6000");
    const double weights = sqz_shape_weight_bytes(&shape, &bits16);
    int n_weights = 0, n_cache = 0;
    for (int b = 0; b < N_BATCHES; b++) {
        for (int s = 0; s < N_CONTEXTS; s++) {
            const struct sqz_workload work = sqz_workload_decode(batches[b], contexts[s], 1);
            const struct sqz_costs costs = costs_of(&shape, &work, NULL);
            const struct sqz_op_cost linear = sqz_costs_sum(&costs, SQZ_CLASS_LINEAR);
            const struct sqz_op_cost attention = sqz_costs_sum(&costs, SQZ_CLASS_ATTENTION);
            const bool cache = sqz_op_cost_bytes(&attention) > sqz_op_cost_bytes(&linear);
            const double ratio =
                (double)batches[b] * sqz_shape_kv_bytes(&shape, &bits16, (double)contexts[s]) / weights;
            if (!(aggregate_intensity(&costs) < sqz_roof_ridge(&roof)) || (ratio > 1.1 && !cache) ||
                (ratio < 0.9 && cache)) {
                fail_msg("batch %d, context %d: intensity %g, cache to weights %g", (int)batches[b], (int)contexts[s],
                         aggregate_intensity(&costs), ratio);
            }
            n_cache += cache;
            n_weights += !cache;
        }
    }
    assert_true(n_weights > 0 && n_cache > n_weights);
}

/* Seconds a token and sequence, B = 64 against B = 1: 64 times as good with no context, next to nothing with a long one. */
static void test_batching_does_not_help_long_contexts(void **state)
{
    (void)state;
    const struct sqz_model_shape shape = preset("llama-2-7b");
    const struct sqz_roof roof = roof_of("a6000");
    double gain[2], intensity[2];
    for (int i = 0; i < 2; i++) {
        const uint64_t context = i ? 1 << 20 : 1 << 4;
        const struct sqz_workload one = sqz_workload_decode(1, context, 1), many = sqz_workload_decode(64, context, 1);
        const struct sqz_costs a = costs_of(&shape, &one, NULL), b = costs_of(&shape, &many, NULL);
        gain[i] =
            64 * sqz_costs_seconds(&a, SQZ_CLASS_AGGREGATE, &roof) / sqz_costs_seconds(&b, SQZ_CLASS_AGGREGATE, &roof);
        intensity[i] = aggregate_intensity(&b) / aggregate_intensity(&a);
    }
    assert_true(gain[0] > 50 && intensity[0] > 50);
    assert_true(gain[1] < 1.05 && intensity[1] < 1.05);
}

/* ---- Squeezed attention --------------------------------------------------------------------------- */

/* The talk's budgets: a tenth of the keys and 5% centroids are 0.125; two levels, of whose finer one 28% is opened,
 * 0.112. */
static void test_budgets_of_the_talk(void **state)
{
    (void)state;
    const struct sqz_lookup_model one = {
        .kind = SQZ_LOOKUP_SHARES, .n_levels = 1, .centroid_share = {0.05}, .opened_share = 1, .budget = 0.125};
    const struct sqz_lookup_model two = {.kind = SQZ_LOOKUP_SHARES,
                                         .n_levels = 2,
                                         .centroid_share = {0.05, 0.01},
                                         .opened_share = 0.28,
                                         .budget = 0.112};
    struct sqz_lookup_counts n = sqz_lookup_reads(&one, &bits16, 128, 512000);
    assert_near(n.compared, 25600);
    assert_near(n.retained, 51200);
    assert_near(n.coded, 0);
    n = sqz_lookup_reads(&two, &bits16, 128, 512000);
    assert_near(n.compared, 512000 * (0.01 + 0.28 * 0.05));
    assert_near(n.retained, 51200);
}

static void test_squeezed_costs(void **state)
{
    (void)state;
    const struct sqz_model_shape shape = preset("llama-3-8b");
    const struct sqz_workload work = sqz_workload_decode(2, 100000, 1);
    struct sqz_lookup_model lookup = {
        .kind = SQZ_LOOKUP_SHARES, .n_levels = 1, .centroid_share = {0.05}, .opened_share = 1, .budget = 0.125};
    const struct sqz_costs dense = costs_of(&shape, &work, NULL), squeezed = costs_of(&shape, &work, &lookup);
    const double token = 2.0 * 32 * 8 * 128 * 2; /* batch, layers, KV heads, numbers, bytes: of a key */
    assert_near(dense.op[SQZ_OP_LOGITS].kv_bytes, 100001 * token);
    assert_near(squeezed.op[SQZ_OP_LOGITS].kv_bytes, (10000 + 1) * token);
    assert_near(squeezed.op[SQZ_OP_LOOKUP].kv_bytes, 5000 * token);
    assert_near(squeezed.op[SQZ_OP_LOOKUP].flops, 2.0 * 2 * 32 * 32 * 128 * 5000);
    const struct sqz_op_cost all = sqz_costs_sum(&squeezed, SQZ_CLASS_ATTENTION);
    assert_near(all.kv_bytes, 2 * token * (0.125 * 100000 + 1)); /* the budget, and the token itself */
    lookup.budget = 1;
    const struct sqz_costs whole = costs_of(&shape, &work, &lookup);
    assert_same_costs(&whole, &dense);
}

/* Codes by hand: 2 words a key of the opened clusters, and directions, entries and parts once a head. */
static void test_codes(void **state)
{
    (void)state;
    const struct sqz_model_shape shape = preset("llama-3-8b");
    const struct sqz_workload work = sqz_workload_decode(2, 100000, 3);
    struct sqz_lookup_model lookup = {.kind = SQZ_LOOKUP_SHARES,
                                      .n_levels = 1,
                                      .centroid_share = {0.05},
                                      .opened_share = 1,
                                      .budget = 0.125,
                                      .code_words = 2,
                                      .coded_share = 0.3};
    const double table = 48 * ((128 + 16) * 2 + 4) + (16 + 1) * 4;
    const double selections = 3.0 * 2 * 32 * 8; /* steps, batch, layers, KV heads */
    const struct sqz_costs c = costs_of(&shape, &work, &lookup);
    const struct sqz_op_cost *codes = &c.op[SQZ_OP_CODES];
    assert_near(codes->kv_bytes, selections * (30000 * 8 + table));
    assert_near(codes->flops,
                selections * 4 * (2 * 48 * (128 + 16) + 16 * 30000.0)); /* 4 query heads share a KV head */
    assert_near(codes->activation_bytes, selections * 4 * 128 * 2);
    assert_near(codes->weight_bytes + codes->score_bytes, 0);
    const struct sqz_lookup_counts n = sqz_lookup_reads(&lookup, &bits16, 128, 100000);
    assert_near(n.coded, 30000);
    assert_near(n.retained * 512 + n.compared * 256 + n.coded * 8 + table, 0.125 * 100000 * 512);
    const struct sqz_op_cost all = sqz_costs_sum(&c, SQZ_CLASS_ATTENTION);
    assert_near(all.kv_bytes, selections * (0.125 * 100000 * 512 + 2 * 512)); /* and 1, 2, 3 tokens of their own */
    lookup.coded_share = 1;
    lookup.budget = 0.03; /* codes and centroids alone take more */
    assert_near(sqz_lookup_reads(&lookup, &bits16, 128, 100000).retained, 0);
    const struct sqz_lookup_model counts = {.kind = SQZ_LOOKUP_COUNTS,
                                            .n_levels = 1,
                                            .n_compared = 1000,
                                            .n_retained = 2000,
                                            .n_coded = 7000,
                                            .code_words = 2};
    assert_near(sqz_lookup_reads(&counts, &bits16, 128, 1e6).coded, 7000);
    assert_near(sqz_lookup_reads(&counts, &bits16, 128, 5000).coded, 5000);
}

/* O(N), O(c + k), O(c' log N + k): doubling the context adds the same to the third, every time. */
static void test_complexity(void **state)
{
    (void)state;
    const struct sqz_lookup_model one = {
        .kind = SQZ_LOOKUP_COUNTS, .n_levels = 1, .n_compared = 1000, .n_retained = 2000};
    const struct sqz_lookup_model tree = {
        .kind = SQZ_LOOKUP_COUNTS, .n_levels = 0, .n_compared = 100, .fan_out = 2, .n_retained = 2000};
    double last = 0;
    for (double n_keys = 0x1p14; n_keys <= 0x1p24; n_keys *= 2) {
        struct sqz_lookup_counts n = sqz_lookup_reads(&one, &bits16, 128, n_keys);
        assert_near(n.compared + n.retained, 3000);
        n = sqz_lookup_reads(&tree, &bits16, 128, n_keys);
        assert_near(n.retained, 2000);
        assert_true(last == 0 || n.compared - last == 100);
        last = n.compared;
    }
    const struct sqz_lookup_counts few = sqz_lookup_reads(&tree, &bits16, 128, 50); /* never more than there are */
    assert_near(few.compared, 50);
    assert_near(few.retained, 50);
}

static void test_speculation(void **state)
{
    (void)state;
    assert_near(sqz_speculation_tokens(0, 5), 1);
    assert_near(sqz_speculation_tokens(1, 5), 6);
    assert_near(sqz_speculation_tokens(0.8, 3), 1 + 0.8 + 0.64 + 0.512);
    assert_near(sqz_speculation_tokens(0.5, 1000), 2);
    assert_near(sqz_speculation_tokens(1, UINT32_MAX), 4294967296.0);
}

/* ---- Sizes and errors -------------------------------------------------------------------------------- */

/* Ten million tokens, a thousand sequences, the largest model: finite, and in proportion. */
static void test_large_sizes(void **state)
{
    (void)state;
    const struct sqz_model_shape shape = preset("llama-2-70b");
    const struct sqz_workload prefill = sqz_workload_prefill(1000, 10000000),
                              half = sqz_workload_prefill(500, 10000000);
    const struct sqz_workload decode = sqz_workload_decode(1000, 10000000, 1000000);
    const struct sqz_costs a = costs_of(&shape, &prefill, NULL), b = costs_of(&shape, &half, NULL);
    const struct sqz_costs c = costs_of(&shape, &decode, NULL);
    const double pairs = 1e7 * (1e7 + 1) / 2;
    assert_near(a.op[SQZ_OP_LOGITS].flops, 2.0 * 80 * 1000 * 64 * 128 * pairs);
    assert_near(a.op[SQZ_OP_LOGITS].flops, 2 * b.op[SQZ_OP_LOGITS].flops);
    assert_near(c.op[SQZ_OP_VALUES].kv_bytes, 80.0 * 1000 * 8 * 128 * 2 * (1e6 * 1e7 + 1e6 * (1e6 + 1) / 2));
    for (int i = 0; i < SQZ_N_OPS; i++)
        assert_true(isfinite(a.op[i].flops) && isfinite(sqz_op_cost_bytes(&c.op[i])) && c.op[i].flops >= 0);
}

static void assert_refused(const struct sqz_model_shape *shape, const struct sqz_bit_widths *bits,
                           const struct sqz_workload *work, const struct sqz_lookup_model *lookup, const char *text)
{
    struct sqz_costs costs;
    struct sqz_error error;
    assert_int_equal(sqz_roofline(&costs, shape, bits, work, lookup, &error), SQZ_ERROR_ARGUMENT);
    if (!strstr(error.message, text)) fail_msg("wanted '%s' in: %s", text, error.message);
    assert_true(costs.op[SQZ_OP_Q].flops == 0);
}

static void test_refusals(void **state)
{
    (void)state;
    struct sqz_model_shape shape = tiny;
    struct sqz_bit_widths bits = bits16;
    struct sqz_workload work = sqz_workload_decode(1, 10, 1);
    struct sqz_lookup_model lookup = {
        .kind = SQZ_LOOKUP_SHARES, .n_levels = 2, .centroid_share = {0.05, 0.1}, .opened_share = 1, .budget = 0.1};
    assert_refused(&shape, &bits, &work, &lookup, "centroid_share of level 2 is 0.1");
    lookup.budget = NAN;
    assert_refused(&shape, &bits, &work, &lookup, "budget is nan");
    lookup.budget = 0.1;
    lookup.coded_share = 1.5;
    assert_refused(&shape, &bits, &work, &lookup, "coded_share is 1.5: allowed is 0 to 1");
    lookup.code_words = 5;
    assert_refused(&shape, &bits, &work, &lookup, "code_words is 5: allowed is 0 to 4");
    lookup.code_words = 0;
    lookup.kind = SQZ_LOOKUP_COUNTS;
    assert_refused(&shape, &bits, &work, &lookup, "levels of the lookup is 2");
    work.batch = 0;
    assert_refused(&shape, &bits, &work, NULL, "batch is 0: allowed is 1 to 4294967296");
    work = sqz_workload_decode(1, UINT64_MAX, 1);
    assert_refused(&shape, &bits, &work, NULL, "n_context_tokens is 1.8446744");
    work = sqz_workload_prefill(1, 0);
    assert_refused(&shape, &bits, &work, NULL, "n_query_tokens is 0");
    work = sqz_workload_decode(1, 10, 1);
    bits.kv = -4;
    assert_refused(&shape, &bits, &work, NULL, "KV bits is -4");
    bits.kv = 16;
    shape.n_head_kv = 3;
    assert_refused(&shape, &bits, &work, NULL, "n_head_kv is 3: allowed is 1 to 2");
    shape.n_head = 4;
    assert_refused(&shape, &bits, &work, NULL, "allowed are divisors of the 4 query heads");
    shape = tiny;
    shape.n_expert = 8;
    assert_refused(&shape, &bits, &work, NULL, "n_expert_used is 0: allowed is 1 to 8");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_prefill_by_hand),
        cmocka_unit_test(test_decode_by_hand),
        cmocka_unit_test(test_steps_add_up),
        cmocka_unit_test(test_window_by_counting),
        cmocka_unit_test(test_parameters),
        cmocka_unit_test(test_presets_are_valid),
        cmocka_unit_test(test_experts),
        cmocka_unit_test(test_bits),
        cmocka_unit_test(test_ridge_points_of_the_talk),
        cmocka_unit_test(test_time_is_the_larger),
        cmocka_unit_test(test_prefill_is_compute_bound),
        cmocka_unit_test(test_decode_is_memory_bound),
        cmocka_unit_test(test_batching_does_not_help_long_contexts),
        cmocka_unit_test(test_budgets_of_the_talk),
        cmocka_unit_test(test_squeezed_costs),
        cmocka_unit_test(test_codes),
        cmocka_unit_test(test_complexity),
        cmocka_unit_test(test_speculation),
        cmocka_unit_test(test_large_sizes),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests_name("roofline", tests, NULL, NULL);
}
