/*
 * Text that came from a file, made fit for a terminal. Names of models, of
 * documents and keys, and what a parser says of them, are printed in messages
 * and tables; none of it may move a cursor, hide what stands there, or turn the
 * reading order round.
 */
#ifndef SQZ_LIB_PLAIN_TEXT_H
#define SQZ_LIB_PLAIN_TEXT_H

#include <stdbool.h>
#include <stddef.h>

/* Bytes of the UTF-8 character at a text's beginning, 1 to 4; 0 where none begins (overlong forms and surrogates are
 * none). Reads no further than the first byte that cannot belong to it, so a NUL ends the text. */
size_t sqz_character_bytes(const char *text);

/* Whether a character of so many bytes is a control character (C0, DEL, C1), ends a line or paragraph (U+2028, U+2029),
 * or embeds, overrides or isolates a reading direction (U+202A to U+202E, U+2066 to U+2069). */
bool sqz_character_steers(const char *character, size_t n_bytes);

/* In place: white space becomes a blank, every other character that steers and every byte that is no UTF-8 a '?'. The
 * text never grows; plain text stays as it is. */
void sqz_plain_text(char *text);

#endif
