/* Text that comes in: the intake of documents and questions, the filter of what goes to a terminal, and what the system
 * says of the memory of control groups. */
#include "fuzz.h"
#include "common.h"
#include "intake.h"
#include "memory_limit.h"
#include "text_buffer.h"

#include <stdlib.h>
#include <string.h>

void die(const char *format, ...)
{
    fuzz_fail("the filter of text never gives up", format);
}

/* Pieces of the lengths that the input chooses give what the whole gives. */
static void filter(struct text_buffer *out, const uint8_t *bytes, size_t n, size_t step)
{
    struct text_filter state = {.n_held = 0};
    for (size_t i = 0; i < n; i += step)
        text_filter_put(&state, out, (const char *)bytes + i, n - i < step ? n - i : step);
    text_filter_end(&state, out);
}

/* What is let through is UTF-8 without control characters: a second pass changes nothing. */
static void check_filter(const uint8_t *bytes, size_t n)
{
    struct text_buffer whole = {0}, pieces = {0}, twice = {0};
    filter(&whole, bytes, n, n ? n : 1);
    filter(&pieces, bytes, n, n ? 1 + bytes[0] % 5u : 1);
    if (whole.n_bytes != pieces.n_bytes || (whole.n_bytes && memcmp(whole.text, pieces.text, whole.n_bytes)))
        fuzz_fail("pieces are filtered as the whole is", "they differ");
    filter(&twice, (const uint8_t *)whole.text, whole.n_bytes, whole.n_bytes ? whole.n_bytes : 1);
    if (twice.n_bytes != whole.n_bytes || (whole.n_bytes && memcmp(whole.text, twice.text, whole.n_bytes)))
        fuzz_fail("what was filtered is harmless", "it was changed again");
    text_buffer_free(&whole);
    text_buffer_free(&pieces);
    text_buffer_free(&twice);
}

/* As /proc/self/cgroup and the files that it leads to. */
static void check_limit(const uint8_t *bytes, size_t n)
{
    static uint64_t of_machine;
    if (!of_machine) {
        faults_system_files((const uint8_t *)"", 0);
        of_machine = sqz_memory_limit();
    }
    faults_system_files(bytes, n);
    const uint64_t limit = sqz_memory_limit();
    faults_end();
    if (limit > of_machine) fuzz_fail("a group has no more memory than its machine", "it has");
}

/* Text that the intake let through passes again and stays as it is; what it refuses it leaves as it was. */
static void check_intake(const uint8_t *bytes, size_t n, enum sqz_text_role role, const char *file)
{
    const struct sqz_text_source source = {"the document", file, file ? " | squeeze prepare -" : NULL};
    struct sqz_error error = {SQZ_OK, ""};
    size_t n_out = n, n_again;
    char *text = malloc(n + 1), *again = NULL; /* a NUL stands behind a text that shrank */
    if (!text) fuzz_fail("a target has memory", "a copy of the text");
    memcpy(text, bytes, n);
    if (sqz_text_intake(text, &n_out, role, &source, &error)) {
        if (!error.message[0] || n_out != n || memcmp(text, bytes, n))
            fuzz_fail("a text is refused with a reason and left alone", error.message);
    } else {
        if (n_out > n || memchr(text, '\r', n_out)) fuzz_fail("a text has one kind of new line", "it has another");
        if (sqz_text_intake_copy(&again, &n_again, text, n_out, role, &source, &error))
            fuzz_fail("what was taken in is taken in again", error.message);
        if (n_again != n_out || memcmp(again, text, n_out))
            fuzz_fail("what was taken in stays as it is", "it was changed again");
    }
    free(again);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    check_intake(bytes, n, SQZ_TEXT_PLAIN, NULL);
    check_intake(bytes, n, SQZ_TEXT_DOCUMENT, "a book.txt");
    check_intake(bytes, n, SQZ_TEXT_QUESTION, NULL);
    check_filter(bytes, n);
    check_limit(bytes, n);
    return 0;
}
