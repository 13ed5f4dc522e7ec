/*
 * squeeze serve: prepared contexts for many users over HTTP, by the API that clients of OpenAI's and Anthropic's speak.
 * server/ does the work; here are its options, and the files that they name.
 */
#define _POSIX_C_SOURCE 200809L
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common.h"
#include "handover.h"
#include "inputs.h"
#include "many_ranks.h"
#include "options.h"
#include "server.h"
#include "speculation.h"
#include "supervisor.h"

static const struct command_help help = {
    "serve", "",
    "Serves a model and the contexts of a folder over HTTP: /v1/chat/completions, /v1/completions, /v1/responses and "
    "/v1/messages answer, /v1/contexts prepares more, /openapi.json describes all. A context is the model "
    "\"NAME:CONTEXT\"; "
    "a conversation that begins with its document uses it by itself. SIGINT and SIGTERM end it after the answers in "
    "work.",
    "  squeeze serve --contexts books\n"
    "  squeeze serve -m model.gguf --host 0.0.0.0 --api-key-file keys\n"
    "  curl localhost:8080/v1/chat/completions -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'\n",
    NULL};

struct serve {
    const char *model_path;
    size_t n_threads, port, mebibytes, upload_mebibytes;
    struct gpu_flags gpu;
    const char *draft_weights;
    double disk_gibibytes, budget, request_seconds, header_seconds, stop_seconds, step_milliseconds;
    size_t n_ranks; /* 0: not said */
    const char *hosts;
    double pause_seconds;
    struct server_options options;
};

/* The name of the file without its folder and ending. malloc'ed. */
static char *name_of_model(const char *path)
{
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    char *copy = strdup(name);
    if (!copy) die("out of memory");
    const size_t n = strlen(copy);
    if (n > 5 && strcmp(copy + n - 5, ".gguf") == 0) copy[n - 5] = '\0';
    return copy;
}

static bool should_stop(void)
{
    return signal_caught() != 0 || server_told_to_stop();
}

/* Of rank 0, to whoever has its connections. */
static int supervisor = -1;

static void say_ready_to_supervisor(const char *host, unsigned port, size_t n_contexts)
{
    const struct handover_message message = {.kind = HANDOVER_READY, .value = (uint32_t)n_contexts};
    (void)host;
    (void)port;
    if (!handover_send(supervisor, &message, -1)) warn("the supervisor is gone");
}

static void say_ready(const char *host, unsigned port, size_t n_contexts)
{
    char count[NUMBER_TEXT_MAX];
    const bool bare = strchr(host, ':') == NULL;
    fprintf(stderr, "squeeze serve: %s context%s, listening on http://%s%s%s:%u\n", count_text(count, n_contexts),
            n_contexts == 1 ? "" : "s", bare ? "" : "[", host, bare ? "" : "]", port);
}

static int run(struct serve *s)
{
    struct sqz_error error = {0};
    struct server_options *o = &s->options;
    char *path = choose_model(s->model_path), *name = name_of_model(path), *folder = choose_contexts(o->contexts);
    struct sqz_model_info info;
    struct sqz_model *model = open_model_drafting(path, s->n_threads, 1.0, &s->gpu, s->draft_weights);
    warn_of_template(model);
    sqz_model_get_info(model, &info);
    o->model_name = name;
    o->contexts = folder;
    o->model_on_card = info.n_gpu_layers > 0;
    const enum sqz_status status =
        server_run(model, o, should_stop, supervisor >= 0 ? say_ready_to_supervisor : say_ready, &error);
    sqz_model_free(model);
    free(path);
    free(name);
    free(folder);
    return status == SQZ_OK ? 0 : report(&error);
}

static void say(const char *text)
{
    fprintf(stderr, "squeeze serve: %s\n", text);
}

