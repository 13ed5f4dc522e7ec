/*
 * A card that is not there: the table of lib/cuda/calls.h in host memory, by plain
 * loops, so that everything of the engine but the kernels is tested on any machine.
 * Nothing can be captured here. Rows are chosen and layers are built by lib/ itself;
 * rows are read one by one, where kernels read groups of 8.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "build.h"
#include "cuda/calls.h"
#include "cuda/weights.h"
#include "ggml.h"
#include "lookup.h"
#include "rows.h"

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

/* Everything is done at once, but a copy to the host: that comes when the stream is waited for, or used otherwise. */
struct stream {
    void *to;
    const void *from;
    size_t bytes;
};

static void let_come(void *stream)
{
    struct stream *s = stream;
    if (s && s->bytes) memcpy(s->to, s->from, s->bytes);
    if (s) s->bytes = 0;
}

static bool copy(void *to, const void *from, size_t bytes, void *stream)
{
    let_come(stream);
    memcpy(to, from, bytes);
    return !lost();
}

static bool get(void *to, const void *from, size_t bytes, void *stream)
{
    let_come(stream);
    *(struct stream *)stream = (struct stream){to, from, bytes};
    return !lost();
}

static bool copy_runs(void *to, size_t to_stride, const void *from, size_t from_stride, size_t bytes, size_t n,
                      void *stream)
{
    let_come(stream);
    for (size_t i = 0; i < n; i++) memcpy((char *)to + i * to_stride, (const char *)from + i * from_stride, bytes);
    return !lost();
}

static bool clear(void *device, size_t bytes, void *stream)
{
    let_come(stream);
    memset(device, 0, bytes);
    return true;
}

static void *create_stream(void)
{
    return lost() ? NULL : calloc(1, sizeof(struct stream));
}

static bool wait_for(void *stream)
{
    let_come(stream);
    return stream != NULL && !lost();
}

