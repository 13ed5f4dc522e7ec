/*
 * The files of a model: one, or the shards <name>-00001-of-0000N.gguf, all of
 * them. They stay open while the model does, so that what was fingerprinted can
 * be held against what is there later.
 */
#ifndef SQZ_ENGINE_MODEL_FILES_H
#define SQZ_ENGINE_MODEL_FILES_H

#include <sys/types.h>
#include <time.h>

#include "squeeze.h"

#include "gguf.h"

struct sqz_model_file {
    char *path;
    int descriptor;
    dev_t device;
    ino_t inode;
    off_t n_bytes;
    struct timespec changed;
};

struct sqz_model_files {
    struct sqz_model_file *files; /* [n] */
    size_t n;
    struct gguf_context *gguf; /* metadata, of the first */
    bool long_factors;         /* one of them has LongRoPE's tensor of long factors */
};

/* Opens a GGUF file's metadata, before llama.cpp sees it; caller frees *out with gguf_free(), NULL on failure. From now
 * on llama.cpp's log is kept, not printed. Errors: IO (also for what is no regular file), FORMAT (no GGUF, damaged, no
 * architecture, a prepared context). */
enum sqz_status sqz_model_file_open(struct gguf_context **out, const char *path, struct sqz_error *error);

/* Opens all files of the model whose first is at `path`. sqz_model_files_close() is needed after failures, too. Errors:
 * as above, MEMORY, FORMAT (a shard that is missing, or that stands in another's place). */
enum sqz_status sqz_model_files_open(struct sqz_model_files *files, const char *path, struct sqz_error *error);
void sqz_model_files_close(struct sqz_model_files *files);

/* 32 hex digits and a zero into out: a single file's as fingerprint.h says, the hash of all shards' otherwise. */
enum sqz_status sqz_model_files_fingerprint(char out[65], const struct sqz_model_files *files, struct sqz_error *error);

/* MISMATCH when one of the open files is no longer what it was. by_name: what stands under its name is asked, too. */
enum sqz_status sqz_model_files_check(const struct sqz_model_files *files, bool by_name, struct sqz_error *error);

#endif
