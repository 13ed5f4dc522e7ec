/*
 * Synthetic long-context tasks; synthetic.h describes them. A plan fixes all
 * that does not depend on the document's size (keys, values, where in the text
 * each needle belongs), a builder writes the text for a number of filler units
 * (sentences or words), and fit() looks for the largest number that fits.
 *
 * Texts are not kept but written anew for every size: at ten million tokens
 * that takes a second, and counting them takes several.
 */
#include "synthetic.h"

#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "memory.h"
#include "random.h"
#include "synthetic_prose.h"
#include "text_buffer.h"

const char *const synthetic_names[N_SYNTHETIC] = {
    "niah_single",       "niah_multikey", "niah_multivalue", "niah_multiquery",
    "variable_tracking", "common_words",  "frequent_words",
};

/* RULER's defaults: four keys, values or queries in the multi tasks, chains of four hops, ten words 30 times among
 * others that occur 3 times, the three most frequent. */
enum {
    MULTI_NEEDLES = 4,
    CHAIN_VARIABLES = 5,
    DISTRACTOR_CHAINS = 1, /* ours: with one question there would be nothing to tell apart */
    COMMON_WORDS = 10,
    COMMON_TIMES = 30,
    UNCOMMON_TIMES = 3,
    FREQUENT_WORDS = 3,
    CODED_LETTERS = 6,
    VARIABLE_LETTERS = 5,
};

/* ---- The plan --------------------------------------------------------------------- */

/* A sentence that goes into the prose. */
struct insertion {
    struct text_buffer sentence;
    double place;    /* in [0, 1): after which share of the prose */
    size_t question; /* SIZE_MAX: not asked for */
    size_t begin;    /* byte of the text built last */
};

struct plan {
    enum synthetic_kind kind;
    uint64_t seed;
    struct synthetic_document *document; /* its questions */
    struct insertion *insertions;        /* in the order of their places */
    size_t n_insertions;
    struct vocabulary vocabulary; /* common words */
    uint64_t *coded;              /* frequent words: by rank, the first unused */
    size_t n_coded;
    struct text_buffer text;
};

/* What is random about a document comes from streams of its own, so that the size of one thing moves nothing else. */
enum stream { STREAM_PLAN, STREAM_PROSE, STREAM_ORDER };

static void seed_stream(struct sqz_random *random, const struct plan *plan, enum stream stream)
{
    uint64_t state = plan->seed;
    sqz_random_seed(random, sqz_splitmix64(&state) ^ ((uint64_t)plan->kind << 8 | (uint64_t)stream));
}

/* A number below limit that is not among the n of `used`, and now is. The sets are small: a linear search does. */
static uint64_t draw_unused(struct sqz_random *random, uint64_t limit, uint64_t *used, size_t n)
{
    for (;;) {
        uint64_t number = sqz_random_below(random, limit);
        size_t i = 0;
        while (i < n && used[i] != number) i++;
        if (i == n) {
            used[n] = number;
            return number;
        }
    }
}

static void begin_question(struct synthetic_question *question, size_t n_answers)
{
    question->answers = allocate(n_answers, sizeof *question->answers);
    question->n_answers = n_answers;
}

static int compare_places(const void *a, const void *b)
{
    double x = ((const struct insertion *)a)->place, y = ((const struct insertion *)b)->place;
    return (x > y) - (x < y);
}

static void sort_insertions(struct plan *plan)
{
    qsort(plan->insertions, plan->n_insertions, sizeof *plan->insertions, compare_places);
}

/* The text is cut into as many strata as there are needles, for one each: which is that of `needle` of `question`.
 * Asked needles come out evenly over the text, and those of one question far apart. Shift: one random number below
 * MULTI_NEEDLES for each question. */
static size_t needle_stratum(enum synthetic_kind kind, size_t question, size_t needle, size_t n_questions,
                             const size_t *shift)
{
    if (kind != SYNTHETIC_NEEDLE_MULTI_KEY) return needle * n_questions + question;
    /* The asked needle in four strata of the question's own, its distractors in other questions' if there are any. */
    size_t host = (question + needle * n_questions / MULTI_NEEDLES) % n_questions;
    return MULTI_NEEDLES * host + (shift[host] + needle) % MULTI_NEEDLES;
}

