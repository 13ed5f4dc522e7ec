/*
 * The reference of `squeeze bench kernels` in two parts: bench_kernels_lookup.c follows one selection of the library
 * through every decision that led to it, bench_kernels_check.c adds up what it reads and compares the outputs.
 */
#ifndef SQZ_RESEARCH_BENCH_KERNELS_CHECK_H
#define SQZ_RESEARCH_BENCH_KERNELS_CHECK_H

#include "bench_kernels.h"

enum { CHECK_MAX_DIM = 256 };

/* Relative distance of a score to its threshold below which floats may decide otherwise: twice the largest error of a
 * logit that the shapes of the bench give (D = 128, M = 60). */
#define CHECK_CLOSE 2e-3

double check_dot(const float *x, const float *y, size_t d);

/* Logits of the first n rows of a head, [n]. */
void check_logits(double *logits, const float *query, const struct sqz_rows *rows, size_t n,
                  const struct sqz_layer *layer);

/* log(exp(start) + sum of exp(logits)) */
double check_log_sum(const double *logits, size_t n, double start);

/* Rows of the user that a token sees; the layers of the bench keep no window. */
size_t check_user_rows(const struct sqz_attend_call *call, size_t token);

/* The query of a token and a query head, [D]. */
const float *check_query(const struct sqz_attend_call *call, size_t token, size_t head);

/* One KV head and the tokens that share a selection, as a call and a layer of their own. */
struct check_part {
    struct sqz_layer layer; /* K = 1 */
    struct sqz_attend_call call;
    struct sqz_attention_stats stats;
    size_t first_token, head_kv, n_query_rows;
    float *queries, *norms, *base; /* [n_query_rows][D], ... */
    float *rounded;                /* [n_query_rows][D] as INT16 with a scale holds them, where something is INT8 */
    float *out;                    /* [n_query_rows][D] */
    void *workspace, *lookup;
    struct sqz_head_plan plan;
    bool by_rows; /* one token, its own threshold (false: a block, brought to a number of rows) */
    struct sqz_selection selection;
};

/* The tokens from `token` on that share a selection of a KV head; runs the library's lookup for them. */
void check_part_make(struct check_part *part, const struct sqz_attend_call *whole, size_t token, size_t head_kv);
void check_part_free(struct check_part *part);

/* Logit of query row r with row `at` of one head's rows as the library makes it of their type; row: the same in floats.
 * INT8 rows are relative to the head's mean key. */
double check_logit(const struct check_part *part, size_t r, const struct sqz_rows *rows, size_t at, const float *row);

/* The lookup in double precision, following the library's selection. */
struct check_lookup {
    const struct check_part *part;
    uint8_t *pruned[BENCH_LEVELS]; /* [n_clusters] by the library */
    double *logit, *corrected;     /* [n_query_rows][C of the finest level] of the level at hand */
    double *tail_logit;            /* [n_query_rows][n_pruned], before its bound */
    double *tail_keys;             /* [n_pruned] how many keys of that logit an entry stands for */
    double *known, *total;         /* [n_query_rows] log of the mass so far, log Z */
    size_t stride;
    double worst; /* by how much a decision was wrong, as a factor on the score: 1 is none */
};

void check_lookup_make(struct check_lookup *lookup, const struct check_part *part);
void check_lookup_free(struct check_lookup *lookup);

/* From the coarsest level down. Returns false when a decision was wrong. */
bool check_lookup_run(struct check_lookup *lookup, struct check_result *result);

#endif
