/* Contexts of one token; blanks.h describes them. */
#define _POSIX_C_SOURCE 200809L /* mkdtemp */
#define _DEFAULT_SOURCE
#include "blanks.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "error.h"

/* First tokens are few: most models begin every text with the same one, and templates with theirs. */
enum { MOST_BLANKS = 64 };

struct blanks {
    struct sqz_model *model;
    struct blank *blank[MOST_BLANKS];
    uint64_t clock;
};

struct blanks *blanks_create(struct sqz_model *model)
{
    struct blanks *b = calloc(1, sizeof *b);
    if (b) b->model = model;
    return b;
}

static void blank_free(struct blank *blank)
{
    if (!blank) return;
    sqz_context_free(blank->context);
    free(blank);
}

void blanks_free(struct blanks *b)
{
    for (int i = 0; b && i < MOST_BLANKS; i++) blank_free(b->blank[i]);
    free(b);
}

/* The file has no name any more once it is open: nothing stays behind however the program ends. */
static enum sqz_status prepare(struct blanks *b, int32_t token, struct sqz_context **out, struct sqz_error *error)
{
    const char *parent = getenv("TMPDIR");
    char folder[512], path[544];
    struct sqz_prepare_options options;
    snprintf(folder, sizeof folder, "%s/squeeze-serve.XXXXXX", parent && *parent ? parent : "/tmp");
    if (!mkdtemp(folder)) return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", folder, strerror(errno));
    snprintf(path, sizeof path, "%s/blank.sqz.gguf", folder);
    sqz_prepare_options_default(&options);
    options.squeeze.n_levels = 0;
    options.squeeze.code_words = 0;
    options.reserve_tokens = SIZE_MAX / 4; /* of what the model holds, all */
    enum sqz_status status = sqz_prepare_tokens(b->model, &token, 1, path, &options, NULL, error);
    if (status == SQZ_OK) status = sqz_context_open(out, path, NULL, error);
    unlink(path);
    rmdir(folder);
    return status;
}

enum sqz_status blanks_get(struct blanks *b, int32_t token, struct blank **out, struct sqz_error *error)
{
    int place = -1;
    *out = NULL;
    for (int i = 0; i < MOST_BLANKS; i++) {
        struct blank *blank = b->blank[i];
        if (blank && blank->token == token) {
            blank->references++;
            blank->used = ++b->clock;
            *out = blank;
            return SQZ_OK;
        }
        if (blank && blank->references) continue;
        if (place < 0 || !blank || (b->blank[place] && blank->used < b->blank[place]->used)) place = i;
    }
    if (place < 0) return sqz_error_set(error, SQZ_ERROR_MEMORY, "more than %d beginnings at once", MOST_BLANKS);
    struct blank *made = calloc(1, sizeof *made);
    if (!made) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    const enum sqz_status status = prepare(b, token, &made->context, error);
    if (status != SQZ_OK) {
        blank_free(made);
        return status;
    }
    blank_free(b->blank[place]);
    b->blank[place] = made;
    made->token = token;
    made->references = 1;
    made->used = ++b->clock;
    *out = made;
    return SQZ_OK;
}

void blanks_release(struct blank *blank)
{
    if (blank) blank->references--;
}
