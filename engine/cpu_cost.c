/* cpu_cost.h. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "cpu_cost.h"

#include <math.h>
#include <stdlib.h>

#include "attention.h"
#include "clock.h"
#include "error.h"
#include "kernels.h"
#include "random.h"

double sqz_cpu_each_seconds(const struct sqz_cpu_cost *cost, const struct sqz_layer_shape *shape, size_t n_rows,
                            double share, int n_threads)
{
    return (cost->looked_up + share * cost->selected) * (double)n_rows * shape->n_head_kv / n_threads;
}

/* Jobs that threads take one after another. */
static double turns(const struct sqz_layer_shape *shape, size_t n_tokens, size_t block, int n_threads)
{
    const size_t n_jobs = (n_tokens + block - 1) / block * shape->n_head_kv;
    return ceil((double)n_jobs / n_threads);
}

double sqz_cpu_all_seconds(const struct sqz_cpu_cost *cost, const struct sqz_layer_shape *shape, size_t n_rows,
                           size_t n_tokens, int n_threads)
{
    const size_t block = sqz_attend_joint_block(shape, n_tokens);
    return turns(shape, n_tokens, block, n_threads) * (cost->passed + (double)block * cost->joint) * (double)n_rows;
}

/* ---- Measuring --------------------------------------------------------------------- */

/* Rows of as many heads as there are threads, so that all of them work at once. Tokens whose joint blocks are small and
 * large; budgets that select few rows and many. */
enum {
    N_ROWS = 2048,
    N_QUERIES = 16,
    MOST_HEADS = 8,
    N_EACH = 8,
    FEW = 4,
    MANY = 48,
    REPEATS = 9,
    NEIGHBOURS = 16,
    MOST_DIM = 256
};
static const float budgets[2] = {0.1f, 0.5f};

struct trial {
    struct sqz_layer *layer;
    int n_threads;
    float *queries, *out;
    void *workspace;
    size_t thread_bytes;
};

/* What attention on n tokens takes, each by itself at a budget, or all together. */
struct timing {
    size_t n;
    float budget;
    double seconds, share; /* the fastest; that was read */
};

static void time_once(const struct trial *t, struct timing *timing)
{
    const struct sqz_layer_shape *shape = &t->layer->shape;
    const size_t row = (size_t)shape->n_head * shape->head_dim, n = timing->n;
    const bool apart = timing->budget < 1;
    struct sqz_attend_call calls[N_EACH];
    struct sqz_joint_token joint[MANY] = {{0}};
    struct sqz_attention_stats stats = {0};
    for (size_t i = 0; i < n; i++) joint[i].at = i;
    for (size_t i = 0; i < (apart ? n : 1); i++)
        calls[i] = (struct sqz_attend_call){.layer = t->layer,
                                            .queries = t->queries + i * row,
                                            .out = t->out + i * row,
                                            .query_token_stride = row,
                                            .query_head_stride = shape->head_dim,
                                            .out_token_stride = row,
                                            .out_head_stride = shape->head_dim,
                                            .n_tokens = apart ? 1 : n,
                                            .joint = apart ? NULL : joint,
                                            .n_context_tokens = t->layer->n_rows,
                                            .budget = timing->budget,
                                            .block_tokens = 1,
                                            .stats = apart ? &stats : NULL};
    const double since = sqz_clock_seconds();
    sqz_attend_batch(&(struct sqz_attend_batch){calls, apart ? n : 1, t->n_threads, t->thread_bytes, t->workspace});
    timing->seconds = fmin(timing->seconds, sqz_clock_seconds() - since);
    timing->share = sqz_attention_stats_share(&stats);
}

