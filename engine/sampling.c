/* Tokens for one answer; sampling.h describes it. */
#include "sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "llama_library.h"
#include "model.h"

enum { N_FIRST = 256 }; /* tokens that a grammar sees before it sees all */

struct sqz_sampling {
    struct llama_sampler *chain, *last; /* what leaves tokens out, and what then chooses one */
    struct llama_sampler *grammar;      /* NULL for none */
    bool biased, draws, remembers;      /* remembers: what comes next depends on the tokens so far */
    uint32_t seed;
};

void sqz_sampling_free(struct sqz_sampling *s)
{
    if (!s) return;
    if (s->chain) llama_sampler_free(s->chain);
    if (s->last) llama_sampler_free(s->last);
    if (s->grammar) llama_sampler_free(s->grammar);
    free(s);
}

static enum sqz_status add_biases(struct sqz_sampling *s, const struct sqz_model *model,
                                  const struct sqz_sampling_options *o, struct sqz_error *error)
{
    if (o->n_biases == 0) return SQZ_OK;
    s->biased = true;
    struct llama_logit_bias *biases = calloc(o->n_biases, sizeof *biases);
    if (!biases) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %zu biases", o->n_biases);
    enum sqz_status status = SQZ_OK;
    for (size_t i = 0; i < o->n_biases && status == SQZ_OK; i++) {
        status = sqz_model_check_tokens(model, &o->biases[i].token, 1, error);
        biases[i] = (struct llama_logit_bias){o->biases[i].token, o->biases[i].bias};
    }
    if (status == SQZ_OK)
        llama_sampler_chain_add(
            s->chain, llama_sampler_init_logit_bias((int32_t)model->info.n_vocab, (int32_t)o->n_biases, biases));
    free(biases);
    return status;
}

/* llama.cpp takes this seed as a wish for a random one: another stands for it. */
static uint32_t plain_seed(uint32_t seed)
{
    return seed == LLAMA_DEFAULT_SEED ? 0x5eed5eed : seed;
}

static void add_samplers(struct sqz_sampling *s, const struct sqz_model *model, const struct sqz_sampling_options *o)
{
    if (o->frequency_penalty != 0 || o->presence_penalty != 0)
        llama_sampler_chain_add(s->chain, llama_sampler_init_penalties((int32_t)model->info.n_vocab, 4096, 1.0f,
                                                                       o->frequency_penalty, o->presence_penalty));
    s->remembers = o->frequency_penalty != 0 || o->presence_penalty != 0;
    s->draws = o->temperature > 0;
    s->seed = plain_seed(o->seed);
    s->last = s->draws ? llama_sampler_init_dist(s->seed) : llama_sampler_init_greedy();
    if (!s->draws) return;
    if (o->top_k > 0) llama_sampler_chain_add(s->chain, llama_sampler_init_top_k(o->top_k));
    llama_sampler_chain_add(s->chain, llama_sampler_init_top_p(o->top_p, 1));
    if (o->min_p > 0) llama_sampler_chain_add(s->chain, llama_sampler_init_min_p(o->min_p, 1));
    llama_sampler_chain_add(s->chain, llama_sampler_init_temp(o->temperature));
}

enum sqz_status sqz_sampling_create(struct sqz_sampling **out, const struct sqz_model *model,
                                    const struct sqz_sampling_options *o, struct sqz_error *error)
{
    *out = NULL;
    sqz_error_clear(error);
    struct sqz_sampling *s = calloc(1, sizeof *s);
    if (s) s->chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    enum sqz_status status = s && s->chain ? SQZ_OK : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    if (status == SQZ_OK) status = add_biases(s, model, o, error);
    if (status == SQZ_OK) add_samplers(s, model, o);
    if (status == SQZ_OK && !s->last) status = sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    if (status == SQZ_OK && o->grammar) {
        sqz_llama_complaint_clear();
        s->grammar = llama_sampler_init_grammar(model->vocab, o->grammar, "root");
        if (!s->grammar)
            status = sqz_error_set(error, SQZ_ERROR_ARGUMENT, "the grammar cannot be used: %s",
                                   sqz_llama_complaint("it is not well formed"));
    }
    if (status != SQZ_OK) sqz_sampling_free(s);
    else *out = s;
    return status;
}

void sqz_sampling_reset(struct sqz_sampling *s)
{
    llama_sampler_reset(s->chain);
    llama_sampler_reset(s->last);
    if (s->grammar) llama_sampler_reset(s->grammar);
}

/* ---- The next token ---------------------------------------------------------------------- */

static llama_token_data_array all_tokens(struct sqz_model *model, const float *logits)
{
    const uint32_t n = model->info.n_vocab;
    for (uint32_t i = 0; i < n; i++) model->candidates[i] = (llama_token_data){(llama_token)i, logits[i], 0.0f};
    return (llama_token_data_array){model->candidates, n, -1, false};
}

static int32_t apply_chain(struct sqz_sampling *s, llama_token_data_array *array)
{
    llama_sampler_apply(s->chain, array);
    llama_sampler_apply(s->last, array);
    return array->data[array->selected >= 0 ? array->selected : 0].id;
}

static bool grammar_allows(struct sqz_sampling *s, int32_t token)
{
    llama_token_data one = {token, 1.0f, 0.0f};
    llama_token_data_array array = {&one, 1, -1, false};
    llama_sampler_apply(s->grammar, &array);
    return isfinite(one.logit);
}

