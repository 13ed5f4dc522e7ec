/* How a context is squeezed, from the command line; squeeze_flags.h describes it. */
#include "squeeze_flags.h"

#include "common.h"

const char *const rule_names[] = {"default", "paper", NULL};
const char *const metric_names[] = {"cosine", "euclidean", NULL};
const char *const group_names[] = {"mean", "max", NULL};
const char *const index_names[] = {"f16", "int8", NULL};
const char *const row_names[] = {"f16", "int4+4", "int4", "int8", NULL};

const char *row_format_name(enum sqz_row_format format)
{
    return row_names[format <= SQZ_ROWS_INT4 ? format : SQZ_ROWS_F16];
}

static void override(uint32_t *field, size_t value)
{
    if (value != SIZE_MAX) *field = (uint32_t)value;
}

static void override_switch(bool *field, int value)
{
    if (value >= 0) *field = value == 1;
}

void squeeze_flags_apply(const struct squeeze_flags *flags, struct sqz_squeeze_options *options)
{
    sqz_squeeze_options_default(options, flags->rule == 1 ? SQZ_RULE_PAPER : SQZ_RULE_DEFAULT);
    if (flags->centroids.n > SQZ_MAX_LEVELS)
        usage_error("--centroids: %zu levels; allowed are %d", flags->centroids.n, SQZ_MAX_LEVELS);
    if (flags->levels != SIZE_MAX && flags->centroids.n > flags->levels)
        usage_error("--centroids names %zu levels, --levels %zu", flags->centroids.n, flags->levels);
    if (flags->centroids.n > 0 && flags->levels == SIZE_MAX && flags->centroids.n > options->n_levels)
        options->n_levels = (uint32_t)flags->centroids.n;
    override(&options->n_levels, flags->levels);
    for (size_t i = 0; i < flags->centroids.n; i++) options->centroid_share[i] = (float)flags->centroids.value[i];
    for (uint32_t i = 1; i < options->n_levels; i++)
        if (flags->centroids.n > 0
                ? i >= flags->centroids.n
                : !(options->centroid_share[i] > 0 && options->centroid_share[i] < options->centroid_share[i - 1]))
            options->centroid_share[i] = options->centroid_share[i - 1] / 5;
    if (flags->metric >= 0) options->metric = flags->metric == 0 ? SQZ_METRIC_COSINE : SQZ_METRIC_EUCLIDEAN;
    if (flags->group >= 0) options->group = flags->group == 0 ? SQZ_GROUP_MEAN : SQZ_GROUP_MAX;
    if (flags->index >= 0) options->index = flags->index == 0 ? SQZ_INDEX_F16 : SQZ_INDEX_INT8;
    if (flags->keys >= 0) options->keys = flags->keys == 0 ? SQZ_INDEX_F16 : SQZ_INDEX_INT8;
    /* Both planes of 4 + 4 bits are INT8. */
    if (flags->rows >= 0) options->rows = flags->rows == 3 ? SQZ_ROWS_INT4_4 : (enum sqz_row_format)flags->rows;
    if (options->keys != SQZ_INDEX_F16 && options->rows != SQZ_ROWS_F16)
        usage_error("--keys int8 and --rows %s say two things of keys; give one of them", row_names[flags->rows]);
    override(&options->code_words, flags->code_words);
    override(&options->n_iterations, flags->iterations);
    override(&options->n_sinks, flags->sinks);
    override(&options->n_window, flags->window);
    override(&options->n_calibration, flags->calibration);
    if (flags->seed != SIZE_MAX) options->seed = flags->seed;
    override_switch(&options->center, flags->center);
    override_switch(&options->variance, flags->variance);
    override_switch(&options->per_head, flags->per_head);
    override_switch(&options->tail, flags->tail);
    override_switch(&options->value_skip, flags->value_skip);
}
