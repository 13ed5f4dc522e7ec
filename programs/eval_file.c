/* JSON lines with documents, questions and answers; eval_file.h describes them. */
#include "eval_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "memory.h"

/* Documents of the longest evaluations have a few megabytes. */
static const size_t longest_line_bytes = (size_t)256 << 20;

void eval_open(struct eval_file *file, const char *path, const char *prompts)
{
    memset(file, 0, sizeof *file);
    if (prompts) {
        json_error_t error;
        file->prompts = json_load_file(prompts, 0, &error);
        if (!json_is_object(file->prompts)) {
            die("%s: %s", prompts, file->prompts ? "must be a JSON object of prompts by dataset" : error.text);
        }
    }
    file->path = path;
    file->file = fopen(path, "rb");
    if (!file->file) {
        die("%s: %s", path, strerror(errno));
    }
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
        while (n < sizeof piece && (c = getc(file->file)) != EOF && c != '\n') {
            piece[n++] = (char)c;
        }
        any = any || n > 0 || c == '\n';
        text_buffer_append(&file->buffer, piece, n);
        if (file->buffer.n_bytes > longest_line_bytes) {
            die("%s:%zu: a line of more than %zu MiB", file->path, file->line, longest_line_bytes >> 20);
        }
        if (ferror(file->file)) {
            die("%s: %s", file->path, strerror(errno));
        }
        if (c == EOF && n < sizeof piece) {
            return any;
        }
        if (c == '\n') {
            return true;
        }
    }
}

/* ---- Members ------------------------------------------------------------------------- */

static const char *text_member(const struct eval_file *file, const json_t *root, const char *name, bool may_be_empty)
{
    const json_t *text = json_object_get(root, name);
    if (!json_is_string(text) || (json_string_length(text) == 0 && !may_be_empty)) {
        die("%s:%zu: \"%s\" must be a text%s", file->path, file->line, name,
            may_be_empty ? "" : " that is not empty");
    }
    return json_string_value(text);
}

/* An array of strings that are not empty. */
static const json_t *texts(const struct eval_file *file, const json_t *root, const char *name)
{
    const json_t *array = json_object_get(root, name);
    if (!json_is_array(array) || json_array_size(array) == 0) {
        die("%s:%zu: \"%s\" must be a list of texts", file->path, file->line, name);
    }
    for (size_t i = 0; i < json_array_size(array); i++) {
        const json_t *text = json_array_get(array, i);
        if (!json_is_string(text) || json_string_length(text) == 0) {
            die("%s:%zu: \"%s\", entry %zu: must be a text that is not empty", file->path, file->line, name, i + 1);
        }
    }
    return array;
}

