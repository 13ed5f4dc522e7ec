/* JSON schemas as grammars; grammar.h describes them. */
#include "grammar.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "grammar_number.h"
#include "grammar_pattern.h"

enum { MOST_DEPTH = 32, MOST_RULES = 5000, MOST_REPEATS = 1000 };

struct writing {
    struct bytes *out;
    const json_t *root; /* that $ref refers to */
    struct fault *fault;
    unsigned n_rules, depth;
    const json_t *refs[64]; /* schemas that rules stand for */
    unsigned ref_rule[64], n_refs;
};

static const char common[] =
    "ws ::= [ ]? | \"\\n\" [ ]{0,16}\n"
    "char ::= [^\"\\\\\\x00-\\x1F\\x7F] | \"\\\\\" ([\"\\\\/bfnrt] | \"u\" code)\n"
    "hex ::= [0-9a-fA-F]\n"
    "some ::= [1-9a-fA-F]\n"
    /* no NUL, and surrogates in pairs */
    "code ::= [1-9a-cA-CeEfF] hex hex hex | \"0\" some hex hex | \"00\" some hex | \"000\" some"
    " | [dD] [0-7] hex hex | [dD] [89abAB] hex hex \"\\\\u\" [dD] [c-fC-F] hex hex\n"
    "string ::= \"\\\"\" char* \"\\\"\"\n"
    "integer ::= \"-\"? (\"0\" | [1-9] [0-9]{0,15})\n"
    "number ::= integer (\".\" [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?\n"
    "boolean ::= \"true\" | \"false\"\n"
    "null ::= \"null\"\n"
    "value ::= object | array | string | number | boolean | null\n"
    "member ::= string ws \":\" ws value\n"
    "object ::= \"{\" ws (member ws (\",\" ws member ws)*)? \"}\"\n"
    "array ::= \"[\" ws (value ws (\",\" ws value ws)*)? \"]\"\n";

void grammar_of_json(struct bytes *grammar)
{
    bytes_put(grammar, "root ::= object\n");
    bytes_put(grammar, common);
}

/* A text as a literal of the grammar. */
static void put_literal(struct bytes *out, const char *text)
{
    bytes_put(out, "\"");
    for (const char *c = text; *c; c++)
        if (*c == '"' || *c == '\\') bytes_print(out, "\\%c", *c);
        else if (*c == '\n') bytes_put(out, "\\n");
        else if (*c == '\r') bytes_put(out, "\\r");
        else if (*c == '\t') bytes_put(out, "\\t");
        else bytes_append(out, c, 1);
    bytes_put(out, "\"");
}

/* A JSON value, said in just one way. */
static void put_json(struct bytes *out, const json_t *value)
{
    char *text = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY | JSON_SORT_KEYS);
    put_literal(out, text ? text : "null");
    free(text);
}

static bool cannot(struct writing *w, const char *what)
{
    return fault_set(w->fault, 400, "unsupported_schema", "schema", "the schema cannot be kept: %.200s", what);
}

static bool write_schema(struct writing *w, const json_t *schema, unsigned *rule);

/* A name for a rule whose right side is in `body`. */
static unsigned put_rule(struct writing *w, struct bytes *body)
{
    const unsigned rule = ++w->n_rules;
    bytes_print(w->out, "s%u ::= %s\n", rule, body->data ? body->data : "\"\"");
    bytes_free(body);
    return rule;
}

/* ---- Parts of a schema ---------------------------------------------------------------- */

static bool write_alternatives(struct writing *w, const json_t *list, unsigned *rule)
{
    struct bytes body = {0};
    size_t i;
    json_t *one;
    if (!json_is_array(list) || json_array_size(list) == 0) return cannot(w, "anyOf without alternatives");
    json_array_foreach(list, i, one)
    {
        unsigned part;
        if (!write_schema(w, one, &part)) {
            bytes_free(&body);
            return false;
        }
        bytes_print(&body, "%ss%u", i ? " | " : "", part);
    }
    *rule = put_rule(w, &body);
    return true;
}

static bool write_enum(struct writing *w, const json_t *list, unsigned *rule)
{
    struct bytes body = {0};
    size_t i;
    json_t *one;
    if (!json_is_array(list) || json_array_size(list) == 0) return cannot(w, "enum without values");
    json_array_foreach(list, i, one)
    {
        if (i) bytes_put(&body, " | ");
        put_json(&body, one);
    }
    *rule = put_rule(w, &body);
    return true;
}

