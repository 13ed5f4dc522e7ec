/* The one way in for text; intake.h describes it. */
#include "intake.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "file_kind.h"

static const char byte_order_mark[] = "\xef\xbb\xbf";
enum { MARK_BYTES = 3, LONGEST_NAME_IN_COMMAND = 200 };

/* ---- Characters -------------------------------------------------------------------------- */

/* Length of the valid UTF-8 sequence at p, 0 when there is none (Unicode 15, table 3-7). */
static size_t utf8_sequence(const unsigned char *p, size_t left)
{
    static const struct {
        unsigned char first_low, first_high, second_low, second_high;
        size_t length;
    } rows[] = {
        {0x00, 0x7f, 0, 0, 1},       {0xc2, 0xdf, 0x80, 0xbf, 2}, {0xe0, 0xe0, 0xa0, 0xbf, 3},
        {0xe1, 0xec, 0x80, 0xbf, 3}, {0xed, 0xed, 0x80, 0x9f, 3}, {0xee, 0xef, 0x80, 0xbf, 3},
        {0xf0, 0xf0, 0x90, 0xbf, 4}, {0xf1, 0xf3, 0x80, 0xbf, 4}, {0xf4, 0xf4, 0x80, 0x8f, 4},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (p[0] < rows[i].first_low || p[0] > rows[i].first_high) continue;
        if (rows[i].length > left) return 0;
        for (size_t j = 1; j < rows[i].length; j++) {
            const unsigned char low = j == 1 ? rows[i].second_low : 0x80, high = j == 1 ? rows[i].second_high : 0xbf;
            if (p[j] < low || p[j] > high) return 0;
        }
        return rows[i].length;
    }
    return 0;
}

static uint32_t code_point(const unsigned char *p, size_t length)
{
    static const unsigned char first_bits[] = {0, 0x7f, 0x1f, 0x0f, 0x07};
    uint32_t c = p[0] & first_bits[length];
    for (size_t i = 1; i < length; i++) c = c << 6 | (p[i] & 0x3f);
    return c;
}

/* White space, control characters, and what Unicode draws nothing for by itself: its Default_Ignorable_Code_Point, the
 * fillers, the blank of Braille, the null notehead, annotation marks, noncharacters. */
static bool is_invisible(uint32_t c)
{
    static const uint32_t ranges[][2] = {
        {0x0000, 0x0020},   {0x007f, 0x00a0},   {0x00ad, 0x00ad},   {0x034f, 0x034f},   {0x061c, 0x061c},
        {0x115f, 0x1160},   {0x1680, 0x1680},   {0x17b4, 0x17b5},   {0x180b, 0x180f},   {0x2000, 0x200f},
        {0x2028, 0x202f},   {0x205f, 0x206f},   {0x2800, 0x2800},   {0x3000, 0x3000},   {0x3164, 0x3164},
        {0xfdd0, 0xfdef},   {0xfe00, 0xfe0f},   {0xfeff, 0xfeff},   {0xffa0, 0xffa0},   {0xfff0, 0xfffb},
        {0x1bca0, 0x1bca3}, {0x1d159, 0x1d159}, {0x1d173, 0x1d17a}, {0xe0000, 0xe0fff},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges && c >= ranges[i][0]; i++)
        if (c <= ranges[i][1]) return true;
    return (c & 0xfffe) == 0xfffe;
}

