/*
 * A card that is not there: the table of lib/cuda/calls.h in host memory, by plain
 * loops, so that everything of the engine but the kernels is tested on any machine.
 * Nothing can be captured here. Clusters are chosen at the finest level alone, codes
 * are not looked at. Layers are built by lib/ itself.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "build.h"
#include "cuda/calls.h"
#include "cuda/weights.h"
#include "ggml.h"

enum { MOST_DIMENSIONS = 256 };
static const size_t memory_bytes = (size_t)64 << 30;

/* As many as SQUEEZE_FAKE_CARDS says. */
static int count(void)
{
    const char *n = getenv("SQUEEZE_FAKE_CARDS");
    return n ? atoi(n) : 1;
}

static bool card(int device, struct sqz_gpu_card *out)
{
    if (device >= count()) return false;
    *out = (struct sqz_gpu_card){.name = "made of host memory",
                                 .capability = 90,
                                 .n_multiprocessors = 1,
                                 .memory_bytes = memory_bytes,
                                 .free_bytes = memory_bytes,
                                 .supported = true};
    return true;
}

static bool use(int device)
{
    return device >= 0 && device < count();
}

/* From call number SQUEEZE_FAKE_LOSS on the card is gone. */
static bool lost(void)
{
    static _Atomic long n_calls;
    const char *loss = getenv("SQUEEZE_FAKE_LOSS");
    return loss && ++n_calls >= atol(loss);
}

static const char *complaint(void)
{
    return getenv("SQUEEZE_FAKE_LOSS") ? "the card is gone" : "nothing";
}

static bool copy(void *to, const void *from, size_t bytes, void *stream)
{
    (void)stream;
    memcpy(to, from, bytes);
    return !lost();
}

static bool copy_runs(void *to, size_t to_stride, const void *from, size_t from_stride, size_t bytes, size_t n,
                      void *stream)
{
    (void)stream;
    for (size_t i = 0; i < n; i++) memcpy((char *)to + i * to_stride, (const char *)from + i * from_stride, bytes);
    return !lost();
}

static bool clear(void *device, size_t bytes, void *stream)
{
    (void)stream;
    memset(device, 0, bytes);
    return true;
}

static void *create_stream(void)
{
    return lost() ? NULL : malloc(1);
}

static bool wait_for(void *stream)
{
    return stream != NULL && !lost();
}

static bool record(void *event, void *stream)
{
    return event && stream;
}

static bool follow(void *stream, void *event)
{
    return event && stream;
}

static bool begin_capture(void *stream)
{
    (void)stream;
    return false;
}

static void *end_capture(void *stream)
{
    (void)stream;
    return NULL;
}

static bool launch(void *captured, void *stream)
{
    (void)captured, (void)stream;
    return false;
}

/* ---- Attention ---------------------------------------------------------------------- */

/* A softmax over rows that come one after the other. */
struct sum {
    float most, total, out[MOST_DIMENSIONS];
};

static void f32_row(float *out, const void *f16, size_t row, size_t d)
{
    ggml_fp16_to_fp32_row((const ggml_fp16_t *)f16 + row * d, out, (int64_t)d);
}

/* Rows [first, first + n) as F32; the caller frees them. */
static float *f32_rows(const void *f16, size_t first, size_t n, size_t d)
{
    float *rows = malloc((n ? n : 1) * d * sizeof *rows);
    ggml_fp16_to_fp32_row((const ggml_fp16_t *)f16 + first * d, rows, (int64_t)(n * d));
    return rows;
}

static float dot(const float *a, const float *b, size_t d)
{
    float part[16] = {0}, sum = 0; /* head dimensions are multiples of 16 */
    for (size_t i = 0; i < d; i += 16)
        for (size_t j = 0; j < 16; j++) part[j] += a[i + j] * b[i + j];
    for (size_t j = 0; j < 16; j++) sum += part[j];
    return sum;
}

