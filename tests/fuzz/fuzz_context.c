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
    for (size_t i = 0; i < info.n_tokens; i++)
        sum += info.tokens[i];
    sum += (int64_t)(strlen(info.model_name) + strlen(info.source_name) + strlen(info.model_fingerprint));
    if (sqz_context_layer(context, info.n_layer))
        fuzz_fail("there is no layer behind the last", "one was given");
}

static const char no_limit[] = "0::/\0max";

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    struct context_input input = context_input_of(bytes, n);
    struct sqz_context_options options;
    struct sqz_context *context = NULL;
    struct sqz_error error;
    sqz_context_options_default(&options);
    const uint8_t how = choose_byte(&input.choices), fault = choose_byte(&input.choices);
    options.verify = (enum sqz_verify)(how % 3);
    options.memory_bytes = how & 8 ? 1 : how & 16 ? 2 * input.n + 2 : 0;
    const char *path = fuzz_file(input.file, input.n);
    faults_system_files((const uint8_t *)no_limit, sizeof no_limit); /* the system's own are slow to read */
    faults_begin(how & 128 ? fault : 0, (uint8_t)(how * 7), how & 64);
    const enum sqz_status status = sqz_context_open(&context, path, &options, &error);
    faults_end();
    if (!status != !!context || (status && !error.message[0]))
        fuzz_fail("opening gives a context or a message", error.message);
    if (context) {
        const uint32_t n_layer = sqz_context_get_meta(context)->n_layer;
        read_info(context);
        for (uint32_t i = 0; i < n_layer && i < 8; i++)
            fuzz_attend(sqz_context_layer(context, i), sqz_context_get_meta(context)->n_tokens, &input.choices);
        sqz_context_free(context);
    }
    free(input.file);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t n, size_t capacity, unsigned seed)
{
    return context_input_mutate(bytes, n, capacity, seed);
}
