/* Text of files for a terminal; plain_text.h describes it. */
#include "plain_text.h"

#include <string.h>

static bool follows(unsigned char byte)
{
    return (byte & 0xc0) == 0x80;
}

size_t sqz_character_bytes(const char *text)
{
    const unsigned char *s = (const unsigned char *)text;
    const size_t n = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
    for (size_t i = 1; i < n; i++) {
        if (!follows(s[i])) return 0;
        if (i == 1 && ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
                       (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f)))
            return 0;
    }
    return n;
}

bool sqz_character_steers(const char *character, size_t n_bytes)
{
    const unsigned char *s = (const unsigned char *)character;
    if (n_bytes == 1) return s[0] < 0x20 || s[0] == 0x7f;
    if (n_bytes == 2) return s[0] == 0xc2 && s[1] < 0xa0;
    if (n_bytes != 3 || s[0] != 0xe2) return false;
    return (s[1] == 0x80 && s[2] >= 0xa8 && s[2] <= 0xae) || (s[1] == 0x81 && s[2] >= 0xa6 && s[2] <= 0xa9);
}

void sqz_plain_text(char *text)
{
    char *to = text;
    for (const char *from = text; *from;) {
        const size_t n = sqz_character_bytes(from);
        if (n == 0 || sqz_character_steers(from, n)) {
            *to++ = *from == '\n' || *from == '\t' || *from == '\r' ? ' ' : '?';
            from += n ? n : 1;
        } else {
            memmove(to, from, n);
            to += n;
            from += n;
        }
    }
    *to = '\0';
}
