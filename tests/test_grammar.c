/* Grammars of JSON schemas: what they say and what they do not, by a reader of such grammars that tells whether a text
 * is one of theirs, and by texts that are drawn from them. */
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <ctype.h>
#include <math.h>
#include <regex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "grammar.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* ---- A reader of grammars ------------------------------------------------------------------ */

enum kind { LITERAL, CLASS, RULE, REPEAT, SEQUENCE, CHOICE };

struct node {
    enum kind kind;
    uint32_t character; /* LITERAL: one character */
    struct {
        uint32_t from, to;
    } range[160];
    size_t n_ranges;
    bool inverted;
    char name[24];      /* RULE */
    size_t least, most; /* REPEAT; most: SIZE_MAX for any number */
    struct node **part; /* REPEAT: one; SEQUENCE, CHOICE */
    size_t n_parts;
    struct node *next; /* of all, to be freed */
};

struct rules {
    struct {
        char name[24];
        struct node *node;
    } rule[6000];
    size_t n;
    struct node *all;
};

static struct node *new_node(struct rules *rules, enum kind kind)
{
    struct node *node = calloc(1, sizeof *node);
    assert_non_null(node);
    node->kind = kind;
    node->next = rules->all;
    rules->all = node;
    return node;
}

static void add_part(struct node *node, struct node *part)
{
    node->part = realloc(node->part, (node->n_parts + 1) * sizeof *node->part);
    assert_non_null(node->part);
    node->part[node->n_parts++] = part;
}

static void skip_blanks(const char **at)
{
    while (**at == ' ') ++*at;
}

static uint32_t read_utf8(const char **at)
{
    const unsigned char *c = (const unsigned char *)*at;
    const size_t n = utf8_character(*at, strlen(*at));
    assert_true(n > 0);
    uint32_t value = n > 1 ? c[0] & (0x7fu >> n) : c[0];
    for (size_t i = 1; i < n; i++) value = value << 6 | (c[i] & 0x3f);
    *at += n;
    return value;
}

/* A character of a literal or a class, escaped or not. */
static uint32_t read_character(const char **at)
{
    static const char names[] = "nrt\\\"[]", values[] = "\n\r\t\\\"[]";
    if (**at != '\\') return read_utf8(at);
    const char kind = (*at)[1];
    const char *found = strchr(names, kind);
    *at += 2;
    if (found) return (unsigned char)values[found - names];
    const int n = kind == 'x' ? 2 : kind == 'u' ? 4 : kind == 'U' ? 8 : 0;
    assert_true(n > 0);
    char digits[9] = {0};
    memcpy(digits, *at, (size_t)n);
    *at += n;
    return (uint32_t)strtoul(digits, NULL, 16);
}

static struct node *read_choice(struct rules *rules, const char **at);

static struct node *read_class(struct rules *rules, const char **at)
{
    struct node *node = new_node(rules, CLASS);
    node->inverted = **at == '^';
    *at += node->inverted;
    while (**at != ']') {
        assert_true(node->n_ranges < 160);
        const uint32_t from = read_character(at);
        uint32_t to = from;
        if (**at == '-' && (*at)[1] != ']') {
            ++*at;
            to = read_character(at);
        }
        node->range[node->n_ranges].from = from;
        node->range[node->n_ranges++].to = to;
    }
    ++*at;
    return node;
}

static struct node *read_literal(struct rules *rules, const char **at)
{
    struct node *node = new_node(rules, SEQUENCE);
    while (**at != '"') {
        struct node *one = new_node(rules, LITERAL);
        one->character = read_character(at);
        add_part(node, one);
    }
    ++*at;
    return node;
}

