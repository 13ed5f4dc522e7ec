/* Text that arrives in pieces; text_buffer.h describes it. */
#include "text_buffer.h"
#include "plain_text.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void text_buffer_append(struct text_buffer *buffer, const char *bytes, size_t n)
{
    if (n >= SIZE_MAX / 2 - buffer->n_bytes) die("out of memory");
    if (buffer->n_bytes + n + 1 > buffer->capacity) {
        size_t capacity = (buffer->n_bytes + n + 1) * 2;
        char *text = realloc(buffer->text, capacity);
        if (!text) die("out of memory");
        buffer->text = text;
        buffer->capacity = capacity;
    }
    memcpy(buffer->text + buffer->n_bytes, bytes, n);
    buffer->n_bytes += n;
    buffer->text[buffer->n_bytes] = '\0';
}

void text_buffer_print(struct text_buffer *buffer, const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (n > 0) text_buffer_append(buffer, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
}

void text_buffer_quote(struct text_buffer *buffer, const char *word)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-+,:@%";
    const char *dash = *word == '-' ? "./" : ""; /* or it would be an option */
    text_buffer_append(buffer, dash, strlen(dash));
    if (*word && strspn(word, plain) == strlen(word)) {
        text_buffer_append(buffer, word, strlen(word));
        return;
    }
    text_buffer_append(buffer, "'", 1);
    for (; *word; word++) text_buffer_append(buffer, *word == '\'' ? "'\\''" : word, *word == '\'' ? 4 : 1);
    text_buffer_append(buffer, "'", 1);
}

void text_buffer_free(struct text_buffer *buffer)
{
    free(buffer->text);
    memset(buffer, 0, sizeof *buffer);
}

/* Bytes of the character that begins with `first`; 0: nothing begins so. */
static size_t character_bytes(unsigned char first)
{
    return first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
}

/* Whether the n bytes can begin a character: right continuation bytes, no overlong form, no surrogate. */
static bool can_be_character(const unsigned char *s, size_t n)
{
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return false;
    if (n < 2) return true;
    return !(s[0] == 0xe0 && s[1] < 0xa0) && !(s[0] == 0xed && s[1] > 0x9f) && !(s[0] == 0xf0 && s[1] < 0x90) &&
           !(s[0] == 0xf4 && s[1] > 0x8f);
}

/* Lines and tabs belong to a text; whatever else steers a terminal does not. */
static bool is_control(const unsigned char *s, size_t n)
{
    return s[0] != '\n' && s[0] != '\t' && sqz_character_steers((const char *)s, n);
}

static void put_replacement(struct text_buffer *buffer)
{
    text_buffer_append(buffer, "\xef\xbf\xbd", 3);
}

void text_filter_put(struct text_filter *filter, struct text_buffer *buffer, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char byte = (unsigned char)bytes[i];
        filter->held[filter->n_held] = byte;
        if (filter->n_held > 0 && !can_be_character(filter->held, filter->n_held + 1)) {
            put_replacement(buffer);
            filter->held[0] = byte;
            filter->n_held = 0;
        }
        filter->n_held++;
        size_t wanted = character_bytes(filter->held[0]);
        if (wanted == 0 || (wanted == filter->n_held && is_control(filter->held, wanted))) {
            put_replacement(buffer);
            filter->n_held = 0;
        } else if (wanted == filter->n_held) {
            text_buffer_append(buffer, (const char *)filter->held, wanted);
            filter->n_held = 0;
        }
    }
}

void text_filter_end(struct text_filter *filter, struct text_buffer *buffer)
{
    if (filter->n_held > 0) {
        put_replacement(buffer);
        filter->n_held = 0;
    }
}
