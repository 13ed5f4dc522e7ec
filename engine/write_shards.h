/*
 * From the rows of a context that was read to its shards and their index. The
 * shards are whole before the index is, which alone makes a context of them.
 */
#ifndef SQZ_ENGINE_WRITE_SHARDS_H
#define SQZ_ENGINE_WRITE_SHARDS_H

#include "context_file.h"
#include "shards.h"

struct sqz_shards_writing;

/* Plans the shards of a context whose layers are inputs [meta->n_layer], whose rows and queries come later and stay the
 * caller's, and reserves their files. meta is copied, but for what it points to. Errors: ARGUMENT (a shard would be
 * empty), UNSUPPORTED (sliding windows), IO, MEMORY. */
enum sqz_status sqz_shards_writing_begin(struct sqz_shards_writing **out, const struct sqz_layer_input *inputs,
                                         const struct sqz_context_meta *meta, uint32_t count, const char *path,
                                         struct sqz_error *error);

/* In this order, when the rows are there: they are dealt out where they lie. Errors: MEMORY, CANCELLED, IO. */
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
