/*
 * The two decompositions of small symmetric matrices that codes need, in double
 * precision: Cholesky's, and eigenvalues by Jacobi's rotations. Orders up to
 * 256; a library would be the only reason for lib/ to depend on one.
 */
#ifndef SQZ_LIB_SYMMETRIC_H
#define SQZ_LIB_SYMMETRIC_H

#include <stddef.h>

/* a [n][n], symmetric and positive definite, becomes L of a = L L^T, zeros above the diagonal. Where a is
 * singular but for rounding, a pivot is 1e-12 of the largest number and what stands below it is left out. */
void sqz_cholesky(double *a, size_t n);

/* Eigenvalues of a [n][n], symmetric and positive semidefinite (what rounding makes negative is 0), the largest first,
 * and their vectors as rows of vectors [n][n], both to 1e-7 of a. a is used up. */
void sqz_symmetric_eigen(double *values, double *vectors, double *a, size_t n);

#endif
