/* A token over several ranks; ranks_step.h. */
#include "ranks_step.h"

#include <math.h>

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

/* ---- Messages ------------------------------------------------------------------------------- */

static double message(const struct ranks_link *link, double bytes)
{
    return link->latency + bytes * link->byte;
}

struct messages {
    double queries, totals, outputs, bytes; /* seconds of a layer; bytes that a rank sends, at most */
};

/* Bytes of a token's denominators, queries and partial outputs with their LSE; console/ranks_comm.h has the heads. */
struct sizes {
    double totals, queries, outputs;
};

static struct sizes sizes_of(const struct sqz_model_shape *s)
{
    const double h = s->n_head, d = s->head_dim;
    return (struct sizes){4 * h, 4 * h * d + 64, 4 * h * (d + 1) + 72};
}

/* Rank 0 sends to ranks 1 and 2, rank r to r + 2; what comes back to it comes one behind another. */
static struct messages led(const struct ranks_machine *m, const struct sqz_model_shape *shape, uint32_t n)
{
    const struct sizes of = sizes_of(shape);
    const struct ranks_link *link = n > m->host_ranks ? &m->between : &m->inside;
    const double hops = ceil((n - 1) / 2.0), others = n - 1, twice = n > 2;
    const double first = (1 + twice) * (of.queries + of.totals), next = of.queries + of.totals + of.outputs + of.totals;
    return (struct messages){
        .queries = hops * message(link, of.queries) + twice * of.queries * link->byte,
        .totals = message(link, others * of.totals) + hops * message(link, of.totals),
        .outputs = message(link, others * of.outputs),
        .bytes = fmax(first, n > 3 ? next : of.totals + of.outputs),
    };
}

static struct messages among_peers(const struct ranks_machine *m, const struct sqz_model_shape *shape, uint32_t n)
{
    const double totals = 4.0 * shape->n_head, outputs = 4.0 * shape->n_head * (shape->head_dim + 1);
    const double near = fmin(n, m->host_ranks), hosts = ceil(n / near), rounds = ceil(log2(hosts));
    struct messages sum = {0};
    if (near > 1) { /* beside each number its turn, by which the peer sees that it has come */
        sum.totals += message(&m->inside, (near - 1) * 2 * totals);
        sum.outputs += message(&m->inside, (near - 1) * 2 * outputs);
    }
    sum.totals += rounds * message(&m->between, totals);
    sum.outputs += rounds * message(&m->between, outputs);
    sum.bytes = (2 * (near - 1) + rounds) * (totals + outputs);
    return sum;
}

static struct messages by_links(const struct ranks_machine *m, const struct sqz_model_shape *shape, uint32_t n)
{
    return m->way == RANKS_LED ? led(m, shape, n) : among_peers(m, shape, n);
}

static double seconds_of(const struct messages *m)
{
    return m->queries + m->totals + m->outputs;
}

void ranks_change_links(struct ranks_machine *m, const struct sqz_model_shape *shape, const struct ranks_link *inside,
                        const struct ranks_link *between)
{
    const bool tried = m->tried_ranks > 1;
    const struct messages before = tried ? by_links(m, shape, m->tried_ranks) : (struct messages){0};
    m->inside = *inside;
    m->between = *between;
    if (!tried) return;
    const struct messages now = by_links(m, shape, m->tried_ranks);
    m->tried_layer = fmax(0, m->tried_layer - seconds_of(&before)) + seconds_of(&now);
}

static struct messages messages_of(const struct ranks_machine *m, const struct sqz_model_shape *shape, uint32_t n)
{
    if (n < 2) return (struct messages){0};
    struct messages sum = by_links(m, shape, n);
    if (m->tried_ranks > 1) {
        const struct messages tried = by_links(m, shape, m->tried_ranks);
        const double scale = m->tried_layer / seconds_of(&tried);
        sum.queries *= scale;
        sum.totals *= scale;
        sum.outputs *= scale;
    }
    return sum;
}

/* ---- A token ---------------------------------------------------------------------------------- */

/* Of a shard: keys and values of F16, centroids of both and codes. */
static double bytes_of_keys(const struct ranks_context *c, const struct sqz_model_shape *s, double n_keys)
{
    const double head = (double)s->n_layer * s->n_head_kv * n_keys, d = s->head_dim;
    double bytes = head * (4 * d + 4.0 * c->lookup.code_words);
    for (uint32_t l = 0; l < c->lookup.n_levels; l++)
        bytes += head * c->lookup.centroid_share[l] * d * (c->lookup.centroid_bits / 8 + (l == 0 ? 2 : 0));
    return bytes;
}

/* Of rank 0. */
static double window_bytes(const struct ranks_context *c)
{
    const struct sqz_model_shape *s = c->shape;
    const double rows = fmin(c->n_keys, s->n_window_tokens);
    return (double)s->n_window_layer * s->n_head_kv * rows * 4 * s->head_dim;
}

