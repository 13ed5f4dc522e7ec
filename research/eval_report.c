/*
 * Figures over all documents. Every figure is a sum over answers divided by
 * another (nats by tokens, bytes by bytes), so that long answers count for what
 * they are; its 95% interval comes from 1,000 draws of as many documents with
 * replacement, the same draws for every setting (paired bootstrap).
 */
#include "eval.h"
#include "eval_speculate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "json_output.h"
#include "machine.h"
#include "memory.h"
#include "plot.h"
#include "random.h"

enum { DRAWS = 1000, TASKS = 256 };

/* Sums over the answers of a document under one setting. */
struct sums {
    double kl, top1, nll, n_tokens, score, n_scores, read, context;
    double nll_alone, file, file_f16;                           /* nll is the difference from dense */
    double later_kl, later_tokens, later_score, n_later_scores; /* questions after the first */
};

enum figure { KL_MEAN, TOP1, NLL_DIFF, PERPLEXITY, SCORE, BUDGET_READ, FILE_RATIO, LATER_KL, LATER_SCORE, N_FIGURES };
static const char *const figure_names[N_FIGURES] = {"kl_mean",     "top1",       "nll_diff",      "perplexity", "score",
                                                    "budget_read", "file_ratio", "kl_mean_later", "score_later"};

static double ratio(double a, double b)
{
    return b > 0.0 ? a / b : NAN;
}

static double figure_of(const struct sums *s, enum figure figure)
{
    switch (figure) {
    case KL_MEAN: return ratio(s->kl, s->n_tokens);
    case TOP1: return ratio(s->top1, s->n_tokens);
    case NLL_DIFF: return ratio(s->nll, s->n_tokens);
    case PERPLEXITY: return exp(ratio(s->nll_alone, s->n_tokens));
    case FILE_RATIO: return ratio(s->file, s->file_f16);
    case SCORE: return ratio(s->score, s->n_scores);
    case BUDGET_READ: return ratio(s->read, s->context);
    case LATER_KL: return ratio(s->later_kl, s->later_tokens);
    case LATER_SCORE: return ratio(s->later_score, s->n_later_scores);
    case N_FIGURES: break;
    }
    return NAN;
}

static void add_sums(struct sums *to, const struct sums *from)
{
    to->kl += from->kl, to->top1 += from->top1, to->nll += from->nll, to->n_tokens += from->n_tokens;
    to->score += from->score, to->n_scores += from->n_scores;
    to->read += from->read, to->context += from->context;
    to->nll_alone += from->nll_alone, to->file += from->file, to->file_f16 += from->file_f16;
    to->later_kl += from->later_kl, to->later_tokens += from->later_tokens;
    to->later_score += from->later_score, to->n_later_scores += from->n_later_scores;
}

static struct sums sums_of(const json_t *record, size_t setting)
{
    const json_t *answers = json_array_get(json_object_get(record, "settings"), setting);
    struct sums s = {0};
    s.file = json_number_value(json_array_get(json_object_get(record, "file"), setting));
    s.file_f16 = json_number_value(json_array_get(json_object_get(record, "file_f16"), setting));
    for (size_t i = 0; i < json_array_size(answers); i++) {
        const json_t *answer = json_array_get(answers, i);
        const json_t *kl = json_object_get(answer, "kl"), *score = json_object_get(answer, "score");
        double sum = 0.0;
        for (size_t t = 0; t < json_array_size(kl); t++) sum += json_number_value(json_array_get(kl, t));
        s.kl += sum;
        s.n_tokens += (double)json_array_size(kl);
        s.top1 += json_number_value(json_object_get(answer, "top1"));
        s.nll_alone += json_number_value(json_object_get(answer, "nll"));
        s.nll +=
            json_number_value(json_object_get(answer, "nll")) - json_number_value(json_object_get(answer, "nll_dense"));
        if (score) {
            s.score += json_number_value(score);
            s.n_scores += 1.0;
        }
        s.read += json_number_value(json_object_get(answer, "read"));
        s.context += json_number_value(json_object_get(answer, "context"));
        if (i > 0) {
            s.later_kl += sum;
            s.later_tokens += (double)json_array_size(kl);
            s.later_score += score ? json_number_value(score) : 0.0;
            s.n_later_scores += score ? 1.0 : 0.0;
        }
    }
    return s;
}

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* All answers of a setting: what a row of the result holds. */
struct row {
    struct sums all;
    double low[N_FIGURES], high[N_FIGURES]; /* of the interval */
    double kl_p99;
    struct {
        const char *name;
        struct sums sums;
    } tasks[TASKS];
    size_t n_tasks;
};

