/*
 * Numbers within bounds; grammar_number.h describes it. Digits are written from the first on: as long as they are those
 * of a bound, the next one must not pass it, and from the first that is another on all are free.
 */
#include "grammar_number.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PLACES = 16, MOST_VALUES = 1000, MOST_CYCLE = 1000 };
static const int64_t most_whole = 9999999999999999; /* of 16 digits */

static const char no_number[] = "a bound of numbers, or multipleOf, that is no number",
                  nothing_within[] = "bounds that no number is within",
                  too_fine[] = "a bound, or multipleOf, of more than 16 decimal places",
                  too_many[] = "multipleOf of more than 1000 values, where it is no power of ten and divides no 1000";

/* A number as it is written. */
struct decimal {
    bool negative;
    uint64_t whole;
    char places[MOST_PLACES + 1]; /* without zeros at the end */
};

struct edge {
    bool given, strict;
    double value;
    struct decimal decimal;
};

struct bounds {
    struct edge low, high;
    double multiple; /* 0: of any */
};

bool grammar_has_bounds(const json_t *schema)
{
    static const char *const names[] = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (json_object_get(schema, names[i])) return true;
    return false;
}

/* ---- Reading bounds ------------------------------------------------------------------------- */

/* The shortest text that is this number, as digits and a power of ten: 0.d1d2... * 10^power. */
static int shortest(double value, char digits[32])
{
    char text[40];
    int power = 0;
    for (int n = 0; n <= 16; n++) {
        snprintf(text, sizeof text, "%.*e", n, value);
        if (strtod(text, NULL) == value) break;
    }
    size_t n = 0;
    for (const char *c = text; *c && *c != 'e'; c++)
        if (*c >= '0' && *c <= '9') digits[n++] = *c;
    digits[n] = '\0';
    const char *e = strchr(text, 'e');
    if (e) power = atoi(e + 1);
    return power + 1;
}

/* |value| below 10^16. False: it has too many places. */
static bool to_decimal(double value, struct decimal *d)
{
    char digits[32];
    const double size = fabs(value);
    int power = size > 0 ? shortest(size, digits) : 0;
    if (!(size > 0)) digits[0] = '\0';
    *d = (struct decimal){.negative = value < 0};
    const char *at = digits;
    for (; power > 0; power--) d->whole = d->whole * 10 + (*at ? (uint64_t)(*at++ - '0') : 0);
    size_t n = 0;
    for (; power < 0 && n < MOST_PLACES; power++) d->places[n++] = '0';
    if (power < 0) return false;
    for (; *at && n < MOST_PLACES; at++) d->places[n++] = *at;
    while (*at == '0') at++;
    while (n && d->places[n - 1] == '0') n--;
    d->places[n] = '\0';
    return !*at;
}

/* A bound that is given replaces a wider one. sign: 1 for one from below, -1 from above. */
static bool take_edge(const json_t *value, bool strict, double sign, struct edge *edge, const char **problem)
{
    if (!value || json_is_boolean(value)) return true;
    if (!json_is_number(value)) {
        *problem = no_number;
        return false;
    }
    const double number = json_number_value(value), farther = sign * (number - edge->value);
    if (edge->given && (farther < 0 || (!(farther > 0) && !strict))) return true;
    edge->value = number;
    edge->strict = strict;
    edge->given = sign * number > -(double)most_whole; /* else it bounds nothing that is written */
    if (sign * number > (double)most_whole) {
        *problem = nothing_within;
        return false;
    }
    if (!edge->given || to_decimal(number, &edge->decimal)) return true;
    *problem = too_fine;
    return false;
}

static bool read_bounds(const json_t *schema, struct bounds *b, const char **problem)
{
    const json_t *above = json_object_get(schema, "exclusiveMinimum"),
                 *below = json_object_get(schema, "exclusiveMaximum"),
                 *multiple = json_object_get(schema, "multipleOf");
    *b = (struct bounds){0};
    /* Older schemas say `"exclusiveMinimum": true` of minimum. */
    if (!take_edge(json_object_get(schema, "minimum"), json_is_true(above), 1, &b->low, problem) ||
        !take_edge(above, true, 1, &b->low, problem) ||
        !take_edge(json_object_get(schema, "maximum"), json_is_true(below), -1, &b->high, problem) ||
        !take_edge(below, true, -1, &b->high, problem))
        return false;
    if (!multiple) return true;
    b->multiple = json_number_value(multiple);
    if (b->multiple > 0 && b->multiple <= (double)most_whole) return true;
    *problem = "multipleOf that is no number above 0";
    return false;
}

