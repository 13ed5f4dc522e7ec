/* Layers made on the card of rows that were read there; card.h, backend.h. */
#include "card.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "kernels.h"
#include "layer.h"
#include "plan.h"
#include "rows.h"

enum sqz_status sqz_card_building_failed(const struct sqz_card *cuda, const char *what, struct sqz_error *error)
{
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "%s on the card failed: %s", what, cuda->calls->complaint());
}

static void forget_fetched(struct sqz_card *cuda, struct sqz_card_fetched *f)
{
    if (f->stream) cuda->calls->wait(f->stream), cuda->calls->free_stream(f->stream);
    if (f->memory) cuda->calls->release_pinned(f->memory);
    *f = (struct sqz_card_fetched){.index = UINT32_MAX};
}

void sqz_card_forget_built(struct sqz_card *cuda, struct sqz_card_built *b)
{
    sqz_card_give(cuda, b->memory, b->bytes);
    free(b->value_mean);
    memset(b, 0, sizeof *b);
}

void sqz_card_end_building(struct sqz_card *cuda)
{
    for (size_t i = 0; i < 2; i++) forget_fetched(cuda, &cuda->fetched[i]);
    forget_fetched(cuda, &cuda->index);
    for (uint32_t l = 0; cuda->built && l < cuda->n_reading; l++) sqz_card_forget_built(cuda, &cuda->built[l]);
    free(cuda->built);
    cuda->built = NULL;
}

/* ---- Building ------------------------------------------------------------------------------ */

/* The trial's call: each of a sample of the queries as a sequence of its own, behind which nothing stands. */
static struct sqz_cuda_attend_args trial_of(const struct sqz_layer *layer)
{
    return (struct sqz_cuda_attend_args){
        .layer = layer,
        .n_sequences = layer->n_queries < SQZ_TRIAL_TOKENS ? layer->n_queries : SQZ_TRIAL_TOKENS,
        .n_tokens = 1,
    };
}

/* What the trial's largest call needs; 0: there is no kernel. */
static size_t trial_bytes(const struct sqz_card *cuda, const struct sqz_layer *layer)
{
    struct sqz_cuda_attend_args trial = trial_of(layer);
    if (cuda->calls->obstacle(&trial)) return 0;
    const size_t without = cuda->calls->workspace_bytes(&trial);
    trial.plan.tail_gain = layer->variance_gain; /* sizes follow from whether there is one */
    const size_t with = cuda->calls->workspace_bytes(&trial);
    trial.dense = true;
    const size_t exact = cuda->calls->workspace_bytes(&trial), most = with > without ? with : without;
    return exact > most ? exact : most;
}

/* Room for all that a layer's building needs beside its rows; false: there is none, or no kernel. */
static bool make_room(struct sqz_card *cuda, struct sqz_card_built *b, const struct sqz_squeeze_options *options)
{
    const struct sqz_gpu_build build = {.layer = &b->layer, .options = options};
    const struct sqz_gpu_count count = {.layer = &b->layer};
    const size_t bytes[] = {cuda->calls->build_workspace_bytes(&build), cuda->calls->count_workspace_bytes(&count),
                            trial_bytes(cuda, &b->layer)};
    size_t most = 0;
    for (size_t i = 0; i < 3; i++) {
        if (bytes[i] == 0) return false;
        most = bytes[i] > most ? bytes[i] : most;
    }
    return sqz_card_grow(cuda, &cuda->workspace, &cuda->workspace_room, most);
}

/* Whose keys are INT8 in the file, or whose rows are in planes: they are F16 on the card, and rounded on their way to it. */
static struct sqz_layer with_f16_rows(const struct sqz_layer *layer)
{
    struct sqz_layer copy = *layer;
    if (copy.keys.type != SQZ_ROW_F16) copy.keys = (struct sqz_rows){.type = SQZ_ROW_F16};
    if (copy.values.type != SQZ_ROW_F16) copy.values = (struct sqz_rows){.type = SQZ_ROW_F16};
    for (uint32_t l = 0; l < copy.n_levels; l++) {
        struct sqz_rows *centroids = &copy.level[l].value_centroids;
        if (centroids->type != SQZ_ROW_NONE) *centroids = (struct sqz_rows){.type = SQZ_ROW_F16};
    }
    return copy;
}

