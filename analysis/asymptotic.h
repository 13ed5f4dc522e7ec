/*
 * How costs grow: exponents of B, S_L, d and k fitted to what sqz_roofline() gives over sweeps, in the two regimes of
 * the talk's table, contexts far shorter and far longer than the hidden dimension.
 */
#ifndef SQZ_ANALYSIS_ASYMPTOTIC_H
#define SQZ_ANALYSIS_ASYMPTOTIC_H

#include <stddef.h>

enum variable { VARIABLE_K, VARIABLE_B, VARIABLE_S, VARIABLE_D, N_VARIABLES }; /* in the order they are written */
enum regime { REGIME_SHORT, REGIME_LONG, N_REGIMES };                          /* S_L << d, S_L >> d */
enum growth_phase { GROWTH_PREFILL, GROWTH_DECODE, N_GROWTH_PHASES };
enum growth_class { GROWTH_LINEAR, GROWTH_ATTENTION, GROWTH_AGGREGATE, N_GROWTH_CLASSES };
enum growth_part { PART_ACTIVATIONS, PART_WEIGHTS, PART_SCORES, N_PARTS }; /* activations: keys and values too */

/* quantity ~ product of variable^exponent */
struct power_law {
    double exponent[N_VARIABLES];
    double deviation; /* largest |log2(quantity / law)| over the sweep; NAN: the quantity is 0 */
};

struct growth {
    struct power_law flops, bytes, intensity;
    struct power_law part[N_PARTS]; /* of the bytes */
};

/* k is not swept in prefill. Exponents of a regime hold for its leading term. */
void growth_fit(struct growth *growth, enum growth_phase phase, enum growth_class growth_class, enum regime regime);

/* Intensity of one point of the model that is swept, in FLOPs a byte; in decode of one token. */
double growth_intensity(enum growth_phase phase, enum growth_class growth_class, double batch, double n_tokens,
                        double width);

/* Whether the quantity is there and every exponent within 0.1 of a whole number. */
int power_law_is_whole(const struct power_law *law);

/* "k B S_L d^2", "1" for a constant, "" for nothing. Exponents that are not whole have two decimals. */
void power_law_text(const struct power_law *law, char *text, size_t size);

enum { GROWTH_TEXT_MAX = 160 };

/* The cells of the table as the talk writes them: sums of the terms that lead somewhere, or that are counted apart. */
void growth_flops_text(const struct growth growth[N_REGIMES], char text[GROWTH_TEXT_MAX]);
void growth_bytes_text(const struct growth growth[N_REGIMES], enum growth_class growth_class,
                       char text[GROWTH_TEXT_MAX]);

#endif
