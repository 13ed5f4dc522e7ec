/*
 * A model's metadata: what is read of a GGUF file before llama.cpp loads it,
 * by `analyze` and when a model is opened, alone and as the first of two
 * shards.
 */
#define _GNU_SOURCE /* memmem */
#include "fuzz.h"
#include "model_files.h"
#include "out_folder.h"
#include "squeeze_roofline.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void read_shape(const char *path)
{
    struct sqz_model_shape shape;
    struct sqz_bit_widths widths;
    struct sqz_error error = {SQZ_OK, ""};
    const enum sqz_status status = sqz_model_shape_read(path, &shape, &widths, &error);
    if (status && !error.message[0])
        fuzz_fail("a model that cannot be read is refused with a reason", sqz_status_name(status));
    if (!status) {
        volatile double sum = sqz_shape_parameters(&shape) + sqz_shape_kv_bytes(&shape, &widths, 1000);
        (void)sum;
    }
}

static void open_files(const char *path)
{
    struct sqz_model_files files;
    struct sqz_error error = {SQZ_OK, ""};
    char fingerprint[65];
    enum sqz_status status = sqz_model_files_open(&files, path, &error);
    if (!status) status = sqz_model_files_fingerprint(fingerprint, &files, &error);
    if (!status && (strlen(fingerprint) != 32 || sqz_model_files_check(&files, true, &error)))
        fuzz_fail("a model that nobody touches stays what it is", error.message);
    if (status && !error.message[0])
        fuzz_fail("a model that cannot be opened is refused with a reason", sqz_status_name(status));
    sqz_model_files_close(&files);
}

static void put_shard(char path[128], unsigned number, const uint8_t *bytes, size_t n)
{
    snprintf(path, 128, "%s/model-%05u-of-00002.gguf", out_folder(), number);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, n, file) != n || fclose(file)) fuzz_fail("a target can write", path);
}

/* The second shard is the first with its own number. */
static void open_shards(const uint8_t *bytes, size_t n)
{
    static const char number[] = "split.no";
    const size_t n_number = sizeof number - 1, n_value = 6; /* type and u16 */
    uint8_t *second = malloc(n ? n : 1), *at;
    char path[128];
    if (!second) fuzz_fail("a target has memory", "a copy of the model");
    memcpy(second, bytes, n);
    at = memmem(second, n, number, n_number);
    if (at && (size_t)(second + n - at) >= n_number + n_value) at[n_number + 4] = 1;
    put_shard(path, 2, second, n);
    put_shard(path, 1, bytes, n);
    open_files(path);
    free(second);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    const char *path = fuzz_file(bytes, n);
    sqz_llama_log_take();
    read_shape(path);
    open_files(path);
    if (memmem(bytes, n, "split.count", 11)) open_shards(bytes, n);
    return 0;
}