static void add_logit(struct sum *s, float y, const float *value, size_t d)
{
    if (y > s->most) {
        const float old = s->most == -INFINITY ? 0 : expf(s->most - y);
        s->total *= old;
        for (size_t i = 0; i < d; i++) s->out[i] *= old;
        s->most = y;
    }
    const float weight = expf(y - s->most);
    s->total += weight;
    for (size_t i = 0; i < d; i++) s->out[i] += weight * value[i];
}

static void add_row(struct sum *s, const float *query, const float *key, const float *value, size_t d, float scale)
{
    add_logit(s, scale * dot(query, key, d), value, d);
}

static void end_sum(float *out, const struct sum *s, size_t d)
{
    for (size_t i = 0; i < d; i++) out[i] = s->total > 0 ? s->out[i] / s->total : 0;
}

static void centroid_row(float *out, const struct sqz_layer *l, size_t head, size_t c)
{
    const struct sqz_level *level = &l->level[0];
    const size_t d = l->shape.head_dim, row = head * level->n_clusters + c;
    const struct sqz_rows *rows = &level->centroids;
    if (rows->type != SQZ_ROW_I8) {
        f32_row(out, rows->data, row, d);
        return;
    }
    for (size_t i = 0; i < d; i++)
        out[i] = rows->mean[head * d + i] + rows->scale[row] * ((const int8_t *)rows->data)[row * d + i];
}

/* Marks the rows of clusters whose mean score over the group reaches the threshold, and the fixed rows. */
static void choose(bool *chosen, const struct sqz_layer *l, size_t head, const float *queries, float log_threshold)
{
    const struct sqz_level *level = &l->level[0];
    const size_t d = l->shape.head_dim, group = l->shape.n_head / l->shape.n_head_kv, c_n = level->n_clusters;
    const uint32_t *offset = level->offset + head * (c_n + 1);
    double *score = calloc(c_n, sizeof *score), *y = malloc(c_n * sizeof *y);
    float centroid[MOST_DIMENSIONS];
    for (size_t g = 0; g < group; g++) {
        double z = 0;
        for (size_t c = 0; c < c_n; c++) {
            centroid_row(centroid, l, head, c);
            y[c] = exp((double)(l->shape.scale * dot(queries + g * d, centroid, d)));
            z += (offset[c + 1] - offset[c]) * y[c];
        }
        for (size_t c = 0; c < c_n; c++) score[c] += y[c] / z / (double)group;
    }
    for (size_t r = 0; r < l->n_rows; r++) chosen[r] = r < l->n_fixed;
    for (size_t c = 0; c < c_n; c++)
        for (uint32_t r = offset[c]; r < offset[c + 1] && score[c] >= exp((double)log_threshold); r++)
            chosen[l->n_fixed + r] = true;
    free(score);
    free(y);
}

/* What pruned clusters would have added, by their centroids. */
static void add_tail(struct sum *sum, const struct sqz_layer *l, size_t head, const float *query, const bool *chosen,
                     float gain)
{
    const struct sqz_level *level = &l->level[0];
    const size_t d = l->shape.head_dim, c_n = level->n_clusters;
    const uint32_t *offset = level->offset + head * (c_n + 1);
    const float factor = sqz_spread_factor(1, l->shape.scale, (uint32_t)d, dot(query, query, d));
    float row[MOST_DIMENSIONS], *x = malloc(c_n * sizeof *x);
    double z = 0;
    for (size_t c = 0; c < c_n; c++) {
        centroid_row(row, l, head, c);
        x[c] = l->shape.scale * dot(query, row, d);
        z += (offset[c + 1] - offset[c]) * exp((double)x[c]);
    }
    for (size_t c = 0; c < c_n; c++) {
        if (chosen[l->n_fixed + offset[c]]) continue;
        const float y = sqz_tail_logit(x[c], factor, level->variance[head * c_n + c], gain);
        f32_row(row, level->value_centroids.data, head * c_n + c, d);
        add_logit(sum, sqz_tail_bound(y, (float)log(z)) + logf((float)(offset[c + 1] - offset[c])), row, d);
    }
    free(x);
}

