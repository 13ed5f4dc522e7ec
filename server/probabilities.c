/* Probabilities of tokens; probabilities.h describes them. */
#include "probabilities.h"

json_t *probability_text(const struct request *r, int32_t token)
{
    char piece[512];
    struct bytes text = {0};
    bytes_append_utf8(&text, piece, sqz_model_token_text(r->model, token, piece, sizeof piece));
    json_t *value = json_stringn(text.data ? text.data : "", text.n);
    bytes_free(&text);
    return value;
}

static json_t *token_bytes(const struct request *r, int32_t token)
{
    char piece[512];
    const size_t n = sqz_model_token_text(r->model, token, piece, sizeof piece);
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) json_array_append_new(list, json_integer((unsigned char)piece[i]));
    return list;
}

static json_t *likely_json(const struct request *r, int32_t token, float log_probability)
{
    return json_pack("{s:o, s:f, s:o}", "token", probability_text(r, token), "logprob", (double)log_probability,
                     "bytes", token_bytes(r, token));
}

static json_t *token_json(const struct request *r, const struct sqz_choice *chosen)
{
    json_t *root = likely_json(r, chosen->token, chosen->log_probability), *top = json_array();
    for (size_t i = 0; i < chosen->n_likely; i++)
        json_array_append_new(top, likely_json(r, chosen->likely[i].token, chosen->likely[i].log_probability));
    json_object_set_new(root, "top_logprobs", top);
    return root;
}

size_t probabilities_until(const struct choice *c, size_t text_bytes)
{
    size_t n = c->n_said_sent;
    while (n < c->n_said && c->said[n].text_at <= text_bytes) n++;
    return n;
}

json_t *probabilities_json(const struct choice *c, size_t from, size_t to)
{
    json_t *list = json_array();
    for (size_t i = from; i < to; i++) json_array_append_new(list, token_json(c->request, &c->said[i].choice));
    return list;
}
