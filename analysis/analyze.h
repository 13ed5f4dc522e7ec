/*
 * What the parts of `squeeze analyze` share:
 *   cmd_analyze.c         the command: options, the model
 *   analyze.c             costs of a workload, names, output
 *   analyze_machine.c     machines: presets, files, this one
 *   analyze_operations.c  every operation of a workload; machines and their ridge points; the asymptotic table
 *   analyze_maps.c        batch x context: intensity and time
 *   analyze_context.c     contexts to measure on
 *   analyze_ranks.c       a token over several ranks: rates, messages, tables
 *   ranks_step.c          what it takes, for that
 *   analyze_speculation.c exact speculation by rates that were measured
 *   speculation_gain.c    what it gains, for that
 *   analyze_what_if.c     squeezed attention, narrower numbers, speculation; how lookups grow
 *   analyze_compare.c     prediction and measurement of a prepared context
 *   analyze_predict.c     what a token is predicted to take, for that
 *   analyze_rates.c       what attention costs on this machine, for that
 *   analyze_plot.c        pictures
 */
#ifndef SQZ_ANALYSIS_ANALYZE_H
#define SQZ_ANALYSIS_ANALYZE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "inputs.h"
#include "options.h"
#include "squeeze_roofline.h"
#include "table.h"
#include "text_buffer.h"

enum analyze_phase { PHASE_PREFILL, PHASE_DECODE, N_PHASES };
extern const char *const phase_names[N_PHASES];
extern const char *const score_traffic_names[]; /* by enum sqz_score_traffic; NULL behind the last */

enum output_format { OUTPUT_TEXT, OUTPUT_JSON, OUTPUT_CSV };

struct speculation {
    double acceptance;           /* chance that a drafted token is accepted */
    size_t gamma;                /* tokens drafted a cycle */
    double weight_bits, kv_bits; /* of the draft, which is the model itself (QuantSpec) */
};

struct analysis {
    struct sqz_model_shape shape;
    struct sqz_bit_widths bits;
    struct sqz_machine machine;
    struct sqz_roof roof;
    struct count_list batches, tokens; /* n == 0: as the view likes */
    size_t n_generated;
    bool causal;
    enum sqz_score_traffic scores;
    struct sqz_lookup_model lookup; /* NONE unless asked for */
    struct speculation speculation;
    enum output_format format;
    const char *plot; /* NULL: no picture */
};

/* One phase of B sequences of a number of tokens: their prefill, or n_generated tokens behind them. Dies when the
 * roofline refuses them. */
struct sqz_costs analysis_costs(const struct analysis *a, enum analyze_phase phase, size_t batch, size_t n_tokens);
double analysis_intensity(const struct sqz_costs *costs);                         /* of everything */
const char *bound_name(const struct analysis *a, const struct sqz_op_cost *cost); /* "memory", "compute" */

/* Fills a list that the command line left empty with first, 2 first, 4 first ..., n numbers. */
void fill_counts(struct count_list *list, size_t first, size_t n);
const char *short_count(char text[NUMBER_TEXT_MAX], size_t count); /* "4K", "1M", "1000" */

/* Prints the tables in the format asked for and frees them; JSON has model and machine beside them, and `more`, whose
 * entries it takes (may be NULL). Returns the exit code. */
int analysis_print(const struct analysis *a, struct table *tables, size_t n, json_t *more);
void print_subject(const struct analysis *a); /* model and machine as lines of text, in text alone */

/* ---- Machines --------------------------------------------------------------------- */

struct machine_list {
    struct sqz_machine *machines;
    size_t n;
};

/* The presets, then those of a file (may be NULL). Dies when the file cannot be read or says something wrong. */
void machine_list_make(struct machine_list *list, const char *path);
void machine_list_free(struct machine_list *list);

/* The machine of that name, the last one when there are more; "here" is measured with n_threads threads (0: one a
 * core) and needs no list. A usage error when there is none. precision: its index, -1 for the machine's own; a usage
 * error when the machine has none. */
void machine_choose(struct analysis *a, const struct machine_list *list, const char *name, int precision,
                    size_t n_threads);
