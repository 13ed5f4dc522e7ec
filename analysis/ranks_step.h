/*
 * What a token takes over several ranks, each of which holds a part of the context: from rates of one rank and what a message
 * takes, both measured where no such token was run. Two ways, as docs/ranks.md has them:
 *
 *   LED     rank 0 runs the model and sends queries down two chains; denominators come back, their sum goes down, outputs
 *           come back (processes, console/ranks_*.c)
 *   PEERS   all run the model alike; denominators, then outputs go to every rank of a host, and from host to host in pairs,
 *           pairs of pairs and so on (cards)
 *
 * Ranks of a host share its cores: where they have fewer than threads, attention takes as much longer. Of N ranks the one
 * with most shards counts.
 */
#ifndef SQZ_ANALYSIS_RANKS_STEP_H
#define SQZ_ANALYSIS_RANKS_STEP_H

#include "analyze_predict.h"

enum ranks_way { RANKS_LED, RANKS_PEERS };

/* A message of n bytes takes latency + n * byte seconds. */
struct ranks_link {
    double latency, byte;
};

struct ranks_machine {
    enum ranks_way way;
    struct attention_rates rates;      /* of a rank by itself, its threads */
    double rest;                       /* seconds of a token on SHORT_TOKENS on one rank: all but attention */
    double threads, cores;             /* of a rank; of a host, 0: no matter */
    uint32_t host_ranks;               /* of a host, at most */
    struct ranks_link inside, between; /* of a host; of hosts */
    double memory;                     /* bytes of a rank; 0: not known */
    /* What a layer of so many ranks takes more than what is computed in it, measured as a whole: others' messages are taken to
     * be as many times as long as a message by itself. 0: not measured. */
    uint32_t tried_ranks;
    double tried_layer;
};

struct ranks_context {
    const struct sqz_model_shape *shape;
    struct sqz_lookup_model lookup; /* its budget; 1 reads all */
    double n_keys, weight_bytes;
    uint32_t n_shards; /* at least; 0: one a rank */
};

/* Seconds of a token by what they are for, and bytes. */
struct ranks_step {
    double model, lookup, rows;      /* all but attention; centroids and codes; keys and values */
    double queries, totals, outputs; /* messages of all layers without a window; totals go there and back */
    double seconds;
    double layer_bytes; /* that a rank sends for a token and layer without a window, at most; for others none */
    double memory;      /* bytes of weights, and of a rank's part of the context */
};
struct ranks_step ranks_step(const struct ranks_machine *machine, const struct ranks_context *context,
                             uint32_t n_ranks);

/* The same machine with other links. Of a layer that was tried what it took more than its messages is kept: ranks wait and wake as
 * before. */
void ranks_change_links(struct ranks_machine *machine, const struct sqz_model_shape *shape,
                        const struct ranks_link *inside, const struct ranks_link *between);

/* Where more ranks stop paying, among 1, 2, 4 ... most: the fewest whose memory is enough (0: none), those that are fastest,
 * and from the fewest on the last doubling by which a token gets a twentieth faster. */
struct ranks_choice {
    uint32_t fewest, fastest, worth;
};
struct ranks_choice ranks_choose(const struct ranks_machine *machine, const struct ranks_context *context,
                                 uint32_t most);

/* H200s, eight a host: one GPU's attention and two GPUs' messages as they were measured apart, and figures of others;
 * ranks_step.c has where each comes from. Of the shape of Llama-3.1-8B; rest for others in proportion to their weights.
 * squeeze: how contexts are squeezed there. */
void ranks_machine_h200(struct ranks_machine *machine, double weight_bytes, struct sqz_squeeze_options *squeeze);

#endif
