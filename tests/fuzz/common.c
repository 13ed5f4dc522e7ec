/* What the fuzz targets share; fuzz.h describes it. */
#define _GNU_SOURCE /* memfd_create */
#include "fuzz.h"
#include "attention.h"
#include "format.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

void fuzz_fail(const char *promise, const char *found)
{
    fprintf(stderr, "broken promise: %s: %s\n", promise, found);
    abort();
}

static void *take(size_t n, size_t bytes)
{
    void *block = calloc(n ? n : 1, bytes);
    if (!block) fuzz_fail("a target has memory", "calloc failed");
    return block;
}

/* ---- Numbers of an input ------------------------------------------------------- */

struct choices choices_of(const uint8_t *bytes, size_t n)
{
    struct choices choices = {bytes, n, 0, n};
    for (size_t i = 0; i < n; i++) choices.state = choices.state * 31 + bytes[i];
    return choices;
}

uint8_t choose_byte(struct choices *choices)
{
    return choices->at < choices->n ? choices->bytes[choices->at++] : 0;
}

uint32_t choose_below(struct choices *choices, uint32_t n)
{
    uint32_t value = choose_byte(choices);
    if (n > 256) value = value << 8 | choose_byte(choices);
    return value % n;
}

uint32_t random_u32(struct choices *choices)
{
    choices->state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    uint64_t z = choices->state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 16);
}

uint32_t random_below(struct choices *choices, uint32_t n)
{
    return random_u32(choices) % n;
}

/* ---- Files in memory --------------------------------------------------------------- */

static int file = -1;

void fuzz_file_resize(size_t n)
{
    if (ftruncate(file, (off_t)n)) fuzz_fail("a target has a file in memory", "ftruncate failed");
}