static void ask_for_needles(struct synthetic_question *question, enum synthetic_kind kind,
                            const struct text_buffer *keys)
{
    struct text_buffer text = {0};
    if (kind == SYNTHETIC_NEEDLE_MULTI_VALUE) {
        text_buffer_print(&text, "What are all the special magic numbers for %s that the text above gives?",
                          keys[0].text);
    } else if (kind == SYNTHETIC_NEEDLE_MULTI_QUERY) {
        text_buffer_print(&text, "What are the special magic numbers for %s, %s, %s and %s that the text above gives?",
                          keys[0].text, keys[1].text, keys[2].text, keys[3].text);
    } else {
        text_buffer_print(&text, "What is the special magic number for %s that the text above gives?", keys[0].text);
    }
    append_string(&text, question->n_answers == 1 ? " Answer with only the number." : " Answer with only the numbers.");
    question->question = text.text;
}

static void plan_needles(struct plan *plan)
{
    enum synthetic_kind kind = plan->kind;
    size_t n_questions = plan->document->n_questions;
    size_t n_each = kind == SYNTHETIC_NEEDLE ? 1 : MULTI_NEEDLES;
    size_t n_keys = kind == SYNTHETIC_NEEDLE_MULTI_VALUE ? 1 : n_each; /* of a question */
    size_t n = n_questions * n_each;
    struct sqz_random random;
    seed_stream(&random, plan, STREAM_PLAN);
    struct vocabulary vocabulary = make_vocabulary(&random, 1);
    uint64_t *used_keys = allocate(n, sizeof *used_keys), *used_values = allocate(n, sizeof *used_values);
    size_t *shift = allocate(n_questions, sizeof *shift);
    for (size_t q = 0; q < n_questions; q++) shift[q] = (size_t)sqz_random_below(&random, MULTI_NEEDLES);
    plan->insertions = allocate(n, sizeof *plan->insertions);
    for (size_t q = 0; q < n_questions; q++) {
        struct synthetic_question *question = &plan->document->questions[q];
        struct text_buffer keys[MULTI_NEEDLES] = {{0}};
        begin_question(question, kind == SYNTHETIC_NEEDLE_MULTI_KEY ? 1 : n_each);
        for (size_t k = 0; k < n_keys; k++)
            append_word(&keys[k], &vocabulary, draw_unused(&random, vocabulary.n_words, used_keys, q * n_keys + k));
        for (size_t k = 0; k < n_each; k++) {
            struct insertion *insertion = &plan->insertions[plan->n_insertions];
            unsigned value = 1000000 + (unsigned)draw_unused(&random, 9000000, used_values, plan->n_insertions++);
            bool asked = k < question->n_answers;
            text_buffer_print(&insertion->sentence, "A special magic number for %s is: %u.",
                              keys[n_keys == 1 ? 0 : k].text, value);
            insertion->question = asked ? q : SIZE_MAX;
            size_t stratum = needle_stratum(kind, q, k, n_questions, shift);
            insertion->place = ((double)stratum + sqz_random_unit(&random)) / (double)n;
            if (asked) {
                struct text_buffer answer = {0};
                text_buffer_print(&answer, "%u", value);
                question->answers[k] = answer.text;
            }
        }
        ask_for_needles(question, kind, keys);
        for (size_t k = 0; k < n_keys; k++) text_buffer_free(&keys[k]);
    }
    free(used_keys);
    free(used_values);
    free(shift);
    sort_insertions(plan);
}

