/*
 * The `squeeze` command: a table of subcommands, each in a file of its own,
 * and what stands before them: help and version.
 */
#define _POSIX_C_SOURCE 200809L
#define _XOPEN_SOURCE   700 /* SIGXFSZ */

#include <locale.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "common.h"
#include "json_output.h"
#include "llama_library.h"
#include "options.h"
#include "many_ranks.h"
#include "signals.h"
#include "wait_policy.h"

struct command {
    const char *name, *summary;
    int (*run)(int argc, char **argv);
};

static const struct command commands[] = {
    {"prepare", "read a document once and write a context file", cmd_prepare},
    {"ask", "answer questions about a prepared context", cmd_ask},
    {"chat", "ask in turn, with history", cmd_chat},
    {"inspect", "show what a context file holds, draw its clusters", cmd_inspect},
#ifdef SQUEEZE_SERVER
    {"serve", "answer over HTTP, for many users", cmd_serve},
#endif
    {"compare", "measure how far squeezed answers are from dense ones", cmd_compare},
    {"eval", "measure accuracy against dense and other methods", cmd_eval},
    {"analyze", "say where the time of inference goes", cmd_analyze},
    {"bench", "measure speed against llama.cpp", cmd_bench},
    {"cpu", "show the instruction sets that are used", cmd_cpu},
    {"gpu", "show the graphics cards that can be used", cmd_gpu},
};

enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static const struct command *find_command(const char *name)
{
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
    return NULL;
}

static void print_usage(FILE *file)
{
    fprintf(file, "Usage: squeeze COMMAND [OPTIONS] ...\n\n"
                  "Answers many questions about one long document without reading all of it at\n"
                  "every token.\n\nCommands:\n");
    for (size_t i = 0; i < N_COMMANDS; i++) fprintf(file, "  %-10s%s\n", commands[i].name, commands[i].summary);
    fprintf(file, "  %-10s%s\n", "help", "show the options of a command: squeeze help ask");
    fprintf(file, "\nExamples:\n"
                  "  squeeze prepare book.txt\n"
                  "  squeeze ask book.sqz.gguf \"Who wrote the letter?\"\n"
                  "  squeeze chat book.sqz.gguf --budget 0.2\n"
                  "\n'squeeze COMMAND --help' shows the options of a command; squeeze --version the version.\n");
}

static void print_version(void)
{
    printf("squeeze %s\n", sqz_version());
    printf("llama.cpp %s\n", sqz_llama_version());
}

static int list_commands(void)
{
    for (size_t i = 0; i < N_COMMANDS; i++) options_list_word(commands[i].name, commands[i].summary);
    options_list_word("help", "show the options of a command");
    printf("--help\t-h\t\t\tshow the commands\n--version\t-V\t\t\tshow the version\n");
    return close_stdout();
}

static int show_help(int argc, char **argv)
{
    static char help_flag[] = "--help";
    const struct command *command = argc > 1 ? find_command(argv[1]) : NULL;
    if (argc == 1) {
        print_usage(stdout);
        return close_stdout();
    }
    if (strcmp(argv[1], OPTIONS_LIST) == 0) return list_commands();
    if (!command) usage_error("no command '%s'; 'squeeze --help' lists them", argv[1]);
    char *arguments[] = {argv[1], help_flag, NULL};
    return command->run(2, arguments);
}

int main(int argc, char **argv)
{
    choose_wait_policy(argv);
    /* Characters as the terminal has them, for line editing; numbers always with a point. */
    setlocale(LC_CTYPE, "");
    /* A closed pipe or a file-size limit is an error of the write, which is reported, not the end of the program. */
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    explain_faults();
    json_keep_command_line(argc, argv);
    sqz_llama_log_take();
    if (argc < 2) {
        print_usage(stderr);
        return 2;
    }
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        print_usage(stdout);
        return close_stdout();
    }
    if (strcmp(name, "--version") == 0 || strcmp(name, "-V") == 0) {
        print_version();
        return close_stdout();
    }
    if (strcmp(name, OPTIONS_LIST) == 0) return list_commands();
    if (strcmp(name, "help") == 0) return show_help(argc - 1, argv + 1);
    const struct command *command = find_command(name);
    if (!command) usage_error("no command '%s'; 'squeeze --help' lists them", name);
    set_command(name);
    ranks_begin(argv);
    return command->run(argc - 1, argv + 1);
}
