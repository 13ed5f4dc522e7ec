/* Documents being prepared; jobs.h describes it. */
#define _GNU_SOURCE /* file locks */
#include "jobs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "apart.h"
#include "convert.h"
#include "error.h"
#include "preparing.h"

/* Documents whose rows are in memory at once: those that jobs read themselves, and with those that answers read for
 * them. */
enum { MOST_JOBS = 1000, MOST_BEGUN = 2, MOST_FOLLOWED = 4 };

/* A document lies in the folder as NAME.job until it is a context: what it is of (a letter), then the text, the tokens,
 * or a file of another kind, which text will be made of. */
static const char job_ending[] = ".job";
enum { OF_TEXT = 'd', OF_TOKENS = 't', OF_FILE = 'f' };

/* A text as tokens. */
struct cut {
    int32_t *tokens; /* malloc'ed; NULL: not cut yet */
    size_t n;
    bool has_template;
};

struct job {
    struct jobs *jobs;
    struct entry *entry; /* a reference */
    char kind;
    struct bytes data;
    struct cut cut; /* of a text: of one that came in an earlier run, when it is begun */
    int file;       /* NAME.job, locked: servers that share the folder leave it alone; -1: not there yet */
    uint64_t id;    /* for who reads its document; 0: nobody will */
    bool awaited;   /* somebody does */
    bool begun;     /* memory and file are reserved: by a thread of its own until ready, then the scheduler has it */
    bool ready;
    struct sqz_preparing *preparing;
    size_t n_tokens; /* of what is being prepared */
    struct sqz_error problem;
    struct job *next;
};

struct jobs {
    struct library *library;
    struct sqz_model *model;
    bool on_card; /* then finishing needs the model, too */
    void (*meanwhile)(void *data);
    void *meanwhile_data;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct job *unconverted; /* files, in order */
    struct job *waiting;     /* not read to the end, in order */
    struct job *read;        /* to be squeezed, in order */
    struct job *squeezing;
    size_t n_waiting, n_begun; /* waiting: files, too; begun: until they are squeezed */
    size_t n_beginning;        /* their threads */
    uint64_t last_id;
    atomic_bool stopping;
    size_t most_text_bytes; /* of a file */
    bool thread_runs, converter_runs;
    pthread_t thread, converter;
};

/* ---- Texts in the folder ------------------------------------------------------------ */

static bool write_all(int file, const char *data, size_t n)
{
    while (n) {
        const ssize_t done = write(file, data, n);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return false;
        data += done;
        n -= (size_t)done;
    }
    return true;
}

/* Whole or not at all; locked before anybody sees it. */
static bool keep(const struct jobs *j, struct job *job)
{
    char name[CONTEXT_ID_MAX + 16], temporary[CONTEXT_ID_MAX + 40];
    snprintf(name, sizeof name, "%s%s", job->entry->id, job_ending);
    snprintf(temporary, sizeof temporary, ".%s.%ld.new", name, (long)getpid());
    const int folder = j->library->folder;
    const int file = openat(folder, temporary, O_CREAT | O_TRUNC | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0) return false;
    const bool good = write_all(file, &job->kind, 1) && write_all(file, job->data.data, job->data.n) &&
                      fsync(file) == 0 && flock(file, LOCK_EX | LOCK_NB) == 0 &&
                      renameat(folder, temporary, folder, name) == 0 && fsync(folder) == 0;
    if (!good) {
        unlinkat(folder, temporary, 0);
        close(file);
        return false;
    }
    if (job->file >= 0) close(job->file);
    job->file = file;
    return true;
}

