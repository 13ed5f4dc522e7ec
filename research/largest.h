/* The largest of many scores. */
#ifndef SQZ_RESEARCH_LARGEST_H
#define SQZ_RESEARCH_LARGEST_H

#include <stddef.h>
#include <stdint.h>

/* Writes the indices of the k largest of n scores to list, ascending; of equal ones the first. 1 <= k <= n. copy: n
 * floats. */
void sqz_list_largest(uint32_t *list, const float *scores, float *copy, size_t n, size_t k);

#endif