/* The N_FIRST likeliest, in falling order, which will not be one any more when a grammar has been at them. */
static llama_token_data_array first_tokens(struct sqz_model *model, const float *logits)
{
    llama_token_data *data = model->candidates;
    size_t n = 0;
    for (uint32_t i = 0; i < model->info.n_vocab; i++) {
        if (n == N_FIRST && logits[i] <= data[n - 1].logit) continue;
        size_t at = n < N_FIRST ? n++ : n - 1;
        for (; at > 0 && data[at - 1].logit < logits[i]; at--) data[at] = data[at - 1];
        data[at] = (llama_token_data){(llama_token)i, logits[i], 0.0f};
    }
    return (llama_token_data_array){data, n, -1, false};
}

static bool leaves_some(const llama_token_data_array *array)
{
    for (size_t i = 0; i < array->size; i++)
        if (isfinite(array->data[i].logit)) return true;
    return false;
}

/* A grammar takes tens of milliseconds over a whole vocabulary, while others wait. It sees the token first that the
 * model would take, which it mostly allows, then the likeliest, and all of them only when it allows none of these. */
static int32_t choose(struct sqz_sampling *s, struct sqz_model *model, const float *logits, bool *stuck)
{
    llama_token_data_array array = all_tokens(model, logits);
    int32_t token = apply_chain(s, &array);
    *stuck = false;
    if (!s->grammar || grammar_allows(s, token)) return token;
    if (!s->biased) {
        array = first_tokens(model, logits);
        llama_sampler_apply(s->grammar, &array);
    }
    if (s->biased || !leaves_some(&array)) {
        array = all_tokens(model, logits);
        llama_sampler_apply(s->grammar, &array);
    }
    token = apply_chain(s, &array);
    *stuck = !grammar_allows(s, token); /* it would throw at a token that it does not allow */
    return token;
}

static float log_sum(const float *logits, size_t n)
{
    float most = -INFINITY;
    double sum = 0;
    for (size_t i = 0; i < n; i++) most = logits[i] > most ? logits[i] : most;
    for (size_t i = 0; i < n; i++) sum += (double)expf(logits[i] - most);
    return most + (float)log(sum);
}

static void find_likely(struct sqz_choice *choice, const float *logits, size_t n, size_t wanted, float lse)
{
    for (size_t i = 0; i < n; i++) {
        const float value = logits[i] - lse;
        size_t at = choice->n_likely;
        if (at == wanted && (wanted == 0 || value <= choice->likely[at - 1].log_probability)) continue;
        if (at < wanted) choice->n_likely++;
        else at--;
        for (; at > 0 && choice->likely[at - 1].log_probability < value; at--)
            choice->likely[at] = choice->likely[at - 1];
        choice->likely[at] = (struct sqz_likely){(int32_t)i, value};
    }
}

void sqz_sampling_take(struct sqz_sampling *s, const struct sqz_model *model, const float *logits, int32_t token,
                       int n_likely, struct sqz_choice *choice)
{
    memset(choice, 0, sizeof *choice);
    choice->token = token;
    llama_sampler_accept(s->chain, token);
    if (s->grammar) llama_sampler_accept(s->grammar, token);
    choice->ends = llama_vocab_is_eog(model->vocab, token);
    if (n_likely < 0) return;
    const float lse = log_sum(logits, model->info.n_vocab);
    choice->log_probability = logits[token] - lse;
    find_likely(choice, logits, model->info.n_vocab, n_likely < SQZ_MOST_LIKELY ? (size_t)n_likely : SQZ_MOST_LIKELY,
                lse);
}

void sqz_sampling_next(struct sqz_sampling *s, struct sqz_model *model, const float *logits, int n_likely,
                       struct sqz_choice *choice)
{
    bool stuck;
    const int32_t token = choose(s, model, logits, &stuck);
    if (stuck) *choice = (struct sqz_choice){.token = token, .stuck = true};
    else sqz_sampling_take(s, model, logits, token, n_likely, choice);
}

/* ---- Drafts -------------------------------------------------------------------------------- */

bool sqz_sampling_has_odds(const struct sqz_sampling *s)
{
    return s->draws && !s->grammar;
}

void sqz_sampling_odds(struct sqz_sampling *s, struct sqz_model *model, const float *logits, float *odds)
{
    llama_token_data_array array = all_tokens(model, logits);
    float most = -INFINITY;
    double sum = 0;
    llama_sampler_apply(s->chain, &array);
    memset(odds, 0, model->info.n_vocab * sizeof *odds);
    for (size_t i = 0; i < array.size; i++) most = fmaxf(most, array.data[i].logit);
    for (size_t i = 0; i < array.size; i++) sum += (double)(array.data[i].p = expf(array.data[i].logit - most));
    for (size_t i = 0; i < array.size; i++) odds[array.data[i].id] = (float)((double)array.data[i].p / sum);
}

int32_t sqz_sampling_guess(struct sqz_sampling *s, struct sqz_model *model, const float *logits)
{
    llama_token_data_array array = all_tokens(model, logits);
    size_t best = 0;
    llama_sampler_apply(s->chain, &array);
    for (size_t i = 1; i < array.size; i++)
        if (array.data[i].logit > array.data[best].logit) best = i;
    return array.data[best].id;
}

struct sqz_sampling *sqz_sampling_trial(const struct sqz_sampling *s)
{
    struct sqz_sampling *trial = s->remembers ? calloc(1, sizeof *trial) : NULL;
    if (!trial) return NULL;
    trial->chain = llama_sampler_clone(s->chain);
    trial->last = llama_sampler_clone(s->last);
    trial->draws = s->draws;
    trial->remembers = true;
    trial->seed = s->seed;
    if (trial->chain && trial->last) return trial;
    sqz_sampling_free(trial);
    return NULL;
}

uint32_t sqz_sampling_seed(const struct sqz_sampling *s)
{
    return s->seed;
}
