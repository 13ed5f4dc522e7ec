/* The folder of contexts; library.h describes it. */
#define _POSIX_C_SOURCE 200809L
#include "library.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "context_file.h"
#include "conversation.h"
#include "crew.h"
#include "error.h"

enum { KEPT_FAILURE_SECONDS = 3600 };

static const char ending[] = ".sqz.gguf", pin_ending[] = ".pinned", automatic_ending[] = ".automatic";

/* ---- Names ------------------------------------------------------------------------- */

static bool is_plain(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

bool context_id_is_good(const char *id)
{
    const size_t n = strlen(id);
    if (n == 0 || n > CONTEXT_ID_MAX || !is_plain(id[0])) return false;
    for (size_t i = 0; i < n; i++)
        if (!is_plain(id[i]) && id[i] != '.' && id[i] != '_' && id[i] != '-') return false;
    return true;
}

static void file_name(char name[CONTEXT_ID_MAX + 32], const char *id, const char *end)
{
    snprintf(name, CONTEXT_ID_MAX + 32, "%s%s", id, end);
}

char *library_file(const struct library *l, const char *id, const char *end)
{
    struct bytes path = {0};
    bytes_print(&path, "%s/%s%s", l->path, id, end ? end : ending);
    if (path.failed) bytes_free(&path);
    return path.data;
}

static bool mark_exists(const struct library *l, const char *id, const char *end)
{
    char name[CONTEXT_ID_MAX + 32];
    struct stat status;
    file_name(name, id, end);
    return fstatat(l->folder, name, &status, AT_SYMLINK_NOFOLLOW) == 0;
}

static bool set_mark(const struct library *l, const char *id, const char *end, bool wanted)
{
    char name[CONTEXT_ID_MAX + 32];
    file_name(name, id, end);
    if (!wanted) return unlinkat(l->folder, name, 0) == 0 || errno == ENOENT;
    const int file = openat(l->folder, name, O_CREAT | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0) return false;
    return close(file) == 0;
}

/* ---- Entries ------------------------------------------------------------------------ */

static void entry_free(struct entry *e)
{
    sqz_context_free(e->context);
    free(e->document);
    free(e);
}

/* What an entry holds open; it is not listed any more. */
static void drop(struct library *l, struct entry *e)
{
    for (struct entry **at = &l->entries; *at; at = &(*at)->next)
        if (*at == e) {
            *at = e->next;
            break;
        }
    e->listed = false;
    if (e->references == 0) entry_free(e);
}

static struct entry *find(struct library *l, const char *id)
{
    for (struct entry *e = l->entries; e; e = e->next)
        if (strcmp(e->id, id) == 0) return e;
    return NULL;
}

static struct entry *add(struct library *l, const char *id)
{
    struct entry *e = calloc(1, sizeof *e);
    if (!e) return NULL;
    snprintf(e->id, sizeof e->id, "%s", id);
    e->created = e->used = time(NULL);
    e->listed = true;
    e->next = l->entries;
    l->entries = e;
    return e;
}

/* One head's curve at the points: the mass that is lost where so much is read. */
static bool add_curve(double *sums, const struct sqz_layer *layer, uint32_t head)
{
    const float *share, *lost;
    const size_t n = sqz_layer_curve(layer, head, NULL, &share, &lost);
    if (n == 0) return false;
    for (int i = 0; i < MISSED_POINTS; i++) {
        const float at = (float)i / (MISSED_POINTS - 1);
        size_t best = 0;
        for (size_t p = 1; p < n; p++)
            if ((share[p] - at) * (share[p] - at) < (share[best] - at) * (share[best] - at)) best = p;
        sums[i] += i == MISSED_POINTS - 1 ? 0 : (double)lost[best];
    }
    return true;
}

static void fill_missed(struct entry *e)
{
    double sums[MISSED_POINTS] = {0};
    size_t n = 0;
    for (uint32_t l = 0; l < e->info.n_layer; l++)
        for (uint32_t h = 0; h < e->info.n_head_kv; h++) n += add_curve(sums, sqz_context_layer(e->context, l), h);
    for (int i = 0; i < MISSED_POINTS; i++) e->missed[i] = n ? (float)(sums[i] / (double)n) : 0;
}

double entry_missed(const struct entry *e, double share)
{
    const double at = share * (MISSED_POINTS - 1);
    if (!(at > 0)) return (double)e->missed[0];
    if (at >= MISSED_POINTS - 1) return 0;
    const int i = (int)at;
    return (double)e->missed[i] + (at - i) * ((double)e->missed[i + 1] - (double)e->missed[i]);
}

/* A model's own session says whether the context is its: cheaper and just as sure. */
static enum sqz_status check_model(const struct library *l, const struct entry *e, struct sqz_error *error)
{
    struct sqz_model_info info;
    sqz_model_get_info(l->model, &info);
    if (strcmp(info.fingerprint, e->info.model_fingerprint) == 0) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_MISMATCH, "prepared with another model (%.60s)", e->info.model_name);
}

