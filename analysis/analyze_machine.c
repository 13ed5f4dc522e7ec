/* Machines by name: presets, the lines of a file, and this one; analyze.h describes them. */
#define _POSIX_C_SOURCE 200809L /* strtok_r, sysconf */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "analyze.h"
#include "common.h"
#include "gpu_rate.h"
#include "inputs.h"
#include "machine.h"
#include "peak.h"
#include "plain_text.h"

static struct sqz_machine *machine_add(struct machine_list *list)
{
    list->machines = realloc(list->machines, (list->n + 1) * sizeof *list->machines);
    if (!list->machines) die("out of memory");
    return &list->machines[list->n++];
}

/* ---- A file: "NAME bandwidth=GB/s fp16=TFLOP/s [fp32=...] [memory=GB] [year=N] [precision=NAME]" ---------- */

struct place {
    const char *path;
    int line;
};

static int precision_named(const char *name, size_t n)
{
    for (int i = 0; i < SQZ_N_PRECISIONS; i++) {
        const char *known = sqz_precision_name((enum sqz_precision)i);
        if (strlen(known) == n && memcmp(known, name, n) == 0) return i;
    }
    return -1;
}

static double positive(const struct place *place, const char *word, const char *text, double most)
{
    double value = 0.0;
    if (!parse_real_text(text, strlen(text), &value) || !(value > 0.0 && value <= most))
        die("%s, line %d: '%s': allowed is a number above 0 and at most %g", place->path, place->line, word, most);
    return value;
}

static void read_word(const struct place *place, const char *word, struct sqz_machine *machine, bool *chosen)
{
    const size_t n = strcspn(word, "=");
    const char *value = word[n] ? word + n + 1 : "";
    const int precision = precision_named(word, n);
    if (precision >= 0) {
        machine->flops_per_second[precision] = 1e12 * positive(place, word, value, 1e9);
    } else if (n == 9 && memcmp(word, "bandwidth", n) == 0) {
        machine->bytes_per_second = 1e9 * positive(place, word, value, 1e9);
    } else if (n == 6 && memcmp(word, "memory", n) == 0) {
        machine->memory_bytes = 1e9 * positive(place, word, value, 1e9);
    } else if (n == 4 && memcmp(word, "year", n) == 0) {
        const double year = positive(place, word, value, 9999);
        machine->year = (uint32_t)year;
        if (machine->year != year) die("%s, line %d: '%s': a year is a whole number", place->path, place->line, word);
    } else if (n == 9 && memcmp(word, "precision", n) == 0 && precision_named(value, strlen(value)) >= 0) {
        machine->precision = (enum sqz_precision)precision_named(value, strlen(value));
        *chosen = true;
    } else {
        die("%s, line %d: '%s': allowed are bandwidth=, memory=, year=, precision= and fp32=, tf32=, fp16=, "
            "fp16-sparse=, fp8=, int8=, int4=",
            place->path, place->line, word);
    }
}

/* A precision that was not chosen is fp16, else the first there is. */
static void settle_precision(const struct place *place, struct sqz_machine *machine, bool chosen)
{
    if (!chosen) {
        machine->precision = SQZ_PRECISION_FP16;
        for (int i = 0; i < SQZ_N_PRECISIONS && !(machine->flops_per_second[machine->precision] > 0); i++)
            machine->precision = (enum sqz_precision)i;
    }
    if (!(machine->flops_per_second[machine->precision] > 0) || !(machine->bytes_per_second > 0)) {
        die("%s, line %d: machine %s needs bandwidth= and a peak rate for its precision, e.g. bandwidth=768 fp16=154.8",
            place->path, place->line, machine->name);
    }
}

static void read_line(const struct place *place, char *line, struct machine_list *list)
{
    static const char blanks[] = " \t\r\n";
    char *rest = NULL;
    line[strcspn(line, "#")] = '\0';
    char *word = strtok_r(line, blanks, &rest);
    if (!word) return;
    struct sqz_machine *machine = machine_add(list);
    bool chosen = false;
    memset(machine, 0, sizeof *machine);
    if (strlen(word) >= sizeof machine->name || strchr(word, '=') || strcmp(word, "here") == 0) {
        die("%s, line %d: '%s': a line begins with the machine's name, at most %zu bytes, without '=', not 'here'",
            place->path, place->line, word, sizeof machine->name - 1);
    }
    strcpy(machine->name, word);
    sqz_plain_text(machine->name);
    snprintf(machine->note, sizeof machine->note, "line %d of a file", place->line);
    while ((word = strtok_r(NULL, blanks, &rest))) read_word(place, word, machine, &chosen);
    settle_precision(place, machine, chosen);
}