static bool has_kernel(uint32_t head_dim)
{
    return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

/* Also where SQUEEZE_FAKE_OBSTACLE is set, which says what. */
static const char *obstacle(const struct sqz_cuda_attend_args *a)
{
    if (!has_kernel(a->layer->shape.head_dim)) return "its head dimension is not one of the kernels'";
    if (a->layer->keys.type != SQZ_ROW_F16 || a->layer->values.type != SQZ_ROW_F16) return "its rows are not F16";
    return getenv("SQUEEZE_FAKE_OBSTACLE");
}

/* Most with a tail, and then more than building and counting. */
static size_t workspace_bytes(const struct sqz_cuda_attend_args *a)
{
    const bool tail = !a->dense && a->layer->n_levels && a->plan.tail_gain;
    return (size_t)a->n_sequences * a->n_tokens * (tail ? 1 << 20 : 1);
}

/* Where the rows of token t of sequence b are, and how many it sees. */
static struct sqz_cuda_user user_of(const struct sqz_cuda_attend_args *a, size_t b, size_t t)
{
    const size_t each = (size_t)a->layer->shape.n_head_kv * a->user_capacity_rows * a->layer->shape.head_dim * 2;
    if (a->users) return a->users[b];
    return (struct sqz_cuda_user){(const char *)a->user_keys + b * each, (const char *)a->user_values + b * each,
                                  a->user_capacity_rows, a->n_user ? a->n_user - a->n_tokens + (uint32_t)t + 1 : 0, 0};
}

/* The first row that token t of sequence b sees, counted over the context's rows and then its own. */
static int64_t first_row(const struct sqz_cuda_attend_args *a, size_t b, size_t t)
{
    if (!a->dense && a->layer->n_levels) return 0;
    if (a->users) return a->users[b].first_row;
    return a->windowed && a->first_row + (int64_t)t > 0 ? a->first_row + (int64_t)t : 0;
}

/* tail_gain: NULL: there is no tail. */
static void attend_head(const struct sqz_cuda_attend_args *a, size_t b, size_t head, const bool *chosen,
                        const float *tail_gain)
{
    const struct sqz_layer_shape *s = &a->layer->shape;
    const size_t d = s->head_dim, group = s->n_head / s->n_head_kv, n = a->layer->n_rows;
    float *keys = f32_rows(a->layer->keys.data, head * n, n, d),
          *values = f32_rows(a->layer->values.data, head * n, n, d);
    const struct sqz_cuda_user last = user_of(a, b, a->n_tokens - 1u);
    const size_t first = head * last.capacity_rows;
    float *own_keys = f32_rows(last.keys, first, last.n_rows, d),
          *own_values = f32_rows(last.values, first, last.n_rows, d);
    for (size_t i = 0; i < a->n_tokens * group; i++) {
        const size_t t = i / group, at = (b * a->n_tokens + t) * s->n_head + head * group + i % group;
        struct sum sum = {.most = -INFINITY};
        float query[MOST_DIMENSIONS], out[MOST_DIMENSIONS];
        f32_row(query, a->queries, at, d);
        const size_t seen = (size_t)first_row(a, b, t);
        for (size_t r = seen; r < n; r++)
            if (chosen[r]) add_row(&sum, query, keys + r * d, values + r * d, d, s->scale);
        if (tail_gain) add_tail(&sum, a->layer, head, query, chosen, *tail_gain);
        for (size_t r = seen > n ? seen - n : 0; r < user_of(a, b, t).n_rows; r++)
            add_row(&sum, query, own_keys + r * d, own_values + r * d, d, s->scale);
        end_sum(out, &sum, d);
        ggml_fp32_to_fp16_row(out, (ggml_fp16_t *)a->out + at * d, (int64_t)d);
    }
    free(keys);
    free(values);
    free(own_keys);
    free(own_values);
}

static uint32_t groups_of(const bool *chosen, size_t n)
{
    uint32_t groups = 0;
    for (size_t r = 0; r < n; r += 8) groups += chosen[r];
    return groups;
}

/* NULL: there is no tail. */
static const float *tail_gain(const struct sqz_cuda_attend_args *a, size_t b, size_t head)
{
    const size_t plan = a->plan.per_sequence ? b * a->layer->shape.n_head_kv + head : head;
    const bool has_tail = !a->dense && a->plan.tail_gain && !sqz_tail_is_off(a->plan.tail_gain[plan]);
    return has_tail ? &a->plan.tail_gain[plan] : NULL;
}

static enum sqz_status attend(const struct sqz_cuda_attend_args *a, void *stream)
{
    const struct sqz_layer_shape *s = &a->layer->shape;
    const size_t d = s->head_dim, group = s->n_head / s->n_head_kv, n = a->layer->n_rows;
    bool *chosen = malloc(a->n_sequences * n); /* [B][N] */
    float *queries = malloc(group * d * sizeof *queries);
    if (!stream || a->workspace_bytes < workspace_bytes(a)) return SQZ_ERROR_ARGUMENT;
    if (lost()) return SQZ_ERROR_INTERNAL;
    for (size_t head = 0; head < s->n_head_kv; head++) {
        memset(chosen, true, a->n_sequences * n);
        for (size_t b = 0; b < a->n_sequences; b++) {
            const size_t plan = a->plan.per_sequence ? b * s->n_head_kv + head : head;
            for (size_t g = 0; g < group; g++)
                f32_row(queries + g * d, a->queries, b * a->n_tokens * s->n_head + head * group + g, d);
            if (!a->dense) choose(chosen + b * n, a->layer, head, queries, a->plan.log_threshold[plan]);
            if (a->n_retained && !a->together) a->n_retained[b * s->n_head_kv + head] = groups_of(chosen + b * n, n);
        }
        for (size_t b = 1; b < a->n_sequences && a->together; b++)
            for (size_t r = 0; r < n; r++) chosen[r] |= chosen[b * n + r];
        if (a->n_retained && a->together) a->n_retained[head] = groups_of(chosen, n);
        for (size_t b = 0; b < a->n_sequences; b++)
            attend_head(a, b, head, chosen + (a->together ? 0 : b * n), tail_gain(a, b, head));
    }
    free(chosen);
    free(queries);
    return SQZ_OK;
}

/* A row of d numbers and zeros behind it. */
static void put_row(uint16_t *to, const uint16_t *from, size_t d, size_t padded)
{
    memcpy(to, from, d * sizeof *to);
    memset(to + d, 0, (padded - d) * sizeof *to);
}

static enum sqz_status take(const struct sqz_gpu_node *a, void *stream)
{
    const size_t d = a->head_dim, padded = a->padded_dim;
    if (!stream || padded < d) return SQZ_ERROR_ARGUMENT;
    if (lost()) return SQZ_ERROR_INTERNAL;
    for (size_t t = 0; t < a->n_tokens; t++) {
        struct sqz_cuda_user user = {a->own_keys, a->own_values, (uint32_t)a->capacity_rows,
                                     (uint32_t)(a->first_row + t + 1), 0};
        if (a->users) user = a->users[t];
        for (size_t h = 0; h < a->n_head && a->queries_f16; h++) {
            uint16_t row[MOST_DIMENSIONS];
            ggml_fp32_to_fp16_row(a->queries + t * a->query_token_stride + h * a->query_head_stride, row, (int64_t)d);
            put_row((uint16_t *)a->queries_f16 + (t * a->n_head + h) * padded, row, d, padded);
        }
        for (size_t h = 0; h < a->n_head_kv; h++) {
            const size_t to = (h * user.capacity_rows + user.n_rows - 1) * padded;
            put_row((uint16_t *)(uintptr_t)user.keys + to,
                    (const uint16_t *)a->keys + t * a->key_token_stride + h * a->key_head_stride, d, padded);
            put_row((uint16_t *)(uintptr_t)user.values + to,
                    (const uint16_t *)a->values + t * a->value_token_stride + h * a->value_head_stride, d, padded);
        }
    }
    return SQZ_OK;
}

static enum sqz_status give(float *out, const void *f16, size_t n_rows, uint32_t head_dim, uint32_t padded_dim,
                            void *stream)
{
    for (size_t i = 0; i < n_rows; i++)
        ggml_fp16_to_fp32_row((const ggml_fp16_t *)f16 + i * padded_dim, out + i * head_dim, head_dim);
    if (lost()) return SQZ_ERROR_INTERNAL;
    return stream ? SQZ_OK : SQZ_ERROR_ARGUMENT;
}

static size_t causal_workspace_bytes(const struct sqz_gpu_causal *a)
{
    return has_kernel(a->shape.head_dim) && !getenv("SQUEEZE_FAKE_OBSTACLE") ? 1 : 0;
}

static enum sqz_status attend_node(const struct sqz_cuda_attend_args *a, const struct sqz_gpu_node *node, float *out,
                                   void *stream)
{
    enum sqz_status status = take(node, stream);
    if (status == SQZ_OK) status = attend(a, stream);
    if (status != SQZ_OK) return status;
    return give(out, a->out, (size_t)node->n_tokens * node->n_head, node->head_dim, node->padded_dim, stream);
}

static void causal_head(const struct sqz_gpu_causal *a, size_t head)
{
    const struct sqz_layer_shape *s = &a->shape;
    const size_t d = s->head_dim, group = s->n_head / s->n_head_kv, first = head * a->capacity_rows;
    float *keys = f32_rows(a->keys, first, a->n_rows, d), *values = f32_rows(a->values, first, a->n_rows, d);
    for (size_t i = 0; i < a->n_tokens * group; i++) {
        const size_t t = i / group, at = t * s->n_head + head * group + i % group;
        struct sum sum = {.most = -INFINITY};
        float query[MOST_DIMENSIONS];
        f32_row(query, a->queries, at, d);
        const size_t end = a->n_rows - a->n_tokens + t + 1;
        for (size_t r = a->window_tokens && end > a->window_tokens ? end - a->window_tokens : 0; r < end; r++)
            add_row(&sum, query, keys + r * d, values + r * d, d, s->scale);
        end_sum(a->out + at * d, &sum, d);
    }
    free(keys);
    free(values);
}

static enum sqz_status causal(const struct sqz_gpu_causal *a, void *stream)
{
    for (size_t h = 0; h < a->shape.n_head_kv; h++) causal_head(a, h);
    if (lost()) return SQZ_ERROR_INTERNAL;
    return stream ? SQZ_OK : SQZ_ERROR_ARGUMENT;
}

/* ---- Building ------------------------------------------------------------------------ */

static size_t build_workspace_bytes(const struct sqz_gpu_build *a)
{
    return a->layer->n_levels == 1 && a->layer->keys.type == SQZ_ROW_F16 && a->options->metric == SQZ_METRIC_EUCLIDEAN;
}

static enum sqz_status build(const struct sqz_gpu_build *a, void *stream)
{
    struct sqz_layer layer = *a->layer;
    struct sqz_squeeze_options options = *a->options;
    const size_t bytes = (size_t)layer.n_queries * layer.shape.n_head * layer.shape.head_dim * sizeof(uint16_t);
    uint16_t *queries = malloc(bytes);
    if (!stream || !queries) return SQZ_ERROR_ARGUMENT;
    layer.space = SQZ_SPACE_HOST;
    options.seed = a->seed;
    memcpy(queries, layer.queries, bytes);
    const struct sqz_layer_input input = {.shape = layer.shape,
                                          .keys = (uint16_t *)(uintptr_t)layer.keys.data,
                                          .values = (uint16_t *)(uintptr_t)layer.values.data,
                                          .n_rows = layer.n_rows,
                                          .queries = queries,
                                          .n_queries = layer.n_queries};
    const enum sqz_status status = sqz_layers_cluster(&layer, &input, 1, &options, 1, NULL, NULL, NULL);
    free(queries);
    return status;
}

static size_t count_workspace_bytes(const struct sqz_gpu_count *a)
{
    return sqz_calibrate_workspace_bytes(a->layer);
}

static enum sqz_status count_layer(const struct sqz_gpu_count *a, void *stream)
{
    struct sqz_layer layer = *a->layer;
    layer.space = SQZ_SPACE_HOST;
    if (!stream || a->workspace_bytes < count_workspace_bytes(a)) return SQZ_ERROR_ARGUMENT;
    for (uint32_t h = 0; h < layer.shape.n_head_kv; h++) {
        const float gain = a->fit_variance ? sqz_choose_variance_gain(&layer, h, a->workspace) : 0;
        ((float *)(uintptr_t)layer.variance_gain)[h] = gain;
        sqz_count_head(&layer, h, gain, &a->sums[h], a->workspace);
    }
    return SQZ_OK;
}

/* ---- Products ------------------------------------------------------------------------- */

static void *create_multiplier(void)
{
    return getenv("SQUEEZE_FAKE_OBSTACLE") ? NULL : malloc(1);
}

/* The small ones: plain loops take their time. */
static size_t product_workspace_bytes(const struct sqz_gpu_product *a)
{
    const struct sqz_weights_block block = sqz_weights_block_of(a->type);
    const double n = (double)a->n_tokens * a->n_in * a->n_out;
    return block.n && a->n_in % block.n == 0 && a->n_tokens >= 64 && n < 3e8 ? a->n_in * sizeof(float) : 0;
}

static enum sqz_status product(void *multiplier, const struct sqz_gpu_product *a, void *stream)
{
    float *row = a->workspace;
    if (!multiplier || !stream || a->workspace_bytes < product_workspace_bytes(a)) return SQZ_ERROR_ARGUMENT;
    for (size_t o = 0; o < a->n_out; o++) {
        for (size_t i = 0; i < a->n_in / 8; i++)
            sqz_weights_eight(a->type, a->weights, o * a->n_in / 8 + i, row + 8 * i);
        for (size_t t = 0; t < a->n_tokens; t++) {
            const float *in = a->in + t * a->n_in;
            double sum = 0;
            for (size_t i = 0; i < a->n_in; i++) sum += (double)row[i] * (double)in[i];
            a->out[t * a->n_out + o] = (float)sum;
        }
    }
    return lost() ? SQZ_ERROR_INTERNAL : SQZ_OK;
}

/* To the nearest, ties to even; weights are finite. */
static uint16_t bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static enum sqz_status widen(int type, const void *weights, size_t n, void *out, void *stream)
{
    const struct sqz_weights_block block = sqz_weights_block_of(type);
    uint16_t *to = out;
    if (block.n == 0) return SQZ_ERROR_UNSUPPORTED;
    if (!stream || n % block.n) return SQZ_ERROR_ARGUMENT;
    for (size_t i = 0; i < n / 8; i++) {
        float x[8];
        sqz_weights_eight(type, weights, i, x);
        for (size_t j = 0; j < 8; j++) to[8 * i + j] = bf16_of(x[j]);
    }
    return lost() ? SQZ_ERROR_INTERNAL : SQZ_OK;
}

static const struct sqz_gpu_calls table = {
    .size = sizeof(struct sqz_gpu_calls),
    .version = SQZ_GPU_VERSION,
    .count = count,
    .card = card,
    .use = use,
    .complaint = complaint,
    .allocate = malloc,
    .release = free,
    .allocate_pinned = malloc,
    .release_pinned = free,
    .put = copy,
    .get = copy,
    .copy_runs = copy_runs,
    .clear = clear,
    .create_stream = create_stream,
    .free_stream = free,
    .wait = wait_for,
    .create_event = create_stream,
    .free_event = free,
    .record = record,
    .follow = follow,
    .begin_capture = begin_capture,
    .end_capture = end_capture,
    .launch = launch,
    .free_captured = free,
    .obstacle = obstacle,
    .workspace_bytes = workspace_bytes,
    .attend = attend,
    .take = take,
    .give = give,
    .attend_node = attend_node,
    .create_multiplier = create_multiplier,
    .free_multiplier = free,
    .product_workspace_bytes = product_workspace_bytes,
    .product = product,
    .widen = widen,
    .causal_workspace_bytes = causal_workspace_bytes,
    .causal = causal,
    .build_workspace_bytes = build_workspace_bytes,
    .build = build,
    .count_workspace_bytes = count_workspace_bytes,
    .count_layer = count_layer,
};

const struct sqz_gpu_calls *sqz_gpu_calls(void)
{
    return &table;
}