static void plan_variables(struct plan *plan)
{
    size_t n_questions = plan->document->n_questions, n_chains = n_questions + DISTRACTOR_CHAINS;
    size_t n = n_chains * CHAIN_VARIABLES;
    struct sqz_random random;
    seed_stream(&random, plan, STREAM_PLAN);
    uint64_t *used_names = allocate(n, sizeof *used_names), *used_values = allocate(n_chains, sizeof *used_values);
    uint64_t n_names = 1;
    for (size_t i = 0; i < VARIABLE_LETTERS; i++) n_names *= 26;
    size_t shift[CHAIN_VARIABLES]; /* the chains' order is another in each fifth of the text */
    for (size_t i = 0; i < CHAIN_VARIABLES; i++) shift[i] = (size_t)sqz_random_below(&random, n_chains);
    plan->insertions = allocate(n, sizeof *plan->insertions);
    for (size_t chain = 0; chain < n_chains; chain++) {
        struct synthetic_question *question = chain < n_questions ? &plan->document->questions[chain] : NULL;
        unsigned value = 10000 + (unsigned)draw_unused(&random, 90000, used_values, chain);
        struct text_buffer before = {0};
        if (question) {
            struct text_buffer text = {0};
            begin_question(question, CHAIN_VARIABLES);
            text_buffer_print(&text,
                              "Which %d variables have the value %u in the text above, given it directly or by way of "
                              "other variables? Answer with only the names of the variables.",
                              CHAIN_VARIABLES, value);
            question->question = text.text;
        }
        for (size_t i = 0; i < CHAIN_VARIABLES; i++) {
            struct insertion *insertion = &plan->insertions[plan->n_insertions];
            struct text_buffer name = {0};
            uint64_t code = draw_unused(&random, n_names, used_names, plan->n_insertions++);
            append_letters(&name, code, VARIABLE_LETTERS, 'A');
            if (i == 0) text_buffer_print(&insertion->sentence, "VAR %s = %u.", name.text, value);
            else text_buffer_print(&insertion->sentence, "VAR %s = VAR %s.", name.text, before.text);
            insertion->question = question ? chain : SIZE_MAX;
            size_t stratum = i * n_chains + (chain + shift[i]) % n_chains;
            insertion->place = ((double)stratum + sqz_random_unit(&random)) / (double)n;
            text_buffer_free(&before);
            before = name;
            if (question) {
                struct text_buffer answer = {0};
                append_string(&answer, name.text);
                question->answers[i] = answer.text;
            }
        }
        text_buffer_free(&before);
    }
    free(used_names);
    free(used_values);
    sort_insertions(plan);
}

/* The vocabulary, and with it the question, depend on how many words are needed: called again with one more thing. */
static void plan_common_words(struct plan *plan, unsigned n_things)
{
    struct synthetic_question *question = &plan->document->questions[0];
    struct sqz_random random;
    seed_stream(&random, plan, STREAM_PLAN);
    plan->vocabulary = make_vocabulary(&random, n_things);
    if (!question->question) {
        struct text_buffer text = {0};
        begin_question(question, COMMON_WORDS);
        text_buffer_print(&text,
                          "Which %d words occur most often in the numbered list above? Answer with only the %d words.",
                          COMMON_WORDS, COMMON_WORDS);
        question->question = text.text;
    }
    for (size_t i = 0; i < COMMON_WORDS; i++) {
        struct text_buffer answer = {0};
        append_word(&answer, &plan->vocabulary, i);
        free(question->answers[i]);
        question->answers[i] = answer.text;
    }
}

/* How often rank k stands among n words: floor(n / (zeta(2) k^2)). */
static size_t frequency(size_t n, size_t rank)
{
    const double zeta_2 = 1.6449340668482264;
    return (size_t)((double)n / (zeta_2 * (double)rank * (double)rank));
}

static void plan_frequent_words(struct plan *plan, size_t n_tokens)
{
    struct synthetic_question *question = &plan->document->questions[0];
    struct text_buffer text = {0};
    struct sqz_random random;
    seed_stream(&random, plan, STREAM_PLAN);
    while (frequency(n_tokens, plan->n_coded + 1) > 0) plan->n_coded++;
    uint64_t n_codes = 1;
    for (size_t i = 0; i < CODED_LETTERS; i++) n_codes *= 26;
    plan->coded = allocate(plan->n_coded, sizeof *plan->coded);
    for (size_t i = 0; i < plan->n_coded; i++) draw_unused(&random, n_codes, plan->coded, i);
    begin_question(question, FREQUENT_WORDS);
    for (size_t i = 0; i < FREQUENT_WORDS; i++) {
        struct text_buffer answer = {0};
        append_letters(&answer, plan->coded[1 + i], CODED_LETTERS, 'a');
        question->answers[i] = answer.text;
    }
    append_string(&text, "Which three coded words occur most often in the text above? The dots ... are not a word. "
                         "Answer with only the three words.");
    question->question = text.text;
}

