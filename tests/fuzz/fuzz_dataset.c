/* A data set of evaluation: the reader of JSON lines, and the scores of a reply to every question. */
#include "fuzz.h"
#include "common.h"
#include "eval_file.h"
#include "inputs.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static jmp_buf refused;

/* The program's way to refuse a whole file. */
void die(const char *format, ...)
{
    char message[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    longjmp(refused, 1);
}

void warn(const char *format, ...)
{
    (void)format;
}

/* Of files of prompts, which are not read here. */
char *read_whole_file(const char *path, size_t *n_bytes)
{
    *n_bytes = 0;
    fuzz_fail("a data set is one file", path);
}

/* AddressSanitizer's, where it is: what die() leaves behind when it ends the program is no leak. */
__attribute__((weak)) void __lsan_disable(void);
__attribute__((weak)) void __lsan_enable(void);

enum { REPLY_BYTES = 200 };

/* The input itself is the reply: words of the references stand in it. */
static void score(const struct eval_question *question, const uint8_t *bytes, size_t n)
{
    char reply[REPLY_BYTES + 1];
    const size_t from = n > REPLY_BYTES ? n - REPLY_BYTES : 0;
    for (size_t i = from; i < n; i++) reply[i - from] = bytes[i] ? (char)bytes[i] : ' ';
    reply[n - from] = '\0';
    if (question->first_line) score_first_line(reply);
    const double value = score_answer(question->score, reply, question->references, question->n_references,
                                      question->classes, question->n_classes);
    if (!(value >= 0 && value <= 1)) fuzz_fail("a score lies between 0 and 1", score_names[question->score]);
}

static void use(const struct eval_document *document, const uint8_t *bytes, size_t n)
{
    volatile size_t sum = strlen(document->text) + document->text_bytes + strlen(document->task);
    for (size_t i = 0; i < document->n_questions && i < 16; i++) {
        const struct eval_question *question = &document->questions[i];
        sum += strlen(question->text) + question->max_tokens;
        for (size_t j = 0; j < question->n_classes; j++) sum += strlen(question->classes[j]);
        score(question, bytes, n);
    }
    (void)sum;
}

static void read_all(struct eval_file *file, const uint8_t *bytes, size_t n)
{
    struct eval_document document;
    enum eval_line line;
    while ((line = eval_next(file, &document)) != EVAL_END) {
        if (line == EVAL_BAD && !file->problem.n_bytes) fuzz_fail("a bad line is told with a reason", "there is none");
        if (line == EVAL_DOCUMENT) use(&document, bytes, n);
        eval_release(&document);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    static const char prompts[] = "{\"qasper\":\"Read: {context}\\nNow: {input}\\nEnd\",\"lcc\":\"{input}{context}\","
                                  "\"trec\":\"{context}\",\"qmsum\":\"none\"}";
    static struct eval_file file; /* static: after longjmp() it has what it had */
    static bool opened;
    memset(&file, 0, sizeof file);
    opened = false;
    if (__lsan_disable) __lsan_disable();
    if (!setjmp(refused)) {
        eval_open(&file, fuzz_file(bytes, n), NULL);
        opened = true;
    }
    if (__lsan_enable) __lsan_enable();
    if (opened && n && bytes[0] == ' ') /* white space before a line is no part of it */
        file.prompts = json_loads(prompts, 0, NULL);
    if (opened && !setjmp(refused)) read_all(&file, bytes, n);
    if (file.file) eval_close(&file);
    return 0;
}
