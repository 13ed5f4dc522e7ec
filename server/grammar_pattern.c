/*
 * Regular expressions; grammar_pattern.h describes it. Both languages read from left to right alike: what is parsed is
 * written at once, each character as JSON has it within quotes.
 */
#include "grammar_pattern.h"

#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PATTERN_DEPTH = 32, MOST_PATTERN_REPEATS = 1000, MOST_RANGES = 128, LAST_CHARACTER = 0x10ffff };

struct parsing {
    const char *at;
    const char **problem;
    unsigned depth;
};

struct range {
    uint32_t from, to;
};

struct set {
    struct range range[MOST_RANGES];
    size_t n;
    bool open; /* a complement: not all that it has need be sayable */
};

static bool cannot(struct parsing *p, const char *what)
{
    if (!*p->problem) *p->problem = what;
    return false;
}

/* ---- Sets of characters -------------------------------------------------------------------- */

static const struct range digits[] = {{'0', '9'}}, words[] = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}},
                          blanks[] = {{'\t', '\r'},     {' ', ' '},       {0xa0, 0xa0},     {0x1680, 0x1680},
                                      {0x2000, 0x200a}, {0x2028, 0x2029}, {0x202f, 0x202f}, {0x205f, 0x205f},
                                      {0x3000, 0x3000}, {0xfeff, 0xfeff}},
                          line_ends[] = {{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}};
#define COUNT(array) (sizeof(array) / sizeof *(array))

static bool set_add(struct set *set, uint32_t from, uint32_t to)
{
    if (set->n == MOST_RANGES) return false;
    set->range[set->n++] = (struct range){from, to};
    return true;
}

static int compare_ranges(const void *a, const void *b)
{
    const struct range *x = a, *y = b;
    return (x->from > y->from) - (x->from < y->from);
}

/* In order, apart from one another. */
static void set_sort(struct set *set)
{
    size_t kept = 0;
    qsort(set->range, set->n, sizeof *set->range, compare_ranges);
    for (size_t i = 0; i < set->n; i++) {
        struct range *last = kept ? &set->range[kept - 1] : NULL;
        if (last && set->range[i].from <= last->to + 1) {
            if (set->range[i].to > last->to) last->to = set->range[i].to;
        } else set->range[kept++] = set->range[i];
    }
    set->n = kept;
}

static bool set_invert(struct set *set)
{
    struct set other = {.open = true};
    uint32_t next = 0;
    set_sort(set);
    for (size_t i = 0; i < set->n; i++) {
        if (set->range[i].from > next && !set_add(&other, next, set->range[i].from - 1)) return false;
        next = set->range[i].to + 1;
    }
    if (next <= LAST_CHARACTER && !set_add(&other, next, LAST_CHARACTER)) return false;
    *set = other;
    return true;
}

/* Those of a class such as \d, or what is not among them. */
static bool set_add_class(struct set *set, const struct range *ranges, size_t n, bool inverted)
{
    struct set class = {0};
    for (size_t i = 0; i < n; i++) set_add(&class, ranges[i].from, ranges[i].to);
    if (inverted && !set_invert(&class)) return false;
    set->open |= class.open;
    for (size_t i = 0; i < class.n; i++)
        if (!set_add(set, class.range[i].from, class.range[i].to)) return false;
    return true;
}

static bool set_has(const struct set *set, uint32_t c)
{
    for (size_t i = 0; i < set->n; i++)
        if (c >= set->range[i].from && c <= set->range[i].to) return true;
    return false;
}

/* ---- Writing ---------------------------------------------------------------------------------- */

static void put_character(struct bytes *out, uint32_t c)
{
    if (c < 0x80 && isalnum((int)c)) bytes_print(out, "%c", (int)c);
    else if (c < 0x80) bytes_print(out, "\\x%02X", (unsigned)c);
    else if (c < 0x10000) bytes_print(out, "\\u%04X", (unsigned)c);
    else bytes_print(out, "\\U%08X", (unsigned)c);
}