/* INT8 keys are relative to a mean, which comes with INT8 centroids. */
static bool keys_fit(const struct sqz_layer *layer)
{
    return layer->keys.type == SQZ_ROW_F16 || sqz_row_is_planes(layer->keys.type) ||
           (layer->keys.type == SQZ_ROW_I8 && layer->level[0].centroids.type == SQZ_ROW_I8);
}

/* The layer as it will be on the card. */
static bool place_layer(struct sqz_card *cuda, struct sqz_card_built *b, const struct sqz_card_rows *rows,
                        const struct sqz_layer *layer)
{
    const struct sqz_layer planned = with_f16_rows(layer);
    b->bytes = sqz_layer_index_bytes(&planned);
    b->memory = sqz_card_take(cuda, b->bytes);
    if (!b->memory) return false;
    b->layer = sqz_layer_index_in(&planned, b->memory);
    b->layer.space = SQZ_SPACE_CUDA;
    b->layer.keys = (struct sqz_rows){.type = SQZ_ROW_F16, .data = rows->keys};
    b->layer.values = (struct sqz_rows){.type = SQZ_ROW_F16, .data = rows->values};
    return true;
}

/* What a layer's values in planes will be relative to: the mean of MEAN_ROWS of a head's clustered rows, which are sorted,
 * so that all clusters have a part in it, or of all where there are not so many. */
static bool find_value_mean(struct sqz_card *cuda, struct sqz_card_built *b, const struct sqz_layer *layer)
{
    enum { MEAN_ROWS = 4096 };
    const size_t k = layer->shape.n_head_kv, d = layer->shape.head_dim, row = d * sizeof(uint16_t);
    const size_t n_rows = layer->n_rows - layer->n_fixed, n = n_rows < MEAN_ROWS ? n_rows : MEAN_ROWS;
    const char *values = b->layer.values.data;
    bool ok = (b->value_mean = calloc(k * d, sizeof *b->value_mean)) &&
              sqz_card_grow_pinned(cuda, (void **)&cuda->staging, &cuda->staging_room, k * n * row);
    for (size_t h = 0; h < k && ok; h++)
        ok = cuda->calls->copy_runs(cuda->staging + h * n * row, row,
                                    values + (h * layer->n_rows + layer->n_fixed) * row, n_rows / n * row, row, n,
                                    cuda->stream);
    ok = ok && cuda->calls->wait(cuda->stream);
    for (size_t i = 0; i < k * n && ok; i++) {
        float numbers[256], *mean = b->value_mean + i / n * d;
        sqz_kernels_get()->f16_to_f32(numbers, (const uint16_t *)(const void *)(cuda->staging + i * row), d);
        for (size_t j = 0; j < d; j++) mean[j] += numbers[j] / (float)n;
    }
    return ok;
}

enum sqz_status sqz_card_build_rows(struct sqz_card *cuda, struct sqz_card_built *b, const struct sqz_card_rows *rows,
                                    uint32_t index, const struct sqz_layer *layer,
                                    const struct sqz_squeeze_options *options, bool *built, struct sqz_error *error)
{
    if (!place_layer(cuda, b, rows, layer) || !make_room(cuda, b, options)) {
        sqz_card_forget_built(cuda, b);
        return SQZ_OK;
    }
    const struct sqz_gpu_build args = {.layer = &b->layer,
                                       .options = options,
                                       .seed = options->seed + 1000 * (uint64_t)index,
                                       .workspace = cuda->workspace,
                                       .workspace_bytes = cuda->workspace_room};
    const size_t query_bytes = (size_t)layer->n_queries * layer->shape.n_head * layer->shape.head_dim * 2;
    if (!cuda->calls->put((void *)(uintptr_t)b->layer.queries, layer->queries, query_bytes, cuda->stream) ||
        cuda->calls->build(&args, cuda->stream) != SQZ_OK || !cuda->calls->wait(cuda->stream) ||
        (sqz_row_is_planes(layer->values.type) && !find_value_mean(cuda, b, layer)))
        return sqz_card_building_failed(cuda, "clustering", error);
    *built = true;
    return SQZ_OK;
}

