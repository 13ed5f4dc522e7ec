/* JSON lines with documents, questions and answers; eval_file.h describes them. */
#include "eval_file.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common.h"
#include "file_kind.h"
#include "inputs.h"
#include "intake.h"
#include "memory.h"

/* Documents of the longest evaluations have a few megabytes. */
static const size_t longest_line_bytes = (size_t)256 << 20;

enum { HEAD_BYTES = 1 << 16, LISTED = 20 };

/* ---- What is wrong ----------------------------------------------------------------------- */

/* Notes what is wrong with the line. Returns false. */
static bool wrong(struct eval_file *file, const char *format, ...) PRINTF_LIKE(2, 3);
static bool wrong(struct eval_file *file, const char *format, ...)
{
    struct text_filter filter = {0};
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    const int n = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    /* Words of the file are among it: nothing in them may steer the terminal. */
    text_filter_put(&filter, &file->problem, text, n < 0 ? 0 : strlen(text));
    text_filter_end(&filter, &file->problem);
    return false;
}

/* "COMMAND FILE >FILE.jsonl", with the names quoted for a shell; malloc'ed. */
static char *command_on(const char *before, const char *path, const char *after)
{
    struct text_buffer command = {0}, made = {0};
    text_buffer_append(&made, path, strlen(path));
    text_buffer_append(&made, ".jsonl", 6);
    text_buffer_append(&command, before, strlen(before));
    text_buffer_quote(&command, path);
    text_buffer_append(&command, after, strlen(after));
    text_buffer_append(&command, " >", 2);
    text_buffer_quote(&command, made.text);
    text_buffer_free(&made);
    return command.text;
}

static bool wrong_but(struct eval_file *file, const char *what, const char *before, const char *after)
{
    char *command = command_on(before, file->path, after);
    wrong(file, "%s: %s", what, command);
    free(command);
    return false;
}

/* ---- JSON -------------------------------------------------------------------------------- */

/* Python writes NaN, Infinity and -Infinity where a number is none, which is no JSON. No member that counts here is such
 * a number, so any number does in its place. Only outside of strings. */
static void replace_non_numbers(char *text, size_t n)
{
    static const char *const names[] = {"-Infinity", "Infinity", "NaN"};
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        if (in_string) {
            i += text[i] == '\\';
            in_string = i >= n || text[i] != '"' || text[i - 1] == '\\';
            continue;
        }
        in_string = text[i] == '"';
        for (size_t j = 0; j < sizeof names / sizeof *names; j++) {
            const size_t length = strlen(names[j]);
            if (n - i >= length && memcmp(text + i, names[j], length) == 0) {
                memset(text + i, ' ', length);
                memcpy(text + i, "0.0", 3);
            }
        }
    }
}

static bool spread_array(struct eval_file *file)
{
    file->hopeless = true;
    return wrong_but(file, "a JSON array; a document has to be an object on a line of its own", "jq -c '.[]' ", "");
}

/* "':' expected near '1'" and "invalid token near 'x'" as sentences. */
static void explain_syntax(struct eval_file *file, const char *text)
{
    static const char expected[] = " expected near ", token[] = "invalid token near ";
    const char *at = strstr(text, expected);
    if (memchr(file->buffer.text, '\0', file->buffer.n_bytes))
        wrong(file, "this is not JSON: there are NUL bytes in it");
    else if (at)
        wrong(file, "this is not JSON: %.*s is missing before %s", (int)(at - text), text, at + sizeof expected - 1);
    else if (strncmp(text, token, sizeof token - 1) == 0)
        wrong(file, "this is not JSON: %s has no place here", text + sizeof token - 1);
    else wrong(file, "this is not JSON: %s", text);
}

static void explain_json(struct eval_file *file, const json_error_t *error)
{
    const char *text = file->buffer.text + strspn(file->buffer.text, " \t\r");
    if (*text == '[') {
        spread_array(file);
        return;
    }
    file->hopeless = strlen(text) <= 2; /* "{" alone: an object over many lines */
    wrong(file, "column %d: ", error->column);
    switch (json_error_code(error)) {
    case json_error_premature_end_of_input:
        if (file->hopeless)
            wrong_but(file, "the line ends within its JSON; a document has to be on one line", "jq -c . ", "");
        else wrong(file, "the line ends within its JSON, as if it were cut off");
        break;
    case json_error_end_of_input_expected:
        wrong_but(file, "the JSON ends, but the line goes on; a document has to be on a line of its own", "jq -c . ",
                  "");
        break;
    case json_error_invalid_utf8:
        wrong_but(file, "not UTF-8; convert it first", "iconv -f WINDOWS-1252 -t UTF-8 ", "");
        break;
    case json_error_null_byte_in_key: wrong(file, "a member's name has a NUL (\\u0000) in it"); break;
    case json_error_numeric_overflow: wrong(file, "a number that is too large"); break;
    case json_error_stack_overflow: wrong(file, "lists or objects nested too deep"); break;
    default: explain_syntax(file, error->text);
    }
}

