/* The buffers of sqz_attend() and what both of its ways need, see attend_job.h. */
#include "attend_job.h"

#include <math.h>
#include <string.h>

#include "kernels.h"

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

size_t sqz_job_dense_tokens(const struct sqz_layer_shape *shape)
{
    const size_t n = SQZ_DENSE_ROWS / (shape->n_head / shape->n_head_kv);
    return n < 1 ? 1 : n < SQZ_MAX_BLOCK_TOKENS ? n : SQZ_MAX_BLOCK_TOKENS;
}

struct sqz_job_sizes sqz_job_sizes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens,
                                   int n_threads)
{
    struct sqz_job_sizes sizes;
    sizes.group = layer->shape.n_head / layer->shape.n_head_kv;
    sizes.rows = sizes.group * max_size(max_block_tokens, sqz_job_dense_tokens(&layer->shape));
    sizes.integer_rows = sizes.group;
    if (sqz_row_is_planes(layer->keys.type)) {
        const size_t few = SQZ_FEW_TOKENS * sizes.group;
        sizes.integer_rows = max_size(sizes.group, few < SQZ_DENSE_ROWS ? few : SQZ_DENSE_ROWS);
    }
    sizes.n_jobs = max_size(layer->shape.n_head_kv, (size_t)n_threads);
    sizes.max_clusters = layer->n_levels ? layer->level[0].n_clusters : 0;
    sizes.lookup_bytes = layer->n_levels ? sqz_lookup_workspace_bytes(layer, sizes.group * max_block_tokens) : 0;
    sizes.logits_stride = max_size(max_size(layer->n_levels ? layer->n_fixed : 0, max_user_rows), SQZ_CLAIM_ROWS);
    /* Of ranges that are whole clusters, or with codes single keys. */
    sizes.max_pieces = layer->n_rows / SQZ_CLAIM_ROWS + sizes.max_clusters + 2;
    if (layer->codes.n_words) sizes.max_pieces = layer->n_rows + 2;
    return sizes;
}

void sqz_job_carve(struct sqz_arena *arena, struct sqz_job *job, const struct sqz_job_sizes *sizes, size_t d)
{
    job->queries = sqz_arena_take(arena, sizes->rows, d, sizeof(float));
    job->norms = sqz_arena_take(arena, sizes->rows, 1, sizeof(float));
    job->quantised = sqz_i16_queries_take(arena, sizes->integer_rows, d);
    job->turned = sqz_i16_queries_take(arena, sizes->integer_rows, d);
    job->integer_rows = sizes->integer_rows;
    job->base = sqz_arena_take(arena, sizes->rows, 1, sizeof(float));
    job->reference = sqz_arena_take(arena, sizes->rows, 1, sizeof(float));
    job->pieces = sqz_arena_take(arena, sizes->max_pieces, 1, sizeof(struct sqz_range));
    job->lookup = sqz_arena_take(arena, sizes->lookup_bytes, 1, 1);
}

struct sqz_softmax sqz_job_carve_state(struct sqz_arena *arena, size_t rows, size_t d)
{
    struct sqz_softmax state = {rows, d, NULL, NULL, NULL};
    state.out = sqz_arena_take(arena, rows, d, sizeof(float));
    state.maximum = sqz_arena_take(arena, rows, 1, sizeof(float));
    state.sum = sqz_arena_take(arena, rows, 1, sizeof(float));
    return state;
}

/* Room for n rows of any type. */
static struct sqz_row_buffer carve_rows(struct sqz_arena *arena, size_t n, size_t d)
{
    struct sqz_row_buffer buffer;
    buffer.data = sqz_arena_take(arena, n, d, sizeof(uint16_t));
    buffer.scale = sqz_arena_take(arena, n, 1, sizeof(float));
    return buffer;
}

void sqz_job_carve_scratch(struct sqz_arena *arena, struct sqz_job_scratch *s, const struct sqz_job_sizes *sizes,
                           const struct sqz_layer_shape *shape)
{
    const size_t d = shape->head_dim, tile = SQZ_TILE_ROWS;
    s->logits = sqz_arena_take(arena, sizes->group, sizes->logits_stride, sizeof(float));
    s->index = sqz_arena_take(arena, SQZ_LISTED_ROWS, 1, sizeof(uint32_t));
    s->tile.logits = sqz_arena_take(arena, sizes->rows, tile, sizeof(float));
    s->tile.keys = sqz_arena_take(arena, tile, d, sizeof(float));
    s->tile.values = sqz_arena_take(arena, tile, d, sizeof(float));
    s->gather_keys = carve_rows(arena, tile, d);
    s->gather_values = carve_rows(arena, tile, d);
    s->first = sqz_arena_take(arena, sizes->rows, 1, sizeof(uint32_t));
    s->last = sqz_arena_take(arena, sizes->rows, 1, sizeof(uint32_t));
    s->state = sqz_job_carve_state(arena, sizes->rows, d);
    s->slot = sqz_job_carve_state(arena, sizes->rows, d);
}

/* Oldest position that a token's window lets it see. The token itself stands at context + user - n_tokens + token. */
static size_t oldest_position(const struct sqz_attend_call *c, size_t token)
{
    const size_t end = c->n_context_tokens + c->n_user + token + 1, before = c->n_tokens + c->layer->n_window_tokens;
    return end > before ? end - before : 0;
}