/* The nearest-rank quantile of every token's distance. */
static double kl_quantile(const json_t *records, size_t setting, double share)
{
    double *kl = NULL;
    size_t n = 0, capacity = 0;
    for (size_t d = 0; d < json_array_size(records); d++) {
        const json_t *answers = json_array_get(json_object_get(json_array_get(records, d), "settings"), setting);
        for (size_t i = 0; i < json_array_size(answers); i++) {
            const json_t *list = json_object_get(json_array_get(answers, i), "kl");
            if (n + json_array_size(list) > capacity) {
                capacity = 2 * (n + json_array_size(list));
                kl = realloc(kl, capacity * sizeof *kl);
                if (!kl) die("out of memory");
            }
            for (size_t t = 0; t < json_array_size(list); t++) kl[n++] = json_number_value(json_array_get(list, t));
        }
    }
    if (n == 0) return NAN;
    qsort(kl, n, sizeof *kl, compare_doubles);
    const double rank = ceil(share * (double)n) - 1.0;
    const double value = kl[rank < 0.0 ? 0 : (size_t)rank];
    free(kl);
    return value;
}

static void bootstrap(struct row *row, const struct sums *documents, size_t n)
{
    double *draws = allocate((size_t)N_FIGURES * DRAWS, sizeof *draws);
    struct sqz_random random;
    sqz_random_seed(&random, 1); /* the same documents are drawn for every setting */
    for (size_t i = 0; i < DRAWS; i++) {
        struct sums drawn = {0};
        for (size_t d = 0; d < n; d++) add_sums(&drawn, &documents[(size_t)(sqz_random_unit(&random) * (double)n)]);
        for (int f = 0; f < N_FIGURES; f++) draws[f * DRAWS + (int)i] = figure_of(&drawn, (enum figure)f);
    }
    for (int f = 0; f < N_FIGURES; f++) {
        double *x = draws + f * DRAWS;
        row->low[f] = row->high[f] = NAN;
        if (isfinite(figure_of(&row->all, (enum figure)f))) {
            qsort(x, DRAWS, sizeof *x, compare_doubles);
            row->low[f] = x[DRAWS / 40];
            row->high[f] = x[DRAWS - 1 - DRAWS / 40];
        }
    }
    free(draws);
}

static struct row *make_row(const json_t *records, size_t setting)
{
    const size_t n = json_array_size(records);
    struct row *row = allocate(1, sizeof *row);
    struct sums *documents = allocate(n, sizeof *documents);
    for (size_t d = 0; d < n; d++) {
        const char *task = json_string_value(json_object_get(json_array_get(records, d), "task"));
        size_t t = 0;
        documents[d] = sums_of(json_array_get(records, d), setting);
        add_sums(&row->all, &documents[d]);
        while (t < row->n_tasks && strcmp(row->tasks[t].name, task) != 0) t++;
        if (t < TASKS) {
            row->n_tasks = t == row->n_tasks ? t + 1 : row->n_tasks;
            row->tasks[t].name = task;
            add_sums(&row->tasks[t].sums, &documents[d]);
        }
    }
    bootstrap(row, documents, n);
    row->kl_p99 = kl_quantile(records, setting, 0.99);
    free(documents);
    return row;
}

/* The mean of the tasks' scores, which is how the benchmarks average. */
static double mean_task_score(const struct row *row)
{
    double sum = 0.0;
    size_t n = 0;
    for (size_t t = 0; t < row->n_tasks; t++) {
        const double score = figure_of(&row->tasks[t].sums, SCORE);
        if (isfinite(score)) {
            sum += score;
            n++;
        }
    }
    return n > 0 ? sum / (double)n : NAN;
}

