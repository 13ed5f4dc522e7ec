/* Figures of exact answers by drafts: by method, length of the context and document; eval_speculate.h. */
#include "eval_speculate.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common.h"
#include "json_output.h"

struct sums {
    double drafted, by_text, accepted, tested, cycles, tokens, same, answers, documents, context_tokens;
    double seconds, alone, timed; /* of the tokens behind each answer's first, and how many */
    double bytes;                 /* of a drafted token, by answers that the model drafted */
    double by_model;
};

static double number(const json_t *entry, const char *key)
{
    return json_number_value(json_object_get(entry, key));
}

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 0;
}

static void add(struct sums *s, const json_t *entry)
{
    const double n = number(entry, "n_tokens"), seconds = number(entry, "seconds_a_token"),
                 alone = number(entry, "seconds_a_token_alone"), bytes = number(entry, "draft_bytes");
    s->drafted += number(entry, "n_drafted");
    s->by_text += number(entry, "n_drafted_by_text");
    s->accepted += number(entry, "n_accepted");
    s->tested += number(entry, "n_tested");
    s->cycles += number(entry, "n_cycles");
    s->tokens += n;
    s->same += json_is_true(json_object_get(entry, "same"));
    s->answers++;
    if (seconds > 0 && alone > 0) s->seconds += n * seconds, s->alone += n * alone, s->timed += n;
    if (bytes > 0) s->bytes += bytes, s->by_model++;
}

/* The method's answers of a document; whether there are any. */
static bool add_record(struct sums *s, const json_t *record, const char *method)
{
    const json_t *answers = json_object_get(record, "speculation");
    const double before = s->answers;
    for (size_t i = 0; i < json_array_size(answers); i++) {
        const json_t *entry = json_array_get(answers, i);
        if (strcmp(json_string_value(json_object_get(entry, "method")), method) == 0) add(s, entry);
    }
    if (s->answers == before) return false;
    s->documents++;
    s->context_tokens += number(record, "tokens");
    return true;
}

/* Contexts of [first, 2 first) tokens: first is 1,024 times a power of two, or 0 for what is shorter. */
static size_t length_of(const json_t *record)
{
    const double tokens = number(record, "tokens");
    size_t first = 1024;
    if (tokens < (double)first) return 0;
    while (2.0 * (double)first <= tokens) first *= 2;
    return first;
}

enum { LENGTHS = 64 };

/* The lengths of the records, ascending; returns how many. */
static size_t list_lengths(const json_t *records, size_t lengths[LENGTHS])
{
    size_t n = 0;
    for (size_t d = 0; d < json_array_size(records); d++) {
        const size_t length = length_of(json_array_get(records, d));
        size_t at = 0;
        while (at < n && lengths[at] < length) at++;
        if ((at < n && lengths[at] == length) || n == LENGTHS) continue;
        memmove(lengths + at + 1, lengths + at, (n - at) * sizeof *lengths);
        lengths[at] = length;
        n++;
    }
    return n;
}

/* The method's answers in contexts of that length; of all with SIZE_MAX. */
static struct sums sums_of(const json_t *records, const char *method, size_t length)
{
    struct sums sums = {0};
    for (size_t d = 0; d < json_array_size(records); d++) {
        const json_t *record = json_array_get(records, d);
        if (length == SIZE_MAX || length_of(record) == length) add_record(&sums, record, method);
    }
    return sums;
}

/* ---- Table ------------------------------------------------------------------------------- */

static void print_sums(const char *method, const char *what, const struct sums *s)
{
    printf("%-18.18s %-24.24s %7.0f %8.1f%% %7.1f%% %8.2f %9.2f %9.2f %6.2fx %9.2f %6.0f/%.0f\n", method, what,
           ratio(s->context_tokens, s->documents), 100 * ratio(s->accepted, s->tested),
           100 * ratio(s->by_text, s->drafted), ratio(s->accepted + s->cycles, s->cycles),
           1e3 * ratio(s->seconds, s->timed), 1e3 * ratio(s->alone, s->timed), ratio(s->alone, s->seconds),
           1e-6 * ratio(s->bytes, s->by_model), s->same, s->answers);
}

