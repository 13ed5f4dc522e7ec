/* Results as JSON. */
#ifndef SQZ_CONSOLE_JSON_OUTPUT_H
#define SQZ_CONSOLE_JSON_OUTPUT_H

#include <jansson.h>
#include <stdint.h>

#include "options.h"

json_t *json_number(double value); /* null when not finite */
json_t *json_count(uint64_t value);
json_t *json_text(const char *text);                   /* bytes that are not UTF-8 are replaced */
json_t *json_bytes(const char *bytes, size_t n_bytes); /* the same, NULs replaced too */
json_t *json_command_line(void);                       /* as typed; null without json_keep_command_line() */
void json_keep_command_line(int argc, char **argv);    /* main()'s, before options are parsed */
int print_json(json_t *root);                          /* to standard output; releases root; returns the exit code */

#define JSON_OPTION(target)                                                                                            \
    {                                                                                                                  \
        .kind = OPTION_FLAG, .name = "json", .value = &(target), .help = "print one JSON object instead of text"       \
    }

#endif