/* Sums of recall over all documents, by layer and head of a setting. */
struct map {
    size_t n_layer, n_head;
    double *mass, *keys, *n; /* [n_layer][n_head] */
};

static double number_at(const json_t *object, const char *name, size_t i)
{
    return json_number_value(json_array_get(json_object_get(object, name), i));
}

/* Empty (n_layer 0) where recall was not measured. */
static struct map make_map(const json_t *records, size_t setting)
{
    struct map map = {0};
    for (size_t d = 0; d < json_array_size(records); d++) {
        const json_t *recall = json_array_get(json_object_get(json_array_get(records, d), "recall"), setting);
        const size_t n_layer = (size_t)json_integer_value(json_object_get(recall, "layers"));
        const size_t n_head = (size_t)json_integer_value(json_object_get(recall, "heads"));
        if (n_layer == 0 || n_head == 0 || json_array_size(json_object_get(recall, "n")) != n_layer * n_head) continue;
        if (map.n_layer == 0) {
            map.n_layer = n_layer;
            map.n_head = n_head;
            map.mass = allocate(3 * n_layer * n_head, sizeof *map.mass);
            map.keys = map.mass + n_layer * n_head;
            map.n = map.keys + n_layer * n_head;
        }
        for (size_t i = 0; i < map.n_layer * map.n_head && n_layer * n_head == map.n_layer * map.n_head; i++) {
            map.mass[i] += number_at(recall, "mass", i);
            map.keys[i] += number_at(recall, "keys", i);
            map.n[i] += number_at(recall, "n", i);
        }
    }
    return map;
}

/* The mean over layers and heads; NAN where it was not measured. */
static double mean_recall(const struct map *map)
{
    double sum = 0.0;
    size_t n = 0;
    for (size_t i = 0; i < map->n_layer * map->n_head; i++) {
        if (map->n[i] > 0.0) {
            sum += map->mass[i] / map->n[i];
            n++;
        }
    }
    return n > 0 ? sum / (double)n : NAN;
}

/* Answers whose score is below (or above) that of the dense run, and the leads of the former, ascending: a lead near 0 is
 * a near tie, which rounding alone may turn. */
struct changed {
    size_t n_lost, n_found, n_leads;
    double *leads;
};

static struct changed changed_answers(const json_t *records, size_t setting)
{
    struct changed c = {0};
    for (size_t d = 0; d < json_array_size(records); d++) {
        const json_t *settings = json_object_get(json_array_get(records, d), "settings");
        const json_t *answers = json_array_get(settings, setting), *dense = json_array_get(settings, 0);
        for (size_t i = 0; i < json_array_size(answers); i++) {
            const json_t *answer = json_array_get(answers, i), *lead = json_object_get(answer, "lead");
            const double score = json_number_value(json_object_get(answer, "score"));
            const double wanted = json_number_value(json_object_get(json_array_get(dense, i), "score"));
            c.n_found += score > wanted;
            if (score < wanted) {
                c.n_lost++;
                if (lead) {
                    c.leads = realloc(c.leads, (c.n_leads + 1) * sizeof *c.leads);
                    if (!c.leads) die("out of memory");
                    c.leads[c.n_leads++] = json_number_value(lead);
                }
            }
        }
    }
    if (c.n_leads > 0) qsort(c.leads, c.n_leads, sizeof *c.leads, compare_doubles);
    return c;
}

/* ---- Table ------------------------------------------------------------------------------ */

/* "0.0123", or "-" for what was not measured. */
static const char *number(char text[NUMBER_TEXT_MAX], const char *format, double value)
{
    snprintf(text, NUMBER_TEXT_MAX, isfinite(value) ? format : "-", value);
    return text;
}

static void print_left_out(const json_t *left_out)
{
    size_t i;
    json_t *entry;
    if (json_array_size(left_out) > 0) printf("left out:\n");
    json_array_foreach(left_out, i, entry)
    {
        const json_t *question = json_object_get(entry, "question"), *line = json_object_get(entry, "line");
        const char *place = json_string_value(json_object_get(entry, json_is_null(line) ? "task" : "file"));
        char plain[PLAIN_TEXT_MAX];
        printf("  %s", plain_text(plain, place));
        if (!json_is_null(line)) printf(":%lld", (long long)json_integer_value(line));
        if (!json_is_null(question)) printf(" question %lld", (long long)json_integer_value(question));
        printf(": %s\n", plain_text(plain, json_string_value(json_object_get(entry, "why"))));
    }
}

