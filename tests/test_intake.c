/*
 * The one way in for text: what is one text on every route, what is refused and by which name, that a text which passed
 * passes again unchanged, and that no bytes, cut anywhere, are read beyond their end (under SQUEEZE_SANITIZE).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "intake.h"

static const struct sqz_text_source source = {"in.txt", "in.txt", " | squeeze prepare - -o in.sqz.gguf"};

/* A copy of exactly n bytes on the heap: a sanitizer sees a read beyond it. */
static enum sqz_status take(const char *bytes, size_t n, enum sqz_text_role role, char **text, size_t *n_text,
                            struct sqz_error *error)
{
    char *exact = malloc(n ? n : 1);
    assert_non_null(exact);
    if (n) memcpy(exact, bytes, n);
    *n_text = n;
    *error = (struct sqz_error){0};
    const enum sqz_status status = sqz_text_intake(exact, n_text, role, &source, error);
    *text = exact;
    return status;
}

#define BYTES(literal)             literal, sizeof(literal) - 1
#define TAKES(role, given, wanted) takes(role, BYTES(given), BYTES(wanted), __LINE__)
#define REFUSES(given, ...)        refuses(BYTES(given), __LINE__, __VA_ARGS__, (const char *)NULL)

static void takes(enum sqz_text_role role, const char *given, size_t n_given, const char *wanted, size_t n_wanted,
                  int line)
{
    struct sqz_error error;
    char *text, *again;
    size_t n, n_again;
    if (take(given, n_given, role, &text, &n, &error) != SQZ_OK) fail_msg("line %d: refused: %s", line, error.message);
    if (n != n_wanted || memcmp(text, wanted, n) != 0) fail_msg("line %d: got %zu bytes: %.*s", line, n, (int)n, text);
    assert_int_equal(take(text, n, role, &again, &n_again, &error), SQZ_OK);
    if (n_again != n || memcmp(text, again, n) != 0) fail_msg("line %d: not the same a second time", line);
    free(text);
    free(again);
}

/* Refused with all the parts in its message, the bytes as they were, by each role. */
static void refuses(const char *given, size_t n_given, int line, ...)
{
    for (int role = SQZ_TEXT_PLAIN; role <= SQZ_TEXT_QUESTION; role++) {
        struct sqz_error error;
        char *text;
        size_t n;
        va_list parts;
        if (take(given, n_given, (enum sqz_text_role)role, &text, &n, &error) != SQZ_ERROR_TEXT)
            fail_msg("line %d: not refused", line);
        if (n != n_given || memcmp(text, given, n) != 0) fail_msg("line %d: changed", line);
        free(text);
        va_start(parts, line);
        for (const char *part; (part = va_arg(parts, const char *));)
            if (!strstr(error.message, part)) fail_msg("line %d: no '%s' in: %s", line, part, error.message);
        va_end(parts);
    }
}

static void test_one_form(void **state)
{
    (void)state;
    TAKES(SQZ_TEXT_QUESTION, "Who?", "Who?");
    TAKES(SQZ_TEXT_QUESTION, "Who?\n", "Who?");
    TAKES(SQZ_TEXT_QUESTION, "Who?\r\n", "Who?");
    TAKES(SQZ_TEXT_QUESTION, "\xef\xbb\xbf \n\xef\xbb\xbf\tWho?\r\n\r\n \f\v", "Who?");
    TAKES(SQZ_TEXT_QUESTION, "Who?\r\nAnd why?\rNow?", "Who?\nAnd why?\nNow?");
    TAKES(SQZ_TEXT_DOCUMENT, "\xef\xbb\xbf  One\r\n\r\n\r\r\ntwo \r\n\n\r", "  One\n\n\n\ntwo ");
    TAKES(SQZ_TEXT_PLAIN, "\xef\xbb\xbf\n One\r\n", "\n One\n");
    /* Inside, nothing else changes. */
    TAKES(SQZ_TEXT_QUESTION,
          "a\xef\xbb\xbf"
          "b\xc2\xa0\n\n c\x1b[0m\td",
          "a\xef\xbb\xbf"
          "b\xc2\xa0\n\n c\x1b[0m\td");
}