const char *fuzz_file(const uint8_t *bytes, size_t n)
{
    static char path[64];
    if (file < 0) {
        file = memfd_create("fuzz", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    if (file < 0 || ftruncate(file, 0) || (n && pwrite(file, bytes, n, 0) != (ssize_t)n))
        fuzz_fail("a target has a file in memory", path);
    return path;
}

/* ---- Arrays with exact ends ----------------------------------------------------------- */

void exact_begin(struct exact_arrays *exact, struct sqz_layer *layer)
{
    struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS];
    const size_t n = sqz_layer_tensors(specs, layer, 0);
    exact->layer = layer;
    exact->old = *layer;
    exact->n = 0;
    for (size_t i = 0; i < n; i++) {
        const void *array = sqz_slot_get(layer, specs[i].slot);
        void *copy = NULL;
        if (!array) continue;
        if (posix_memalign(&copy, SQZ_FORMAT_ALIGNMENT, specs[i].bytes))
            fuzz_fail("a target has memory", "posix_memalign failed");
        memcpy(copy, array, specs[i].bytes);
        sqz_slot_set(layer, specs[i].slot, copy);
        exact->copies[exact->n++] = copy;
    }
}

void exact_end(struct exact_arrays *exact)
{
    *exact->layer = exact->old;
    while (exact->n) free(exact->copies[--exact->n]);
}

/* ---- Attention -------------------------------------------------------------------------- */

enum { USER_ROWS = 70, BLOCK_TOKENS = 64 };

/* Queries of the size that models have, far larger ones, zeros, and ones that are no numbers. */
static float *choose_queries(struct choices *choices, size_t n)
{
    static const float sizes[] = {1.0f, 1.0f, 100.0f, 0.0f, 1e-36f, 3e38f};
    float *queries = take(n, sizeof *queries);
    const uint8_t how = choose_byte(choices);
    const float size = sizes[how % 6];
    for (size_t i = 0; i < n; i++) queries[i] = size * ((float)random_below(choices, 2001) / 1000.0f - 1.0f);
    if (how >= 192 && n) queries[random_below(choices, (uint32_t)n)] = how & 1 ? NAN : INFINITY;
    return queries;
}

static void read_layer(const struct sqz_layer *layer)
{
    struct sqz_layer_info info;
    const float *threshold = NULL, *share = NULL, *lost = NULL;
    volatile double sum = 0;
    sqz_layer_get_info(layer, &info);
    for (uint32_t head = 0; head < info.shape.n_head_kv; head++) {
        for (uint32_t level = 0; level < info.n_levels; level++)
            for (uint32_t i = 0; i < info.n_clusters[level]; i++)
                sum += (double)sqz_layer_cluster_rows(layer, head, level, i);
        const size_t n = sqz_layer_curve(layer, head, &threshold, &share, &lost);
        for (size_t i = 0; i < n; i++) sum += (double)(threshold[i] + share[i] + lost[i]);
    }
    (void)sum;
}

/* As a session calls it: rows of the user's own, a correction of the threshold, keys that are not in memory. */
static void attend_as_session(const struct sqz_layer *layer, size_t n_context_tokens, const float *queries,
                              size_t n_tokens, float budget, float *out, float *lse, struct choices *choices)
{
    const uint8_t how = choose_byte(choices);
    const size_t d = layer->shape.head_dim, stride = layer->shape.n_head * d;
    const size_t bytes = sqz_attend_workspace_bytes(layer, USER_ROWS, BLOCK_TOKENS, 1);
    const size_t n_rows = (size_t)layer->shape.n_head_kv * USER_ROWS * d;
    uint16_t *keys = take(n_rows, sizeof *keys), *values = take(n_rows, sizeof *values);
    void *workspace = malloc(bytes);
    struct sqz_attention_stats stats = {0};
    for (size_t i = 0; i < n_rows; i += 1 + random_below(choices, 97))
        keys[i] = values[i] = (uint16_t)(random_u32(choices) & 0xbbff);
    const struct sqz_attend_call call = {
        .layer = layer,
        .queries = queries,
        .out = out,
        .lse = lse,
        .query_token_stride = stride,
        .query_head_stride = d,
        .out_token_stride = stride,
        .out_head_stride = d,
        .n_tokens = n_tokens,
        .user_keys = keys,
        .user_values = values,
        .user_capacity_rows = USER_ROWS,
        .n_user = n_tokens + (how & 1 ? 3 : 0),
        .n_context_tokens = n_context_tokens,
        .budget = budget,
        .log_offset = (float)((how >> 1) % 5) * 6.0f - 12.0f,
        .block_tokens = how & 128 ? BLOCK_TOKENS : 1,
        .n_threads = 1,
        .stats = &stats,
        .workspace = workspace,
    };
    if (!workspace) fuzz_fail("a target has memory", "the workspace of attention");
    sqz_attend(&call);
    free(workspace);
    free(keys);
    free(values);
}

/* What is announced is the layer's: sanitizers see to it. */
static void read_announced(const void *begin, size_t bytes)
{
    volatile uint8_t sum = 0;
    for (size_t i = 0; i < bytes; i++) sum ^= ((const uint8_t *)begin)[i];
}

void fuzz_attend(const struct sqz_layer *original, size_t n_context_tokens, struct choices *choices)
{
    static const float budgets[] = {1e-6f, 0.02f, 0.1f, 0.5f, 0.999f, 1.0f};
    static const size_t counts[] = {1, 1, 2, 5, 66};
    const float budget = budgets[choose_below(choices, 6)];
    const uint8_t how = choose_byte(choices);
    size_t n_tokens = counts[how % 5];
    const double step = (double)original->shape.n_head * original->shape.head_dim * original->n_rows;
    const double most = 6e5; /* products: a millisecond with sanitizers */
    if (step * (double)n_tokens > most) n_tokens = 1;
    if (step > most) return;

    struct sqz_layer layer = *original;
    struct exact_arrays exact;
    struct sqz_attention_stats stats = {0};
    struct sqz_error error;
    const size_t n = n_tokens * layer.shape.n_head * layer.shape.head_dim;
    float *queries = choose_queries(choices, n), *out = take(n, sizeof *out);
    float *lse = take(n_tokens * layer.shape.n_head, sizeof *lse);
    exact_begin(&exact, &layer);
    read_layer(&layer);
    if (how & 128) layer.will_read = read_announced;
    if (how & 64) attend_as_session(&layer, n_context_tokens, queries, n_tokens, budget, out, lse, choices);
    else if (sqz_layer_attend(&layer, queries, n_tokens, budget, out, how & 32 ? lse : NULL, 1, &stats, &error))
        fuzz_fail("a checked layer can be attended to", error.message);
    if (!(sqz_attention_stats_share(&stats) >= 0)) fuzz_fail("the share that was read is a number", "it is not");
    exact_end(&exact);
    free(queries);
    free(out);
    free(lse);
}
