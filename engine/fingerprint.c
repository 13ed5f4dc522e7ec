/* Fingerprints of model files; see fingerprint.h for what is hashed. */
#define _GNU_SOURCE /* mmap flags */
#include "fingerprint.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "error.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

static const size_t whole_bytes = (size_t)512 << 20, head_bytes = (size_t)16 << 20, sample_bytes = (size_t)1 << 20;
enum { N_SAMPLES = 256 };

static void write_hex(char out[65], XXH128_hash_t hash)
{
    snprintf(out, 65, "%016llx%016llx", (unsigned long long)hash.high64, (unsigned long long)hash.low64);
}

void sqz_fingerprint_bytes(char out[65], const void *bytes, size_t n_bytes)
{
    write_hex(out, XXH3_128bits(bytes, n_bytes));
}

enum sqz_status sqz_file_fingerprint(char out[65], int descriptor, const char *path, struct sqz_error *error)
{
    struct stat info;
    if (fstat(descriptor, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size <= 0)
        return sqz_error_set(error, SQZ_ERROR_IO, "%s: not a regular file with contents", path);
    const size_t size = (size_t)info.st_size;
    const unsigned char *bytes = mmap(NULL, size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (bytes == MAP_FAILED) return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", path, strerror(errno));
    XXH3_state_t state;
    XXH3_128bits_reset(&state);
    if (size <= whole_bytes) {
        XXH3_128bits_update(&state, bytes, size);
    } else {
        const uint64_t size64 = size;
        XXH3_128bits_update(&state, &size64, sizeof size64);
        XXH3_128bits_update(&state, bytes, head_bytes);
        for (size_t i = 1; i <= N_SAMPLES; i++)
            XXH3_128bits_update(&state, bytes + (size - sample_bytes) / N_SAMPLES * i, sample_bytes);
    }
    munmap((void *)(uintptr_t)bytes, size);
    write_hex(out, XXH3_128bits_digest(&state));
    return SQZ_OK;
}
