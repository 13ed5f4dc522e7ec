/*
 * squeeze on NVIDIA GPUs: attention over clustered keys, the same semantics as
 * sqz_layer_attend(), on device memory that the caller owns. A library of its own,
 * libsqueeze_cuda, where SQUEEZE_CUDA is on.
 *
 * Every call only launches kernels on the caller's stream: no allocation, no
 * synchronisation, no global state, so it can be captured in a CUDA graph.
 * Argument structs are read before the call returns. Pointers are device
 * pointers unless said otherwise, arrays are contiguous, the slowest dimension
 * first, and start at multiples of 16 bytes. Streams are cudaStream_t as void *.
 * Calls may come from any thread; two calls that run at the same time need a
 * workspace each.
 *
 * Letters as in squeeze.h, and: B sequences that share one context, T query
 * tokens of each, G = H / K. "type" is that of a layer's keys, F16 or BF16, one
 * for keys, values, value centroids, queries and outputs; centroids are of that
 * type or I8. Keys and values may also both be I4 or I44 (struct sqz_planes), of D
 * 64 or 128, with groups of up to 64 heads, all fixed rows whole and a plane_index;
 * everything else is F16 then. With I4 and no lower planes the arrays of I44 are
 * read by their upper planes alone. One token reads planes as they are; blocks of
 * tokens, and more than 128 query rows of a head together, read F16 rows that are made
 * of them in the workspace first.
 *
 * Layers are struct sqz_layer of squeeze_attention.h whose space is
 * SQZ_SPACE_CUDA; D is 64, 96, 128 or 256. Codes are used for one query token of
 * groups of up to 16 heads; blocks of tokens and larger groups choose whole
 * clusters. A cluster's score is the mean, or maximum, over the T * G query rows
 * of a sequence.
 *
 * What is retained: clusters whose score reaches the threshold, or with codes
 * single keys whose estimate does, rounded up to groups of 8 rows: group g of a
 * head is its rows 8g to 8g + 7. A group that has a retained or a fixed row is
 * read whole, keys and values.
 *
 * Every status is one of: OK; ARGUMENT (a pointer missing or misaligned, a
 * count out of range, a workspace too small, a layer in another space);
 * UNSUPPORTED (what _supported() says false to, or a device older than sm_80);
 * INTERNAL (CUDA refused a launch).
 */
#ifndef SQUEEZE_CUDA_H
#define SQUEEZE_CUDA_H

#include "squeeze_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What each head does at a budget: thresholds come from sqz_cuda_calibrate() or from the context's curve. */
struct sqz_cuda_plan {
    const float *log_threshold; /* [K]; -INFINITY retains all, +INFINITY nothing but the fixed rows */
    const float *variance_gain; /* [K]; NULL: 0 */
    const float *tail_gain;     /* [K]; NULL: no tail */
    float tail_skip;            /* a pruned cluster whose weight is below tail_skip * threshold adds nothing; >= 0 */
    bool per_sequence;          /* log_threshold and tail_gain are [B][K]: T is 1 */
    const uint32_t *retain_rows; /* [K] T > 1: the clusters of the highest scores are retained that hold so many rows,
                                    whatever the threshold; NULL: the threshold */
};

/* What a sequence's selection in a head read beside rows. */
struct sqz_cuda_read {
    uint32_t centroids;       /* of the levels below the coarsest, which is read whole */
    uint32_t codes;           /* keys whose codes were read */
    uint32_t value_centroids; /* for the tail */
};

/* Where a sequence's own rows are, each sequence in an array of its own. */
struct sqz_cuda_user {
    const void *keys, *values; /* type [K][capacity_rows][D], multiples of 16 bytes */
    uint32_t capacity_rows, n_rows;
    uint32_t first_row; /* of the context, where all of it is read: rows before it are not seen */

    /* With user_layer: rows before those of keys and values, which are in planes. */
    uint32_t n_plane_rows; /* a multiple of SQZ_CUDA_USER_BLOCK; 0: none, planes are not looked at */
    const void *planes;    /* sqz_cuda_user_planes_bytes() of plane_capacity_rows */
    uint32_t plane_capacity_rows;
};