struct sqz_machine machine_here(size_t n_threads);
/* The first card: its bytes are bounded by the rate of a copy, its FLOPs by nothing. A usage error with a precision. */
void machine_choose_card(struct analysis *a, int precision);

/* ---- Views --------------------------------------------------------------------------- */

int view_operations(struct analysis *a);
int view_machines(struct analysis *a, const struct machine_list *list);
int view_asymptotic(struct analysis *a);
int view_maps(struct analysis *a);
int view_what_if(struct analysis *a);
int view_complexity(struct analysis *a);

struct compare_request {
    const char *context_path, *model_path;
    struct count_list lengths; /* n == 0: the whole context, a half and a quarter */
    struct real_list budgets;
    size_t n_generated, n_repeats, n_threads;
    struct gpu_flags gpu;
    bool here;     /* the machine is what it is measured on: chosen when that is known, */
    int precision; /* as machine_choose() has it; else the analysis has a machine */
    bool quiet;
};
int view_compare(struct analysis *a, const struct compare_request *request);

/* Speculation by rates that were measured: on this machine with this model, or earlier. */
struct speculation_request {
    const char *rates; /* "here", or a file that this view or -c wrote with --json; NULL: the view is not asked for */
    const char *model_path;
    size_t n_threads, n_repeats;
    bool quiet;
};
int view_speculation(struct analysis *a, const struct speculation_request *request);

/* Several ranks (ranks_step.h). Numbers below 0 and counts of 0: as measured, or as the machine has them. */
struct ranks_request {
    struct speculation_request measured; /* rates: NULL: an H200's */
    struct count_list ranks;
    size_t n_shards, cores, host_ranks;
    double latency_us, bandwidth, hosts_latency_us, hosts_bandwidth, memory; /* us, GB/s, GiB a rank */
};
int view_ranks(struct analysis *a, const struct ranks_request *request);

/* n tokens prepared into a file that is gone when this returns. Dies when that fails. */
struct sqz_context *analysis_context(struct sqz_model *model, const struct sqz_squeeze_options *squeeze,
                                     const int32_t *tokens, size_t n);

/* A session of a model on SHORT_TOKENS tokens that are all read (analyze_rates.h): what a token takes there is all but
 * attention. n_threads as for measured_threads(). Dies when that fails. */
struct short_run {
    struct sqz_model *model;
    struct sqz_context *context;
    struct sqz_session *session;
};
void short_run_open(struct short_run *run, const char *model_path, size_t n_threads,
                    const struct sqz_squeeze_options *squeeze);
void short_run_close(struct short_run *run);

/* ---- Pictures ------------------------------------------------------------------------- */

/* Size in pixels; sets the terminal and what all pictures share. */
void plot_begin(struct text_buffer *script, const char *path, int width, int height);
int plot_finish(struct text_buffer *script, const char *path); /* draws, frees; the exit code */

struct heat_map {
    const char *title, *unit; /* beside the colours */
    double *value;            /* [batches][tokens], above 0 */
    double contour;           /* drawn where the values lie on both sides of it; 0: none */
};
int plot_heat_maps(const char *path, const struct analysis *a, const struct heat_map *maps, size_t n, int columns);

/* A line of a picture with logarithmic axes. */
struct plot_curve {
    char label[96];
    const double *x, *y; /* [n] above 0 */
    size_t n;
    const char *colour;
    bool dashed;
};
struct plot_panel {
    const char *title, *x_label, *y_label; /* labels with their units; x counts tokens */
    const struct plot_curve *curves;
    size_t n_curves;
    double across, up; /* a level of y, a place of x to be marked; 0: none */
    const char *across_label, *up_label;
};
int plot_panels(const char *path, const struct plot_panel *panels, size_t n); /* side by side */

/* A cost as a point of the roofline. */
struct roof_point {
    char label[64];
    enum analyze_phase phase;
    struct sqz_op_cost cost;
};
struct time_bar {
    char label[64];
    double seconds[SQZ_CLASS_AGGREGATE]; /* linear, attention, other */
};
int plot_roofline(const char *path, const struct analysis *a, const struct roof_point *points, size_t n_points,
                  const struct time_bar *bars, size_t n_bars);

#endif