static struct node *read_item(struct rules *rules, const char **at)
{
    if (**at == '"' || **at == '[' || **at == '(') {
        const char kind = *(*at)++;
        if (kind == '"') return read_literal(rules, at);
        if (kind == '[') return read_class(rules, at);
        struct node *node = read_choice(rules, at);
        assert_int_equal(**at, ')');
        ++*at;
        return node;
    }
    struct node *node = new_node(rules, RULE);
    const size_t n = strspn(*at, "abcdefghijklmnopqrstuvwxyz0123456789-");
    assert_true(n > 0 && n < sizeof node->name);
    memcpy(node->name, *at, n);
    *at += n;
    return node;
}

static struct node *read_times(struct rules *rules, const char **at, struct node *item)
{
    struct node *node = new_node(rules, REPEAT);
    char *end;
    node->least = **at == '+';
    node->most = **at == '?' ? 1 : SIZE_MAX;
    if (**at == '{') {
        node->least = node->most = strtoul(*at + 1, &end, 10);
        if (*end == ',') node->most = isdigit((unsigned char)end[1]) ? strtoul(end + 1, &end, 10) : (end++, SIZE_MAX);
        assert_int_equal(*end, '}');
        *at = end;
    }
    ++*at;
    add_part(node, item);
    return node;
}

static struct node *read_choice(struct rules *rules, const char **at)
{
    struct node *choice = new_node(rules, CHOICE), *sequence = new_node(rules, SEQUENCE);
    add_part(choice, sequence);
    for (;;) {
        skip_blanks(at);
        if (**at == ')' || **at == '\n') return choice;
        if (**at == '|') {
            ++*at;
            sequence = new_node(rules, SEQUENCE);
            add_part(choice, sequence);
            continue;
        }
        struct node *item = read_item(rules, at);
        if (**at && strchr("*+?{", **at)) item = read_times(rules, at, item);
        add_part(sequence, item);
    }
}

static struct rules *read_rules(const char *text)
{
    struct rules *rules = calloc(1, sizeof *rules);
    assert_non_null(rules);
    while (*text) {
        const char *sign = strstr(text, " ::= ");
        assert_true(sign && rules->n < 6000 && sign - text < 24);
        memcpy(rules->rule[rules->n].name, text, (size_t)(sign - text));
        text = sign + 5;
        rules->rule[rules->n++].node = read_choice(rules, &text);
        assert_int_equal(*text, '\n');
        text++;
    }
    return rules;
}

static void free_rules(struct rules *rules)
{
    for (struct node *node = rules->all, *next; node; node = next) {
        next = node->next;
        free(node->part);
        free(node);
    }
    free(rules);
}

static const struct node *find_rule(const struct rules *rules, const char *name)
{
    for (size_t i = 0; i < rules->n; i++)
        if (strcmp(rules->rule[i].name, name) == 0) return rules->rule[i].node;
    fail_msg("a rule that is not there: %s", name);
    return NULL;
}

/* ---- Whether a text is said ------------------------------------------------------------------- */

static bool in_class(const struct node *node, uint32_t c)
{
    for (size_t i = 0; i < node->n_ranges; i++)
        if (c >= node->range[i].from && c <= node->range[i].to) return !node->inverted;
    return node->inverted;
}

/* A text as characters, fewer than 64. */
struct text {
    uint32_t c[64];
    size_t n;
};

/* Where a node may end: bit i of both masks stands before character i. */
static uint64_t ends(const struct rules *rules, const struct node *node, const struct text *text, uint64_t from)
{
    uint64_t to = 0, step = from;
    if (!from) return 0;
    switch (node->kind) {
    case LITERAL:
    case CLASS:
        for (size_t i = 0; i < text->n; i++)
            if (from >> i & 1 && (node->kind == CLASS ? in_class(node, text->c[i]) : node->character == text->c[i]))
                to |= (uint64_t)1 << (i + 1);
        return to;
    case RULE: return ends(rules, find_rule(rules, node->name), text, from);
    case SEQUENCE:
        for (size_t i = 0; i < node->n_parts; i++) step = ends(rules, node->part[i], text, step);
        return step;
    case CHOICE:
        for (size_t i = 0; i < node->n_parts; i++) to |= ends(rules, node->part[i], text, from);
        return to;
    case REPEAT:
        if (node->least == 0) to = from;
        for (size_t i = 1; step && i <= node->most && i <= node->least + 64; i++) {
            step = ends(rules, node->part[0], text, step);
            if (i >= node->least) to |= step;
        }
        return to;
    }
    return 0;
}