/* Whether a file has the name that shard `shard` of so many is written with: an index may say what it likes. */
static bool is_shard_name(const char *name, uint32_t shard, uint32_t count)
{
    char end[64];
    snprintf(end, sizeof end, "-%05u-of-%05u%s", shard + 1, count, ending);
    const size_t n = strlen(name), n_end = strlen(end);
    return n > n_end && strcmp(name + n - n_end, end) == 0;
}

/* Calls `each` with the names of an open context's shards. */
static void each_shard(const struct library *l, struct entry *e,
                       void (*each)(const struct library *, struct entry *, const char *))
{
    const struct sqz_shard_place *shard = e->context ? &sqz_context_get_meta(e->context)->shard : NULL;
    for (uint32_t i = 0; shard && i < shard->count; i++)
        if (is_shard_name(shard->files[i], i, shard->count)) each(l, e, shard->files[i]);
}

static void add_bytes(const struct library *l, struct entry *e, const char *name)
{
    struct stat status;
    if (fstatat(l->folder, name, &status, 0) == 0) e->info.file_bytes += (uint64_t)status.st_size;
}

static void remove_shard(const struct library *l, struct entry *e, const char *name)
{
    (void)e;
    unlinkat(l->folder, name, 0);
}

/* Opens the entry's file without the lock: it may take a while. */
static enum sqz_status open_file(const struct library *l, struct entry *e, struct sqz_error *error)
{
    char *path = library_file(l, e->id, NULL);
    if (!path) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    enum sqz_status status = sqz_context_open(&e->context, path, NULL, error);
    free(path);
    if (status != SQZ_OK) return status;
    sqz_context_get_info(e->context, &e->info);
    each_shard(l, e, add_bytes);
    status = check_model(l, e, error);
    if (status == SQZ_OK)
        status = sqz_context_document(l->model, e->context, &e->document, &e->document_bytes, &e->n_before,
                                      &e->begins_plainly, error);
    if (status == SQZ_OK) {
        fill_missed(e);
        return SQZ_OK;
    }
    sqz_context_free(e->context);
    e->context = NULL;
    memset(&e->info, 0, sizeof e->info);
    return status;
}

/* With the lock. No path of this machine is a client's business. */
static void set_failed(struct entry *e, const struct sqz_error *error)
{
    const char *reason = strstr(error->message, ending);
    reason = reason ? reason + strlen(ending) : error->message;
    while (*reason == ':' || *reason == ' ') reason++;
    snprintf(e->problem, sizeof e->problem, "%.400s", reason);
    e->state = ENTRY_FAILED;
}

bool library_admit(struct library *l, struct entry *e, struct sqz_error *error)
{
    const enum sqz_status status = open_file(l, e, error);
    sqz_crew_dismiss(); /* large files are checked by several threads */
    pthread_mutex_lock(&l->lock);
    if (status == SQZ_OK) e->state = ENTRY_READY;
    else set_failed(e, error);
    pthread_mutex_unlock(&l->lock);
    return status == SQZ_OK;
}

