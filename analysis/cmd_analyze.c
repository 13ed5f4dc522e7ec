/*
 * squeeze analyze: where the time of Transformer inference goes, for a model
 * and a machine, as batch and context grow. Everything is computed from the
 * model's shape by the roofline of squeeze_roofline.h; docs/analyze.md explains the
 * formulas. With -c the prediction is held against a measured run.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "analyze.h"
#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "outputs.h"
#include "plot.h"

#define SHAPE_NAMES                                                                                                    \
    "model shape layers width heads kv-heads head-dim ffn ffn-kind vocab tied experts active-experts shared-ffn "      \
    "window-layers window weight-bits kv-bits activation-bits"
#define LOOKUP_NAMES                                                                                                   \
    "budget levels centroids opened centroid-bits code-words coded coded-keys compared retained fan-out"

#define RANKS_NAMES "ranks shards cores host-ranks rank-memory latency-us bandwidth hosts-latency-us hosts-bandwidth"

static const struct option_rule rules[] = {
    {SHAPE_NAMES " causal scores " LOOKUP_NAMES, "operand=machines", "this view lists machines alone"},
    {SHAPE_NAMES " causal scores machine machines precision " LOOKUP_NAMES, "operand=asymptotic",
     "exponents belong to the formulas, whatever the model and machine"},
    {"quiet", "!context !rates=here", "only a measurement shows progress"},
    {"plot", "rates !operand=ranks", "there is no picture of it"},
    {"machine machines precision batch draft-weight-bits draft-kv-bits weight-bits kv-bits activation-bits "
     "centroid-bits levels centroids opened code-words compared retained",
     "rates", "the rates are those of one sequence, on their machine, as it was squeezed there"},
    {"threads", "!context !machine=here !rates=here", "nothing is measured"},
    {"machine machines precision batch generate causal scores centroid-bits levels centroids opened code-words "
     "compared "
     "retained kv-bits activation-bits",
     "operand=ranks", "the view ranks has rates that were measured, of one token of one sequence"},
    {RANKS_NAMES, "!operand=ranks", "they are of the view ranks"},
    {"gpu-layers gpu-memory gpu-copies", "!context", "no model is run"},
    {0},
};

static const struct command_help help = {
    "analyze", "[VIEW]",
    "Says where the time of inference goes: FLOPs, bytes, arithmetic intensity and the time that a machine needs at "
    "least. Views: operations (each one of a workload; the default), maps (batch x context), what-if (squeezed "
    "attention, narrower numbers, speculation), ranks (a context over several GPUs or processes), complexity (how "
    "lookups "
    "grow), machines (ridge points), asymptotic "
    "(the table of exponents). With -c the prediction is compared with a measured run on this machine, on a card where "
    "there is one.",
    "  squeeze analyze --shape llama-2-7b --machine a6000 --tokens 32K --batch 8\n"
    "  squeeze analyze maps --plot maps.svg\n"
    "  squeeze analyze what-if -m model.gguf --machine here --tokens 8K,128K,1M --json\n"
    "  squeeze analyze what-if -m model.gguf --rates here --tokens 8K,32K --budget 0.05 --acceptance 0.97\n"
    "  squeeze analyze ranks --tokens 128K,1M,10M --budget 0.05 --plot ranks.svg\n"
    "  mpirun -n 4 squeeze analyze ranks -m model.gguf --rates here --tokens 16K --shards 4\n"
    "  squeeze analyze machines --machines mine.txt --plot ridge.png\n"
    "  squeeze analyze -c book.sqz.gguf\n",
    rules};

static const char *const views[] = {"operations", "maps",     "what-if",    "ranks",
                                    "complexity", "machines", "asymptotic", NULL};
enum view { VIEW_OPERATIONS, VIEW_MAPS, VIEW_WHAT_IF, VIEW_RANKS, VIEW_COMPLEXITY, VIEW_MACHINES, VIEW_ASYMPTOTIC };

static const char *const precision_names[] = {"fp32", "tf32", "fp16", "fp16-sparse", "fp8", "int8", "int4", NULL};
static const char *const ffn_names[] = {"gated", "plain", NULL};

/* Numbers of the shape given on the command line; SIZE_MAX or -1: as the model has them. */
struct shape_flags {
    size_t layers, width, heads, kv_heads, head_dim, ffn, vocab, experts, active, shared, window_layers, window;
    int ffn_kind, tied;
};