static bool says(const struct rules *rules, const char *said)
{
    struct text text = {0};
    while (*said) {
        assert_true(text.n < 63);
        text.c[text.n++] = read_utf8(&said);
    }
    return ends(rules, find_rule(rules, "root"), &text, 1) >> text.n & 1;
}

/* ---- Texts drawn -------------------------------------------------------------------------------- */

static uint32_t draw(uint32_t *seed, uint32_t n)
{
    *seed = *seed * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)(*seed >> 4) * n >> 28);
}

static void put_utf8(struct bytes *out, uint32_t c)
{
    char text[4];
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n; i-- > 1; c >>= 6) text[i] = (char)(0x80 | (c & 0x3f));
    text[0] = (char)(n == 1 ? c : (0xf0u << (4 - n) & 0xff) | c);
    bytes_append(out, text, n);
}

static void draw_text(const struct rules *rules, const struct node *node, struct bytes *out, uint32_t *seed)
{
    switch (node->kind) {
    case LITERAL: put_utf8(out, node->character); break;
    case CLASS: {
        const size_t i = draw(seed, (uint32_t)node->n_ranges);
        const uint32_t span = node->range[i].to - node->range[i].from;
        put_utf8(out, node->inverted ? 'x' : node->range[i].from + draw(seed, span < 60 ? span + 1 : 60));
        break;
    }
    case RULE: draw_text(rules, find_rule(rules, node->name), out, seed); break;
    case CHOICE: draw_text(rules, node->part[draw(seed, (uint32_t)node->n_parts)], out, seed); break;
    case SEQUENCE:
        for (size_t i = 0; i < node->n_parts; i++) draw_text(rules, node->part[i], out, seed);
        break;
    case REPEAT: {
        const size_t more = node->most - node->least < 3 ? node->most - node->least : 3;
        for (size_t i = node->least + draw(seed, (uint32_t)more + 1); i > 0; i--)
            draw_text(rules, node->part[0], out, seed);
    }
    }
}

/* ---- Making them ------------------------------------------------------------------------------------ */

/* NULL: the schema was refused, and the fault has the words. */
static struct rules *rules_of(const char *schema_text, const char *words)
{
    struct bytes grammar = {0};
    struct fault fault = {0};
    struct rules *rules = NULL;
    json_t *schema = json_loads(schema_text, 0, NULL);
    if (!schema) fail_msg("the test's own schema is no JSON: %s", schema_text);
    if (grammar_of_schema(&grammar, schema, &fault)) rules = read_rules(grammar.data);
    if (!rules && !words) fail_msg("%s: %s", schema_text, fault.message);
    if (!rules && !strstr(fault.message, words ? words : ""))
        fail_msg("%s: wanted '%s', got '%s'", schema_text, words, fault.message);
    if (!rules) assert_int_equal(fault.status, 400);
    json_decref(schema);
    bytes_free(&grammar);
    return rules;
}

static void check_says(const struct rules *rules, const char *schema, const char *text, bool wanted)
{
    if (says(rules, text) != wanted) fail_msg("%s: %s is %s", schema, text, wanted ? "not said" : "said");
}

/* A schema, and texts that it allows and does not. */
struct schema_case {
    const char *schema, *said[5], *not_said[4];
};

static void check_schemas(const struct schema_case *cases, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct rules *rules = rules_of(cases[i].schema, NULL);
        for (size_t k = 0; k < COUNT(cases[i].said) && cases[i].said[k]; k++)
            check_says(rules, cases[i].schema, cases[i].said[k], true);
        for (size_t k = 0; k < COUNT(cases[i].not_said) && cases[i].not_said[k]; k++)
            check_says(rules, cases[i].schema, cases[i].not_said[k], false);
        free_rules(rules);
    }
}

