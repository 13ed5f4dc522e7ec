/*
 * What the subcommands share; common.h describes it. The only place that
 * writes messages, installs signal handlers and reads the environment.
 */
#define _POSIX_C_SOURCE 200809L

#include "common.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_MODEL "SmolLM2-135M-Instruct.Q4_1.gguf"

const char *const rule_names[] = {"default", "paper", NULL};
const char *const metric_names[] = {"cosine", "euclidean", NULL};
const char *const group_names[] = {"mean", "max", NULL};

/* ---- Messages ---------------------------------------------------------------- */

static char command_name[64] = "squeeze";

void set_command(const char *name)
{
    snprintf(command_name, sizeof command_name, "squeeze %s", name);
}

static void print_message(const char *format, va_list arguments)
{
    fflush(stdout);
    fprintf(stderr, "%s: ", command_name);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
}

_Noreturn void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_message(format, arguments);
    va_end(arguments);
    exit(1);
}

_Noreturn void usage_error(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_message(format, arguments);
    va_end(arguments);
    exit(2);
}

void warn(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_message(format, arguments);
    va_end(arguments);
}

int report(const struct sqz_error *error)
{
    if (error->status == SQZ_ERROR_CANCELLED && signal_caught()) {
        warn("interrupted; nothing was written");
        return 128 + signal_caught();
    }
    warn("%s", error->message[0] ? error->message : sqz_status_name(error->status));
    return 1;
}

int close_stdout(void)
{
    bool failed = ferror(stdout) != 0;
    errno = 0;
    if (fflush(stdout) != 0 || failed) {
        /* A reader that went away (squeeze ... | head) wants no message. */
        if (errno != EPIPE && errno != 0) {
            warn("cannot write to standard output: %s", strerror(errno));
        }
        return 1;
    }
    return 0;
}

/* ---- Signals ------------------------------------------------------------------- */

static volatile sig_atomic_t caught_signal;

static void note_signal(int number)
{
    if (caught_signal) {
        signal(number, SIG_DFL);
        raise(number);
    }
    caught_signal = number;
}

void catch_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = note_signal; /* no SA_RESTART: a read at a prompt must return */
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

int signal_caught(void)
{
    return caught_signal;
}

void signal_forget(void)
{
    caught_signal = 0;
}

bool signal_cancelled(void *unused)
{
    (void)unused;
    return caught_signal != 0;
}

/* ---- Files and models ------------------------------------------------------------ */

char *read_whole_file(const char *path, size_t *n_bytes)
{
    const size_t most = (size_t)1 << 32; /* far above any model's context; stops an endless pipe */
    bool is_stdin = strcmp(path, "-") == 0;
    const char *name = is_stdin ? "standard input" : path;
    FILE *file = is_stdin ? stdin : fopen(path, "rb");
    size_t capacity = 1 << 16, n = 0;
    char *text = malloc(capacity);
    if (!file) {
        free(text);
        die("%s: %s", name, strerror(errno));
    }
    while (text) {
        size_t got = fread(text + n, 1, capacity - n - 1, file);
        n += got;
        if (got == 0) {
            break;
        }
        if (n + 1 == capacity) {
            char *larger = capacity <= most / 2 ? realloc(text, capacity * 2) : NULL;
            if (!larger) {
                free(text);
                die("%s: larger than %s, or than the memory left", name, capacity > most / 2 ? "2 GiB" : "expected");
            }
            text = larger;
            capacity *= 2;
        }
    }
    if (!text || ferror(file)) {
        int reason = text ? errno : ENOMEM;
        free(text);
        die("%s: %s", name, signal_caught() ? "interrupted" : strerror(reason));
    }
    if (!is_stdin) {
        fclose(file);
    }
    text[n] = '\0';
    *n_bytes = n;
    return text;
}

