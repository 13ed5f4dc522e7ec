/* A client's JSON; input.h describes it. */
#include "input.h"

#include <float.h>
#include <limits.h>
#include <math.h>
#include <string.h>

/* The parser goes down by calls and builds every value before anyone looks: depth and number are bounded by a look at
 * the text. */
static bool within_limits(const char *text, size_t n, struct fault *fault)
{
    size_t depth = 0, values = 0;
    bool quoted = false;
    for (size_t i = 0; i < n; i++) {
        if (quoted) {
            if (text[i] == '\\') i++;
            else quoted = text[i] != '"';
            continue;
        }
        quoted = text[i] == '"';
        depth += text[i] == '[' || text[i] == '{';
        depth -= (text[i] == ']' || text[i] == '}') && depth;
        values += text[i] == ',' || text[i] == ':' || text[i] == '[' || text[i] == '{';
        if (depth > INPUT_MOST_DEPTH)
            return fault_set(fault, 400, "json_too_deep", NULL, "the JSON is nested more than %d deep",
                             (int)INPUT_MOST_DEPTH);
        if (values > INPUT_MOST_VALUES)
            return fault_set(fault, 413, "json_too_large", NULL, "the JSON has more than %d values",
                             (int)INPUT_MOST_VALUES);
    }
    return true;
}

static void set_parse_fault(struct fault *fault, const json_error_t *error)
{
    const char *where = strstr(error->text, "near ");
    if (json_error_code(error) == json_error_numeric_overflow)
        fault_set(
            fault, 400, "out_of_range", NULL,
            "a number is too large, %.100s (line %d, column %d): allowed are whole numbers from %lld to %lld, and "
            "others up to %g",
            where ? where : "", error->line, error->column, LLONG_MIN, LLONG_MAX, DBL_MAX);
    else
        fault_set(fault, 400, "invalid_json", NULL, "the body is no JSON: %.200s (line %d, column %d)", error->text,
                  error->line, error->column);
}

json_t *input_parse(const char *text, size_t n, struct fault *fault)
{
    json_error_t error;
    if (n == 0) {
        fault_set(fault, 400, "invalid_json", NULL, "the body is empty: a JSON object is wanted");
        return NULL;
    }
    if (!within_limits(text, n, fault)) return NULL;
    json_t *root = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &error);
    if (!root) {
        set_parse_fault(fault, &error);
        return NULL;
    }
    if (json_is_object(root)) return root;
    fault_set(fault, 400, "invalid_json", NULL, "the body is %s: a JSON object is wanted", input_kind(root));
    json_decref(root);
    return NULL;
}

const char *input_kind(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING: return "a string";
    case JSON_INTEGER:
    case JSON_REAL: return "a number";
    case JSON_NULL: return "null";
    default: return "a truth value";
    }
}

/* The value of a key; NULL when it is missing or null. */
static const json_t *given(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return value && !json_is_null(value) ? value : NULL;
}

bool input_real(const json_t *object, const char *key, double low, double high, double *out, struct fault *fault)
{
    const json_t *value = given(object, key);
    if (!value) return true;
    if (!json_is_number(value))
        return fault_set(fault, 400, "invalid_type", key, "%s is %s: a number from %g to %g is wanted", key,
                         input_kind(value), low, high);
    const double number = json_number_value(value);
    if (!(number >= low && number <= high))
        return fault_set(fault, 400, "out_of_range", key, "%s is %g: allowed are %g to %g", key, number, low, high);
    *out = number;
    return true;
}

bool input_count(const json_t *object, const char *key, int64_t low, int64_t high, int64_t *out, struct fault *fault)
{
    const json_t *value = given(object, key);
    if (!value) return true;
    const double number = json_number_value(value);
    if (!json_is_number(value) || number != floor(number) || !(fabs(number) < 9.3e18))
        return fault_set(fault, 400, "invalid_type", key, "%s is %s: a whole number from %lld to %lld is wanted", key,
                         json_is_number(value) ? "no whole number" : input_kind(value), (long long)low,
                         (long long)high);
    if (!(number >= (double)low && number <= (double)high))
        return fault_set(fault, 400, "out_of_range", key, "%s is %.17g: allowed are %lld to %lld", key, number,
                         (long long)low, (long long)high);
    *out = json_is_integer(value) ? json_integer_value(value) : (int64_t)number;
    return true;
}

bool input_flag(const json_t *object, const char *key, bool *out, struct fault *fault)
{
    const json_t *value = given(object, key);
    if (!value) return true;
    if (!json_is_boolean(value))
        return fault_set(fault, 400, "invalid_type", key, "%s is %s: true or false is wanted", key, input_kind(value));
    *out = json_is_true(value);
    return true;
}

static bool of_kind(const json_t *object, const char *key, json_type type, const char *wanted, const json_t **out,
                    struct fault *fault)
{
    const json_t *value = given(object, key);
    if (!value) return true;
    if (json_typeof(value) != type)
        return fault_set(fault, 400, "invalid_type", key, "%s is %s: %s is wanted", key, input_kind(value), wanted);
    *out = value;
    return true;
}

bool input_text(const json_t *object, const char *key, const char **out, struct fault *fault)
{
    const json_t *value = NULL;
    if (!of_kind(object, key, JSON_STRING, "a string", &value, fault)) return false;
    if (value) *out = json_string_value(value);
    return true;
}

bool input_object(const json_t *object, const char *key, const json_t **out, struct fault *fault)
{
    return of_kind(object, key, JSON_OBJECT, "an object", out, fault);
}

bool input_array(const json_t *object, const char *key, const json_t **out, struct fault *fault)
{
    return of_kind(object, key, JSON_ARRAY, "an array", out, fault);
}