/* A byte order mark at the start of a file is no part of it. */
static void skip_mark(struct text_buffer *buffer)
{
    if (buffer->n_bytes >= 3 && memcmp(buffer->text, "\xef\xbb\xbf", 3) == 0) {
        buffer->n_bytes -= 3;
        memmove(buffer->text, buffer->text + 3, buffer->n_bytes + 1);
    }
}

/* The value of the line; NULL when it is no JSON. */
static json_t *load_json(struct eval_file *file)
{
    json_error_t error;
    replace_non_numbers(file->buffer.text, file->buffer.n_bytes);
    json_t *value = json_loadb(file->buffer.text, file->buffer.n_bytes, JSON_ALLOW_NUL | JSON_DECODE_ANY, &error);
    if (!value) explain_json(file, &error);
    return value;
}

/* ---- Lines ------------------------------------------------------------------------------- */

/* Compressed files, tables, UTF-16: named before they are taken for bad lines. */
static void refuse_other_kinds(const struct eval_file *file)
{
    char head[HEAD_BYTES];
    const size_t n = fread(head, 1, sizeof head, file->file);
    const struct sqz_file_kind *kind = sqz_file_kind(head, n, n > 0 && *head == '{');
    kind = kind ? kind : sqz_wide_text_kind(head, n);
    if (!kind && memchr(head, '\0', n)) {
        struct text_buffer quoted = {0};
        text_buffer_quote(&quoted, file->path);
        die("%s has NUL bytes, it is not lines of JSON; what it is says: file %s", file->path, quoted.text);
    }
    if (kind && kind->before) {
        char *command = command_on(kind->before, file->path, kind->after);
        die("%s is %s, not lines of JSON; convert it first: %s", file->path, kind->name, command);
    }
    if (kind) {
        die("%s is %s, not lines of JSON: {\"document\": ..., \"questions\": [...], \"answers\": [...]}", file->path,
            kind->name);
    }
}

/* A pipe is read once, and the file has to be checked before it is used. */
static void open_regular(struct eval_file *file)
{
    struct stat status;
    if (stat(file->path, &status) != 0) die("%s: %s", file->path, strerror(errno));
    if (S_ISDIR(status.st_mode)) die("%s: %s", file->path, strerror(EISDIR));
    if (!S_ISREG(status.st_mode))
        die("%s: a pipe or device is read once, a data set twice; write it into a file first", file->path);
    file->file = fopen(file->path, "rb");
    if (!file->file) die("%s: %s", file->path, strerror(errno));
    refuse_other_kinds(file);
    rewind(file->file);
}

static void read_prompts(struct eval_file *file, const char *path)
{
    size_t n;
    char *text = read_whole_file(path, &n);
    struct eval_file prompts = {.path = path, .buffer = {text, n, n + 1}};
    skip_mark(&prompts.buffer);
    file->prompts = load_json(&prompts);
    if (!json_is_object(file->prompts))
        die("%s: %s", path, file->prompts ? "must be a JSON object of prompts by dataset" : prompts.problem.text);
    text_buffer_free(&prompts.problem);
    text_buffer_free(&prompts.buffer);
}

void eval_open(struct eval_file *file, const char *path, const char *prompts)
{
    memset(file, 0, sizeof *file);
    file->path = path;
    if (prompts) read_prompts(file, prompts);
    open_regular(file);
}

/* Fills file->buffer with the next line; false at the end. */
static bool read_line(struct eval_file *file)
{
    char piece[1 << 14];
    bool any = false;
    file->buffer.n_bytes = 0;
    file->line++;
    for (;;) {
        size_t n = 0;
        int c = EOF;
        while (n < sizeof piece && (c = getc(file->file)) != EOF && c != '\n') piece[n++] = (char)c;
        any = any || n > 0 || c == '\n';
        text_buffer_append(&file->buffer, piece, n);
        if (file->buffer.n_bytes > longest_line_bytes)
            die("%s:%zu: a line of more than %zu MiB", file->path, file->line, longest_line_bytes >> 20);
        if (ferror(file->file)) die("%s: %s", file->path, strerror(errno));
        if (c == EOF && n < sizeof piece) return any;
        if (c == '\n') return true;
    }
}

