/* The files of a model; see model_files.h. Shards are named and numbered as llama.cpp does it. */
#define _GNU_SOURCE /* open flags */
#include "model_files.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "fingerprint.h"
#include "llama_library.h"
#include "model.h"

static const char *kind_of(mode_t mode)
{
    return S_ISDIR(mode) ? "a directory" : S_ISFIFO(mode) ? "a pipe" : S_ISSOCK(mode) ? "a socket" : "a device";
}

/* A descriptor of a regular file, -1 on failure. Without O_NONBLOCK a pipe would wait for a writer for ever. */
static enum sqz_status open_regular(int *descriptor, struct stat *info, const char *path, struct sqz_error *error)
{
    *descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (*descriptor < 0) return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", path, strerror(errno));
    enum sqz_status status = SQZ_OK;
    if (fstat(*descriptor, info) != 0) status = sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", path, strerror(errno));
    else if (!S_ISREG(info->st_mode))
        status =
            sqz_error_set(error, SQZ_ERROR_IO, "%s: it is %s; a model is a regular file", path, kind_of(info->st_mode));
    if (status == SQZ_OK) return SQZ_OK;
    close(*descriptor);
    *descriptor = -1;
    return status;
}

static enum sqz_status check_magic(int descriptor, const char *path, struct sqz_error *error)
{
    unsigned char magic[4] = {0};
    const ssize_t n = pread(descriptor, magic, sizeof magic, 0);
    if (n < 0) return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", path, strerror(errno));
    if (n == (ssize_t)sizeof magic && memcmp(magic, GGUF_MAGIC, sizeof magic) == 0) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_FORMAT,
                         "%s: not a GGUF model: it begins with bytes %02x %02x %02x %02x, a GGUF file with "
                         "47 47 55 46",
                         path, magic[0], magic[1], magic[2], magic[3]);
}

static enum sqz_status read_metadata(struct gguf_context **out, const char *path, struct sqz_error *error)
{
    sqz_llama_complaint_clear();
    *out = gguf_init_from_file(path, (struct gguf_init_params){.no_alloc = true, .ctx = NULL});
    if (*out) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_FORMAT, "%s: damaged GGUF file: %s", path,
                         sqz_llama_complaint("its header cannot be read"));
}

/* An unsigned 16-bit key, as llama.cpp has them; `missing` where there is none. */
static unsigned count_at(const struct gguf_context *gguf, const char *name, unsigned missing)
{
    const int64_t key = gguf_find_key(gguf, name);
    return key < 0 || gguf_get_kv_type(gguf, key) != GGUF_TYPE_UINT16 ? missing : gguf_get_val_u16(gguf, key);
}

static enum sqz_status check_architecture(const struct gguf_context *gguf, const char *path, struct sqz_error *error)
{
    const unsigned number = count_at(gguf, "split.no", 0), n = count_at(gguf, "split.count", 1);
    if (number > 0)
        return sqz_error_set(error, SQZ_ERROR_FORMAT,
                             "%s: this is part %u of a model of %u files: give the first, whose name ends in "
                             "-00001-of-%05u.gguf",
                             path, number + 1, n, n);
    const int64_t key = gguf_find_key(gguf, "general.architecture");
    if (key < 0 || gguf_get_kv_type(gguf, key) != GGUF_TYPE_STRING)
        return sqz_error_set(error, SQZ_ERROR_FORMAT, "%s: a GGUF file without general.architecture is not a model",
                             path);
    if (strcmp(gguf_get_val_str(gguf, key), "squeeze-context") == 0)
        return sqz_error_set(error, SQZ_ERROR_FORMAT,
                             "%s: this is a prepared context, not a model: give the model it was prepared with", path);
    return SQZ_OK;
}

enum sqz_status sqz_model_file_open(struct gguf_context **out, const char *path, struct sqz_error *error)
{
    struct stat info;
    int descriptor;
    *out = NULL;
    enum sqz_status status = open_regular(&descriptor, &info, path, error);
    if (status != SQZ_OK) return status;
    status = check_magic(descriptor, path, error);
    close(descriptor);
    if (status == SQZ_OK) status = read_metadata(out, path, error);
    if (status == SQZ_OK) status = check_architecture(*out, path, error);
    if (status == SQZ_OK) return SQZ_OK;
    gguf_free(*out);
    *out = NULL;
    return status;
}

/* Adds an open file to the list. */
static enum sqz_status add_file(struct sqz_model_files *files, const char *path, struct sqz_error *error)
{
    struct sqz_model_file *file = &files->files[files->n];
    struct stat info;
    file->path = strdup(path);
    if (!file->path) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a model's files");
    enum sqz_status status = open_regular(&file->descriptor, &info, path, error);
    if (status != SQZ_OK) {
        free(file->path);
        return status;
    }
    file->device = info.st_dev;
    file->inode = info.st_ino;
    file->n_bytes = info.st_size;
    file->changed = info.st_mtim;
    files->n++;
    return check_magic(file->descriptor, path, error);
}

static bool has_long_factors(const struct gguf_context *gguf)
{
    return gguf_find_tensor(gguf, "rope_factors_long.weight") >= 0;
}