size_t sqz_job_first_row(const struct sqz_attend_call *c, size_t token)
{
    const struct sqz_layer *layer = c->layer;
    if (!layer->sliding_window) return 0;
    const size_t row0 = c->n_context_tokens - layer->n_rows; /* position of row 0 */
    const size_t oldest = oldest_position(c, token);
    if (oldest <= row0) return 0;
    return oldest - row0 < layer->n_rows ? oldest - row0 : layer->n_rows;
}

size_t sqz_job_first_user_row(const struct sqz_attend_call *c, size_t token)
{
    if (!c->layer->sliding_window) return 0;
    const size_t oldest = oldest_position(c, token);
    return oldest > c->n_context_tokens ? oldest - c->n_context_tokens : 0;
}

size_t sqz_job_last_user_row(const struct sqz_attend_call *c, size_t token)
{
    return c->n_user ? c->n_user - c->n_tokens + token + 1 : 0;
}

size_t sqz_job_place(const struct sqz_attend_call *c, size_t token)
{
    return c->joint ? c->joint[token].at : token;
}

static void gather_queries(const struct sqz_attend_call *c, struct sqz_job *job, size_t n_tokens)
{
    const size_t d = c->layer->shape.head_dim, group = c->layer->shape.n_head / c->layer->shape.n_head_kv;
    for (size_t r = 0; r < n_tokens * group; r++) {
        const float *q = c->queries + sqz_job_place(c, job->token + r / group) * c->query_token_stride +
                         (job->head * group + r % group) * c->query_head_stride;
        float norm = 0;
        for (size_t i = 0; i < d; i++) norm += q[i] * q[i];
        memcpy(job->queries + r * d, q, d * sizeof *q);
        job->norms[r] = norm;
    }
}

void sqz_job_set(const struct sqz_attend_call *c, struct sqz_job *job, size_t n_tokens)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    gather_queries(c, job, n_tokens);
    job->plan = sqz_head_plan_at(layer, job->head, c->budget, c->log_offset);
    job->rows = (struct sqz_row_queries){.f32 = job->queries,
                                         .i16 = job->quantised,
                                         .n = n_tokens * group,
                                         .scale = layer->shape.scale,
                                         .turned = job->turned};
    job->keys = sqz_rows_of_head(&layer->keys, layer->n_rows, d, job->head);
    job->values = sqz_rows_of_head(&layer->values, layer->n_rows, d, job->head);
    if (c->upper) {
        job->keys = sqz_rows_upper(&job->keys);
        job->values = sqz_rows_upper(&job->values);
    }
    job->retained = job->keys;
    job->centroid_rows_read = job->code_bytes_read = job->codes_read = job->value_centroid_bytes_read = 0;
    job->key_rows_read = job->key_bytes_read = 0;
}

void sqz_job_count_keys(const struct sqz_attend_call *c, struct sqz_job *job, const struct sqz_rows *keys, size_t first,
                        size_t n)
{
    job->key_rows_read += n;
    job->key_bytes_read += sqz_rows_bytes(keys, first, n, c->layer->shape.head_dim);
}

float sqz_job_elsewhere(const struct sqz_attend_call *c, const struct sqz_job *job, size_t r)
{
    const size_t n_head = c->layer->shape.n_head, group = n_head / c->layer->shape.n_head_kv;
    return c->elsewhere ? c->elsewhere[(job->token + r / group) * n_head + job->head * group + r % group] : -INFINITY;
}

void sqz_job_announce(const struct sqz_layer *layer, const struct sqz_job *job)
{
    enum { NEAR_BYTES = 4096 }; /* rows this near each other are announced as one: of one page, more often than not */
    const struct sqz_range *ranges = job->selection.ranges;
    const size_t d = layer->shape.head_dim, n = job->selection.n_ranges;
    const size_t near_rows = NEAR_BYTES / sqz_row_data_bytes(layer->values.type, d);
    for (size_t i = 0; i < n; i++) {
        struct sqz_range range = ranges[i];
        while (i + 1 < n && ranges[i + 1].begin - range.end < near_rows) range.end = ranges[++i].end;
        sqz_rows_announce(&job->retained, range.begin, range.end - range.begin, d, layer->will_read);
        sqz_rows_announce(&job->values, range.begin, range.end - range.begin, d, layer->will_read);
    }
}

bool sqz_job_is_dense(const struct sqz_attend_call *c, const struct sqz_head_plan *plan)
{
    return c->layer->n_levels == 0 || plan->log_threshold == -INFINITY;
}

float sqz_job_value_skip(const struct sqz_layer *layer, const struct sqz_head_plan *plan)
{
    return layer->value_skip ? sqz_value_limit(plan->log_threshold) : 0.0f;
}

float sqz_job_reference(const struct sqz_layer *layer, const struct sqz_selection *s, size_t r, float known_maximum)
{
    const float tail =
        layer->tail ? sqz_kernels_get()->max(s->pruned_logit + r * s->pruned_stride, s->n_pruned) : -INFINITY;
    const float largest = fmaxf(known_maximum + SQZ_EXPONENT_SLACK, tail);
    return largest == -INFINITY ? s->log_total[r] : fminf(s->log_total[r], largest);
}