/* ---- Members ------------------------------------------------------------------------- */

/* The string, NULL when it is none or has a NUL, which would end it; entry 0: the member itself. */
static const char *string_of(struct eval_file *file, const json_t *value, const char *name, size_t entry)
{
    char where[40] = "";
    if (entry) snprintf(where, sizeof where, ", entry %zu", entry);
    const char *text = json_string_value(value);
    if (!text) {
        wrong(file, "\"%s\"%s must be a text", name, where);
    } else if (strlen(text) != json_string_length(value)) {
        wrong(file, "\"%s\"%s has a NUL (\\u0000) at byte %zu, which no text has; with blanks in their place", name,
              where, strlen(text));
        wrong_but(file, "", "sed 's/\\\\u0000/ /g' ", "");
        return NULL;
    }
    return text;
}

static const char *text_member(struct eval_file *file, const json_t *root, const char *name, bool may_be_empty)
{
    const json_t *value = json_object_get(root, name);
    const char *text = string_of(file, value, name, 0);
    if (text && !*text && !may_be_empty) {
        wrong(file, "\"%s\" must be a text that is not empty", name);
        return NULL;
    }
    return text;
}

/* An array of strings that are not empty, or NULL. */
static const json_t *texts(struct eval_file *file, const json_t *root, const char *name)
{
    const json_t *array = json_object_get(root, name);
    if (!json_is_array(array) || json_array_size(array) == 0) {
        wrong(file, "\"%s\" must be a list of texts", name);
        return NULL;
    }
    for (size_t i = 0; i < json_array_size(array); i++) {
        const char *text = string_of(file, json_array_get(array, i), name, i + 1);
        if (text && !*text) wrong(file, "\"%s\", entry %zu: must be a text that is not empty", name, i + 1);
        if (!text || !*text) return NULL;
    }
    return array;
}

/* The strings of an array, or one string as an array of it. */
static const char **list_of(const json_t *value, size_t *n)
{
    *n = json_is_array(value) ? json_array_size(value) : 1;
    const char **list = allocate(*n, sizeof *list);
    for (size_t i = 0; i < *n; i++)
        list[i] = json_string_value(json_is_array(value) ? json_array_get(value, i) : value);
    return list;
}

static void take_questions(struct eval_document *document, size_t n)
{
    document->n_questions = n;
    document->questions = allocate(n, sizeof *document->questions);
}

static void set_score(struct eval_question *question, enum score_kind score, size_t max_tokens)
{
    question->score = score;
    question->max_tokens = max_tokens;
}

/* ---- The forms ------------------------------------------------------------------------- */

static bool parse_l_eval(struct eval_file *file, struct eval_document *document)
{
    const json_t *questions = texts(file, document->root, "instructions");
    const json_t *answers = questions ? texts(file, document->root, "outputs") : NULL;
    const char *evaluation = json_string_value(json_object_get(document->root, "evaluation"));
    if (!answers) return false;
    document->text = json_string_value(json_object_get(document->root, "input"));
    if (json_array_size(answers) != json_array_size(questions)) {
        return wrong(file, "%zu \"instructions\" but %zu \"outputs\"; there must be one answer a question",
                     json_array_size(questions), json_array_size(answers));
    }
    take_questions(document, json_array_size(questions));
    for (size_t i = 0; i < document->n_questions; i++) {
        struct eval_question *question = &document->questions[i];
        question->text = json_string_value(json_array_get(questions, i));
        question->references = list_of(json_array_get(answers, i), &question->n_references);
        if (evaluation && strcmp(evaluation, "exam") == 0) set_score(question, SCORE_EXAM, 32);
        else if (evaluation && strcmp(evaluation, "rouge") == 0) set_score(question, SCORE_ROUGE_L, 256);
        else set_score(question, SCORE_F1, 64);
    }
    return true;
}