/* Own rows in planes, in blocks: keys of a block are relative to their mean, which is an F16 centroid, values to the mean that
 * the layer's are relative to; all else is as in struct sqz_planes. Token number p of a sequence's own reads the
 * rows of its own block and of the one before it as F16, those before in planes. */
enum { SQZ_CUDA_USER_BLOCK = 128 };

/* Puts blocks of F16 own rows into planes. */
struct sqz_cuda_flush_args {
    const struct sqz_layer *layer; /* in planes, whose sequence it is; the struct: host */
    void *planes;                  /* sqz_cuda_user_planes_bytes() of capacity_rows */
    uint32_t capacity_rows;
    uint32_t first_block, n_blocks; /* those before the first are there; behind the last nothing is, from then on */
    const void *keys, *values;      /* F16 [K][key_capacity_rows][D], from the first block's first row on; multiples of 16 bytes */
    uint32_t key_capacity_rows;
};

/* One context whose rows lie on several GPUs of a host: every rank, a GPU each, makes the same call on a layer that has its
 * own part of the rows with clusters of their own, and each has the whole result. What a head retains is what one GPU with
 * the clusters of all would: they share their denominators. Fixed rows and the user's count where they are: each belongs to
 * one rank alone. All ranks make the same calls (B, H, D, dense or not) in the same order, or none ends well.
 *
 * Ranks tell each other by storing into a mailbox in the other's memory, kernels waiting for what others have stored; or,
 * where the caller gives a function for that, by gathering on the stream. One call of a mailbox at a time. T is 1, at most
 * one level, not together; with codes by mailboxes alone, where one launch does the lookup (sm_90, up to 8,192 clusters;
 * else UNSUPPORTED before anything is launched); not on rows in planes. */
enum { SQZ_CUDA_MOST_RANKS = 8 };

/* The beginning of a mailbox. */
struct sqz_cuda_mailbox {
    uint32_t failed; /* 0, or 1 + the rank that was waited for longer than patience_ns: from then on nothing is waited for,
                        and results are NaN. All ranks' mailboxes have to be cleared before the next call */
    uint32_t step;   /* calls that are done */
    uint32_t arrived;
};

/* Launches on the stream: all [n_ranks][n_bytes] becomes what every rank has at `mine`. Device memory. */
typedef enum sqz_status (*sqz_cuda_gather)(void *with, const void *mine, void *all, size_t n_bytes, void *stream);

struct sqz_cuda_ranks {
    uint32_t rank, n_ranks;             /* 2 to SQZ_CUDA_MOST_RANKS */
    uint32_t n_rows;                    /* B * H of the largest call that there will be */
    void *mailbox[SQZ_CUDA_MOST_RANKS]; /* [n_ranks], each in its rank's memory, where all can store; zeros at first, aligned
                                           to 256, sqz_cuda_mailbox_bytes(); not looked at with */
    sqz_cuda_gather gather;             /* or NULL */
    void *gather_with;
    uint64_t patience_ns; /* how long a kernel waits for another rank, at least as long as ranks may be apart */
    bool led;             /* the first rank alone has the queries, which it tells the others, and the results, which they tell
                             it: of nodes of llama.cpp's graph (lib/cuda/calls.h), by mailboxes; not of calls here */
    uint32_t *failed;     /* host memory that kernels can store into: learns what the mailbox's has become; or NULL */
};

/* Bytes of a mailbox; 0: too many ranks or rows. */
SQZ_API size_t sqz_cuda_mailbox_bytes(uint32_t n_ranks, uint32_t n_rows);
/* Lets each of n devices of this process store into the others' memory. UNSUPPORTED where two cannot; `why`, of `room`
 * bytes or NULL, says which. */
SQZ_API enum sqz_status sqz_cuda_ranks_connect(const int *devices, uint32_t n, char *why, size_t room);

