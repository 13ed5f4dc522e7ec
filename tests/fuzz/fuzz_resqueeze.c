/*
 * A context file squeezed again, as `prepare --from` does: what comes out can be
 * opened, what fails leaves the file that was there, and nothing else stays in
 * the folder.
 */
#include "context_input.h"
#include "format.h"
#include "out_folder.h"

#include <stdio.h>
#include <stdlib.h>

/* The file's own options or a rule's defaults, made small: the time that k-means takes is not what is tried here. */
static struct sqz_prepare_options choose_options(const struct sqz_squeeze_options *of_file, struct choices *c)
{
    struct sqz_prepare_options options;
    const uint8_t how = choose_byte(c);
    sqz_prepare_options_default(&options);
    if (how & 1) {
        options.squeeze = *of_file;
        options.squeeze.size = sizeof options.squeeze;
    } else {
        sqz_squeeze_options_default(&options.squeeze, how & 2 ? SQZ_RULE_PAPER : SQZ_RULE_DEFAULT);
    }
    options.squeeze.n_iterations = 1 + how % 3;
    options.squeeze.n_calibration = 1 + how % 2;
    options.squeeze.n_sinks %= 5;
    options.squeeze.n_window %= 9;
    if (how & 4) options.squeeze.centroid_share[0] = 0.4f;
    if (how & 8) options.squeeze.code_words = how >> 4 & 3;
    if (how & 16) options.squeeze.index = options.squeeze.keys = (enum sqz_index)(how >> 5 & 1);
    return options;
}

static void squeeze(struct sqz_context *context, struct choices *c)
{
    char path[96];
    struct sqz_error error = {SQZ_OK, ""};
    const struct sqz_prepare_options options = choose_options(&sqz_context_get_meta(context)->squeeze, c);
    const uint8_t how = choose_byte(c);
    const uint32_t fault = choose_byte(c) | (uint32_t)(how & 7) << 8;
    snprintf(path, sizeof path, "%s/%s", out_folder(), how & 32 ? "link" : "new");
    if (how & 32) out_folder_fill();
    faults_begin(how & 64 ? fault : 0, choose_byte(c), how & 128);
    const enum sqz_status status = sqz_context_squeeze(context, path, &options, 1, NULL, &error);
    faults_end();
    out_folder_check(status, path, error.message);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    struct context_input input = context_input_of(bytes, n);
    struct sqz_context *context = NULL;
    struct sqz_error error;
    if (!sqz_context_open(&context, fuzz_file(input.file, input.n), NULL, &error)) {
        const struct sqz_context_meta *meta = sqz_context_get_meta(context);
        struct exact_arrays *exact = calloc(meta->n_layer, sizeof *exact);
        size_t products = 0;
        for (uint32_t i = 0; i < meta->n_layer; i++) {
            const struct sqz_layer *layer = sqz_context_layer(context, i);
            exact_begin(&exact[i], (struct sqz_layer *)(uintptr_t)layer);
            products += (size_t)layer->shape.n_head * layer->shape.head_dim * layer->n_rows;
        }
        if (products < 200000) squeeze(context, &input.choices);
        for (uint32_t i = 0; i < meta->n_layer; i++) exact_end(&exact[i]);
        free(exact);
        sqz_context_free(context);
    }
    free(input.file);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t n, size_t capacity, unsigned seed)
{
    return context_input_mutate(bytes, n, capacity, seed);
}