/* ---- The text of n units ------------------------------------------------------------ */

static void append_insertion(struct text_buffer *text, struct insertion *insertion)
{
    insertion->begin = text->n_bytes;
    text_buffer_append(text, insertion->sentence.text, insertion->sentence.n_bytes);
    text_buffer_append(text, " ", 1);
}

/* A unit is a sentence. */
static void build_prose(struct plan *plan, size_t n)
{
    struct text_buffer *text = &plan->text;
    struct prose prose = {.paragraph_left = 5};
    size_t next = 0;
    seed_stream(&prose.random, plan, STREAM_PROSE);
    append_string(text, plan->kind == SYNTHETIC_VARIABLES
                            ? "Assignments of variables are hidden in the following text. Follow them.\n\n"
                            : "Special magic numbers are hidden in the following text. Remember them.\n\n");
    for (size_t i = 0; i <= n; i++) {
        while (next < plan->n_insertions && plan->insertions[next].place * (double)(n + 1) < (double)(i + 1))
            append_insertion(text, &plan->insertions[next++]);
        if (i == n) break;
        append_sentence(text, &prose);
        text_buffer_append(text, --prose.paragraph_left == 0 ? "\n" : " ", 1);
        if (prose.paragraph_left == 0) prose.paragraph_left = 4 + (size_t)sqz_random_below(&prose.random, 5);
    }
    while (next < plan->n_insertions) /* a place that rounding took to the very end */
        append_insertion(text, &plan->insertions[next++]);
}

static void shuffle(const struct plan *plan, uint32_t *items, size_t n)
{
    struct sqz_random random;
    seed_stream(&random, plan, STREAM_ORDER);
    for (size_t i = n; i > 1; i--) {
        size_t other = (size_t)sqz_random_below(&random, i);
        uint32_t item = items[i - 1];
        items[i - 1] = items[other];
        items[other] = item;
    }
}

/* A unit is an uncommon word, UNCOMMON_TIMES entries of the list. */
static void build_common_words(struct plan *plan, size_t n)
{
    size_t n_entries = COMMON_WORDS * COMMON_TIMES + n * UNCOMMON_TIMES, at = 0;
    uint32_t *entries = allocate(n_entries, sizeof *entries);
    for (size_t word = 0; word < COMMON_WORDS + n; word++)
        for (size_t i = 0; i < (word < COMMON_WORDS ? COMMON_TIMES : UNCOMMON_TIMES); i++)
            entries[at++] = (uint32_t)word;
    shuffle(plan, entries, n_entries);
    append_string(&plan->text, "This is a numbered list of words. Some of them occur more often than others.\n\n");
    for (size_t i = 0; i < n_entries; i++) {
        text_buffer_print(&plan->text, "%zu. ", i + 1);
        append_word(&plan->text, &plan->vocabulary, entries[i]);
        text_buffer_append(&plan->text, " ", 1);
    }
    free(entries);
}

/* A unit is a word drawn; the few that rounding down leaves over do not appear. */
static void build_frequent_words(struct plan *plan, size_t n)
{
    uint32_t *words = allocate(n, sizeof *words);
    size_t n_words = 0;
    for (size_t rank = 1; rank <= plan->n_coded; rank++)
        for (size_t i = frequency(n, rank); i > 0; i--) words[n_words++] = (uint32_t)rank;
    shuffle(plan, words, n_words);
    append_string(&plan->text, "This is a coded text. Keep track of how often each coded word occurs.\n\n");
    for (size_t i = 0; i < n_words; i++) {
        if (words[i] == 1) append_string(&plan->text, "...");
        else append_letters(&plan->text, plan->coded[words[i] - 1], CODED_LETTERS, 'a');
        text_buffer_append(&plan->text, " ", 1);
    }
    free(words);
}

