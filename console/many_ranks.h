/*
 * The program as several processes under mpirun: rank 0 runs the command and the
 * model as ever, the others hold shards of contexts and attend to them. Started
 * without mpirun, or as one process, nothing here does anything.
 */
#ifndef SQZ_CONSOLE_MANY_RANKS_H
#define SQZ_CONSOLE_MANY_RANKS_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "squeeze.h"

/* Before the command begins. Returns in rank 0 and in a process by itself; the others work until rank 0 ends, and end the
 * process. argv is main()'s, which begins with the command and must be the same at all. A command that has no use for ranks, and
 * a program that was built without MPI, are refused. */
void ranks_begin(char **argv);

/* The variable of the environment that says how long ranks may take to start MPI, and what it says or what holds without it:
 * a rank that has not by then ends itself, and with it the others. What it says that is no such time ends the program. */
#define RANKS_START_VARIABLE "SQUEEZE_START_SECONDS"
double ranks_start_seconds(void);

/* How many ranks there are; 1 in a process by itself. */
unsigned ranks_count(void);
/* Which rank is lost, so that nothing more comes of the others; NULL: none. Static. */
const char *ranks_trouble(void);
/* Whether this program can be several processes. */
bool ranks_built(void);
/* What messages take between the ranks of this run, measured. */
struct ranks_trial {
    int n, n_here;        /* ranks; those of this host */
    double latency, byte; /* seconds of a message; of each byte of it */
    double layer;         /* a layer takes so much more than what is computed in it, one token */
};
/* Of a layer of so many heads and bytes of weights, on n_threads threads of rank 0. False: a process by itself. A
 * second or so. */
bool ranks_try(struct ranks_trial *trial, uint32_t n_head, uint32_t head_dim, size_t layer_weights, int n_threads);

/* What a rank has sent for a token and layer: NULL in a process by itself. */
json_t *ranks_json(void);

/* How many shards this run prepares, where so many were asked for (0: nothing was said), and that it does so on the CPU.
 * Under mpirun a multiple of the ranks, by itself one for each; usage error when it cannot be. In a process by itself
 * nothing. gpu_layers: as --gpu-layers says. */
void ranks_take_shards(size_t *n_shards, size_t *gpu_layers);

/* Rank 0's calls around each sqz_prepare() with these options, whose shards are a multiple of ranks; in a process by itself
 * nothing. The others are told, open the same model, of this fingerprint, and prepare with it. One that fails is the last:
 * others may have stopped anywhere in it. */
void ranks_prepare_begin(const struct sqz_prepare_options *options, const char *model, const char *fingerprint,
                         size_t n_threads, double rope_scale, const char *output, const char *text, size_t n_bytes);
/* How it went here: of so many tokens of the context, by this model. */
void ranks_prepare_end(enum sqz_status status, const struct sqz_error *error, size_t n_tokens,
                       const struct sqz_model_info *model);

#endif
