/*
 * What calibration counts of one KV head (calibrate.c, cuda/count_layer.cu), and
 * what a curve is made of: everything by the point of the grid up to which it is
 * read or kept. C and CUDA C compile this file.
 */
#ifndef SQZ_LIB_CURVE_SUMS_H
#define SQZ_LIB_CURVE_SUMS_H

#include "method.h"

/* Slot t + 1 is point t, slot 0 what is read at no point; the last one ends histograms of differences. */
enum { SQZ_CURVE_SLOTS = SQZ_CURVE_POINTS + 2 };

struct sqz_curve_sums {
    double keys[SQZ_CURVE_SLOTS];            /* retained */
    double codes[SQZ_CURVE_SLOTS];           /* keys of opened clusters */
    double values[SQZ_CURVE_SLOTS];          /* read beside their keys */
    double value_centroids[SQZ_CURVE_SLOTS]; /* differences: one more from a slot on, one fewer from another */
    double centroids[SQZ_CURVE_SLOTS];       /* of opened parents */
    double lost[SQZ_CURVE_SLOTS], true_mass[SQZ_CURVE_SLOTS], estimated_mass[SQZ_CURVE_SLOTS];
    double fixed_values[SQZ_CURVE_SLOTS];
    double n_queries;
};

#endif