/* The file of a job that no other server is at work on, locked; -1: there is none. */
static int open_job(const struct jobs *j, const char *name)
{
    struct stat about;
    const int file = openat(j->library->folder, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (file < 0) return -1;
    if (flock(file, LOCK_EX | LOCK_NB) == 0 && fstat(file, &about) == 0 && about.st_nlink == 1) return file;
    close(file); /* somebody else's, or done with between the two calls */
    return -1;
}

/* Whether another server is preparing a context of this name. */
static bool is_elsewhere(const struct jobs *j, const char *id)
{
    char name[CONTEXT_ID_MAX + 16];
    snprintf(name, sizeof name, "%s%s", id, job_ending);
    const int file = openat(j->library->folder, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    if (file < 0) return false;
    const bool locked = flock(file, LOCK_EX | LOCK_NB) != 0;
    close(file);
    return locked;
}

static void forget(const struct jobs *j, const char *id)
{
    char name[CONTEXT_ID_MAX + 16];
    snprintf(name, sizeof name, "%s%s", id, job_ending);
    unlinkat(j->library->folder, name, 0);
}

static void job_free(struct jobs *j, struct job *job)
{
    if (!job) return;
    sqz_preparing_free(job->preparing);
    library_release(j->library, job->entry);
    bytes_free(&job->data);
    free(job->cut.tokens);
    if (job->file >= 0) close(job->file);
    free(job);
}

/* The job is over, well or not: it does not come back at the next start. */
static void end_job(struct jobs *j, struct job *job, const char *problem)
{
    if (problem) library_fail(j->library, job->entry, problem);
    forget(j, job->entry->id);
    job_free(j, job);
}

/* ---- Adding ---------------------------------------------------------------------------- */

static void append(struct job **list, struct job *job)
{
    while (*list) list = &(*list)->next;
    *list = job;
    job->next = NULL;
}

static void enqueue(struct jobs *j, struct job *job)
{
    pthread_mutex_lock(&j->lock);
    append(job->kind == OF_FILE ? &j->unconverted : &j->waiting, job);
    j->n_waiting++;
    if (job->kind == OF_FILE) pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
}

/* Out of the list that it is in. With the lock. */
static void unlink_waiting(struct jobs *j, const struct job *job)
{
    struct job **at = job->kind == OF_FILE ? &j->unconverted : &j->waiting;
    while (*at && *at != job) at = &(*at)->next;
    if (!*at) return;
    *at = job->next;
    j->n_waiting--;
}

/* A document under a name, which somebody reads who is known by the number reader; 0: nobody. Takes the tokens. */
static bool add(struct jobs *j, const char *id, char kind, const void *data, size_t n, struct cut *cut, uint64_t reader,
                struct fault *fault)
{
    const bool automatic = kind == OF_TOKENS;
    pthread_mutex_lock(&j->lock);
    const bool full = j->n_waiting >= MOST_JOBS;
    pthread_mutex_unlock(&j->lock);
    if (full) return fault_set(fault, 429, "queue_full", NULL, "%d documents wait already", (int)MOST_JOBS);
    if (is_elsewhere(j, id))
        return fault_set(fault, 409, "context_exists", "name", "another server is preparing a context named %s", id);
    struct job *job = calloc(1, sizeof *job);
    struct entry *entry = job ? library_reserve(j->library, id, automatic, fault) : NULL;
    if (!entry) {
        free(job);
        return fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
    }
    job->jobs = j;
    job->entry = entry;
    job->file = -1;
    job->kind = kind;
    job->id = reader;
    job->awaited = reader != 0;
    if (cut) job->cut = *cut, cut->tokens = NULL;
    bytes_append(&job->data, data, n);
    if (job->data.failed || !keep(j, job)) {
        fault_set(fault, 507, "no_space", NULL, "the document cannot be kept: no memory or no space on the disk");
        library_delete(j->library, entry);
        job_free(j, job);
        return false;
    }
    enqueue(j, job);
    return true;
}

/* Tokens of what is a text, and not too long a one. */
static bool cut_text(const struct jobs *j, const char *text, size_t n, struct cut *cut, struct fault *fault)
{
    struct sqz_error error;
    struct sqz_model_info info;
    if (sqz_document_tokens(j->model, text, n, false, &cut->tokens, &cut->n, &cut->has_template, &error) != SQZ_OK)
        return fault_from(fault, &error);
    sqz_model_get_info(j->model, &info);
    if (cut->n + 32 <= info.n_context_tokens) return true;
    fault_set(fault, 400, "context_length_exceeded", "text",
              "the document takes %zu tokens, the model holds %u and a question needs some", cut->n,
              info.n_context_tokens);
    free(cut->tokens);
    cut->tokens = NULL;
    return false;
}

/* What cannot be is said now, not in a job that fails later. */
bool jobs_add_text(struct jobs *j, const char *id, const char *text, size_t n, struct fault *fault)
{
    struct cut cut = {0};
    const bool added = cut_text(j, text, n, &cut, fault) && add(j, id, OF_TEXT, text, n, &cut, 0, fault);
    free(cut.tokens);
    return added;
}

bool jobs_add_file(struct jobs *j, const char *id, const char *data, size_t n, struct fault *fault)
{
    return convert_can(document_kind(data, n), fault) && add(j, id, OF_FILE, data, n, NULL, 0, fault);
}

/* Names of contexts that come by themselves: of what they hold, so that the same is not prepared twice. */
static void automatic_name(char name[40], const int32_t *tokens, size_t n)
{
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ (uint32_t)tokens[i]) * 1099511628211u;
    snprintf(name, 40, "auto-%016llx", (unsigned long long)hash);
}

uint64_t jobs_add_tokens(struct jobs *j, const int32_t *tokens, size_t n)
{
    struct fault fault = {0};
    char name[40];
    automatic_name(name, tokens, n);
    pthread_mutex_lock(&j->lock);
    const uint64_t reader = ++j->last_id;
    pthread_mutex_unlock(&j->lock);
    /* One that is there already is a fault, too. */
    return add(j, name, OF_TOKENS, tokens, n * sizeof *tokens, NULL, reader, &fault) ? reader : 0;
}

static struct job *job_for(struct job *list, const struct entry *entry)
{
    while (list && list->entry != entry) list = list->next;
    return list;
}

void jobs_cancel(struct jobs *j, struct entry *entry)
{
    pthread_mutex_lock(&j->lock);
    entry->cancelled = true;
    struct job *found = job_for(j->waiting, entry);
    if (!found) found = job_for(j->unconverted, entry);
    if (found && found->begun) found = NULL; /* the scheduler's thread finds out */
    if (found) unlink_waiting(j, found);
    pthread_mutex_unlock(&j->lock);
    forget(j, entry->id);
    job_free(j, found);
}

/* ---- Making text of files: a thread of its own, which waits for a child process ----------- */

static bool convert_on(void *data)
{
    const struct job *job = data;
    return !job->entry->cancelled && !job->jobs->stopping;
}

/* The file becomes its text, in memory and in the folder. */
static bool convert(struct jobs *j, struct job *job, struct fault *fault)
{
    struct bytes text = {0};
    const char *data = job->data.data;
    const size_t n = job->data.n;
    const struct document_kind *kind = document_kind(data, n);
    if (!kind) return fault_set(fault, 400, "document_unreadable", NULL, "this is no document of a known kind");
    if (!convert_run(kind, data, n, j->most_text_bytes, convert_on, job, &text, fault) ||
        !cut_text(j, text.data ? text.data : "", text.n, &job->cut, fault)) {
        bytes_free(&text);
        return false;
    }
    bytes_free(&job->data);
    job->data = text;
    job->kind = OF_TEXT;
    return keep(j, job) || fault_set(fault, 507, "no_space", NULL, "the document's text cannot be kept on the disk");
}

static struct job *next_file(struct jobs *j)
{
    pthread_mutex_lock(&j->lock);
    while (!j->unconverted && !j->stopping) pthread_cond_wait(&j->changed, &j->lock);
    struct job *job = j->stopping ? NULL : j->unconverted;
    if (job) unlink_waiting(j, job);
    pthread_mutex_unlock(&j->lock);
    return job;
}

static void *convert_all(void *data)
{
    struct jobs *j = data;
    for (struct job *job; (job = next_file(j));) {
        struct fault fault = {0};
        library_progress(j->library, job->entry, ENTRY_CONVERTING, 0);
        const bool good = convert(j, job, &fault);
        if (job->entry->cancelled) end_job(j, job, "cancelled");
        else if (!good && j->stopping) job_free(j, job); /* goes on at the next start */
        else if (!good) end_job(j, job, fault.message);
        else {
            library_progress(j->library, job->entry, ENTRY_WAITING, 0);
            enqueue(j, job);
        }
    }
    return NULL;
}

/* ---- Squeezing: a thread of its own ------------------------------------------------------- */

/* Asked while a document is read, by the scheduler's thread, and while it is squeezed, by ours. */
static bool go_on(const struct sqz_progress *progress, void *data)
{
    struct job *job = data;
    struct jobs *j = job->jobs;
    if (strcmp(progress->phase, "read") != 0) {
        library_progress(j->library, job->entry, ENTRY_SQUEEZING, progress->done / progress->total);
        if (j->on_card && j->meanwhile) j->meanwhile(j->meanwhile_data);
    }
    return !job->entry->cancelled && !j->stopping;
}

static void squeeze(struct jobs *j, struct job *job)
{
    struct sqz_error error;
    struct sqz_model_info info;
    sqz_model_get_info(j->model, &info);
    const enum sqz_status status = sqz_preparing_finish(job->preparing, j->on_card ? info.n_threads : 1, NULL, &error);
    sqz_preparing_free(job->preparing);
    job->preparing = NULL;
    if (status == SQZ_ERROR_CANCELLED && j->stopping) job_free(j, job); /* goes on at the next start */
    else if (status != SQZ_OK) end_job(j, job, error.message);
    else {
        library_admit(j->library, job->entry, &error);
        library_make_room(j->library, 0);
        end_job(j, job, NULL);
    }
    pthread_mutex_lock(&j->lock);
    j->squeezing = NULL;
    j->n_begun--;
    pthread_mutex_unlock(&j->lock);
}

/* With the lock: the next one that was read. */
static struct job *take_read(struct jobs *j)
{
    j->squeezing = j->read;
    if (j->read) j->read = j->read->next;
    return j->squeezing;
}

static void *squeeze_all(void *data)
{
    struct jobs *j = data;
    apart_come_last(5);
    for (;;) {
        pthread_mutex_lock(&j->lock);
        while ((!j->read || j->on_card) && !j->stopping) pthread_cond_wait(&j->changed, &j->lock);
        struct job *job = j->stopping ? NULL : take_read(j);
        pthread_mutex_unlock(&j->lock);
        if (!job) return NULL;
        squeeze(j, job);
    }
}

/* ---- Reading: the scheduler's thread ------------------------------------------------------------ */

static size_t left_of(const struct job *job)
{
    return job->preparing ? sqz_preparing_left(job->preparing) : 0;
}

/* With the lock: the job to read on; NULL: none. What needs least comes first, so that it can be squeezed. */
static struct job *next_job(const struct jobs *j)
{
    struct job *best = NULL;
    const bool room = j->n_begun < (j->on_card ? 1 : MOST_BEGUN);
    for (struct job *job = j->waiting; job; job = job->next) {
        if ((job->awaited && !job->entry->cancelled) || (job->begun && !job->ready)) continue;
        if (!job->begun && (!room || best)) continue;
        if (!best || !best->begun || left_of(job) < left_of(best)) best = job;
    }
    return best;
}

bool jobs_have_work(struct jobs *j)
{
    pthread_mutex_lock(&j->lock);
    const bool work = next_job(j) != NULL;
    pthread_mutex_unlock(&j->lock);
    return work;
}

static enum sqz_status begin(struct jobs *j, struct job *job, struct sqz_error *error)
{
    struct sqz_prepare_options options;
    const struct cut own = {(int32_t *)job->data.data, job->data.n / sizeof(int32_t), false};
    const struct cut *cut = job->kind == OF_TEXT ? &job->cut : &own;
    enum sqz_status status = SQZ_OK;
    sqz_prepare_options_default(&options);
    options.source_name = job->entry->id;
    options.progress = go_on;
    options.user_data = job;
    if (!cut->tokens)
        status = sqz_document_tokens(j->model, job->data.data, job->data.n, false, &job->cut.tokens, &job->cut.n,
                                     &job->cut.has_template, error);
    char *path = library_file(j->library, job->entry->id, NULL);
    if (!path) status = sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    if (status == SQZ_OK)
        status = sqz_preparing_begin(&job->preparing, j->model, cut->tokens, cut->n, cut->has_template, path, &options,
                                     error);
    free(path);
    free(job->cut.tokens); /* it has its own */
    job->cut = (struct cut){0};
    return status;
}

/* A job whose document cannot be read. */
static void drop(struct jobs *j, struct job *job, const char *problem)
{
    pthread_mutex_lock(&j->lock);
    unlink_waiting(j, job);
    j->n_begun--;
    pthread_mutex_unlock(&j->lock);
    end_job(j, job, problem);
}

static void begin_job(struct job *job)
{
    struct jobs *j = job->jobs;
    if (begin(j, job, &job->problem) == SQZ_OK) {
        sqz_preparing_spread(job->preparing);
        job->n_tokens = sqz_preparing_left(job->preparing);
    }
    pthread_mutex_lock(&j->lock);
    job->ready = true;
    j->n_beginning--;
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
}

static void *begin_apart(void *data)
{
    apart_come_last(10); /* what takes a core for some milliseconds, all threads of an answer wait for */
    begin_job(data);
    return NULL;
}

/* Reserves the file, which may take tens of milliseconds, beside the model. */
static void make_begun(struct jobs *j, struct job *job)
{
    pthread_t thread;
    pthread_mutex_lock(&j->lock);
    const bool begun = job->begun;
    job->begun = true;
    j->n_begun += !begun;
    j->n_beginning += !begun;
    pthread_mutex_unlock(&j->lock);
    if (begun) return;
    library_progress(j->library, job->entry, ENTRY_READING, 0);
    if (pthread_create(&thread, NULL, begin_apart, job) == 0) pthread_detach(thread);
    else begin_job(job);
}

/* What was read goes to the thread that squeezes. */
static void hand_over(struct jobs *j, struct job *job)
{
    pthread_mutex_lock(&j->lock);
    unlink_waiting(j, job);
    append(&j->read, job);
    struct job *mine = j->on_card ? take_read(j) : NULL;
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
    if (mine) squeeze(j, mine); /* clustering takes the card, which the model's thread has */
}

void jobs_meanwhile(struct jobs *j, void (*meanwhile)(void *data), void *data)
{
    j->meanwhile = meanwhile;
    j->meanwhile_data = data;
}

size_t jobs_step(struct jobs *j, size_t n_tokens)
{
    struct sqz_error error;
    pthread_mutex_lock(&j->lock);
    struct job *job = next_job(j);
    const bool ready = job && job->ready;
    pthread_mutex_unlock(&j->lock);
    if (job && !ready) make_begun(j, job);
    if (!ready) return 0;
    if (job->entry->cancelled || !job->preparing) {
        drop(j, job, job->entry->cancelled ? "cancelled" : job->problem.message);
        return 0;
    }
    const size_t before = sqz_preparing_left(job->preparing);
    if (sqz_preparing_step(job->preparing, n_tokens, &error) != SQZ_OK) {
        drop(j, job, error.message);
        return 0;
    }
    const size_t left = sqz_preparing_left(job->preparing);
    if (left == 0) hand_over(j, job);
    else library_progress(j->library, job->entry, ENTRY_READING, 1 - (double)left / (double)job->n_tokens);
    return before - left;
}

/* With the lock: the job that waits for a reader; NULL: it is no more. */
static struct job *job_of(const struct jobs *j, uint64_t reader)
{
    struct job *job = j->waiting;
    while (job && job->id != reader) job = job->next;
    return job;
}

void jobs_release(struct jobs *j, uint64_t reader)
{
    pthread_mutex_lock(&j->lock);
    struct job *job = job_of(j, reader);
    if (job) job->awaited = false;
    pthread_mutex_unlock(&j->lock);
}

bool jobs_follow(struct jobs *j, uint64_t reader, const struct sqz_session *session, size_t n_read)
{
    struct sqz_error error;
    pthread_mutex_lock(&j->lock);
    struct job *job = job_of(j, reader);
    const bool room = job && !job->entry->cancelled && !j->on_card && (job->begun || j->n_begun < MOST_FOLLOWED);
    const bool ready = room && job->ready;
    if (job && !room) job->awaited = false;
    pthread_mutex_unlock(&j->lock);
    if (!room) return false;
    if (!ready) {
        make_begun(j, job);
        return true; /* it catches up later */
    }
    if (!job->preparing) {
        drop(j, job, job->problem.message);
        return false;
    }
    const bool followed = sqz_preparing_follow(job->preparing, session, &error) == SQZ_OK;
    library_progress(j->library, job->entry, ENTRY_READING,
                     1 - (double)sqz_preparing_left(job->preparing) / (double)job->n_tokens);
    if (followed && n_read < job->n_tokens) return true;
    jobs_release(j, reader);
    return false;
}

/* ---- Opening and closing --------------------------------------------------------------------------- */

static bool read_job(struct job *job)
{
    struct stat about;
    const int file = job->file;
    bool good = fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 1 && about.st_size < (1LL << 32);
    char *data = good ? malloc((size_t)about.st_size) : NULL;
    size_t n = 0;
    while (data && n < (size_t)about.st_size) {
        const ssize_t got = read(file, data + n, (size_t)about.st_size - n);
        if (got <= 0) break;
        n += (size_t)got;
    }
    good = data && n == (size_t)about.st_size && (data[0] == OF_TEXT || data[0] == OF_TOKENS || data[0] == OF_FILE);
    if (good) {
        job->kind = data[0];
        bytes_append(&job->data, data + 1, n - 1);
    }
    free(data);
    return good && !job->data.failed;
}

/* A job of an earlier run; one whose context is there already was finished. */
static void take_up(struct jobs *j, const char *name)
{
    char id[CONTEXT_ID_MAX + 1];
    const size_t n = strlen(name), end = strlen(job_ending);
    struct fault fault = {0};
    if (n <= end || n - end > CONTEXT_ID_MAX || strcmp(name + n - end, job_ending) != 0) return;
    memcpy(id, name, n - end);
    id[n - end] = '\0';
    if (!context_id_is_good(id)) return;
    const int file = open_job(j, name);
    struct job *job = file >= 0 ? calloc(1, sizeof *job) : NULL;
    if (!job) {
        if (file >= 0) close(file);
        return;
    }
    job->jobs = j;
    job->file = file;
    job->entry = library_reserve(j->library, id, strncmp(id, "auto-", 5) == 0, &fault);
    if (job->entry && read_job(job)) {
        enqueue(j, job);
        return;
    }
    forget(j, id);
    if (job->entry) library_delete(j->library, job->entry);
    job_free(j, job);
}

enum sqz_status jobs_open(struct jobs **out, struct library *library, struct sqz_model *model, bool on_card,
                          size_t most_text_bytes, struct sqz_error *error)
{
    struct jobs *j = calloc(1, sizeof *j);
    *out = j;
    if (!j) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    j->library = library;
    j->model = model;
    j->on_card = on_card;
    j->most_text_bytes = most_text_bytes;
    pthread_mutex_init(&j->lock, NULL);
    pthread_cond_init(&j->changed, NULL);
    DIR *folder = opendir(library->path);
    for (const struct dirent *d; folder && (d = readdir(folder));) take_up(j, d->d_name);
    if (folder) closedir(folder);
    if (pthread_create(&j->thread, NULL, squeeze_all, j) != 0)
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "no thread could be started");
    j->thread_runs = true;
    if (pthread_create(&j->converter, NULL, convert_all, j) != 0)
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "no thread could be started");
    j->converter_runs = true;
    return SQZ_OK;
}

static void free_list(struct jobs *j, struct job *job)
{
    while (job) {
        struct job *next = job->next;
        job_free(j, job);
        job = next;
    }
}

void jobs_close(struct jobs *j)
{
    if (!j) return;
    pthread_mutex_lock(&j->lock);
    j->stopping = true;
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
    if (j->thread_runs) pthread_join(j->thread, NULL);
    if (j->converter_runs) pthread_join(j->converter, NULL);
    pthread_mutex_lock(&j->lock);
    while (j->n_beginning) pthread_cond_wait(&j->changed, &j->lock);
    pthread_mutex_unlock(&j->lock);
    free_list(j, j->unconverted);
    free_list(j, j->waiting);
    free_list(j, j->read);
    pthread_cond_destroy(&j->changed);
    pthread_mutex_destroy(&j->lock);
    free(j);
}
