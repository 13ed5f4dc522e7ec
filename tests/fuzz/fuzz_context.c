/* A context file: opened, and attended to on every layer. */
#include "context_input.h"
#include "format.h"

#include <stdlib.h>
#include <string.h>

/* Everything that an open context tells. */
static void read_info(const struct sqz_context *context)
{
    struct sqz_context_info info;
    volatile int64_t sum = 0;
    sqz_context_get_info(context, &info);
    for (size_t i = 0; i < info.n_tokens; i++) sum += info.tokens[i];
    sum += (int64_t)(strlen(info.model_name) + strlen(info.source_name) + strlen(info.model_fingerprint));
    (void)sum;
    if (sqz_context_layer(context, info.n_layer)) fuzz_fail("there is no layer behind the last", "one was given");
}

/* Where the file is, or what is none. */
static const char *choose_path(const struct context_input *input, uint8_t how)
{
    const char *path = fuzz_file(input->file, input->n);
    if (how == 255) fuzz_file_resize(((size_t)32 << 20) + input->n);
    return how == 254 ? "/" : how == 253 ? "/dev/null" : how == 252 ? "/none/such" : how == 251 ? NULL : path;
}

/* A file that is as it was says so, one that was cut off says that. */
static void check_change(const struct sqz_context *context, size_t n, uint8_t how, uint8_t fault)
{
    struct sqz_error error = {SQZ_OK, ""};
    if (sqz_context_check_unchanged(context, &error))
        fuzz_fail("a file that nobody touches is unchanged", error.message);
    faults_begin(how & 1, fault, false);
    if (sqz_context_check_unchanged(context, &error) && !error.message[0])
        fuzz_fail("a change is told", "without a word");
    faults_end();
    fuzz_file_resize(n / 2);
    if (!sqz_context_check_unchanged(context, &error)) fuzz_fail("a file that was cut off is told", "it was not");
}

static void use(struct sqz_context *context, struct choices *choices)
{
    const uint32_t n_layer = sqz_context_get_meta(context)->n_layer;
    read_info(context);
    for (uint32_t i = 0; i < n_layer && i < 8; i++)
        fuzz_attend(sqz_context_layer(context, i), sqz_context_get_meta(context)->n_tokens, choices);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    static const char no_limit[] = "0::/\0max";
    struct context_input input = context_input_of(bytes, n);
    struct sqz_context_options options;
    struct sqz_context *context = NULL;
    struct sqz_error error = {SQZ_OK, ""};
    sqz_context_options_default(&options);
    const uint8_t how = choose_byte(&input.choices), fault = choose_byte(&input.choices);
    options.verify = (enum sqz_verify)(how % 32 == 31 ? 3 : how % 3);
    options.memory_bytes = how & 8 ? 1 : how & 16 ? 2 * input.n + 2 : 0;
    const char *path = choose_path(&input, choose_byte(&input.choices));
    faults_system_files((const uint8_t *)no_limit, sizeof no_limit); /* the system's own are slow to read */
    faults_begin(how & 128 ? fault % 64 : 0, (uint8_t)(how * 7), how & 64);
    const enum sqz_status status = sqz_context_open(&context, path, how == 32 ? NULL : &options, &error);
    faults_end();
    if (!status != !!context || (status && !error.message[0]))
        fuzz_fail("opening gives a context or a message", error.message);
    if (context) {
        use(context, &input.choices);
        check_change(context, input.n, how, fault);
        sqz_context_free(context);
    }
    free(input.file);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t n, size_t capacity, unsigned seed)
{
    return context_input_mutate(bytes, n, capacity, seed);
}