static bool is_required(const json_t *schema, const char *name)
{
    size_t i;
    json_t *one;
    json_array_foreach(json_object_get(schema, "required"), i,
                       one) if (json_is_string(one) && strcmp(json_string_value(one), name) == 0) return true;
    return false;
}

/* What follows property number `at`, back to front: for each two rules, of members that come first and of others. */
static bool write_properties(struct writing *w, const json_t *schema, const json_t *properties, unsigned *rule)
{
    const size_t n = json_object_size(properties);
    const char *names[256];
    const json_t *values[256];
    unsigned first = 0, later = 0;
    size_t at = 0;
    const char *name;
    json_t *value;
    if (n > 256) return cannot(w, "more than 256 properties");
    json_object_foreach((json_t *)(uintptr_t)properties, name, value)
    {
        names[at] = name;
        values[at++] = value;
    }
    for (size_t i = n; i-- > 0;) {
        unsigned part, next_first = first, next_later = later;
        struct bytes body = {0}, key = {0};
        json_t *key_text = json_string(names[i]);
        if (!write_schema(w, values[i], &part)) {
            json_decref(key_text);
            return false;
        }
        put_json(&key, key_text);
        json_decref(key_text);
        const bool optional = !is_required(schema, names[i]), last = i + 1 == n;
        for (int is_later = 0; is_later < 2; is_later++) {
            bytes_print(&body, "%s%s ws \":\" ws s%u ws", is_later ? "\",\" ws " : "", key.data, part);
            if (!last) bytes_print(&body, " s%u", next_later);
            if (optional && last) bytes_put(&body, " | \"\"");
            else if (optional) bytes_print(&body, " | s%u", is_later ? next_later : next_first);
            *(is_later ? &later : &first) = put_rule(w, &body);
        }
        bytes_free(&key);
    }
    struct bytes body = {0};
    bytes_put(&body, "\"{\" ws ");
    if (n) bytes_print(&body, "s%u ", first);
    bytes_put(&body, "\"}\"");
    *rule = put_rule(w, &body);
    return true;
}

static bool write_map(struct writing *w, const json_t *of, unsigned *rule)
{
    unsigned part;
    struct bytes body = {0};
    if (!write_schema(w, of, &part)) return false;
    bytes_print(&body, "\"{\" ws (string ws \":\" ws s%u ws (\",\" ws string ws \":\" ws s%u ws)*)? \"}\"", part, part);
    *rule = put_rule(w, &body);
    return true;
}

static bool write_object(struct writing *w, const json_t *schema, unsigned *rule)
{
    const json_t *properties = json_object_get(schema, "properties"),
                 *more = json_object_get(schema, "additionalProperties");
    if (properties && !json_is_object(properties)) return cannot(w, "properties that are no object");
    if (json_object_size(properties)) return write_properties(w, schema, properties, rule);
    if (json_is_object(more)) return write_map(w, more, rule);
    struct bytes body = {0};
    bytes_put(&body, json_is_false(more) ? "\"{\" ws \"}\"" : "object");
    *rule = put_rule(w, &body);
    return true;
}

static bool take_bound(struct writing *w, const json_t *schema, const char *key, long long otherwise, long long *value)
{
    const json_t *given = json_object_get(schema, key);
    *value = otherwise;
    if (!given) return true;
    if (!json_is_integer(given) || json_integer_value(given) < 0 || json_integer_value(given) > MOST_REPEATS)
        return fault_set(w->fault, 400, "unsupported_schema", "schema",
                         "the schema cannot be kept: %s must be a whole number from 0 to %d", key, (int)MOST_REPEATS);
    *value = json_integer_value(given);
    return true;
}

static bool write_tuple(struct writing *w, const json_t *list, unsigned *rule)
{
    struct bytes body = {0};
    size_t i;
    json_t *one;
    bytes_put(&body, "\"[\" ws ");
    json_array_foreach(list, i, one)
    {
        unsigned part;
        if (!write_schema(w, one, &part)) {
            bytes_free(&body);
            return false;
        }
        bytes_print(&body, "%ss%u ws ", i ? "\",\" ws " : "", part);
    }
    bytes_put(&body, "\"]\"");
    *rule = put_rule(w, &body);
    return true;
}