/* LongBench's English and code datasets: how a reply is judged and how long it may be (arXiv 2308.14508, appendix). */
static const struct dataset {
    const char *name;
    enum score_kind score;
    size_t max_tokens;
    bool first_line;
} datasets[] = {
    {"narrativeqa", SCORE_F1, 128, false},
    {"qasper", SCORE_F1, 128, false},
    {"multifieldqa_en", SCORE_F1, 64, false},
    {"hotpotqa", SCORE_F1, 32, false},
    {"2wikimqa", SCORE_F1, 32, false},
    {"musique", SCORE_F1, 32, false},
    {"gov_report", SCORE_ROUGE_L, 512, false},
    {"qmsum", SCORE_ROUGE_L, 512, false},
    {"multi_news", SCORE_ROUGE_L, 512, false},
    {"trec", SCORE_CLASSIFICATION, 64, true},
    {"triviaqa", SCORE_F1, 32, true},
    {"samsum", SCORE_ROUGE_L, 128, true},
    {"passage_count", SCORE_COUNT, 32, false},
    {"passage_retrieval_en", SCORE_RETRIEVAL, 32, false},
    {"lcc", SCORE_CODE, 64, false},
    {"repobench-p", SCORE_CODE, 64, false},
};

/* What stands between begin and end with `name` replaced by `with`, once; malloc'ed. */
static char *fill(const char *begin, const char *end, const char *name, const char *with)
{
    struct text_buffer text = {0};
    const char *at = strstr(begin, name);
    if (!at || at >= end) {
        text_buffer_append(&text, begin, (size_t)(end - begin));
    } else {
        text_buffer_append(&text, begin, (size_t)(at - begin));
        text_buffer_append(&text, with, strlen(with));
        text_buffer_append(&text, at + strlen(name), (size_t)(end - at) - strlen(name));
    }
    return text.text ? text.text : allocate(1, 1);
}

/* Keeps a malloc'ed text with the document. */
static char *own(struct eval_document *document, char *text)
{
    document->owned = realloc(document->owned, (document->n_owned + 1) * sizeof *document->owned);
    if (!document->owned) die("out of memory");
    document->owned[document->n_owned++] = text;
    return text;
}

/* Puts context and input into the dataset's prompt: the document goes up to the end of the context. */
static bool apply_prompt(struct eval_file *file, struct eval_document *document, const char *prompt)
{
    struct eval_question *question = &document->questions[0];
    const char *context = "{context}", *at = strstr(prompt, context);
    if (!at) return wrong(file, "the prompt of %s has no {context}", document->task);
    const char *behind = at + strlen(context);
    document->text = own(document, fill(prompt, behind, context, document->text));
    question->text = own(document, fill(behind, behind + strlen(behind), "{input}", question->text));
    return true;
}

static bool parse_longbench(struct eval_file *file, struct eval_document *document)
{
    const json_t *classes = json_object_get(document->root, "all_classes");
    const char *dataset = json_string_value(json_object_get(document->root, "dataset"));
    document->text = text_member(file, document->root, "context", false);
    take_questions(document, 1);
    struct eval_question *question = &document->questions[0];
    question->text = document->text ? text_member(file, document->root, "input", true) : NULL;
    const json_t *answers = question->text ? texts(file, document->root, "answers") : NULL;
    if (!answers) return false;
    question->references = list_of(answers, &question->n_references);
    if (json_is_array(classes) && json_array_size(classes) > 0) {
        if (!texts(file, document->root, "all_classes")) return false;
        question->classes = list_of(classes, &question->n_classes);
    }
    if (dataset) snprintf(document->task, sizeof document->task, "%s", dataset);
    set_score(question, SCORE_F1, 64);
    for (size_t i = 0; dataset && i < sizeof datasets / sizeof *datasets; i++) {
        const size_t n = strlen(datasets[i].name); /* LongBench-E has names with "_e" behind */
        if (strncmp(dataset, datasets[i].name, n) == 0 && (!dataset[n] || strcmp(dataset + n, "_e") == 0)) {
            set_score(question, datasets[i].score, datasets[i].max_tokens);
            question->first_line = datasets[i].first_line;
        }
    }
    if (question->score == SCORE_CLASSIFICATION && question->n_classes == 0)
        return wrong(file, "\"all_classes\" must be a list of texts for %s", dataset);
    if (file->prompts && json_is_string(json_object_get(file->prompts, document->task)))
        return apply_prompt(file, document, json_string_value(json_object_get(file->prompts, document->task)));
    if (question->text[0] == '\0') {
        question->text =
            question->score == SCORE_CODE ? "Continue the code above with its next line." : "Summarize the text above.";
    }
    return true;
}

