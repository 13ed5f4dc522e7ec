/*
 * From clusters to single keys: which clusters may hold a key above the
 * threshold, what their codes say of each key, which keys are retained, and
 * what the others of a cluster weigh together.
 *
 *   opened     max over queries of  scale q.C + z dev_q sqrt(s) - log Z  reaches log T, or the cluster's score does
 *   estimate   e = scale q.C + what the key's codes add
 *   Z          exact mass of known rows + N exp(y) of clusters that stay closed + exp(e) of the keys of opened ones
 *   retained   mean (or largest) over queries of exp(e) / Z  reaches T
 */
#include "lookup_keys.h"

#include <math.h>
#include <string.h>

#include "kernels.h"

/* Sums that do not wait for one another, which the compiler turns into vectors. */
enum { LANES = 8 };

static float sum(const float *x, size_t n)
{
    float lane[LANES] = {0}, total = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (size_t j = 0; j < LANES; j++) lane[j] += x[i + j];
    }
    for (; i < n; i++) total += x[i];
    for (size_t j = 0; j < LANES; j++) total += lane[j];
    return total;
}

void sqz_lookup_reach(struct sqz_lookup_buffers *b, const struct sqz_head_plan *plan, uint32_t level,
                      size_t n_query_rows, size_t n)
{
    const float threshold = expf(plan->log_threshold);
    float *root = b->key_score; /* more keys than clusters, and free until they are scored */
    for (size_t i = 0; i < n; i++) root[i] = sqrtf(b->variance[i]);
    for (size_t i = 0; i < n; i++) b->score[i] = b->score[i] >= threshold ? plan->log_threshold : -INFINITY;
    for (size_t r = 0; r < n_query_rows; r++) {
        const float *x = b->logit + r * b->stride, width = sqz_open_deviations(level) * b->deviation[r];
        for (size_t i = 0; i < n; i++) {
            const float reach = x[i] + width * root[i] - b->log_total[r];
            b->score[i] = reach > b->score[i] ? reach : b->score[i];
        }
    }
}

/* Estimates of the keys of opened clusters, side by side in key_weight; b->next becomes their ranges of clusters'
 * entries. Returns how many keys. */
static size_t estimate_keys(struct sqz_lookup_buffers *b, const struct sqz_layer *layer, uint32_t head,
                            const struct sqz_head_plan *plan, size_t n_query_rows, size_t n, size_t *n_runs)
{
    const uint32_t *offset = layer->level[0].offset + (size_t)head * (layer->level[0].n_clusters + 1);
    size_t n_keys = 0, first_of_run = 0;
    *n_runs = 0;
    for (size_t i = 0; i < n; i++) {
        if (b->score[i] < plan->log_threshold) continue;
        const uint32_t c = b->cluster[i], begin = offset[c], end = offset[c + 1];
        if (*n_runs == 0 || b->next[*n_runs - 1].end != begin) first_of_run = n_keys;
        for (size_t r = 0; r < n_query_rows; r++) {
            float *weight = b->key_weight + r * b->key_stride + n_keys;
            const float logit = b->logit[r * b->stride + i];
            for (uint32_t k = 0; k < end - begin; k++) weight[k] = logit;
        }
        n_keys += end - begin;
        sqz_push_range(b->next, n_runs, begin, end);
        if (i + 1 < n && b->score[i + 1] >= plan->log_threshold && b->cluster[i + 1] == c + 1) continue;
        const struct sqz_range run = b->next[*n_runs - 1];
        sqz_code_logits(b->key_weight + first_of_run, b->key_stride, b->tables, n_query_rows, layer, head, run.begin,
                        run.end - run.begin);
    }
    return n_keys;
}

/* key_weight becomes probabilities under the new total, key_score their mean or largest. */
static void weigh_keys(struct sqz_lookup_buffers *b, const struct sqz_layer *layer, const struct sqz_head_plan *plan,
                       size_t n_query_rows, size_t n, size_t n_keys)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    memset(b->key_score, 0, n_keys * sizeof *b->key_score);
    for (size_t r = 0; r < n_query_rows; r++) {
        float *weight = b->key_weight + r * b->key_stride, *closed = b->corrected + r * b->stride;
        float known = 0;
        for (size_t i = 0; i < n; i++) known += b->score[i] < plan->log_threshold ? b->keys[i] * closed[i] : 0.0f;
        const float shift = fmaxf(k->max(weight, n_keys), b->shift[r]);
        known = known * expf(b->shift[r] - shift) + expf(b->known_mass[r] - shift);
        const float total = known + k->exp_sum(weight, n_keys, shift);
        b->log_total[r] = shift + logf(total);
        k->scale(weight, 1.0f / total, n_keys);
        if (layer->group == SQZ_GROUP_MAX) {
            for (size_t i = 0; i < n_keys; i++)
                b->key_score[i] = weight[i] > b->key_score[i] ? weight[i] : b->key_score[i];
        } else {
            k->add_scaled(b->key_score, b->key_score, 1.0f / (float)n_query_rows, weight, n_keys);
        }
    }
}

