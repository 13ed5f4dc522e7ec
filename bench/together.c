/*
 * From how many users of one context on a pass over all keys, exact and taken together, costs less than their own
 * selections, on this CPU: processor time of one thread, so that other work on the machine matters little.
 *
 *   cc -O2 -fopenmp -Iinclude -Ilib -Istore bench/together.c build/libsqueeze.a LLAMA... -lstdc++ -lm -o together
 *   together CONTEXT.sqz.gguf
 *
 * Every layer's kept queries stand for the users' tokens. A row is a number of users; its columns are microseconds a
 * token and layer: the pass over all keys, and the selections at each budget.
 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "attention.h"
#include "context_file.h"
#include "kernels.h"

enum { MOST = 64 };
static const float budgets[] = {0.05f, 0.1f, 0.2f, 0.3f, 0.5f, 0.7f};

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* n tokens on the layer: together over all keys, or each its own selection. Returns what they took. */
static double run(const struct sqz_layer *layer, const float *queries, float *out, size_t n, float budget,
                  void *workspace)
{
    struct sqz_attend_call calls[MOST];
    const size_t row = (size_t)layer->shape.n_head * layer->shape.head_dim;
    const bool together = budget >= 1;
    for (size_t i = 0; i < n; i++)
        calls[i] = (struct sqz_attend_call){.layer = layer,
                                            .queries = queries + i * row,
                                            .out = out + i * row,
                                            .query_token_stride = row,
                                            .query_head_stride = layer->shape.head_dim,
                                            .out_token_stride = row,
                                            .out_head_stride = layer->shape.head_dim,
                                            .n_tokens = together ? n : 1,
                                            .user_capacity_rows = 1,
                                            .n_context_tokens = layer->n_rows,
                                            .budget = budget,
                                            .block_tokens = 1,
                                            .n_threads = 1,
                                            .workspace = workspace};
    const double since = seconds();
    if (together) sqz_attend(calls);
    else sqz_attend_batch(&(struct sqz_attend_batch){calls, n, 1, sqz_attend_thread_bytes(layer, 1, 1), workspace});
    return seconds() - since;
}

int main(int argc, char **argv)
{
    struct sqz_error error;
    struct sqz_context *context;
    if (argc != 2 || sqz_context_open(&context, argv[1], NULL, &error) != SQZ_OK) {
        fprintf(stderr, "together CONTEXT.sqz.gguf%s%s\n", argc == 2 ? ": " : "", argc == 2 ? error.message : "");
        return 1;
    }
    const uint32_t n_layer = sqz_context_get_meta(context)->n_layer;
    const struct sqz_layer *first = sqz_context_layer(context, 0);
    const size_t row = (size_t)first->shape.n_head * first->shape.head_dim;
    float *queries = malloc(MOST * row * sizeof *queries), *out = malloc(MOST * row * sizeof *out);
    void *workspace = malloc((size_t)256 << 20);
    if (!queries || !out || !workspace || first->n_queries < MOST) return 1;
    printf("users  all keys");
    for (size_t b = 0; b < sizeof budgets / sizeof *budgets; b++) printf("  at %.2f", (double)budgets[b]);
    printf("   (microseconds a token and layer, %u keys)\n", first->n_rows);
    for (size_t n = 1; n <= MOST; n *= 2) {
        double all = 0, own[sizeof budgets / sizeof *budgets] = {0};
        for (uint32_t l = 0; l < n_layer; l++) {
            const struct sqz_layer *layer = sqz_context_layer(context, l);
            sqz_kernels_get()->f16_to_f32(queries, layer->queries, MOST * row);
            for (size_t b = 0; b < sizeof budgets / sizeof *budgets; b++)
                own[b] += run(layer, queries, out, n, budgets[b], workspace);
            all += run(layer, queries, out, n, 1, workspace);
        }
        printf("%5zu %9.0f", n, 1e6 * all / n_layer / (double)n);
        for (size_t b = 0; b < sizeof budgets / sizeof *budgets; b++)
            printf(" %8.0f", 1e6 * own[b] / n_layer / (double)n);
        printf("\n");
    }
    free(queries);
    free(out);
    free(workspace);
    sqz_context_free(context);
    return 0;
}
