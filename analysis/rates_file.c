/* Rates as JSON; rates_file.h. */
#include "rates_file.h"

#include <math.h>

#include "common.h"
#include "json_output.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

enum { N_RATES = 9 };
static const char *const names[N_RATES] = {"dense_seconds_a_layer",
                                           "dense_seconds_a_byte",
                                           "lookup_seconds_a_layer",
                                           "lookup_seconds_a_byte",
                                           "codes_seconds_a_key",
                                           "rows_seconds_a_byte",
                                           "misfit",
                                           "dense_seconds_a_layer_beyond",
                                           "lookup_seconds_a_layer_beyond"};

/* The numbers of the names, in their order; one way for reading and writing. */
static void list_fields(struct attention_rates *r, double *fields[N_RATES])
{
    double *const all[N_RATES] = {&r->dense_layer, &r->dense_byte, &r->layer,        &r->lookup_byte, &r->coded_key,
                                  &r->row_byte,    &r->misfit,     &r->dense_beyond, &r->layer_beyond};
    for (int i = 0; i < N_RATES; i++) fields[i] = all[i];
}

json_t *rates_json(const struct attention_rates *rates)
{
    struct attention_rates copy = *rates;
    double *fields[N_RATES];
    json_t *json = json_object();
    list_fields(&copy, fields);
    for (int i = 0; i < N_RATES; i++) json_object_set_new(json, names[i], json_number(*fields[i]));
    return json;
}

json_t *batches_json(const struct speculation_rates *rates)
{
    json_t *list = json_array();
    for (int i = 0; i < BATCH_RATES; i++) {
        json_t *batch = json_object();
        json_object_set_new(batch, "tokens", json_count(batch_tokens[i]));
        json_object_set_new(batch, "rest_seconds", json_number(rates->batches[i].rest));
        json_object_set_new(batch, "dense_seconds_a_byte", json_number(rates->batches[i].dense_byte));
        json_array_append_new(list, batch);
    }
    return list;
}

/* ---- Reading ---------------------------------------------------------------------------- */

static double rate_in(const char *path, const json_t *object, const char *name, double otherwise)
{
    const json_t *value = json_object_get(object, name);
    if (!value && otherwise >= 0) return otherwise;
    const double seconds = json_number_value(value);
    if (!json_is_number(value) || !(seconds >= 0 && seconds < 1e6))
        die("%s: \"%s\" must be a number of seconds from 0 to 1e6", path, name);
    return seconds;
}

static void read_batches(const char *path, const json_t *list, struct speculation_rates *rates)
{
    if (!json_is_array(list) || json_array_size(list) != BATCH_RATES)
        die("%s: \"batches\" must be a list of %d sizes of runs", path, BATCH_RATES);
    for (int i = 0; i < BATCH_RATES; i++) {
        const json_t *batch = json_array_get(list, (size_t)i);
        if (json_number_value(json_object_get(batch, "tokens")) != (double)batch_tokens[i])
            die("%s: \"batches\", entry %d: \"tokens\" must be %zu", path, i + 1, batch_tokens[i]);
        rates->batches[i].rest = rate_in(path, batch, "rest_seconds", -1);
        rates->batches[i].dense_byte = rate_in(path, batch, "dense_seconds_a_byte", -1);
    }
}

void rates_read(const char *path, struct speculation_rates *rates)
{
    json_error_t error;
    double *fields[N_RATES];
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    if (!root) die("%s:%d: %s", path, error.line, error.text);
    const json_t *from = json_object_get(root, "rates"), *batches = json_object_get(root, "batches");
    if (!json_is_object(from))
        die("%s: has no \"rates\"; squeeze analyze what-if --rates here --json writes them, -c CONTEXT --json as well",
            path);
    *rates = (struct speculation_rates){0};
    list_fields(&rates->attention, fields);
    for (int i = 0; i < N_RATES - 2; i++) *fields[i] = rate_in(path, from, names[i], -1);
    rates->attention.dense_beyond = rate_in(path, from, names[N_RATES - 2], rates->attention.dense_layer);
    rates->attention.layer_beyond = rate_in(path, from, names[N_RATES - 1], rates->attention.layer);
    speculation_rates_fill(rates, rate_in(path, root, "short_context_seconds", -1));
    if (batches) read_batches(path, batches, rates);
    if (!(rates->batches[0].rest > 0)) die("%s: \"short_context_seconds\" must be above 0", path);
    json_decref(root);
}
