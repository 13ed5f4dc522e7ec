/*
 * How much of a question or a document a step takes, by what was measured: the answers that are in work wait no longer
 * than a step may keep them, on any machine, and behind a document not much longer than their own step takes. Knows no
 * clock: seconds come from whoever ran the step.
 */
#ifndef SQZ_SERVER_PACE_H
#define SQZ_SERVER_PACE_H

#include <stdbool.h>
#include <stddef.h>

/* What a piece goes with: the answers' own tokens, or a pass of its own. */
enum pace_pass { PACE_WITH_ANSWERS, PACE_APART, PACE_PASSES };

struct pace {
    double step_seconds;               /* the most that a piece may take beside answers */
    size_t least_tokens;               /* that take no longer than one: 1 on the CPU, more on a card */
    double token_seconds[PACE_PASSES]; /* a piece's token; 0: none was measured */
    double answers_seconds;            /* a step of n_answers answers alone; 0: not measured */
    size_t n_answers;
    unsigned n_steps;                   /* since then */
    double usual_seconds, last_seconds; /* of steps of n_answers answers: over seconds; the last one's without pieces */
};

void pace_begin(struct pace *pace, double step_seconds, size_t least_tokens);

/* Whether a step of so many answers should go alone, since what it takes is not known or was measured long ago; never
 * twice on end. */
bool pace_wants_alone(const struct pace *pace, size_t n_answers);

/* Seconds for pieces beside so many answers: of documents, or of questions, which end soon. */
double pace_seconds(const struct pace *pace, size_t n_answers, bool document);

/* Tokens that fit into so many seconds, those at least that take no longer than one. */
size_t pace_tokens(const struct pace *pace, enum pace_pass pass, double seconds);

/* Whether a piece of a document goes beside so many answers now: not while something else has the machine and streams wait
 * already. Where that lasts for seconds, it is how long steps take. */
bool pace_has_room(const struct pace *pace, enum pace_pass pass, size_t n_answers);

/* What a pass took. n_answers: those that went with it; n_tokens: of pieces, 0: the answers were alone. */
void pace_note(struct pace *pace, enum pace_pass pass, size_t n_answers, size_t n_tokens, double seconds);

#endif
