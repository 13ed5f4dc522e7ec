/*
 * squeeze cpu: which variants of the inner loops are built in, which this
 * machine can run, and which one is used; and the same of llama.cpp, with what
 * set-up proved about it.
 */
#include <stdio.h>
#include <string.h>

#include "common.h"
#include "json_output.h"
#include "cpu_products.h"
#include "options.h"
#include "threads.h"

/* Where set-up keeps what it proved about the llama.cpp that is linked; "" when another one is. */
#ifndef SQUEEZE_LLAMA_PROOF
#define SQUEEZE_LLAMA_PROOF ""
#endif

static const struct command_help help = {
    "cpu", "",
    "Shows the variants of the inner loops: built in, supported by this machine, in use; and what llama.cpp uses.",
    "  squeeze cpu\n"
    "  squeeze cpu --json\n",
    NULL};

/* What set-up wrote, as far as it is shown. */
struct proof {
    unsigned n_right;
    char left_out[256]; /* instruction sets; "none" */
    char compiler[128];
};

/* The rest of the line when it begins with the name. */
static void read_field(char *out, size_t size, const char *line, const char *name)
{
    const size_t n = strlen(name);
    if (strncmp(line, name, n) != 0) return;
    snprintf(out, size, "%.*s", (int)strcspn(line + n, "\n"), line + n);
}

/* False where there is no record. */
static bool read_proof(struct proof *proof)
{
    char line[1024];
    *proof = (struct proof){.n_right = 0};
    FILE *file = fopen(SQUEEZE_LLAMA_PROOF, "r");
    if (!file) return false;
    while (fgets(line, sizeof line, file)) {
        read_field(proof->left_out, sizeof proof->left_out, line, "left out: ");
        read_field(proof->compiler, sizeof proof->compiler, line, "compiler: ");
        proof->n_right += strncmp(line, "ok ", 3) == 0;
    }
    fclose(file);
    return proof->n_right > 0;
}

typedef const char *(*name_at)(size_t index);

static json_t *json_names(name_at get)
{
    json_t *names = json_array();
    for (size_t i = 0; get(i); i++) json_array_append_new(names, json_text(get(i)));
    return names;
}

static json_t *json_llama(void)
{
    struct proof proof;
    json_t *llama = json_object(), *proved = json_null();
    if (read_proof(&proof)) {
        proved = json_object();
        json_object_set_new(proved, "file", json_text(SQUEEZE_LLAMA_PROOF));
        json_object_set_new(proved, "products_right", json_count(proof.n_right));
        json_object_set_new(proved, "left_out", json_text(proof.left_out));
        json_object_set_new(proved, "compiler", json_text(proof.compiler));
    }
    json_object_set_new(llama, "features", json_names(sqz_llama_cpu_feature));
    json_object_set_new(llama, "buffers", json_names(sqz_llama_cpu_buffer));
    json_object_set_new(llama, "threads", json_count((uint64_t)sqz_core_count()));
    json_object_set_new(llama, "proof", proved);
    return llama;
}

static void print_names(const char *title, name_at get)
{
    printf("%-12s", title);
    for (size_t i = 0; get(i); i++) printf("%s%s", i ? " " : "", get(i));
    printf("\n");
}

static void print_llama(void)
{
    struct proof proof;
    printf("\n");
    print_names("llama.cpp", sqz_llama_cpu_feature);
    print_names("weights in", sqz_llama_cpu_buffer);
    printf("%-12s%d\n", "threads", sqz_core_count());
    if (read_proof(&proof))
        printf("%-12s%u kinds of products right on this CPU, left out: %s (%s)\n", "proof", proof.n_right,
               proof.left_out, SQUEEZE_LLAMA_PROOF);
    else printf("%-12snone: this llama.cpp is not one that scripts/setup.sh proved\n", "proof");
}

static int print_cpu_json(void)
{
    struct sqz_variant_info variant;
    json_t *root = json_object(), *list = json_array();
    for (size_t i = 0; sqz_variant_get(i, &variant); i++) {
        json_array_append_new(list, json_pack("{s:s, s:b, s:b, s:b}", "name", variant.name, "built", variant.built,
                                              "supported", variant.supported, "chosen", variant.chosen));
    }
    json_object_set_new(root, "version", json_text(sqz_version()));
    json_object_set_new(root, "variants", list);
    json_object_set_new(root, "llama", json_llama());
    return print_json(root);
}

int cmd_cpu(int argc, char **argv)
{
    bool json = false;
    struct sqz_variant_info variant;
    /* clang-format off */
    const struct option options[] = {
        JSON_OPTION(json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    options_parse(&help, options, argc, argv, 0, 0);
    if (json) return print_cpu_json();
    printf("%-12s%-8s%-12s%s\n", "variant", "built", "supported", "used");
    for (size_t i = 0; sqz_variant_get(i, &variant); i++) {
        printf("%-12s%-8s%-12s%s\n", variant.name, variant.built ? "yes" : "no", variant.supported ? "yes" : "no",
               variant.chosen ? "yes" : "no");
    }
    print_llama();
    return close_stdout();
}
