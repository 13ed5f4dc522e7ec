/*
 * A model's weights in 4 bits, made by llama.cpp, for drafts of exact answers
 * (draft_weights.h). The file appears when it is whole.
 */
#define _GNU_SOURCE /* O_TMPFILE, linkat of a descriptor */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "error.h"
#include "ggml.h"
#include "llama_library.h"
#include "model.h"

/* Fewer bits a weight than this have nothing to gain. */
static const double least_bits = 6;

/* Of the weights of the first file, which stand for all. */
static double bits_of(const struct sqz_model_files *files)
{
    double bytes = 0, n = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(files->gguf); i++) {
        const enum ggml_type type = gguf_get_tensor_type(files->gguf, i);
        const double size = (double)gguf_get_tensor_size(files->gguf, i);
        bytes += size;
        n += size / (double)ggml_type_size(type) * (double)ggml_blck_size(type);
    }
    return n > 0 ? 8 * bytes / n : 0;
}

static enum sqz_status check_bits(const char *path, struct sqz_error *error)
{
    struct sqz_model_files files = {0};
    const enum sqz_status status = sqz_model_files_open(&files, path, error);
    const double bits = status == SQZ_OK ? bits_of(&files) : 0;
    sqz_model_files_close(&files);
    if (status != SQZ_OK || bits >= least_bits) return status;
    return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                         "%s: its weights have %.1f bits each as they are: 4-bit weights for drafts are made of models "
                         "with %g and more, for example F16 or Q8_0",
                         path, bits, least_bits);
}

/* The folder that a file is to be in. */
static void folder_of(char folder[PATH_MAX], const char *path)
{
    const char *slash = strrchr(path, '/');
    snprintf(folder, PATH_MAX, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    if (slash == path) snprintf(folder, PATH_MAX, "/");
}

static enum sqz_status fail_to_write(const char *path, struct sqz_error *error)
{
    return sqz_error_set(error, SQZ_ERROR_IO, "%s: weights for drafts cannot be written: %s", path, strerror(errno));
}

/* A file without a name in the folder, of which nothing is left whatever happens before it is whole; where the file system
 * has no such, one of a hidden name, which is then not empty. */
static int open_nameless(char name[PATH_MAX], const char *folder)
{
    const int file = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    name[0] = '\0';
    if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR)) return file;
    if (snprintf(name, PATH_MAX, "%s/.draft-XXXXXX", folder) >= PATH_MAX) return -1;
    return mkostemp(name, O_CLOEXEC);
}

static enum sqz_status quantize_to(int file, const char *out_path, const char *path, int n_threads,
                                   struct sqz_error *error)
{
    char target[64];
    struct llama_model_quantize_params p = llama_model_quantize_default_params();
    p.nthread = n_threads;
    p.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
    p.allow_requantize = true; /* of Q8_0 */
    snprintf(target, sizeof target, "/proc/self/fd/%d", file);
    if (llama_model_quantize(path, target, &p) != 0)
        return sqz_error_set(error, SQZ_ERROR_IO, "%s: llama.cpp could not make 4-bit weights of %s: %s", out_path,
                             path, sqz_llama_complaint("unknown reason"));
    if (fsync(file) != 0) return fail_to_write(out_path, error);
    if (linkat(AT_FDCWD, target, AT_FDCWD, out_path, AT_SYMLINK_FOLLOW) != 0 && errno != EEXIST) /* another made it */
        return fail_to_write(out_path, error);
    return SQZ_OK;
}

enum sqz_status sqz_model_quantize(const char *out_path, const char *path, int n_threads, struct sqz_error *error)
{
    char folder[PATH_MAX], name[PATH_MAX];
    sqz_error_clear(error);
    enum sqz_status status = sqz_choose_threads(&n_threads, error);
    if (status == SQZ_OK) status = check_bits(path, error);
    if (status != SQZ_OK) return status;
    llama_backend_init();
    sqz_llama_complaint_clear();
    folder_of(folder, out_path);
    const int file = open_nameless(name, folder);
    if (file < 0) return fail_to_write(out_path, error);
    status = quantize_to(file, out_path, path, n_threads, error);
    if (name[0]) unlink(name);
    close(file);
    return status;
}