static const char *environment(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

static char *join(const char *first, const char *second)
{
    size_t n = strlen(first) + strlen(second) + 1;
    char *text = malloc(n);
    if (!text) {
        die("out of memory");
    }
    snprintf(text, n, "%s%s", first, second);
    return text;
}

char *choose_model(const char *option)
{
    struct stat status;
    const char *directory;
    char *path;
    if (!option) {
        option = environment("SQUEEZE_MODEL");
    }
    if (option) {
        return join(option, "");
    }
    if ((directory = environment("SQUEEZE_CACHE"))) {
        path = join(directory, "/models/" DEFAULT_MODEL);
    } else if ((directory = environment("XDG_CACHE_HOME"))) {
        path = join(directory, "/squeeze/models/" DEFAULT_MODEL);
    } else if ((directory = environment("HOME"))) {
        path = join(directory, "/.cache/squeeze/models/" DEFAULT_MODEL);
    } else {
        die("no model: give one with -m FILE.gguf or $SQUEEZE_MODEL ($HOME is not set, so there is no default)");
    }
    if (stat(path, &status) != 0) {
        warn("no model: %s: %s; 'make demo' fetches this default model, -m FILE.gguf or $SQUEEZE_MODEL chooses another",
             path, strerror(errno));
        free(path);
        exit(1);
    }
    return path;
}

struct sqz_model *open_model(const char *option, size_t n_threads, double rope_scale)
{
    struct sqz_error error = {0};
    struct sqz_model_options options;
    struct sqz_model *model = NULL;
    char *path = choose_model(option);
    sqz_model_options_default(&options);
    options.n_threads = (int)n_threads;
    options.rope_scale = (float)rope_scale;
    enum sqz_status status = sqz_model_open(&model, path, &options, &error);
    free(path);
    if (status != SQZ_OK) {
        exit(report(&error));
    }
    return model;
}

struct sqz_context *open_context(const char *path, const struct sqz_context_options *options)
{
    struct sqz_error error = {0};
    struct sqz_context *context = NULL;
    if (sqz_context_open(&context, path, options, &error) != SQZ_OK) {
        exit(report(&error));
    }
    return context;
}

/* ---- Numbers ---------------------------------------------------------------------- */

double now_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

const char *count_text(char text[NUMBER_TEXT_MAX], uint64_t count)
{
    char digits[24];
    int n = snprintf(digits, sizeof digits, "%llu", (unsigned long long)count);
    int k = 0;
    for (int i = 0; i < n; i++) {
        if (i > 0 && (n - i) % 3 == 0) {
            text[k++] = ',';
        }
        text[k++] = digits[i];
    }
    text[k] = '\0';
    return text;
}

const char *bytes_text(char text[NUMBER_TEXT_MAX], uint64_t n_bytes)
{
    static const char *const units[] = {"kB", "MB", "GB", "TB", "PB", "EB"};
    double value = (double)n_bytes / 1e3;
    size_t unit = 0;
    if (n_bytes < 1000) {
        snprintf(text, NUMBER_TEXT_MAX, "%u bytes", (unsigned)n_bytes);
        return text;
    }
    while (value >= 999.95 && unit + 1 < sizeof units / sizeof units[0]) {
        value /= 1e3;
        unit++;
    }
    snprintf(text, NUMBER_TEXT_MAX, "%.1f %s", value, units[unit]);
    return text;
}

double share_read(const struct sqz_attention_stats *stats)
{
    double read = (double)stats->centroid_bytes + (double)stats->key_bytes + (double)stats->value_bytes;
    return stats->context_bytes ? read / (double)stats->context_bytes : 0.0;
}

void add_stats(struct sqz_attention_stats *sum, const struct sqz_attention_stats *stats)
{
    sum->context_bytes += stats->context_bytes;
    sum->centroid_bytes += stats->centroid_bytes;
    sum->key_bytes += stats->key_bytes;
    sum->value_bytes += stats->value_bytes;
    sum->n_selections += stats->n_selections;
    sum->retained_keys += stats->retained_keys;
    sum->total_keys += stats->total_keys;
}

/* ---- JSON --------------------------------------------------------------------------- */

json_t *json_number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

json_t *json_count(uint64_t value)
{
    return json_integer((json_int_t)value);
}

json_t *json_text(const char *text)
{
    struct text_filter filter = {0};
    struct text_buffer buffer = {0};
    json_t *value = json_string(text);
    if (!value) {
        text_filter_put(&filter, &buffer, text, strlen(text));
        text_filter_end(&filter, &buffer);
        value = json_string(buffer.text ? buffer.text : "");
        text_buffer_free(&buffer);
    }
    return value;
}

json_t *json_command_line(int argc, char **argv)
{
    struct text_buffer line = {0};
    text_buffer_append(&line, "squeeze", 7);
    for (int i = 0; i < argc; i++) {
        text_buffer_append(&line, " ", 1);
        text_buffer_append(&line, argv[i], strlen(argv[i]));
    }
    json_t *value = json_text(line.text);
    text_buffer_free(&line);
    return value;
}

int print_json(json_t *root)
{
    if (!root) {
        die("out of memory");
    }
    /* Nine digits are a float's worth and keep 0.1 from being printed as 0.10000000000000001. */
    json_dumpf(root, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(root);
    return close_stdout();
}

/* ---- Text that arrives in pieces ------------------------------------------------------- */

void text_buffer_append(struct text_buffer *buffer, const char *bytes, size_t n)
{
    if (n >= SIZE_MAX / 2 - buffer->n_bytes) {
        die("out of memory");
    }
    if (buffer->n_bytes + n + 1 > buffer->capacity) {
        size_t capacity = (buffer->n_bytes + n + 1) * 2;
        char *text = realloc(buffer->text, capacity);
        if (!text) {
            die("out of memory");
        }
        buffer->text = text;
        buffer->capacity = capacity;
    }
    memcpy(buffer->text + buffer->n_bytes, bytes, n);
    buffer->n_bytes += n;
    buffer->text[buffer->n_bytes] = '\0';
}

void text_buffer_print(struct text_buffer *buffer, const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (n > 0) {
        text_buffer_append(buffer, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
    }
}

void text_buffer_free(struct text_buffer *buffer)
{
    free(buffer->text);
    memset(buffer, 0, sizeof *buffer);
}

/* Bytes of the character that begins with `first`; 0: nothing begins so. */
static size_t character_bytes(unsigned char first)
{
    return first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
}

/* Whether the n bytes can begin a character: right continuation bytes, no overlong form, no surrogate. */
static bool can_be_character(const unsigned char *s, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80) {
            return false;
        }
    }
    if (n < 2) {
        return true;
    }
    return !(s[0] == 0xe0 && s[1] < 0xa0) && !(s[0] == 0xed && s[1] > 0x9f) && !(s[0] == 0xf0 && s[1] < 0x90) &&
           !(s[0] == 0xf4 && s[1] > 0x8f);
}

static bool is_control(const unsigned char *s, size_t n)
{
    return (n == 1 && ((s[0] < 0x20 && s[0] != '\n' && s[0] != '\t') || s[0] == 0x7f)) ||
           (n == 2 && s[0] == 0xc2 && s[1] < 0xa0);
}

static void put_replacement(struct text_buffer *buffer)
{
    text_buffer_append(buffer, "\xef\xbf\xbd", 3);
}

void text_filter_put(struct text_filter *filter, struct text_buffer *buffer, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char byte = (unsigned char)bytes[i];
        filter->held[filter->n_held] = byte;
        if (filter->n_held > 0 && !can_be_character(filter->held, filter->n_held + 1)) {
            put_replacement(buffer);
            filter->held[0] = byte;
            filter->n_held = 0;
        }
        filter->n_held++;
        size_t wanted = character_bytes(filter->held[0]);
        if (wanted == 0 || (wanted == filter->n_held && is_control(filter->held, wanted))) {
            put_replacement(buffer);
            filter->n_held = 0;
        } else if (wanted == filter->n_held) {
            text_buffer_append(buffer, (const char *)filter->held, wanted);
            filter->n_held = 0;
        }
    }
}

