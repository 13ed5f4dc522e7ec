/*
 * From the rows of a context that was read to its shards and their index. The
 * shards are whole before the index is, which alone makes a context of them.
 */
#ifndef SQZ_ENGINE_WRITE_SHARDS_H
#define SQZ_ENGINE_WRITE_SHARDS_H

#include "backend.h"
#include "context_file.h"
#include "read_shards.h"

struct sqz_shards_writing;

/* The file of shard `shard` (from 0) of `count` beside the index at `path`: "dir/book.sqz.gguf" ->
 * "dir/book-00001-of-00004.sqz.gguf"; malloc'ed, NULL without memory. */
char *sqz_shard_path(const char *path, uint32_t shard, uint32_t count);

/* Whether every shard has tokens. Errors: ARGUMENT. */
enum sqz_status sqz_shards_check_deal(const struct sqz_deal *deal, struct sqz_error *error);

/* Plans the shards of a context whose layers are inputs [meta->n_layer], whose rows and queries come later and stay the
 * caller's, and reserves the files of those held here. meta is copied, but for what it points to. exchange: whoever holds
 * the others, or NULL. Errors: ARGUMENT (a shard would be empty), IO, MEMORY. */
enum sqz_status sqz_shards_writing_begin(struct sqz_shards_writing **out, const struct sqz_layer_input *inputs,
                                         const struct sqz_context_meta *meta, const struct sqz_held_shards *held,
                                         const struct sqz_exchange *exchange, const char *path,
                                         struct sqz_error *error);

/* Rows [K][T][D] in the order of positions are dealt out where they lie; for whoever did not read them into shards. Those of
 * layers with a window are the last ones alone and stay. Errors: MEMORY. */
enum sqz_status sqz_shards_deal(struct sqz_shards_writing *w, struct sqz_error *error);
/* The same of a text that was read by a place which builds layers: what it can is clustered there, shard by shard, before
 * it comes; how many layers were. Others are brought and dealt out. Errors: MEMORY, CANCELLED, INTERNAL. */
enum sqz_status sqz_shards_build(struct sqz_shards_writing *w, struct sqz_backend *backend, uint32_t *n_built,
                                 sqz_build_progress progress, void *user_data, struct sqz_error *error);

/* In this order, when the rows are there, shard by shard. Every process does all of it; file_bytes are those of all, and
 * when _write() is done all files are there. Errors: MEMORY, CANCELLED, IO, and those of the exchange. */
enum sqz_status sqz_shards_cluster(struct sqz_shards_writing *w, int n_threads, sqz_build_progress progress,
                                   void *user_data, struct sqz_error *error);
enum sqz_status sqz_shards_calibrate_all(struct sqz_shards_writing *w, int n_threads, sqz_build_progress progress,
                                         void *user_data, struct sqz_error *error);
enum sqz_status sqz_shards_write(struct sqz_shards_writing *w, sqz_build_progress progress, void *user_data,
                                 uint64_t *file_bytes, struct sqz_error *error);
float sqz_shards_budget_floor(const struct sqz_shards_writing *w);

/* At any time; files that were not written stay as they were. */
void sqz_shards_writing_free(struct sqz_shards_writing *w);

#endif
