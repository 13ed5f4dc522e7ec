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
 * Each head reads as many rows as its budget allows, the same number for all heads and layers, as published. And what
 * reads all rows, kept in fewer bits, of a context with clusters:
 *
 *   int4+4, int4  the formats of `prepare --rows`
 *
 * Drafts of exact answers (eval_speculate.h) are made by
 *
 *   squeezed   the lookup, by its budget
 *   streaming  as window
 *   snapkv     keys that were chosen once for the answer (snapkv.h)
 *   quantspec  all rows by 4 bits, the upper plane of 4 + 4: what int4 reads (QuantSpec, arXiv 2502.10424)
 *
 * of which the last two do nothing else.
 */
#ifndef SQZ_RESEARCH_EVAL_METHODS_H
#define SQZ_RESEARCH_EVAL_METHODS_H

#include "attend_selected.h"
#include "squeeze.h"

enum eval_method {
    METHOD_DENSE,
    METHOD_SQUEEZED,
    METHOD_PAPER,
    METHOD_QUEST,
    METHOD_WINDOW,
    METHOD_ORACLE,
    METHOD_STREAMING,
    METHOD_SNAPKV,
    METHOD_QUANTSPEC,
    METHOD_INT4_4,
    METHOD_INT4,
    N_METHODS
};
extern const char *const method_names[N_METHODS];

/* Whether it is a selector, which chooses rows on the CPU. */
static inline bool method_selects(enum eval_method method)
{
    return method == METHOD_QUEST || method == METHOD_WINDOW || method == METHOD_ORACLE || method == METHOD_STREAMING;
}

/* Whether it reads everything, in fewer bits. */
static inline bool method_rounds(enum eval_method method)
{
    return method == METHOD_INT4_4 || method == METHOD_INT4;
}

/* Whether it can draft exact answers, and whether it can do nothing else. */
static inline bool method_only_drafts(enum eval_method method)
{
    return method == METHOD_SNAPKV || method == METHOD_QUANTSPEC;
}
static inline bool method_drafts(enum eval_method method)
{
    return method == METHOD_SQUEEZED || method == METHOD_STREAMING || method_only_drafts(method);
}

/* Bounds of the pages of all layers of a context. */
struct page_bounds {
    float **bounds; /* [n_layer] [K][n_pages][2][D]: least, largest; NULL for sliding windows */
    uint32_t n_layer;
};

/* Dies without memory. The context has no clusters. */
void page_bounds_make(struct page_bounds *pages, const struct sqz_context *context, uint32_t n_layer);
void page_bounds_free(struct page_bounds *pages);

/* Rows of a head that a call's budget has room for, 1 at least. */
size_t rows_of_budget(const struct sqz_select_call *call);

/* The selector of a method that selects. pages: of the context, for QUEST; must outlive the selector. */
struct sqz_selector method_selector(enum eval_method method, const struct page_bounds *pages);

#endif