/* ---- Whole numbers ------------------------------------------------------------------------------ */

static bool all_are(const char *digits, size_t n, char digit)
{
    for (size_t i = 0; i < n; i++)
        if (digits[i] != digit) return false;
    return true;
}

static void put_any(struct bytes *out, size_t least, size_t most)
{
    if (most == 0) bytes_put(out, "\"\"");
    else bytes_print(out, "[0-9]{%zu,%zu}", least, most);
}

static void put_digit(struct bytes *out, char from, char to)
{
    if (from == to) bytes_print(out, "[%c] ", from);
    else bytes_print(out, "[%c-%c] ", from, to);
}

/* From a to b, both of n digits. */
static void put_same_length(struct bytes *out, const char *a, const char *b, size_t n)
{
    static const char zeros[] = "00000000000000000", nines[] = "99999999999999999";
    while (n && *a == *b) put_digit(out, *a, *a), a++, b++, n--;
    if (n == 0) return;
    const bool from_zeros = all_are(a + 1, n - 1, '0'), to_nines = all_are(b + 1, n - 1, '9');
    const char from = (char)(*a + !from_zeros), to = (char)(*b - !to_nines);
    bool more = false;
    bytes_put(out, "(");
    if (!from_zeros) {
        put_digit(out, *a, *a);
        put_same_length(out, a + 1, nines, n - 1);
        more = true;
    }
    if (from <= to) {
        if (more) bytes_put(out, " | ");
        put_digit(out, from, to);
        put_any(out, n - 1, n - 1);
        more = true;
    }
    if (!to_nines) {
        if (more) bytes_put(out, " | ");
        put_digit(out, *b, *b);
        put_same_length(out, zeros, b + 1, n - 1);
    }
    bytes_put(out, ")");
}

/* From..to, which is below 10^16: for each number of digits a part. */
static void put_range(struct bytes *out, uint64_t from, uint64_t to)
{
    bool more = false;
    bytes_put(out, "(");
    for (uint64_t least = 0, most = 9; least <= to; least = most + 1, most = 10 * most + 9) {
        char a[24], b[24];
        if (from > most) continue;
        const int n = snprintf(a, sizeof a, "%llu", (unsigned long long)(from > least ? from : least));
        snprintf(b, sizeof b, "%llu", (unsigned long long)(to < most ? to : most));
        if (more) bytes_put(out, " | ");
        put_same_length(out, a, b, (size_t)n);
        more = true;
    }
    bytes_put(out, ")");
}

/* Every multiple of m from `from` to `to`, both such ones, with zeros in front up to n digits. */
static void put_each(struct bytes *out, uint64_t from, uint64_t to, uint64_t m, int n)
{
    for (uint64_t at = from;; at += m) {
        bytes_print(out, "%s\"%0*llu\"", at == from ? "(" : " | ", n, (unsigned long long)at);
        if (to - at < m) break;
    }
    bytes_put(out, ")");
}

/* The same where they are many: their last digits come again and again, `cycle` numbers after one another. */
static void put_cycles(struct bytes *out, uint64_t from, uint64_t to, uint64_t m, uint64_t cycle, int n_digits)
{
    const uint64_t first = from / cycle, last = to / cycle;
    bytes_put(out, "(");
    put_each(out, from, (first + 1) * cycle - m, m, 1);
    if (last - first > 1) {
        bytes_put(out, " | ");
        put_range(out, first + 1, last - 1);
        put_each(out, 0, cycle - m, m, n_digits);
    }
    bytes_put(out, " | ");
    put_each(out, last * cycle, to, m, 1);
    bytes_put(out, ")");
}

/* Powers of ten: a number and so many zeros. */
static void put_zeros(struct bytes *out, uint64_t from, uint64_t to, uint64_t m)
{
    bytes_put(out, "(");
    if (from == 0) bytes_put(out, "\"0\" | ");
    put_range(out, from ? from / m : 1, to / m);
    bytes_print(out, " \"%s\")", "0000000000000000" + 16 - (int)round(log10((double)m)));
}