static void test_text_of_every_kind_passes(void **state)
{
    (void)state;
    TAKES(SQZ_TEXT_DOCUMENT, "<!DOCTYPE html><p>Who</p>", "<!DOCTYPE html><p>Who</p>");
    TAKES(SQZ_TEXT_DOCUMENT, "{\"a\": [1]}", "{\"a\": [1]}");
    TAKES(SQZ_TEXT_DOCUMENT, "int main(void) { return 0; }\n", "int main(void) { return 0; }");
    TAKES(SQZ_TEXT_DOCUMENT, "\xe6\x97\xa5\xe6\x9c\xac \xf0\x9f\x98\x80", "\xe6\x97\xa5\xe6\x9c\xac \xf0\x9f\x98\x80");
    /* Letters of a format are words where no format is behind them. */
    TAKES(SQZ_TEXT_QUESTION, "GGUF is what?", "GGUF is what?");
    TAKES(SQZ_TEXT_QUESTION, "GIF89a, BMP and RIFF", "GIF89a, BMP and RIFF");
    TAKES(SQZ_TEXT_QUESTION, "PK and MZ: who?", "PK and MZ: who?");
    TAKES(SQZ_TEXT_QUESTION, "x", "x");
    TAKES(SQZ_TEXT_QUESTION, "\xe2\x80\x8b.", "\xe2\x80\x8b.");
}

static void test_nothing_visible(void **state)
{
    (void)state;
    REFUSES("", "in.txt is empty: 0 bytes");
    REFUSES(" \t\r\n\v\f", "in.txt is empty: 6 bytes");
    REFUSES("\xef\xbb\xbf", "empty");
    REFUSES("\x01\x02\x1b\x7f", "empty");
    REFUSES("\xc2\x85\xc2\xa0\xc2\xad\xcd\x8f\xd8\x9c", "empty");         /* NEL, NBSP, soft hyphen, CGJ, ALM */
    REFUSES("\xe2\x80\x80\xe2\x80\x8a\xe2\x80\x8b\xe2\x80\x8d", "empty"); /* quads, zero width space and joiner */
    REFUSES("\xe2\x80\x8e\xe2\x80\xaf\xe2\x81\xa0\xe2\x81\xa6", "empty"); /* marks of direction, word joiner */
    REFUSES("\xe2\x80\xa8\xe2\x80\xa9\xe2\x81\x9f\xe3\x80\x80", "empty"); /* separators, wide blanks */
    REFUSES("\xe1\x85\x9f\xe1\x85\xa0\xe3\x85\xa4\xef\xbe\xa0", "empty"); /* Hangul fillers */
    REFUSES("\xe1\x9a\x80\xe1\x9e\xb4\xe1\xa0\x8e\xe2\xa0\x80", "empty"); /* Ogham, Khmer, Mongolian, Braille */
    REFUSES("\xef\xb8\x8f\xf3\xa0\x84\x80\xf3\xa0\x81\x81", "empty");     /* variation selectors, a tag */
    REFUSES("\xef\xbf\xb9\xef\xbf\xbe\xf0\x9f\xbf\xbf", "empty");         /* annotation, noncharacters */
}

static void test_not_utf8(void **state)
{
    (void)state;
    REFUSES("caf\xe9 au lait", "in.txt is not UTF-8: byte 0xe9 at offset 3",
            "iconv -f WINDOWS-1252 -t UTF-8 in.txt | squeeze prepare - -o in.sqz.gguf");
    REFUSES("une page \x90 au lait", "iconv -f ISO-8859-1 ");
    REFUSES("\xcf\xf0\xe8\xe2\xe5\xf2", "offset 0", "iconv -f ENCODING ", "iconv -l");
    REFUSES("caf\xc3\xa9 caf\xc3\xa9 caf\xc3", "offset 15", "iconv -f UTF-8 -c ");
    REFUSES("a\xc0\x80", "0xc0 at offset 1");
    REFUSES("a\xed\xa0\x80", "0xed at offset 1");
    REFUSES("Who delivers\0 to Basel?\n", "in.txt has a NUL byte at offset 12", "tr '\\000' ' ' < in.txt |");
    REFUSES("\0\0\0\0\0\0\0\0\0\0", "binary data", "offset 0", "file in.txt");
}