struct ranks_step ranks_step(const struct ranks_machine *m, const struct ranks_context *c, uint32_t n)
{
    /* Layers with a window are rank 0's alone: no message, and no more rows than the window's. */
    struct sqz_model_shape shared = *c->shape, windows = *c->shape;
    shared.n_layer -= c->shape->n_window_layer;
    shared.n_window_layer = 0;
    windows.n_layer = c->shape->n_window_layer;
    const double shards = fmax(c->n_shards, n), held = ceil(shards / n), n_keys = c->n_keys / shards;
    const double near = fmin(n, m->host_ranks), crowd = m->cores > 0 ? fmax(1, near * m->threads / m->cores) : 1;
    const struct attention_work work = expected_work(&shared, &c->lookup, n_keys);
    const struct attention_work window_work = expected_work(&windows, &c->lookup, c->n_keys);
    const struct predicted one = predict(&work, &m->rates, 0), window = predict(&window_work, &m->rates, 0);
    const struct messages sent = messages_of(m, c->shape, n);
    const double layers = shared.n_layer, few_choose = m->rates.layer - m->rates.layer_beyond;
    const double few_all = m->rates.dense_layer - m->rates.dense_beyond;
    struct ranks_step s = {
        .model = m->rest,
        /* predict() leaves out what a layer of few rows takes, which is in `rest` once. */
        .lookup = crowd * (held * (one.lookup + one.codes) + (held - 1) * work.lookup_layers * few_choose),
        .rows = crowd * (held * one.rows + (held - 1) * work.dense_layers * few_all) + window.rows,
        .queries = layers * sent.queries,
        .totals = layers * sent.totals,
        .outputs = layers * sent.outputs,
        .layer_bytes = sent.bytes,
        .memory = held * bytes_of_keys(c, &shared, n_keys) + window_bytes(c) + c->weight_bytes,
    };
    s.seconds = s.model + s.lookup + s.rows + s.queries + s.totals + s.outputs;
    return s;
}

struct ranks_choice ranks_choose(const struct ranks_machine *m, const struct ranks_context *c, uint32_t most)
{
    struct ranks_choice choice = {0, 1, 0};
    double fastest = INFINITY, before = INFINITY;
    bool pays = true;
    for (uint32_t n = 1; n <= most; n *= 2) {
        const struct ranks_step s = ranks_step(m, c, n);
        if (m->memory > 0 && s.memory > m->memory) continue;
        if (!choice.fewest) choice.fewest = n;
        if (s.seconds < fastest) {
            fastest = s.seconds;
            choice.fastest = n;
        }
        pays = pays && s.seconds < 0.95 * before;
        if (pays) choice.worth = n;
        before = s.seconds;
    }
    return choice;
}

/* ---- H200 --------------------------------------------------------------------------------------- */

/* One GPU, one token, a layer of 32 query heads on 8 of 128 numbers, F16 rows, 20 keys a cluster: microseconds of attention,
 * the rows of 1 rank in bench/results/ranks-h200-x2.json. */
static const struct {
    double n_keys, budget, us;
} one_gpu[] = {
    {131072, 0.05, 41.24},  {131072, 0.125, 50.47},   {131072, 1, 138.1},
    {1048576, 0.05, 246.7}, {1048576, 0.125, 319.41}, {1048576, 1, 983.1},
};

static void fit_one_gpu(struct attention_rates *rates, const struct sqz_squeeze_options *squeeze)
{
    static const struct sqz_model_shape layer = {.n_layer = 1, .n_head = 32, .n_head_kv = 8, .head_dim = 128};
    struct timed_work timed[COUNT_OF(one_gpu)];
    for (size_t i = 0; i < COUNT_OF(one_gpu); i++) {
        const struct sqz_lookup_model lookup = context_lookup(&layer, squeeze, one_gpu[i].budget, 0);
        timed[i] = (struct timed_work){expected_work(&layer, &lookup, one_gpu[i].n_keys), 1e-6 * one_gpu[i].us};
    }
    *rates = fit_tokens(timed, COUNT_OF(one_gpu), 0);
}

void ranks_machine_h200(struct ranks_machine *machine, double weight_bytes, struct sqz_squeeze_options *squeeze)
{
    *machine = (struct ranks_machine){
        .way = RANKS_PEERS,
        /* Everything but attention of the 8B shape in Q4_0, 4.08 GB: bench/results/analyze-h200.json, the third context. */
        .rest = 2.799e-3 * weight_bytes / 4.077e9,
        .host_ranks = 8,
        /* Denominators and outputs by stores into a peer's memory: 5.0 us for both with their 33 KB (ranks-h200-x2.json);
         * NVLink's 18 links make 450 GB/s one way (NVIDIA's data sheet). */
        .inside = {2.463e-6, 1 / 450e9},
        /* Not measured here: an all-reduce of 8 to 128 bytes of two hosts by NCCL over HDR InfiniBand takes 19 us
         * (github.com/NVIDIA/nccl-tests, issue 150), NDR's 400 Gb/s give 47 GB/s (issue 290). */
        .between = {19e-6, 1 / 47e9},
        .memory = 141e9,
    };
    sqz_squeeze_options_default(squeeze, SQZ_RULE_DEFAULT);
    squeeze->n_levels = 1;
    squeeze->centroid_share[0] = 0.05f;
    squeeze->index = SQZ_INDEX_F16;
    squeeze->code_words = 0;
    fit_one_gpu(&machine->rates, squeeze);
}
