/*
 * Building squeezed layers from raw keys and values: cluster, sort, calibrate.
 * docs/method.md describes the steps. Works on many layers at once, so that all
 * cores have work whatever the number of heads a layer has.
 */
#ifndef SQZ_LIB_BUILD_H
#define SQZ_LIB_BUILD_H

#include "curve_sums.h"
#include "layer.h"

/* Raw material of a layer. keys and values: F16 [K][n_rows][D] in position order, sorted in place by clustering; a layer
 * points to them, but to keys of its own where these are to be INT8.
 * queries: F16 [n_queries][H][D], those of the last n_queries positions. */
struct sqz_layer_input {
    struct sqz_layer_shape shape;
    uint16_t *keys, *values;
    size_t n_rows;
    const uint16_t *queries;
    size_t n_queries;
    size_t window_tokens;  /* 0, or: a sliding-window layer whose n_rows are the last positions */
    size_t first_position; /* position of row 0 */
    bool stays_dense;      /* clusters would buy nothing: none are made, queries are kept */
    bool elsewhere;        /* somebody else clusters and calibrates it; sqz_layers_ calls leave it alone */
};

/* Kept queries of a context, seen from one of its shards: [n_queries][H] each, logs. */
struct sqz_shared_queries {
    const int32_t *last_position; /* [n_queries] the last of the shard's rows that the query sees */
    float *own_true, *own_total;  /* denominators over the shard's rows, exact and as a lookup estimates them */
    float *true_elsewhere, *total_elsewhere; /* over all others */
};

/* Where work stands, for a progress bar; returning false cancels. done and total count heads. */
typedef bool (*sqz_build_progress)(void *user_data, size_t done, size_t total);

/* Whether a layer of so many rows can be clustered under these options: there is more than sinks and window. */
bool sqz_rows_cluster(size_t n_rows, const struct sqz_squeeze_options *options);

/* Decides the counts of layers[0..n_layers) and allocates their index (each a malloc'ed `owned` block). Layers without
 * queries, with a window, or with too few rows to cluster stay dense, as those that are to; the last two keep their
 * queries. inputs' rows and queries are not read yet. Release every layer with sqz_layer_release(), also after an
 * error. Errors: ARGUMENT, MEMORY. */
enum sqz_status sqz_layers_plan(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                const struct sqz_squeeze_options *options, struct sqz_error *error);

/* Copies the queries that a planned layer keeps; sqz_layers_cluster() does it too. */
void sqz_layer_take_queries(struct sqz_layer *layer, const struct sqz_layer_input *input);

/* Clusters planned layers, sorting their rows in place. Errors: MEMORY, CANCELLED (the rows are then in an unspecified
 * order). */
enum sqz_status sqz_layers_cluster(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                   const struct sqz_squeeze_options *options, int n_threads,
                                   sqz_build_progress progress, void *user_data, struct sqz_error *error);

/* Calibrates clustered layers: fills their curves and gains. Errors: MEMORY, CANCELLED. That is, in order: the curves of
 * all heads (_count), what is one for all layers (_join), and, with options->tail, which heads keep their tails
 * (_try_tails), after which they join again. */
enum sqz_status sqz_layers_count(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                 const struct sqz_squeeze_options *options, int n_threads, sqz_build_progress progress,
                                 void *user_data, struct sqz_error *error);
void sqz_layers_join(struct sqz_layer *layers, size_t n_layers);
enum sqz_status sqz_layers_try_tails(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                     const struct sqz_squeeze_options *options, int n_threads,
                                     sqz_build_progress progress, void *user_data, struct sqz_error *error);
/* Before _count() of layers that are parts of a context (`shared`): their variance gains, which _count() keeps then, and
 * their own denominators, into shared->own_true and own_total. */
enum sqz_status sqz_layers_weigh(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                 const struct sqz_squeeze_options *options, int n_threads, sqz_build_progress progress,
                                 void *user_data, struct sqz_error *error);
enum sqz_status sqz_layers_calibrate(struct sqz_layer *layers, size_t n_layers,
                                     const struct sqz_squeeze_options *options, int n_threads,
                                     sqz_build_progress progress, void *user_data, struct sqz_error *error);

/* The planned layer's index (all arrays but keys and values that are the input's) is one block of so many bytes; the same
 * layer with its index in other memory, which is not touched and may be a card's. Wherever that begins, the index is the
 * first sqz_layer_index_span() bytes from `position` on. */
size_t sqz_layer_index_span(const struct sqz_layer *layer);
size_t sqz_layer_index_bytes(const struct sqz_layer *layer);
struct sqz_layer sqz_layer_index_in(const struct sqz_layer *layer, void *memory);

/* The layer's curves from what was counted of its heads and their gains, [K] each; then, of a layer whose curves have
 * joined, those of the heads that do not keep their tail, without it. */
void sqz_layer_set_curves(struct sqz_layer *layer, const struct sqz_curve_sums *sums, const float *gain);
void sqz_layer_drop_tails(struct sqz_layer *layer, const struct sqz_curve_sums *sums, const bool *keep);

void sqz_layer_release(struct sqz_layer *layer); /* frees owned, clears the struct */

/* ARGUMENT with the reason when options or a shape are outside what the library takes. */
enum sqz_status sqz_squeeze_options_check(const struct sqz_squeeze_options *options, struct sqz_error *error);
enum sqz_status sqz_layer_shape_check(const struct sqz_layer_shape *shape, struct sqz_error *error);

/* Calibration of one head; arrays of SQZ_CURVE_POINTS. workspace: sqz_calibrate_workspace_bytes(). */
struct sqz_head_curve {
    float *share, *lost_mass, *tail_gain, *variance_gain;
};
/* Its parts: the variance gain, what is counted under it, the rest of the curve; that also of a layer whose `tail` was
 * switched off since. workspace: the same. */
float sqz_choose_variance_gain(const struct sqz_layer *layer, uint32_t head_kv, void *workspace);
/* Of every kept query and query head of the KV head: the log of its denominator over the layer's rows, exact and as the
 * lookup estimates it, into arrays [n_queries][H]. */
void sqz_weigh_head(const struct sqz_layer *layer, uint32_t head_kv, float gain, float *log_true, float *log_total,
                    void *workspace);
void sqz_count_head(const struct sqz_layer *layer, uint32_t head_kv, float gain, struct sqz_curve_sums *sums,
                    void *workspace);
void sqz_curve_of_sums(const struct sqz_layer *layer, const struct sqz_curve_sums *sums,
                       const struct sqz_head_curve *out);
size_t sqz_calibrate_workspace_bytes(const struct sqz_layer *layer);
void sqz_calibrate_head(const struct sqz_layer *layer, uint32_t head_kv, bool fit_variance,
                        const struct sqz_head_curve *out, void *workspace);

/* Tries the tail of every head of a calibrated layer on kept queries: keep[h] is set where it brings the output of KV
 * head h nearer to the exact one. workspace: sqz_choose_tail_workspace_bytes(). */
/* The budget it is tried at: small budgets are what the tail is for. And up to how many of the kept queries, evenly. */
#define SQZ_TRIAL_BUDGET 0.1f
enum { SQZ_TRIAL_TOKENS = 16 };
size_t sqz_choose_tail_workspace_bytes(const struct sqz_layer *layer);
void sqz_choose_tail(const struct sqz_layer *layer, bool *keep, void *workspace);

#endif