/* ---- Whole numbers -------------------------------------------------------------------------------------- */

static void test_whole_ranges(void **state)
{
    static const int edges[] = {-1234, -1000, -999, -101, -100, -99, -12, -10, -9,  -1,  0,    1,
                                5,     9,     10,   11,   42,   99,  100, 101, 345, 999, 1000, 1234};
    enum { N = COUNT(edges) };
    (void)state;
    for (size_t a = 0; a < N; a++)
        for (size_t b = a; b < N; b += 1 + (a + b) % 3) {
            char schema[96], text[16];
            snprintf(schema, sizeof schema, "{\"type\": \"integer\", \"minimum\": %d, \"maximum\": %d}", edges[a],
                     edges[b]);
            struct rules *rules = rules_of(schema, NULL);
            for (int i = -1300; i <= 1300; i += i > -110 && i < 110 ? 1 : 7) {
                snprintf(text, sizeof text, "%d", i);
                check_says(rules, schema, text, i >= edges[a] && i <= edges[b]);
            }
            for (int i = -1; i <= 1; i++) {
                snprintf(text, sizeof text, "%d", edges[b] + i);
                check_says(rules, schema, text, edges[b] + i >= edges[a] && edges[b] + i <= edges[b]);
            }
            check_says(rules, schema, "007", false);
            check_says(rules, schema, "-0", false);
            check_says(rules, schema, "1.5", false);
            free_rules(rules);
        }
}

static void test_open_ranges(void **state)
{
    static const struct schema_case cases[] = {
        {"{\"type\": \"integer\", \"minimum\": 18}", {"18", "99", "1000000"}, {"17", "0", "-18"}},
        {"{\"type\": \"integer\", \"maximum\": -5}", {"-5", "-17", "-999999"}, {"-4", "0", "5"}},
        {"{\"type\": \"integer\", \"exclusiveMinimum\": 0}", {"1", "10"}, {"0", "-1"}},
        {"{\"type\": \"integer\", \"exclusiveMaximum\": 3, \"exclusiveMinimum\": 0.5}", {"1", "2"}, {"0", "3"}},
        {"{\"type\": \"integer\", \"minimum\": 1.5, \"maximum\": 3.5}", {"2", "3"}, {"1", "4"}},
        {"{\"type\": \"integer\", \"minimum\": 0, \"exclusiveMinimum\": true}", {"1"}, {"0"}},
        {"{\"type\": \"integer\", \"minimum\": 5, \"exclusiveMinimum\": 3}", {"5"}, {"4"}},
        {"{\"type\": \"integer\", \"minimum\": -9223372036854775808, \"maximum\": 9223372036854775807}",
         {"0", "-12345678", "9999999999999999"},
         {"x"}},
        {"{\"type\": [\"integer\", \"null\"], \"minimum\": 3}", {"null", "3"}, {"2"}},
        {"{\"minimum\": 3}", {"3", "3.5"}, {"2", "\"x\""}},
        {"{\"type\": \"integer\", \"minimum\": 0, \"multipleOf\": 5}", {"0", "5", "10", "12345"}, {"3", "12344", "-5"}},
        {"{\"type\": \"integer\", \"multipleOf\": 100}", {"0", "100", "-300"}, {"10", "150"}},
        {"{\"type\": \"integer\", \"minimum\": -7, \"maximum\": 7, \"multipleOf\": 3}",
         {"-6", "-3", "0", "6"},
         {"-7", "1", "7"}},
        {"{\"type\": \"integer\", \"minimum\": 13, \"maximum\": 20000, \"multipleOf\": 4}",
         {"16", "996", "1000", "20000"},
         {"12", "14", "998", "20004"}},
        {"{\"type\": \"number\", \"multipleOf\": 0.01, \"minimum\": 0, \"maximum\": 1}",
         {"0", "0.5", "0.25", "1", "1.00"},
         {"0.255", "1.01"}},
        {"{\"type\": \"number\", \"multipleOf\": 0.25, \"minimum\": 0, \"maximum\": 1}",
         {"0.00", "0.25", "1.00"},
         {"0.30", "1.25"}},
        {"{\"type\": \"number\", \"multipleOf\": 2, \"maximum\": 4.5}", {"4", "-2"}, {"6", "3", "4.0"}},
    };
    (void)state;
    check_schemas(cases, COUNT(cases));
}

