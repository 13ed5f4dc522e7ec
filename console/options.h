/*
 * The command line of every subcommand: one table of options feeds both the
 * parser and --help, so that they cannot disagree.
 *
 * Accepted: --name VALUE, --name=VALUE, -x VALUE, -xVALUE, flags joined as in
 * -qv, options and operands in any order, "--" before operands that begin with
 * a dash, "-" as an operand. Of an option that is given twice the last one
 * counts. A bad value ends the program with exit code 2 and a sentence that
 * says what was found and what is allowed; so do options without effect
 * together, which a table of rules names.
 */
#ifndef SQZ_CONSOLE_OPTIONS_H
#define SQZ_CONSOLE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

enum option_kind {
    OPTION_END = 0,
    OPTION_FLAG,        /* value is a bool *, set to true */
    OPTION_SWITCH,      /* value is an int *, 1 for --name, 0 for --no-name */
    OPTION_TEXT,        /* value is a const char **, not empty */
    OPTION_COUNT,       /* value is a size_t *, low to high */
    OPTION_COUNT_MAYBE, /* the same, its number may be left out: SIZE_MAX then */
    OPTION_REAL,        /* value is a double *, low to high (above low with `above`) */
    OPTION_CHOICE,      /* value is an int *, the index in `choices` */
    OPTION_BUDGET,      /* value is a double *, above 0, at most 1; "10%" is 0.1 */
    OPTION_PRUNE,       /* value is a double *, the budget 1 - p for p from 0 to below 1, "90%" is 0.9 */
    OPTION_BUDGETS,     /* value is a struct real_list *, each as OPTION_BUDGET, separated by commas */
    OPTION_SHARES,      /* the same; each smaller than the one before */
    OPTION_COUNTS,      /* value is a struct count_list *, low to high each, separated by commas; 4K is 4096, 1M 2^20 */
    OPTION_CHOICES      /* value is a struct count_list *, indices in `choices`, separated by commas, none twice */
};

#define REAL_LIST_MAX 16

struct real_list {
    size_t n;
    double value[REAL_LIST_MAX];
};

#define COUNT_LIST_MAX 16

struct count_list {
    size_t n;
    size_t value[COUNT_LIST_MAX];
};

struct option {
    enum option_kind kind;
    char letter;          /* 0: none */
    const char *name;     /* without the dashes */
    const char *argument; /* shown in --help; NULL for flags */
    void *value;
    const char *help;
    double low, high;           /* of counts and reals; high is at most 2^53 for counts */
    bool above;                 /* low itself is not allowed */
    const char *example;        /* of an allowed value, shown with a bad one */
    const char *const *choices; /* ends with NULL */
    bool *given;                /* set to true when the option occurs; may be NULL */
    const char *word;           /* behind one dash, alone: "ngl", as other programs have it; NULL: none */
};

/* Options that have no effect where a condition holds: refused, and shown in --help.
 *
 * The condition is made of words that all have to hold: "from" (the option was given), "!from" (it was not), "temp=0"
 * (its value, given or not; a choice by its name), "methods~quest" (its text has this in it); "operand" stands for the
 * first operand. */
struct option_rule {
    const char *options; /* names, separated by spaces */
    const char *where;
    const char *why; /* half a sentence: "the context's own model and document count" */
};

struct command_help {
    const char *name;                /* "ask", or "bench generate" */
    const char *operands;            /* "CONTEXT QUESTION..." */
    const char *summary;             /* a sentence or a few */
    const char *examples;            /* lines, each ending in a newline */
    const struct option_rule *rules; /* ends with a zeroed entry; NULL: none */
};

/* Parses argv[1..argc-1] (argv[0] is the subcommand's name), moves the operands to argv[1..n] in their order and
 * returns n, which lies between min_operands and max_operands. `options` ends with a zeroed entry. --help prints and
 * ends the program. */
int options_parse(const struct command_help *help, const struct option *options, int argc, char **argv,
                  int min_operands, int max_operands);

/* What a shell's completion asks for instead, with --help's place in the command line: a line for each option, of its name,
 * its short form, its argument, its choices separated by commas, and its help, separated by tabs; what is not is empty. */
#define OPTIONS_LIST "--list-options"
/* Such a line for a word that chooses what the rest of the command line is of. */
void options_list_word(const char *word, const char *help);

/* A budget as --budget takes it; false when it is none. */
bool parse_budget_text(const char *text, double *budget);

/* A finite decimal number that is the whole of text[0..n). */
bool parse_real_text(const char *text, size_t n, double *value);

#endif
