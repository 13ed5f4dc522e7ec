/* gpu_bands.h. */
#include "gpu_bands.h"

#include <stdlib.h>
#include <string.h>

#include "ggml-backend.h"
#include "gpu.h"
#include "gpu_cuts.h"

enum { MOST_SEGMENTS = SQZ_MOST_CARDS + 1, MOST_INDICES = 8, INDEX_BYTES = 1 << 17 };

/* On one card: sums F32 [n_tokens][row_bytes], positions I32 [n_tokens], and indices of a part's batch. */
struct kept {
    char *rows, *positions, *indices;
};

/* Nodes [from, to) of a segment: its layers that are of a band. */
struct part {
    struct sqz_gpu_segment s;
    int from, to;
    uint32_t first_layer, end_layer;
    struct ggml_tensor *in,
        *out; /* sums in front of it and behind it; NULL: the first layers make theirs, nobody asks */
    struct ggml_tensor *positions;
    struct ggml_tensor *index[MOST_INDICES]; /* what else comes from the host, the same for all batches */
    uint32_t n_indices;
};

struct sqz_gpu_bands {
    const struct sqz_gpu_calls *calls;
    size_t row_bytes;
    struct kept kept[SQZ_MOST_CARDS];
    uint32_t n_segments, segment_end[MOST_SEGMENTS]; /* as the whole run found them */
    int segment_card[MOST_SEGMENTS];
    struct part held[MOST_SEGMENTS]; /* parts of this run's band, launched together when the last has come */
    uint32_t n_held;
};

/* ---- Memory -------------------------------------------------------------------------------------- */

/* Room beside the rows that are yet to come. */
static bool make_kept(struct sqz_bands *b, const struct sqz_gpu_segment *s)
{
    const struct sqz_gpu_calls *calls = s->known.calls;
    struct kept *kept = &b->gpu->kept[s->card];
    const size_t rows = b->n_tokens * b->gpu->row_bytes, positions = (b->n_tokens * sizeof(int32_t) + 255) / 256 * 256;
    struct sqz_gpu_card card;
    if (kept->rows) return true;
    if (!calls->card(s->card, &card) || card.free_bytes < b->rows_bytes ||
        card.free_bytes - b->rows_bytes < rows + positions + INDEX_BYTES)
        return false;
    int32_t *numbers = malloc(b->n_tokens * sizeof *numbers);
    if (!numbers) return false;
    for (size_t i = 0; i < b->n_tokens; i++) numbers[i] = (int32_t)i;
    kept->rows = calls->allocate(rows + positions + INDEX_BYTES);
    kept->positions = kept->rows + rows;
    kept->indices = kept->positions + positions;
    const bool ok = kept->rows && s->enter(s->engine) &&
                    calls->put(kept->positions, numbers, b->n_tokens * sizeof *numbers, s->stream) &&
                    calls->wait(s->stream);
    free(numbers);
    return ok;
}

void sqz_gpu_bands_free(struct sqz_bands *b)
{
    for (int c = 0; b->gpu && c < SQZ_MOST_CARDS; c++)
        if (b->gpu->kept[c].rows) b->gpu->calls->use(c), b->gpu->calls->release(b->gpu->kept[c].rows);
    free(b->gpu);
    b->gpu = NULL;
}

/* ---- Parts ------------------------------------------------------------------------------------------ */

/* What a tensor's numbers lie in. */
static struct ggml_tensor *base_of(struct ggml_tensor *t)
{
    return t->view_src ? t->view_src : t;
}