static bool write_array(struct writing *w, const json_t *schema, unsigned *rule)
{
    const json_t *items = json_object_get(schema, "items"), *tuple = json_object_get(schema, "prefixItems");
    long long least, most;
    unsigned part = 0;
    char name[24] = "value";
    struct bytes body = {0};
    if (json_is_array(tuple)) return write_tuple(w, tuple, rule);
    if (!take_bound(w, schema, "minItems", 0, &least) || !take_bound(w, schema, "maxItems", -1, &most)) return false;
    if (most >= 0 && most < least) return cannot(w, "maxItems below minItems");
    if (json_is_object(items)) {
        if (!write_schema(w, items, &part)) return false;
        snprintf(name, sizeof name, "s%u", part);
    }
    if (most == 0) bytes_put(&body, "\"[\" ws \"]\"");
    else {
        bytes_print(&body, "\"[\" ws (%s ws (\",\" ws %s ws){%lld,", name, name, least ? least - 1 : 0);
        if (most > 0) bytes_print(&body, "%lld", most - 1);
        bytes_print(&body, "})%s \"]\"", least ? "" : "?");
    }
    *rule = put_rule(w, &body);
    return true;
}

/* An expression that was made, or could not be, as a rule. */
static bool put_made(struct writing *w, struct bytes *body, bool good, const char *problem, unsigned *rule)
{
    if (!good) {
        bytes_free(body);
        return cannot(w, problem);
    }
    *rule = put_rule(w, body);
    return true;
}

static bool write_pattern(struct writing *w, const json_t *schema, long long least, long long most, unsigned *rule)
{
    const char *pattern = json_string_value(json_object_get(schema, "pattern"));
    const char *problem = "a pattern that is no string";
    struct bytes body = {0};
    bytes_put(&body, "\"\\\"\" (");
    const bool good = pattern && grammar_pattern(&body, pattern, (long)least, (long)most, &problem);
    bytes_put(&body, ") \"\\\"\"");
    return put_made(w, &body, good, problem, rule);
}

static bool write_number(struct writing *w, const json_t *schema, bool whole, unsigned *rule)
{
    const char *problem = NULL;
    struct bytes body = {0};
    const bool good = grammar_number(&body, schema, whole, &problem);
    return put_made(w, &body, good, problem, rule);
}

static bool write_string(struct writing *w, const json_t *schema, unsigned *rule)
{
    long long least, most;
    struct bytes body = {0};
    if (!take_bound(w, schema, "minLength", 0, &least) || !take_bound(w, schema, "maxLength", -1, &most)) return false;
    if (most >= 0 && most < least) return cannot(w, "maxLength below minLength");
    if (json_object_get(schema, "pattern")) return write_pattern(w, schema, least, most, rule);
    if (least == 0 && most < 0) bytes_put(&body, "string");
    else {
        bytes_print(&body, "\"\\\"\" char{%lld,", least);
        if (most >= 0) bytes_print(&body, "%lld", most);
        bytes_put(&body, "} \"\\\"\"");
    }
    *rule = put_rule(w, &body);
    return true;
}

static bool write_type(struct writing *w, const json_t *schema, const char *type, unsigned *rule)
{
    static const char *const plain[] = {"integer", "number", "boolean", "null"};
    struct bytes body = {0};
    if (strcmp(type, "object") == 0) return write_object(w, schema, rule);
    if (strcmp(type, "array") == 0) return write_array(w, schema, rule);
    if (strcmp(type, "string") == 0) return write_string(w, schema, rule);
    if ((strcmp(type, "integer") == 0 || strcmp(type, "number") == 0) && grammar_has_bounds(schema))
        return write_number(w, schema, type[0] == 'i', rule);
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
        if (strcmp(type, plain[i]) == 0) {
            bytes_put(&body, plain[i]);
            *rule = put_rule(w, &body);
            return true;
        }
    return cannot(w, "a type that JSON does not have");
}

static bool write_types(struct writing *w, const json_t *schema, const json_t *types, unsigned *rule)
{
    struct bytes body = {0};
    size_t i;
    json_t *one;
    json_array_foreach(types, i, one)
    {
        unsigned part;
        if (!json_is_string(one) || !write_type(w, schema, json_string_value(one), &part)) {
            bytes_free(&body);
            return cannot(w, "a type that is no name");
        }
        bytes_print(&body, "%ss%u", i ? " | " : "", part);
    }
    if (!body.data) return cannot(w, "no type at all");
    *rule = put_rule(w, &body);
    return true;
}

/* ---- References ------------------------------------------------------------------------- */

/* What "#/$defs/name" stands for. */
static const json_t *find_reference(const struct writing *w, const char *path)
{
    const json_t *at = w->root;
    char name[128];
    if (*path++ != '#') return NULL;
    while (at && *path == '/') {
        const size_t n = strcspn(++path, "/");
        if (n >= sizeof name) return NULL;
        memcpy(name, path, n);
        name[n] = '\0';
        at = json_object_get(at, name);
        path += n;
    }
    return *path ? NULL : at;
}

