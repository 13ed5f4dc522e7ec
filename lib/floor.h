/*
 * The floor: the least budget that buys something.
 *
 * Sinks, window, centroids and what the codes of a head need once are read at
 * any budget; of a short context they are a large share. A budget that leaves
 * nothing beside them leaves no key that a query chose, and is worse than a
 * window. So a budget buys room for chosen keys first:
 *   floor = (share read when nothing is chosen) + (chosen rows) / n
 * chosen rows: SQZ_FLOOR_FEWEST_ROWS at least, and as many more, up to
 * SQZ_FLOOR_MOST_ROWS, as bring the attention mass that the calibration
 * queries lost down to SQZ_FLOOR_LOST_MASS. Where that comes to more than
 * SQZ_FLOOR_DENSE everything is read: choosing would save no time.
 *
 * Measured in docs/method.md, as the four numbers are.
 */
#ifndef SQZ_LIB_FLOOR_H
#define SQZ_LIB_FLOOR_H

#include "layer.h"
#include "method.h"

/* Whether clusters can buy anything in a layer of so many rows under these options: not where sinks, window and the
 * fewest chosen rows alone come to more than SQZ_FLOOR_DENSE. The published rule is never asked. */
bool sqz_clusters_pay(size_t n_rows, const struct sqz_squeeze_options *options);

/* The floor of a context's layers, above 0, at most 1. 1 where no layer is clustered. Layers that are not, among others
 * that are, count for nothing: no budget changes what they read. The published rule has no floor of its own: then it is
 * what is read when nothing is chosen. */
float sqz_budget_floor(const struct sqz_layer *layers, size_t n_layers);

#endif
