/* Drafts from the text itself; draft_ngram.h describes them. */
#include "draft_ngram.h"

#include <stdlib.h>
#include <string.h>

enum { PAIR, THREE, N_LENGTHS, LEAST_SIZE = 1024 };

static bool create_table(struct sqz_ngram_table *t, size_t n_tokens)
{
    t->size = LEAST_SIZE;
    while (t->size < 2 * n_tokens) t->size *= 2;
    t->place[PAIR] = calloc(N_LENGTHS * t->size, sizeof *t->place[PAIR]);
    t->place[THREE] = t->place[PAIR] ? t->place[PAIR] + t->size : NULL;
    return t->place[PAIR];
}

static size_t slot_of(const struct sqz_ngram_table *t, const int32_t *tokens, size_t n)
{
    uint64_t hash = n;
    for (size_t i = 0; i < n; i++) hash = (hash ^ (uint32_t)tokens[i]) * UINT64_C(0x9e3779b97f4a7c15);
    return (size_t)(hash >> 32) & (t->size - 1);
}

/* The n-grams that end with tokens from number `first` on. */
static void note(struct sqz_ngram_table *t, const int32_t *tokens, size_t first, size_t end)
{
    for (size_t i = first; i < end; i++)
        for (size_t n = 2; n <= 3 && n <= i + 1; n++)
            t->place[n - 2][slot_of(t, tokens + i + 1 - n, n)] = (uint32_t)(i + 1);
}

bool sqz_ngrams_create(struct sqz_ngrams *g, const int32_t *context, size_t n_context, size_t most_own)
{
    enum { FIRST_ROOM = 4096 };
    *g = (struct sqz_ngrams){.context = context, .n_context = n_context};
    g->room = most_own < FIRST_ROOM ? most_own : FIRST_ROOM;
    g->own = malloc((g->room ? g->room : 1) * sizeof *g->own);
    if (!g->own || !create_table(&g->of_context, n_context) || !create_table(&g->of_own, g->room)) {
        sqz_ngrams_free(g);
        return false;
    }
    note(&g->of_context, context, 0, n_context);
    return true;
}

void sqz_ngrams_free(struct sqz_ngrams *g)
{
    free(g->own);
    free(g->of_context.place[PAIR]);
    free(g->of_own.place[PAIR]);
    *g = (struct sqz_ngrams){0};
}

void sqz_ngrams_reset(struct sqz_ngrams *g)
{
    g->n_own = 0;
    memset(g->of_own.place[PAIR], 0, N_LENGTHS * g->of_own.size * sizeof *g->of_own.place[PAIR]);
}

/* Twice the room; where there is no memory drafts do without what is new. */
static bool grow(struct sqz_ngrams *g, size_t n)
{
    struct sqz_ngram_table table = {0};
    size_t room = g->room ? g->room : 1;
    while (room < n) room *= 2;
    if (room == g->room) return true;
    int32_t *own = realloc(g->own, room * sizeof *own);
    if (!own) return false;
    g->own = own;
    if (!create_table(&table, room)) return false;
    note(&table, own, 0, g->n_own ? g->n_own - 1 : 0);
    free(g->of_own.place[PAIR]);
    g->of_own = table;
    g->room = room;
    return true;
}

void sqz_ngrams_add(struct sqz_ngrams *g, size_t n_before, const int32_t *tokens, size_t n_tokens)
{
    if (n_tokens == 0 || n_before != g->n_own || !grow(g, n_before + n_tokens)) return;
    memcpy(g->own + n_before, tokens, n_tokens * sizeof *tokens);
    g->n_own = n_before + n_tokens;
    /* But the last: what follows it is not known, and where it stood before is. */
    note(&g->of_own, g->own, n_before ? n_before - 1 : 0, g->n_own - 1);
}

/* The place in text[0 .. n) behind its n-gram `last`, other than the text's end; 0: none. */
static size_t find(const struct sqz_ngram_table *t, const int32_t *text, size_t n_text, const int32_t *last, size_t n)
{
    const size_t place = t->place[n - 2][slot_of(t, last, n)];
    if (place < n || place >= n_text) return 0;
    return memcmp(text + place - n, last, n * sizeof *last) == 0 ? place : 0;
}

static size_t copy(int32_t *draft, const int32_t *text, size_t n_text, size_t place, size_t most)
{
    const size_t n = n_text - place < most ? n_text - place : most;
    memcpy(draft, text + place, n * sizeof *draft);
    return n;
}

size_t sqz_ngrams_find(const struct sqz_ngrams *g, const int32_t *behind, size_t n_behind, int32_t *draft, size_t most,
                       size_t *n_equal)
{
    int32_t last[3];
    size_t n_last = 0;
    for (size_t back = 3; back > 0; back--)
        if (back <= n_behind) last[n_last++] = behind[n_behind - back];
        else if (back - n_behind <= g->n_own) last[n_last++] = g->own[g->n_own - (back - n_behind)];
    for (size_t n = n_last; n >= 2; n--) {
        *n_equal = n;
        const int32_t *of = last + n_last - n;
        size_t place = find(&g->of_own, g->own, g->n_own, of, n);
        if (place) return copy(draft, g->own, g->n_own, place, most);
        place = find(&g->of_context, g->context, g->n_context, of, n);
        if (place) return copy(draft, g->context, g->n_context, place, most);
    }
    return 0;
}
