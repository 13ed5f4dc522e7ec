/* The context that a method reads; eval.h. */
#include "eval.h"

struct sqz_context *eval_context_for(const struct eval *eval, struct sqz_context *base,
                                     const struct eval_setting *setting, const char *label, struct sqz_error *error)
{
    struct sqz_squeeze_options options = eval->squeeze;
    if (setting->method == METHOD_PAPER) sqz_squeeze_options_default(&options, SQZ_RULE_PAPER);
    options.n_levels = setting->n_levels;
    if (method_rounds(setting->method)) {
        options.rows = setting->method == METHOD_INT4 ? SQZ_ROWS_INT4 : SQZ_ROWS_INT4_4;
        options.keys = SQZ_INDEX_F16;
        options.n_calibration = eval->kept.n_calibration; /* as many as the base's file has, which it is held against */
    } else if (setting->n_levels == 0) {
        options.rows = SQZ_ROWS_F16;
        options.keys = SQZ_INDEX_F16;
    }
    for (uint32_t l = 1; l < options.n_levels; l++)
        if (l >= eval->squeeze.n_levels || setting->method == METHOD_PAPER)
            options.centroid_share[l] = options.centroid_share[l - 1] / 5;
    return kept_contexts_squeeze(&eval->kept, base, &options, label, error);
}
