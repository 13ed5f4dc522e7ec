/* Centroids from assignments, and points for clusters that have none. */
#include "kmeans_update.h"

#include <string.h>

void sqz_kmeans_sort(struct kmeans *km)
{
    uint32_t *start = km->start;
    memset(start, 0, (km->n_clusters + 1) * sizeof *start);
    for (size_t p = 0; p < km->n; p++) start[km->assignment[p] + 1]++;
    for (size_t c = 0; c < km->n_clusters; c++) start[c + 1] += start[c];
    for (size_t p = 0; p < km->n; p++) km->order[start[km->assignment[p]]++] = (uint32_t)p;
    /* Every start has become the next one's: shift back. */
    memmove(start + 1, start, km->n_clusters * sizeof *start);
    start[0] = 0;
}

void sqz_kmeans_sum(const struct kmeans *km, size_t c, double *sum)
{
    memset(sum, 0, km->dim * sizeof *sum);
    for (size_t k = km->start[c]; k < km->start[c + 1]; k++)
        sqz_kmeans_add_row(sum, km->x + km->order[k] * km->dim, km->dim);
}

void sqz_kmeans_set_centroid(struct kmeans *km, size_t c, const double *sum, size_t count)
{
    float *centroid = km->centroid + c * km->dim;
    const double share = 1.0 / (double)count;
    for (size_t i = 0; i < km->dim; i++) centroid[i] = (float)(sum[i] * share);
    if (km->cosine) sqz_kmeans_normalise(centroid, km->dim);
    km->bias[c] = sqz_kmeans_bias(km, centroid);
}

/* ---- Empty clusters ------------------------------------------------------------ */

/* Farther first, then the smaller index. */
static bool farther(struct kmeans_far a, struct kmeans_far b)
{
    return a.cost > b.cost || (a.cost == b.cost && a.point < b.point);
}

static void sift_down(struct kmeans_far *heap, size_t n, size_t i)
{
    const struct kmeans_far moved = heap[i];
    for (size_t child = 2 * i + 1; child < n; child = 2 * i + 1) {
        child += child + 1 < n && farther(heap[child + 1], heap[child]);
        if (!farther(heap[child], moved)) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = moved;
}

size_t sqz_kmeans_repair(struct kmeans *km)
{
    struct kmeans_far *heap = km->heap;
    uint32_t *size = km->start;
    size_t n_empty = 0, n_heap = km->n;
    memset(size, 0, km->n_clusters * sizeof *size);
    for (size_t p = 0; p < km->n; p++) size[km->assignment[p]]++;
    for (size_t c = 0; c < km->n_clusters; c++) n_empty += size[c] == 0;
    if (n_empty == 0) return 0;
    for (size_t p = 0; p < km->n; p++) heap[p] = (struct kmeans_far){sqz_kmeans_cost(km, p, km->score[p]), (uint32_t)p};
    for (size_t i = n_heap / 2; i-- > 0;) sift_down(heap, n_heap, i);
    size_t empty = 0;
    for (size_t left = n_empty; left > 0 && n_heap > 0;) {
        const uint32_t p = heap[0].point;
        heap[0] = heap[--n_heap];
        sift_down(heap, n_heap, 0);
        if (size[km->assignment[p]] < 2) continue;
        while (size[empty] != 0) empty++;
        size[km->assignment[p]]--;
        size[empty] = 1;
        km->assignment[p] = (uint32_t)empty;
        left--;
    }
    return n_empty;
}
