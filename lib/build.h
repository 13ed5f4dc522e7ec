/*
 * Building squeezed layers from raw keys and values: cluster, sort, calibrate.
 * docs/method.md describes the steps. Works on many layers at once, so that all
 * cores have work whatever the number of heads a layer has.
 */
#ifndef SQZ_LIB_BUILD_H
#define SQZ_LIB_BUILD_H

#include "layer.h"
#include "method.h"

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

/* Clusters planned layers, sorting their rows in place. Errors: MEMORY, CANCELLED (the rows are then in an unspecified
 * order). */
enum sqz_status sqz_layers_cluster(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                   const struct sqz_squeeze_options *options, int n_threads,
                                   sqz_build_progress progress, void *user_data, struct sqz_error *error);

/* Calibrates clustered layers: fills their curves and gains. Errors: MEMORY, CANCELLED. */
enum sqz_status sqz_layers_calibrate(struct sqz_layer *layers, size_t n_layers,
                                     const struct sqz_squeeze_options *options, int n_threads,
                                     sqz_build_progress progress, void *user_data, struct sqz_error *error);

void sqz_layer_release(struct sqz_layer *layer); /* frees owned, clears the struct */

/* ARGUMENT with the reason when options or a shape are outside what the library takes. */
enum sqz_status sqz_squeeze_options_check(const struct sqz_squeeze_options *options, struct sqz_error *error);
enum sqz_status sqz_layer_shape_check(const struct sqz_layer_shape *shape, struct sqz_error *error);

/* Calibration of one head; arrays of SQZ_CURVE_POINTS. workspace: sqz_calibrate_workspace_bytes(). */
struct sqz_head_curve {
    float *share, *lost_mass, *tail_gain, *variance_gain;
};
size_t sqz_calibrate_workspace_bytes(const struct sqz_layer *layer);
void sqz_calibrate_head(const struct sqz_layer *layer, uint32_t head_kv, bool fit_variance,
                        const struct sqz_head_curve *out, void *workspace);

/* Tries the tail of every head of a calibrated layer on kept queries: keep[h] is set where it brings the output of KV
 * head h nearer to the exact one. workspace: sqz_choose_tail_workspace_bytes(). */
size_t sqz_choose_tail_workspace_bytes(const struct sqz_layer *layer);
void sqz_choose_tail(const struct sqz_layer *layer, bool *keep, void *workspace);

#endif
