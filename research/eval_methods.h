/*
 * The methods that squeezed attention is compared with, as selectors of the
 * same engine (attend_selected.h). All work on a context without clusters,
 * whose rows stand in the order of positions.
 *
 *   quest    pages of 16 positions with the least and the largest number of their keys in every dimension; a page's
 *            score is the largest logit that a key within these bounds could have (QUEST, arXiv 2406.10774). The
 *            bounds are read for every page and count as bytes: 1/16 of the keys and values. Every layer selects; the
 *            publication leaves the first two dense, which at these budgets would take most of the bytes.
 *   window   the first 4 positions and the last ones (StreamingLLM, arXiv 2309.17453)
 *   oracle   the keys with the largest true attention probability, mean over the group; nothing is counted for knowing
 *
 * Each head reads as many rows as its budget allows, the same number for all heads and layers, as published.
 */
#ifndef SQZ_RESEARCH_EVAL_METHODS_H
#define SQZ_RESEARCH_EVAL_METHODS_H

#include "attend_selected.h"
#include "squeeze.h"

enum eval_method { METHOD_DENSE, METHOD_SQUEEZED, METHOD_PAPER, METHOD_QUEST, METHOD_WINDOW, METHOD_ORACLE, N_METHODS };
extern const char *const method_names[N_METHODS];

/* Whether it is a selector, which chooses rows on the CPU. */
static inline bool method_selects(enum eval_method method)
{
    return method == METHOD_QUEST || method == METHOD_WINDOW || method == METHOD_ORACLE;
}

/* Bounds of the pages of all layers of a context. */
struct page_bounds {
    float **bounds; /* [n_layer] [K][n_pages][2][D]: least, largest; NULL for sliding windows */
    uint32_t n_layer;
};

/* Dies without memory. The context has no clusters. */
void page_bounds_make(struct page_bounds *pages, const struct sqz_context *context, uint32_t n_layer);
void page_bounds_free(struct page_bounds *pages);

/* The selector of QUEST, WINDOW or ORACLE. pages: of the context, for QUEST; must outlive the selector. */
struct sqz_selector method_selector(enum eval_method method, const struct page_bounds *pages);

#endif