static void test_wide_text(void **state)
{
    (void)state;
    REFUSES("\xff\xfeW\0h\0o\0", "UTF-16", "iconv -f UTF-16 -t UTF-8 in.txt |");
    REFUSES("\xfe\xff\0W\0h\0o", "UTF-16", "iconv -f UTF-16 -t");
    REFUSES("W\0h\0o\0?\0\n\0", "UTF-16", "iconv -f UTF-16LE -t");
    REFUSES("\0W\0h\0o\0?\0\n", "UTF-16", "iconv -f UTF-16BE -t");
    REFUSES("W\0h\0o\0?\0\n", "UTF-16", "iconv -f UTF-16LE -t"); /* a line of it, cut inside the new line */
    REFUSES("\x1f\4@\4"
            "8\4"
            "2\4"
            "5\4B\4",
            "UTF-16", "UTF-16LE");                                                     /* Cyrillic: no zero byte */
    REFUSES("\xe5\x65\x2c\x67\x9e\x8a\x6e\x30\x87\x65\xf8\x76", "UTF-16", "UTF-16LE"); /* Japanese */
    REFUSES("\x65\xe5\x67\x2c\x8a\x9e\x30\x6e\x65\x87\x76\xf8", "UTF-16", "UTF-16BE");
    REFUSES("\xff\xfe\0\0W\0\0\0", "UTF-32", "iconv -f UTF-32 -t");
    REFUSES("\0\0\xfe\xff\0\0\0W", "UTF-32", "iconv -f UTF-32 -t");
    REFUSES("W\0\0\0h\0\0\0o\0\0\0", "UTF-32", "iconv -f UTF-32LE -t");
    REFUSES("\0\0\0W\0\0\0h\0\1\xf6\0", "UTF-32", "iconv -f UTF-32BE -t");
}

static void test_formats(void **state)
{
    (void)state;
    REFUSES("%PDF-1.4\n1 0 obj\n", "in.txt is a PDF file", "pdftotext in.txt - | squeeze prepare - -o in.sqz.gguf");
    REFUSES("\xef\xbb\xbf%PDF-1.4\n", "PDF");
    REFUSES("%!PS-Adobe-3.0\n", "PostScript");
    REFUSES("{\\rtf1\\ansi Who?}", "RTF", "unrtf");
    REFUSES("PK\3\4\24\0\0\0\10\0word/document.xml\0", "Word", "unzip -p in.txt word/document.xml |");
    REFUSES("PK\3\4\24\0\0\0\10\0xl/workbook.xml\0", "Excel", "unzip");
    REFUSES("PK\3\4\24\0\0\0\10\0ppt/presentation.xml\0", "PowerPoint", "unzip");
    REFUSES("PK\3\4\24\0\0\0\0\0mimetypeapplication/vnd.oasis.opendocument.text", "OpenDocument", "content.xml");
    REFUSES("PK\3\4\24\0\0\0\0\0mimetypeapplication/epub+zip", "EPUB", "unzip");
    REFUSES("PK\3\4\24\0\0\0\0\0a.txt", "ZIP", "unzip -p in.txt |");
    REFUSES("\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0", "old Word", "catdoc in.txt");
    REFUSES("\x1f\x8b\10\0\0", "gzip", "gzip -dc in.txt |");
    REFUSES("BZh91AY&SY\xee\1", "bzip2");
    REFUSES("\xfd"
            "7zXZ\0\0",
            "compressed by xz");
    REFUSES("\x28\xb5\x2f\xfd\4", "zstd");
    REFUSES("GGUF\3\0\0\0\0\0", "GGUF model", "-m");
    REFUSES("GGUF\3\0\0\0\0\0squeeze.model.fingerprint\0", "prepared context", "ask");
    REFUSES("SQLite format 3\0\20", "SQLite");
    REFUSES("PAR1\25\0\25", "Parquet");
    REFUSES("\x80\4\x95\0\0", "pickle");
    REFUSES("\x89PNG\r\n\x1a\n\0", "PNG");
    REFUSES("\xff\xd8\xff\xe0\0", "JPEG");
    REFUSES("GIF89a\1\0\1\0", "GIF");
    REFUSES("RIFF\x24\0\0\0WEBPVP8 ", "WebP");
    REFUSES("II*\0\10\0", "TIFF");
    REFUSES("\x7f"
            "ELF\2\1\1\0",
            "ELF");
}

