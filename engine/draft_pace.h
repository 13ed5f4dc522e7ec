/*
 * How many tokens a draft has: as many as make the answer come fastest, by what
 * share of the drafted tokens was kept and by what drafting and verifying took,
 * down to none. It knows no clock: the caller says what took how long.
 */
#ifndef SQZ_ENGINE_DRAFT_PACE_H
#define SQZ_ENGINE_DRAFT_PACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SQZ_MOST_DRAFT_TOKENS = 16 };

/* Who drafted a token: the model by a part of the context, or the text, where two or three tokens were the same. */
enum sqz_draft_source { SQZ_DRAFTED_BY_MODEL, SQZ_DRAFTED_BY_PAIR, SQZ_DRAFTED_BY_THREE, SQZ_DRAFT_SOURCES };

struct sqz_draft_pace {
    size_t most;                    /* tokens a draft */
    bool steady;                    /* as many as are allowed, whatever that takes */
    bool captured;                  /* what a batch launches is captured the second time: few sizes, on a card */
    double kept[SQZ_DRAFT_SOURCES]; /* share of the drafted tokens that were looked at */
    double token;                   /* seconds of an exact token by itself; 0: not known */
    double draft;                   /* of a token drafted by the model */
    bool draft_known;               /* else it is a guess */
    double batch[SQZ_MOST_DRAFT_TOKENS + 2]; /* of a verifying batch of so many tokens; 0: not known */
    uint8_t n_first[SQZ_MOST_DRAFT_TOKENS + 2], n_first_drafts; /* of batches and drafts, while they make ready */
    size_t n_tokens, n_since;  /* exact tokens by themselves: in all, since the last draft */
    size_t n_cycles, patience; /* tokens by themselves until drafts are tried again */
};

void sqz_draft_pace_begin(struct sqz_draft_pace *pace, size_t most, bool steady, bool captured);
/* Whether runs of so many tokens come again and again, as drafts or verifying batches. */
bool sqz_draft_pace_repeats(const struct sqz_draft_pace *pace, size_t n_tokens);

/* An exact token by itself took so long; guess: what one drafted by the model may take, where that is not known. */
void sqz_draft_pace_note_token(struct sqz_draft_pace *pace, double seconds, double guess);
void sqz_draft_pace_note_draft(struct sqz_draft_pace *pace, double seconds_a_token);
void sqz_draft_pace_note_batch(struct sqz_draft_pace *pace, size_t n_tokens, double seconds);
void sqz_draft_pace_note_kept(struct sqz_draft_pace *pace, enum sqz_draft_source source, bool kept);

/* Tokens of a draft from there, at most `most`; 0: the next token is run by itself. *gain: how much faster than without. */
size_t sqz_draft_pace_length(const struct sqz_draft_pace *pace, enum sqz_draft_source source, size_t most,
                             double *gain);
/* Whether the next token is run by itself to see what that takes. */
bool sqz_draft_pace_wants_token(const struct sqz_draft_pace *pace);
/* Whether a draft of SQZ_DRAFT_TRIED tokens from there is tried although none is expected to pay: seldom, and not where it
 * would have to be far better than is expected. */
enum { SQZ_DRAFT_TRIED = 2 };
bool sqz_draft_pace_tries(struct sqz_draft_pace *pace, enum sqz_draft_source source);

#endif
