/* The next token of a session: its logits, and llama.cpp's samplers over them. */
#include "error.h"
#include "session.h"

/* llama.cpp takes this seed as a wish for a random one: another stands for it. */
static uint32_t plain_seed(uint32_t seed)
{
    return seed == LLAMA_DEFAULT_SEED ? 0x5eed5eed : seed;
}

enum sqz_status sqz_session_create_sampler(struct sqz_session *s, struct sqz_error *error)
{
    struct llama_sampler_chain_params p = llama_sampler_chain_default_params();
    s->sampler = llama_sampler_chain_init(p);
    if (!s->sampler) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sampler");
    if (s->options.temperature > 0) {
        llama_sampler_chain_add(s->sampler, llama_sampler_init_top_p(s->options.top_p, 1));
        llama_sampler_chain_add(s->sampler, llama_sampler_init_temp(s->options.temperature));
        llama_sampler_chain_add(s->sampler, llama_sampler_init_dist(plain_seed(s->options.seed)));
    } else {
        llama_sampler_chain_add(s->sampler, llama_sampler_init_greedy());
    }
    return SQZ_OK;
}

const float *sqz_session_logits(const struct sqz_session *s)
{
    return s->has_logits ? s->logits : NULL;
}

int32_t sqz_session_sample(struct sqz_session *s, bool *end)
{
    const uint32_t n = s->model->info.n_vocab;
    if (!s->has_logits) {
        *end = true;
        return -1;
    }
    for (uint32_t i = 0; i < n; i++) s->model->candidates[i] = (llama_token_data){(llama_token)i, s->logits[i], 0.0f};
    llama_token_data_array array = {s->model->candidates, n, -1, false};
    llama_sampler_apply(s->sampler, &array);
    const llama_token token = array.data[array.selected >= 0 ? array.selected : 0].id;
    llama_sampler_accept(s->sampler, token);
    *end = llama_vocab_is_eog(s->model->vocab, token);
    return token;
}