/* ---- Any number --------------------------------------------------------------------------------------------- */

static bool within(double x, double low, double high, bool strict)
{
    return strict ? x > low && x < high : x >= low && x <= high;
}

/* Numbers of up to three places, which doubles tell apart, against what the bounds say. */
static void test_real_ranges(void **state)
{
    static const double edges[] = {-12.5, -3, -2.999, -0.05, 0, 0.001, 0.05, 0.1, 0.5, 1, 1.25, 9.99, 10, 12.5, 100.1};
    enum { N = COUNT(edges) };
    uint32_t seed = 7;
    (void)state;
    for (size_t a = 0; a < N; a++)
        for (size_t b = a; b < N; b++)
            for (int strict = 0; strict < 2; strict++) {
                char schema[128], text[32];
                snprintf(schema, sizeof schema, "{\"type\": \"number\", \"%s\": %.17g, \"%s\": %.17g}",
                         strict ? "exclusiveMinimum" : "minimum", edges[a], strict ? "exclusiveMaximum" : "maximum",
                         edges[b]);
                struct rules *rules = rules_of(schema, strict && a == b ? "no number is within" : NULL);
                if (!rules) continue;
                for (int i = 0; i < 400; i++) {
                    const int places = (int)draw(&seed, 4);
                    const double middle = i % 2 ? edges[a] : edges[b],
                                 x = middle + ((double)draw(&seed, 4001) - 2000) / (i % 3 ? 1000 : 50);
                    snprintf(text, sizeof text, "%.*f", places, x);
                    const double value = strtod(text, NULL);
                    if (!(value != 0) && text[0] == '-') continue; /* never said, and nothing is missed */
                    check_says(rules, schema, text, within(value, edges[a], edges[b], strict));
                }
                for (int i = 0; i < 60; i++) {
                    struct bytes said = {0};
                    char *end;
                    draw_text(rules, find_rule(rules, "root"), &said, &seed);
                    const double value = strtod(said.data, &end);
                    if (*end || !within(value, edges[a], edges[b], false))
                        fail_msg("%s: %s was drawn", schema, said.data);
                    bytes_free(&said);
                }
                free_rules(rules);
            }
}

static void test_refused_numbers(void **state)
{
    static const char *const cases[][2] = {
        {"{\"type\": \"integer\", \"minimum\": 3, \"maximum\": 2}", "no number is within"},
        {"{\"type\": \"integer\", \"minimum\": 3, \"maximum\": 5, \"multipleOf\": 7}", "no number is within"},
        {"{\"type\": \"integer\", \"minimum\": 0.2, \"maximum\": 0.8}", "no number is within"},
        {"{\"type\": \"number\", \"minimum\": \"x\"}", "a bound of numbers"},
        {"{\"type\": \"integer\", \"multipleOf\": 0}", "multipleOf"},
        {"{\"type\": \"integer\", \"multipleOf\": 1.5}", "multipleOf"},
        {"{\"type\": \"integer\", \"multipleOf\": 7}", "multipleOf of more than 1000"},
        {"{\"type\": \"number\", \"multipleOf\": 0.3}", "multipleOf of more than 1000"},
        {"{\"type\": \"number\", \"minimum\": 1e-30}", "decimal places"},
        {"{\"type\": \"number\", \"minimum\": 1e300}", "no number is within"},
    };
    (void)state;
    for (size_t i = 0; i < COUNT(cases); i++) assert_null(rules_of(cases[i][0], cases[i][1]));
}

