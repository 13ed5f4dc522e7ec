/*
 * The table-driven command line; options.h describes what it accepts. Numbers
 * are strict: the whole argument must be one finite decimal number in range,
 * whatever the locale.
 */
#include "options.h"

#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "text_buffer.h"

enum { HELP_COLUMN = 28, HELP_WIDTH = 96 };

static bool takes_argument(const struct option *option)
{
    return option->kind != OPTION_FLAG && option->kind != OPTION_SWITCH;
}

/* ---- Help ------------------------------------------------------------------- */

/* Writes text, broken at spaces, with `indent` spaces before every line but the first, which is at `column`. */
static void print_wrapped(const char *text, int indent, int column)
{
    while (*text) {
        size_t n = strcspn(text, " ");
        if (column + (int)n + 1 > HELP_WIDTH && column > indent) {
            printf("\n%*s", indent, "");
            column = indent;
        } else if (column > indent) {
            putchar(' ');
            column++;
        }
        printf("%.*s", (int)n, text);
        column += (int)n;
        text += n;
        text += strspn(text, " ");
    }
    putchar('\n');
}

static void print_option(const struct option *option)
{
    char label[96];
    char letter[8] = "    ";
    const char *separator = option->kind == OPTION_COUNT_MAYBE ? "[=" : " ";
    if (option->letter) snprintf(letter, sizeof letter, "-%c, ", option->letter);
    else if (option->word) snprintf(letter, sizeof letter, "-%s, ", option->word);
    const char *negation = option->kind == OPTION_SWITCH ? "[no-]" : "";
    snprintf(label, sizeof label, "  %s--%s%s%s%s%s", letter, negation, option->name, option->argument ? separator : "",
             option->argument ? option->argument : "", option->argument && *separator == '[' ? "]" : "");
    int column = printf("%s", label);
    if (column + 2 > HELP_COLUMN) printf("\n%*s", HELP_COLUMN, "");
    else printf("%*s", HELP_COLUMN - column, "");
    print_wrapped(option->help, HELP_COLUMN, HELP_COLUMN);
}

static const struct option *find_option(const struct option *options, const char *name, size_t n)
{
    for (; options->kind != OPTION_END; options++)
        if (strlen(options->name) == n && memcmp(options->name, name, n) == 0) return options;
    return NULL;
}

/* "--truncate, --raw" for "truncate raw". */
static void append_names(struct text_buffer *text, const struct option *options, const char *names)
{
    for (bool first = true; *names; first = false) {
        const size_t n = strcspn(names, " ");
        const struct option *option = find_option(options, names, n);
        const char *negation = option && option->kind == OPTION_SWITCH ? "[no-]" : "";
        text_buffer_print(text, "%s--%s%.*s", first ? "" : ", ", negation, (int)n, names);
        names += n + (names[n] == ' ');
    }
}

/* "with --from and without --temp 0". */
static void append_condition(struct text_buffer *text, const char *where)
{
    for (bool first = true; *where; first = false) {
        const bool negated = *where == '!';
        const char *word = where + negated;
        const size_t n = strcspn(word, " "), name = strcspn(word, "=~ ");
        const char *value = word + name + 1;
        const int n_value = name < n ? (int)(n - name - 1) : 0;
        text_buffer_print(text, "%s%s ", first ? "" : " and ", negated ? "without" : "with");
        if (name == 7 && memcmp(word, "operand", name) == 0)
            text_buffer_print(text, n_value ? "'%.*s'" : "a file", n_value, value);
        else if (word[name] == '~') text_buffer_print(text, "'%.*s' in --%.*s", n_value, value, (int)name, word);
        else text_buffer_print(text, "--%.*s%s%.*s", (int)name, word, n_value ? " " : "", n_value, value);
        where = word + n + (word[n] == ' ');
    }
}

static void print_rules(const struct option_rule *rules, const struct option *options)
{
    printf("\nWithout effect, and refused:\n");
    for (; rules->options; rules++) {
        struct text_buffer text = {0};
        append_names(&text, options, rules->options);
        text_buffer_append(&text, " ", 1);
        append_condition(&text, rules->where);
        text_buffer_print(&text, ": %s", rules->why);
        printf("  ");
        print_wrapped(text.text, 4, 2);
        text_buffer_free(&text);
    }
}