/* Whether the sizes of files say anything. */
static bool any_rounds(const struct eval *eval)
{
    bool any = false;
    for (size_t i = 0; i < eval->n_settings; i++) any = any || method_rounds(eval->settings[i].method);
    return any;
}

static void print_table(const struct eval *eval, const json_t *records, size_t length)
{
    struct row *dense = make_row(records, 0);
    char plain[PLAIN_TEXT_MAX];
    printf("%s: %zu documents", plain_text(plain, eval->model_info.description), json_array_size(records));
    if (length) printf(", the first %zu tokens of each", length);
    printf("\n");
    printf("%-22s%7s%8s", "configuration", "budget", "read");
    const bool rounds = any_rounds(eval);
    if (rounds) printf("%8s", "file");
    if (eval->distances) printf("%10s%19s%9s%8s%10s%9s", "KL mean", "(95%)", "KL p99", "top 1", "NLL diff", "perpl.");
    for (size_t t = 0; eval->scores && t < dense->n_tasks; t++)
        printf(" %14.14s", plain_text(plain, dense->tasks[t].name));
    printf("%s\n", eval->scores ? "  average" : "");
    for (size_t i = 0; i < eval->n_settings; i++) {
        char name[64], text[7][NUMBER_TEXT_MAX], range[NUMBER_TEXT_MAX * 2];
        struct row *row = make_row(records, i);
        eval_setting_name(name, sizeof name, &eval->settings[i]);
        printf("%-22s%7g%8s", name, eval->settings[i].budget,
               number(text[0], "%.4f", figure_of(&row->all, BUDGET_READ)));
        if (rounds) printf("%8s", number(text[0], "%.4f", figure_of(&row->all, FILE_RATIO)));
        if (eval->distances) {
            snprintf(range, sizeof range, "%s-%s", number(text[1], "%.4f", row->low[KL_MEAN]),
                     number(text[2], "%.4f", row->high[KL_MEAN]));
            printf("%10s%19s%9s%8s%10s%9s", number(text[0], "%.5f", figure_of(&row->all, KL_MEAN)), range,
                   number(text[3], "%.4f", row->kl_p99), number(text[4], "%.4f", figure_of(&row->all, TOP1)),
                   number(text[5], "%+.4f", figure_of(&row->all, NLL_DIFF)),
                   number(text[6], "%.4f", figure_of(&row->all, PERPLEXITY)));
        }
        for (size_t t = 0; eval->scores && t < row->n_tasks; t++)
            printf(" %14s", number(text[0], "%.2f", 100.0 * figure_of(&row->tasks[t].sums, SCORE)));
        printf("%9s\n", eval->scores ? number(text[1], "%.2f", 100.0 * mean_task_score(row)) : "");
        free(row);
    }
    for (size_t i = 1; eval->scores && i < eval->n_settings; i++) {
        struct changed c = changed_answers(records, i);
        char name[64];
        eval_setting_name(name, sizeof name, &eval->settings[i]);
        printf("%s%s at %g: %zu answers score less than dense, %zu more", i == 1 ? "\n" : "", name,
               eval->settings[i].budget, c.n_lost, c.n_found);
        if (c.n_leads > 0) {
            printf("; where the former went another way dense led by %.2f nats (median; least %.2f, most %.2f)",
                   c.leads[c.n_leads / 2], c.leads[0], c.leads[c.n_leads - 1]);
        }
        printf("\n");
        free(c.leads);
    }
    free(dense);
}

/* Records of contexts cut to a length; all of them for 0. New reference. */
static json_t *of_length(const json_t *records, size_t length)
{
    json_t *list = json_array();
    for (size_t d = 0; d < json_array_size(records); d++) {
        json_t *record = json_array_get(records, d);
        if (!length || (size_t)json_integer_value(json_object_get(record, "length")) == length)
            json_array_append(list, record);
    }
    return list;
}