/* In turns, so that who else runs on the machine counts for all the same. */
static void measure(struct sqz_cpu_cost *cost, const struct trial *t)
{
    struct timing timing[] = {{N_EACH, budgets[0], INFINITY, 0},
                              {N_EACH, budgets[1], INFINITY, 0},
                              {FEW, 1, INFINITY, 0},
                              {MANY, 1, INFINITY, 0}};
    double one[4];
    size_t block[4];
    for (int i = 0; i < REPEATS; i++)
        for (size_t j = 0; j < 4; j++) time_once(t, &timing[j]);
    for (size_t j = 0; j < 4; j++) { /* of one job, a row */
        block[j] = timing[j].budget < 1 ? 1 : sqz_attend_joint_block(&t->layer->shape, timing[j].n);
        one[j] = timing[j].seconds / turns(&t->layer->shape, timing[j].n, block[j], t->n_threads) / t->layer->n_rows;
    }
    cost->selected = fmax(one[1] - one[0], 0) / fmax(timing[1].share - timing[0].share, 0.01);
    cost->looked_up = fmax(one[0] - timing[0].share * cost->selected, 0);
    cost->joint =
        block[3] > block[2] ? fmax(one[3] - one[2], 0) / (double)(block[3] - block[2]) : one[2] / (double)block[2];
    cost->passed = fmax(one[2] - (double)block[2] * cost->joint, 0);
}

/* Numbers of variance 1. */
static float draw(struct sqz_random *random)
{
    float x = 0;
    for (int j = 0; j < 4; j++) x += (float)(sqz_random_next(random) >> 40) * 0x1p-24f - 0.5f;
    return 1.73f * x;
}

/* Neighbours are alike, as tokens of a passage are; a query looks for one of the passages. */
static void fill(const struct sqz_layer_shape *shape, uint16_t *rows, float *queries, size_t n_queries)
{
    struct sqz_random random;
    const size_t d = shape->head_dim, row = (size_t)shape->n_head * d;
    const size_t n_rows = 2 * (size_t)shape->n_head_kv * N_ROWS;
    float centre[MOST_DIM], values[MOST_DIM];
    sqz_random_seed(&random, 1);
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t i = 0; i < d; i++) {
            if (r % NEIGHBOURS == 0) centre[i] = draw(&random);
            values[i] = 0.8f * centre[i] + 0.6f * draw(&random);
            if (r / NEIGHBOURS < n_queries) queries[r / NEIGHBOURS * row + i] = centre[i];
        }
        sqz_kernels_get()->f32_to_f16(rows + r * d, values, d);
    }
    for (size_t t = 0; t < n_queries; t++)
        for (size_t i = 0; i < row; i++) queries[t * row + i] = queries[t * row + i % d] + 0.5f * draw(&random);
}

enum sqz_status sqz_cpu_cost_measure(struct sqz_cpu_cost *cost, const struct sqz_layer_shape *of_model, int n_threads,
                                     struct sqz_error *error)
{
    struct sqz_squeeze_options options;
    struct sqz_layer_shape shape = *of_model;
    struct trial t = {.n_threads = n_threads};
    const uint32_t group = shape.n_head / shape.n_head_kv,
                   threads = n_threads < MOST_HEADS ? (uint32_t)n_threads : MOST_HEADS;
    if (shape.n_head_kv > threads) shape.n_head_kv = threads;
    shape.n_head = group * shape.n_head_kv;
    const size_t n = (size_t)shape.n_head_kv * N_ROWS * shape.head_dim, row = (size_t)shape.n_head * shape.head_dim;
    uint16_t *rows = malloc(2 * n * sizeof *rows);
    enum sqz_status status = SQZ_OK;
    sqz_squeeze_options_default(&options, SQZ_RULE_DEFAULT);
    options.n_iterations = 1; /* how well rows are clustered is no matter here */
    t.queries = malloc(MANY * row * sizeof *t.queries);
    t.out = malloc(MANY * row * sizeof *t.out);
    if (!rows || !t.queries || !t.out) status = sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    if (status == SQZ_OK) {
        fill(&shape, rows, t.queries, MANY);
        status = sqz_layer_create(&t.layer, &shape, rows, rows + n, N_ROWS, t.queries, N_QUERIES, &options, n_threads,
                                  error);
    }
    if (status == SQZ_OK) {
        t.thread_bytes = sqz_attend_thread_bytes(t.layer, 1, 1);
        t.workspace = malloc(sqz_attend_batch_workspace_bytes(t.thread_bytes, N_EACH, n_threads));
        if (t.workspace) measure(cost, &t);
        else status = sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    }
    sqz_layer_free(t.layer);
    free(t.workspace);
    free(t.queries);
    free(t.out);
    free(rows);
    return status;
}