static void print_help(const struct command_help *help, const struct option *options)
{
    static const struct option help_option = {OPTION_FLAG, 'h',   "help", NULL, NULL, "this text", 0,
                                              0,           false, NULL,   NULL, NULL, NULL};
    printf("Usage: squeeze %s [OPTIONS]%s%s\n\n", help->name, *help->operands ? " " : "", help->operands);
    print_wrapped(help->summary, 0, 0);
    printf("\nOptions:\n");
    for (const struct option *option = options; option->kind != OPTION_END; option++) print_option(option);
    print_option(&help_option);
    if (help->rules) print_rules(help->rules, options);
    printf("\nExamples:\n%s", help->examples);
}

/* ---- Lists for completion -------------------------------------------------------- */

void options_list_word(const char *word, const char *help)
{
    printf("%s\t\t\t\t%s\n", word, help);
}

static void list_option(const struct option *option)
{
    printf("--%s\t", option->name);
    if (option->letter) printf("-%c", option->letter);
    else if (option->word) printf("-%s", option->word);
    printf("\t%s\t", option->argument && option->kind != OPTION_COUNT_MAYBE ? option->argument : "");
    for (int i = 0; option->choices && option->choices[i]; i++) printf("%s%s", i ? "," : "", option->choices[i]);
    printf("\t%s\n", option->help);
    if (option->kind == OPTION_SWITCH) printf("--no-%s\t\t\t\tnot: %s\n", option->name, option->help);
}

static void list_options(const struct option *options)
{
    for (; options->kind != OPTION_END; options++) list_option(options);
    printf("--help\t-h\t\t\tshow what there is\n");
}

/* ---- Values ------------------------------------------------------------------- */

bool parse_real_text(const char *text, size_t n, double *value)
{
    char copy[64];
    char *end;
    if (n == 0 || n >= sizeof copy || strspn(text, "0123456789.eE+-") < n) return false;
    memcpy(copy, text, n);
    copy[n] = '\0';
    *value = strtod(copy, &end);
    return *end == '\0' && isfinite(*value);
}

/* A share: "0.1" or "10%". */
static bool parse_share(const char *text, size_t n, double *value)
{
    bool percent = n > 0 && text[n - 1] == '%';
    if (!parse_real_text(text, n - (percent ? 1 : 0), value)) return false;
    if (percent) *value /= 100.0;
    return true;
}

static void parse_count(const struct option *option, const char *name, const char *text)
{
    size_t *value = option->value;
    char *end = NULL;
    errno = 0;
    unsigned long long number = *text && strspn(text, "0123456789") == strlen(text) ? strtoull(text, &end, 10) : 0;
    if (!end || errno == ERANGE || (double)number < option->low || (double)number > option->high) {
        usage_error("%s %s: allowed is a whole number from %.0f to %.0f%s%s", name, text, option->low, option->high,
                    option->example ? ", e.g. " : "", option->example ? option->example : "");
    }
    *value = (size_t)number;
}

static void parse_plain_real(const struct option *option, const char *name, const char *text)
{
    double number = 0.0;
    if (!parse_real_text(text, strlen(text), &number) || number < option->low || number > option->high ||
        (option->above && number == option->low)) {
        usage_error("%s %s: allowed is %s%g %s %g%s%s", name, text, option->above ? "more than " : "", option->low,
                    option->above ? "and at most" : "to", option->high, option->example ? ", e.g. " : "",
                    option->example ? option->example : "");
    }
    *(double *)option->value = number;
}

/* The index of text[0..n) among the choices; a usage error when it is none of them. */
static int find_choice(const struct option *option, const char *name, const char *text, size_t n)
{
    char allowed[128] = "";
    for (int i = 0; option->choices[i]; i++) {
        if (strlen(option->choices[i]) == n && memcmp(option->choices[i], text, n) == 0) return i;
        size_t used = strlen(allowed);
        snprintf(allowed + used, sizeof allowed - used, "%s%s", i ? ", " : "", option->choices[i]);
    }
    usage_error("%s %.*s: allowed is one of %s", name, (int)n, text, allowed);
}

static void parse_choices(const struct option *option, const char *name, const char *text)
{
    struct count_list *list = option->value;
    list->n = 0;
    for (;;) {
        size_t n = strcspn(text, ",");
        size_t choice = (size_t)find_choice(option, name, text, n);
        for (size_t i = 0; i < list->n; i++)
            if (list->value[i] == choice) usage_error("%s: %.*s occurs twice", name, (int)n, text);
        if (list->n == COUNT_LIST_MAX) usage_error("%s: at most %d of them", name, COUNT_LIST_MAX);
        list->value[list->n++] = choice;
        if (text[n] == '\0') return;
        text += n + 1;
    }
}