const struct sqz_card_rows *sqz_card_rows_to_build(const struct sqz_card *cuda, uint32_t index, size_t n_rows,
                                                   const struct sqz_layer *layer)
{
    const struct sqz_card_rows *rows = index < cuda->n_reading ? &cuda->reading[index] : NULL;
    return rows && rows->keys && rows->capacity == n_rows && layer->n_levels && keys_fit(layer) &&
                   sqz_card_dim(layer->shape.head_dim) == layer->shape.head_dim
               ? rows
               : NULL;
}

static enum sqz_status build(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer,
                             const struct sqz_squeeze_options *options, bool *built, struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    const struct sqz_card_rows *rows = sqz_card_rows_to_build(cuda, index, layer->n_rows, layer);
    *built = false;
    if (!rows) return SQZ_OK;
    cuda->calls->use(cuda->card);
    if (!cuda->built) cuda->built = calloc(cuda->n_reading, sizeof *cuda->built);
    if (!cuda->built) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for layers on the card");
    return sqz_card_build_rows(cuda, &cuda->built[index], rows, index, layer, options, built, error);
}

/* ---- Calibration ------------------------------------------------------------------------------ */

static enum sqz_status count(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer,
                             bool fit_variance, struct sqz_curve_sums *sums, float *gain, struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    const struct sqz_card_built *b = &cuda->built[index];
    const size_t k = layer->shape.n_head_kv;
    cuda->calls->use(cuda->card);
    if (!sqz_card_grow(cuda, &cuda->out, &cuda->out_room, k * sizeof *sums))
        return sqz_card_no_memory(cuda, k * sizeof *sums, "what calibration counts", error);
    const struct sqz_gpu_count args = {.layer = &b->layer,
                                       .fit_variance = fit_variance,
                                       .sums = (struct sqz_curve_sums *)(void *)cuda->out,
                                       .workspace = cuda->workspace,
                                       .workspace_bytes = cuda->workspace_room};
    if (cuda->calls->count_layer(&args, cuda->stream) != SQZ_OK ||
        !cuda->calls->get(sums, args.sums, k * sizeof *sums, cuda->stream) ||
        !cuda->calls->get(gain, b->layer.variance_gain, k * sizeof *gain, cuda->stream) ||
        !cuda->calls->wait(cuda->stream))
        return sqz_card_building_failed(cuda, "calibration", error);
    return SQZ_OK;
}

/* What the trial has on the card and on the host, in one piece of memory each. */
struct trial {
    struct sqz_cuda_attend_args args;
    size_t n;                              /* numbers of an output */
    size_t out[3], threshold, gain, bytes; /* offsets: F16 outputs exact, with and without tail; F32 [K] */
};

static struct trial plan_trial(const struct sqz_card *cuda, const struct sqz_layer *layer)
{
    struct trial t = {.args = trial_of(layer)};
    const size_t row = (size_t)layer->shape.n_head * layer->shape.head_dim;
    t.n = t.args.n_sequences * row;
    for (size_t i = 0; i < 3; i++) t.out[i] = i * sqz_card_aligned(2 * t.n);
    t.threshold = 3 * sqz_card_aligned(2 * t.n);
    t.gain = t.threshold + sqz_card_aligned(layer->shape.n_head_kv * sizeof(float));
    t.bytes = t.gain + sqz_card_aligned(layer->shape.n_head_kv * sizeof(float));
    t.args.workspace = cuda->workspace;
    t.args.workspace_bytes = cuda->workspace_room;
    return t;
}

