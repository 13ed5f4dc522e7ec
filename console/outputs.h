/*
 * Places that a subcommand writes to, looked at before its work begins: what
 * would fail at its end, or would destroy something, is refused at once. A
 * place may be new, or hold an empty file or one of the kind that will stand
 * there; it may not be anything that is read in the same run, under whatever
 * name or link.
 */
#ifndef SQZ_CONSOLE_OUTPUTS_H
#define SQZ_CONSOLE_OUTPUTS_H

#include <stddef.h>

enum output_kind {
    OUTPUT_CONTEXT, /* a context file, replaced as a whole */
    OUTPUT_PICTURE, /* .svg or .png, replaced as a whole */
    OUTPUT_RECORDS, /* of eval, added to */
    OUTPUT_NUMBERS, /* raw numbers; no file is replaced, since none can be known for one of ours */
    OUTPUT_FOLDER   /* made where it is missing, in a folder that is there */
};

struct output {
    const char *option; /* as messages name it: "--record" */
    const char *path;   /* NULL: not asked for */
    enum output_kind kind;
};

/* What a line of a file of records begins with; 32 hex digits follow. */
#define RECORD_START "{\"key\":\""

/* Checks outputs, which end with a zeroed entry, against each other and against the inputs: paths, NULL where there is
 * none, "-" for standard input. Standard output may not be a file that is read or written either. Ends the program with
 * a sentence about the first that will not do. */
void outputs_check(const struct output *outputs, const char *const *inputs, size_t n_inputs);

#endif
