/*
 * Prepares a text once and asks it a question, through the public header alone.
 *
 *   ask MODEL.gguf TEXT CONTEXT.sqz.gguf "QUESTION"
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <squeeze.h>

static void check(enum sqz_status status, const struct sqz_error *error)
{
    if (status == SQZ_OK) return;
    fprintf(stderr, "%s\n", error->message);
    exit(1);
}

static char *read_file(const char *path, size_t *n_bytes)
{
    FILE *file = fopen(path, "rb");
    size_t capacity = (size_t)1 << 24;
    char *text = malloc(capacity);
    if (!file || !text) {
        perror(path);
        exit(1);
    }
    *n_bytes = fread(text, 1, capacity, file);
    fclose(file);
    return text;
}

int main(int argc, char **argv)
{
    struct sqz_error error;
    struct sqz_model *model;
    struct sqz_context *context;
    struct sqz_session *session;
    if (argc != 5) {
        fprintf(stderr, "usage: ask MODEL.gguf TEXT CONTEXT.sqz.gguf QUESTION\n");
        return 2;
    }
    sqz_llama_log_take();
    check(sqz_model_open(&model, argv[1], NULL, &error), &error);
    if (sqz_context_open(&context, argv[3], NULL, &error) != SQZ_OK) {
        size_t n_bytes;
        char *text = read_file(argv[2], &n_bytes);
        check(sqz_prepare(model, text, n_bytes, argv[3], NULL, NULL, &error), &error);
        free(text);
        check(sqz_context_open(&context, argv[3], NULL, &error), &error);
    }

    struct sqz_session_options options;
    sqz_session_options_default(&options);
    options.budget = 0.1f;
    check(sqz_session_create(&session, model, context, &options, &error), &error);
    int32_t *tokens;
    size_t n_tokens;
    check(sqz_session_question_tokens(session, argv[4], strlen(argv[4]), true, &tokens, &n_tokens, &error), &error);
    check(sqz_session_run(session, tokens, n_tokens, &error), &error);
    free(tokens);
    for (int i = 0; i < 200; i++) {
        char text[256];
        bool end;
        const int32_t token = sqz_session_sample(session, &end);
        if (end) break;
        fwrite(text, 1, sqz_model_token_text(model, token, text, sizeof text), stdout);
        fflush(stdout);
        check(sqz_session_run(session, &token, 1, &error), &error);
    }
    putchar('\n');
    sqz_session_free(session);
    sqz_context_free(context);
    sqz_model_free(model);
    return 0;
}