/* Multiples of m from..to, that there are some of. */
static bool put_multiples(struct bytes *out, uint64_t from, uint64_t to, uint64_t m, const char **problem)
{
    uint64_t power = 1, cycle = 10;
    int n_digits = 1;
    while (power < m) power *= 10;
    while (cycle < MOST_CYCLE && cycle % m) cycle *= 10, n_digits++;
    if (m == 1) put_range(out, from, to);
    else if ((to - from) / m < MOST_VALUES) put_each(out, from, to, m, 1);
    else if (power == m) put_zeros(out, from, to, m);
    else if (cycle % m == 0) put_cycles(out, from, to, m, cycle, n_digits);
    else {
        *problem = too_many;
        return false;
    }
    return true;
}

/* Multiples of m within both; those that are negative, and the others. */
static bool put_whole(struct bytes *out, int64_t low, int64_t high, int64_t m, const char **problem)
{
    const int64_t first = low > 0 ? (low + m - 1) / m * m : -(-low / m * m),
                  last = high < 0 ? -((-high + m - 1) / m * m) : high / m * m;
    bool good = true;
    if (first > last) {
        *problem = nothing_within;
        return false;
    }
    bytes_put(out, "(");
    if (first < 0) {
        bytes_put(out, "\"-\" ");
        good = put_multiples(out, (uint64_t)(last < 0 ? -last : m), (uint64_t)-first, (uint64_t)m, problem);
    }
    if (first < 0 && last >= 0) bytes_put(out, " | ");
    if (good && last >= 0)
        good = put_multiples(out, (uint64_t)(first > 0 ? first : 0), (uint64_t)last, (uint64_t)m, problem);
    bytes_put(out, ")");
    return good;
}

static bool put_whole_bounds(struct bytes *out, const struct bounds *b, const char **problem)
{
    int64_t low = -most_whole, high = most_whole, m = 1;
    if (b->low.given) {
        const double least = ceil(b->low.value);
        low = (int64_t)least + (b->low.strict && !(least > b->low.value));
    }
    if (b->high.given) {
        const double most = floor(b->high.value);
        high = (int64_t)most - (b->high.strict && !(most < b->high.value));
    }
    if (b->multiple > 0) {
        m = (int64_t)b->multiple;
        if ((double)m < b->multiple || m == 0) {
            *problem = "multipleOf of a whole number that is no whole number";
            return false;
        }
    }
    return put_whole(out, low, high, m, problem);
}

/* ---- Any number ---------------------------------------------------------------------------------- */

/* What is left of a bound's places; NULL: it bounds them no more. */
struct rest {
    const char *digits;
    bool strict;
};

static const struct rest no_bound = {NULL, false};

static bool may_end(struct rest low, struct rest high)
{
    return (!low.digits || (!*low.digits && !low.strict)) && (!high.digits || *high.digits || !high.strict);
}

static struct rest after(struct rest rest)
{
    if (rest.digits && *rest.digits) rest.digits++;
    return rest;
}

static bool put_places(struct bytes *out, struct rest low, struct rest high, size_t most, bool first);

static void put_place(struct bytes *body, char digit, struct rest low, struct rest high, size_t most)
{
    struct bytes more = {0};
    if (put_places(&more, low, high, most, false)) {
        if (body->n) bytes_put(body, " | ");
        put_digit(body, digit, digit);
        bytes_append(body, more.data, more.n);
    }
    bytes_free(&more);
}

/* The next digits, at most so many. first: there must be one. False: there is no way to go on. */
static bool put_places(struct bytes *out, struct rest low, struct rest high, size_t most, bool first)
{
    const bool end = may_end(low, high) && !first;
    struct bytes body = {0};
    if (low.digits && !*low.digits && !low.strict) low = no_bound;
    if (most && !low.digits && !high.digits) {
        put_any(out, first, most);
        return true;
    }
    if (most && high.digits && !*high.digits) { /* it is the bound: zeros alone may follow */
        if (low.digits || high.strict) return false;
        bytes_print(out, "[0]{%d,%zu}", first, most);
        return true;
    }
    if (most) {
        char from = low.digits && *low.digits ? *low.digits : '0', to = high.digits ? *high.digits : '9';
        if (low.digits && high.digits && from == to) put_place(&body, from, after(low), after(high), most - 1);
        else {
            if (low.digits) put_place(&body, from++, after(low), no_bound, most - 1);
            const char last = (char)(high.digits ? to - 1 : to);
            if (from <= last) {
                if (body.n) bytes_put(&body, " | ");
                put_digit(&body, from, last);
                put_any(&body, 0, most - 1);
            }
            if (high.digits) put_place(&body, to, no_bound, after(high), most - 1);
        }
    }
    if (body.n) bytes_print(out, "(%s)%s", body.data, end ? "?" : "");
    else if (end) bytes_put(out, "\"\"");
    const bool good = body.n || end;
    bytes_free(&body);
    return good;
}