/* Thresholds and gains of the trial's budget, and the sampled queries. */
static bool load_trial(struct sqz_card *cuda, struct trial *t, const struct sqz_layer *host,
                       const struct sqz_layer *layer)
{
    const size_t k = host->shape.n_head_kv, row = (size_t)host->shape.n_head * host->shape.head_dim * 2;
    const size_t n = t->args.n_sequences;
    float *threshold = (float *)(void *)(cuda->staging + t->threshold),
          *gain = (float *)(void *)(cuda->staging + t->gain);
    for (uint32_t h = 0; h < k; h++) {
        const struct sqz_head_plan plan = sqz_head_plan_at(host, h, SQZ_TRIAL_BUDGET, 0);
        threshold[h] = plan.log_threshold;
        gain[h] = plan.tail_gain;
    }
    bool ok = cuda->calls->put(cuda->out + t->threshold, threshold, t->bytes - t->threshold, cuda->stream);
    for (size_t i = 0; i < n; i++)
        ok &= cuda->calls->copy_runs(cuda->queries + i * row, row,
                                     (const char *)layer->queries + i * layer->n_queries / n * row, row, row, 1,
                                     cuda->stream);
    t->args.queries = cuda->queries;
    t->args.plan.log_threshold = (const float *)(const void *)(cuda->out + t->threshold);
    t->args.plan.variance_gain = layer->variance_gain;
    return ok;
}

/* Exactly, with the tail and without it. */
static bool run_trial(struct sqz_card *cuda, struct trial *t)
{
    bool ok = true;
    for (size_t i = 0; i < 3; i++) {
        t->args.dense = i == 0;
        t->args.plan.tail_gain = i == 1 ? (const float *)(const void *)(cuda->out + t->gain) : NULL;
        t->args.plan.tail_skip = t->args.layer->value_skip ? SQZ_VALUE_SKIP : 0;
        t->args.out = cuda->out + t->out[i];
        ok &= cuda->calls->attend(&t->args, cuda->stream) == SQZ_OK;
    }
    return ok && cuda->calls->get(cuda->staging, cuda->out, t->threshold, cuda->stream) &&
           cuda->calls->wait(cuda->stream);
}

static double squared_distance(const uint16_t *a, const uint16_t *b, size_t n)
{
    float x[256], y[256];
    double sum = 0;
    sqz_kernels_get()->f16_to_f32(x, a, n);
    sqz_kernels_get()->f16_to_f32(y, b, n);
    for (size_t i = 0; i < n; i++) sum += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
    return sum;
}

static enum sqz_status try_tail(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *host, bool *keep,
                                struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    const struct sqz_layer *layer = &cuda->built[index].layer;
    const size_t d = host->shape.head_dim, n_head = host->shape.n_head, group = n_head / host->shape.n_head_kv;
    struct trial t = plan_trial(cuda, layer);
    cuda->calls->use(cuda->card);
    if (!sqz_card_grow(cuda, &cuda->out, &cuda->out_room, t.bytes) ||
        !sqz_card_grow(cuda, &cuda->queries, &cuda->queries_room, 2 * t.n) ||
        !sqz_card_grow_pinned(cuda, (void **)&cuda->staging, &cuda->staging_room, t.bytes))
        return sqz_card_no_memory(cuda, t.bytes, "the trial of tails", error);
    if (!load_trial(cuda, &t, host, layer) || !run_trial(cuda, &t))
        return sqz_card_building_failed(cuda, "the trial of tails", error);
    const uint16_t *out[3];
    for (size_t i = 0; i < 3; i++) out[i] = (const uint16_t *)(const void *)(cuda->staging + t.out[i]);
    for (size_t h = 0; h < host->shape.n_head_kv; h++) {
        double with = 0, without = 0;
        for (size_t i = 0; i < t.args.n_sequences * group; i++) {
            const size_t at = (i / group * n_head + h * group + i % group) * d;
            with += squared_distance(out[1] + at, out[0] + at, d);
            without += squared_distance(out[2] + at, out[0] + at, d);
        }
        keep[h] = with < without;
    }
    return SQZ_OK;
}