static void test_tar(void **state)
{
    (void)state;
    char header[512] = "notes.txt", *text;
    struct sqz_error error;
    size_t n;
    memcpy(header + 257, "ustar", 5);
    assert_int_equal(take(header, sizeof header, SQZ_TEXT_DOCUMENT, &text, &n, &error), SQZ_ERROR_TEXT);
    assert_non_null(strstr(error.message, "a tar archive"));
    free(text);
}

static void test_commands_without_a_name(void **state)
{
    (void)state;
    char name[1000], text[] = "%PDF-1.4";
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    const struct sqz_text_source sources[] = {{"the question", NULL, NULL}, {"the question", name, NULL}};
    for (size_t i = 0; i < 2; i++) {
        struct sqz_error error = {0};
        size_t n = strlen(text);
        assert_int_equal(sqz_text_intake(text, &n, SQZ_TEXT_QUESTION, &sources[i], &error), SQZ_ERROR_TEXT);
        assert_string_equal(error.message, "the question is a PDF file, not plain UTF-8 text; convert it first: "
                                           "pdftotext FILE -");
    }
}

/* Any bytes: a status, no read beyond the end, and what passes passes again as it is. */
static void test_any_bytes(void **state)
{
    static const char pieces[][8] = {"\xef\xbb\xbf", "\r\n",         "\r",           "\n",   " ",      "W",
                                     "\xc3\xa9",     "\xe2\x80\x8b", "\xf0\x9f\x98", "\xff", "PK\3\4", "%PDF-",
                                     "GGUF",         "\x1f\x8b",     "ob",           "\t"};
    uint32_t random = 1;
    (void)state;
    for (int i = 0; i < 20000; i++) {
        char bytes[64], *text, *again;
        size_t n = 0, n_text, n_again;
        struct sqz_error error;
        while (n < 48 && (random = random * 1664525u + 1013904223u) >> 28 != 0) {
            const char *piece = pieces[random >> 16 & 15];
            const size_t length = random >> 20 & 7 ? strlen(piece) : 1 + strlen(piece) / 2;
            memcpy(bytes + n, piece, length);
            n += length;
        }
        const enum sqz_text_role role = (enum sqz_text_role)(i % 3);
        if (take(bytes, n, role, &text, &n_text, &error) == SQZ_OK) {
            assert_true(n_text > 0 && n_text <= n);
            if (take(text, n_text, role, &again, &n_again, &error) != SQZ_OK) fail_msg("refused: %s", error.message);
            assert_true(n_again == n_text && memcmp(again, text, n_text) == 0);
            free(again);
        } else {
            assert_true(error.status == SQZ_ERROR_TEXT && error.message[0]);
        }
        free(text);
    }
}

static void test_copy(void **state)
{
    (void)state;
    struct sqz_error error = {0};
    char *text;
    size_t n;
    assert_int_equal(sqz_text_intake_copy(&text, &n, "Who?\n", 5, SQZ_TEXT_QUESTION, &source, &error), SQZ_OK);
    assert_string_equal(text, "Who?");
    assert_int_equal(n, 4);
    free(text);
    assert_int_equal(sqz_text_intake_copy(&text, &n, "\n", 1, SQZ_TEXT_QUESTION, &source, &error), SQZ_ERROR_TEXT);
    assert_null(text);
    assert_int_equal(n, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_form),
        cmocka_unit_test(test_text_of_every_kind_passes),
        cmocka_unit_test(test_nothing_visible),
        cmocka_unit_test(test_not_utf8),
        cmocka_unit_test(test_wide_text),
        cmocka_unit_test(test_formats),
        cmocka_unit_test(test_tar),
        cmocka_unit_test(test_commands_without_a_name),
        cmocka_unit_test(test_any_bytes),
        cmocka_unit_test(test_copy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