/* Digits, perhaps with a K (1024) or M (1024 K) behind them, that are the whole of text[0..n). */
static bool parse_binary_count(const char *text, size_t n, double *value)
{
    const char last = n > 0 ? text[n - 1] : '\0';
    const double unit = last == 'K' || last == 'k' ? 1024.0 : last == 'M' || last == 'm' ? 1048576.0 : 1.0;
    const size_t digits = n - (unit > 1.0 ? 1 : 0);
    if (n == 0 || digits == 0 || digits > 15 || strspn(text, "0123456789") < digits) return false;
    *value = 0.0;
    for (size_t i = 0; i < digits; i++) *value = *value * 10.0 + (text[i] - '0');
    *value *= unit;
    return true;
}

static void parse_counts(const struct option *option, const char *name, const char *text)
{
    struct count_list *list = option->value;
    list->n = 0;
    for (;;) {
        size_t n = strcspn(text, ",");
        double value = 0.0;
        if (!parse_binary_count(text, n, &value) || value < option->low || value > option->high) {
            usage_error("%s %.*s: allowed are whole numbers from %.0f to %.0f, separated by commas%s%s", name, (int)n,
                        text, option->low, option->high, option->example ? ", e.g. " : "",
                        option->example ? option->example : "");
        }
        if (list->n == COUNT_LIST_MAX) usage_error("%s: at most %d numbers", name, COUNT_LIST_MAX);
        list->value[list->n++] = (size_t)value;
        if (text[n] == '\0') return;
        text += n + 1;
    }
}

static bool is_budget(const char *text, size_t n, double *budget)
{
    /* The library takes a float, in which a positive double may be 0. */
    return parse_share(text, n, budget) && (float)*budget > 0.0f && *budget <= 1.0;
}

bool parse_budget_text(const char *text, double *budget)
{
    return is_budget(text, strlen(text), budget);
}

static double parse_budget(const char *name, const char *text, size_t n)
{
    double number = 0.0;
    if (!is_budget(text, n, &number))
        usage_error("%s %.*s: allowed is more than 0 and at most 1, e.g. 0.1", name, (int)n, text);
    return number;
}

static double parse_prune(const char *name, const char *text)
{
    double number = 0.0;
    if (!parse_share(text, strlen(text), &number) || number < 0.0 || !(number < 1.0))
        usage_error("%s %s: allowed is 0%% to less than 100%%, e.g. 90%% (or 0.9)", name, text);
    return 1.0 - number;
}

static void parse_list(const struct option *option, const char *name, const char *text)
{
    struct real_list *list = option->value;
    list->n = 0;
    for (;;) {
        size_t n = strcspn(text, ",");
        if (list->n == REAL_LIST_MAX) usage_error("%s: at most %d numbers", name, REAL_LIST_MAX);
        list->value[list->n] = parse_budget(name, text, n);
        if (option->kind == OPTION_SHARES && list->n > 0 && !(list->value[list->n] < list->value[list->n - 1])) {
            usage_error("%s %.*s: allowed is less than the level below, %g", name, (int)n, text,
                        list->value[list->n - 1]);
        }
        list->n++;
        if (text[n] == '\0') return;
        text += n + 1;
    }
}

/* The options that were given, as the user wrote them. */
enum { MAX_GIVEN = 128 };
static struct given {
    const struct option *option;
    char name[64];
} given[MAX_GIVEN];
static size_t n_given;

/* As it was given first; NULL when it was not. */
static const struct given *find_given(const struct option *option)
{
    for (size_t i = 0; i < n_given; i++)
        if (given[i].option == option) return &given[i];
    return NULL;
}

static void note_given(const struct option *option, const char *name)
{
    if (!find_given(option) && n_given < MAX_GIVEN) {
        given[n_given].option = option;
        snprintf(given[n_given++].name, sizeof given->name, "%s", name);
    }
    if (option->given) *option->given = true;
}

