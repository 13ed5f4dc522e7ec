/* Growing bytes, and UTF-8 in them; bytes.h describes them. */
#include "bytes.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool reserve(struct bytes *b, size_t more)
{
    if (b->failed || more > SIZE_MAX / 4 - b->n) return !(b->failed = true);
    if (b->n + more < b->capacity) return true;
    size_t capacity = b->capacity ? b->capacity : 64;
    while (capacity <= b->n + more) capacity *= 2;
    char *grown = realloc(b->data, capacity);
    if (!grown) return !(b->failed = true);
    b->data = grown;
    b->capacity = capacity;
    return true;
}

void bytes_append(struct bytes *b, const void *data, size_t n)
{
    if (!reserve(b, n)) return;
    if (n) memcpy(b->data + b->n, data, n);
    b->n += n;
    b->data[b->n] = '\0';
}

void bytes_put(struct bytes *b, const char *text)
{
    bytes_append(b, text, strlen(text));
}

void bytes_print(struct bytes *b, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    const int n = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    if (n < 0 || !reserve(b, (size_t)n + 1)) return;
    va_start(arguments, format);
    vsnprintf(b->data + b->n, (size_t)n + 1, format, arguments);
    va_end(arguments);
    b->n += (size_t)n;
}

void bytes_drop(struct bytes *b, size_t n)
{
    if (n >= b->n) n = b->n;
    if (n == 0) return;
    memmove(b->data, b->data + n, b->n - n + 1);
    b->n -= n;
}

void bytes_free(struct bytes *b)
{
    free(b->data);
    memset(b, 0, sizeof *b);
}

/* ---- UTF-8 ------------------------------------------------------------------------- */

/* Bytes that a character with this first byte has; 0: none begins so. */
static size_t announced(unsigned char first)
{
    if (first < 0x80) return 1;
    if (first >= 0xc2 && first < 0xe0) return 2;
    if (first >= 0xe0 && first < 0xf0) return 3;
    return first >= 0xf0 && first < 0xf5 ? 4 : 0;
}

/* Neither an overlong form, nor a surrogate, nor above U+10FFFF: decided by the second byte. */
static bool second_fits(unsigned char first, unsigned char second)
{
    if (second < 0x80 || second > 0xbf) return false;
    if (first == 0xe0) return second >= 0xa0;
    if (first == 0xed) return second < 0xa0;
    if (first == 0xf0) return second >= 0x90;
    return first != 0xf4 || second < 0x90;
}

/* How many of the bytes that are there fit a character that begins with the first. */
static size_t fitting(const char *data, size_t n)
{
    const unsigned char *u = (const unsigned char *)data;
    const size_t wanted = announced(u[0]);
    size_t have = 1;
    if (wanted < 2) return wanted;
    if (n > 1 && second_fits(u[0], u[1]))
        for (have = 2; have < wanted && have < n && (u[have] & 0xc0) == 0x80; have++) continue;
    return have;
}

size_t utf8_character(const char *data, size_t n)
{
    if (n == 0) return 0;
    const size_t wanted = announced((unsigned char)data[0]);
    return wanted && wanted <= n && fitting(data, n) == wanted ? wanted : 0;
}

size_t utf8_whole(const char *data, size_t n)
{
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        const char *at = data + n - back;
        const size_t wanted = announced((unsigned char)*at);
        if (((unsigned char)*at & 0xc0) == 0x80) continue;
        return wanted > back && fitting(at, back) == back ? n - back : n;
    }
    return n;
}

void bytes_append_utf8(struct bytes *b, const char *data, size_t n)
{
    for (size_t at = 0; at < n;) {
        const size_t good = utf8_character(data + at, n - at);
        if (good && data[at]) bytes_append(b, data + at, good);
        else bytes_put(b, "\xef\xbf\xbd");
        at += good ? good : 1;
    }
}