/* The strings of an array, or one string as an array of it. */
static const char **list_of(const json_t *value, size_t *n)
{
    *n = json_is_array(value) ? json_array_size(value) : 1;
    const char **list = allocate(*n, sizeof *list);
    for (size_t i = 0; i < *n; i++) {
        list[i] = json_string_value(json_is_array(value) ? json_array_get(value, i) : value);
    }
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

static void parse_l_eval(const struct eval_file *file, struct eval_document *document)
{
    const json_t *questions = texts(file, document->root, "instructions");
    const json_t *answers = texts(file, document->root, "outputs");
    const char *evaluation = json_string_value(json_object_get(document->root, "evaluation"));
    document->text = json_string_value(json_object_get(document->root, "input"));
    if (json_array_size(answers) != json_array_size(questions)) {
        die("%s:%zu: %zu \"instructions\" but %zu \"outputs\"; there must be one answer a question", file->path,
            file->line, json_array_size(questions), json_array_size(answers));
    }
    take_questions(document, json_array_size(questions));
    for (size_t i = 0; i < document->n_questions; i++) {
        struct eval_question *question = &document->questions[i];
        question->text = json_string_value(json_array_get(questions, i));
        question->references = list_of(json_array_get(answers, i), &question->n_references);
        if (evaluation && strcmp(evaluation, "exam") == 0) {
            set_score(question, SCORE_EXAM, 32);
        } else if (evaluation && strcmp(evaluation, "rouge") == 0) {
            set_score(question, SCORE_ROUGE_L, 256);
        } else {
            set_score(question, SCORE_F1, 64);
        }
    }
}

/* LongBench's English and code datasets: how a reply is judged and how long it may be (arXiv 2308.14508, appendix). */
static const struct dataset {
    const char *name;
    enum score_kind score;
    size_t max_tokens;
    bool first_line;
} datasets[] = {
    {"narrativeqa", SCORE_F1, 128, false},      {"qasper", SCORE_F1, 128, false},
    {"multifieldqa_en", SCORE_F1, 64, false},   {"hotpotqa", SCORE_F1, 32, false},
    {"2wikimqa", SCORE_F1, 32, false},          {"musique", SCORE_F1, 32, false},
    {"gov_report", SCORE_ROUGE_L, 512, false},  {"qmsum", SCORE_ROUGE_L, 512, false},
    {"multi_news", SCORE_ROUGE_L, 512, false},  {"trec", SCORE_CLASSIFICATION, 64, true},
    {"triviaqa", SCORE_F1, 32, true},           {"samsum", SCORE_ROUGE_L, 128, true},
    {"passage_count", SCORE_COUNT, 32, false},  {"passage_retrieval_en", SCORE_RETRIEVAL, 32, false},
    {"lcc", SCORE_CODE, 64, false},             {"repobench-p", SCORE_CODE, 64, false},
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

/* Puts context and input into the dataset's prompt: the document goes up to the end of the context. */
static void apply_prompt(const struct eval_file *file, struct eval_document *document, const char *prompt)
{
    struct eval_question *question = &document->questions[0];
    const char *context = "{context}", *at = strstr(prompt, context);
    if (!at) {
        die("%s:%zu: the prompt of %s has no {context}", file->path, file->line, document->task);
    }
    const char *behind = at + strlen(context);
    document->owned[0] = fill(prompt, behind, context, document->text);
    document->owned[1] = fill(behind, behind + strlen(behind), "{input}", question->text);
    document->text = document->owned[0];
    question->text = document->owned[1];
}

static void parse_longbench(const struct eval_file *file, struct eval_document *document)
{
    const json_t *classes = json_object_get(document->root, "all_classes");
    const char *dataset = json_string_value(json_object_get(document->root, "dataset"));
    document->text = text_member(file, document->root, "context", false);
    take_questions(document, 1);
    struct eval_question *question = &document->questions[0];
    question->text = text_member(file, document->root, "input", true);
    question->references = list_of(texts(file, document->root, "answers"), &question->n_references);
    if (json_is_array(classes) && json_array_size(classes) > 0) {
        question->classes = list_of(texts(file, document->root, "all_classes"), &question->n_classes);
    }
    if (dataset) {
        snprintf(document->task, sizeof document->task, "%s", dataset);
    }
    set_score(question, SCORE_F1, 64);
    for (size_t i = 0; dataset && i < sizeof datasets / sizeof *datasets; i++) {
        const size_t n = strlen(datasets[i].name); /* LongBench-E has names with "_e" behind */
        if (strncmp(dataset, datasets[i].name, n) == 0 && (!dataset[n] || strcmp(dataset + n, "_e") == 0)) {
            set_score(question, datasets[i].score, datasets[i].max_tokens);
            question->first_line = datasets[i].first_line;
        }
    }
    if (question->score == SCORE_CLASSIFICATION && question->n_classes == 0) {
        die("%s:%zu: \"all_classes\" must be a list of texts for %s", file->path, file->line, dataset);
    }
    if (file->prompts && json_is_string(json_object_get(file->prompts, document->task))) {
        apply_prompt(file, document, json_string_value(json_object_get(file->prompts, document->task)));
    } else if (question->text[0] == '\0') {
        question->text = question->score == SCORE_CODE ? "Continue the code above with its next line."
                                                       : "Summarize the text above.";
    }
}

static void parse_ruler(const struct eval_file *file, struct eval_document *document)
{
    const char *input = text_member(file, document->root, "input", false);
    size_t n = strlen(input);
    while (n > 0 && strchr(" \t\r\n", input[n - 1])) {
        n--;
    }
    size_t split = n;
    while (split > 0 && input[split - 1] != '\n') {
        split--;
    }
    if (split == 0) {
        die("%s:%zu: \"input\" must end with a question in a paragraph of its own", file->path, file->line);
    }
    document->owned[0] = allocate(split + 1, 1);
    document->owned[1] = allocate(n - split + 1, 1);
    memcpy(document->owned[0], input, split);
    memcpy(document->owned[1], input + split, n - split);
    document->text = document->owned[0];
    take_questions(document, 1);
    document->questions[0].text = document->owned[1];
    document->questions[0].references =
        list_of(texts(file, document->root, "outputs"), &document->questions[0].n_references);
    set_score(&document->questions[0], SCORE_ALL_STRINGS, 128);
}

static void parse_plain(const struct eval_file *file, struct eval_document *document)
{
    const json_t *questions = texts(file, document->root, "questions");
    const json_t *answers = json_object_get(document->root, "answers");
    const json_t *score = json_object_get(document->root, "score");
    const json_t *max_tokens = json_object_get(document->root, "max_tokens");
    enum score_kind kind = SCORE_F1;
    document->text = text_member(file, document->root, "document", false);
    if (json_array_size(answers) != json_array_size(questions)) {
        die("%s:%zu: \"answers\" must be a list with one entry for each of %zu \"questions\"", file->path, file->line,
            json_array_size(questions));
    }
    while (score && kind < N_SCORES && (!json_is_string(score) || strcmp(json_string_value(score), score_names[kind]))) {
        kind++;
    }
    if (kind == N_SCORES || kind == SCORE_CLASSIFICATION) {
        die("%s:%zu: \"score\" must be one of f1, rouge_l, exact, exam, code, retrieval, count, all_strings, any_string",
            file->path, file->line);
    }
    if (max_tokens && (!json_is_integer(max_tokens) || json_integer_value(max_tokens) < 1)) {
        die("%s:%zu: \"max_tokens\" must be a whole number of at least 1", file->path, file->line);
    }
    take_questions(document, json_array_size(questions));
    for (size_t i = 0; i < document->n_questions; i++) {
        struct eval_question *question = &document->questions[i];
        const json_t *answer = json_array_get(answers, i);
        bool usable = json_is_string(answer) || (json_is_array(answer) && json_array_size(answer) > 0);
        for (size_t j = 0; usable && json_is_array(answer) && j < json_array_size(answer); j++) {
            usable = json_is_string(json_array_get(answer, j));
        }
        if (!usable) {
            die("%s:%zu: \"answers\", entry %zu: must be a text or a list of texts", file->path, file->line, i + 1);
        }
        question->text = json_string_value(json_array_get(questions, i));
        question->references = list_of(answer, &question->n_references);
        set_score(question, kind, max_tokens ? (size_t)json_integer_value(max_tokens) : 64);
    }
}

static bool has(const struct eval_document *document, const char *name)
{
    return json_object_get(document->root, name) != NULL;
}

static void parse_document(const struct eval_file *file, struct eval_document *document)
{
    json_error_t error;
    document->root = json_loadb(file->buffer.text, file->buffer.n_bytes, 0, &error);
    if (!document->root) {
        die("%s:%zu: column %d: %s", file->path, file->line, error.column, error.text);
    }
    const char *slash = strrchr(file->path, '/'), *name = slash ? slash + 1 : file->path;
    snprintf(document->task, sizeof document->task, "%.*s", (int)strcspn(name, "."), name);
    if (has(document, "document")) {
        parse_plain(file, document);
    } else if (has(document, "context")) {
        parse_longbench(file, document);
    } else if (has(document, "outputs") && has(document, "index") && !has(document, "instructions")) {
        parse_ruler(file, document);
    } else {
        text_member(file, document->root, "input", false);
        parse_l_eval(file, document);
    }
    document->text_bytes = strlen(document->text);
}

bool eval_next(struct eval_file *file, struct eval_document *document)
{
    memset(document, 0, sizeof *document);
    while (read_line(file)) {
        if (file->buffer.text[strspn(file->buffer.text, " \t\r")] != '\0') {
            parse_document(file, document);
            document->path = file->path;
            document->line = file->line;
            return true;
        }
    }
    return false;
}

void eval_release(struct eval_document *document)
{
    for (size_t i = 0; i < document->n_questions; i++) {
        free(document->questions[i].references);
        free(document->questions[i].classes);
    }
    free(document->questions);
    free(document->owned[0]);
    free(document->owned[1]);
    json_decref(document->root);
    memset(document, 0, sizeof *document);
}

void eval_close(struct eval_file *file)
{
    fclose(file->file);
    json_decref(file->prompts);
    text_buffer_free(&file->buffer);
}