int eval_print_table(const struct eval *eval, const json_t *records)
{
    for (size_t i = 0; i < (eval->lengths.n ? eval->lengths.n : 1); i++) {
        const size_t length = eval->lengths.n ? eval->lengths.value[i] : 0;
        json_t *list = of_length(records, length);
        if (!eval->distances && !eval->scores) { /* drafts alone, which have a table of their own */
            json_decref(list);
            break;
        }
        if (i > 0) printf("\n");
        if (json_array_size(list) > 0) print_table(eval, list, length);
        else printf("no document of %zu tokens and more\n", length);
        json_decref(list);
    }
    if (eval->speculate) eval_print_speculation(eval, records);
    print_left_out(eval->left_out);
    return close_stdout();
}

/* ---- JSON ------------------------------------------------------------------------------- */

static json_t *tasks_json(const struct row *row)
{
    json_t *tasks = json_array();
    for (size_t t = 0; t < row->n_tasks; t++) {
        const struct sums *s = &row->tasks[t].sums;
        json_t *task = json_object();
        json_object_set_new(task, "task", json_text(row->tasks[t].name));
        for (int f = 0; f < N_FIGURES; f++) {
            const double value = figure_of(s, (enum figure)f);
            if (isfinite(value)) json_object_set_new(task, figure_names[f], json_number(value));
        }
        json_array_append_new(tasks, task);
    }
    return tasks;
}

/* The task that lost most against dense: by score where there are scores, else by distance. */
static const char *worst_task(const struct row *row, const struct row *dense)
{
    const char *worst = NULL;
    double most = -INFINITY;
    for (size_t t = 0; t < row->n_tasks; t++) {
        double lost = figure_of(&dense->tasks[t].sums, SCORE) - figure_of(&row->tasks[t].sums, SCORE);
        lost = isfinite(lost) ? lost : figure_of(&row->tasks[t].sums, KL_MEAN);
        if (isfinite(lost) && lost > most) {
            most = lost;
            worst = row->tasks[t].name;
        }
    }
    return worst;
}

static json_t *row_json(const struct eval *eval, const json_t *records, size_t i, const struct row *dense)
{
    const struct eval_setting *setting = &eval->settings[i];
    struct row *row = make_row(records, i);
    json_t *json = json_object();
    json_object_set_new(json, "model", json_text(eval->model_info.name));
    json_object_set_new(json, "documents", json_count(json_array_size(records)));
    json_object_set_new(json, "method", json_string(method_names[setting->method]));
    json_object_set_new(json, "levels", json_count(setting->n_levels));
    json_object_set_new(json, "budget_asked", json_number(setting->budget));
    for (int f = 0; f < N_FIGURES; f++) {
        const double value = figure_of(&row->all, (enum figure)f);
        char name[64];
        if (isfinite(value)) {
            json_object_set_new(json, figure_names[f], json_number(value));
            snprintf(name, sizeof name, "%s_low", figure_names[f]);
            json_object_set_new(json, name, json_number(row->low[f]));
            snprintf(name, sizeof name, "%s_high", figure_names[f]);
            json_object_set_new(json, name, json_number(row->high[f]));
        }
    }
    if (isfinite(row->kl_p99)) {
        json_object_set_new(json, "kl_p99", json_number(row->kl_p99));
        json_object_set_new(json, "answer_tokens", json_count((uint64_t)row->all.n_tokens));
    }
    if (isfinite(mean_task_score(row)))
        json_object_set_new(json, "score_mean_of_tasks", json_number(mean_task_score(row)));
    if (eval->scores && i > 0) {
        struct changed c = changed_answers(records, i);
        json_t *leads = json_array();
        for (size_t j = 0; j < c.n_leads; j++) json_array_append_new(leads, json_number(c.leads[j]));
        json_object_set_new(json, "answers_below_dense", json_count(c.n_lost));
        json_object_set_new(json, "answers_above_dense", json_count(c.n_found));
        json_object_set_new(json, "leads_of_lost_answers", leads);
        free(c.leads);
    }
    struct map map = make_map(records, i);
    if (map.n_layer > 0) {
        json_t *lost = json_array(), *kept = json_array(); /* by layer, then head; null where nothing was measured */
        for (size_t j = 0; j < map.n_layer * map.n_head; j++) {
            json_array_append_new(lost, json_number(1.0 - map.mass[j] / map.n[j]));
            json_array_append_new(kept, json_number(map.keys[j] / map.n[j]));
        }
        json_object_set_new(json, "recall", json_number(mean_recall(&map)));
        json_object_set_new(json, "map_heads", json_count(map.n_head));
        json_object_set_new(json, "map_lost_mass", lost);
        json_object_set_new(json, "map_retained_keys", kept);
    }
    free(map.mass);
    const char *worst = i > 0 ? worst_task(row, dense) : NULL;
    if (worst) json_object_set_new(json, "worst_task", json_text(worst));
    json_object_set_new(json, "tasks", tasks_json(row));
    free(row);
    return json;
}