static void build(struct plan *plan, size_t n)
{
    plan->text.n_bytes = 0;
    if (plan->kind == SYNTHETIC_COMMON_WORDS) build_common_words(plan, n);
    else if (plan->kind == SYNTHETIC_FREQUENT_WORDS) build_frequent_words(plan, n);
    else build_prose(plan, n);
    plan->text.text[--plan->text.n_bytes] = '\0'; /* the last space or line end */
}

/* ---- The largest text that fits -------------------------------------------------------- */

struct counter {
    size_t (*count)(void *user_data, const char *text, size_t n_bytes);
    void *user_data;
};

static size_t count_units(struct plan *plan, const struct counter *counter, size_t n)
{
    build(plan, n);
    return counter->count(counter->user_data, plan->text.text, plan->text.n_bytes);
}

static size_t least_units(enum synthetic_kind kind)
{
    switch (kind) {
    case SYNTHETIC_COMMON_WORDS: return COMMON_WORDS; /* as many to tell them from */
    case SYNTHETIC_FREQUENT_WORDS: return 80;         /* from 74 on, ranks 4 and 5 differ by at least one */
    default: return 1;
    }
}

/* More sentences or words than tokens there cannot be: the search's bound, far above what fits. */
static size_t most_units(const struct plan *plan, size_t n_tokens)
{
    size_t n_words = (size_t)plan->vocabulary.n_words;
    bool few_words = plan->kind == SYNTHETIC_COMMON_WORDS && n_words - COMMON_WORDS < n_tokens;
    return few_words ? n_words - COMMON_WORDS : n_tokens;
}

/* Where to look between low (fits) and high (too large or not looked at). Texts grow evenly: a line through the last
 * two points hits the mark within a percent. After a few steps halves, which end for sure. */
static size_t next_units(size_t low, size_t high, const double units[2], const double tokens[2], size_t step,
                         double aim)
{
    double slope = units[1] != units[0] ? (tokens[1] - tokens[0]) / (units[1] - units[0]) : 0.0;
    double guess = slope > 0.0 ? units[1] + (aim - tokens[1]) / slope : 0.0;
    if (step >= 6 || !(slope > 0.0)) return low + (high - low) / 2;
    return guess <= (double)low ? low + 1 : guess >= (double)high ? high - 1 : (size_t)guess;
}

/* Leaves the text built. From 97% of n_tokens on it is not worth another count. */
static void fit(struct plan *plan, const struct counter *counter, size_t n_tokens)
{
    size_t low = least_units(plan->kind), built = low;
    size_t low_tokens = count_units(plan, counter, low);
    if (low_tokens > n_tokens) {
        die("%s with %zu question%s takes at least %zu tokens, not %zu", synthetic_names[plan->kind],
            plan->document->n_questions, plan->document->n_questions == 1 ? "" : "s", low_tokens, n_tokens);
    }
    if (plan->kind == SYNTHETIC_COMMON_WORDS) {
        /* Entries are shortest in the shortest list: what this gives, the longer list does not reach. */
        size_t least_entries = (COMMON_TIMES + UNCOMMON_TIMES) * COMMON_WORDS;
        double n_words = (double)n_tokens / (double)low_tokens * (double)least_entries / UNCOMMON_TIMES;
        if (n_words > (double)most_units(plan, n_tokens)) {
            plan_common_words(plan, 2);
            low_tokens = count_units(plan, counter, low);
        }
    }
    size_t high = most_units(plan, n_tokens) + 1;
    double units[2] = {(double)low, (double)low}, tokens[2] = {(double)low_tokens, (double)low_tokens};
    double enough = 0.97 * (double)n_tokens, aim = 0.985 * (double)n_tokens;
    for (size_t step = 0; high > low && high - low > 1 && (double)low_tokens < enough; step++) {
        size_t n = next_units(low, high, units, tokens, step, aim);
        if (step == 0) {
            /* The slope is unknown: a unit is at most some 16 tokens, of which this takes a quarter of the text. */
            n = low + 1 + n_tokens / 64 < high ? low + 1 + n_tokens / 64 : high - 1;
        }
        size_t n_counted = count_units(plan, counter, n);
        units[0] = units[1];
        tokens[0] = tokens[1];
        units[1] = (double)n;
        tokens[1] = (double)n_counted;
        built = n;
        if (n_counted <= n_tokens) {
            low = n;
            low_tokens = n_counted;
        } else {
            high = n;
        }
    }
    if (built != low) build(plan, low);
}