/* Names are handed to mpirun and by it to ssh, which would take some for an option. */
static void check_hosts(const char *hosts)
{
    struct stat file;
    if (stat(hosts, &file) == 0 && S_ISREG(file.st_mode)) return;
    for (const char *at = hosts;; at++) {
        const size_t n = strspn(at, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:");
        if (!n || *at == '-' || (at[n] && at[n] != ','))
            usage_error(
                "--hosts %.200s: no file, and no names of letters, digits, '.', '_', '-' with commas between them, "
                "e.g. here,there:2",
                hosts);
        if (!*(at += n)) return;
    }
}

/* That mpirun may take to reach hosts, until there are processes. */
static const double mpirun_seconds = 6;

/* The process that has the connections, and the ranks as children. */
static int supervise(const struct serve *s, char **argv)
{
    struct sqz_error error = {0};
    const struct supervisor_options options = {
        .server = s->options,
        .job = {.n = (unsigned)s->n_ranks,
                .hosts = s->hosts,
                .arguments = argv,
                .start_variable = RANKS_START_VARIABLE},
        /* Ranks that do not find each other end themselves first, and say so. */
        .start_seconds = ranks_start_seconds() + mpirun_seconds,
        .most_pause_seconds = s->pause_seconds,
    };
    if (!ranks_built()) die("this squeeze was built without MPI (SQUEEZE_MPI): --ranks is not possible");
    catch_signals();
    return supervisor_run(&options, should_stop, say_ready, say, &error) == SQZ_OK ? 0 : report(&error);
}

/* Rank 0: whoever started it says when it ends, not a signal that is for the job as a whole. */
static void join_supervisor(struct serve *s, const char *name)
{
    struct sqz_error error = {0};
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    if (handover_join(name, &supervisor, &s->options.ranks.restarts, &error) != SQZ_OK) die("%s", error.message);
    s->options.supervisor = supervisor;
}

static void take_numbers(struct serve *s)
{
    struct server_options *o = &s->options;
    o->ranks.n = ranks_count();
    o->ranks.trouble = ranks_trouble;
    o->port = (unsigned)s->port;
    o->budget = (float)s->budget;
    o->most_body_bytes = s->mebibytes << 20;
    o->most_upload_bytes = s->upload_mebibytes << 20;
    o->disk_bytes = (uint64_t)(s->disk_gibibytes * 1024 * 1024 * 1024);
    o->request_seconds = s->request_seconds;
    o->header_seconds = s->header_seconds;
    o->stop_seconds = s->stop_seconds;
    o->step_seconds = s->step_milliseconds / 1000;
}

int cmd_serve(int argc, char **argv)
{
    struct serve s = {.port = 8080,
                      .mebibytes = 32,
                      .upload_mebibytes = 256,
                      .gpu = {.n_layers = SIZE_MAX, .together = TOGETHER_UNSAID, .many_users = true},
                      .budget = 0.1,
                      .request_seconds = 600,
                      .header_seconds = 30,
                      .stop_seconds = 30,
                      .step_milliseconds = 100,
                      .pause_seconds = 60,
                      .options = {.supervisor = -1,
                                  .host = "127.0.0.1",
                                  .n_slots = 32,
                                  .queue_limit = 1000,
                                  .most_answer_tokens = 4096,
                                  .most_connections = 16384,
                                  .auto_prepare_tokens = 2048}};
    struct server_options *o = &s.options;
    /* clang-format off */
    const struct option options[] = {
        MODEL_OPTION(s.model_path),
        {.kind = OPTION_TEXT, .name = "contexts", .argument = "FOLDER", .value = &o->contexts,
         .help = "of contexts, made when missing (default: $SQUEEZE_CONTEXTS, else squeeze/contexts where data of "
                 "programs is kept)"},
        {.kind = OPTION_TEXT, .name = "host", .argument = "ADDRESS", .value = &o->host,
         .help = "to listen at (default 127.0.0.1: this machine alone)"},
        {.kind = OPTION_COUNT, .name = "port", .argument = "N", .value = &s.port, .low = 0, .high = 65535,
         .example = "8080", .help = "to listen at (default 8080; 0: any that is free)"},
        {.kind = OPTION_TEXT, .name = "api-key-file", .argument = "FILE", .value = &o->key_file,
         .help = "of keys, a line each, one of which every request must bring"},
        {.kind = OPTION_FLAG, .name = "public-without-keys", .value = &o->public_without_keys,
         .help = "allow an address that other machines reach although there are no keys"},
        {.kind = OPTION_BUDGET, .letter = 'b', .name = "budget", .argument = "SHARE", .value = &s.budget,
         .help = "share of a context that is read where a request names none (default 0.1)"},
        {.kind = OPTION_COUNT, .name = "slots", .argument = "N", .value = &o->n_slots, .low = 1, .high = 64,
         .example = "32", .help = "answers in work at once (default 32)"},
        {.kind = OPTION_COUNT, .name = "queue", .argument = "N", .value = &o->queue_limit, .low = 0, .high = 1e6,
         .example = "1000", .help = "requests that may wait; others get 429 (default 1000)"},
        {.kind = OPTION_COUNT, .letter = 'n', .name = "max-tokens", .argument = "N", .value = &o->most_answer_tokens,
         .low = 1, .high = 1e9, .example = "4096", .help = "longest answer (default 4096)"},
        {.kind = OPTION_COUNT, .name = "auto-prepare", .argument = "N", .value = &o->auto_prepare_tokens, .low = 0,
         .high = 1e9, .example = "2048",
         .help = "prepare beginnings of conversations of N tokens and more by itself (default 2048; 0: never)"},
        {.kind = OPTION_REAL, .name = "disk", .argument = "GIB", .value = &s.disk_gibibytes, .low = 0, .high = 1e6,
         .example = "50", .help = "most that contexts take; the least recently used go first (default 0: no limit)"},
        {.kind = OPTION_COUNT, .name = "max-body", .argument = "MIB", .value = &s.mebibytes, .low = 1, .high = 1024,
         .example = "32", .help = "largest request (default 32)"},
        {.kind = OPTION_COUNT, .name = "max-upload", .argument = "MIB", .value = &s.upload_mebibytes, .low = 1,
         .high = 2048, .example = "256", .help = "largest document (default 256)"},
        {.kind = OPTION_COUNT, .name = "connections", .argument = "N", .value = &o->most_connections, .low = 8,
         .high = 1e6, .example = "16384", .help = "open at once (default 16384)"},
        {.kind = OPTION_REAL, .name = "request-seconds", .argument = "S", .value = &s.request_seconds, .low = 1,
         .high = 1e6, .example = "600", .help = "most that a request may wait and take (default 600)"},
        {.kind = OPTION_REAL, .name = "header-seconds", .argument = "S", .value = &s.header_seconds, .low = 1,
         .high = 3600, .example = "30", .help = "most that a client may take to say what it wants (default 30)"},
        {.kind = OPTION_REAL, .name = "stop-seconds", .argument = "S", .value = &s.stop_seconds, .low = 0,
         .high = 3600, .example = "30", .help = "that answers in work have when the server stops (default 30)"},
        {.kind = OPTION_REAL, .name = "step-ms", .argument = "MS", .value = &s.step_milliseconds, .low = 5,
         .high = 10000, .example = "100",
         .help = "most that a piece of a question or document keeps answers waiting (default 100)"},
        {.kind = OPTION_COUNT, .name = "ranks", .argument = "N", .value = &s.n_ranks, .low = 1, .high = 1024,
         .example = "4",
         .help = "answer with N processes, each with its part of every context in shards; ranks that die are started "
                 "again (needs mpirun)"},
        {.kind = OPTION_TEXT, .name = "hosts", .argument = "NAMES", .value = &s.hosts,
         .help = "where ranks run, as mpirun takes it: a file, or names with commas between them; this machine first"},
        {.kind = OPTION_REAL, .name = "restart-pause", .argument = "S", .value = &s.pause_seconds, .low = 0.5,
         .high = 3600, .example = "60",
         .help = "most that ranks which died again and again wait to be started again (default 60)"},
        THREADS_OPTION(s.n_threads), GPU_OPTIONS(s.gpu), TOGETHER_OPTION(s.gpu, "cheapest"),
        DRAFT_WEIGHTS_OPTION(s.draft_weights),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    options_parse(&help, options, argc, argv, 0, 0);
    take_numbers(&s);
    const char *name = getenv(HANDOVER_VARIABLE);
    if (s.hosts && !s.n_ranks) usage_error("--hosts: only with --ranks");
    if (s.hosts) check_hosts(s.hosts);
    if (s.n_ranks && ranks_count() > 1 && !name)
        die("--ranks starts mpirun by itself: without it, mpirun -n %zu squeeze serve", s.n_ranks);
    if (s.n_ranks && !name) return supervise(&s, argv);
    if (name) join_supervisor(&s, name);
    else catch_signals();
    return run(&s);
}
