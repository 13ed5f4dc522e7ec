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
            const float reach = sqz_reach(x[i], width, root[i], b->log_total[r]);
            b->score[i] = reach > b->score[i] ? reach : b->score[i];
        }
    }
}

/* Lists the opened clusters, with their logits in b->corrected, and writes the closed ones to the pruned list; known
 * becomes the share of Z that those hold. Returns how many are opened. */
static size_t open_clusters(struct sqz_selection *selection, struct sqz_lookup_buffers *b,
                            const struct sqz_layer *layer, uint32_t head, const struct sqz_head_plan *plan,
                            const float *squared_norms, size_t n_query_rows, size_t n, float *known)
{
    const uint32_t *offset = layer->level[0].offset + (size_t)head * (layer->level[0].n_clusters + 1);
    const float *score = b->score, *keys = b->keys, *variance = b->variance, limit = plan->log_threshold;
    const size_t first_pruned = selection->n_pruned;
    float *closed_keys = b->key_score;                   /* more keys than clusters, and free until they are scored */
    uint32_t *opened = b->opened, *closed = b->key_list; /* likewise */
    size_t n_opened = 0, n_closed = 0;
    for (size_t i = 0; i < n; i++) closed_keys[i] = score[i] < limit ? keys[i] : 0.0f;
    for (size_t i = 0; i < n; i++) { /* both are written, one counts: no branch to guess */
        const bool is_closed = score[i] < limit;
        closed[n_closed] = opened[n_opened] = (uint32_t)i;
        n_closed += is_closed;
        n_opened += !is_closed;
    }
    const size_t n_words = layer->codes.n_words, n_keys = layer->n_rows - layer->n_fixed;
    const uint32_t *words = layer->codes.words + (size_t)head * n_words * n_keys;
    for (size_t o = 0; o < n_opened; o++) {
        const uint32_t c = b->cluster[opened[o]];
        /* Short runs, too short for the hardware to see them coming: their two ends, which is all of most. */
        for (size_t w = 0; w < n_words; w++) {
            __builtin_prefetch(words + w * n_keys + offset[c], 0, 2);
            __builtin_prefetch(words + w * n_keys + offset[c + 1] - 1, 0, 2);
        }
        b->next[o] = (struct sqz_range){offset[c], offset[c + 1]};
        b->count[o] = offset[c + 1] - offset[c];
    }
    for (size_t i = 0; i < n_closed; i++) {
        b->pruned_level[first_pruned + i] = 0;
        b->pruned_cluster[first_pruned + i] = b->cluster[closed[i]];
    }
    for (size_t r = 0; r < n_query_rows; r++) {
        const float *logit = b->logit + r * b->stride;
        const float factor = sqz_spread_factor(1.0f, layer->shape.scale, layer->shape.head_dim, squared_norms[r]);
        float *base = b->corrected + r * b->stride;
        float *pruned_logit = b->pruned_logit + r * b->stride + first_pruned;
        float *pruned_keys = b->pruned_keys + r * b->stride + first_pruned;
        known[r] = sqz_kernels_get()->dot(closed_keys, base, n);
        for (size_t i = 0; i < n_closed; i++) {
            pruned_logit[i] = sqz_tail_logit(logit[closed[i]], factor, variance[closed[i]], plan->tail_gain);
            pruned_keys[i] = keys[closed[i]];
        }
        for (size_t o = 0; o < n_opened; o++) base[o] = logit[opened[o]];
    }
    selection->n_pruned += n_closed;
    return n_opened;
}

/* Estimates of the keys of opened clusters, side by side in key_weight. Returns how many keys. */
static size_t estimate_keys(struct sqz_lookup_buffers *b, const struct sqz_layer *layer, uint32_t head,
                            size_t n_query_rows, size_t n_opened)
{
    size_t n_keys = 0;
    sqz_kernels_get()->repeat(b->key_weight, b->key_stride, b->corrected, b->stride, n_query_rows, b->count, n_opened);
    for (size_t i = 0, end; i < n_opened; i = end) { /* a run of neighbours at a time */
        for (end = i + 1; end < n_opened && b->next[end].begin == b->next[end - 1].end;) end++;
        const size_t first = b->next[i].begin, n = b->next[end - 1].end - first;
        sqz_code_logits(b->key_weight + n_keys, b->key_stride, b->tables, n_query_rows, layer, head, first, n);
        n_keys += n;
    }
    return n_keys;
}

