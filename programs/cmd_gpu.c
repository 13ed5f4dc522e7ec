/*
 * squeeze gpu: the graphics cards that the driver shows, whether squeeze can run on
 * them, where what it needs for that was loaded from, and what is missing.
 */
#include <stdio.h>

#include "common.h"
#include "gpu.h"
#include "json_output.h"
#include "options.h"

static const struct command_help help = {"gpu", "",
                                         "Shows NVIDIA cards, which of them squeeze runs on, and the libraries that it "
                                         "needs for that. The exit code is 0 also "
                                         "where there is no card.",
                                         "  squeeze gpu\n"
                                         "  squeeze gpu --json\n",
                                         NULL};

static json_t *json_path(const char *path)
{
    return path[0] ? json_text(path) : json_null();
}

static int print_gpu_json(void)
{
    struct sqz_gpu_card card;
    json_t *root = json_object(), *cards = json_array();
    for (int i = 0; i < sqz_gpu_card_count(); i++) {
        if (!sqz_gpu_card(i, &card)) continue;
        json_t *entry = json_object();
        json_object_set_new(entry, "name", json_text(card.name));
        json_object_set_new(entry, "compute_capability", json_number(card.capability / 10.0));
        json_object_set_new(entry, "multiprocessors", json_count((uint64_t)card.n_multiprocessors));
        json_object_set_new(entry, "memory_bytes", json_count(card.memory_bytes));
        json_object_set_new(entry, "free_bytes", json_count(card.free_bytes));
        json_object_set_new(entry, "supported", json_boolean(card.supported));
        json_object_set_new(entry, "used", json_boolean(i < sqz_gpu_count()));
        json_array_append_new(cards, entry);
    }
    json_object_set_new(root, "version", json_text(sqz_version()));
    json_object_set_new(root, "usable", json_boolean(sqz_gpu_count() > 0));
    json_object_set_new(root, "reason", json_path(sqz_gpu_reason()));
    json_object_set_new(root, "kernels", json_path(sqz_gpu_kernels_path()));
    json_object_set_new(root, "ggml", json_path(sqz_gpu_ggml_path()));
    json_object_set_new(root, "way",
                        sqz_gpu_count() > 0 ? json_text(sqz_gpu_by_callback() ? "callback" : "device") : json_null());
    json_object_set_new(root, "cards", cards);
    return print_json(root);
}

static void print_cards(void)
{
    struct sqz_gpu_card card;
    printf("%-6s%-32s%-12s%-10s%-12s%-11s%s\n", "card", "name", "capability", "memory", "free", "supported", "used");
    for (int i = 0; i < sqz_gpu_card_count(); i++) {
        char memory[NUMBER_TEXT_MAX], left[NUMBER_TEXT_MAX], name[PLAIN_TEXT_MAX], capability[16];
        if (!sqz_gpu_card(i, &card)) continue;
        snprintf(capability, sizeof capability, "%d.%d", card.capability / 10, card.capability % 10);
        printf("%-6d%-32s%-12s%-10s%-12s%-11s%s\n", i, plain_text(name, card.name), capability,
               bytes_text(memory, card.memory_bytes), bytes_text(left, card.free_bytes), card.supported ? "yes" : "no",
               i < sqz_gpu_count() ? "yes" : "no");
    }
}

static void print_library(const char *title, const char *path)
{
    char text[PLAIN_TEXT_MAX];
    printf("%-10s%s\n", title, path[0] ? plain_text(text, path) : "not loaded");
}

int cmd_gpu(int argc, char **argv)
{
    bool json = false;
    /* clang-format off */
    const struct option options[] = {
        JSON_OPTION(json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    options_parse(&help, options, argc, argv, 0, 0);
    if (json) return print_gpu_json();
    if (sqz_gpu_card_count() > 0) {
        print_cards();
        printf("\n");
    }
    print_library("kernels", sqz_gpu_kernels_path());
    print_library("ggml", sqz_gpu_ggml_path());
    if (sqz_gpu_by_callback() && sqz_gpu_count() > 0)
        printf(
            "\nAttention comes by llama.cpp's callback, which waits at every layer: a token takes some 0.5 ms more.\n");
    if (sqz_gpu_count() > 0)
        printf("\nContexts: rows of 64, 96, 128 and 256 numbers lie on a card as they are; those of other head "
               "dimensions get "
               "zeros up to the\nnext of these, and INT8 keys become F16. Rows of 4 + 4 and of 4 bits lie there as "
               "they are, of 64 "
               "and 128 numbers.\n");
    if (sqz_gpu_count() == 0) {
        char text[PLAIN_TEXT_MAX];
        printf("\nEverything runs on the CPU: %s\n", plain_text(text, sqz_gpu_reason()));
    }
    return close_stdout();
}
