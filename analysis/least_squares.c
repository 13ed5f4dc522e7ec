/*
 * Least squares without negative coefficients, least_squares.h: each
 * coefficient in turn becomes the best one there is beside the others, or 0
 * (coordinate descent, which reaches the minimum of a convex sum of squares).
 * Few rows and columns, so many turns cost nothing.
 */
#include "least_squares.h"

#include <math.h>

enum { TURNS_MAX = 200000 };
static const double enough = 1e-13; /* largest change of a turn, relative to the largest coefficient */

void least_squares(double *x, const double *a, const double *b, size_t rows, size_t columns)
{
    double gram[LEAST_SQUARES_COLUMNS][LEAST_SQUARES_COLUMNS], right[LEAST_SQUARES_COLUMNS];
    double scale[LEAST_SQUARES_COLUMNS], y[LEAST_SQUARES_COLUMNS] = {0}; /* of columns of length 1 */
    for (size_t j = 0; j < columns; j++) {
        double square = 0;
        for (size_t r = 0; r < rows; r++) square += a[r * columns + j] * a[r * columns + j];
        scale[j] = square > 0 ? 1 / sqrt(square) : 0;
    }
    for (size_t j = 0; j < columns; j++) {
        right[j] = 0;
        for (size_t r = 0; r < rows; r++) right[j] += scale[j] * a[r * columns + j] * b[r];
        for (size_t k = 0; k < columns; k++) {
            gram[j][k] = 0;
            for (size_t r = 0; r < rows; r++)
                gram[j][k] += scale[j] * a[r * columns + j] * scale[k] * a[r * columns + k];
        }
    }
    for (int turn = 0; turn < TURNS_MAX; turn++) {
        double change = 0, largest = 0;
        for (size_t j = 0; j < columns; j++) {
            double rest = right[j];
            for (size_t k = 0; k < columns; k++) rest -= k == j ? 0 : gram[j][k] * y[k];
            const double next = scale[j] > 0 ? fmax(0, rest) : 0; /* gram[j][j] is 1 */
            change = fmax(change, fabs(next - y[j]));
            largest = fmax(largest, next);
            y[j] = next;
        }
        if (!(change > enough * largest)) break;
    }
    for (size_t j = 0; j < columns; j++) x[j] = y[j] * scale[j];
}