/* `name` is the option as the user wrote it; text is its argument, NULL for none. */
static void apply(const struct option *option, const char *name, const char *text)
{
    switch (option->kind) {
    case OPTION_END: break;
    case OPTION_FLAG: *(bool *)option->value = true; break;
    case OPTION_SWITCH: *(int *)option->value = strncmp(name, "--no-", 5) != 0; break;
    case OPTION_TEXT:
        if (!*text) usage_error("%s needs a text that is not empty", name);
        *(const char **)option->value = text;
        break;
    case OPTION_COUNT: parse_count(option, name, text); break;
    case OPTION_COUNT_MAYBE:
        if (text) parse_count(option, name, text);
        else *(size_t *)option->value = SIZE_MAX;
        break;
    case OPTION_REAL: parse_plain_real(option, name, text); break;
    case OPTION_CHOICE: *(int *)option->value = find_choice(option, name, text, strlen(text)); break;
    case OPTION_CHOICES: parse_choices(option, name, text); break;
    case OPTION_COUNTS: parse_counts(option, name, text); break;
    case OPTION_BUDGET: *(double *)option->value = parse_budget(name, text, strlen(text)); break;
    case OPTION_PRUNE: *(double *)option->value = parse_prune(name, text); break;
    case OPTION_BUDGETS:
    case OPTION_SHARES: parse_list(option, name, text); break;
    }
    note_given(option, name);
}

/* ---- Rules ---------------------------------------------------------------------- */

static bool has_value(const struct option *option, const char *text)
{
    switch (option->kind) {
    case OPTION_FLAG: return *(bool *)option->value == (strcmp(text, "1") == 0);
    case OPTION_SWITCH: return *(int *)option->value == atoi(text);
    case OPTION_TEXT: return *(const char **)option->value && strcmp(*(const char **)option->value, text) == 0;
    case OPTION_COUNT:
    case OPTION_COUNT_MAYBE: return (double)*(size_t *)option->value == atof(text);
    case OPTION_REAL:
    case OPTION_BUDGET:
    case OPTION_PRUNE: return *(double *)option->value == atof(text);
    case OPTION_CHOICE: {
        const int choice = *(int *)option->value;
        return choice >= 0 && strcmp(option->choices[choice], text) == 0;
    }
    default: return false;
    }
}

/* One word of a condition. `operand` is the first one, NULL for none. */
static bool word_holds(const struct option *options, const char *operand, const char *word, size_t n)
{
    char value[64];
    const size_t name = strcspn(word, "=~ ");
    const char kind = name < n ? word[name] : '\0';
    snprintf(value, sizeof value, "%.*s", kind ? (int)(n - name - 1) : 0, word + name + 1);
    if (name == 7 && memcmp(word, "operand", name) == 0) return operand && (!kind || strcmp(operand, value) == 0);
    const struct option *option = find_option(options, word, name);
    if (!option) die("no option '%.*s' to hold a rule against", (int)name, word);
    const char *text = option->kind == OPTION_TEXT ? *(const char **)option->value : NULL;
    return !kind ? find_given(option) != NULL : kind == '=' ? has_value(option, value) : text && strstr(text, value);
}

static bool condition_holds(const struct option *options, const char *operand, const char *where)
{
    while (*where) {
        const bool negated = *where == '!';
        const char *word = where + negated;
        const size_t n = strcspn(word, " ");
        if (word_holds(options, operand, word, n) == negated) return false;
        where = word + n + (word[n] == ' ');
    }
    return true;
}

/* Appends the options of a rule that were given, and why they count for nothing; nothing where none was. */
static void append_violation(struct text_buffer *text, const struct option *options, const struct option_rule *rule)
{
    size_t n_named = 0;
    for (const char *names = rule->options; *names;) {
        const size_t n = strcspn(names, " ");
        const struct option *option = find_option(options, names, n);
        const struct given *found = option ? find_given(option) : NULL;
        if (found) text_buffer_print(text, "%s%s", n_named++ ? ", " : text->n_bytes ? "; " : "", found->name);
        names += n + (names[n] == ' ');
    }
    if (n_named > 0) {
        text_buffer_print(text, " %s no effect ", n_named > 1 ? "have" : "has");
        append_condition(text, rule->where);
        text_buffer_print(text, ": %s", rule->why);
    }
}

/* A usage error that names every option without effect. */
static void check_rules(const struct command_help *help, const struct option *options, const char *operand)
{
    struct text_buffer text = {0};
    for (const struct option_rule *rule = help->rules; rule && rule->options; rule++)
        if (condition_holds(options, operand, rule->where)) append_violation(&text, options, rule);
    if (text.n_bytes > 0) usage_error("%s", text.text);
}

/* ---- Arguments ------------------------------------------------------------------ */