/* ---- Patterns ------------------------------------------------------------------------------------------------- */

static char *schema_of_pattern(const char *pattern)
{
    json_t *schema = json_pack("{s:s, s:s}", "type", "string", "pattern", pattern);
    char *text = json_dumps(schema, 0);
    json_decref(schema);
    return text;
}

static void check_pattern(const char *pattern, const char *value, bool wanted)
{
    char *schema = schema_of_pattern(pattern);
    json_t *string = json_string(value);
    char *said = json_dumps(string, JSON_ENCODE_ANY);
    struct rules *rules = rules_of(schema, NULL);
    check_says(rules, schema, said, wanted);
    free_rules(rules);
    json_decref(string);
    free(said);
    free(schema);
}

static void test_patterns(void **state)
{
    static const struct {
        const char *pattern, *said[5], *not_said[5];
    } cases[] = {
        {"^[A-Z]{2}-\\d{3}$", {"AB-123"}, {"ab-123", "AB-12", "AB-1234", "xAB-123"}},
        {"^a|b$", {"a", "axyz", "xyzb"}, {"xa", "bx", ""}},
        {"cat", {"cat", "a cat!", "concatenate"}, {"dog", "", "ca"}},
        {"^(?:red|green|blue)$", {"red", "blue"}, {"redblue", "re"}},
        {"^(?<year>\\d{4})-(0[1-9]|1[0-2])$", {"1999-12"}, {"1999-13", "99-12"}},
        {"^\\w+@\\w+\\.(com|org)$", {"ann@example.com"}, {"ann@example.net", "@example.com"}},
        {"^[^a-z]*$", {"", "ABC 123", "\"\\\n"}, {"a", "ABCd"}},
        {"^.$", {"x", "\"", "\\", "\xc3\xa4", "\xf0\x9f\x90\x8d"}, {"", "ab", "\n"}},
        {"^\\S+ \\S+$", {"two words"}, {"one", "three small words"}},
        {"^a{0}b?c+?$", {"bc", "ccc"}, {"abc", "b"}},
        {"^(ab){2,3}$", {"abab", "ababab"}, {"ab", "abababab"}},
        {"^x{2,}$", {"xx", "xxxxx"}, {"x"}},
        {"^[\\]\\-\\\\^]+$", {"]", "-", "\\", "^]-"}, {"[", "a"}},
        {"^[a-]$", {"a", "-"}, {"b"}},
        {"^\\u00e4\\x41\\u{1F40D}$",
         {"\xc3\xa4"
          "A\xf0\x9f\x90\x8d"},
         {"aA"}},
        {"^\\/[\\d.]+\\/$", {"/1.5/"}, {"/x/"}},
        {"^\\t\\n$", {"\t\n"}, {"tn"}},
        {"^$", {""}, {"x"}},
        {"", {"", "anything"}, {NULL}},
        {"^(a|b)*c$", {"c", "ababc"}, {"d"}},
        {"^(|a)b$", {"b", "ab"}, {"aab"}},
        {"^[\\s\\S]$", {" ", "x"}, {""}},
        {"^caf\xc3\xa9$", {"caf\xc3\xa9"}, {"cafe"}},
    };
    (void)state;
    for (size_t i = 0; i < COUNT(cases); i++) {
        for (size_t k = 0; k < 5 && cases[i].said[k]; k++) check_pattern(cases[i].pattern, cases[i].said[k], true);
        for (size_t k = 0; k < 5 && cases[i].not_said[k]; k++)
            check_pattern(cases[i].pattern, cases[i].not_said[k], false);
    }
}

