/* The largest of many; largest.h. */
#include "largest.h"

#include <string.h>

/* The k-th largest of n numbers, 1 <= k <= n, which are reordered: quickselect with the middle one as pivot. */
static float kth_largest(float *x, size_t n, size_t k)
{
    size_t low = 0, high = n - 1;
    while (low < high) {
        const float pivot = x[low + (high - low) / 2];
        size_t i = low, j = high;
        for (;;) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i >= j) break;
            const float swap = x[i];
            x[i++] = x[j];
            x[j--] = swap;
        }
        if (k - 1 <= j) /* [low, j] holds the larger ones */
            high = j == high ? j - 1 : j;
        else low = j + 1;
    }
    return x[k - 1];
}

void sqz_list_largest(uint32_t *list, const float *scores, float *copy, size_t n, size_t k)
{
    memcpy(copy, scores, n * sizeof *copy);
    const float limit = kth_largest(copy, n, k);
    size_t n_equal = k, n_listed = 0; /* how many of the scores that equal the limit belong to the k */
    for (size_t i = 0; i < n; i++) n_equal -= scores[i] > limit;
    for (size_t i = 0; i < n && n_listed < k; i++) {
        if (scores[i] > limit) {
            list[n_listed++] = (uint32_t)i;
        } else if (scores[i] == limit && n_equal > 0) {
            list[n_listed++] = (uint32_t)i;
            n_equal--;
        }
    }
}