static bool record(void *event, void *stream)
{
    let_come(stream);
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

/* ---- Own rows ------------------------------------------------------------------------ */

enum { BLOCK = SQZ_CUDA_USER_BLOCK };

/* Own rows in planes as lib/ has them, of n rows a head; of I4 with lower planes behind the others the upper ones. */
struct user_planes {
    struct sqz_rows keys, values;
    size_t n_rows, bytes;
};

static void *take_from(char **at, size_t bytes)
{
    void *here = *at;
    *at += (bytes + 15) / 16 * 16;
    return here;
}

static struct user_planes user_planes_of(const struct sqz_layer *l, void *memory, size_t n)
{
    const size_t k = l->shape.n_head_kv, d = l->shape.head_dim, plane = k * n * sqz_plane_bytes(d);
    const enum sqz_row_type type = l->keys.type;
    struct user_planes p = {.keys = {.type = type}, .values = {.type = type, .mean = l->values.mean}, .n_rows = n};
    char *at = memory;
    struct sqz_centres *c = &p.keys.planes.centres;
    c->type = SQZ_ROW_F16;
    c->n = (uint32_t)(n / BLOCK);
    c->data = take_from(&at, k * c->n * d * sizeof(uint16_t));
    c->offset = take_from(&at, k * (c->n + 1) * sizeof *c->offset);
    struct sqz_rows *const both[] = {&p.keys, &p.values};
    for (int i = 0; i < 2; i++) both[i]->planes.step = take_from(&at, k * n * sizeof(uint16_t));
    for (int i = 0; i < 2; i++) both[i]->data = take_from(&at, plane);
    for (int i = 0; i < 2 && type == SQZ_ROW_I44; i++) both[i]->planes.lower = take_from(&at, plane);
    p.bytes = (size_t)(at - (char *)memory);
    return p;
}

/* The first n rows of a head, and the F16 rows from number `first` on. */
struct own_rows {
    float *keys[2], *values[2];
    size_t first;
};

/* How many rows token t of sequence b sees, and how many of them in planes. */
static size_t rows_seen(const struct sqz_cuda_attend_args *a, size_t b, size_t t, size_t *in_planes)
{
    const size_t n = !a->n_user ? 0 : a->n_user - a->n_tokens + t + 1, block = n ? (n - 1) / BLOCK : 0;
    *in_planes = !a->user_layer || !n ? 0 : a->users ? a->users[b].n_plane_rows : block ? (block - 1) * BLOCK : 0;
    if (!n) return 0;
    return a->users ? *in_planes + a->users[b].n_rows : n;
}

static struct own_rows own_rows_of(const struct sqz_cuda_attend_args *a, size_t b, size_t head)
{
    const size_t d = a->layer->shape.head_dim, each = (size_t)a->layer->shape.n_head_kv * a->user_capacity_rows * d * 2;
    struct sqz_cuda_user user = {.keys = (const char *)a->user_keys + b * each,
                                 .values = (const char *)a->user_values + b * each,
                                 .capacity_rows = a->user_capacity_rows,
                                 .planes = a->user_planes,
                                 .plane_capacity_rows = a->user_plane_capacity_rows};
    if (a->users && a->n_user) user = a->users[b];
    size_t in_planes;
    const size_t n = rows_seen(a, b, a->n_tokens - 1u, &in_planes);
    struct own_rows own = {.first = a->users ? in_planes : a->user_layer && n ? a->user_first_row : 0};
    own.keys[1] = f32_rows(user.keys, head * user.capacity_rows, n - own.first, d);
    own.values[1] = f32_rows(user.values, head * user.capacity_rows, n - own.first, d);
    own.keys[0] = malloc((in_planes + 1) * d * sizeof(float));
    own.values[0] = malloc((in_planes + 1) * d * sizeof(float));
    if (in_planes) {
        const struct user_planes p =
            user_planes_of(a->user_layer, (void *)(uintptr_t)user.planes, user.plane_capacity_rows);
        const struct sqz_rows keys = sqz_rows_of_head(&p.keys, p.n_rows, d, head),
                              values = sqz_rows_of_head(&p.values, p.n_rows, d, head);
        sqz_rows_to_f32(own.keys[0], &keys, 0, in_planes, d);
        sqz_rows_to_f32(own.values[0], &values, 0, in_planes, d);
    }
    return own;
}

static void free_own_rows(struct own_rows *own)
{
    for (int i = 0; i < 2; i++) free(own->keys[i]), free(own->values[i]);
}

/* Row number r for a token that reads rows before in_planes in planes. */
static const float *own_row(float *const rows[2], const struct own_rows *own, size_t r, size_t in_planes, size_t d)
{
    return r < in_planes ? rows[0] + r * d : rows[1] + (r - own->first) * d;
}

/* What a sequence's tokens select of a head, by lib/ itself; its query rows are [T][G]. */
struct choice {
    struct sqz_selection of;
    float *queries, *norms, *base;
    void *workspace;
};

static void free_choice(struct choice *c)
{
    free(c->queries);
    free(c->norms);
    free(c->base);
    free(c->workspace);
}

/* The mass of the own rows that a token sees. */
static float own_mass(const struct sqz_cuda_attend_args *a, size_t b, size_t head, size_t t, const float *query)
{
    const size_t d = a->layer->shape.head_dim;
    struct own_rows own = own_rows_of(a, b, head);
    size_t in_planes;
    const size_t n = rows_seen(a, b, t, &in_planes);
    float mass = -INFINITY;
    for (size_t r = 0; r < n; r++)
        mass = sqz_log_add(mass, a->layer->shape.scale * dot(query, own_row(own.keys, &own, r, in_planes, d), d));
    free_own_rows(&own);
    return mass;
}

/* The mass of n rows, which are freed. */
static float log_mass(const float *query, float *rows, size_t n, size_t d, float scale)
{
    float mass = -INFINITY;
    for (size_t r = 0; r < n; r++) mass = sqz_log_add(mass, scale * dot(query, rows + r * d, d));
    free(rows);
    return mass;
}

/* The first n rows of a head of the context, F16 or in planes; the caller frees them. */
static float *layer_rows(const struct sqz_layer *l, const struct sqz_rows *of, size_t head, size_t n)
{
    const size_t d = l->shape.head_dim;
    const struct sqz_rows rows = sqz_rows_of_head(of, l->n_rows, d, head);
    float *out = malloc((n ? n : 1) * d * sizeof *out);
    sqz_rows_to_f32(out, &rows, 0, n, d);
    return out;
}

static void set_query(struct choice *c, const struct sqz_cuda_attend_args *a, size_t b, size_t head, size_t i)
{
    const struct sqz_layer *l = a->layer;
    const size_t d = l->shape.head_dim, group = l->shape.n_head / l->shape.n_head_kv, t = i / group;
    float *query = c->queries + i * d;
    f32_row(query, a->queries, (b * a->n_tokens + t) * l->shape.n_head + head * group + i % group, d);
    c->norms[i] = dot(query, query, d);
    c->base[i] = sqz_log_add(log_mass(query, layer_rows(l, &l->keys, head, l->n_fixed), l->n_fixed, d, l->shape.scale),
                             own_mass(a, b, head, t, query));
}

static float plan_number(const struct sqz_cuda_attend_args *a, const float *numbers, size_t b, size_t head)
{
    return numbers ? numbers[a->plan.per_sequence ? b * a->layer->shape.n_head_kv + head : head] : 0;
}

/* elsewhere: [B][T][H] of what other cards have; or NULL. */
static void choose(struct choice *c, const struct sqz_cuda_attend_args *a, size_t b, size_t head,
                   const float *elsewhere)
{
    const struct sqz_layer *l = a->layer;
    const size_t n = a->n_tokens * (l->shape.n_head / l->shape.n_head_kv), d = l->shape.head_dim;
    const struct sqz_head_plan plan = {.log_threshold = plan_number(a, a->plan.log_threshold, b, head),
                                       .tail_gain = plan_number(a, a->plan.tail_gain, b, head),
                                       .variance_gain = a->plan.variance_gain ? a->plan.variance_gain[head] : 0};
    c->queries = malloc(n * d * sizeof *c->queries);
    c->norms = malloc(n * sizeof *c->norms);
    c->base = malloc(n * sizeof *c->base);
    c->workspace = malloc(sqz_lookup_workspace_bytes(l, n));
    for (size_t i = 0; i < n; i++) {
        const size_t group = n / a->n_tokens;
        const size_t at = (b * a->n_tokens + i / group) * l->shape.n_head + head * group + i % group;
        set_query(c, a, b, head, i);
        if (elsewhere) c->base[i] = sqz_log_add(c->base[i], elsewhere[at]);
    }
    sqz_lookup(&c->of, l, (uint32_t)head, &plan, c->queries, c->norms, n, l->rule == SQZ_RULE_PAPER ? NULL : c->base,
               a->n_tokens > 1 && a->plan.retain_rows ? a->plan.retain_rows[head] : 0, c->workspace);
}

/* The rows that are read one by one; fixed ones are. */
static void mark(bool *chosen, const struct choice *c, const struct sqz_layer *l)
{
    for (size_t r = 0; r < l->n_rows; r++) chosen[r] = r < l->n_fixed;
    for (size_t i = 0; i < c->of.n_ranges; i++)
        for (uint32_t r = c->of.ranges[i].begin; r < c->of.ranges[i].end; r++) chosen[r] = true;
}

/* What query row i gives a pruned cluster of the whole, and whether it adds something: to any of the rows does. */
static float tail_weight(const struct choice *c, size_t i, size_t p)
{
    return c->of.pruned_keys[i * c->of.pruned_stride + p] *
           expf(c->of.pruned_logit[i * c->of.pruned_stride + p] - c->of.log_total[i]);
}
static bool tail_counts(const struct choice *c, size_t n_rows, size_t p, float limit)
{
    bool counts = false;
    for (size_t i = 0; i < n_rows; i++) counts |= tail_weight(c, i, p) >= limit;
    return counts;
}

static bool selected(const struct choice *c, uint32_t r)
{
    for (size_t i = 0; i < c->of.n_ranges; i++)
        if (r >= c->of.ranges[i].begin && r < c->of.ranges[i].end) return true;
    return false;
}

/* What query row i gives those rows of a pruned cluster that others selected, so that they are no part of its tail.
 * chosen: what any sequence did; NULL: alone. */
static float weight_read(const struct choice *c, const struct sqz_layer *l, size_t head, size_t i, size_t p,
                         const bool *chosen, const float *query, const float *keys)
{
    uint32_t first;
    const uint32_t n = sqz_cluster_keys(l, (uint32_t)head, c->of.pruned_level[p], c->of.pruned_cluster[p], &first);
    const size_t d = l->shape.head_dim;
    float weight = 0;
    for (uint32_t r = first; chosen && r < first + n; r++)
        if (chosen[r] && !selected(c, r))
            weight += expf(l->shape.scale * dot(query, keys + r * d, d) - c->of.log_total[i]);
    return weight;
}

/* keys: of the head, [N][D]; chosen: of sequences together, of whose clusters the tail is what nobody read. */
static void add_tail(struct sum *sum, const struct choice *c, const struct sqz_layer *l, size_t head, size_t i,
                     size_t n_rows, float limit, const bool *chosen, const float *query, const float *keys)
{
    float row[MOST_DIMENSIONS];
    for (size_t p = 0; p < c->of.n_pruned; p++) {
        const struct sqz_level *level = &l->level[c->of.pruned_level[p]];
        if (!tail_counts(c, n_rows, p, limit)) continue;
        const float weight = tail_weight(c, i, p) - weight_read(c, l, head, i, p, chosen, query, keys);
        if (!(weight > 0)) continue;
        f32_row(row, level->value_centroids.data, head * level->n_clusters + c->of.pruned_cluster[p],
                l->shape.head_dim);
        add_logit(sum, logf(weight) + c->of.log_total[i], row, l->shape.head_dim);
    }
}

static bool has_kernel(uint32_t head_dim)
{
    return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

/* Planes as on a card: both, of some head dimensions. SQUEEZE_FAKE_PLANES=none: a card that has no kernels for them. */
static bool has_planes(const struct sqz_layer *l)
{
    const uint32_t d = l->shape.head_dim;
    return sqz_row_is_planes(l->keys.type) && l->values.type == l->keys.type && (d == 64 || d == 128) &&
           !getenv("SQUEEZE_FAKE_PLANES");
}

/* What a card makes of rows in planes lib/ does not need: a word that says that it was asked to. */
static const uint32_t plane_index_word = 0x706c616e;

static size_t plane_index_bytes(const struct sqz_layer *l)
{
    return has_planes(l) ? sizeof plane_index_word : 0;
}

static enum sqz_status plane_index(const struct sqz_layer *l, void *index, void *stream)
{
    if (!stream || !index || !has_planes(l) || !l->keys.planes.step || !l->values.planes.step)
        return SQZ_ERROR_ARGUMENT;
    memcpy(index, &plane_index_word, sizeof plane_index_word);
    return lost() ? SQZ_ERROR_INTERNAL : SQZ_OK;
}

static bool has_index(const struct sqz_layer *l)
{
    return l->plane_index && memcmp(l->plane_index, &plane_index_word, sizeof plane_index_word) == 0;
}

/* Also where SQUEEZE_FAKE_OBSTACLE is set, which says what. */
static const char *obstacle(const struct sqz_cuda_attend_args *a)
{
    if (!has_kernel(a->layer->shape.head_dim)) return "its head dimension is not one of the kernels'";
    if (!has_planes(a->layer) && (a->layer->keys.type != SQZ_ROW_F16 || a->layer->values.type != SQZ_ROW_F16))
        return "its rows are not F16";
    if (a->ranks && sqz_row_is_planes(a->layer->keys.type)) return "its rows are in planes";
    return getenv("SQUEEZE_FAKE_OBSTACLE");
}

/* Most with a tail, and then more than building and counting. */
static size_t workspace_bytes(const struct sqz_cuda_attend_args *a)
{
    const bool tail = !a->dense && a->layer->n_levels && a->plan.tail_gain;
    return (size_t)a->n_sequences * a->n_tokens * (tail ? 1 << 20 : 1);
}

/* The first row that token t of sequence b sees, counted over the context's rows and then its own. */
static int64_t first_row(const struct sqz_cuda_attend_args *a, size_t b, size_t t)
{
    if (!a->dense && a->layer->n_levels) return 0;
    if (a->users) return a->users[b].first_row;
    return a->windowed && a->first_row + (int64_t)t > 0 ? a->first_row + (int64_t)t : 0;
}

static bool has_tail(const struct sqz_cuda_attend_args *a, size_t b, size_t head)
{
    return !a->dense && a->plan.tail_gain && !sqz_tail_is_off(plan_number(a, a->plan.tail_gain, b, head));
}

static float tail_limit(const struct sqz_cuda_attend_args *a, size_t b, size_t head)
{
    return a->plan.tail_skip * expf(plan_number(a, a->plan.log_threshold, b, head));
}

/* F32 results of sequences' tokens in place of a->out, or NULL. */
static void attend_head(const struct sqz_cuda_attend_args *a, size_t b, size_t head, const bool *chosen,
                        const struct choice *choice, float *f32)
{
    const struct sqz_layer_shape *s = &a->layer->shape;
    const size_t d = s->head_dim, group = s->n_head / s->n_head_kv, n = a->layer->n_rows, n_rows = a->n_tokens * group;
    float *keys = layer_rows(a->layer, &a->layer->keys, head, n),
          *values = layer_rows(a->layer, &a->layer->values, head, n);
    struct own_rows own = own_rows_of(a, b, head);
    for (size_t i = 0; i < n_rows; i++) {
        const size_t t = i / group, at = (b * a->n_tokens + t) * s->n_head + head * group + i % group;
        struct sum sum = {.most = -INFINITY};
        float query[MOST_DIMENSIONS], out[MOST_DIMENSIONS];
        f32_row(query, a->queries, at, d);
        const size_t seen = (size_t)first_row(a, b, t);
        for (size_t r = seen; r < n; r++)
            if (chosen[r]) add_row(&sum, query, keys + r * d, values + r * d, d, s->scale);
        if (has_tail(a, b, head))
            add_tail(&sum, choice, a->layer, head, i, n_rows, tail_limit(a, b, head), a->together ? chosen : NULL,
                     query, keys);
        size_t in_planes;
        const size_t n_own = rows_seen(a, b, t, &in_planes);
        for (size_t r = seen > n ? seen - n : 0; r < n_own; r++)
            add_row(&sum, query, own_row(own.keys, &own, r, in_planes, d), own_row(own.values, &own, r, in_planes, d),
                    d, s->scale);
        end_sum(out, &sum, d);
        if (a->lse) a->lse[at] = sum.total > 0 ? sum.most + logf(sum.total) : -INFINITY;
        if (f32) memcpy(f32 + at * d, out, d * sizeof *out);
        else ggml_fp32_to_fp16_row(out, (ggml_fp16_t *)a->out + at * d, (int64_t)d);
    }
    free(keys);
    free(values);
    free_own_rows(&own);
}

/* As many groups as rows that are read one by one would fill. */
static uint32_t groups_of(const bool *chosen, size_t n)
{
    uint32_t rows = 0;
    for (size_t r = 0; r < n; r++) rows += chosen[r];
    return (rows + 4) / 8;
}

static void count_beside(const struct sqz_cuda_attend_args *a, size_t b, size_t head, const struct choice *c)
{
    const struct sqz_layer *l = a->layer;
    const size_t n_rows = a->n_tokens * (l->shape.n_head / l->shape.n_head_kv);
    struct sqz_cuda_read *read = &a->read[b * l->shape.n_head_kv + head];
    read->centroids += (uint32_t)c->of.n_centroids_read - l->level[l->n_levels - 1].n_clusters;
    read->codes += (uint32_t)c->of.n_codes_read;
    for (size_t p = 0; p < c->of.n_pruned && has_tail(a, b, head); p++)
        read->value_centroids += tail_counts(c, n_rows, p, tail_limit(a, b, head));
}

/* A head of all sequences; chosen: [B][N]. elsewhere as choose() has it, f32 as attend_head(). */
static void attend_sequences(const struct sqz_cuda_attend_args *a, size_t head, bool *chosen, const float *elsewhere,
                             float *f32)
{
    const size_t k = a->layer->shape.n_head_kv, n = a->layer->n_rows;
    struct choice *choice = calloc(a->n_sequences, sizeof *choice);
    memset(chosen, true, a->n_sequences * n);
    for (size_t b = 0; b < a->n_sequences && !a->dense; b++) {
        choose(&choice[b], a, b, head, elsewhere);
        mark(chosen + b * n, &choice[b], a->layer);
        if (a->read) count_beside(a, b, head, &choice[b]);
    }
    for (size_t b = 0; b < a->n_sequences && a->n_retained && !a->together; b++)
        a->n_retained[b * k + head] = groups_of(chosen + b * n, n);
    for (size_t b = 1; b < a->n_sequences && a->together; b++)
        for (size_t r = 0; r < n; r++) chosen[r] |= chosen[b * n + r];
    if (a->n_retained && a->together) a->n_retained[head] = groups_of(chosen, n);
    for (size_t b = 0; b < a->n_sequences; b++)
        attend_head(a, b, head, chosen + (a->together ? 0 : b * n), &choice[b], f32);
    for (size_t b = 0; b < a->n_sequences; b++) free_choice(&choice[b]);
    free(choice);
}

static size_t user_planes_bytes(const struct sqz_layer *l, uint32_t n_rows)
{
    return has_planes(l) && n_rows && n_rows % BLOCK == 0 ? user_planes_of(l, NULL, n_rows).bytes : 0;
}

/* The mean of a block's keys, in the place of its centroid. */
static void make_centroid(const struct sqz_rows *keys, size_t block, const uint16_t *rows, size_t d)
{
    float sum[MOST_DIMENSIONS] = {0}, row[MOST_DIMENSIONS];
    for (size_t r = 0; r < BLOCK; r++) {
        f32_row(row, rows, r, d);
        for (size_t i = 0; i < d; i++) sum[i] += row[i];
    }
    for (size_t i = 0; i < d; i++) sum[i] *= 1.0f / BLOCK;
    ggml_fp32_to_fp16_row(sum, (ggml_fp16_t *)(uintptr_t)keys->planes.centres.data + block * d, (int64_t)d);
}

static enum sqz_status flush(const struct sqz_cuda_flush_args *a, void *stream)
{
    const size_t k = a->layer->shape.n_head_kv, d = a->layer->shape.head_dim;
    if (!stream || !a->planes || (a->first_block + a->n_blocks) * BLOCK > a->capacity_rows) return SQZ_ERROR_ARGUMENT;
    const struct user_planes p = user_planes_of(a->layer, a->planes, a->capacity_rows);
    uint32_t *offset = (uint32_t *)(uintptr_t)p.keys.planes.centres.offset;
    const size_t n_offsets = p.n_rows / BLOCK + 1;
    for (size_t i = 0; i < k * n_offsets; i++) offset[i] = (uint32_t)(i % n_offsets * BLOCK);
    for (size_t i = 0; i < 2 * k * a->n_blocks; i++) {
        const size_t head = i / 2 % k, block = i / (2 * k), from = head * a->key_capacity_rows + block * BLOCK;
        const struct sqz_rows rows = sqz_rows_of_head(i % 2 ? &p.values : &p.keys, p.n_rows, d, head);
        const uint16_t *f16 = (const uint16_t *)(i % 2 ? a->values : a->keys) + from * d;
        float row[MOST_DIMENSIONS];
        if (i % 2 == 0) make_centroid(&rows, a->first_block + block, f16, d);
        for (size_t r = 0; r < BLOCK; r++) {
            f32_row(row, f16, r, d);
            sqz_rows_store(&rows, (a->first_block + block) * BLOCK + r, row, d);
        }
    }
    return lost() ? SQZ_ERROR_INTERNAL : SQZ_OK;
}

/* Each head's first n rows, of `bytes` bytes, from an array of n_from rows a head to one of n_to. */
static void move_rows(const void *to, size_t n_to, const void *from, size_t n_from, size_t bytes, size_t n, size_t k)
{
    if (to && from) copy_runs((void *)(uintptr_t)to, n_to * bytes, from, n_from * bytes, n * bytes, k, NULL);
}

static enum sqz_status move_user_planes(const struct sqz_layer *l, void *to, uint32_t to_rows, const void *from,
                                        uint32_t from_rows, uint32_t n_blocks, void *stream)
{
    const size_t k = l->shape.n_head_kv, d = l->shape.head_dim, n = (size_t)n_blocks * BLOCK,
                 plane = sqz_plane_bytes(d);
    const struct user_planes p = user_planes_of(l, to, to_rows),
                             q = user_planes_of(l, (void *)(uintptr_t)from, from_rows);
    const struct sqz_rows *const a[] = {&p.keys, &p.values}, *const b[] = {&q.keys, &q.values};
    if (!stream || n > to_rows || n > from_rows) return SQZ_ERROR_ARGUMENT;
    move_rows(p.keys.planes.centres.data, to_rows / BLOCK, q.keys.planes.centres.data, from_rows / BLOCK,
              d * sizeof(uint16_t), n_blocks, k);
    for (int i = 0; i < 2; i++) {
        move_rows(a[i]->planes.step, to_rows, b[i]->planes.step, from_rows, sizeof(uint16_t), n, k);
        move_rows(a[i]->data, to_rows, b[i]->data, from_rows, plane, n, k);
        move_rows(a[i]->planes.lower, to_rows, b[i]->planes.lower, from_rows, plane, n, k);
    }
    uint32_t *offset = (uint32_t *)(uintptr_t)p.keys.planes.centres.offset;
    const size_t n_offsets = to_rows / BLOCK + 1;
    for (size_t i = 0; i < k * n_offsets; i++) offset[i] = (uint32_t)(i % n_offsets * BLOCK);
    return lost() ? SQZ_ERROR_INTERNAL : SQZ_OK;
}

/* Blocks that the tokens of a call read in planes and that are not there. */
static enum sqz_status flush_before(const struct sqz_cuda_attend_args *a, void *stream)
{
    const size_t at = (size_t)(a->n_plane_rows - a->user_first_row) * a->layer->shape.head_dim * sizeof(uint16_t);
    size_t in_planes;
    if (!a->user_layer || a->users || !a->n_user) return SQZ_OK;
    rows_seen(a, 0, a->n_tokens - 1u, &in_planes);
    if (in_planes <= a->n_plane_rows) return SQZ_OK;
    const struct sqz_cuda_flush_args args = {.layer = a->user_layer,
                                             .planes = a->user_planes,
                                             .capacity_rows = a->user_plane_capacity_rows,
                                             .first_block = a->n_plane_rows / BLOCK,
                                             .n_blocks = (uint32_t)(in_planes - a->n_plane_rows) / BLOCK,
                                             .keys = (const char *)a->user_keys + at,
                                             .values = (const char *)a->user_values + at,
                                             .key_capacity_rows = a->user_capacity_rows};
    return a->user_first_row > a->n_plane_rows ? SQZ_ERROR_ARGUMENT : flush(&args, stream);
}

static void attend_heads(const struct sqz_cuda_attend_args *a, const float *elsewhere, float *f32)
{
    bool *chosen = malloc((size_t)a->n_sequences * a->layer->n_rows);
    for (size_t head = 0; head < a->layer->shape.n_head_kv; head++) attend_sequences(a, head, chosen, elsewhere, f32);
    free(chosen);
}

static enum sqz_status attend(const struct sqz_cuda_attend_args *a, void *stream)
{
    if (!stream || a->workspace_bytes < workspace_bytes(a)) return SQZ_ERROR_ARGUMENT;
    if (has_planes(a->layer) && !has_index(a->layer)) return SQZ_ERROR_ARGUMENT;
    if (lost()) return SQZ_ERROR_INTERNAL;
    const enum sqz_status status = flush_before(a, stream);
    if (status != SQZ_OK) return status;
    attend_heads(a, NULL, NULL);
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
        struct sqz_cuda_user user = {.keys = a->own_keys,
                                     .values = a->own_values,
                                     .capacity_rows = (uint32_t)a->capacity_rows,
                                     .n_rows = (uint32_t)(a->first_row + t + 1)};
        if (a->users) user = a->users[t];
        for (size_t h = 0; h < a->n_head && a->queries_f16; h++) {
            uint16_t row[MOST_DIMENSIONS];
            ggml_fp32_to_fp16_row(a->queries + t * a->query_token_stride + h * a->query_head_stride, row, (int64_t)d);
            put_row((uint16_t *)a->queries_f16 + (t * a->n_head + h) * padded, row, d, padded);
        }
        for (size_t h = 0; h < a->n_head_kv && a->keys; h++) {
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

/* ---- Cards that share rows ------------------------------------------------------------- */

/* A call as it lies in its card's mailbox until all cards have made it: then all are computed, as kernels would that wait
 * for each other. */
struct meeting {
    struct sqz_cuda_mailbox header;
    bool made;
    struct sqz_cuda_attend_args args;
    float *out;
    uint32_t head_dim;
};

static bool connect(const int *cards, uint32_t n, char *why, size_t room)
{
    (void)cards, (void)n;
    if (getenv("SQUEEZE_FAKE_OBSTACLE")) snprintf(why, room, "%s", getenv("SQUEEZE_FAKE_OBSTACLE"));
    return !getenv("SQUEEZE_FAKE_OBSTACLE");
}

static size_t mailbox_bytes(uint32_t n_ranks, uint32_t n_rows)
{
    return n_ranks >= 2 && n_rows ? sizeof(struct meeting) : 0;
}

/* [B][T][H]: a card's part of the denominators. */
static float *totals_of(const struct sqz_cuda_attend_args *a)
{
    const struct sqz_layer_shape *s = &a->layer->shape;
    const size_t group = s->n_head / s->n_head_kv, n = (size_t)a->n_sequences * s->n_head;
    float *totals = calloc(n, sizeof *totals);
    for (size_t b = 0; b < a->n_sequences && !a->dense; b++)
        for (size_t head = 0; head < s->n_head_kv; head++) {
            struct choice c = {0};
            choose(&c, a, b, head, NULL);
            for (size_t i = 0; i < group; i++) totals[b * s->n_head + head * group + i] = c.of.log_total[i];
            free_choice(&c);
        }
    return totals;
}

/* What all cards but number `but` have. */
static float *elsewhere_of(float *const *totals, uint32_t n_cards, uint32_t but, size_t n)
{
    float *sum = malloc(n * sizeof *sum);
    for (size_t i = 0; i < n; i++) sum[i] = -INFINITY;
    for (uint32_t r = 0; r < n_cards; r++)
        for (size_t i = 0; i < n && r != but; i++) sum[i] = sqz_log_add(sum[i], totals[r][i]);
    return sum;
}

/* All cards' results of n rows of d numbers: into the first one's. */
static void merge_results(float *const *out, float *const *lse, uint32_t n_cards, size_t n, size_t d)
{
    for (size_t i = 0; i < n; i++) {
        float whole = -INFINITY;
        for (uint32_t r = 0; r < n_cards; r++) whole = sqz_log_add(whole, lse[r][i]);
        for (size_t j = 0; j < d; j++) {
            double x = 0;
            for (uint32_t r = 0; r < n_cards; r++)
                if (lse[r][i] > -INFINITY) x += (double)out[r][i * d + j] * exp((double)lse[r][i] - (double)whole);
            out[0][i * d + j] = (float)x;
        }
    }
}

static void meet(const struct sqz_cuda_ranks *ranks)
{
    struct meeting *m[SQZ_CUDA_MOST_RANKS] = {ranks->mailbox[0]};
    float *totals[SQZ_CUDA_MOST_RANKS], *out[SQZ_CUDA_MOST_RANKS], *lse[SQZ_CUDA_MOST_RANKS];
    const uint32_t n_cards = ranks->n_ranks;
    for (uint32_t r = 0; r < n_cards; r++) {
        m[r] = ranks->mailbox[r];
        if (ranks->led) m[r]->args.queries = m[0]->args.queries;
        totals[r] = totals_of(&m[r]->args);
    }
    const struct sqz_layer_shape *s = &m[0]->args.layer->shape;
    const size_t n = (size_t)m[0]->args.n_sequences * s->n_head, d = s->head_dim;
    for (uint32_t r = 0; r < n_cards; r++) {
        float *elsewhere = elsewhere_of(totals, n_cards, r, n);
        out[r] = malloc(n * d * sizeof *out[r]);
        lse[r] = malloc(n * sizeof *lse[r]);
        m[r]->args.lse = lse[r];
        attend_heads(&m[r]->args, m[r]->args.dense ? NULL : elsewhere, out[r]);
        free(elsewhere);
    }
    merge_results(out, lse, n_cards, n, d);
    for (uint32_t r = 0; r < n_cards; r++) {
        for (size_t i = 0; i < n && (r == 0 || !ranks->led); i++)
            memcpy(m[r]->out + i * m[r]->head_dim, out[0] + i * d, m[r]->head_dim * sizeof(float));
        m[r]->made = false;
        m[r]->header.step++;
    }
    for (uint32_t r = 0; r < n_cards; r++) {
        free(totals[r]);
        free(out[r]);
        free(lse[r]);
    }
}

static enum sqz_status attend_shared(const struct sqz_cuda_attend_args *a, const struct sqz_gpu_node *node, float *out,
                                     void *stream)
{
    const struct sqz_cuda_ranks *ranks = a->ranks;
    struct meeting *mine = ranks->mailbox[ranks->rank];
    struct sqz_gpu_node told = *node;
    if (ranks->led && ranks->rank) told.queries_f16 = NULL; /* the first card's */
    enum sqz_status status = take(&told, stream);
    if (status != SQZ_OK) return status;
    if (a->n_tokens > 1 || a->together || a->n_sequences * a->layer->shape.n_head > ranks->n_rows || mine->made ||
        a->workspace_bytes < workspace_bytes(a))
        return SQZ_ERROR_ARGUMENT;
    mine->made = true;
    mine->args = *a;
    mine->out = out;
    mine->head_dim = node->head_dim;
    for (uint32_t r = 0; r < ranks->n_ranks; r++)
        if (!((const struct meeting *)ranks->mailbox[r])->made) return SQZ_OK;
    meet(ranks);
    return SQZ_OK;
}

static enum sqz_status merge(const struct sqz_cuda_merge_args *a, void *stream)
{
    const size_t n = a->n_rows, d = a->head_dim;
    float *row = malloc(d * sizeof *row);
    if (!stream || a->type != SQZ_ROW_F16) return SQZ_ERROR_ARGUMENT;
    for (size_t i = 0; i < n; i++) {
        float whole = -INFINITY;
        for (uint32_t p = 0; p < a->n_parts; p++) whole = sqz_log_add(whole, a->parts_lse[p * n + i]);
        for (size_t j = 0; j < d; j++) {
            row[j] = 0;
            for (uint32_t p = 0; p < a->n_parts; p++)
                if (a->parts_lse[p * n + i] > -INFINITY)
                    row[j] += expf(a->parts_lse[p * n + i] - whole) * a->parts[(p * n + i) * d + j];
        }
        ggml_fp32_to_fp16_row(row, (ggml_fp16_t *)a->out + i * d, (int64_t)d);
    }
    free(row);
    return lost() ? SQZ_ERROR_INTERNAL : SQZ_OK;
}

static enum sqz_status attend_node(const struct sqz_cuda_attend_args *a, const struct sqz_gpu_node *node, float *out,
                                   void *stream)
{
    if (a->ranks) return attend_shared(a, node, out, stream);
    enum sqz_status status = take(node, stream);
    if (status == SQZ_OK) status = attend(a, stream);
    if (status != SQZ_OK) return status;
    return give(out, a->out, (size_t)node->n_tokens * node->n_head, node->head_dim, node->padded_dim, stream);
}

/* Whether a call's arrays go on where the first one has had `sequence` sequences. */
static bool goes_on(const struct sqz_cuda_attend_args *a, const struct sqz_cuda_attend_args *first, size_t sequence)
{
    const struct sqz_layer_shape *s = &first->layer->shape;
    const size_t row = sequence * s->n_head * s->head_dim * 2;
    return a->n_tokens == 1 && !a->together && a->users && a->users == first->users + sequence &&
           a->queries == (const char *)first->queries + row && a->out == (char *)first->out + row &&
           a->n_retained == first->n_retained + sequence * s->n_head_kv &&
           a->read == first->read + sequence * s->n_head_kv;
}

static size_t several_workspace_bytes(const struct sqz_cuda_attend_args *calls, size_t n)
{
    size_t bytes = 0, sequence = 0;
    for (size_t i = 0; i < n; i++) {
        if (!goes_on(&calls[i], calls, sequence)) return 0;
        sequence += calls[i].n_sequences;
        bytes += workspace_bytes(&calls[i]);
    }
    return bytes;
}

/* Refused where SQUEEZE_FAKE_APART is set. */
static enum sqz_status attend_several(const struct sqz_cuda_attend_args *calls, size_t n,
                                      const struct sqz_gpu_node *node, float *out, void *stream)
{
    const size_t bytes = several_workspace_bytes(calls, n);
    if (!bytes || getenv("SQUEEZE_FAKE_APART")) return SQZ_ERROR_UNSUPPORTED;
    if (calls->workspace_bytes < bytes) return SQZ_ERROR_ARGUMENT;
    enum sqz_status status = take(node, stream);
    for (size_t i = 0; i < n && status == SQZ_OK; i++) status = attend(&calls[i], stream);
    if (status != SQZ_OK) return status;
    return give(out, calls->out, (size_t)node->n_tokens * node->n_head, node->head_dim, node->padded_dim, stream);
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

/* n: a multiple of 8. Sums of every eighth, which compilers make vectors of. */
static double dot_of_eights(const float *a, const float *b, size_t n)
{
    double sums[8] = {0};
    for (size_t i = 0; i < n; i += 8)
        for (size_t j = 0; j < 8; j++) sums[j] += (double)a[i + j] * (double)b[i + j];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

static enum sqz_status product(void *multiplier, const struct sqz_gpu_product *a, void *stream)
{
    float *row = a->workspace;
    if (!multiplier || !stream || a->workspace_bytes < product_workspace_bytes(a)) return SQZ_ERROR_ARGUMENT;
    for (size_t o = 0; o < a->n_out; o++) {
        for (size_t i = 0; i < a->n_in / 8; i++)
            sqz_weights_eight(a->type, a->weights, o * a->n_in / 8 + i, row + 8 * i);
        for (size_t t = 0; t < a->n_tokens; t++)
            a->out[t * a->n_out + o] = (float)dot_of_eights(row, a->in + t * a->n_in, a->n_in);
    }
    return lost() ? SQZ_ERROR_INTERNAL : SQZ_OK;
}

static size_t projections_workspace_bytes(const struct sqz_gpu_projections *a)
{
    const struct sqz_weights_block block = sqz_weights_block_of(a->type);
    double n = 0; /* small ones, as above */
    for (uint32_t k = 0; k < a->n_matrices; k++) n = fmax(n, (double)a->n_tokens * a->n_in * a->matrices[k].n_out);
    const bool good = block.n && a->n_in % block.n == 0 && a->n_tokens && a->n_tokens <= SQZ_MOST_PROJECTED && n < 4e6;
    return good ? (2 + a->n_tokens) * a->n_in * sizeof(float) : 0;
}

/* One token's, times the norm's weights, to `to`. */
static void normalise(const struct sqz_gpu_projections *a, const float *in, float *to)
{
    const double squares = dot_of_eights(in, in, a->n_in);
    const double by = 1 / sqrt(squares / a->n_in + (double)a->norm_epsilon);
    for (size_t i = 0; i < a->n_in; i++) to[i] = (float)((double)in[i] * by * (double)a->norm[i]);
}

static void row_of(const struct sqz_gpu_projections *a, uint32_t k, size_t o, float *row)
{
    for (size_t i = 0; i < a->n_in / 8; i++)
        sqz_weights_eight(a->type, a->matrices[k].weights, o * a->n_in / 8 + i, row + 8 * i);
}

static enum sqz_status project(const struct sqz_gpu_projections *a, void *stream)
{
    if (!stream || a->workspace_bytes < projections_workspace_bytes(a)) return SQZ_ERROR_ARGUMENT;
    float *const row = a->workspace, *const other = row + a->n_in, *const normalised = other + a->n_in;
    for (size_t t = 0; t < a->n_tokens && a->norm; t++) normalise(a, a->in + t * a->n_in, normalised + t * a->n_in);
    const float *const in = a->norm ? normalised : a->in;
    for (uint32_t k = 0; k < (a->gated ? 1 : a->n_matrices); k++)
        for (size_t o = 0; o < a->matrices[k].n_out; o++) {
            const float *const add = a->matrices[k].add;
            row_of(a, k, o, row);
            if (a->gated) row_of(a, 1, o, other);
            for (size_t t = 0; t < a->n_tokens; t++) {
                double x = dot_of_eights(row, in + t * a->n_in, a->n_in);
                if (a->gated) x = x / (1 + exp(-x)) * dot_of_eights(other, in + t * a->n_in, a->n_in);
                if (add) x += (double)add[t * a->matrices[k].add_stride + o];
                a->matrices[k].out[t * a->matrices[k].n_out + o] = (float)x;
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
    .get = get,
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
    .several_workspace_bytes = several_workspace_bytes,
    .attend_several = attend_several,
    .create_multiplier = create_multiplier,
    .free_multiplier = free,
    .product_workspace_bytes = product_workspace_bytes,
    .product = product,
    .projections_workspace_bytes = projections_workspace_bytes,
    .project = project,
    .widen = widen,
    .causal_workspace_bytes = causal_workspace_bytes,
    .causal = causal,
    .build_workspace_bytes = build_workspace_bytes,
    .build = build,
    .count_workspace_bytes = count_workspace_bytes,
    .count_layer = count_layer,
    .plane_index_bytes = plane_index_bytes,
    .plane_index = plane_index,
    .connect = connect,
    .mailbox_bytes = mailbox_bytes,
    .merge = merge,
    .user_planes_bytes = user_planes_bytes,
    .flush = flush,
    .move_user_planes = move_user_planes,
};

const struct sqz_gpu_calls *sqz_gpu_calls(void)
{
    return &table;
}