/* Drawn strings are JSON, and what they hold is found by the system's own matcher. */
static void test_drawn_patterns(void **state)
{
    static const char *const patterns[] = {"^[A-Z]{2}-[0-9]{3}$",
                                           "cat|dog",
                                           "^(a|bc)+$",
                                           "^[^x\"]{2,5}$",
                                           "^[a-f0-9]{8}(-[a-f0-9]{4}){3}$",
                                           "^([01]?[0-9]|2[0-3]):[0-5][0-9]$",
                                           "end$",
                                           "^.{3}$",
                                           "^\\(\\[\\{\\*\\+\\?\\.\\\\$"};
    uint32_t seed = 11;
    (void)state;
    for (size_t i = 0; i < COUNT(patterns); i++) {
        char *schema = schema_of_pattern(patterns[i]);
        struct rules *rules = rules_of(schema, NULL);
        regex_t regex;
        assert_int_equal(regcomp(&regex, patterns[i], REG_EXTENDED | REG_NOSUB), 0);
        for (int k = 0; k < 200; k++) {
            struct bytes said = {0};
            draw_text(rules, find_rule(rules, "root"), &said, &seed);
            json_t *value = json_loadb(said.data, said.n, JSON_DECODE_ANY, NULL);
            if (!json_is_string(value)) fail_msg("%s: %s is no JSON string", patterns[i], said.data);
            /* The C locale's matcher takes bytes: what is beyond ASCII counts otherwise there. */
            bool plain = true;
            for (const char *c = json_string_value(value); *c; c++) plain &= (unsigned char)*c < 0x80;
            if (plain && regexec(&regex, json_string_value(value), 0, NULL, 0) != 0)
                fail_msg("%s: %s was drawn", patterns[i], said.data);
            json_decref(value);
            bytes_free(&said);
        }
        regfree(&regex);
        free_rules(rules);
        free(schema);
    }
}

static void test_refused_patterns(void **state)
{
    static const char *const cases[][2] = {{"(", "not closed"},
                                           {")", "closes nothing"},
                                           {"[a", "not closed"},
                                           {"a**", "repeats nothing"},
                                           {"(?=a)b", "looks ahead"},
                                           {"(?<!a)b", "looks ahead"},
                                           {"(a)\\1", "reference back"},
                                           {"\\bcat", "boundary"},
                                           {"\\p{L}", "property"},
                                           {"(a*)*", "may be empty"},
                                           {"a{3,2}", "counts nothing"},
                                           {"a{2000}", "1000 times"},
                                           {"a^b", "^ or $"},
                                           {"(^a)", "^ or $"},
                                           {"[b-a]", "range that is none"},
                                           {"\\q", "not known"},
                                           {"\\x4", "cut off"},
                                           {"[]", "no character is of"},
                                           {"\\", "cut off"}};
    (void)state;
    for (size_t i = 0; i < COUNT(cases); i++) {
        char *schema = schema_of_pattern(cases[i][0]);
        assert_null(rules_of(schema, cases[i][1]));
        free(schema);
    }
    assert_null(rules_of("{\"type\": \"string\", \"pattern\": 5}", "no string"));
    assert_null(rules_of("{\"type\": \"string\", \"pattern\": \"a\", \"maxLength\": 5}", "several lengths"));
    assert_null(rules_of("{\"type\": \"string\", \"pattern\": \"^(a|bc)*$\", \"minLength\": 5}", "several lengths"));
    assert_null(rules_of("{\"type\": \"string\", \"pattern\": \"^abc$\", \"maxLength\": 2}", "nothing has"));
    assert_null(rules_of("{\"type\": \"string\", \"pattern\": \"^a{2,4}$\", \"minLength\": 5}", "nothing has"));
    assert_null(rules_of("{\"type\": \"string\", \"pattern\": \"^(abc)*$\", \"minLength\": 4, \"maxLength\": 5}",
                         "nothing has"));
    char deep[200];
    memset(deep, '(', 100);
    memset(deep + 100, ')', 99);
    deep[199] = '\0';
    char *schema = schema_of_pattern(deep);
    assert_null(rules_of(schema, "nested"));
    free(schema);
}