/* ---- To the host ---------------------------------------------------------------------------------- */

/* F16 rows, n a head, become those of another type, in the same order. */
static void round_rows(const struct sqz_rows *to, const uint16_t *from, const struct sqz_layer_shape *shape, size_t n,
                       int n_threads)
{
    const size_t k = shape->n_head_kv, d = shape->head_dim;
#pragma omp parallel for collapse(2) num_threads(n_threads)
    for (size_t h = 0; h < k; h++)
        for (size_t i = 0; i < n; i++) {
            const struct sqz_rows head = sqz_rows_of_head(to, n, d, h);
            float row[256];
            sqz_kernels_get()->f16_to_f32(row, from + (h * n + i) * d, d);
            sqz_rows_store(&head, i, row, d);
        }
}

/* Bytes of n rows a head in planes, and their arrays in memory of so many bytes; NULL: they are only counted. */
static size_t place_planes(struct sqz_rows *rows, const struct sqz_layer_shape *shape, size_t n, char *memory)
{
    const size_t k = shape->n_head_kv, d = shape->head_dim, n_whole = rows->planes.n_whole;
    const size_t plane = sqz_card_aligned(k * (n - n_whole) * sqz_plane_bytes(d));
    const size_t step = plane * (rows->type == SQZ_ROW_I44 ? 2 : 1);
    const size_t whole = step + sqz_card_aligned(k * (n - n_whole) * sizeof(uint16_t));
    if (memory) {
        rows->data = memory;
        if (rows->type == SQZ_ROW_I44) rows->planes.lower = (const uint8_t *)memory + plane;
        rows->planes.step = (const uint16_t *)(const void *)(memory + step);
        if (n_whole) rows->planes.whole = (const uint16_t *)(const void *)(memory + whole);
    }
    return whole + sqz_card_aligned(k * n_whole * d * sizeof(uint16_t));
}

/* What a layer's value centroids in planes need behind the index, in which they are F16. */
static size_t centroid_bytes(const struct sqz_layer *planned)
{
    size_t bytes = 0;
    for (uint32_t l = 0; l < planned->n_levels; l++) {
        struct sqz_rows rows = planned->level[l].value_centroids;
        if (sqz_row_is_planes(rows.type))
            bytes += place_planes(&rows, &planned->shape, planned->level[l].n_clusters, NULL);
    }
    return bytes;
}

/* They become what the file has. memory: centroid_bytes(). */
static void round_centroids(struct sqz_layer *layer, const struct sqz_layer *planned, char *memory, int n_threads)
{
    for (uint32_t l = 0; l < planned->n_levels; l++) {
        const struct sqz_rows from = layer->level[l].value_centroids;
        struct sqz_rows *to = &layer->level[l].value_centroids;
        const size_t n = planned->level[l].n_clusters;
        if (!sqz_row_is_planes(planned->level[l].value_centroids.type)) continue;
        *to = (struct sqz_rows){.type = planned->level[l].value_centroids.type, .mean = layer->values.mean};
        memory += place_planes(to, &planned->shape, n, memory);
        round_rows(to, sqz_rows_f16(&from), &planned->shape, n, n_threads);
    }
}

/* The layer's index in host memory. What calibration found and the queries are the planned one's. */
static struct sqz_layer layer_in(char *memory, const struct sqz_layer *planned, const float *value_mean)
{
    const struct sqz_layer f16 = with_f16_rows(planned);
    struct sqz_layer layer = sqz_layer_index_in(&f16, memory);
    layer.keys = planned->keys;
    layer.values = planned->values;
    layer.values.mean = value_mean;
    if (layer.keys.type == SQZ_ROW_I8) layer.keys.mean = layer.level[0].centroids.mean;
    layer.log_threshold = planned->log_threshold;
    layer.share = planned->share;
    layer.lost_mass = planned->lost_mass;
    layer.tail_gain = planned->tail_gain;
    layer.variance_gain = planned->variance_gain;
    layer.global_share = planned->global_share;
    layer.queries = planned->queries;
    return layer;
}

