/* squeeze cpu: which variants of the inner loops are built in, which this machine can run, and which one is used. */
#include <stdio.h>

#include "common.h"
#include "json_output.h"
#include "options.h"

static const struct command_help help = {
    "cpu", "", "Shows the variants of the inner loops: built in, supported by this machine, in use.",
    "  squeeze cpu\n"
    "  squeeze cpu --json\n",
    NULL};

int cmd_cpu(int argc, char **argv)
{
    bool json = false;
    const struct option options[] = {
        JSON_OPTION(json),
        {.kind = OPTION_END},
    };
    struct sqz_variant_info variant;
    options_parse(&help, options, argc, argv, 0, 0);
    if (json) {
        json_t *root = json_object();
        json_t *list = json_array();
        for (size_t i = 0; sqz_variant_get(i, &variant); i++) {
            json_array_append_new(list, json_pack("{s:s, s:b, s:b, s:b}", "name", variant.name, "built", variant.built,
                                                  "supported", variant.supported, "chosen", variant.chosen));
        }
        json_object_set_new(root, "version", json_text(sqz_version()));
        json_object_set_new(root, "variants", list);
        return print_json(root);
    }
    printf("%-12s%-8s%-12s%s\n", "variant", "built", "supported", "used");
    for (size_t i = 0; sqz_variant_get(i, &variant); i++) {
        printf("%-12s%-8s%-12s%s\n", variant.name, variant.built ? "yes" : "no", variant.supported ? "yes" : "no",
               variant.chosen ? "yes" : "no");
    }
    return close_stdout();
}
