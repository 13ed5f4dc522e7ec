/*
 * From rows to layers, wherever the rows are: by lib/build.h on the host, or by
 * the builder of a place (backend.h), layer by layer, whichever has a way.
 */
#ifndef SQZ_ENGINE_BUILDING_H
#define SQZ_ENGINE_BUILDING_H

#include "backend.h"
#include "early_rows.h"

struct sqz_building {
    struct sqz_backend *backend;    /* that read the rows; NULL: they are in host memory */
    struct sqz_layer *layers;       /* [n_layer] planned from */
    struct sqz_layer_input *inputs; /* `elsewhere` is set here */
    uint32_t n_layer;
    const struct sqz_squeeze_options *options;
    int n_threads;
    sqz_build_progress progress;
    void *user_data;
    struct sqz_early_rows *early; /* told of layers whose rows are done; NULL: none */

    uint32_t n_placed;            /* layers that were seen to */
    struct sqz_curve_sums **sums; /* [n_layer] of those that are elsewhere; begins as NULL */
};

/* Builds layers up to number `end` where their rows are, which are complete, if there is a way; others may still be read.
 * Errors: MEMORY, CANCELLED, INTERNAL. */
enum sqz_status sqz_building_place(struct sqz_building *b, uint32_t end, struct sqz_error *error);
/* Clusters, then calibrates. Errors: MEMORY, CANCELLED, INTERNAL. */
enum sqz_status sqz_building_cluster(struct sqz_building *b, struct sqz_error *error);
enum sqz_status sqz_building_calibrate(struct sqz_building *b, struct sqz_error *error);
/* Layer number l in host memory, until the next call; of those that are elsewhere without their rows. */
enum sqz_status sqz_building_layer(struct sqz_building *b, uint32_t l, struct sqz_layer *out, struct sqz_error *error);
void sqz_building_free(struct sqz_building *b);

#endif