static enum sqz_status fetch(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *planned,
                             struct sqz_layer *host, struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    const struct sqz_card_built *b = &cuda->built[index];
    cuda->calls->use(cuda->card);
    const size_t centroids = sqz_card_aligned(b->bytes);
    if (!sqz_card_grow_pinned(cuda, &cuda->index.memory, &cuda->index.room, centroids + centroid_bytes(planned)))
        return sqz_card_building_failed(cuda, "bringing an index", error);
    *host = layer_in(cuda->index.memory, planned, b->value_mean);
    void *to = (void *)(uintptr_t)host->position;
    if (!cuda->calls->get(to, b->layer.position, sqz_layer_index_span(&b->layer), cuda->stream) ||
        !cuda->calls->wait(cuda->stream))
        return sqz_card_building_failed(cuda, "bringing an index", error);
    round_centroids(host, planned, (char *)cuda->index.memory + centroids, cuda->n_threads);
    return SQZ_OK;
}

static size_t part_of(const struct sqz_card_rows *rows)
{
    return sqz_card_aligned(rows->bytes / 2);
}

/* Behind keys and values, of layers in planes: the index, whose centroids and offsets keys are relative to, and keys and
 * values in planes. */
struct planes_there {
    size_t index, keys, values, end; /* offsets */
};

static struct planes_there planes_there(const struct sqz_card_built *b, const struct sqz_layer *planned, size_t part)
{
    struct sqz_rows keys = planned->keys, values = planned->values;
    struct planes_there p = {.index = 2 * part};
    p.keys = p.index + sqz_card_aligned(b->bytes);
    p.values = p.keys + place_planes(&keys, &planned->shape, planned->n_rows, NULL);
    p.end = p.values + place_planes(&values, &planned->shape, planned->n_rows, NULL);
    return p;
}

/* Behind keys and values: keys as INT8, their scales, and the means that they are relative to. */
struct small_keys {
    size_t data, scale, mean, end; /* offsets */
};

static struct small_keys small_keys_of(const struct sqz_layer *layer, size_t part)
{
    const size_t k = layer->shape.n_head_kv, d = layer->shape.head_dim, n = layer->keys.type == SQZ_ROW_I8 ? k : 0;
    struct small_keys s = {.data = 2 * part};
    s.scale = s.data + sqz_card_aligned(n * layer->n_rows * d);
    s.mean = s.scale + sqz_card_aligned(n * layer->n_rows * sizeof(float));
    s.end = s.mean + sqz_card_aligned(n * d * sizeof(float));
    return s;
}

/* Starts a layer's keys and values on their way. */
static bool begin_fetch(struct sqz_card *cuda, struct sqz_card_fetched *f, uint32_t index,
                        const struct sqz_layer *planned)
{
    const struct sqz_card_rows *rows = &cuda->reading[index];
    const struct sqz_layer *layer = &cuda->built[index].layer;
    const size_t part = part_of(rows);
    const struct small_keys small = small_keys_of(planned, part);
    const size_t mean_bytes = (size_t)layer->shape.n_head_kv * layer->shape.head_dim * sizeof(float);
    f->index = UINT32_MAX;
    if (!f->stream) f->stream = cuda->calls->create_stream();
    const bool planes = sqz_row_is_planes(planned->keys.type);
    const struct planes_there there = planes_there(&cuda->built[index], planned, part);
    if (!f->stream || !sqz_card_grow_pinned(cuda, &f->memory, &f->room, planes ? there.end : small.end)) return false;
    char *to = f->memory;
    if (planes) {
        const struct sqz_layer host = layer_in(to + there.index, planned, NULL);
        if (!cuda->calls->get((void *)(uintptr_t)host.position, layer->position, sqz_layer_index_span(layer),
                              f->stream))
            return false;
    }
    if (!cuda->calls->get(to, rows->keys, rows->bytes / 2, f->stream) ||
        !cuda->calls->get(to + part, rows->values, rows->bytes / 2, f->stream) ||
        (planned->keys.type == SQZ_ROW_I8 &&
         !cuda->calls->get(to + small.mean, layer->level[0].centroids.mean, mean_bytes, f->stream)))
        return false;
    f->index = index;
    return true;
}