void library_spoil(struct library *l, struct entry *e, const struct sqz_error *error)
{
    pthread_mutex_lock(&l->lock);
    if (e->state == ENTRY_READY) set_failed(e, error);
    e->spoiled = true;
    pthread_mutex_unlock(&l->lock);
}

bool entry_is_ready(const struct entry *e, struct fault *fault)
{
    if (e->state == ENTRY_READY) return true;
    if (e->state == ENTRY_FAILED)
        return fault_set(fault, 409, "context_unusable", "model", "the context %s cannot be used: %s", e->id,
                         e->problem);
    fault->retry_after = 5;
    return fault_set(fault, 409, "context_not_ready", "model", "the context %s is still being prepared", e->id);
}

/* ---- The folder ------------------------------------------------------------------------ */

/* The name of the context whose file this is; false: it is none. */
static bool id_of_file(char id[CONTEXT_ID_MAX + 1], const char *name)
{
    const size_t n = strlen(name), end = strlen(ending);
    if (n <= end || n - end > CONTEXT_ID_MAX || strcmp(name + n - end, ending) != 0) return false;
    memcpy(id, name, n - end);
    id[n - end] = '\0';
    return context_id_is_good(id);
}

/* Whether an id ends as a shard's does, and what is before that is there, too: the index, which stands for all. */
static bool is_of_index(const struct library *l, const char *id)
{
    static const char form[] = "-00000-of-00000";
    const size_t n = strlen(id), n_form = sizeof form - 1;
    char index[CONTEXT_ID_MAX + 1];
    if (n <= n_form) return false;
    for (size_t i = 0; i < n_form; i++) {
        const char is = id[n - n_form + i];
        if (form[i] == '0' ? is < '0' || is > '9' : is != form[i]) return false;
    }
    memcpy(index, id, n - n_form);
    index[n - n_form] = '\0';
    return mark_exists(l, index, ending);
}

static void take_file(struct library *l, const char *name)
{
    char id[CONTEXT_ID_MAX + 1];
    struct stat status;
    struct sqz_error error;
    if (!id_of_file(id, name) || fstatat(l->folder, name, &status, 0) != 0 || !S_ISREG(status.st_mode)) return;
    if (is_of_index(l, id)) return;
    pthread_mutex_lock(&l->lock);
    struct entry *e = find(l, id) ? NULL : add(l, id);
    if (e) {
        e->created = status.st_mtime;
        e->used = status.st_atime;
        e->pinned = mark_exists(l, id, pin_ending);
        e->automatic = mark_exists(l, id, automatic_ending);
        e->references++;
    }
    pthread_mutex_unlock(&l->lock);
    if (!e) return;
    library_admit(l, e, &error);
    library_release(l, e);
}

static bool file_is_there(const struct library *l, const char *id)
{
    return mark_exists(l, id, ending);
}

/* Of an entry that nobody uses: another program removed its file, or it failed an hour ago to come to one. */
static bool is_lost(const struct library *l, const struct entry *e)
{
    const bool failed = e->state == ENTRY_FAILED && !e->cancelled;
    if (failed && e->unmade && time(NULL) - e->used < KEPT_FAILURE_SECONDS) return false;
    return (failed || e->state == ENTRY_READY) && !file_is_there(l, e->id);
}

static void drop_lost(struct library *l)
{
    pthread_mutex_lock(&l->lock);
    for (struct entry *e = l->entries, *next; e; e = next) {
        next = e->next;
        if (e->references == 0 && is_lost(l, e)) drop(l, e);
    }
    pthread_mutex_unlock(&l->lock);
}

/* Their files are opened anew, with all that is checked then. */
static void drop_spoiled(struct library *l)
{
    pthread_mutex_lock(&l->lock);
    for (struct entry *e = l->entries, *next; e; e = next) {
        next = e->next;
        if (e->spoiled && e->references == 0) drop(l, e);
    }
    pthread_mutex_unlock(&l->lock);
}

void library_scan(struct library *l)
{
    drop_spoiled(l);
    DIR *folder = opendir(l->path);
    if (!folder) return;
    for (const struct dirent *d; (d = readdir(folder));) take_file(l, d->d_name);
    closedir(folder);
    drop_lost(l);
}