/* ---- The rest ---------------------------------------------------------------------------------------------------- */

static void test_schemas(void **state)
{
    static const struct schema_case cases[] = {
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"integer\", \"minimum\": 1, \"maximum\": 9}, "
         "\"b\": {\"type\": \"null\"}}, \"required\": [\"a\"]}",
         {"{\"a\":5}", "{\"a\": 5, \"b\": null}"},
         {"{}", "{\"b\":null}", "{\"a\":10}"}},
        {"{\"type\": \"array\", \"items\": {\"enum\": [1, \"two\"]}, \"minItems\": 1, \"maxItems\": 2}",
         {"[1]", "[1, \"two\"]"},
         {"[]", "[3]", "[1,1,1]"}},
        {"{\"type\": \"string\", \"minLength\": 2, \"maxLength\": 3}", {"\"ab\"", "\"a\\n\""}, {"\"a\"", "\"abcd\""}},
        {"{\"$defs\": {\"t\": {\"type\": \"object\", \"properties\": {\"t\": {\"$ref\": \"#/$defs/t\"}}}}, \"$ref\": "
         "\"#/$defs/t\"}",
         {"{}", "{\"t\":{}}", "{\"t\":{\"t\":{}}}"},
         {"{\"t\":1}"}},
        {"{\"type\": \"string\", \"pattern\": \"^[a-z]+$\", \"maxLength\": 3}",
         {"\"a\"", "\"abc\""},
         {"\"\"", "\"abcd\"", "\"A\""}},
        {"{\"type\": \"string\", \"pattern\": \"^[A-Z][a-z]*$\", \"minLength\": 3, \"maxLength\": 4}",
         {"\"Abc\"", "\"Abcd\""},
         {"\"Ab\"", "\"Abcde\"", "\"abc\""}},
        {"{\"type\": \"string\", \"pattern\": \"^(ab){2,}-$\", \"maxLength\": 8}",
         {"\"abab-\"", "\"ababab-\""},
         {"\"ab-\"", "\"abababab-\""}},
        {"{\"type\": \"string\", \"pattern\": \"^[A-Z]{3}$\", \"minLength\": 3, \"maxLength\": 3}",
         {"\"ABC\""},
         {"\"AB\"", "\"ABCD\""}},
        {"{\"type\": \"string\", \"pattern\": \"^x\", \"maxLength\": 3}", {"\"x\"", "\"xyz\""}, {"\"xyzz\"", "\"a\""}},
        {"{\"type\": \"string\", \"pattern\": \"^a?bc$\", \"minLength\": 3}", {"\"abc\""}, {"\"bc\""}},
        {"{\"type\": \"string\", \"pattern\": \"^a?bc$\", \"maxLength\": 2}", {"\"bc\""}, {"\"abc\""}},
        {"{\"type\": \"string\", \"pattern\": \"^(a|b)$|^c+$\", \"maxLength\": 2}",
         {"\"a\"", "\"cc\""},
         {"\"ccc\"", "\"\""}},
        {"{\"type\": \"string\", \"pattern\": \"cat\", \"minLength\": 2}", {"\"cat\"", "\"a cat\""}, {"\"ca\""}},
        {"{\"type\": \"boolean\"}", {"true", "false"}, {"null", "1"}},
    };
    (void)state;
    check_schemas(cases, COUNT(cases));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole_ranges),     cmocka_unit_test(test_open_ranges),
        cmocka_unit_test(test_real_ranges),      cmocka_unit_test(test_refused_numbers),
        cmocka_unit_test(test_patterns),         cmocka_unit_test(test_drawn_patterns),
        cmocka_unit_test(test_refused_patterns), cmocka_unit_test(test_schemas),
    };
    return cmocka_run_group_tests_name("grammar", tests, NULL, NULL);
}