/* Whether any option of a kind was given: one that would not count is refused rather than passed over. */
struct given {
    bool shape, bits, workload, shares, counts, lookup, speculation, measurement, repeats;
};

struct command {
    struct analysis analysis;
    struct given given;
    struct shape_flags shape;
    struct compare_request compare;
    struct speculation_request measured;
    struct ranks_request ranks;
    const char *shape_name, *machine, *machines;
    int precision, scores, causal;
    size_t n_threads;
    double budget, weight_bits, kv_bits, activation_bits, retained, compared, fan_out, opened, centroid_bits;
    double coded, coded_keys; /* below 0, 0: as is usual */
    size_t levels, code_words;
    struct real_list centroids, budgets;
    bool json, csv, budget_given;
};

/* ---- The model ------------------------------------------------------------------------------ */

static void choose_preset(struct command *command)
{
    char allowed[512] = "";
    struct sqz_model_shape preset;
    if (sqz_shape_preset(command->shape_name, &command->analysis.shape)) {
        command->analysis.bits = (struct sqz_bit_widths){16, 16, 16, 16};
        return;
    }
    for (size_t i = 0; sqz_shape_get(i, &preset); i++) {
        const size_t used = strlen(allowed);
        snprintf(allowed + used, sizeof allowed - used, "%s%s", i ? ", " : "", preset.name);
    }
    usage_error("--shape %s: allowed is one of %s", command->shape_name, allowed);
}

static void override(uint32_t *field, size_t value)
{
    if (value != SIZE_MAX) *field = (uint32_t)value;
}

static void apply_shape_flags(const struct shape_flags *flags, struct sqz_model_shape *shape)
{
    override(&shape->n_layer, flags->layers);
    override(&shape->n_embd, flags->width);
    override(&shape->n_head, flags->heads);
    override(&shape->n_head_kv, flags->kv_heads);
    override(&shape->head_dim, flags->head_dim);
    override(&shape->n_ff, flags->ffn);
    override(&shape->n_vocab, flags->vocab);
    override(&shape->n_expert, flags->experts);
    override(&shape->n_expert_used, flags->active);
    override(&shape->n_ff_shared, flags->shared);
    override(&shape->n_window_layer, flags->window_layers);
    override(&shape->n_window_tokens, flags->window);
    if (flags->ffn_kind >= 0) shape->gated_ffn = flags->ffn_kind == 0;
    if (flags->tied >= 0) shape->tied_embeddings = flags->tied == 1;
    if (shape->n_expert == 0) shape->n_expert_used = shape->n_ff_shared = 0;
}

/* What single numbers do not tell of each other, in the words of the command line; the roofline checks the rest. */
static void check_shape_flags(const struct shape_flags *flags, const struct sqz_model_shape *shape)
{
    if (shape->n_head_kv > shape->n_head || shape->n_head % shape->n_head_kv != 0) {
        usage_error("--kv-heads %u: allowed are divisors of the %u query heads (--heads)", shape->n_head_kv,
                    shape->n_head);
    }
    if (shape->n_expert == 0 && (flags->active != SIZE_MAX || flags->shared != SIZE_MAX))
        usage_error("--active-experts and --shared-ffn are of a model with experts, this one has none: give --experts");
    if (shape->n_expert > 0 && (shape->n_expert_used < 1 || shape->n_expert_used > shape->n_expert))
        usage_error("--active-experts %u: allowed is 1 to the %u experts", shape->n_expert_used, shape->n_expert);
    if (shape->n_window_layer > shape->n_layer)
        usage_error("--window-layers %u: allowed is 0 to the %u layers", shape->n_window_layer, shape->n_layer);
    if ((shape->n_window_layer > 0) != (shape->n_window_tokens > 0)) {
        usage_error("--window-layers %u and --window %u: a window needs both above 0", shape->n_window_layer,
                    shape->n_window_tokens);
    }
}