static bool is_weight(const struct ggml_tensor *t)
{
    return t->buffer && ggml_backend_buffer_get_usage(t->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

/* Tokens' rows that come from outside the graph and that layers compute with; masks are attention's alone. */
static bool is_hidden(const struct ggml_tensor *node, struct ggml_tensor *t)
{
    return t->op == GGML_OP_NONE && !t->view_src && !is_weight(t) && t->type == GGML_TYPE_F32 &&
           node->op != GGML_OP_FLASH_ATTN_EXT && node->op != GGML_OP_CPY && ggml_is_contiguous(t);
}

/* What a segment behind others was given; NULL: that is not one tensor. */
static struct ggml_tensor *find_hidden(struct ggml_cgraph *graph)
{
    struct ggml_tensor *hidden = NULL;
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        struct ggml_tensor *const node = ggml_graph_node(graph, i);
        for (int k = 0; k < GGML_MAX_SRC; k++) {
            struct ggml_tensor *const t = node->src[k];
            if (!t || !is_hidden(node, t) || t == hidden) continue;
            if (hidden) return NULL;
            hidden = t;
        }
    }
    return hidden;
}

/* The part of layers [first, end) of a segment that has layers [low, high) of n_layer. */
static bool find_part(const struct sqz_gpu_segment *s, const uint32_t layers[2], uint32_t first, uint32_t end,
                      uint32_t n_layer, struct part *p)
{
    struct ggml_cgraph *const graph = s->known.graph;
    const uint32_t low = layers[0], high = layers[1];
    *p = (struct part){.s = *s, .to = ggml_graph_n_nodes(graph), .first_layer = first, .end_layer = end};
    if (first > low) {
        p->from = sqz_gpu_find_cut(&s->known, first - low, false);
        if (!p->from) return false;
        p->in = ggml_graph_node(graph, p->from - 1);
    } else if (first > 0) {
        p->in = find_hidden(graph);
        if (!p->in) return false;
    }
    if (end < n_layer) {
        p->to = sqz_gpu_find_cut(&s->known, end - low, end == high);
        if (!p->to) return false;
        p->out = ggml_graph_node(graph, p->to - 1);
    }
    return true;
}

/* Notes what a node takes from outside the part that is another with every batch, or must be there again. False: it is
 * nothing that is known. */
static bool note_source(struct part *p, const struct ggml_tensor *node, int k)
{
    struct ggml_tensor *const t = node->src[k], *const base = base_of(t);
    if (base->op != GGML_OP_NONE || is_weight(base) || base == p->in || node->op == GGML_OP_FLASH_ATTN_EXT) return true;
    if (node->op == GGML_OP_ROPE && k == 1) {
        if (t->type != GGML_TYPE_I32 || !ggml_is_contiguous(t) || t != base || (p->positions && p->positions != t))
            return false;
        p->positions = t;
        return true;
    }
    if (base->type == GGML_TYPE_F16 && (node->op == GGML_OP_SET_ROWS || node->op == GGML_OP_CPY))
        return true; /* where keys and values go */
    /* Which rows of these a batch's are, and which tokens have an output, whose numbers nobody asks for. */
    if ((node->op != GGML_OP_SET_ROWS && node->op != GGML_OP_GET_ROWS) || k != 1 || t != base || !ggml_is_contiguous(t))
        return false;
    for (uint32_t i = 0; i < p->n_indices; i++)
        if (p->index[i] == t) return true;
    if (p->n_indices == MOST_INDICES || ggml_nbytes(t) > INDEX_BYTES / MOST_INDICES) return false;
    p->index[p->n_indices++] = t;
    return true;
}

/* Whether other batches of the same size can go through the part: then only the sums in front of it and positions differ. */
static bool can_repeat(struct part *p, size_t n_tokens)
{
    for (int i = p->from; i < p->to; i++) {
        const struct ggml_tensor *const node = ggml_graph_node(p->s.known.graph, i);
        if (sqz_gpu_computes_nothing(node)) continue;
        for (int k = 0; k < GGML_MAX_SRC; k++)
            if (node->src[k] && !note_source(p, node, k)) return false;
    }
    return p->in && (!p->positions || (size_t)ggml_nelements(p->positions) == n_tokens);
}

/* ---- Running them ------------------------------------------------------------------------------------- */

static int card_of_layer(const struct sqz_gpu_bands *g, uint32_t layer)
{
    uint32_t i = 0;
    while (i + 1 < g->n_segments && layer >= g->segment_end[i]) i++;
    return g->segment_card[i];
}

static bool copy(const struct part *p, void *to, const void *from, size_t bytes)
{
    return p->s.known.calls->copy_runs(to, bytes, from, bytes, bytes, 1, p->s.stream);
}

/* Indices of the batch that llama.cpp gave, kept, or back in their places, which later nodes may have used. */
static bool copy_indices(const struct sqz_gpu_bands *g, const struct part *p, bool back)
{
    char *const kept = g->kept[p->s.card].indices;
    bool ok = true;
    for (uint32_t i = 0; i < p->n_indices; i++) {
        char *const at = kept + (size_t)i * (INDEX_BYTES / MOST_INDICES);
        ok &= copy(p, back ? p->index[i]->data : at, back ? at : p->index[i]->data, ggml_nbytes(p->index[i]));
    }
    return ok;
}

/* A batch's part behind that of `before`, NULL: the first of the band. */
static bool run_part(struct sqz_bands *b, const struct part *p, const struct part *before, size_t first_token,
                     void (*go_to)(void *user_data, uint32_t layer), void *user_data)
{
    struct sqz_gpu_bands *const g = b->gpu;
    const struct sqz_gpu_calls *calls = p->s.known.calls;
    const size_t at = first_token * g->row_bytes;
    b->first_token = first_token;
    if (!b->batch(b->user_data, first_token) || !calls->use(p->s.card) || !p->s.enter(p->s.engine)) return false;
    if (before && !calls->follow(p->s.stream, before->s.event)) return false;
    if (p->in && !copy(p, p->in->data, g->kept[p->s.card].rows + at, ggml_nbytes(p->in))) return false;
    if (p->positions && !copy(p, p->positions->data, g->kept[p->s.card].positions + first_token * sizeof(int32_t),
                              ggml_nbytes(p->positions)))
        return false;
    go_to(user_data, p->first_layer);
    if (!p->s.run(p->s.engine, p->s.known.graph, p->from, p->to)) return false;
    if (!p->out) return true;
    char *const next = g->kept[card_of_layer(g, p->end_layer)].rows;
    return p->s.enter(p->s.engine) && copy(p, next + at, p->out->data, ggml_nbytes(p->out)) &&
           calls->record(p->s.event, p->s.stream);
}

/* All batches of the run through the parts that are held, in turns, so that each card has work. */
static bool run_held(struct sqz_bands *b, void (*go_to)(void *user_data, uint32_t layer), void *user_data)
{
    struct sqz_gpu_bands *const g = b->gpu;
    const size_t first = b->first_token, n = g->held[0].in ? (size_t)ggml_nrows(g->held[0].in) : 0;
    bool ok = true;
    for (uint32_t i = 0; i < g->n_held && ok; i++) {
        const struct part *const p = &g->held[i];
        ok = p->s.known.calls->use(p->s.card) && p->s.enter(p->s.engine) && copy_indices(g, p, false);
    }
    for (size_t batch = 0; batch < b->n_batches && ok; batch++)
        for (uint32_t i = 0; i < g->n_held && ok; i++) {
            const struct part *const p = &g->held[i];
            ok = p->s.known.calls->use(p->s.card) && p->s.enter(p->s.engine) && copy_indices(g, p, true) &&
                 run_part(b, p, i ? p - 1 : NULL, first + batch * n, go_to, user_data);
        }
    for (uint32_t i = 0; i < g->n_held; i++) {
        const struct part *const p = &g->held[i];
        ok &= p->s.known.calls->use(p->s.card) && p->s.leave(p->s.engine);
    }
    g->n_held = 0;
    return ok;
}

/* ---- The whole run ---------------------------------------------------------------------------------- */

/* Whether each band's part of a segment can be told, and there is room for what lies in front of it. */
static bool takes_bands(struct sqz_bands *b, const struct sqz_gpu_segment *s, uint32_t low, uint32_t high)
{
    struct sqz_gpu_bands *const g = b->gpu;
    const uint32_t n_layer = b->end[b->n - 1];
    if (g->n_segments == MOST_SEGMENTS || sqz_gpu_shares_keys(&s->known)) return false;
    g->segment_end[g->n_segments] = high;
    g->segment_card[g->n_segments++] = s->card;
    for (uint32_t i = 0, begin = 0; i < b->n; begin = b->end[i++]) {
        const uint32_t first = begin > low ? begin : low, end = b->end[i] < high ? b->end[i] : high;
        struct part p;
        if (first >= end) continue;
        if (!find_part(s, (uint32_t[]){low, high}, first, end, n_layer, &p)) return false;
        const struct ggml_tensor *const sums[2] = {p.in, p.out};
        for (int k = 0; k < 2; k++) {
            if (!sums[k]) continue;
            const size_t bytes = ggml_nbytes(sums[k]) / (size_t)ggml_nrows(sums[k]);
            if (!g->row_bytes) g->row_bytes = bytes;
            if (g->row_bytes != bytes || b->first_token + (size_t)ggml_nrows(sums[k]) > b->n_tokens) return false;
        }
        if (i > 0) b->repeats &= can_repeat(&p, (size_t)ggml_nrows(p.in));
    }
    return g->row_bytes && make_kept(b, s);
}

/* All of a segment, as without bands. Where it cannot be cut, the text is read so. */
static bool run_whole(struct sqz_bands *b, const struct sqz_gpu_segment *s, uint32_t low, uint32_t high)
{
    if (!b->gpu) {
        b->gpu = calloc(1, sizeof *b->gpu);
        if (b->gpu) b->gpu->calls = s->known.calls;
        b->repeats = true;
    }
    if (b->n > 1 && (!b->gpu || !takes_bands(b, s, low, high))) {
        b->end[0] = b->end[b->n - 1];
        b->n = 1;
    }
    return s->run(s->engine, s->known.graph, 0, ggml_graph_n_nodes(s->known.graph));
}

bool sqz_gpu_bands_run(struct sqz_bands *b, const struct sqz_gpu_segment *s, uint32_t n_layers,
                       void (*go_to)(void *user_data, uint32_t layer), void *user_data)
{
    const uint32_t low = b->n_seen, high = low + n_layers;
    const uint32_t begin = sqz_band_begin(b), stop = b->end[b->now];
    const uint32_t first = begin > low ? begin : low, end = stop < high ? stop : high;
    b->n_seen = high;
    if (b->whole) return run_whole(b, s, low, high) && s->leave(s->engine);
    if (first >= end) return true;
    struct sqz_gpu_bands *const g = b->gpu;
    struct part *const p = &g->held[g->n_held];
    if (!find_part(s, (uint32_t[]){low, high}, first, end, b->end[b->n - 1], p)) return false;
    if (b->n_batches == 1) {
        /* At once: what llama.cpp brings the next time must not come before this is done. */
        const bool ok = run_part(b, p, g->n_held ? p - 1 : NULL, b->first_token, go_to, user_data);
        g->n_held = end == stop ? 0 : g->n_held + 1;
        return s->leave(s->engine) && ok;
    }
    g->n_held++;
    if (!can_repeat(p, (size_t)ggml_nrows(p->in))) return false;
    return end < stop || run_held(b, go_to, user_data);
}