static const struct option *find_long(const struct option *options, const char *name, size_t n)
{
    const bool negated = n > 3 && memcmp(name, "no-", 3) == 0;
    const struct option *option = negated ? find_option(options, name + 3, n - 3) : NULL;
    return option && option->kind == OPTION_SWITCH ? option : find_option(options, name, n);
}

static const struct option *find_short(const struct option *options, char letter)
{
    for (; options->kind != OPTION_END; options++)
        if (options->letter == letter) return options;
    return NULL;
}

/* The optional number of OPTION_COUNT_MAYBE: the next argument when it is all digits. */
static bool is_number(const char *text)
{
    return text && *text && strspn(text, "0123456789") == strlen(text);
}

/* Handles argv[i], "--name" or "--name=value"; returns the index of the last argument used. */
static int parse_long(const struct command_help *help, const struct option *options, int argc, char **argv, int i)
{
    const char *body = argv[i] + 2;
    size_t n = strcspn(body, "=");
    const char *text = body[n] == '=' ? body + n + 1 : NULL;
    const struct option *option = find_long(options, body, n);
    char name[64];
    snprintf(name, sizeof name, "--%.*s", (int)(n < 60 ? n : 60), body);
    if (!option) usage_error("unknown option %s; 'squeeze %s --help' lists them", name, help->name);
    if (!takes_argument(option)) {
        if (text) usage_error("%s takes no value, found '%s'", name, text);
    } else if (!text && option->kind == OPTION_COUNT_MAYBE) {
        if (i + 1 < argc && is_number(argv[i + 1])) text = argv[++i];
    } else if (!text) {
        if (i + 1 >= argc) usage_error("%s needs a value: %s", name, option->argument);
        text = argv[++i];
    }
    apply(option, name, text);
    return i;
}

static const struct option *find_word(const struct option *options, const char *word)
{
    for (; options->kind != OPTION_END; options++)
        if (options->word && strcmp(options->word, word) == 0) return options;
    return NULL;
}

/* Handles argv[i], "-x", "-xVALUE" or joined flags; returns the index of the last argument used. */
static int parse_short(const struct command_help *help, const struct option *options, int argc, char **argv, int i)
{
    const struct option *whole = find_word(options, argv[i] + 1);
    if (whole) {
        if (i + 1 >= argc) usage_error("%s needs a value: %s", argv[i], whole->argument);
        apply(whole, argv[i], argv[i + 1]);
        return i + 1;
    }
    for (const char *p = argv[i] + 1; *p; p++) {
        const char name[3] = {'-', *p, '\0'};
        const struct option *option = find_short(options, *p);
        if (*p == 'h' && !option) {
            print_help(help, options);
            exit(close_stdout());
        }
        if (!option) usage_error("unknown option %s; 'squeeze %s --help' lists them", name, help->name);
        if (!takes_argument(option)) {
            apply(option, name, NULL);
            continue;
        }
        const char *text = p + 1;
        if (!*text) {
            if (i + 1 >= argc) usage_error("%s needs a value: %s", name, option->argument);
            text = argv[++i];
        }
        apply(option, name, text);
        break;
    }
    return i;
}

int options_parse(const struct command_help *help, const struct option *options, int argc, char **argv,
                  int min_operands, int max_operands)
{
    int n_operands = 0;
    bool only_operands = false;
    set_command(help->name);
    for (int i = 1; i < argc; i++) {
        char *argument = argv[i];
        if (only_operands || argument[0] != '-' || argument[1] == '\0') {
            argv[++n_operands] = argument;
        } else if (strcmp(argument, "--") == 0) {
            only_operands = true;
        } else if (strcmp(argument, "--help") == 0) {
            print_help(help, options);
            exit(close_stdout());
        } else if (strcmp(argument, OPTIONS_LIST) == 0) {
            list_options(options);
            exit(close_stdout());
        } else if (argument[1] == '-') {
            i = parse_long(help, options, argc, argv, i);
        } else {
            i = parse_short(help, options, argc, argv, i);
        }
    }
    if (n_operands < min_operands || n_operands > max_operands) {
        usage_error("%s; usage: squeeze %s [OPTIONS]%s%s",
                    n_operands < min_operands ? "an argument is missing" : "too many arguments", help->name,
                    *help->operands ? " " : "", help->operands);
    }
    check_rules(help, options, n_operands ? argv[1] : NULL);
    return n_operands;
}