struct sqz_cuda_attend_args {
    const struct sqz_layer *layer; /* the struct: host; its arrays: device */
    struct sqz_cuda_plan plan;     /* not looked at when dense */
    bool dense;
    bool together;                       /* T is 1, plan per_sequence: what any sequence selected is read for all, in one
                                            pass; where dense everything, and B is up to 512 */
    uint32_t n_sequences, n_tokens;      /* B, 1 to 64; T, 1 to 65,536; the T tokens of a sequence share a selection */
    const void *queries;                 /* type [B][T][H][D] */
    void *out;                           /* type [B][T][H][D] */
    float *lse;                          /* [B][T][H], natural logarithm, -INFINITY where nothing was seen; or NULL */
    const void *user_keys, *user_values; /* type [B][K][user_capacity_rows][D], rows after the context; NULL: none */
    uint32_t user_capacity_rows;
    uint32_t n_user;                   /* rows of every sequence, the T tokens' own included: token t sees the first
                                           n_user - T + t + 1. Either 0 or at least T */
    const uint32_t *user_rows;         /* [B] in place of n_user, each at most n_user; NULL, or T is 1 */
    const struct sqz_cuda_user *users; /* device [B] in place of the four above, each n_rows at most n_user; NULL, or T
                                           is 1. Sequences may share rows: tokens of one text, each with a selection of
                                           its own */
    bool windowed; /* dense alone, B is 1: counted over the context's rows and then the user's, token t does not see */
    int32_t first_row;    /* those before first_row + t */
    uint32_t *n_retained; /* [B][K], together [K], out: groups of the context that were read; or NULL */
    struct sqz_cuda_read *read; /* [B][K] added to, but where clusters are scored for all together; or NULL */
    void *workspace;      /* at least _workspace_bytes(), aligned to 256 */
    size_t workspace_bytes;
    const struct sqz_cuda_ranks *ranks; /* host, whose parts of the context this is; NULL: all of it is here */

    /* A layer in planes, which the own rows belong to that are in planes; of I4 with arrays of I44 their upper planes alone
     * are read. The struct: host. NULL: no own rows are. T is 1 and there are `users`, which say where they are; or B is 1 and */
    const struct sqz_layer *user_layer;
    void *user_planes; /* as sqz_cuda_user has it. Blocks that the T tokens read in planes and that are not there are put there */
    uint32_t user_plane_capacity_rows;
    uint32_t n_plane_rows;   /* rows that are there */
    uint32_t user_first_row; /* of all n_user, the one that user_keys and user_values begin with */
};

/* What is retained, in the workspace of the call that made it: valid until the workspace is used again. */
struct sqz_cuda_selection {
    const uint32_t *groups;   /* [B][K][capacity] groups of 8 rows, ascending */
    const uint32_t *n_groups; /* [B][K] */
    uint32_t capacity;        /* ceil(N / 8) */
    const float *log_total;   /* [B][T][H] log Z of the lookup */
};

/* Whether a call can run; host arithmetic alone, pointers and the layer's space are not looked at. */
SQZ_API bool sqz_cuda_attend_supported(const struct sqz_cuda_attend_args *args);
/* Bytes of workspace for args and for any call that differs from it only in pointers, but not in whether there are ranks,
 * plan, or smaller n_user. 0 where unsupported. */
SQZ_API size_t sqz_cuda_attend_workspace_bytes(const struct sqz_cuda_attend_args *args);

/* Lookup, exact attention on what is retained and on the user's rows, tail, merge. */
SQZ_API enum sqz_status sqz_cuda_attend(const struct sqz_cuda_attend_args *args, void *stream);

/* The lookup alone: what sqz_cuda_attend() would read of the context. out is not written; *selection (host) is set. */
SQZ_API enum sqz_status sqz_cuda_select(const struct sqz_cuda_attend_args *args, struct sqz_cuda_selection *selection,
                                        void *stream);

/* What stands beside keys and values in planes, for struct sqz_layer's plane_index: steps, and where clusters begin. Reads
 * the steps of both and the offsets of level 0, which `layer`, complete but for the index, has on the device; the same for
 * I4 and I44. index: sqz_cuda_plane_index_bytes(), host arithmetic alone; 0: such rows are not supported. */
SQZ_API size_t sqz_cuda_plane_index_bytes(const struct sqz_layer *layer);
SQZ_API enum sqz_status sqz_cuda_plane_index(const struct sqz_layer *layer, void *index, void *stream);