enum sqz_status library_open(struct library *l, const char *path, const struct sqz_model *model,
                             struct sqz_error *error)
{
    memset(l, 0, sizeof *l);
    pthread_mutex_init(&l->lock, NULL);
    l->model = model;
    l->folder = -1;
    l->path = malloc(strlen(path) + 1);
    if (!l->path) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    memcpy(l->path, path, strlen(path) + 1);
    if (mkdir(path, 0700) != 0 && errno != EEXIST)
        return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", path, strerror(errno));
    l->folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (l->folder < 0) return sqz_error_set(error, SQZ_ERROR_IO, "%s: %s", path, strerror(errno));
    library_scan(l);
    return SQZ_OK;
}

void library_close(struct library *l)
{
    while (l->entries) {
        struct entry *e = l->entries;
        l->entries = e->next;
        entry_free(e);
    }
    if (l->folder >= 0) close(l->folder);
    free(l->path);
    pthread_mutex_destroy(&l->lock);
}

/* ---- Getting and matching ----------------------------------------------------------------- */

static struct entry *take(struct entry *e)
{
    if (e) {
        e->references++;
        e->used = time(NULL);
    }
    return e;
}

struct entry *library_get(struct library *l, const char *id)
{
    pthread_mutex_lock(&l->lock);
    struct entry *e = take(find(l, id));
    pthread_mutex_unlock(&l->lock);
    return e;
}

void library_release(struct library *l, struct entry *e)
{
    if (!e) return;
    pthread_mutex_lock(&l->lock);
    if (--e->references == 0 && !e->listed) entry_free(e);
    pthread_mutex_unlock(&l->lock);
}

struct entry *library_match_text(struct library *l, const char *text, size_t n, bool has_template)
{
    struct entry *best = NULL;
    pthread_mutex_lock(&l->lock);
    for (struct entry *e = l->entries; e; e = e->next)
        if (e->state == ENTRY_READY && e->begins_plainly && e->info.has_template == has_template &&
            e->document_bytes > 0 && e->document_bytes <= n && (!best || e->document_bytes > best->document_bytes) &&
            memcmp(e->document, text, e->document_bytes) == 0)
            best = e;
    take(best);
    pthread_mutex_unlock(&l->lock);
    return best;
}

struct entry *library_match_tokens(struct library *l, const int32_t *tokens, size_t n)
{
    struct entry *best = NULL;
    pthread_mutex_lock(&l->lock);
    for (struct entry *e = l->entries; e; e = e->next)
        if (e->state == ENTRY_READY && e->info.n_tokens < n && (!best || e->info.n_tokens > best->info.n_tokens) &&
            memcmp(e->info.tokens, tokens, e->info.n_tokens * sizeof *tokens) == 0)
            best = e;
    take(best);
    pthread_mutex_unlock(&l->lock);
    return best;
}

/* ---- Changes ---------------------------------------------------------------------------------- */

struct entry *library_reserve(struct library *l, const char *id, bool automatic, struct fault *fault)
{
    pthread_mutex_lock(&l->lock);
    struct entry *e = find(l, id);
    if (e && e->state == ENTRY_FAILED && e->references == 0 && !file_is_there(l, id)) {
        drop(l, e);
        e = NULL;
    }
    if (e) fault_set(fault, 409, "context_exists", "name", "a context named %s is there already", id);
    else if (!(e = add(l, id))) fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
    else {
        e->state = ENTRY_WAITING;
        e->automatic = automatic;
        e->references++;
        if (automatic) set_mark(l, id, automatic_ending, true);
    }
    if (fault->status) e = NULL;
    pthread_mutex_unlock(&l->lock);
    return e;
}

void library_progress(struct library *l, struct entry *e, enum entry_state state, double done)
{
    pthread_mutex_lock(&l->lock);
    e->state = state;
    e->done = done;
    pthread_mutex_unlock(&l->lock);
}

