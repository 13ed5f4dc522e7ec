/*
 * The folder of prepared contexts: which there are, who uses them, and which of them a conversation begins with. Any
 * thread may call; an entry that was got stays until it is let go of, also when its file is deleted meanwhile.
 */
#ifndef SQZ_SERVER_LIBRARY_H
#define SQZ_SERVER_LIBRARY_H

#include <jansson.h>
#include <pthread.h>
#include <stdint.h>
#include <time.h>

#include "fault.h"
#include "squeeze.h"

enum { CONTEXT_ID_MAX = 64, MISSED_POINTS = 65 };

enum entry_state {
    ENTRY_WAITING,    /* an upload whose reading has not begun */
    ENTRY_CONVERTING, /* text is made of another kind of document */
    ENTRY_READING,
    ENTRY_SQUEEZING, /* clustering, calibrating, writing */
    ENTRY_READY,
    ENTRY_FAILED /* problem says why: damaged, of another model, or a job that failed */
};

struct entry {
    char id[CONTEXT_ID_MAX + 1];
    enum entry_state state;
    char problem[512];
    double done; /* of a job: the share of its phase */
    bool cancelled, pinned, automatic, listed;
    bool spoiled; /* FAILED since it was open */
    bool unmade;  /* FAILED before there was a file: an upload whose user is to see why */
    int references;
    time_t created, used;
    struct sqz_context *context; /* READY: open */
    struct sqz_context_info info;
    char *document; /* its text, without new lines at its end */
    size_t document_bytes;
    size_t n_before;             /* tokens before it */
    bool begins_plainly;         /* nothing but the model's template stands before it */
    float missed[MISSED_POINTS]; /* attention mass lost where i / 64 is read, as calibrated */
    struct entry *next;
};

struct library {
    pthread_mutex_t lock;
    const struct sqz_model *model;
    int folder; /* descriptor */
    char *path;
    struct entry *entries;
    uint64_t most_bytes; /* of files; 0: no limit */
};

/* Opens all context files of a folder, which is made when it is missing. Damaged ones are listed as such. */
enum sqz_status library_open(struct library *library, const char *path, const struct sqz_model *model,
                             struct sqz_error *error);
void library_close(struct library *library);

/* Looks for files that came or went: other programs may write to the folder. */
void library_scan(struct library *library);

/* Whether a name may be a context's: letters, digits, '.', '_', '-', beginning with a letter or digit. */
bool context_id_is_good(const char *id);

/* The entry of a name whatever its state; NULL: none. library_release() when done. */
struct entry *library_get(struct library *library, const char *id);
void library_release(struct library *library, struct entry *entry);

/* The ready entry, prepared with or without a chat template, whose document a text begins with, the longest; NULL:
 * none. */
struct entry *library_match_text(struct library *library, const char *text, size_t n_bytes, bool has_template);
/* The ready entry whose tokens a sequence begins with and goes on from, the longest; NULL: none. */
struct entry *library_match_tokens(struct library *library, const int32_t *tokens, size_t n_tokens);

/* A name for what will be prepared: taken from now on. NULL, and the fault, when it is taken already. */
struct entry *library_reserve(struct library *library, const char *id, bool automatic, struct fault *fault);
/* What a job says of its entry; the file of one that is READY is opened. */
void library_progress(struct library *library, struct entry *entry, enum entry_state state, double done);
void library_fail(struct library *library, struct entry *entry, const char *problem);
/* One that was ready: its file changed, or a part of it cannot be read any more. Refused until a scan finds it whole.
 */
void library_spoil(struct library *library, struct entry *entry, const struct sqz_error *error);
bool library_admit(struct library *library, struct entry *entry, struct sqz_error *error);
/* The path of an entry's file, malloc'ed. */
char *library_file(const struct library *library, const char *id, const char *ending);

bool library_pin(struct library *library, struct entry *entry, bool pinned);
void library_delete(struct library *library, struct entry *entry);
/* Deletes the least recently used files that are neither pinned nor in use until so many bytes have room. */
bool library_make_room(struct library *library, uint64_t bytes);

/* False, and the fault, for one that is not ready. */
bool entry_is_ready(const struct entry *entry, struct fault *fault);
double entry_missed(const struct entry *entry, double share);
json_t *entry_json(struct library *library, struct entry *entry);
json_t *library_json(struct library *library);
/* Calls for each ready entry's name, under the lock. */
void library_each(struct library *library, void (*each)(void *data, const struct entry *entry), void *data);

#endif
