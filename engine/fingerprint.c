/* Fingerprints of model files; see fingerprint.h for what is hashed. */
#define _GNU_SOURCE /* mmap and open flags */
#include "fingerprint.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

static const size_t whole_bytes = (size_t)512 << 20, head_bytes = (size_t)16 << 20, sample_bytes = (size_t)1 << 20;
enum { N_SAMPLES = 256 };

enum sqz_status sqz_file_fingerprint(char out[65], const char *path, struct sqz_error *error)
{
    struct stat info;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", path, strerror(errno));
    if (fstat(file, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size <= 0) {
        close(file);
        return sqz_error_set(error, SQZ_ERROR_IO, "%s: not a regular file with contents", path);
    }
    const size_t size = (size_t)info.st_size;
    const unsigned char *bytes = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
    close(file);
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
    const XXH128_hash_t hash = XXH3_128bits_digest(&state);
    snprintf(out, 65, "%016llx%016llx", (unsigned long long)hash.high64, (unsigned long long)hash.low64);
    return SQZ_OK;
}