/* key_weight becomes probabilities under the new total, key_score their mean or largest. */
static void weigh_keys(struct sqz_lookup_buffers *b, const struct sqz_layer *layer, size_t n_query_rows,
                       const float *known, size_t n_keys)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    memset(b->key_score, 0, n_keys * sizeof *b->key_score);
    for (size_t r = 0; r < n_query_rows; r++) {
        float *weight = b->key_weight + r * b->key_stride;
        const float shift = fmaxf(k->max(weight, n_keys), b->log_total[r]);
        const float outside = known[r] * expf(b->log_total[r] - shift) + expf(b->known_mass[r] - shift);
        const float total = outside + k->exp_sum(weight, n_keys, shift);
        b->log_total[r] = shift + logf(total);
        if (layer->group == SQZ_GROUP_MAX) {
            k->scale_max(b->key_score, weight, 1.0f / total, n_keys);
        } else {
            k->scale(weight, 1.0f / total, n_keys);
            k->add_scaled(b->key_score, b->key_score, 1.0f / (float)n_query_rows, weight, n_keys);
        }
    }
}

/* Retains the keys that reach the threshold; their weights become 0. b->left: keys of each opened cluster that are
 * pruned. */
static void retain_keys(struct sqz_selection *selection, struct sqz_lookup_buffers *b, uint32_t first_row,
                        float threshold, size_t n_query_rows, size_t n_opened, size_t n_keys)
{
    const size_t n_listed = sqz_kernels_get()->list_at_least(b->key_list, b->key_score, n_keys, threshold);
    size_t at = 0, opened = 0; /* where the keys of an opened cluster begin, and which */
    memcpy(b->left, b->count, n_opened * sizeof *b->left);
    for (size_t i = 0; i < n_listed; i++) {
        const uint32_t key = b->key_list[i];
        while (key - at >= b->count[opened]) at += b->count[opened++];
        const uint32_t row = first_row + b->next[opened].begin + (uint32_t)(key - at);
        sqz_push_range(b->key_ranges, &selection->n_ranges, row, row + 1);
        for (size_t r = 0; r < n_query_rows; r++) b->key_weight[r * b->key_stride + key] = 0;
        b->left[opened]--;
    }
    selection->n_retained += n_listed;
    selection->ranges = b->key_ranges;
}

/* What opened clusters weigh without their retained keys, as logits: weights are shares of Z. A logit bounds the
 * reference of weights: Z itself may be far off, the tail then is as well. */
static void prune_keys(struct sqz_selection *selection, struct sqz_lookup_buffers *b, float gain, size_t n_query_rows,
                       size_t n_opened)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t first_pruned = selection->n_pruned;
    size_t n = 0;
    k->segment_sums(b->corrected, b->stride, b->key_weight, b->key_stride, n_query_rows, b->count, n_opened);
    for (size_t o = 0; o < n_opened; o++) {
        if (b->left[o] == 0) continue;
        b->pruned_level[first_pruned + n] = 0;
        b->pruned_cluster[first_pruned + n] = b->cluster[b->opened[o]];
        b->opened[n++] = (uint32_t)o; /* n is at most o */
    }
    for (size_t r = 0; r < n_query_rows; r++) {
        float *logit = b->pruned_logit + r * b->stride + first_pruned;
        for (size_t p = 0; p < n; p++) {
            logit[p] = b->corrected[r * b->stride + b->opened[p]];
            b->pruned_keys[r * b->stride + first_pruned + p] = 1.0f;
        }
        k->log_shifted(logit, b->log_total[r] + gain, n);
    }
    selection->n_pruned += n;
}

void sqz_lookup_keys(struct sqz_selection *selection, struct sqz_lookup_buffers *b, const struct sqz_layer *layer,
                     uint32_t head, const struct sqz_head_plan *plan, const float *squared_norms, size_t n_query_rows,
                     size_t n)
{
    float known[SQZ_MAX_GROUP_QUERIES];
    const size_t n_opened = open_clusters(selection, b, layer, head, plan, squared_norms, n_query_rows, n, known);
    const size_t n_keys = estimate_keys(b, layer, head, n_query_rows, n_opened);
    selection->n_codes_read = n_keys;
    selection->code_bytes_read = n_keys * sqz_code_key_bytes(&layer->codes) + sqz_code_head_bytes(layer);
    weigh_keys(b, layer, n_query_rows, known, n_keys);
    retain_keys(selection, b, layer->n_fixed, expf(plan->log_threshold), n_query_rows, n_opened, n_keys);
    prune_keys(selection, b, plan->tail_gain, n_query_rows, n_opened);
}
