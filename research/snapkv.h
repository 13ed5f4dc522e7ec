/*
 * Keys that are chosen once for an answer, by what the end of its prompt attends
 * to: SnapKV (arXiv 2404.14469). As published for long texts: the attention
 * probabilities of the last 32 tokens of the prompt are added up over these and
 * over the query heads of a group, every position gets the largest sum of the 7
 * around it, and each KV head keeps the positions that have most, as many as its
 * budget allows. The prompt's end is the question's here, whose own keys and
 * values are the session's and always read.
 *
 * Two places that share what was chosen: one watches the run of the question and
 * computes as the CPU's does, the other reads the chosen rows. The context has no
 * clusters: rows stand in the order of positions.
 */
#ifndef SQZ_RESEARCH_SNAPKV_H
#define SQZ_RESEARCH_SNAPKV_H

#include "backend_selected.h"
#include "snapkv_scores.h"

enum { SNAPKV_WINDOW_TOKENS = 32 };

/* What the question's last tokens attend to in a layer, [K][n_rows], and from that what each head keeps. */
struct snapkv_layer {
    float *weight, *pooled, *logits; /* logits: [K][n_rows + SQZ_BATCH_TOKENS] */
    uint32_t *rows, *n_kept;         /* [K][n_rows] ascending; [K], 0: not chosen yet */
};

struct snapkv {
    struct sqz_backend base; /* watches */
    struct sqz_backend_ops ops;
    struct sqz_backend *cpu;
    struct backend_selected chosen; /* reads what was chosen */
    struct sqz_selector selector;
    struct snapkv_layer *layers; /* [n_layer]; those of a sliding window have none */
    uint32_t n_layer;
};

/* Two places for the session's attention: its own runs go through &snapkv->base from now on, what is to read what was chosen
 * goes through &snapkv->chosen.base. The first run behind the context that has several tokens is the question's. snapkv
 * outlives the session. Errors: MEMORY (then there is nothing to free). */
enum sqz_status snapkv_make(struct snapkv *snapkv, struct sqz_session *session, struct sqz_error *error);
void snapkv_free(struct snapkv *snapkv);

#endif