static void choose_shape(struct command *command, enum view view)
{
    struct sqz_error error;
    struct analysis *a = &command->analysis;
    if (command->compare.model_path && command->shape_name)
        usage_error("-m and --shape both name a model: give one or the other");
    const bool here = command->measured.rates && strcmp(command->measured.rates, "here") == 0;
    if (command->compare.model_path || command->compare.context_path || here) {
        char *path = choose_model(command->compare.model_path);
        const enum sqz_status status = sqz_model_shape_read(path, &a->shape, &a->bits, &error);
        free(path);
        if (status != SQZ_OK) exit(report(&error));
    } else {
        const char *usual = view == VIEW_RANKS ? "llama-3-8b" : "llama-2-7b";
        command->shape_name = command->shape_name ? command->shape_name : usual;
        choose_preset(command);
        if (view == VIEW_RANKS) a->bits.weight = a->bits.output = 4.5; /* Q4_0, as was measured */
    }
    apply_shape_flags(&command->shape, &a->shape);
    check_shape_flags(&command->shape, &a->shape);
    if (command->weight_bits > 0) a->bits.weight = a->bits.output = command->weight_bits;
    a->bits.kv = command->kv_bits > 0 ? command->kv_bits : a->bits.kv;
    a->bits.activation = command->activation_bits > 0 ? command->activation_bits : a->bits.activation;
}

/* ---- The lookup ----------------------------------------------------------------------------- */

/* Keys whose codes are read, as a share of the context, at a budget: counted on SmolLM2-135M (docs/analyze.md). */
static double usual_coded_share(double budget)
{
    return -expm1(-3.8 * budget);
}

static const double usual_coded_keys = 5; /* for each that is retained; the same, near a budget of 0.1 */

static void choose_shares(const struct command *command, struct sqz_lookup_model *lookup)
{
    lookup->kind = SQZ_LOOKUP_SHARES;
    lookup->n_levels = (uint32_t)(command->levels != SIZE_MAX ? command->levels
                                  : command->centroids.n      ? command->centroids.n
                                                              : 1);
    if (lookup->n_levels < 1 || lookup->n_levels > SQZ_MAX_LEVELS || command->centroids.n > lookup->n_levels) {
        usage_error("--levels %u with %zu shares in --centroids: allowed are 1 to %d levels, at most a share for each",
                    lookup->n_levels, command->centroids.n, SQZ_MAX_LEVELS);
    }
    for (uint32_t i = 0; i < lookup->n_levels; i++) {
        lookup->centroid_share[i] = i < command->centroids.n ? command->centroids.value[i]
                                    : i == 0                 ? 0.05
                                                             : lookup->centroid_share[i - 1] / 5;
    }
    lookup->budget = command->budget;
    lookup->opened_share = command->opened;
    lookup->coded_share = command->coded >= 0 ? command->coded : usual_coded_share(command->budget);
}