/* A row for every setting, of the contexts of a length; `tokens` says which (0: of all, not said). */
static void add_rows(json_t *rows, const struct eval *eval, const json_t *records, size_t length)
{
    json_t *list = of_length(records, length);
    struct row *dense = json_array_size(list) > 0 ? make_row(list, 0) : NULL;
    for (size_t i = 0; dense && i < eval->n_settings; i++) {
        json_t *row = row_json(eval, list, i, dense);
        if (length) json_object_set_new(row, "tokens", json_count(length));
        json_array_append_new(rows, row);
    }
    free(dense);
    json_decref(list);
}

int eval_print_json(const struct eval *eval, const json_t *records, double seconds)
{
    json_t *root = json_object(), *rows = json_array(), *tokens = json_array();
    for (size_t i = 0; i < (eval->lengths.n ? eval->lengths.n : 1); i++)
        add_rows(rows, eval, records, eval->lengths.n ? eval->lengths.value[i] : 0);
    for (size_t d = 0; d < json_array_size(records); d++)
        json_array_append(tokens, json_object_get(json_array_get(records, d), "tokens"));
    json_object_set_new(root, "rows", rows);
    if (eval->speculate) json_object_set_new(root, "speculation", eval_speculation_json(eval, records));
    json_object_set_new(root, "document_tokens", tokens);
    json_object_set(root, "left_out", eval->left_out);
    json_object_set_new(root, "model", json_text(eval->model_info.name));
    json_object_set_new(root, "model_description", json_text(eval->model_info.description));
    json_object_set_new(root, "gpu_layers", json_count(eval->model_info.n_gpu_layers));
    if (eval->n_shards > 1) json_object_set_new(root, "shards", json_count(eval->n_shards));
    json_object_set_new(root, "seconds", json_number(seconds));
    add_origin_json(root, eval->model_info.n_threads);
    return print_json(root);
}

/* ---- Picture ---------------------------------------------------------------------------- */

static bool same_line(const struct eval_setting *a, const struct eval_setting *b)
{
    return a->method == b->method && a->n_levels == b->n_levels;
}

/* One line a method: a figure against the share read. */
static void write_panel(struct text_buffer *script, const struct eval *eval, struct row *const *rows,
                        enum figure figure, const char *title, bool log_scale)
{
    text_buffer_print(script, "set title '%s'\n%s logscale y\n", title, log_scale ? "set" : "unset");
    for (size_t i = 1; i < eval->n_settings; i++) {
        bool first = true;
        for (size_t j = 1; j < i; j++) first = first && !same_line(&eval->settings[i], &eval->settings[j]);
        if (!first) continue;
        text_buffer_print(script, "$line%zu << EOD\n", i);
        for (size_t j = i; j < eval->n_settings; j++) {
            if (same_line(&eval->settings[i], &eval->settings[j])) {
                text_buffer_print(script, "%.9g %.9g %.9g %.9g\n", figure_of(&rows[j]->all, BUDGET_READ),
                                  figure_of(&rows[j]->all, figure), rows[j]->low[figure], rows[j]->high[figure]);
            }
        }
        text_buffer_print(script, "EOD\n");
    }
    const char *join = "plot ";
    for (size_t i = 1; i < eval->n_settings; i++) {
        bool first = true;
        for (size_t j = 1; j < i; j++) first = first && !same_line(&eval->settings[i], &eval->settings[j]);
        if (first) {
            char name[64];
            eval_setting_name(name, sizeof name, &eval->settings[i]);
            text_buffer_print(script, "%s$line%zu using 1:2:3:4 with yerrorlines lw 2 pt 7 ps 0.6 title '%s'", join, i,
                              name);
            join = ", ";
        }
    }
    text_buffer_print(script, "\n");
}

