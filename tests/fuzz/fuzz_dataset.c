/* A data set of evaluation: the reader of JSON lines, and the scores of a reply to every question. */
#include "fuzz.h"
#include "common.h"
#include "eval_file.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static jmp_buf refused;

/* The program's way to refuse a file; the reader keeps what it holds in the document, which is released. */
void die(const char *format, ...)
{
    char message[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    longjmp(refused, 1);
}

enum { REPLY_BYTES = 200 };

/* The input itself is the reply: words of the references stand in it. */
static void score(const struct eval_question *question, const uint8_t *bytes, size_t n)
{
    char reply[REPLY_BYTES + 1];
    const size_t from = n > REPLY_BYTES ? n - REPLY_BYTES : 0;
    for (size_t i = from; i < n; i++)
        reply[i - from] = bytes[i] ? (char)bytes[i] : ' ';
    reply[n - from] = '\0';
    if (question->first_line)
        score_first_line(reply);
    const double value = score_answer(question->score, reply, question->references, question->n_references,
                                      question->classes, question->n_classes);
    if (!(value >= 0 && value <= 1))
        fuzz_fail("a score lies between 0 and 1", score_names[question->score]);
}

static void use(const struct eval_document *document, const uint8_t *bytes, size_t n)
{
    volatile size_t sum = strlen(document->text) + document->text_bytes + strlen(document->task);
    for (size_t i = 0; i < document->n_questions && i < 16; i++) {
        const struct eval_question *question = &document->questions[i];
        sum += strlen(question->text) + question->max_tokens;
        for (size_t j = 0; j < question->n_classes; j++)
            sum += strlen(question->classes[j]);
        score(question, bytes, n);
    }
    (void)sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    static const char prompts[] = "{\"qasper\":\"Read: {context}\\nNow: {input}\\nEnd\",\"lcc\":\"{input}{context}\","
                                  "\"trec\":\"{context}\",\"qmsum\":\"none\"}";
    static struct eval_file file; /* static: after longjmp() they have what they had */
    static struct eval_document document;
    memset(&document, 0, sizeof document);
    memset(&file, 0, sizeof file);
    if (!setjmp(refused)) {
        eval_open(&file, fuzz_file(bytes, n), NULL);
        if (n && bytes[0] == ' ') /* white space before a line is no part of it */
            file.prompts = json_loads(prompts, 0, NULL);
        while (eval_next(&file, &document)) {
            use(&document, bytes, n);
            eval_release(&document);
        }
    } else {
        eval_release(&document);
    }
    eval_close(&file);
    return 0;
}
