/*
 * What messages take between the ranks of this run; many_ranks.h. Nothing of a context or a model goes through it: in
 * place of products and attention all read memory, which takes a time that is known where nobody else does anything. Messages
 * take what a layer takes more: also what each reads slower behind a wait (pieces of 3 MB behind three sleeps 0.51 ms in place of
 * 0.44 on a Sapphire Rapids' virtual core), and what waiting for a core takes where ranks share one.
 */
#define _GNU_SOURCE /* sysconf */
#include <math.h>
#include <unistd.h>

#include "common.h"
#include "memory_probe.h"
#include "many_ranks.h"
#include "ranks_comm.h"
#include "times.h"

enum { ROUNDS = 150, ECHOES = 40, SMALL = 64, LARGE = 1 << 18, PIECE = 1 << 20 };

/* Seconds of so many bytes where nothing else happens. */
static double alone(struct memory_probe *probe, size_t bytes)
{
    struct times times = {0};
    for (int i = 0; i < ROUNDS; i++) times_add(&times, memory_probe_read_some(probe, bytes));
    return times_median(&times);
}

static double echo(struct memory_probe *probe, int rank, size_t bytes, size_t between)
{
    struct times times = {0};
    for (int i = 0; i < ECHOES; i++) {
        memory_probe_read_some(probe, between);
        times_add(&times, ranks_lead_echo(rank, bytes) / 2);
    }
    return times_median(&times);
}

bool ranks_try(struct ranks_trial *trial, uint32_t n_head, uint32_t head_dim, size_t layer_weights, int n_threads)
{
    struct times layers = {0}, small = {0}, large = {0};
    struct memory_probe probe = {0};
    *trial = (struct ranks_trial){.n = ranks.n, .n_here = ranks.n_here};
    if (ranks.n < 2) return false;
    if (!memory_probe_open(&probe, n_threads)) die("out of memory");
    /* While all work, ranks of a host that has fewer cores take as much longer. */
    const double crowd = fmax(1, (double)ranks.n_here * n_threads / (double)sysconf(_SC_NPROCESSORS_ONLN));
    const double products = alone(&probe, layer_weights), attention = alone(&probe, PIECE);
    for (int r = 1; r < ranks.n; r++) {
        times_add(&small, echo(&probe, r, SMALL, layer_weights));
        times_add(&large, echo(&probe, r, LARGE, layer_weights));
    }
    for (int i = 0; i < ROUNDS; i++) {
        const double since = now_seconds();
        memory_probe_read_some(&probe, layer_weights);
        ranks_lead_try(n_head, head_dim, &probe, PIECE);
        times_add(&layers, now_seconds() - since);
    }
    memory_probe_close(&probe);
    trial->byte = fmax(0, (times_median(&large) - times_median(&small)) / (LARGE - SMALL));
    trial->latency = times_median(&small);
    trial->layer = fmax(0, times_median(&layers) - products - 2 * crowd * attention);
    return true;
}