/* What stands in a string as it is, from..to of it. */
static void put_plain(struct bytes *class, uint32_t from, uint32_t to)
{
    static const struct range plain[] = {
        {' ', '!'}, {'#', '['}, {']', 0xd7ff}, {0xe000, LAST_CHARACTER}}; /* no quote, no backslash, no surrogate */
    for (size_t i = 0; i < COUNT(plain); i++) {
        const uint32_t a = from > plain[i].from ? from : plain[i].from, b = to < plain[i].to ? to : plain[i].to;
        if (a > b) continue;
        put_character(class, a);
        if (b > a + 1) bytes_put(class, "-");
        if (b > a) put_character(class, b);
    }
}

static void put_escaped(struct bytes *body, const struct set *set)
{
    static const struct {
        char character, name;
    } named[] = {{'"', '"'}, {'\\', '\\'}, {'\t', 't'}, {'\n', 'n'}, {'\r', 'r'}, {'\b', 'b'}, {'\f', 'f'}};
    for (size_t i = 0; i < COUNT(named); i++) {
        const bool rare = named[i].name == 'b' || named[i].name == 'f';
        if (!set_has(set, (unsigned char)named[i].character) || (set->open && rare)) continue;
        bytes_print(body, "%s\"\\\\\" \"\\x%02X\"", body->n ? " | " : "", (unsigned)named[i].name);
    }
    for (uint32_t c = 1; c < ' ' && !set->open; c++)
        if (set_has(set, c) && !strchr("\t\n\r\b\f", (int)c))
            bytes_print(body, "%s\"\\\\u%04x\"", body->n ? " | " : "", (unsigned)c);
}

static bool put_set(struct parsing *p, struct bytes *out, struct set *set)
{
    struct bytes class = {0}, body = {0};
    set_sort(set);
    for (size_t i = 0; i < set->n; i++) put_plain(&class, set->range[i].from, set->range[i].to);
    if (class.n) bytes_print(&body, "[%s]", class.data);
    put_escaped(&body, set);
    if (body.n) bytes_print(out, "(%s)", body.data);
    const bool some = body.n != 0;
    bytes_free(&class);
    bytes_free(&body);
    return some || cannot(p, "a pattern with a class that no character is of");
}

/* ---- Characters -------------------------------------------------------------------------------- */

/* The next character of the pattern, which is UTF-8. */
static uint32_t take_character(struct parsing *p)
{
    const unsigned char *at = (const unsigned char *)p->at;
    const size_t n = utf8_character(p->at, strlen(p->at));
    uint32_t c = at[0];
    if (n > 1) c &= 0x7fu >> n;
    for (size_t i = 1; i < n; i++) c = c << 6 | (at[i] & 0x3f);
    p->at += n ? n : 1;
    return c;
}

/* n hexadecimal digits; false: they are not there. */
static bool take_hex(struct parsing *p, size_t n, uint32_t *c)
{
    *c = 0;
    for (size_t i = 0; i < n; i++, p->at++) {
        if (!isxdigit((unsigned char)*p->at)) return cannot(p, "a pattern with an escape that is cut off");
        *c = *c << 4 | (uint32_t)(isdigit((unsigned char)*p->at) ? *p->at - '0' : (*p->at | ' ') - 'a' + 10);
    }
    return true;
}

static bool take_unicode(struct parsing *p, uint32_t *c)
{
    uint32_t low;
    if (*p->at == '{') {
        const size_t n = strspn(++p->at, "0123456789abcdefABCDEF");
        if (n < 1 || n > 6 || p->at[n] != '}') return cannot(p, "a pattern with an escape that is cut off");
        if (!take_hex(p, n, c)) return false;
        p->at++;
    } else if (!take_hex(p, 4, c)) return false;
    if (*c >= 0xd800 && *c < 0xdc00 && strncmp(p->at, "\\u", 2) == 0) {
        p->at += 2;
        if (!take_hex(p, 4, &low)) return false;
        *c = 0x10000 + ((*c - 0xd800) << 10) + ((low - 0xdc00) & 0x3ff);
    }
    return *c <= LAST_CHARACTER || cannot(p, "a pattern with a character beyond the last");
}

