/* Choosing tokens for one answer from any session's logits: llama.cpp's samplers, a grammar, and probabilities. */
#ifndef SQZ_ENGINE_SAMPLING_H
#define SQZ_ENGINE_SAMPLING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "squeeze.h"

enum { SQZ_MOST_LIKELY = 20 };

struct sqz_bias {
    int32_t token;
    float bias;
};

struct sqz_sampling_options {
    float temperature; /* 0: the likeliest */
    float top_p;       /* (0, 1] */
    float min_p;       /* [0, 1]; 0: none */
    int32_t top_k;     /* 0: all */
    uint32_t seed;
    float frequency_penalty, presence_penalty; /* of all tokens chosen so far; 0: none */
    const struct sqz_bias *biases;             /* [n_biases], added to logits */
    size_t n_biases;
    const char *grammar; /* GBNF whose first rule is "root"; NULL: none */
};

struct sqz_likely {
    int32_t token;
    float log_probability; /* by the model's own logits, before temperature and grammar */
};

struct sqz_choice {
    int32_t token;
    bool ends;  /* it ends the answer */
    bool stuck; /* the grammar leaves none; token is then of no use */
    float log_probability;
    struct sqz_likely likely[SQZ_MOST_LIKELY]; /* in falling order */
    size_t n_likely;
};

struct sqz_sampling;

/* Errors: ARGUMENT (a grammar that is none, a bias on a token that the model does not have), MEMORY. */
enum sqz_status sqz_sampling_create(struct sqz_sampling **out, const struct sqz_model *model,
                                    const struct sqz_sampling_options *options, struct sqz_error *error);
void sqz_sampling_free(struct sqz_sampling *sampling);

/* The next token. n_likely: how many of the likeliest are wanted, or -1: no probabilities at all. One call at a time a
 * model. */
void sqz_sampling_next(struct sqz_sampling *sampling, struct sqz_model *model, const float *logits, int n_likely,
                       struct sqz_choice *choice);
/* Forgets the tokens so far. */
void sqz_sampling_reset(struct sqz_sampling *sampling);

/* ---- For who drafts tokens ---- */

/* Whether tokens are drawn from odds that can be told: above temperature 0, without a grammar. */
bool sqz_sampling_has_odds(const struct sqz_sampling *sampling);
/* The distribution that the next token is drawn from, after all that leaves some out: F32 [n_vocab]. */
void sqz_sampling_odds(struct sqz_sampling *sampling, struct sqz_model *model, const float *logits, float *odds);
/* The likeliest next token, the grammar left aside. */
int32_t sqz_sampling_guess(struct sqz_sampling *sampling, struct sqz_model *model, const float *logits);
/* Takes a token that was chosen elsewhere, as sqz_sampling_next() does its own. */
void sqz_sampling_take(struct sqz_sampling *sampling, const struct sqz_model *model, const float *logits, int32_t token,
                       int n_likely, struct sqz_choice *choice);
/* As sampling would be without drafts so far: to take drafts without remembering them. NULL: it remembers none anyway, or
 * out of memory. Has no grammar. */
struct sqz_sampling *sqz_sampling_trial(const struct sqz_sampling *sampling);
uint32_t sqz_sampling_seed(const struct sqz_sampling *sampling);

#endif
