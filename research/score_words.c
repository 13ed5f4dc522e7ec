/* Characters and words of answers; score_words.h describes them. */
#include "score_words.h"

#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "memory.h"

/* ---- Characters ------------------------------------------------------------------ */

struct range {
    uint32_t first, last;
};

/* Where each byte that cannot be UTF-8 goes: surrogates, which UTF-8 itself cannot have. */
enum { INVALID_BYTE = 0xDC00 };

/* The white space at which Python's str.split() divides. */
static const struct range spaces[] = {
    {0x09, 0x0D},     {0x1C, 0x20},     {0x85, 0x85},     {0xA0, 0xA0},     {0x1680, 0x1680},
    {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000},
};

/* Beyond ASCII, what is no part of a word: signs, punctuation, combining marks, arrows, emoji, invalid bytes. */
static const struct range signs[] = {
    {0x80, 0xA9},     {0xAB, 0xB1},     {0xB4, 0xB4},     {0xB6, 0xB8},     {0xBB, 0xBB},
    {0xBF, 0xBF},     {0xD7, 0xD7},     {0xF7, 0xF7},     {0x300, 0x36F},   {0x1680, 0x1680},
    {0x2000, 0x206F}, {0x20A0, 0x20FF}, {0x2190, 0x245F}, {0x2500, 0x2BFF}, {0x3000, 0x3004},
    {0x3008, 0x3020}, {0x3030, 0x3030}, {0xD800, 0xF8FF}, {0xFE30, 0xFE6F}, {0xFF01, 0xFF0F},
    {0xFF1A, 0xFF20}, {0xFF3B, 0xFF40}, {0xFF5B, 0xFF65}, {0xFFF9, 0xFFFF}, {0x1F000, 0x1FAFF},
};

size_t decode_character(const char *text, uint32_t *character)
{
    static const uint32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char *byte = (const unsigned char *)text;
    size_t n_bytes = byte[0] < 0x80   ? 1
                     : byte[0] < 0xC2 ? 0
                     : byte[0] < 0xE0 ? 2
                     : byte[0] < 0xF0 ? 3
                     : byte[0] < 0xF5 ? 4
                                      : 0;
    uint32_t value = n_bytes == 1 ? byte[0] : n_bytes ? byte[0] & (0x7Fu >> n_bytes) : 0;
    for (size_t i = 1; i < n_bytes; i++) {
        if ((byte[i] & 0xC0) != 0x80) { /* also the NUL at the end */
            n_bytes = 0;
            break;
        }
        value = value << 6 | (byte[i] & 0x3Fu);
    }
    /* A form longer than necessary must not pass: its lower case would have another length. */
    bool valid = n_bytes && value >= smallest[n_bytes] && value <= 0x10FFFF && (value < 0xD800 || value > 0xDFFF);
    *character = valid ? value : (uint32_t)INVALID_BYTE + byte[0];
    return valid ? n_bytes : 1;
}

static bool in_ranges(const struct range *range, size_t n_ranges, uint32_t character)
{
    for (size_t i = 0; i < n_ranges; i++)
        if (character >= range[i].first && character <= range[i].last) return true;
    return false;
}

static bool is_space(uint32_t character)
{
    return in_ranges(spaces, sizeof spaces / sizeof spaces[0], character);
}

bool is_punctuation(uint32_t character)
{
    return (character >= '!' && character <= '/') || (character >= ':' && character <= '@') ||
           (character >= '[' && character <= '`') || (character >= '{' && character <= '~');
}

/* Close to \w of Python's regular expressions. */
static bool is_word(uint32_t character)
{
    if (character >= 0x80) return !in_ranges(signs, sizeof signs / sizeof signs[0], character);
    return (character >= '0' && character <= '9') || (character >= 'A' && character <= 'Z') ||
           (character >= 'a' && character <= 'z') || character == '_';
}

/* Never changes how many bytes the character has. */
static uint32_t lower(uint32_t c)
{
    if (c < 0x80) return c >= 'A' && c <= 'Z' ? c + 32 : c;
    if (c < 0x100) /* Latin-1; not the sign of multiplication */
        return c >= 0xC0 && c <= 0xDE && c != 0xD7 ? c + 32 : c;
    if (c < 0x180) { /* pairs of capital and small; a Turkish I has no counterpart of two bytes */
        bool odd_capital = (c >= 0x139 && c <= 0x148) || (c >= 0x179 && c <= 0x17E);
        bool single = c == 0x130 || c == 0x138 || c == 0x149 || c == 0x17F;
        return c == 0x178 ? 0xFF : !single && c % 2 == odd_capital ? c + 1 : c;
    }
    if (c >= 0x386 && c <= 0x3AB) { /* Greek */
        return c == 0x386                 ? 0x3AC
               : c >= 0x388 && c <= 0x38A ? c + 37
               : c == 0x38C               ? 0x3CC
               : c == 0x38E || c == 0x38F ? c + 63
               : c >= 0x391 && c != 0x3A2 ? c + 32
                                          : c;
    }
    if (c >= 0x400 && c <= 0x42F) /* Cyrillic */
        return c < 0x410 ? c + 80 : c + 32;
    return c;
}

