/* Small linear fits whose coefficients cannot be negative, such as times. */
#ifndef SQZ_ANALYSIS_LEAST_SQUARES_H
#define SQZ_ANALYSIS_LEAST_SQUARES_H

#include <stddef.h>

enum { LEAST_SQUARES_COLUMNS = 16 };

/* The x >= 0 that brings a x nearest to b, a [rows][columns]; columns up to LEAST_SQUARES_COLUMNS. A column of zeros gets
 * 0. Columns may differ in scale by any factor. */
void least_squares(double *x, const double *a, const double *b, size_t rows, size_t columns);

#endif