/* Shard `number` of `count` beside the first; its own metadata must say so. */
static enum sqz_status add_shard(struct sqz_model_files *files, const char *prefix, unsigned number, unsigned count,
                                 struct sqz_error *error)
{
    char path[PATH_MAX];
    struct gguf_context *gguf;
    if (llama_split_path(path, sizeof path, prefix, (int32_t)number, (int32_t)count) <= 0)
        return sqz_error_set(error, SQZ_ERROR_IO, "%s: its name is too long", prefix);
    enum sqz_status status = add_file(files, path, error);
    if (status == SQZ_ERROR_IO && access(path, F_OK) != 0)
        return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s: part %u of the %u files of this model is missing", path,
                             strerror(errno), number + 1, count);
    if (status == SQZ_OK) status = read_metadata(&gguf, path, error);
    if (status != SQZ_OK) return status;
    const unsigned no = count_at(gguf, "split.no", UINT_MAX), of = count_at(gguf, "split.count", count);
    files->long_factors |= has_long_factors(gguf);
    gguf_free(gguf);
    if (no == number && of == count) return SQZ_OK;
    if (no == UINT_MAX)
        return sqz_error_set(error, SQZ_ERROR_FORMAT,
                             "%s: a file of its own: part %u of %u of the model is wanted "
                             "under this name",
                             path, number + 1, count);
    return sqz_error_set(error, SQZ_ERROR_FORMAT, "%s: part %u of %u: part %u of %u is wanted under this name", path,
                         no + 1, of, number + 1, count);
}

static enum sqz_status add_shards(struct sqz_model_files *files, const char *path, unsigned count,
                                  struct sqz_error *error)
{
    char prefix[PATH_MAX];
    struct sqz_model_file *grown = realloc(files->files, count * sizeof *grown);
    if (!grown) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a model's files");
    files->files = grown;
    if (strlen(path) >= sizeof prefix || llama_split_prefix(prefix, sizeof prefix, path, 0, (int32_t)count) <= 0)
        return sqz_error_set(error, SQZ_ERROR_FORMAT,
                             "%s: the first of the %u files of a model: its name must end in -00001-of-%05u.gguf, and "
                             "the others must stand beside it",
                             path, count, count);
    enum sqz_status status = SQZ_OK;
    for (unsigned i = 1; i < count && status == SQZ_OK; i++) status = add_shard(files, prefix, i, count, error);
    return status;
}

enum sqz_status sqz_model_files_open(struct sqz_model_files *files, const char *path, struct sqz_error *error)
{
    memset(files, 0, sizeof *files);
    files->files = malloc(sizeof *files->files);
    if (!files->files) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a model's files");
    enum sqz_status status = add_file(files, path, error);
    if (status == SQZ_OK) status = read_metadata(&files->gguf, path, error);
    if (status == SQZ_OK) status = check_architecture(files->gguf, path, error);
    if (status != SQZ_OK) return status;
    files->long_factors = has_long_factors(files->gguf);
    const unsigned count = count_at(files->gguf, "split.count", 1);
    return count > 1 ? add_shards(files, path, count, error) : SQZ_OK;
}

void sqz_model_files_close(struct sqz_model_files *files)
{
    for (size_t i = 0; i < files->n; i++) {
        close(files->files[i].descriptor);
        free(files->files[i].path);
    }
    free(files->files);
    gguf_free(files->gguf);
    memset(files, 0, sizeof *files);
}

enum sqz_status sqz_model_files_fingerprint(char out[65], const struct sqz_model_files *files, struct sqz_error *error)
{
    char *all = calloc(files->n, 65);
    if (!all) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a model's files");
    enum sqz_status status = SQZ_OK;
    size_t length = 0;
    for (size_t i = 0; i < files->n && status == SQZ_OK; i++) {
        status = sqz_file_fingerprint(out, files->files[i].descriptor, files->files[i].path, error);
        if (status == SQZ_OK) length += (size_t)snprintf(all + length, 65, "%s", out);
    }
    if (status == SQZ_OK && files->n > 1) sqz_fingerprint_bytes(out, all, length);
    free(all);
    return status;
}

static bool unchanged(const struct sqz_model_file *file, const struct stat *now)
{
    return now->st_dev == file->device && now->st_ino == file->inode && now->st_size == file->n_bytes &&
           now->st_mtim.tv_sec == file->changed.tv_sec && now->st_mtim.tv_nsec == file->changed.tv_nsec;
}

enum sqz_status sqz_model_files_check(const struct sqz_model_files *files, bool by_name, struct sqz_error *error)
{
    struct stat now;
    for (size_t i = 0; i < files->n; i++) {
        const struct sqz_model_file *file = &files->files[i];
        const bool same = fstat(file->descriptor, &now) == 0 && unchanged(file, &now) &&
                          (!by_name || (stat(file->path, &now) == 0 && unchanged(file, &now)));
        if (!same)
            return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                                 "%s: the model's file has changed since it was opened: open the model again",
                                 file->path);
    }
    return SQZ_OK;
}

enum sqz_status sqz_model_fingerprint(char out[65], const char *path, struct sqz_error *error)
{
    struct sqz_model_files files = {0};
    sqz_error_clear(error);
    enum sqz_status status = sqz_model_files_open(&files, path, error);
    if (status == SQZ_OK) status = sqz_model_files_fingerprint(out, &files, error);
    sqz_model_files_close(&files);
    return status;
}