/* Retains the keys of an opened cluster that reach the threshold, whose first row is `row` and whose estimates stand
 * from `at` on; their weights become 0. Returns how many. */
static size_t retain_keys(struct sqz_selection *selection, struct sqz_lookup_buffers *b, float threshold,
                          size_t n_query_rows, uint32_t row, size_t n_keys, size_t at)
{
    const float *score = b->key_score + at;
    size_t retained = 0;
    for (size_t block = 0; block < n_keys; block += LANES) {
        const size_t n = n_keys - block < LANES ? n_keys - block : LANES;
        float largest = 0; /* as scores are, at least */
        for (size_t i = 0; i < n; i++) largest = score[block + i] > largest ? score[block + i] : largest;
        if (largest < threshold) continue;
        for (size_t i = block; i < block + n; i++) {
            if (!(score[i] >= threshold)) continue;
            sqz_push_range(b->key_ranges, &selection->n_ranges, row + (uint32_t)i, row + (uint32_t)i + 1);
            for (size_t r = 0; r < n_query_rows; r++) b->key_weight[r * b->key_stride + at + i] = 0;
            retained++;
        }
    }
    selection->n_retained += retained;
    return retained;
}

/* One opened cluster, as in retain_keys(): retains, and sums up the rest as one entry of the pruned list. */
static void select_keys(struct sqz_selection *selection, struct sqz_lookup_buffers *b, float threshold, float gain,
                        size_t n_query_rows, uint32_t cluster, uint32_t row, size_t n_keys, size_t at)
{
    if (retain_keys(selection, b, threshold, n_query_rows, row, n_keys, at) == n_keys) return;
    const size_t p = selection->n_pruned++;
    b->pruned_level[p] = 0;
    b->pruned_cluster[p] = cluster;
    for (size_t r = 0; r < n_query_rows; r++) {
        const float mass = gain * sum(b->key_weight + r * b->key_stride + at, n_keys);
        /* As a logit, which bounds the reference of weights: Z itself may be far off, the tail then is as well. */
        b->pruned_logit[r * b->stride + p] = mass > 0 ? b->log_total[r] + logf(mass < 1.0f ? mass : 1.0f) : -INFINITY;
        b->pruned_keys[r * b->stride + p] = 1.0f;
    }
}

void sqz_lookup_keys(struct sqz_selection *selection, struct sqz_lookup_buffers *b, const struct sqz_layer *layer,
                     uint32_t head, const struct sqz_head_plan *plan, const float *squared_norms, size_t n_query_rows,
                     size_t n)
{
    const size_t d = layer->shape.head_dim;
    const uint32_t *offset = layer->level[0].offset + (size_t)head * (layer->level[0].n_clusters + 1);
    const float variance_scale = layer->shape.scale * layer->shape.scale / (2.0f * (float)d);
    const float threshold = expf(plan->log_threshold), gain = expf(plan->tail_gain);
    size_t n_runs, at = 0;
    const size_t n_keys = estimate_keys(b, layer, head, plan, n_query_rows, n, &n_runs);
    selection->n_codes_read = n_keys;
    selection->code_bytes_read = n_keys * sqz_code_key_bytes(&layer->codes) + sqz_code_head_bytes(layer);
    weigh_keys(b, layer, plan, n_query_rows, n, n_keys);
    selection->ranges = b->key_ranges;
    for (size_t i = 0; i < n; i++) {
        const uint32_t c = b->cluster[i];
        if (b->score[i] >= plan->log_threshold) {
            select_keys(selection, b, threshold, gain, n_query_rows, c, layer->n_fixed + offset[c],
                        offset[c + 1] - offset[c], at);
            at += offset[c + 1] - offset[c];
            continue;
        }
        const size_t p = selection->n_pruned++;
        b->pruned_level[p] = 0;
        b->pruned_cluster[p] = c;
        for (size_t r = 0; r < n_query_rows; r++) {
            const float spread = variance_scale * squared_norms[r] * b->variance[i];
            b->pruned_logit[r * b->stride + p] = b->logit[r * b->stride + i] + spread + plan->tail_gain;
            b->pruned_keys[r * b->stride + p] = b->keys[i];
        }
    }
}