void library_fail(struct library *l, struct entry *e, const char *problem)
{
    pthread_mutex_lock(&l->lock);
    e->state = ENTRY_FAILED;
    e->unmade = !e->automatic;
    e->used = time(NULL);
    snprintf(e->problem, sizeof e->problem, "%s", problem);
    pthread_mutex_unlock(&l->lock);
}

bool library_pin(struct library *l, struct entry *e, bool pinned)
{
    pthread_mutex_lock(&l->lock);
    const bool done = set_mark(l, e->id, pin_ending, pinned);
    if (done) e->pinned = pinned;
    pthread_mutex_unlock(&l->lock);
    return done;
}

/* With the lock: the files go now, the index first, memory when the last who uses it lets go. */
static void delete_entry(struct library *l, struct entry *e)
{
    char name[CONTEXT_ID_MAX + 32];
    file_name(name, e->id, ending);
    unlinkat(l->folder, name, 0);
    each_shard(l, e, remove_shard);
    set_mark(l, e->id, pin_ending, false);
    set_mark(l, e->id, automatic_ending, false);
    e->cancelled = true;
    if (e->listed) drop(l, e);
}

void library_delete(struct library *l, struct entry *e)
{
    pthread_mutex_lock(&l->lock);
    delete_entry(l, e);
    pthread_mutex_unlock(&l->lock);
}

bool library_make_room(struct library *l, uint64_t bytes)
{
    bool room = false;
    pthread_mutex_lock(&l->lock);
    while (!room) {
        uint64_t sum = bytes;
        struct entry *oldest = NULL;
        for (struct entry *e = l->entries; e; e = e->next) {
            if (e->state == ENTRY_READY) sum += e->info.file_bytes;
            if (e->state == ENTRY_READY && !e->pinned && e->references == 0 && (!oldest || e->used < oldest->used))
                oldest = e;
        }
        room = l->most_bytes == 0 || sum <= l->most_bytes;
        if (room || !oldest) break;
        delete_entry(l, oldest);
    }
    pthread_mutex_unlock(&l->lock);
    return room;
}

/* ---- What clients see ----------------------------------------------------------------------------- */

static const char *state_name(const struct entry *e)
{
    static const char *const names[] = {"waiting", "converting", "reading", "squeezing", "ready", "failed"};
    return names[e->state];
}

/* With the lock. */
static json_t *describe(const struct entry *e)
{
    json_t *root = json_pack("{s:s, s:s, s:s, s:I, s:I, s:b, s:b}", "id", e->id, "object", "context", "status",
                             state_name(e), "created", (json_int_t)e->created, "last_used", (json_int_t)e->used,
                             "pinned", e->pinned, "automatic", e->automatic);
    if (e->state == ENTRY_READY) {
        json_object_set_new(root, "tokens", json_integer((json_int_t)e->info.n_tokens));
        json_object_set_new(root, "bytes", json_integer((json_int_t)e->info.file_bytes));
        json_object_set_new(root, "budget_floor", json_real((double)e->info.budget_floor));
        json_object_set_new(root, "rule", json_string(e->info.squeeze.rule == SQZ_RULE_PAPER ? "paper" : "default"));
    } else if (e->state == ENTRY_FAILED) {
        json_object_set_new(root, "error", json_string(e->problem));
    } else {
        json_object_set_new(root, "progress", json_real(e->done));
    }
    return root;
}

json_t *entry_json(struct library *l, struct entry *e)
{
    pthread_mutex_lock(&l->lock);
    json_t *root = describe(e);
    pthread_mutex_unlock(&l->lock);
    return root;
}

json_t *library_json(struct library *l)
{
    json_t *list = json_array();
    pthread_mutex_lock(&l->lock);
    for (const struct entry *e = l->entries; e; e = e->next) json_array_append_new(list, describe(e));
    pthread_mutex_unlock(&l->lock);
    return json_pack("{s:s, s:o}", "object", "list", "data", list);
}

void library_each(struct library *l, void (*each)(void *data, const struct entry *entry), void *data)
{
    pthread_mutex_lock(&l->lock);
    for (const struct entry *e = l->entries; e; e = e->next)
        if (e->state == ENTRY_READY) each(data, e);
    pthread_mutex_unlock(&l->lock);
}