static bool parse_ruler(struct eval_file *file, struct eval_document *document)
{
    const char *input = text_member(file, document->root, "input", false);
    const json_t *outputs = input ? texts(file, document->root, "outputs") : NULL;
    if (!outputs) return false;
    size_t n = strlen(input);
    while (n > 0 && strchr(" \t\r\n", input[n - 1])) n--;
    size_t split = n;
    while (split > 0 && input[split - 1] != '\n') split--;
    if (split == 0) return wrong(file, "\"input\" must end with a question in a paragraph of its own");
    char *text = own(document, allocate(split + 1, 1)), *question = own(document, allocate(n - split + 1, 1));
    document->text = memcpy(text, input, split);
    take_questions(document, 1);
    document->questions[0].text = memcpy(question, input + split, n - split);
    document->questions[0].references = list_of(outputs, &document->questions[0].n_references);
    set_score(&document->questions[0], SCORE_ALL_STRINGS, 128);
    return true;
}

/* One of score_names that needs no classes; N_SCORES: none. */
static enum score_kind score_of(const json_t *name)
{
    enum score_kind kind = SCORE_F1;
    while (name && kind < N_SCORES && (!json_is_string(name) || strcmp(json_string_value(name), score_names[kind])))
        kind++;
    return kind == SCORE_CLASSIFICATION ? N_SCORES : kind;
}

/* A text or a list of texts, empty ones among them. */
static bool is_answer(struct eval_file *file, const json_t *answer, size_t entry)
{
    const size_t n = json_is_array(answer) ? json_array_size(answer) : 1;
    bool usable = n > 0;
    for (size_t i = 0; i < n && usable; i++) {
        const json_t *text = json_is_array(answer) ? json_array_get(answer, i) : answer;
        usable = json_is_string(text);
        if (usable && !string_of(file, text, "answers", entry)) return false;
    }
    return usable || wrong(file, "\"answers\", entry %zu: must be a text or a list of texts", entry);
}

static bool parse_plain(struct eval_file *file, struct eval_document *document)
{
    const json_t *answers = json_object_get(document->root, "answers");
    const json_t *max_tokens = json_object_get(document->root, "max_tokens");
    const enum score_kind kind = score_of(json_object_get(document->root, "score"));
    document->text = text_member(file, document->root, "document", false);
    const json_t *questions = document->text ? texts(file, document->root, "questions") : NULL;
    if (!questions) return false;
    if (json_array_size(answers) != json_array_size(questions)) {
        return wrong(file, "\"answers\" must be a list with one entry for each of %zu \"questions\"",
                     json_array_size(questions));
    }
    if (kind == N_SCORES) {
        return wrong(file, "\"score\" must be one of f1, rouge_l, exact, exam, code, retrieval, count, all_strings, "
                           "any_string");
    }
    if (max_tokens && (!json_is_integer(max_tokens) || json_integer_value(max_tokens) < 1))
        return wrong(file, "\"max_tokens\" must be a whole number of at least 1");
    take_questions(document, json_array_size(questions));
    for (size_t i = 0; i < document->n_questions; i++) {
        struct eval_question *question = &document->questions[i];
        const json_t *answer = json_array_get(answers, i);
        if (!is_answer(file, answer, i + 1)) return false;
        question->text = json_string_value(json_array_get(questions, i));
        question->references = list_of(answer, &question->n_references);
        set_score(question, kind, max_tokens ? (size_t)json_integer_value(max_tokens) : 64);
    }
    return true;
}

/* The text in the one form that all texts have, kept with the document; NULL when it cannot be one. */
static const char *take_text(struct eval_file *file, struct eval_document *document, const char *text,
                             enum sqz_text_role role, const char *what)
{
    struct sqz_error error = {0};
    const struct sqz_text_source source = {.what = what};
    char *taken;
    size_t n;
    if (sqz_text_intake_copy(&taken, &n, text, strlen(text), role, &source, &error) != SQZ_OK) {
        wrong(file, "%s", error.message);
        return NULL;
    }
    return own(document, taken);
}

static bool take_texts(struct eval_file *file, struct eval_document *document)
{
    document->text = take_text(file, document, document->text, SQZ_TEXT_DOCUMENT, "the document");
    for (size_t i = 0; i < document->n_questions && document->text; i++) {
        char what[32];
        snprintf(what, sizeof what, "question %zu", i + 1);
        document->questions[i].text = take_text(file, document, document->questions[i].text, SQZ_TEXT_QUESTION, what);
        if (!document->questions[i].text) return false;
    }
    return document->text != NULL;
}

