/* What --methods and --budget ask for; eval.h. */
#define _POSIX_C_SOURCE 200809L /* strdup, strtok_r */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "eval.h"

static void add_settings(struct eval *eval, const struct real_list *budgets, enum eval_method method, uint32_t n_levels)
{
    for (size_t i = 0; i < budgets->n; i++) {
        if (eval->n_settings == EVAL_SETTINGS) usage_error("more than %d methods times budgets", EVAL_SETTINGS);
        eval->settings[eval->n_settings++] = (struct eval_setting){method, n_levels, budgets->value[i]};
    }
}

/* Notes a method that drafts. */
static void add_draft(struct eval *eval, enum eval_method method, uint32_t n_levels)
{
    for (size_t i = 0; i < eval->n_drafts; i++)
        if (eval->drafts[i].method == method && eval->drafts[i].n_levels == n_levels) return;
    if (eval->n_drafts == EVAL_DRAFTS) usage_error("more than %d methods that draft", EVAL_DRAFTS);
    if (method != METHOD_SQUEEZED && eval->squeeze.rows != SQZ_ROWS_F16)
        usage_error(
            "--rows and '%s': answers that it drafts are exact to F16 rows, others would not be; leave out --rows",
            method_names[method]);
    eval->drafts[eval->n_drafts++] = (struct eval_setting){method, n_levels, 1.0};
}

/* What can be asked of a method that was named. */
static void add_method(struct eval *eval, const struct real_list *budgets, enum eval_method method, uint32_t n_levels)
{
    if (method_only_drafts(method) && !eval->speculate)
        usage_error("--methods: %s drafts exact answers and does nothing else (--speculate)%s", method_names[method],
                    method == METHOD_QUANTSPEC ? "; int4 reads the same rows" : "");
    if (eval->speculate && method_drafts(method)) add_draft(eval, method, n_levels);
    if (method_rounds(method)) {
        if (eval->n_settings == EVAL_SETTINGS) usage_error("more than %d methods times budgets", EVAL_SETTINGS);
        eval->settings[eval->n_settings++] = (struct eval_setting){method, n_levels, 1.0};
    } else if (!method_only_drafts(method)) {
        add_settings(eval, budgets, method, n_levels);
    }
}

/* What is measured of contexts in shards, which are read once and not squeezed anew. */
static void require_shards(struct eval *eval)
{
    static const char *const what = "contexts in shards (--shards, mpirun)";
    for (size_t i = 1; i < eval->n_settings; i++) {
        const struct eval_setting *setting = &eval->settings[i];
        if (setting->method != METHOD_SQUEEZED)
            usage_error("%s: '%s' cannot read them; allowed is --methods squeezed, or squeezed:N", what,
                        method_names[setting->method]);
        if (setting->n_levels != eval->settings[1].n_levels)
            usage_error("%s: %u and %u levels; allowed is one number, since documents are read into shards once", what,
                        eval->settings[1].n_levels, setting->n_levels);
    }
    if (eval->speculate || eval->recall)
        usage_error("%s: allowed are neither %s", what,
                    eval->recall ? "--recall nor --maps, which look at rows of one file"
                                 : "--speculate nor what goes with it, whose drafts are of one file");
    eval->squeeze.n_levels = eval->settings[1].n_levels;
}

void eval_settings_parse(struct eval *eval, const char *methods, const struct real_list *budgets)
{
    char *text = strdup(methods), *rest = text;
    if (!text) die("out of memory");
    eval->settings[eval->n_settings++] = (struct eval_setting){METHOD_DENSE, 0, 1.0};
    for (char *name = strtok_r(text, ",", &rest); name; name = strtok_r(NULL, ",", &rest)) {
        char *colon = strchr(name, ':'), *end = NULL;
        long n_levels = colon ? strtol(colon + 1, &end, 10) : 0;
        enum eval_method method = METHOD_SQUEEZED;
        if (colon) *colon = '\0';
        while (method < N_METHODS && strcmp(name, method_names[method]) != 0) method++;
        const bool has_levels = method == METHOD_SQUEEZED || method == METHOD_PAPER;
        if (method == N_METHODS || (colon && (!has_levels || *end || n_levels < 1 || n_levels > SQZ_MAX_LEVELS))) {
            usage_error(
                "--methods: '%s%s%s': allowed are squeezed, paper, both with ':' and a number of levels up to "
                "%d, quest, window, oracle, int4+4, int4, streaming, and with --speculate snapkv and quantspec, "
                "for example squeezed,squeezed:2,quest",
                name, colon ? ":" : "", colon ? colon + 1 : "", SQZ_MAX_LEVELS);
        }
        const uint32_t usual = method == METHOD_PAPER ? 1 : eval->squeeze.n_levels;
        if (has_levels && !colon && usual == 0) usage_error("--levels 0 is dense attention, which is always measured");
        if (method_rounds(method) && usual == 0) usage_error("--levels 0: rows without clusters are F16");
        const bool clustered = has_levels || method_rounds(method);
        add_method(eval, budgets, method, !clustered ? 0 : colon ? (uint32_t)n_levels : usual);
    }
    free(text);
    if (eval->n_settings == 1 && eval->n_drafts == 0) usage_error("--methods names no method");
    if (eval->speculate && eval->n_drafts == 0)
        usage_error(
            "--speculate: --methods names nobody who drafts: allowed are squeezed, streaming, snapkv, quantspec");
    if (eval->n_shards > 1) require_shards(eval);
    if (eval->same_bytes && eval->settings[1].method != METHOD_SQUEEZED)
        usage_error("--same-bytes: --methods must name squeezed first, for example squeezed,window");
}

void eval_setting_name(char *name, size_t size, const struct eval_setting *setting)
{
    if (setting->n_levels > 1) snprintf(name, size, "%s, %u levels", method_names[setting->method], setting->n_levels);
    else snprintf(name, size, "%s", method_names[setting->method]);
}