/* ---- Documents -------------------------------------------------------------------------- */

static void set_depths(const struct plan *plan)
{
    struct synthetic_document *document = plan->document;
    for (size_t i = plan->n_insertions; i-- > 0;) { /* from the end: the first needle's depth stays */
        const struct insertion *insertion = &plan->insertions[i];
        if (insertion->question != SIZE_MAX)
            document->questions[insertion->question].depth_percent = insertion->begin * 100 / plan->text.n_bytes;
    }
}

void synthetic_make(struct synthetic_document *document, enum synthetic_kind kind, size_t n_tokens, size_t n_questions,
                    uint64_t seed, size_t (*count)(void *user_data, const char *text, size_t n_bytes), void *user_data)
{
    struct plan plan = {.kind = kind, .seed = seed, .document = document};
    struct counter counter = {count, user_data};
    if (n_tokens < SYNTHETIC_MIN_TOKENS || n_tokens > SYNTHETIC_MAX_TOKENS)
        die("a synthetic document has %d to %d tokens, not %zu", SYNTHETIC_MIN_TOKENS, SYNTHETIC_MAX_TOKENS, n_tokens);
    if (n_questions < 1 || n_questions > SYNTHETIC_MAX_QUESTIONS)
        die("a synthetic document has 1 to %d questions, not %zu", SYNTHETIC_MAX_QUESTIONS, n_questions);
    if (kind == SYNTHETIC_COMMON_WORDS || kind == SYNTHETIC_FREQUENT_WORDS) n_questions = 1;
    memset(document, 0, sizeof *document);
    document->questions = allocate(n_questions, sizeof *document->questions);
    document->n_questions = n_questions;
    switch (kind) {
    case SYNTHETIC_VARIABLES: plan_variables(&plan); break;
    case SYNTHETIC_COMMON_WORDS: plan_common_words(&plan, 1); break;
    case SYNTHETIC_FREQUENT_WORDS: plan_frequent_words(&plan, n_tokens); break;
    default: plan_needles(&plan); break;
    }
    fit(&plan, &counter, n_tokens);
    if (kind < SYNTHETIC_VARIABLES) set_depths(&plan);
    document->text = plan.text.text;
    document->text_bytes = plan.text.n_bytes;
    for (size_t i = 0; i < plan.n_insertions; i++) text_buffer_free(&plan.insertions[i].sentence);
    free(plan.insertions);
    free(plan.coded);
}

void synthetic_free(struct synthetic_document *document)
{
    for (size_t q = 0; q < document->n_questions; q++) {
        for (size_t i = 0; i < document->questions[q].n_answers; i++) free(document->questions[q].answers[i]);
        free(document->questions[q].answers);
        free(document->questions[q].question);
    }
    free(document->questions);
    free(document->text);
    memset(document, 0, sizeof *document);
}

bool synthetic_parse(const char *spec, enum synthetic_kind *kind, size_t *n_tokens)
{
    const char *colon = strchr(spec, ':');
    size_t found = 0, n = 0;
    if (!colon) return false;
    size_t name_bytes = (size_t)(colon - spec);
    while (found < N_SYNTHETIC &&
           !(strlen(synthetic_names[found]) == name_bytes && memcmp(synthetic_names[found], spec, name_bytes) == 0))
        found++;
    const char *digit = colon + 1;
    if (found == N_SYNTHETIC || *digit < '1' || *digit > '9') return false;
    for (; *digit >= '0' && *digit <= '9' && n <= SYNTHETIC_MAX_TOKENS; digit++) n = n * 10 + (size_t)(*digit - '0');
    if (*digit == 'K') {
        n *= 1024;
        digit++;
    }
    if (*digit != '\0' || n < SYNTHETIC_MIN_TOKENS || n > SYNTHETIC_MAX_TOKENS) return false;
    *kind = (enum synthetic_kind)found;
    *n_tokens = n;
    return true;
}