int eval_plot(const struct eval *eval, const json_t *records, const char *path)
{
    struct text_buffer script = {0};
    struct row **rows = allocate(eval->n_settings, sizeof *rows);
    for (size_t i = 0; i < eval->n_settings; i++) rows[i] = make_row(records, i);
    const bool both = eval->distances && eval->scores;
    text_buffer_print(&script, "set terminal %s size %d,450\n", plot_is_svg(path) ? "svg" : "pngcairo",
                      both ? 1200 : 640);
    text_buffer_print(&script,
                      "set key outside top center horizontal\nset grid\nset logscale x 2\n"
                      "set xlabel 'share of keys and values read, centroids included'\n"
                      "set multiplot layout 1,%d\n",
                      both ? 2 : 1);
    if (eval->distances) {
        text_buffer_print(&script, "set ylabel 'nats a token'\n");
        write_panel(&script, eval, rows, KL_MEAN, "mean KL divergence from dense", true);
    }
    if (eval->scores) {
        text_buffer_print(&script, "set ylabel 'score'\n");
        write_panel(&script, eval, rows, SCORE, "score of the replies", false);
    }
    text_buffer_print(&script, "unset multiplot\n");
    const int code = plot_draw(path, &script);
    for (size_t i = 0; i < eval->n_settings; i++) free(rows[i]);
    free(rows);
    text_buffer_free(&script);
    return code;
}

static void write_map(struct text_buffer *script, const struct map *map, bool lost, const char *title)
{
    text_buffer_print(script, "set title '%s'\n$map << EOD\n", title);
    for (size_t h = 0; h < map->n_head; h++) {
        for (size_t l = 0; l < map->n_layer; l++) {
            const size_t i = l * map->n_head + h;
            const double share = (lost ? map->mass : map->keys)[i] / map->n[i];
            text_buffer_print(script, "%zu %zu %.6g\n", l, h, lost ? 1.0 - share : share);
        }
        text_buffer_print(script, "\n");
    }
    text_buffer_print(script, "EOD\nplot $map using 1:2:3 with image notitle\n");
}

int eval_plot_maps(const struct eval *eval, const json_t *records, const char *path)
{
    struct text_buffer script = {0};
    size_t setting = 1;
    while (setting < eval->n_settings && eval->settings[setting].method != METHOD_SQUEEZED) setting++;
    struct map map = make_map(records, setting);
    if (map.n_layer == 0) die("no squeezed setting with recall was measured; there is no map to draw");
    char title[128];
    text_buffer_print(&script,
                      "set terminal %s size 1000,600\nset multiplot layout 2,1\n"
                      "set xlabel 'layer'\nset ylabel 'key-value head'\nset xrange [-0.5:%g]\n"
                      "set yrange [-0.5:%g]\nset ytics 1\nset palette defined (0 '#ffffff', 0.5 '#f4a582', 1 "
                      "'#67001f')\n",
                      plot_is_svg(path) ? "svg" : "pngcairo", (double)map.n_layer - 0.5, (double)map.n_head - 0.5);
    snprintf(title, sizeof title, "attention mass lost at a budget of %g", eval->settings[setting].budget);
    write_map(&script, &map, true, title);
    snprintf(title, sizeof title, "share of keys retained at a budget of %g", eval->settings[setting].budget);
    write_map(&script, &map, false, title);
    text_buffer_print(&script, "unset multiplot\n");
    const int code = plot_draw(path, &script);
    free(map.mass);
    text_buffer_free(&script);
    return code;
}