void machine_list_make(struct machine_list *list, const char *path)
{
    struct sqz_machine preset;
    struct place place = {.path = path};
    size_t n_bytes;
    *list = (struct machine_list){NULL, 0};
    for (size_t i = 0; sqz_machine_get(i, &preset); i++) *machine_add(list) = preset;
    if (!path) return;
    char *text = read_whole_file(path, &n_bytes);
    /* Names go to the terminal and into messages: nothing in them may steer it. */
    for (size_t i = 0, line = 1; i < n_bytes; i++) {
        const unsigned char c = (unsigned char)text[i];
        if ((c < ' ' && c != '\t' && c != '\r' && c != '\n') || c == 0x7f)
            die("%s, line %zu: not a text file: it holds a byte %u", path, line, c);
        line += c == '\n';
    }
    for (char *line = text, *end; line; line = end) {
        place.line++;
        end = strchr(line, '\n');
        if (end) *end++ = '\0';
        read_line(&place, line, list);
    }
    free(text);
}

void machine_list_free(struct machine_list *list)
{
    free(list->machines);
}

/* ---- This machine ------------------------------------------------------------------------ */

struct sqz_machine machine_here(size_t n_threads)
{
    struct sqz_machine machine = {.name = "here", .precision = SQZ_PRECISION_FP32};
    struct peak peaks[16];
    const int threads = (int)measured_threads(n_threads);
    const size_t n = peaks_measure(peaks, sizeof peaks / sizeof *peaks, threads);
    machine.flops_per_second[SQZ_PRECISION_FP32] = peaks_best_f32(peaks, n);
    for (size_t i = 0; i < n; i++)
        if (strcmp(peaks[i].name, "avx512_vnni") == 0)
            machine.flops_per_second[SQZ_PRECISION_INT8] = peaks[i].per_second;
    machine.bytes_per_second = machine_read_bandwidth(threads);
    machine.memory_bytes = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGE_SIZE);
    snprintf(machine.note, sizeof machine.note, "measured with %d threads: multiply-adds in registers, one long read",
             threads);
    if (!(peaks_best_f32(peaks, n) > 0) || !(machine.bytes_per_second > 0))
        die("this machine cannot be measured: no peak rate for its architecture, or no memory for the read");
    return machine;
}

static void unknown_machine(const struct machine_list *list, const char *name)
{
    char allowed[512] = "here";
    for (size_t i = 0; i < list->n; i++) {
        const size_t used = strlen(allowed);
        snprintf(allowed + used, sizeof allowed - used, ", %s", list->machines[i].name);
    }
    usage_error("--machine %s: allowed is one of %s", name, allowed);
}

void machine_choose(struct analysis *a, const struct machine_list *list, const char *name, int precision,
                    size_t n_threads)
{
    if (strcmp(name, "here") == 0) {
        a->machine = machine_here(n_threads);
    } else {
        size_t i = list->n;
        while (i > 0 && strcmp(list->machines[i - 1].name, name) != 0) i--;
        if (i == 0) unknown_machine(list, name);
        a->machine = list->machines[i - 1];
    }
    if (precision >= 0) a->machine.precision = (enum sqz_precision)precision;
    a->roof = (struct sqz_roof){a->machine.flops_per_second[a->machine.precision], a->machine.bytes_per_second};
    if (!(a->roof.flops_per_second > 0)) {
        usage_error("--precision %s: no peak rate of %s is known for it", sqz_precision_name(a->machine.precision),
                    name);
    }
}

/* ---- A card ------------------------------------------------------------------------------ */

void machine_choose_card(struct analysis *a, int precision)
{
    struct sqz_gpu_rate rate;
    struct sqz_error error;
    struct sqz_machine *m = &a->machine;
    if (precision >= 0) {
        usage_error("--precision %s: of a card that is measured only bytes are bounded; name one with --machine",
                    sqz_precision_name((enum sqz_precision)precision));
    }
    stop_on(sqz_gpu_measure_rate(&rate, 0, &error), &error);
    *m = (struct sqz_machine){.bytes_per_second = rate.copy_bytes_per_second,
                              .memory_bytes = rate.memory_bytes,
                              .note = "the card, measured: one long copy, read and written"};
    snprintf(m->name, sizeof m->name, "%.*s", (int)sizeof m->name - 1, rate.card);
    sqz_plain_text(m->name);
    a->roof = (struct sqz_roof){INFINITY, m->bytes_per_second};
}