static bool is_blank(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static bool is_marked(const char *text, size_t n_bytes)
{
    return n_bytes >= MARK_BYTES && memcmp(text, byte_order_mark, MARK_BYTES) == 0;
}

/* ---- Looking ------------------------------------------------------------------------------- */

struct findings {
    size_t first_nul, first_bad, first_control; /* offsets; SIZE_MAX: none */
    size_t n_bad, n_wide;                       /* bytes that are no UTF-8; characters of several bytes */
    size_t n_controls, n_solid; /* C0 characters that texts do not have, NUL among them; bytes but blanks and marks */
    bool undefined_in_1252, visible;
};

static bool is_strange_control(unsigned char byte)
{
    return byte < ' ' && !(byte >= '\b' && byte <= '\r') && byte != 0x1b;
}

static void look_at_bad_byte(struct findings *found, const unsigned char *p, size_t at)
{
    if (found->n_bad++ == 0) found->first_bad = at;
    if (p[at] == 0x81 || p[at] == 0x8d || p[at] == 0x8f || p[at] == 0x90 || p[at] == 0x9d)
        found->undefined_in_1252 = true;
}

static struct findings look(const unsigned char *p, size_t n_bytes)
{
    struct findings found = {.first_nul = SIZE_MAX, .first_bad = SIZE_MAX, .first_control = SIZE_MAX};
    for (size_t i = 0; i < n_bytes;) {
        const size_t n = utf8_sequence(p + i, n_bytes - i);
        if (!is_blank((char)p[i]) && !is_marked((const char *)p + i, n_bytes - i)) found.n_solid += n ? n : 1;
        if (n == 0) {
            look_at_bad_byte(&found, p, i++);
            continue;
        }
        if (p[i] == 0 && found.first_nul == SIZE_MAX) found.first_nul = i;
        if (is_strange_control(p[i]) && found.n_controls++ == 0) found.first_control = i;
        found.n_wide += n > 1;
        if (!found.visible) found.visible = !is_invisible(code_point(p + i, n));
        i += n;
    }
    return found;
}

/* ---- Refusing ------------------------------------------------------------------------------ */

/* "FILE", or the file's name where it is known and a message has room for it. */
static const char *name_in_command(const struct sqz_text_source *source)
{
    return source->file && strlen(source->file) <= LONGEST_NAME_IN_COMMAND ? source->file : "FILE";
}

static const char *then(const struct sqz_text_source *source)
{
    return source->then ? source->then : "";
}

static enum sqz_status refuse_kind(const struct sqz_file_kind *kind, const struct sqz_text_source *source,
                                   struct sqz_error *error)
{
    if (!kind->before)
        return sqz_error_set(error, SQZ_ERROR_TEXT, "%s is %s, not plain UTF-8 text%s%s", source->what, kind->name,
                             kind->after ? "; " : "", kind->after ? kind->after : "");
    return sqz_error_set(error, SQZ_ERROR_TEXT, "%s is %s, not plain UTF-8 text; convert it first: %s%s%s%s",
                         source->what, kind->name, kind->before, name_in_command(source), kind->after, then(source));
}

static bool is_mostly_binary(const struct findings *found)
{
    return 5 * found->n_controls > found->n_solid;
}

static enum sqz_status refuse_nul(const struct findings *found, const struct sqz_text_source *source,
                                  struct sqz_error *error)
{
    if (found->n_bad > 0 || is_mostly_binary(found))
        return sqz_error_set(error, SQZ_ERROR_TEXT,
                             "%s is binary data, not text: a NUL byte at offset %zu; what it is says: file %s",
                             source->what, found->first_nul, name_in_command(source));
    return sqz_error_set(error, SQZ_ERROR_TEXT,
                         "%s has a NUL byte at offset %zu, which no text has; with blanks in place of NULs: "
                         "tr '\\000' ' ' < %s%s",
                         source->what, found->first_nul, name_in_command(source), then(source));
}

/* Bytes that are not UTF-8: damaged UTF-8 where most of the others are, else an older encoding, and where most
 * characters are not ASCII, one that no default fits. */
static enum sqz_status refuse_bad(const struct findings *found, const unsigned char *p, size_t n_bytes,
                                  const struct sqz_text_source *source, struct sqz_error *error)
{
    const char *name = name_in_command(source);
    const char *from = found->n_wide > found->n_bad ? "UTF-8 -c" : "WINDOWS-1252", *why = "convert it first";
    if (found->n_wide > found->n_bad) {
        why = "without the bytes that are damaged";
    } else if (4 * found->n_bad > n_bytes) {
        from = "ENCODING";
        why = "convert it from its encoding (iconv -l lists those there are)";
    } else if (found->undefined_in_1252) {
        from = "ISO-8859-1";
    }
    return sqz_error_set(error, SQZ_ERROR_TEXT,
                         "%s is not UTF-8: byte 0x%02x at offset %zu; %s: iconv -f %s -t UTF-8 %s%s", source->what,
                         p[found->first_bad], found->first_bad, why, from, name, then(source));
}

/* What has no place at the start of a text. */
static size_t bytes_to_skip(const char *text, size_t n_bytes, enum sqz_text_role role)
{
    if (is_marked(text, n_bytes)) return MARK_BYTES;
    return role == SQZ_TEXT_QUESTION && n_bytes && is_blank(text[0]) ? 1 : 0;
}

/* Of a format or an encoding that is known, else NULL. */
static const struct sqz_file_kind *kind_of(const char *text, size_t n_bytes, const struct findings *found)
{
    const bool is_text = found->first_nul == SIZE_MAX && found->first_bad == SIZE_MAX;
    size_t begin = 0;
    for (size_t n = 1; n; begin += n) n = bytes_to_skip(text + begin, n_bytes - begin, SQZ_TEXT_QUESTION);
    const struct sqz_file_kind *kind = sqz_file_kind(text + begin, n_bytes - begin, is_text);
    return kind || (is_text && !is_mostly_binary(found)) ? kind : sqz_wide_text_kind(text, n_bytes);
}

/* The ratios that decide are those of bytes that no role cuts off, so what passed once passes again. */
static enum sqz_status check(const char *text, size_t n_bytes, const struct sqz_text_source *source,
                             struct sqz_error *error)
{
    const unsigned char *p = (const unsigned char *)text;
    const struct findings found = look(p, n_bytes);
    const struct sqz_file_kind *kind = kind_of(text, n_bytes, &found);
    if (kind) return refuse_kind(kind, source, error);
    if (found.first_nul != SIZE_MAX) return refuse_nul(&found, source, error);
    if (found.first_bad != SIZE_MAX) return refuse_bad(&found, p, n_bytes, source, error);
    if (!found.visible)
        return sqz_error_set(error, SQZ_ERROR_TEXT, "%s is empty: %zu bytes, no visible character", source->what,
                             n_bytes);
    if (is_mostly_binary(&found))
        return sqz_error_set(error, SQZ_ERROR_TEXT,
                             "%s is binary data, not text: a control character 0x%02x at offset %zu; what it is says: "
                             "file %s",
                             source->what, p[found.first_control], found.first_control, name_in_command(source));
    return SQZ_OK;
}

/* ---- One form ------------------------------------------------------------------------------ */

/* CR LF and CR as LF; returns the length. */
static size_t join_lines(char *text, size_t n_bytes)
{
    size_t n = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        if (text[i] == '\r' && i + 1 < n_bytes && text[i + 1] == '\n') continue;
        text[n++] = text[i] == '\r' ? '\n' : text[i];
    }
    return n;
}

