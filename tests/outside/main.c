/*
 * A program outside the project: it sees the installed headers and library, nothing else. Builds a layer of random keys
 * and values and compares attention at budget 1 with attention written out in double precision, then looks whether
 * the calls that stand on llama.cpp and on the context file link and answer. Prints "ok", exits 0.
 */
#include <squeeze.h>
#include <squeeze_roofline.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_TOKENS = 3, N_HEAD = 6, N_HEAD_KV = 2, HEAD_DIM = 64, N_ROWS = 777, N_QUERIES = 40 };

static uint64_t state = 20240731;

static uint32_t random_bits(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

/* Any sign and mantissa, magnitude 1/16 to 2: a binary16 put together from its fields. */
static uint16_t random_f16(void)
{
    const uint32_t bits = random_bits();
    return (uint16_t)((bits & 0x83ffu) | ((11u + (bits >> 16) % 5u) << 10));
}

static double f16_value(uint16_t half)
{
    const double magnitude = ldexp(1.0 + (half & 0x3ff) / 1024.0, ((half >> 10) & 0x1f) - 15);
    return half & 0x8000 ? -magnitude : magnitude;
}

static void reference(double *out, double *lse, const uint16_t *keys, const uint16_t *values, const float *query,
                      double scale)
{
    double logits[N_ROWS], largest = -INFINITY, sum = 0;

    for (int r = 0; r < N_ROWS; r++) {
        logits[r] = 0;
        for (int i = 0; i < HEAD_DIM; i++) logits[r] += scale * query[i] * f16_value(keys[r * HEAD_DIM + i]);
        largest = fmax(largest, logits[r]);
    }
    memset(out, 0, HEAD_DIM * sizeof *out);
    for (int r = 0; r < N_ROWS; r++) {
        const double weight = exp(logits[r] - largest);
        sum += weight;
        for (int i = 0; i < HEAD_DIM; i++) out[i] += weight * f16_value(values[r * HEAD_DIM + i]);
    }
    for (int i = 0; i < HEAD_DIM; i++) out[i] /= sum;
    *lse = largest + log(sum);
}

static int check(enum sqz_status status, const struct sqz_error *error, const char *call)
{
    if (status != SQZ_OK) fprintf(stderr, "%s: %s: %s\n", call, sqz_status_name(status), error->message);
    return status == SQZ_OK;
}

int main(void)
{
    static uint16_t keys[N_HEAD_KV * N_ROWS * HEAD_DIM], values[N_HEAD_KV * N_ROWS * HEAD_DIM];
    static float queries[N_QUERIES * N_HEAD * HEAD_DIM], out[N_TOKENS * N_HEAD * HEAD_DIM], lse[N_TOKENS * N_HEAD];
    const struct sqz_layer_shape shape = {N_HEAD, N_HEAD_KV, HEAD_DIM, 0.125f};
    struct sqz_squeeze_options options;
    struct sqz_attention_stats stats;
    struct sqz_error error;
    struct sqz_layer *layer = NULL;
    struct sqz_model *model = NULL;
    struct sqz_context *context = NULL;
    char version[32];

    snprintf(version, sizeof version, "%d.%d.%d", SQZ_VERSION_MAJOR, SQZ_VERSION_MINOR, SQZ_VERSION_PATCH);
    if (strcmp(sqz_version(), version) != 0) {
        fprintf(stderr, "the library is version %s, its header %s\n", sqz_version(), version);
        return 1;
    }

    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        keys[i] = random_f16();
        values[i] = random_f16();
    }
    for (size_t i = 0; i < sizeof queries / sizeof queries[0]; i++) queries[i] = (float)f16_value(random_f16());
    sqz_squeeze_options_default(&options, SQZ_RULE_DEFAULT);
    if (!check(sqz_layer_create(&layer, &shape, keys, values, N_ROWS, queries, N_QUERIES, &options, 2, &error), &error,
               "sqz_layer_create"))
        return 1;

    if (!check(sqz_layer_attend(layer, queries, N_TOKENS, 1.0f, out, lse, 2, NULL, &error), &error, "sqz_layer_attend"))
        return 1;
    for (int t = 0; t < N_TOKENS; t++) {
        for (int h = 0; h < N_HEAD; h++) {
            const int head = h / (N_HEAD / N_HEAD_KV), row = t * N_HEAD + h;
            double wanted[HEAD_DIM], wanted_lse;

            reference(wanted, &wanted_lse, keys + head * N_ROWS * HEAD_DIM, values + head * N_ROWS * HEAD_DIM,
                      queries + row * HEAD_DIM, 0.125);
            for (int i = 0; i < HEAD_DIM; i++) {
                const double got = out[row * HEAD_DIM + i];
                /* Sums of some hundred F32 terms of magnitude 1. */
                if (!(fabs(got - wanted[i]) <= 1e-4)) {
                    fprintf(stderr, "token %d head %d index %d: got %.9g, wanted %.9g\n", t, h, i, got, wanted[i]);
                    return 1;
                }
            }
            if (!(fabs(lse[row] - wanted_lse) <= 1e-4)) {
                fprintf(stderr, "token %d head %d lse: got %.9g, wanted %.9g\n", t, h, lse[row], wanted_lse);
                return 1;
            }
        }
    }

    memset(&stats, 0, sizeof stats);
    if (!check(sqz_layer_attend(layer, queries, N_TOKENS, 0.3f, out, NULL, 2, &stats, &error), &error,
               "sqz_layer_attend at 0.3"))
        return 1;
    if (!(stats.retained_keys > 0 && stats.retained_keys < stats.total_keys)) {
        fprintf(stderr, "at budget 0.3: %llu of %llu keys retained\n", (unsigned long long)stats.retained_keys,
                (unsigned long long)stats.total_keys);
        return 1;
    }
    sqz_layer_free(layer);

    struct sqz_model_shape shape_of_model;
    if (!sqz_shape_get(0, &shape_of_model) || !(sqz_shape_parameters(&shape_of_model) > 0)) {
        fprintf(stderr, "the roofline has no shape of a model, or one without parameters\n");
        return 1;
    }

    sqz_llama_log_take();
    if (sqz_model_open(&model, "no-such-model.gguf", NULL, &error) != SQZ_ERROR_IO || model) {
        fprintf(stderr, "a model that is not there: %s\n", error.message);
        return 1;
    }
    if (sqz_context_open(&context, "no-such-context.gguf", NULL, &error) != SQZ_ERROR_IO || context) {
        fprintf(stderr, "a context that is not there: %s\n", error.message);
        return 1;
    }
    puts("ok");
    return 0;
}