/* Memory for n_rows own rows in planes, a multiple of SQZ_CUDA_USER_BLOCK; host arithmetic alone; 0: not supported. */
SQZ_API size_t sqz_cuda_user_planes_bytes(const struct sqz_layer *layer, uint32_t n_rows);
SQZ_API enum sqz_status sqz_cuda_flush(const struct sqz_cuda_flush_args *args, void *stream);
/* Copies the first n_blocks of planes of from_rows to planes of to_rows. */
SQZ_API enum sqz_status sqz_cuda_move_user_planes(const struct sqz_layer *layer, void *to, uint32_t to_rows, const void *from,
                                                  uint32_t from_rows, uint32_t n_blocks, void *stream);

/* Merges partial results of the same query rows: out = sum of out_i exp(lse_i) / sum of exp(lse_i). */
struct sqz_cuda_merge_args {
    uint32_t n_parts, n_rows, head_dim;
    const float *parts;     /* F32 [n_parts][n_rows][D], each normalised */
    const float *parts_lse; /* F32 [n_parts][n_rows] natural logarithm, -INFINITY: an empty part, whose output is not
                               looked at */
    enum sqz_row_type type; /* F16 or BF16 */
    void *out;              /* type [n_rows][D]; zeros where all parts are empty */
    float *lse;             /* [n_rows] or NULL */
};
SQZ_API enum sqz_status sqz_cuda_merge(const struct sqz_cuda_merge_args *args, void *stream);

/* Threshold calibration: the share of a head's rows that its calibration queries read at every threshold of a grid, each
 * query with a selection of its own, groups of 8 counted as they are read. */
struct sqz_cuda_calibrate_args {
    const struct sqz_layer *layer; /* at least one level; the finest level's scores count */
    const float *variance_gain;    /* [K] or NULL */
    uint32_t n_queries;            /* 1 to 1024 */
    const void *queries;           /* type [n_queries][H][D] */
    uint32_t n_points;             /* P, 1 to 4096 */
    float first, step;             /* log threshold of point i is first + i * step; step > 0 */
    float *share;                  /* [K][P] out: rows read / N, decreasing */
    void *workspace;
    size_t workspace_bytes;
};
SQZ_API size_t sqz_cuda_calibrate_workspace_bytes(const struct sqz_cuda_calibrate_args *args);
SQZ_API enum sqz_status sqz_cuda_calibrate(const struct sqz_cuda_calibrate_args *args, void *stream);

/* Clustering of all heads together by squared distance: the same keys, seed and device give the same result. */
struct sqz_cuda_cluster_args {
    enum sqz_row_type type;                           /* F16 or BF16 */
    uint32_t n_head_kv, n_rows, head_dim, n_clusters; /* C <= rows */
    uint32_t n_passes;                                /* passes over the keys, up to 1000; 0: the default, 10 */
    uint64_t seed;
    const void *keys; /* type [K][n_rows][D] */
    float *centroids; /* F32 [K][C][D] out: mean of each cluster's keys */
    float *variance;  /* [K][C] out: mean squared distance to it; or NULL */
    uint32_t *offset; /* [K][C + 1] out; no cluster is empty */
    uint32_t *order;  /* [K][n_rows] out: the row that comes to place i when keys are sorted by cluster, rows of a
                                  cluster ascending */
    float *objective; /* [K] out: mean squared distance of all keys; or NULL */
    void *workspace;
    size_t workspace_bytes;
};
SQZ_API bool sqz_cuda_cluster_supported(const struct sqz_cuda_cluster_args *args);
SQZ_API size_t sqz_cuda_cluster_workspace_bytes(const struct sqz_cuda_cluster_args *args);
SQZ_API enum sqz_status sqz_cuda_cluster(const struct sqz_cuda_cluster_args *args, void *stream);

/* Whether the current device can run these kernels (sm_80 or newer); false also without a device or driver. */
SQZ_API bool sqz_cuda_device_supported(void);

#ifdef __cplusplus
}
#endif

#endif /* SQUEEZE_CUDA_H */
