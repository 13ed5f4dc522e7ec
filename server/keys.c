/* API keys; keys.h describes them. */
#define _POSIX_C_SOURCE 200809L
#include "keys.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "error.h"

enum { LEAST_KEY = 16, MOST_KEY = 256, MOST_KEYS = 1024 };

struct keys {
    size_t n;
    char key[MOST_KEYS][MOST_KEY + 1]; /* zeros behind */
};

static enum sqz_status check_key(const char *path, size_t line, const char *key, struct sqz_error *error)
{
    const size_t n = strlen(key);
    if (n < LEAST_KEY || n > MOST_KEY)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%s, line %zu: a key of %zu characters; allowed are %d to %d",
                             path, line, n, LEAST_KEY, MOST_KEY);
    for (size_t i = 0; i < n; i++)
        if (key[i] <= ' ' || key[i] > '~')
            return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                                 "%s, line %zu: a key has visible ASCII characters only, no blanks", path, line);
    return SQZ_OK;
}

static enum sqz_status read_lines(struct keys *keys, FILE *file, const char *path, struct sqz_error *error)
{
    char *line = NULL;
    size_t capacity = 0, number = 0;
    enum sqz_status status = SQZ_OK;
    while (status == SQZ_OK && getline(&line, &capacity, file) >= 0) {
        number++;
        line[strcspn(line, "\r\n")] = '\0';
        if (!line[0] || line[0] == '#') continue;
        status = check_key(path, number, line, error);
        if (status == SQZ_OK && keys->n == MOST_KEYS)
            status = sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%s: more than %d keys", path, MOST_KEYS);
        if (status == SQZ_OK) memcpy(keys->key[keys->n++], line, strlen(line));
    }
    free(line);
    return status;
}

enum sqz_status keys_read(struct keys **out, const char *path, struct sqz_error *error)
{
    struct stat about;
    FILE *file = fopen(path, "re");
    *out = NULL;
    if (!file) return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", path, strerror(errno));
    struct keys *keys = calloc(1, sizeof *keys);
    enum sqz_status status = keys ? SQZ_OK : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for keys");
    if (status == SQZ_OK && fstat(fileno(file), &about) == 0 && S_ISREG(about.st_mode) && (about.st_mode & 077))
        status = sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                               "%s: others may read or write it (mode %03o); chmod 600 keeps keys secret", path,
                               (unsigned)(about.st_mode & 0777));
    if (status == SQZ_OK) status = read_lines(keys, file, path, error);
    if (status == SQZ_OK && keys->n == 0)
        status = sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%s: no key in it; a key is a line of its own", path);
    fclose(file);
    if (status == SQZ_OK) *out = keys;
    else keys_free(keys);
    return status;
}

void keys_free(struct keys *keys)
{
    if (keys) memset(keys, 0, sizeof *keys);
    free(keys);
}

int keys_find(const struct keys *keys, const char *key)
{
    unsigned char wanted[MOST_KEY + 1] = {0};
    int found = -1;
    const size_t n = strlen(key);
    if (n == 0 || n > MOST_KEY) return -1;
    memcpy(wanted, key, n);
    for (size_t k = 0; k < keys->n; k++) {
        unsigned differs = 0;
        for (size_t i = 0; i <= MOST_KEY; i++) differs |= wanted[i] ^ (unsigned char)keys->key[k][i];
        found = differs ? found : (int)k;
    }
    return found;
}