/* A whole part with the places that it may have, as one more alternative. */
static void put_point(struct bytes *out, uint64_t from, uint64_t to, struct rest low, struct rest high, size_t most)
{
    struct bytes places = {0};
    const bool alone = may_end(low, high), some = most && put_places(&places, low, high, most, true);
    if (alone || some) {
        if (out->n) bytes_put(out, " | ");
        put_range(out, from, to);
        if (some) bytes_print(out, " (\".\" %s)%s", places.data, alone ? "?" : "");
    }
    bytes_free(&places);
}

/* From low to high, none of them negative; high may not be given. */
static void put_positive(struct bytes *out, const struct edge *low, const struct edge *high, size_t places)
{
    const struct rest least = {low->decimal.places, low->strict},
                      most = high->given ? (struct rest){high->decimal.places, high->strict} : no_bound;
    const uint64_t from = low->decimal.whole, to = high->given ? high->decimal.whole : (uint64_t)most_whole;
    if (from > to) return;
    if (from == to) {
        if (!high->given || strcmp(low->decimal.places, high->decimal.places) <= 0)
            put_point(out, from, from, least, most, places);
        return;
    }
    put_point(out, from, from, least, no_bound, places);
    if (to - from > 1) put_point(out, from + 1, to - 1, no_bound, no_bound, places);
    put_point(out, to, to, no_bound, most, places);
}

static bool put_real(struct bytes *out, const struct bounds *b, size_t places, const char **problem)
{
    static const struct edge zero = {.given = true}, above_zero = {.given = true, .strict = true};
    struct bytes positive = {0}, negative = {0};
    if (!b->high.given || b->high.value >= 0)
        put_positive(&positive, b->low.given && b->low.value >= 0 ? &b->low : &zero, &b->high, places);
    if (!b->low.given || b->low.value < 0)
        put_positive(&negative, b->high.given && b->high.value < 0 ? &b->high : &above_zero, &b->low, places);
    if (positive.n) bytes_print(out, "(%s", positive.data);
    if (negative.n) bytes_print(out, "%s\"-\" (%s)", positive.n ? " | " : "(", negative.data);
    const bool good = positive.n || negative.n;
    if (good) bytes_put(out, ")");
    else *problem = nothing_within;
    bytes_free(&positive);
    bytes_free(&negative);
    return good;
}

/* Multiples of what is no power of ten: each by itself. */
static bool put_few(struct bytes *out, const struct bounds *b, const struct decimal *m, const char **problem)
{
    const double first = ceil(b->low.value / b->multiple), last = floor(b->high.value / b->multiple);
    bool more = false;
    if (!b->low.given || !b->high.given || last - first >= MOST_VALUES) {
        *problem = too_many;
        return false;
    }
    for (double i = first; i <= last; i++) {
        const double value = i * b->multiple;
        if (value < b->low.value || value > b->high.value || (b->low.strict && !(value > b->low.value)) ||
            (b->high.strict && !(value < b->high.value)))
            continue;
        bytes_print(out, "%s\"%.*f\"", more ? " | " : "(", (int)strlen(m->places), i == 0 ? 0.0 : value);
        more = true;
    }
    if (more) bytes_put(out, ")");
    else *problem = nothing_within;
    return more;
}

bool grammar_number(struct bytes *out, const json_t *schema, bool whole, const char **problem)
{
    struct bounds b;
    struct decimal m = {0};
    if (!read_bounds(schema, &b, problem)) return false;
    if (b.multiple > 0 && !to_decimal(b.multiple, &m)) {
        *problem = too_fine;
        return false;
    }
    const size_t places = strlen(m.places);
    if (whole || (b.multiple > 0 && places == 0)) return put_whole_bounds(out, &b, problem);
    if (places == 0) return put_real(out, &b, MOST_PLACES, problem);
    if (m.whole == 0 && m.places[places - 1] == '1' && all_are(m.places, places - 1, '0'))
        return put_real(out, &b, places, problem);
    return put_few(out, &b, &m, problem);
}