enum sqz_status sqz_text_intake(char *text, size_t *n_bytes, enum sqz_text_role role,
                                const struct sqz_text_source *source, struct sqz_error *error)
{
    const enum sqz_status status = check(text, *n_bytes, source, error);
    if (status != SQZ_OK) return status;
    size_t begin = 0, end = *n_bytes;
    for (size_t n = 1; n; begin += n) n = bytes_to_skip(text + begin, end - begin, role);
    while (role == SQZ_TEXT_QUESTION && is_blank(text[end - 1])) end--;
    while (role == SQZ_TEXT_DOCUMENT && (text[end - 1] == '\n' || text[end - 1] == '\r')) end--;
    memmove(text, text + begin, end - begin);
    end = join_lines(text, end - begin);
    if (end < *n_bytes) text[end] = '\0';
    *n_bytes = end;
    return SQZ_OK;
}

enum sqz_status sqz_text_intake_copy(char **out, size_t *n_out, const char *text, size_t n_bytes,
                                     enum sqz_text_role role, const struct sqz_text_source *source,
                                     struct sqz_error *error)
{
    *out = NULL;
    *n_out = 0;
    char *copy = n_bytes < SIZE_MAX ? malloc(n_bytes + 1) : NULL;
    if (!copy) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a text of %zu bytes", n_bytes);
    if (n_bytes) memcpy(copy, text, n_bytes);
    copy[n_bytes] = '\0';
    const enum sqz_status status = sqz_text_intake(copy, &n_bytes, role, source, error);
    if (status != SQZ_OK) {
        free(copy);
        return status;
    }
    *out = copy;
    *n_out = n_bytes;
    return SQZ_OK;
}