/* Default: dense; --budget: levels as shares; --compared: numbers that do not grow. */
static void choose_lookup(struct command *command, enum view view)
{
    struct sqz_lookup_model *lookup = &command->analysis.lookup;
    lookup->centroid_bits = command->centroid_bits;
    lookup->code_words = (uint32_t)command->code_words;
    if (command->compared > 0 || command->retained > 0) {
        if (!(command->compared > 0 && command->retained > 0))
            usage_error("--compared and --retained go together: centroids compared and keys retained");
        if (command->budget_given)
            usage_error("--budget is a share of the context, --retained a number of keys: give one or the other");
        if (command->given.shares) {
            usage_error("--centroids, --opened and --coded are shares of the context and go with --budget, "
                        "not with --compared and --retained");
        }
        if (command->levels != SIZE_MAX && command->levels > 1) {
            usage_error("--levels %zu: with --compared allowed are 1, and 0 for as many as the context needs",
                        command->levels);
        }
        lookup->kind = SQZ_LOOKUP_COUNTS;
        lookup->n_levels = command->levels == 1 ? 1 : 0;
        lookup->n_compared = command->compared;
        lookup->n_retained = command->retained;
        lookup->n_coded = command->coded_keys > 0 ? command->coded_keys : usual_coded_keys * command->retained;
        lookup->fan_out = command->fan_out;
        return;
    }
    if (command->given.counts) usage_error("--fan-out and --coded-keys go with --compared and --retained");
    if (command->budget_given || view == VIEW_WHAT_IF || view == VIEW_RANKS || view == VIEW_COMPLEXITY)
        choose_shares(command, lookup);
    else if (command->given.shares || command->given.lookup)
        usage_error("squeezed attention was described but not asked for: give --budget, or --compared and --retained");
}

/* ---- The command -------------------------------------------------------------------------------- */

static enum view choose_view(int n_operands, char **argv)
{
    if (n_operands == 0) return VIEW_OPERATIONS;
    for (int i = 0; views[i]; i++)
        if (strcmp(argv[1], views[i]) == 0) return (enum view)i;
    usage_error("no view '%s'; allowed: operations, maps, what-if, ranks, complexity, machines, asymptotic", argv[1]);
}

static int run_view(struct command *command, enum view view, const struct machine_list *machines)
{
    struct analysis *a = &command->analysis;
    if (command->compare.context_path) return view_compare(a, &command->compare);
    switch (view) {
    case VIEW_OPERATIONS: return view_operations(a);
    case VIEW_MAPS: return view_maps(a);
    case VIEW_WHAT_IF: return command->measured.rates ? view_speculation(a, &command->measured) : view_what_if(a);
    case VIEW_RANKS: return view_ranks(a, &command->ranks);
    case VIEW_COMPLEXITY: return view_complexity(a);
    case VIEW_MACHINES: return view_machines(a, machines);
    case VIEW_ASYMPTOTIC: return view_asymptotic(a);
    }
    return 1;
}

/* Options that the view would pass over. */
static void check_given(const struct command *command, enum view view)
{
    const struct given *given = &command->given;
    const struct analysis *a = &command->analysis;
    if (command->compare.context_path) {
        if (given->shape || given->bits || command->shape_name || given->shares || given->counts || given->lookup ||
            command->compared > 0 || command->retained > 0) {
            usage_error("-c takes shape, widths and lookup from the context and its model; leave out options that "
                        "describe them");
        }
        if (given->workload || given->speculation) {
            usage_error("-c measures one sequence as it is: --lengths, --budget and --measure say what; leave out "
                        "--batch, --tokens, --generate, and options of speculation");
        }
        return;
    }
    const bool here = command->measured.rates && strcmp(command->measured.rates, "here") == 0;
    if (command->measured.rates && view != VIEW_WHAT_IF && view != VIEW_RANKS)
        usage_error("--rates are of the views what-if and ranks");
    if (command->measured.rates && a->speculation.gamma >= 16)
        usage_error("--gamma %zu: with --rates allowed are 1 to 15", a->speculation.gamma);
    if (here && (given->shape || command->shape_name))
        usage_error("--rates here takes the shape of a model that it runs: give -m, and leave out what describes one");
    if (given->measurement || (given->repeats && !here))
        usage_error("--lengths, --measure and --repeats are of a measurement: give -c CONTEXT");
    if (given->speculation && view != VIEW_WHAT_IF)
        usage_error("--acceptance, --gamma and the draft's widths are of the view what-if");
    if (given->workload && (view == VIEW_MACHINES || view == VIEW_ASYMPTOTIC))
        usage_error("the view %s has no workload: leave out --batch, --tokens and --generate", views[view]);
    if (view == VIEW_COMPLEXITY && command->analysis.batches.n > 1)
        usage_error("--batch: %zu numbers; the view complexity takes one", command->analysis.batches.n);
}