void eval_print_speculation(const struct eval *eval, const json_t *records)
{
    size_t lengths[LENGTHS];
    const size_t n_lengths = list_lengths(records, lengths);
    printf("%sexact answers by drafts: ms a token with drafts and without, and MB of the context that a drafted token "
           "reads\n%-18s %-24s %7s %9s %8s %8s %9s %9s %7s %9s %8s\n",
           eval->distances || eval->scores ? "\n" : "", "drafts by", "contexts", "tokens", "kept", "by text", "a cycle",
           "ms", "without", "speed", "MB", "same");
    for (size_t i = 0; i < eval->n_drafts; i++) {
        char name[64], method[EVAL_NAME];
        eval_setting_name(method, sizeof method, &eval->drafts[i]);
        for (size_t d = 0; d < json_array_size(records); d++) {
            const json_t *record = json_array_get(records, d);
            struct sums sums = {0};
            char plain[PLAIN_TEXT_MAX];
            if (!add_record(&sums, record, method)) continue;
            print_sums(method, plain_text(plain, json_string_value(json_object_get(record, "task"))), &sums);
        }
        for (size_t l = 0; l < n_lengths && n_lengths > 1; l++) {
            const struct sums sums = sums_of(records, method, lengths[l]);
            if (lengths[l] == 0) snprintf(name, sizeof name, "below 1,024 tokens");
            else snprintf(name, sizeof name, "%zuK to %zuK tokens", lengths[l] / 1024, lengths[l] / 512);
            if (sums.answers > 0) print_sums(method, name, &sums);
        }
        const struct sums all = sums_of(records, method, SIZE_MAX);
        print_sums(method, "all", &all);
    }
}

/* ---- JSON -------------------------------------------------------------------------------- */

static json_t *sums_json(const struct sums *s)
{
    json_t *root = json_object();
    json_object_set_new(root, "answers", json_number(s->answers));
    json_object_set_new(root, "tokens", json_number(s->tokens));
    json_object_set_new(root, "context_tokens", json_number(ratio(s->context_tokens, s->documents)));
    json_object_set_new(root, "acceptance", json_number(ratio(s->accepted, s->tested)));
    json_object_set_new(root, "n_tested", json_number(s->tested));
    json_object_set_new(root, "accepted_of_drafted", json_number(ratio(s->accepted, s->drafted)));
    json_object_set_new(root, "drafted_by_text", json_number(ratio(s->by_text, s->drafted)));
    json_object_set_new(root, "tokens_a_cycle", json_number(ratio(s->accepted + s->cycles, s->cycles)));
    json_object_set_new(root, "seconds_a_token", json_number(ratio(s->seconds, s->timed)));
    json_object_set_new(root, "seconds_a_token_alone", json_number(ratio(s->alone, s->timed)));
    json_object_set_new(root, "vs_exact", json_number(ratio(s->alone, s->seconds)));
    json_object_set_new(root, "draft_bytes", json_number(ratio(s->bytes, s->by_model)));
    json_object_set_new(root, "same_answers", json_number(s->same));
    return root;
}

static json_t *method_json(const json_t *records, const char *method)
{
    size_t lengths[LENGTHS];
    const size_t n_lengths = list_lengths(records, lengths);
    const struct sums all = sums_of(records, method, SIZE_MAX);
    json_t *root = sums_json(&all), *of_lengths = json_array(), *documents = json_array();
    json_object_set_new(root, "method", json_string(method));
    for (size_t l = 0; l < n_lengths; l++) {
        const struct sums sums = sums_of(records, method, lengths[l]);
        json_t *length = sums_json(&sums);
        json_object_set_new(length, "tokens_from", json_count(lengths[l]));
        if (sums.answers > 0) json_array_append(of_lengths, length);
        json_decref(length);
    }
    for (size_t d = 0; d < json_array_size(records); d++) {
        const json_t *record = json_array_get(records, d);
        struct sums sums = {0};
        if (!add_record(&sums, record, method)) continue;
        json_t *document = sums_json(&sums);
        json_object_set(document, "task", json_object_get(record, "task"));
        json_array_append_new(documents, document);
    }
    json_object_set_new(root, "lengths", of_lengths);
    json_object_set_new(root, "documents", documents);
    return root;
}

json_t *eval_speculation_json(const struct eval *eval, const json_t *records)
{
    json_t *root = json_array();
    for (size_t i = 0; i < eval->n_drafts; i++) {
        char method[EVAL_NAME];
        eval_setting_name(method, sizeof method, &eval->drafts[i]);
        json_array_append_new(root, method_json(records, method));
    }
    return root;
}