static struct sqz_card_fetched *find_fetched(struct sqz_card *cuda, uint32_t index)
{
    for (size_t i = 0; i < 2; i++)
        if (cuda->fetched[i].stream && cuda->fetched[i].index == index) return &cuda->fetched[i];
    return NULL;
}

/* Keys and values that came become rows in planes. */
static void take_planes(const struct sqz_card *cuda, const struct sqz_card_fetched *f, const struct sqz_layer *planned,
                        struct sqz_layer *host)
{
    const struct sqz_card_built *b = &cuda->built[f->index];
    const size_t part = part_of(&cuda->reading[f->index]);
    const struct planes_there there = planes_there(b, planned, part);
    char *memory = f->memory;
    const struct sqz_layer index = layer_in(memory + there.index, planned, b->value_mean);
    struct sqz_layer whole = *planned;
    for (uint32_t l = 0; l < planned->n_levels; l++) whole.level[l] = index.level[l];
    whole.values.mean = b->value_mean;
    place_planes(&whole.keys, &planned->shape, planned->n_rows, memory + there.keys);
    place_planes(&whole.values, &planned->shape, planned->n_rows, memory + there.values);
    sqz_layer_join_planes(&whole);
    const uint16_t *keys = (const uint16_t *)(const void *)memory,
                   *values = (const uint16_t *)(const void *)(memory + part);
    round_rows(&whole.keys, keys, &planned->shape, planned->n_rows, cuda->n_threads);
    round_rows(&whole.values, values, &planned->shape, planned->n_rows, cuda->n_threads);
    host->keys = whole.keys;
    host->values = whole.values;
}

/* What came, as the file has it. */
static void take_fetched(const struct sqz_card *cuda, const struct sqz_card_fetched *f, const struct sqz_layer *planned,
                         struct sqz_layer *host)
{
    const size_t part = part_of(&cuda->reading[f->index]);
    char *memory = f->memory;
    *host = *planned;
    host->keys.data = memory;
    host->values.data = memory + part;
    if (sqz_row_is_planes(planned->keys.type)) {
        take_planes(cuda, f, planned, host);
        return;
    }
    if (planned->keys.type != SQZ_ROW_I8) return;
    const struct small_keys small = small_keys_of(planned, part);
    host->keys = (struct sqz_rows){.type = SQZ_ROW_I8,
                                   .data = memory + small.data,
                                   .scale = (const float *)(const void *)(memory + small.scale),
                                   .mean = (const float *)(const void *)(memory + small.mean)};
    round_rows(&host->keys, f->memory, &planned->shape, planned->n_rows, cuda->n_threads);
}

static enum sqz_status fetch_rows(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layers,
                                  uint32_t next, struct sqz_layer *host, struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    struct sqz_card_fetched *f = find_fetched(cuda, index);
    cuda->calls->use(cuda->card);
    if (!f) {
        f = &cuda->fetched[0];
        if (!begin_fetch(cuda, f, index, &layers[index]))
            return sqz_card_building_failed(cuda, "bringing a layer", error);
    }
    struct sqz_card_fetched *other = &cuda->fetched[f == &cuda->fetched[0]];
    if (!cuda->calls->wait(f->stream) || (next != UINT32_MAX && !begin_fetch(cuda, other, next, &layers[next])))
        return sqz_card_building_failed(cuda, "bringing a layer", error);
    take_fetched(cuda, f, &layers[index], host);
    return SQZ_OK;
}

const struct sqz_backend_builder sqz_card_builder = {.build = build,

                                                     .count = count,
                                                     .try_tail = try_tail,
                                                     .fetch = fetch,
                                                     .fetch_rows = fetch_rows};