static void check_command(struct command *command, int n_operands)
{
    struct analysis *a = &command->analysis;
    if (command->json && command->csv) usage_error("--json and --csv are two formats: give one or the other");
    if (a->plot && !plot_can_draw(a->plot))
        usage_error("--plot %s: allowed are names that end in .png or .svg", a->plot);
    if (command->compare.context_path && n_operands > 0)
        usage_error("-c compares with a measured run and takes no view, found '-c' and a view");
    a->format = command->json ? OUTPUT_JSON : command->csv ? OUTPUT_CSV : OUTPUT_TEXT;
    a->causal = command->causal == 1;
    a->scores = (enum sqz_score_traffic)command->scores;
    command->budget = command->budgets.n ? command->budgets.value[0] : 0.125;
    command->budget_given = command->budgets.n > 0;
    if (command->budgets.n > 1 && !command->compare.context_path)
        usage_error("--budget: %zu budgets; without -c allowed is one", command->budgets.n);
    command->compare.budgets = command->budgets;
    command->compare.n_threads = command->n_threads;
    command->measured.model_path = command->compare.model_path;
    command->measured.n_threads = command->n_threads;
    command->measured.n_repeats = command->compare.n_repeats;
    command->measured.quiet = command->compare.quiet;
    command->ranks.measured = command->measured;
}

#define SHAPE_COUNT(option, label, field, least, text)                                                                 \
    {                                                                                                                  \
        .kind = OPTION_COUNT, .name = option, .argument = label, .value = &command.shape.field, .low = least,          \
        .high = 16777216, .given = &given->shape, .help = text                                                         \
    }
#define BITS_OPTION(option, field, of, text)                                                                           \
    {                                                                                                                  \
        .kind = OPTION_REAL, .name = option, .argument = "BITS", .value = &(field), .low = 0, .high = 64,              \
        .above = true, .example = "4.5", .given = &given->of, .help = text                                             \
    }

static void check_outputs(const struct command *command)
{
    const char *inputs[] = {command->compare.model_path, command->compare.context_path, command->machines};
    const struct output outputs[] = {{"--plot", command->analysis.plot, OUTPUT_PICTURE}, {0}};
    outputs_check(outputs, inputs, sizeof inputs / sizeof *inputs);
}