static bool has(const struct eval_document *document, const char *name)
{
    return json_object_get(document->root, name) != NULL;
}

/* A line that is JSON but no object. */
static bool not_an_object(struct eval_file *file, const json_t *value)
{
    if (json_is_array(value)) return spread_array(file);
    return wrong(file, "must be a JSON object: {\"document\": ..., \"questions\": [...], \"answers\": [...]}");
}

static bool unknown_form(struct eval_file *file, const struct eval_document *document)
{
    struct text_buffer found = {0};
    const char *name;
    json_t *value;
    json_object_foreach(document->root, name, value)
    {
        text_buffer_print(&found, "%s\"%.40s\"", found.n_bytes ? ", " : "", name);
    }
    wrong(file,
          "no document: wanted are \"document\", \"questions\" and \"answers\", or the members of L-Eval, LongBench "
          "or RULER; found: %s",
          found.text ? found.text : "none");
    text_buffer_free(&found);
    return false;
}

static bool parse_form(struct eval_file *file, struct eval_document *document)
{
    if (has(document, "document")) return parse_plain(file, document);
    if (has(document, "context")) return parse_longbench(file, document);
    if (has(document, "outputs") && has(document, "index") && !has(document, "instructions"))
        return parse_ruler(file, document);
    if (!has(document, "input") && !has(document, "instructions")) return unknown_form(file, document);
    return text_member(file, document->root, "input", false) && parse_l_eval(file, document);
}

static bool parse_document(struct eval_file *file, struct eval_document *document)
{
    document->root = load_json(file);
    if (!document->root) return false;
    if (!json_is_object(document->root)) return not_an_object(file, document->root);
    const char *slash = strrchr(file->path, '/'), *name = slash ? slash + 1 : file->path;
    snprintf(document->task, sizeof document->task, "%.*s", (int)strcspn(name, "."), name);
    if (!parse_form(file, document) || !take_texts(file, document)) return false;
    document->text_bytes = strlen(document->text);
    return true;
}

enum eval_line eval_next(struct eval_file *file, struct eval_document *document)
{
    memset(document, 0, sizeof *document);
    text_buffer_free(&file->problem);
    while (!file->hopeless && read_line(file)) {
        if (file->line == 1) skip_mark(&file->buffer);
        if (file->buffer.n_bytes > 0 && strspn(file->buffer.text, " \t\r") < file->buffer.n_bytes) {
            if (parse_document(file, document)) {
                document->path = file->path;
                document->line = file->line;
                return EVAL_DOCUMENT;
            }
            eval_release(document);
            return EVAL_BAD;
        }
    }
    return EVAL_END;
}

size_t eval_check(const char *path, const char *prompts, size_t *n_bad)
{
    struct eval_file file;
    struct eval_document document;
    struct text_buffer without = {0};
    enum eval_line line;
    size_t n = 0, bad = 0;
    eval_open(&file, path, prompts);
    while ((line = eval_next(&file, &document)) != EVAL_END) {
        n += line == EVAL_DOCUMENT;
        bad += line == EVAL_BAD;
        if (line == EVAL_BAD && ++*n_bad <= LISTED) {
            warn("%s:%zu: %s", path, file.line, file.problem.text);
            text_buffer_print(&without, "-e %zud ", file.line);
        }
        eval_release(&document);
    }
    if (n > 0 && bad > 0 && *n_bad <= LISTED) {
        char *command = command_on("", path, "");
        warn("%s: without what is wrong: sed %s%s", path, without.text, command);
        free(command);
    }
    text_buffer_free(&without);
    eval_close(&file);
    return n;
}

void eval_stop_on_bad(size_t n_bad)
{
    if (n_bad > LISTED) die("%zu lines are wrong, %d of them are listed; nothing was measured", n_bad, LISTED);
    if (n_bad > 0) die("%zu line%s wrong; nothing was measured", n_bad, n_bad == 1 ? " is" : "s are");
}

void eval_release(struct eval_document *document)
{
    for (size_t i = 0; i < document->n_questions; i++) {
        free(document->questions[i].references);
        free(document->questions[i].classes);
    }
    free(document->questions);
    for (size_t i = 0; i < document->n_owned; i++) free(document->owned[i]);
    free(document->owned);
    json_decref(document->root);
    memset(document, 0, sizeof *document);
}

void eval_close(struct eval_file *file)
{
    fclose(file->file);
    json_decref(file->prompts);
    text_buffer_free(&file->buffer);
    text_buffer_free(&file->problem);
}