void text_filter_end(struct text_filter *filter, struct text_buffer *buffer)
{
    if (filter->n_held > 0) {
        put_replacement(buffer);
        filter->n_held = 0;
    }
}

/* ---- How a context is squeezed ------------------------------------------------------------ */

static void override(uint32_t *field, size_t value)
{
    if (value != SIZE_MAX) {
        *field = (uint32_t)value;
    }
}

static void override_switch(bool *field, int value)
{
    if (value >= 0) {
        *field = value == 1;
    }
}

void squeeze_flags_apply(const struct squeeze_flags *flags, struct sqz_squeeze_options *options)
{
    sqz_squeeze_options_default(options, flags->rule == 1 ? SQZ_RULE_PAPER : SQZ_RULE_DEFAULT);
    if (flags->centroids.n > SQZ_MAX_LEVELS) {
        usage_error("--centroids: %zu levels; allowed are %d", flags->centroids.n, SQZ_MAX_LEVELS);
    }
    if (flags->levels != SIZE_MAX && flags->centroids.n > flags->levels) {
        usage_error("--centroids names %zu levels, --levels %zu", flags->centroids.n, flags->levels);
    }
    if (flags->centroids.n > 0 && flags->levels == SIZE_MAX && flags->centroids.n > options->n_levels) {
        options->n_levels = (uint32_t)flags->centroids.n;
    }
    override(&options->n_levels, flags->levels);
    for (size_t i = 0; i < flags->centroids.n; i++) {
        options->centroid_share[i] = (float)flags->centroids.value[i];
    }
    for (uint32_t i = 1; i < options->n_levels; i++) {
        if (flags->centroids.n > 0 ? i >= flags->centroids.n
                                   : !(options->centroid_share[i] > 0 &&
                                       options->centroid_share[i] < options->centroid_share[i - 1])) {
            options->centroid_share[i] = options->centroid_share[i - 1] / 5;
        }
    }
    if (flags->metric >= 0) {
        options->metric = flags->metric == 0 ? SQZ_METRIC_COSINE : SQZ_METRIC_EUCLIDEAN;
    }
    if (flags->group >= 0) {
        options->group = flags->group == 0 ? SQZ_GROUP_MEAN : SQZ_GROUP_MAX;
    }
    override(&options->n_iterations, flags->iterations);
    override(&options->n_sinks, flags->sinks);
    override(&options->n_window, flags->window);
    override(&options->n_calibration, flags->calibration);
    if (flags->seed != SIZE_MAX) {
        options->seed = flags->seed;
    }
    override_switch(&options->center, flags->center);
    override_switch(&options->variance, flags->variance);
    override_switch(&options->per_head, flags->per_head);
    override_switch(&options->tail, flags->tail);
    override_switch(&options->value_skip, flags->value_skip);
}
