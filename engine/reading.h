/*
 * From a text to rows: the model runs over it batch by batch with our dense attention, and keys, values and the last
 * queries of every layer come to lie in host memory, or where the place of attention keeps them. On a card also by bands
 * of layers (bands.h), into shards in turns with other processes (read_shards.h).
 */
#ifndef SQZ_ENGINE_READING_H
#define SQZ_ENGINE_READING_H

#include "backend.h"
#include "bands.h"
#include "model.h"
#include "read_shards.h"

struct sqz_reading {
    struct sqz_model *model; /* NULL: rows are a context's that was read before */
    size_t n_tokens, n_queries;
    size_t first_position;          /* of the chunk in flight */
    struct sqz_layer_input *inputs; /* [n_layer] */
    uint32_t n_layer;
    struct sqz_held_shards held;            /* of a context in shards; 0 shards: it is one file */
    const struct sqz_exchange *exchange;    /* whoever holds the other shards, or NULL */
    struct sqz_reading_shards *into_shards; /* in place of the place's own way */
    uint16_t *queries;                      /* of all layers */
    uint16_t *rows;                         /* keys and values of all layers */
    size_t rows_bytes;
    bool placed; /* the place was told */
};

/* How far a text is, and who wants to know. */
struct sqz_reading_link {
    const struct sqz_prepare_options *options;
    double done, total, since;
};

/* Whoever takes layers up to number `end` when a band that ends there is complete, and may stop it all behind a batch. */
struct sqz_band_taker {
    enum sqz_status (*look)(void *user_data, struct sqz_error *error);
    enum sqz_status (*take)(void *user_data, uint32_t end, struct sqz_error *error);
    void *user_data;
};

bool sqz_report_progress(const struct sqz_prepare_options *o, const char *phase, double done, double total,
                         const char *unit, double since);

/* Which shards are held here, of a text of n_tokens; before memory is allocated. */
void sqz_reading_share_out(struct sqz_reading *r, size_t n_tokens, uint32_t n_shards,
                           const struct sqz_exchange *exchange);
/* inputs, zeroed. Errors: MEMORY. */
enum sqz_status sqz_reading_begin(struct sqz_reading *r, uint32_t n_layer, struct sqz_error *error);
/* Sets up the arrays for the layers whose shapes and windows are in inputs. Rows are kept for all tokens, or those of the
 * shards held here; a layer with a window ends with its last rows alone, and into shards keeps about as many. Errors: MEMORY. */
enum sqz_status sqz_reading_allocate(struct sqz_reading *r, size_t n_tokens, size_t n_queries, struct sqz_error *error);
/* Both, for the layers of a model. Errors: MEMORY. */
enum sqz_status sqz_reading_plan(struct sqz_reading *r, struct sqz_model *model, size_t n_tokens,
                                 const struct sqz_prepare_options *o, struct sqz_error *error);

/* One batch of at most `most` tokens from token number `at` on. With bands it need not be done when this returns. Errors:
 * CANCELLED, and those of a run. */
enum sqz_status sqz_reading_batch(struct sqz_reading *r, const int32_t *tokens, size_t at, size_t most,
                                  struct sqz_bands *bands, struct sqz_reading_link *link, struct sqz_error *error);
/* When layers [l, end) have read all tokens: rows that lie elsewhere come, and of windows the last ones stay. */
enum sqz_status sqz_reading_end_layers(struct sqz_reading *r, uint32_t l, uint32_t end, struct sqz_error *error);
/* All tokens in batches as large as the model takes, by bands of layers where that pays. Errors: as of a batch, and
 * those of `taker`, of whom bands are asked where there are several. */
enum sqz_status sqz_reading_all(struct sqz_reading *r, const int32_t *tokens, const struct sqz_band_taker *taker,
                                struct sqz_reading_link *link, struct sqz_error *error);
/* All tokens of this process: a block in every turn of all processes. */
enum sqz_status sqz_reading_turns(struct sqz_reading *r, const int32_t *tokens, struct sqz_reading_link *link,
                                  struct sqz_error *error);

/* Waits for batches in flight; also of one that is zeroed. */
void sqz_reading_free(struct sqz_reading *r);

#endif
