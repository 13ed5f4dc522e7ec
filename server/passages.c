/* Passages of a document; passages.h describes them. */
#include "passages.h"

#include <stdlib.h>
#include <string.h>

/* How well a text may be cut before position i: at a paragraph, a line, a sentence, a word, a character. */
static int quality(const char *text, size_t i)
{
    const char before = text[i - 1];
    if (((unsigned char)text[i] & 0xc0) == 0x80) return 0;
    if (before == '\n') return i > 1 && text[i - 2] == '\n' && text[i] != '\n' ? 5 : 4;
    if (before == ' ' && i > 1 && strchr(".?!:;", text[i - 2])) return 3;
    return before == ' ' ? 2 : 1;
}

/* Of the places in a third before and behind the wanted one the best, of equals the nearest. */
static size_t cut_at(const char *text, size_t n_bytes, size_t wanted, size_t reach)
{
    size_t best = wanted;
    int found = -1;
    for (size_t away = 0; away <= reach; away++)
        for (int side = 0; side < 2; side++) {
            const size_t i = side ? wanted + away : wanted - away;
            if (i >= n_bytes || quality(text, i) <= found) continue;
            found = quality(text, i);
            best = i;
        }
    return best;
}

size_t passages_cut(struct passage passages[MOST_PASSAGES], const char *text, size_t n_bytes)
{
    enum { LEAST_BYTES = 180 };
    /* The shortest is two thirds of the usual, and that as many as there may be. */
    const size_t usual = n_bytes * 3 / (2 * (MOST_PASSAGES - 1)) + 1;
    const size_t length = usual < LEAST_BYTES ? LEAST_BYTES : usual, reach = length / 3;
    size_t n = 0;
    for (size_t at = 0, end; at < n_bytes; at = end) {
        end = n_bytes - at <= length + reach ? n_bytes : cut_at(text, n_bytes, at + length, reach);
        passages[n++] = (struct passage){at, end, 0};
    }
    return n;
}

bool passages_share(struct passage *passages, size_t n, const size_t *n_bytes, const float *had, size_t n_tokens)
{
    double sum = 0;
    for (size_t i = 0, at = 0, p = 0; n && i < n_tokens; at += n_bytes[i++]) {
        while (p + 1 < n && at >= passages[p].to) p++;
        passages[p].share += (double)had[i];
        sum += (double)had[i];
    }
    for (size_t p = 0; sum > 0 && p < n; p++) passages[p].share /= sum;
    return sum > 0;
}

struct passage *passages_of_answer(const struct sqz_model *model, const struct entry *e,
                                   const struct sqz_session *session, size_t *n)
{
    const size_t n_tokens = e->info.n_tokens, first = e->n_before;
    float *had = calloc(n_tokens, sizeof *had);
    size_t *lengths = calloc(n_tokens, sizeof *lengths);
    struct passage *passages = calloc(MOST_PASSAGES, sizeof *passages);
    char piece[512];
    bool known = had && lengths && passages && sqz_session_attention_map(session, had) > 0;
    if (known) {
        for (size_t i = 0; i < n_tokens && i < e->info.squeeze.n_sinks; i++) had[i] = 0;
        for (size_t i = first; i < n_tokens; i++)
            lengths[i] = sqz_model_token_text(model, e->info.tokens[i], piece, sizeof piece);
        *n = passages_cut(passages, e->document, e->document_bytes);
        known = passages_share(passages, *n, lengths + first, had + first, n_tokens - first);
    }
    free(had);
    free(lengths);
    if (known) return passages;
    free(passages);
    return NULL;
}

json_t *passages_json(const struct passage *passages, size_t n)
{
    if (!passages) return json_null();
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(list, json_pack("{s:I, s:I, s:f}", "from", (json_int_t)passages[i].from, "to",
                                              (json_int_t)passages[i].to, "share", passages[i].share));
    return list;
}