/* Behind a backslash: one character. */
static bool take_escape(struct parsing *p, uint32_t *c)
{
    static const char names[] = "tnrvf0", values[] = "\t\n\r\v\f";
    const char name = *p->at;
    const char *found = name ? strchr(names, name) : NULL;
    if (!name) return cannot(p, "a pattern with an escape that is cut off");
    if (found) {
        p->at++;
        *c = (uint32_t)values[found - names];
        return !isdigit((unsigned char)*p->at) || name != '0' || cannot(p, "a pattern with an octal escape");
    }
    if (name == 'x' || name == 'u') {
        p->at++;
        return name == 'x' ? take_hex(p, 2, c) : take_unicode(p, c);
    }
    if (name == 'c' && isalpha((unsigned char)p->at[1])) {
        *c = (uint32_t)(p->at[1] & 0x1f);
        p->at += 2;
        return true;
    }
    if (isdigit((unsigned char)name) || name == 'k') return cannot(p, "a pattern with a reference back");
    if (name == 'b' || name == 'B') return cannot(p, "a pattern with \\b, a word's boundary");
    if (name == 'p' || name == 'P') return cannot(p, "a pattern with \\p, a property");
    if (isalpha((unsigned char)name)) return cannot(p, "a pattern with an escape that is not known");
    *c = take_character(p);
    return true;
}

/* Behind a backslash: a class such as \d. False: it is none, which is no problem, or there are too many ranges. */
static bool take_class(struct parsing *p, struct set *set)
{
    static const struct {
        char name;
        const struct range *ranges;
        size_t n;
    } classes[] = {{'d', digits, COUNT(digits)}, {'w', words, COUNT(words)}, {'s', blanks, COUNT(blanks)}};
    for (size_t i = 0; i < COUNT(classes); i++) {
        if ((*p->at | ' ') != classes[i].name) continue;
        const bool inverted = *p->at++ < 'a';
        return set_add_class(set, classes[i].ranges, classes[i].n, inverted) ||
               cannot(p, "a pattern with too large a class");
    }
    return false;
}

/* One end of a range in brackets, or a class there. *single: it is one character. */
static bool take_member(struct parsing *p, struct set *set, uint32_t *c, bool *single)
{
    *single = false;
    if (!*p->at) return cannot(p, "a pattern with a class that is not closed");
    if (*p->at != '\\') {
        *single = true;
        *c = take_character(p);
        return true;
    }
    p->at++;
    if (take_class(p, set)) return true;
    if (*p->problem) return false;
    *single = true;
    if (*p->at == 'b') {
        p->at++;
        *c = '\b';
        return true;
    }
    return take_escape(p, c);
}

/* Behind '['. */
static bool take_brackets(struct parsing *p, struct set *set)
{
    const bool inverted = *p->at == '^';
    uint32_t from, to;
    bool single, range;
    p->at += inverted;
    while (*p->at != ']') {
        if (!take_member(p, set, &from, &single)) return false;
        if (!single) continue;
        to = from;
        if (p->at[0] == '-' && p->at[1] && p->at[1] != ']') {
            p->at++;
            if (!take_member(p, set, &to, &range)) return false;
            if (!range || to < from) return cannot(p, "a pattern with a range that is none");
        }
        if (!set_add(set, from, to)) return cannot(p, "a pattern with too large a class");
    }
    p->at++;
    return !inverted || set_invert(set) || cannot(p, "a pattern with too large a class");
}

/* ---- Lengths ----------------------------------------------------------------------------------------- */

/* How many characters something has; most: -1 for any number. */
struct lengths {
    long least, most;
};

enum { ENOUGH = 1 << 20 }; /* beyond any limit */

static long capped(long a)
{
    return a < ENOUGH ? a : ENOUGH;
}

static struct lengths lengths_sum(struct lengths a, struct lengths b)
{
    return (struct lengths){capped(a.least + b.least), a.most < 0 || b.most < 0 ? -1 : capped(a.most + b.most)};
}

static struct lengths lengths_either(struct lengths a, struct lengths b)
{
    return (struct lengths){a.least < b.least ? a.least : b.least, a.most < 0 || b.most < 0 ? -1
                                                                   : a.most > b.most        ? a.most
                                                                                            : b.most};
}

static struct lengths lengths_times(struct lengths a, struct lengths times)
{
    const bool endless = (a.most < 0 && times.most != 0) || (times.most < 0 && a.most != 0);
    return (struct lengths){capped(a.least * times.least), endless ? -1 : capped(a.most * times.most)};
}

static bool lengths_within(struct lengths a, struct lengths bounds)
{
    return a.least >= bounds.least && (bounds.most < 0 || (a.most >= 0 && a.most <= bounds.most));
}