char *lower_text(const char *text)
{
    size_t n_bytes = strlen(text);
    char *copy = allocate(n_bytes + 1, 1);
    memcpy(copy, text, n_bytes);
    uint32_t character;
    for (char *at = copy; *at;) {
        size_t n = decode_character(at, &character);
        uint32_t small = lower(character);
        if (small != character && n == 1) {
            at[0] = (char)small;
        } else if (small != character) { /* two bytes, as all that lower() changes beyond ASCII */
            at[0] = (char)(0xC0 | small >> 6);
            at[1] = (char)(0x80 | (small & 0x3F));
        }
        at += n;
    }
    return copy;
}

const char *next_word(const char **text, size_t *n_bytes)
{
    const char *begin = NULL;
    const char *at = *text;
    while (*at) {
        uint32_t character;
        size_t n = decode_character(at, &character);
        bool inside = is_word(character);
        if (begin && !inside) break;
        if (!begin && inside) begin = at;
        at += n;
    }
    *text = at;
    *n_bytes = begin ? (size_t)(at - begin) : 0;
    return begin;
}

bool bytes_equal(const char *bytes, size_t n_bytes, const char *text)
{
    return n_bytes == strlen(text) && memcmp(bytes, text, n_bytes) == 0;
}

/* ---- Words ----------------------------------------------------------------------- */

void words_free(struct words *words)
{
    free(words->word);
    free(words->text);
    memset(words, 0, sizeof *words);
}

void words_add(struct words *words, const char *bytes, size_t n_bytes, bool begins_sentence)
{
    if (words->n_words == words->capacity) {
        size_t capacity = words->capacity ? words->capacity * 2 : 64;
        bool fits = capacity <= SIZE_MAX / sizeof *words->word;
        struct word *larger = fits ? realloc(words->word, capacity * sizeof *larger) : NULL;
        if (!larger) die("out of memory");
        words->word = larger;
        words->capacity = capacity;
    }
    words->word[words->n_words++] = (struct word){bytes, n_bytes, 0, begins_sentence};
}

void split_words(struct words *words, const char *text, const char *end, size_t max_words)
{
    const char *begin = NULL;
    while (text < end && words->n_words < max_words) {
        uint32_t character;
        size_t n = decode_character(text, &character);
        bool space = is_space(character);
        if (begin && space) {
            words_add(words, begin, (size_t)(text - begin), false);
            begin = NULL;
        } else if (!begin && !space) {
            begin = text;
        }
        text += n;
    }
    if (begin && words->n_words < max_words) words_add(words, begin, (size_t)(end - begin), false);
}

struct words normalised_words(const char *text)
{
    struct words words = {.text = lower_text(text)};
    char *end = words.text;
    for (const char *at = words.text; *at; at++)
        if (!is_punctuation((unsigned char)*at)) *end++ = *at;
    *end = '\0';
    const char *at = words.text, *word;
    size_t n_bytes;
    while ((word = next_word(&at, &n_bytes)) != NULL)
        if (bytes_equal(word, n_bytes, "a") || bytes_equal(word, n_bytes, "an") || bytes_equal(word, n_bytes, "the"))
            memset(words.text + (word - words.text), ' ', n_bytes);
    split_words(&words, words.text, end, SIZE_MAX);
    return words;
}

static int compare_words(const void *a, const void *b)
{
    const struct word *x = *(struct word *const *)a, *y = *(struct word *const *)b;
    if (x->n_bytes != y->n_bytes) return x->n_bytes < y->n_bytes ? -1 : 1;
    return memcmp(x->bytes, y->bytes, x->n_bytes);
}

size_t number_words(struct words *a, struct words *b)
{
    size_t n_words = a->n_words + b->n_words, n_ids = 0;
    struct word **sorted = allocate(n_words, sizeof *sorted);
    for (size_t i = 0; i < n_words; i++) sorted[i] = i < a->n_words ? &a->word[i] : &b->word[i - a->n_words];
    qsort(sorted, n_words, sizeof *sorted, compare_words);
    for (size_t i = 0; i < n_words; i++) {
        n_ids += i == 0 || compare_words(&sorted[i - 1], &sorted[i]) != 0;
        sorted[i]->id = (uint32_t)(n_ids - 1);
    }
    free(sorted);
    return n_ids;
}
