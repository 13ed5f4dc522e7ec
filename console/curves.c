/* Calibrated curves at a budget; curves.h describes them. */
#include "curves.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

void curve_set_create(struct curve_set *set, const struct sqz_context *context, uint32_t first, uint32_t last)
{
    struct sqz_context_info info;
    sqz_context_get_info(context, &info);
    memset(set, 0, sizeof *set);
    set->per_head = info.squeeze.per_head;
    set->heads = calloc((size_t)(last - first) * info.n_head_kv + 1, sizeof *set->heads);
    if (!set->heads) die("out of memory");
    for (uint32_t i = first; i < last; i++) {
        const struct sqz_layer *layer = sqz_context_layer(context, i);
        struct sqz_layer_info shape;
        sqz_layer_get_info(layer, &shape);
        double kv_bytes = (double)shape.n_rows * shape.shape.head_dim * 2 * sizeof(uint16_t);
        for (uint32_t k = 0; k < shape.shape.n_head_kv; k++) {
            struct curve_head head = {.kv_bytes = kv_bytes, .dense_share = (double)shape.dense_share};
            head.n = sqz_layer_curve(layer, k, &head.log_threshold, &head.share, &head.lost_mass);
            if (head.n == 0 || set->n_heads == (size_t)(last - first) * info.n_head_kv)
                set->dense_bytes += kv_bytes * (double)shape.dense_share;
            else set->heads[set->n_heads++] = head;
        }
    }
}

void curve_set_free(struct curve_set *set)
{
    free(set->heads);
    memset(set, 0, sizeof *set);
}

/* A place on a curve: between points `index` and index + 1, `part` of the way. */
struct place {
    size_t index;
    double part;
};

static double value_at(const float *values, size_t n, struct place place)
{
    double low = values[place.index < n ? place.index : n - 1];
    double high = values[place.index + 1 < n ? place.index + 1 : n - 1];
    return low + (high - low) * place.part;
}

/* Mean share of all heads at one point (their curves have the same thresholds then), or that of one head. */
static double share_at(const struct curve_set *set, const struct curve_head *head, size_t i)
{
    double sum = 0.0;
    if (head) return head->share[i];
    for (size_t h = 0; h < set->n_heads; h++) sum += set->heads[h].share[i < set->heads[h].n ? i : set->heads[h].n - 1];
    return sum / (double)set->n_heads;
}

/* Where the falling share meets the budget; the ends where it never does. */
static struct place find_budget(const struct curve_set *set, const struct curve_head *head, size_t n, double budget)
{
    struct place place = {0, 0.0};
    double before = share_at(set, head, 0);
    for (size_t i = 1; i < n && before > budget; i++) {
        double here = share_at(set, head, i);
        place.index = i;
        if (here <= budget) {
            place.index = i - 1;
            place.part = before > here ? (before - budget) / (before - here) : 1.0;
        }
        before = here;
    }
    return place;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

bool curve_at_budget(const struct curve_set *set, double budget, struct curve_point *point)
{
    memset(point, 0, sizeof *point);
    point->read_bytes = set->dense_bytes;
    if (set->n_heads == 0) return false;
    double *lost = malloc(set->n_heads * sizeof *lost);
    if (!lost) die("out of memory");
    struct place common = find_budget(set, set->per_head ? &set->heads[0] : NULL, set->heads[0].n, budget);
    for (size_t h = 0; h < set->n_heads; h++) {
        const struct curve_head *head = &set->heads[h];
        struct place place = set->per_head ? find_budget(set, head, head->n, budget) : common;
        double share = budget >= 1.0 ? head->dense_share : value_at(head->share, head->n, place);
        lost[h] = budget >= 1.0 ? 0.0 : value_at(head->lost_mass, head->n, place);
        point->log_threshold += budget >= 1.0 ? -INFINITY : value_at(head->log_threshold, head->n, place);
        point->share += share;
        point->lost_mean += lost[h];
        point->read_bytes += share * head->kv_bytes;
    }
    double n = (double)set->n_heads;
    point->log_threshold /= n;
    point->share /= n;
    point->lost_mean /= n;
    qsort(lost, set->n_heads, sizeof *lost, compare_doubles);
    point->lost_low = lost[(size_t)(0.1 * (n - 1) + 0.5)];
    point->lost_high = lost[(size_t)(0.9 * (n - 1) + 0.5)];
    free(lost);
    return true;
}
