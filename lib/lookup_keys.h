/*
 * The part of a lookup that goes on from clusters to single keys, and the
 * buffers that both parts work in.
 */
#ifndef SQZ_LIB_LOOKUP_KEYS_H
#define SQZ_LIB_LOOKUP_KEYS_H

#include "arena.h"
#include "codes.h"
#include "lookup.h"

/* The workspace of a lookup, carved from the caller's block. R query rows; stride: clusters of level 0. */
struct sqz_lookup_buffers {
    float *logit;                      /* [R][stride] scale q.C of the active clusters of a level */
    float *corrected;                  /* [R][stride] exp(y) / Z of them */
    float *score;                      /* [stride] */
    float *keys;                       /* [stride] N of the active clusters */
    float *variance;                   /* [stride] s of the active clusters */
    uint32_t *cluster;                 /* [stride] which cluster each active entry is */
    struct sqz_range *active, *next;   /* [stride + 1] */
    float *pruned_logit, *pruned_keys; /* [R][stride] */
    float *log_total, *known_mass;     /* [R] */
    float *scratch;
    uint32_t *pruned_level, *pruned_cluster; /* [stride] */
    struct sqz_i16_queries quantised;
    size_t stride;

    float *tables, *deviation;    /* of sqz_code_tables() */
    float *key_weight;            /* [R][key_stride] of the keys of opened clusters, one after the other */
    float *key_score;             /* [key_stride] */
    uint32_t *key_list;           /* [key_stride] the retained ones of them */
    uint32_t *opened;             /* [stride] active entries whose clusters are opened */
    uint32_t *count, *left;       /* [stride] their keys, and those of them that are not retained */
    struct sqz_range *key_ranges; /* [n_keys / 2 + 1] */
    size_t key_stride;
};

void sqz_lookup_carve(struct sqz_lookup_buffers *b, struct sqz_arena *arena, const struct sqz_layer *layer,
                      size_t n_query_rows);

/* Turns the scores of a level's n active clusters, which b describes, into how far above log Z the likeliest key below
 * each may lie: a cluster is opened where that reaches the log threshold. */
void sqz_lookup_reach(struct sqz_lookup_buffers *b, const struct sqz_head_plan *plan, uint32_t level,
                      size_t n_query_rows, size_t n);

/* Goes on from the n active clusters of level 0 and their reach: estimates, retains, and sums up what is pruned.
 * log_total becomes that of the keys' estimates. */
void sqz_lookup_keys(struct sqz_selection *selection, struct sqz_lookup_buffers *b, const struct sqz_layer *layer,
                     uint32_t head_kv, const struct sqz_head_plan *plan, const float *squared_norms,
                     size_t n_query_rows, size_t n);

/* Adds a range behind the last one, or to it where it goes on. */
static inline void sqz_push_range(struct sqz_range *ranges, size_t *n, uint32_t begin, uint32_t end)
{
    if (*n && ranges[*n - 1].end == begin) ranges[*n - 1].end = end;
    else ranges[(*n)++] = (struct sqz_range){begin, end};
}

#endif