/* A schema that refers to itself is a rule that does. */
static bool write_reference(struct writing *w, const json_t *reference, unsigned *rule)
{
    const json_t *schema = json_is_string(reference) ? find_reference(w, json_string_value(reference)) : NULL;
    struct bytes body = {0};
    unsigned part;
    if (!schema) return cannot(w, "a $ref that leads nowhere within it");
    for (unsigned i = 0; i < w->n_refs; i++)
        if (w->refs[i] == schema) {
            *rule = w->ref_rule[i];
            return true;
        }
    if (w->n_refs == sizeof w->refs / sizeof *w->refs) return cannot(w, "more than 64 definitions");
    *rule = ++w->n_rules;
    w->refs[w->n_refs] = schema;
    w->ref_rule[w->n_refs++] = *rule;
    const unsigned mine = *rule;
    if (!write_schema(w, schema, &part)) return false;
    if (part == mine) return cannot(w, "a $ref to itself alone");
    bytes_print(&body, "s%u ::= s%u\n", mine, part);
    bytes_append(w->out, body.data, body.n);
    bytes_free(&body);
    *rule = mine;
    return true;
}

static bool write_known(struct writing *w, const json_t *schema, unsigned *rule)
{
    const json_t *value;
    struct bytes body = {0};
    if ((value = json_object_get(schema, "$ref"))) return write_reference(w, value, rule);
    if ((value = json_object_get(schema, "const"))) {
        put_json(&body, value);
        *rule = put_rule(w, &body);
        return true;
    }
    if ((value = json_object_get(schema, "enum"))) return write_enum(w, value, rule);
    if ((value = json_object_get(schema, "anyOf"))) return write_alternatives(w, value, rule);
    if ((value = json_object_get(schema, "oneOf"))) return write_alternatives(w, value, rule);
    if ((value = json_object_get(schema, "allOf"))) {
        if (json_array_size(value) != 1) return cannot(w, "allOf of several");
        return write_schema(w, json_array_get(value, 0), rule);
    }
    value = json_object_get(schema, "type");
    if (json_is_string(value)) return write_type(w, schema, json_string_value(value), rule);
    if (json_is_array(value)) return write_types(w, schema, value, rule);
    if (json_object_get(schema, "properties")) return write_object(w, schema, rule);
    if (json_object_get(schema, "items")) return write_array(w, schema, rule);
    if (json_object_get(schema, "pattern")) return write_string(w, schema, rule);
    if (grammar_has_bounds(schema)) return write_number(w, schema, false, rule);
    bytes_put(&body, "value");
    *rule = put_rule(w, &body);
    return true;
}

static bool write_schema(struct writing *w, const json_t *schema, unsigned *rule)
{
    static const char *const not_kept[] = {"not", "if", "patternProperties", "dependentSchemas", "contains"};
    if (json_is_true(schema)) schema = json_object_get(w->root, ""); /* anything: as of no keys */
    else if (!json_is_object(schema)) return cannot(w, "a part that is no object");
    if (w->n_rules > MOST_RULES || w->depth >= MOST_DEPTH) return cannot(w, "it is too large or too deep");
    for (size_t i = 0; i < sizeof not_kept / sizeof *not_kept; i++)
        if (json_object_get(schema, not_kept[i])) return cannot(w, not_kept[i]);
    w->depth++;
    const bool good = write_known(w, schema, rule);
    w->depth--;
    return good;
}

bool grammar_of_choices(struct bytes *grammar, const char *const *before, const json_t *const *schemas, size_t n,
                        const char *behind, struct fault *fault)
{
    struct bytes root = {0};
    struct writing w = {.out = grammar, .fault = fault};
    bytes_put(&root, "root ::= (");
    for (size_t i = 0; i < n; i++) {
        unsigned rule;
        w.root = schemas[i];
        w.n_refs = 0;
        if (!write_schema(&w, schemas[i], &rule)) {
            bytes_free(&root);
            return false;
        }
        if (i) bytes_put(&root, " | ");
        put_literal(&root, before[i]);
        bytes_print(&root, " s%u", rule);
    }
    bytes_put(&root, ") ");
    put_literal(&root, behind);
    bytes_put(&root, "\n");
    bytes_append(grammar, root.data, root.n);
    bytes_put(grammar, common);
    bytes_free(&root);
    return true;
}

bool grammar_of_schema(struct bytes *grammar, const json_t *schema, struct fault *fault)
{
    static const char *const nothing[] = {""};
    return grammar_of_choices(grammar, nothing, &schema, 1, "", fault);
}