int cmd_analyze(int argc, char **argv)
{
    struct command command = {
        .precision = -1,
        .causal = 1,
        .levels = SIZE_MAX,
        .fan_out = 20,
        .opened = 0.28,
        .coded = -1,
        .shape = {SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX,
                  SIZE_MAX, SIZE_MAX, -1, -1},
        .analysis = {.n_generated = 1, .speculation = {.acceptance = 0.8, .gamma = 4, .weight_bits = 4, .kv_bits = 4}},
        .ranks = {.latency_us = -1, .hosts_latency_us = -1},
        .compare = {.n_generated = 32, .n_repeats = 5, .gpu = GPU_FLAGS_INIT},
    };
    struct analysis *a = &command.analysis;
    struct given *given = &command.given;
    struct machine_list machines;
    /* clang-format off */
    const struct option options[] = {
        {.kind = OPTION_TEXT, .letter = 'm', .name = "model", .argument = "FILE", .value = &command.compare.model_path,
         .help = "take shape and weight widths from a GGUF model"},
        {.kind = OPTION_TEXT, .name = "shape", .argument = "NAME", .value = &command.shape_name,
         .help = "a known model's shape (llama-2-7b); a wrong name lists them"},
        SHAPE_COUNT("layers", "N", layers, 1, "change single numbers of the shape: layers,"),
        SHAPE_COUNT("width", "N", width, 1, "hidden dimension d,"),
        SHAPE_COUNT("heads", "N", heads, 1, "query heads,"),
        SHAPE_COUNT("kv-heads", "N", kv_heads, 1, "key-value heads, a divisor of the heads,"),
        SHAPE_COUNT("head-dim", "N", head_dim, 1, "numbers of a key,"),
        SHAPE_COUNT("ffn", "N", ffn, 1, "width of the FFN, or of one expert,"),
        {.kind = OPTION_CHOICE, .name = "ffn-kind", .argument = "KIND", .value = &command.shape.ffn_kind,
         .choices = ffn_names, .given = &given->shape, .help = "gated (three matrices) or plain (two),"},
        SHAPE_COUNT("vocab", "N", vocab, 0, "tokens of the vocabulary; 0 leaves the output matrix out,"),
        {.kind = OPTION_SWITCH, .name = "tied", .value = &command.shape.tied,
         .given = &given->shape, .help = "one matrix for input and output,"},
        SHAPE_COUNT("experts", "N", experts, 0, "experts a layer (MoE); 0: none,"),
        SHAPE_COUNT("active-experts", "N", active, 0, "experts that a token takes,"),
        SHAPE_COUNT("shared-ffn", "N", shared, 0, "width of the FFN beside the experts,"),
        SHAPE_COUNT("window-layers", "N", window_layers, 0, "layers with a sliding window,"),
        SHAPE_COUNT("window", "N", window, 0, "tokens of that window"),
        BITS_OPTION("weight-bits", command.weight_bits, bits, "bits a weight, scales included (16, or the file's)"),
        BITS_OPTION("kv-bits", command.kv_bits, bits, "bits a number of keys and values (16)"),
        BITS_OPTION("activation-bits", command.activation_bits, bits, "bits an activation (16)"),
        {.kind = OPTION_TEXT, .name = "machine", .argument = "NAME", .value = &command.machine,
         .help = "machine (a6000); 'here' measures this one; 'squeeze analyze machines' lists them"},
        {.kind = OPTION_TEXT, .name = "machines", .argument = "FILE", .value = &command.machines,
         .help = "more machines: a line each, 'NAME bandwidth=GB/s fp16=TFLOP/s ...'"},
        {.kind = OPTION_CHOICE, .name = "precision", .argument = "NAME", .value = &command.precision,
         .choices = precision_names, .help = "whose peak rate counts (the machine's own)"},
        {.kind = OPTION_COUNTS, .name = "batch", .argument = "N[,...]", .value = &a->batches, .low = 1, .high = 1e6,
         .example = "1,8,64", .given = &given->workload, .help = "sequences at once"},
        {.kind = OPTION_COUNTS, .name = "tokens", .argument = "N[,...]", .value = &a->tokens, .low = 1, .high = 1e9,
         .example = "4K,128K,1M", .given = &given->workload, .help = "context lengths"},
        {.kind = OPTION_COUNT, .letter = 'n', .name = "generate", .argument = "N", .value = &a->n_generated, .low = 1,
         .high = 1e9, .example = "128", .given = &given->workload, .help = "tokens to generate behind the context (1)"},
        {.kind = OPTION_SWITCH, .name = "causal", .value = &command.causal,
         .help = "count what causal masks leave; --no-causal counts whole squares"},
        {.kind = OPTION_CHOICE, .name = "scores", .argument = "WHERE", .value = &command.scores, .choices = score_traffic_names,
         .help = "attention scores: as in the talk (flash attention in prefill), on the chip, or through memory"},
        {.kind = OPTION_BUDGETS, .letter = 'b', .name = "budget", .argument = "SHARE", .value = &command.budgets,
         .help = "squeezed attention that reads this share of the KV bytes, centroids included (what-if: 0.125); with "
                 "-c a list"},
        {.kind = OPTION_COUNT, .name = "levels", .argument = "N", .value = &command.levels, .low = 0,
         .high = SQZ_MAX_LEVELS, .given = &given->lookup,
         .help = "levels of centroids (1); with --compared 0: as many as needed"},
        {.kind = OPTION_SHARES, .name = "centroids", .argument = "SHARE[,...]", .value = &command.centroids,
         .given = &given->shares, .help = "clusters of every level as a share of the keys (0.05, then a fifth)"},
        {.kind = OPTION_REAL, .name = "opened", .argument = "SHARE", .value = &command.opened, .low = 0, .high = 1,
         .given = &given->shares,
         .help = "share of a lower level's centroids that is compared (0.28, from the talk's budgets)"},
        BITS_OPTION("centroid-bits", command.centroid_bits, lookup, "bits a number of a centroid (as KV)"),
        {.kind = OPTION_COUNT, .name = "code-words", .argument = "N", .value = &command.code_words, .low = 0, .high = 4,
         .given = &given->lookup,
         .help = "words of 32 bits of code a key, by which single keys are chosen (0, whole clusters; what-if "
                 "has both)"},
        {.kind = OPTION_REAL, .name = "coded", .argument = "SHARE", .value = &command.coded, .low = 0, .high = 1,
         .example = "0.3", .given = &given->shares,
         .help = "share of the keys whose codes are read (as counted at that budget, 0.32 at 0.1)"},
        {.kind = OPTION_REAL, .name = "coded-keys", .argument = "N", .value = &command.coded_keys, .low = 0,
         .high = 1e12, .above = true, .given = &given->counts,
         .help = "with --retained: keys whose codes are read (5 for each retained)"},
        {.kind = OPTION_REAL, .name = "compared", .argument = "N", .value = &command.compared, .low = 1, .high = 1e12,
         .help = "centroids compared, c or c' a level, whatever the context"},
        {.kind = OPTION_REAL, .name = "retained", .argument = "N", .value = &command.retained, .low = 1, .high = 1e12,
         .help = "keys retained, k, whatever the context"},
        {.kind = OPTION_REAL, .name = "fan-out", .argument = "N", .value = &command.fan_out, .low = 1.1, .high = 1e6,
         .given = &given->counts, .help = "clusters of a level below one of the next (20)"},
        {.kind = OPTION_REAL, .name = "acceptance", .argument = "P", .value = &a->speculation.acceptance, .low = 0,
         .high = 1, .example = "0.8", .given = &given->speculation,
         .help = "speculation: chance that a drafted token is accepted (0.8)"},
        {.kind = OPTION_COUNT, .name = "gamma", .argument = "N", .value = &a->speculation.gamma, .low = 1,
         .high = 1024, .example = "4", .given = &given->speculation, .help = "tokens drafted a cycle (4)"},
        BITS_OPTION("draft-weight-bits", a->speculation.weight_bits, speculation,
                    "weights of the draft, the same model (4)"),
        BITS_OPTION("draft-kv-bits", a->speculation.kv_bits, speculation, "keys and values of the draft (4)"),
        {.kind = OPTION_TEXT, .letter = 'c', .name = "context", .argument = "FILE",
         .value = &command.compare.context_path, .help = "measure this prepared context and compare"},
        {.kind = OPTION_COUNTS, .name = "lengths", .argument = "N[,...]", .value = &command.compare.lengths, .low = 64,
         .high = 1e9, .given = &given->measurement,
         .help = "-c: lengths of its beginning that are measured beside the whole (a half, a quarter)"},
        {.kind = OPTION_COUNT, .name = "measure", .argument = "N", .value = &command.compare.n_generated, .low = 1,
         .high = 65536, .given = &given->measurement, .help = "-c: tokens generated a run (32)"},
        {.kind = OPTION_COUNT, .name = "repeats", .argument = "N", .value = &command.compare.n_repeats, .low = 1,
         .high = 64, .given = &given->repeats, .help = "-c, --rates here: runs of each, in turn (5)"},
        {.kind = OPTION_TEXT, .name = "rates", .argument = "FILE", .value = &command.measured.rates,
         .help = "what-if: what exact speculation gains by measured rates: those of a file that -c or this wrote with "
                 "--json, or 'here', measured with the model; ranks: the same (an H200's), under mpirun with messages"},
        {.kind = OPTION_COUNTS, .name = "ranks", .argument = "N[,...]", .value = &command.ranks.ranks, .low = 1,
         .high = 1024, .example = "1,2,4", .help = "ranks: how many share the context (1,2,4 to 64)"},
        {.kind = OPTION_COUNT, .name = "shards", .argument = "N", .value = &command.ranks.n_shards, .low = 1,
         .high = 1024, .help = "shards of the context (one a rank)"},
        {.kind = OPTION_COUNT, .name = "cores", .argument = "N", .value = &command.ranks.cores, .low = 1, .high = 65536,
         .help = "cores that the ranks of a host share (those of the machine)"},
        {.kind = OPTION_COUNT, .name = "host-ranks", .argument = "N", .value = &command.ranks.host_ranks, .low = 1,
         .high = 1024, .help = "ranks of a host (8 GPUs; processes as under mpirun, else all)"},
        {.kind = OPTION_REAL, .name = "rank-memory", .argument = "GIB", .value = &command.ranks.memory, .low = 0,
         .high = 1e9, .above = true, .example = "80", .help = "memory of a rank (the machine's)"},
        {.kind = OPTION_REAL, .name = "latency-us", .argument = "US", .value = &command.ranks.latency_us, .low = 0,
         .high = 1e7, .example = "50", .help = "a message between ranks takes so long (as measured under mpirun),"},
        {.kind = OPTION_REAL, .name = "bandwidth", .argument = "GB/S", .value = &command.ranks.bandwidth, .low = 0,
         .high = 1e6, .above = true, .example = "1.25", .help = "and its bytes come so fast;"},
        {.kind = OPTION_REAL, .name = "hosts-latency-us", .argument = "US", .value = &command.ranks.hosts_latency_us,
         .low = 0, .high = 1e7, .example = "19", .help = "the same between ranks of several hosts"},
        {.kind = OPTION_REAL, .name = "hosts-bandwidth", .argument = "GB/S", .value = &command.ranks.hosts_bandwidth,
         .low = 0, .high = 1e6, .above = true, .example = "47", .help = "(19, 47)"},
        THREADS_OPTION(command.n_threads),
        GPU_OPTIONS(command.compare.gpu),
        {.kind = OPTION_FLAG, .letter = 'q', .name = "quiet", .value = &command.compare.quiet, .help = "no progress"},
        JSON_OPTION(command.json),
        {.kind = OPTION_FLAG, .name = "csv", .value = &command.csv, .help = "print comma-separated values"},
        {.kind = OPTION_TEXT, .name = "plot", .argument = "FILE", .value = &a->plot,
         .help = "draw into a .png or .svg file (needs gnuplot)"},
        {.kind = OPTION_END},
    };
    /* clang-format on */
    const int n_operands = options_parse(&help, options, argc, argv, 0, 1);
    const enum view view = choose_view(n_operands, argv);
    check_command(&command, n_operands);
    check_given(&command, view);
    check_outputs(&command);
    choose_shape(&command, view);
    choose_lookup(&command, view);
    machine_list_make(&machines, command.machines);
    const char *machine = command.machine ? command.machine : command.compare.context_path ? "here" : "a6000";
    command.compare.precision = command.precision;
    command.compare.here = command.compare.context_path && strcmp(machine, "here") == 0;
    if (!command.compare.here && !command.measured.rates && view != VIEW_RANKS)
        machine_choose(a, &machines, machine, command.precision, command.n_threads);
    const int code = run_view(&command, view, &machines);
    machine_list_free(&machines);
    return code;
}