/* ---- Expressions ----------------------------------------------------------------------------------- */

static bool put_alternatives(struct parsing *p, struct bytes *out, struct lengths *lengths);

/* Behind '('. */
static bool put_group(struct parsing *p, struct bytes *out, struct lengths *lengths)
{
    if (p->at[0] == '?') {
        const size_t name = p->at[1] == '<' ? strcspn(p->at, ">") : 0;
        if (p->at[1] == ':') p->at += 2;
        else if (name && p->at[2] != '=' && p->at[2] != '!' && p->at[name]) p->at += name + 1;
        else return cannot(p, "a pattern that looks ahead or back");
    }
    if (++p->depth > MOST_PATTERN_DEPTH) return cannot(p, "a pattern that is nested too deep");
    bytes_put(out, "(");
    if (!put_alternatives(p, out, lengths)) return false;
    bytes_put(out, ")");
    p->depth--;
    if (*p->at != ')') return cannot(p, "a pattern with a group that is not closed");
    p->at++;
    return true;
}

static bool put_atom(struct parsing *p, struct bytes *out, struct lengths *lengths)
{
    struct set set = {0};
    uint32_t c;
    *lengths = (struct lengths){1, 1};
    switch (*p->at) {
    case '(': p->at++; return put_group(p, out, lengths);
    case '[': p->at++; return take_brackets(p, &set) && put_set(p, out, &set);
    case '.':
        p->at++;
        set_add_class(&set, line_ends, COUNT(line_ends), true);
        return put_set(p, out, &set);
    case '*':
    case '+':
    case '?':
    case '{': return cannot(p, "a pattern that repeats nothing");
    case '^':
    case '$': return cannot(p, "a pattern with ^ or $ that is not at its ends");
    case '\\':
        p->at++;
        if (take_class(p, &set)) return put_set(p, out, &set);
        if (*p->problem || !take_escape(p, &c)) return false;
        break;
    default: c = take_character(p);
    }
    set_add(&set, c, c);
    return put_set(p, out, &set);
}

/* {n}, {n,}, {n,m}; most: -1 for any number. */
static bool take_times(struct parsing *p, long *least, long *most)
{
    char *end;
    if (!isdigit((unsigned char)p->at[1])) return cannot(p, "a pattern with a '{' that counts nothing");
    *least = *most = strtol(p->at + 1, &end, 10);
    if (*end == ',') *most = isdigit((unsigned char)end[1]) ? strtol(end + 1, &end, 10) : (end++, -1);
    if (*end != '}' || (*most >= 0 && *most < *least)) return cannot(p, "a pattern with a '{' that counts nothing");
    p->at = end + 1;
    if (*least <= MOST_PATTERN_REPEATS && *most <= MOST_PATTERN_REPEATS) return true;
    return cannot(p, "a pattern that repeats more than 1000 times");
}

/* An atom that was written from `from` on, so many times. */
static void put_count(struct bytes *out, size_t from, struct lengths times)
{
    if (times.most == 0) {
        out->n = from;
        bytes_put(out, "\"\"");
    } else if (times.most < 0) bytes_print(out, "{%ld,}", times.least);
    else bytes_print(out, "{%ld,%ld}", times.least, times.most);
}

/* How many times: what follows an atom. */
static bool take_repeat(struct parsing *p, struct lengths *times)
{
    *times = (struct lengths){1, 1};
    switch (*p->at) {
    case '*': *times = (struct lengths){0, -1}, p->at++; break;
    case '+': times->most = -1, p->at++; break;
    case '?': times->least = 0, p->at++; break;
    case '{':
        if (!take_times(p, &times->least, &times->most)) return false;
        break;
    default: return true;
    }
    if (*p->at == '?') p->at++; /* however little it wants to take, what is found is the same */
    return true;
}

/* Of a sequence the part whose length is not always the same, the last of them. */
struct varying {
    size_t n;             /* how many there are */
    size_t from, to, end; /* in what is written: its atom, and the count behind that */
    struct lengths atom, times;
};

static bool put_part(struct parsing *p, struct bytes *out, struct lengths *lengths, struct varying *varying)
{
    const size_t from = out->n;
    struct lengths atom, times;
    if (!put_atom(p, out, &atom)) return false;
    const size_t to = out->n;
    const char *sign = p->at;
    if (!take_repeat(p, &times)) return false;
    if (atom.least == 0 && times.most < 0) return cannot(p, "a pattern that repeats what may be empty");
    if (p->at != sign) put_count(out, from, times);
    *lengths = lengths_times(atom, times);
    if (lengths->least != lengths->most) *varying = (struct varying){varying->n + 1, from, to, out->n, atom, times};
    return true;
}

/* Up to '|', ')', or a '$' at the end. */
static bool put_sequence(struct parsing *p, struct bytes *out, struct lengths *lengths, struct varying *varying)
{
    const size_t from = out->n;
    *lengths = (struct lengths){0, 0};
    while (*p->at && *p->at != '|' && *p->at != ')') {
        if (*p->at == '$' && p->depth == 0 && (!p->at[1] || p->at[1] == '|')) break;
        struct lengths part;
        if (out->n > from) bytes_put(out, " ");
        if (!put_part(p, out, &part, varying)) return false;
        *lengths = lengths_sum(*lengths, part);
    }
    if (out->n == from) bytes_put(out, "\"\"");
    return true;
}

static bool put_alternatives(struct parsing *p, struct bytes *out, struct lengths *lengths)
{
    for (bool first = true;; first = false) {
        struct lengths one;
        struct varying varying = {0};
        if (!put_sequence(p, out, &one, &varying)) return false;
        *lengths = first ? one : lengths_either(*lengths, one);
        if (*p->at != '|') return true;
        p->at++;
        bytes_put(out, " | ");
    }
}

/* What is around a match: any characters, where the pattern does not say that it begins or ends there. */
static void put_any(struct bytes *out, struct lengths *lengths, struct varying *varying)
{
    const struct lengths any = {0, -1};
    bytes_put(out, " ");
    const size_t from = out->n;
    bytes_put(out, "char{0,} ");
    *varying = (struct varying){varying->n + 1, from, from + 4, out->n, {1, 1}, any};
    *lengths = lengths_sum(*lengths, any);
}

/* The varying part is counted so that the whole keeps within the bounds. */
static bool keep_within(struct parsing *p, struct bytes *out, struct lengths all, const struct varying *v,
                        struct lengths bounds)
{
    if (lengths_within(all, bounds)) return true;
    if (v->n == 0 || (all.most >= 0 && all.most < bounds.least) || (bounds.most >= 0 && all.least > bounds.most))
        return cannot(p, "a pattern of which nothing has minLength to maxLength characters");
    if (v->n > 1 || v->atom.least != v->atom.most)
        return cannot(p, "minLength or maxLength beside a pattern of several lengths: it can count itself, as {2,5}");
    const long each = v->atom.least, others = all.least - each * v->times.least;
    struct lengths times = v->times;
    if (bounds.least > all.least) times.least = (bounds.least - others + each - 1) / each;
    if (bounds.most >= 0 && (times.most < 0 || others + each * times.most > bounds.most))
        times.most = (bounds.most - others) / each;
    if (times.most >= 0 && times.most < times.least)
        return cannot(p, "a pattern of which nothing has minLength to maxLength characters");
    if (out->failed) return true;
    struct bytes behind = {0};
    bytes_append(&behind, out->data + v->end, out->n - v->end);
    out->n = v->to;
    put_count(out, v->from, times);
    bytes_append(out, behind.data ? behind.data : "", behind.n);
    bytes_free(&behind);
    return true;
}

bool grammar_pattern(struct bytes *out, const char *pattern, long least, long most, const char **problem)
{
    const struct lengths bounds = {least, most};
    struct parsing p = {.at = pattern, .problem = problem};
    *problem = NULL;
    for (;;) {
        struct lengths all = {0, 0}, inner;
        struct varying varying = {0};
        const bool begins = *p.at == '^';
        p.at += begins;
        if (!begins) put_any(out, &all, &varying);
        if (!put_sequence(&p, out, &inner, &varying)) return false;
        all = lengths_sum(all, inner);
        const bool ends = *p.at == '$';
        p.at += ends;
        if (!ends) put_any(out, &all, &varying);
        if (!keep_within(&p, out, all, &varying, bounds)) return false;
        if (!*p.at) return true;
        if (*p.at != '|') return cannot(&p, "a pattern with a ')' that closes nothing");
        p.at++;
        bytes_put(out, " | ");
    }
}
