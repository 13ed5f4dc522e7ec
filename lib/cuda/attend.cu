/*
 * sqz_cuda_attend() and sqz_cuda_select(): checks arguments, lays out the
 * workspace, and launches the operations of ops.h in order. Host code only.
 *
 * One token (and G up to SQZ_ROWS_MAX_GROUP): all sequences together.
 *   choose_rows, attend_rows, where the first can be used, also for calls on several contexts; else
 *   for every level, the coarsest first: lookup_rows, select_list
 *   with codes: code_tables behind the first lookup; open_clusters before every
 *   select_list; at the finest level open_clusters, mark_keys, weigh_left where there
 *   is a tail, and list_marks instead
 *   tail_rows for every level; attend_rows, which merges and writes
 *   together: unite behind the selections (the marks of a layer with codes), list_marks;
 *   or, of one level without codes, block_lookup of what any selects, select_list;
 *   block_attention over that one list for all, and over what is left of clusters; join, where there
 *   are other parts; attend_rows for own rows
 *   of several ranks: rank_totals behind lookup_rows, or within choose_rows, and rank_merge at the end
 * Many tokens: one sequence after the other.
 *   block_attention over the user's rows and, for log sums alone, the fixed ones
 *   for every level: block_lookup, select_list, at the finest behind row_limit where rows are
 *   given in place of a threshold; above the finest, block_lookup
 *   once more over what was pruned, for the denominators below
 *   block_attention over the selection; tail_block for every level; merge
 *
 * Rows in planes: attend_planes in place of attend_rows, and of block_attention over what
 * few tokens read together, whose part it writes where join would have; all else is done
 * on F16 rows that planes_to_f16 makes first.
 * Own rows in planes, of one token: attend_planes before everything else, whose result is one more
 * partial result that comes along, and part of the lookup's denominators. Of many tokens: blocks that are
 * not in planes yet are put there; then, for tokens of the same block of own rows together,
 * block_attention over F16 rows that are made of them and of those that are F16.
 */
#include <math.h>
#include <string.h>

#include "arena.h"
#include "calls.h"
#include "contexts.h"
#include "planes.h"
#include "ranks.h"

namespace
{

struct sizes {
    size_t b, t, h, k, g, d, n, pairs, capacity;             /* capacity: groups of a pair, even */
    bool rows, planes, dense, tail, coded, together, of_any; /* of_any: together, clusters scored by products for all */
    bool own_planes;                                         /* there are own rows in planes */
    bool tail_in_pass; /* where what is left of clusters goes with the rows of many query rows */
    uint32_t n_levels, n_base, mark_words, n_closed, peak_stride; /* peak_stride 0: no peaks */
    uint32_t tail_room;                                           /* partial results that come along, at most */
    uint32_t n_parts; /* of a block, what is merged: context, user, tail of every level */
    uint32_t n_tail;  /* of one token, what comes along: parts of every level, and of the pass that is together */
    struct {
        size_t c, words, list;
    } level[SQZ_MAX_LEVELS];
};

struct buffers {
    /* both ways */
    uint32_t *groups, *n_groups;
    uint32_t *list[SQZ_MAX_LEVELS], *n_list[SQZ_MAX_LEVELS], *active[SQZ_MAX_LEVELS], *pruned[SQZ_MAX_LEVELS];
    float *log_total;
    /* one token */
    float *logit[SQZ_MAX_LEVELS], *known[2], *part_out, *tail_out;
    struct sqz_cuda_part *parts, *base_parts, *attend_parts, *tail_parts;
    uint32_t *arrived;
    size_t n_arrived;
    /* one token, with codes */
    float *tables, *open_score;
    struct sqz_cuda_reach *reach;
    struct sqz_cuda_part *closed_parts, *key_parts;
    uint32_t *opened, *marks, *peaks;
    float *level_total;
    /* one token of sequences together */
    uint32_t *united, *united_groups, *n_united_groups;
    float *left; /* of clusters scored for all */
    /* one token of several ranks */
    float *rank_out, *all_out;
    struct sqz_cuda_part *rank_parts, *all_parts, *rank_total;
    /* many tokens */
    float *score, *base, *known_lse[2], *limit;
    void *own_keys, *own_values; /* own rows as F16, where some are in planes */
    /* both */
    float *block_out, *block_lse;
    void *inner, *lookup; /* lookup: of clusters scored for all, whose numbers the tail asks for */
    size_t inner_bytes, lookup_bytes;
};

/* Calls of single tokens, each on a context of its own, as one call. */
struct joint {
    struct sqz_cuda_attend_args args; /* of all sequences; */
    struct sqz_layer layer;           /* its layer has the largest of each number */
    struct sqz_cuda_contexts contexts;
};

/* What a call has beyond its arguments. */
struct setting {
    const struct sqz_cuda_fresh
        *fresh;                /* its tokens as llama.cpp has them; NULL: queries and rows are where they belong */
    float *out_f32;            /* in place of out; or NULL */
    bool after_ours;           /* the kernel before is one of ours */
    bool cleared;              /* counters are 0 */
    const struct joint *joint; /* whose arguments the call has; NULL: it is on one context */
};

size_t ceil_div(size_t a, size_t b)
{
    return (a + b - 1) / b;
}

size_t largest(size_t a, size_t b)
{
    return a > b ? a : b;
}

struct sizes sizes_of(const struct sqz_cuda_attend_args *a)
{
    const struct sqz_layer *l = a->layer;
    struct sizes s;
    memset(&s, 0, sizeof s);
    s.b = a->n_sequences;
    s.t = a->n_tokens;
    s.h = l->shape.n_head;
    s.k = l->shape.n_head_kv;
    s.g = s.h / s.k;
    s.d = l->shape.head_dim;
    s.n = l->n_rows;
    s.pairs = s.b * s.k;
    s.capacity = ceil_div(ceil_div(s.n, SQZ_GROUP_ROWS), 2) * 2;
    s.dense = a->dense || l->n_levels == 0;
    s.tail = !s.dense && a->plan.tail_gain != NULL;
    s.rows = s.t == 1 && s.g <= SQZ_ROWS_MAX_GROUP && s.pairs <= SQZ_ROWS_MAX_PAIRS && !a->windowed;
    s.planes = sqz_row_is_planes(l->keys.type);
    s.n_levels = s.dense ? 0 : l->n_levels;
    s.together = s.rows && a->together;
    s.coded = s.rows && s.n_levels && l->codes.n_words && s.g <= SQZ_CODES_MAX_GROUP;
    s.tail_in_pass = s.tail && !s.planes && s.n_levels == 1 && !(s.rows && (s.coded || !s.together)) &&
                     sqz_cuda_block_attention_has_tail((uint32_t)s.d, (uint32_t)s.g);
    s.of_any = s.together && s.n_levels == 1 && !s.coded && (!s.tail || s.tail_in_pass) &&
               sqz_cuda_block_lookup_of_any((uint32_t)s.g, l->group == SQZ_GROUP_MAX);
    s.own_planes = a->user_layer && a->n_user;
    s.n_tail = (s.tail && !s.of_any ? s.n_levels * SQZ_ROWS_TAIL_SPLITS : 0) + s.own_planes + s.together;
    s.tail_room = s.n_tail;
    if (s.tail && s.n_levels == 1) s.tail_room = (uint32_t)largest(s.tail_room, SQZ_CHOOSE_MAX_RANKS + s.own_planes);
    s.mark_words = (uint32_t)ceil_div(ceil_div(s.n, SQZ_GROUP_ROWS), 32);
    if (s.coded && (s.g == 1 || l->group == SQZ_GROUP_MAX))
        s.peak_stride = (uint32_t)ceil_div(s.n, 4 * SQZ_GROUP_ROWS) * 4;
    s.n_closed = s.n_levels ? (s.n_levels - 1) * SQZ_CODES_COARSE_SPLITS : 0;
    s.n_parts = 1 + (a->n_user != 0) + (s.tail && !s.tail_in_pass ? s.n_levels : 0);
    s.n_base = l->rule == SQZ_RULE_PAPER ? 0 : 1 + (uint32_t)ceil_div(a->n_user, SQZ_ROWS_USER_ROWS) + s.own_planes;
    for (uint32_t i = 0; i < s.n_levels; i++) {
        s.level[i].c = l->level[i].n_clusters;
        s.level[i].words = ceil_div(s.level[i].c, 32);
        s.level[i].list = ceil_div(ceil_div(s.level[i].c, SQZ_GROUP_ROWS), 2) * 2;
    }
    return s;
}

/* F16 rows of all keys, or where those are in planes of the fixed ones. */
const void *fixed_keys(const struct sqz_layer *l)
{
    return sqz_row_is_planes(l->keys.type) && l->n_fixed ? l->keys.planes.whole : l->keys.data;
}

/* ---- Block operations, one sequence --------------------------------------------------- */

struct sqz_cuda_block_attention block_attention(const struct sqz_cuda_attend_args *a)
{
    const struct sqz_layer *l = a->layer;
    struct sqz_cuda_block_attention c;
    memset(&c, 0, sizeof c);
    c.type = sqz_cuda_number_type(l);
    c.n_head = l->shape.n_head;
    c.n_head_kv = l->shape.n_head_kv;
    c.head_dim = l->shape.head_dim;
    c.scale = l->shape.scale;
    c.n_tokens = a->n_tokens;
    c.queries = a->queries;
    c.windowed = a->windowed;
    c.first_row = a->first_row;
    return c;
}

struct sqz_cuda_block_attention context_attention(const struct sqz_cuda_attend_args *a, const struct sizes *s,
                                                  const struct buffers *b)
{
    struct sqz_cuda_block_attention c = block_attention(a);
    c.keys = a->layer->keys.data;
    c.values = a->layer->values.data;
    c.head_rows = a->layer->n_rows;
    c.n_rows = a->layer->n_rows;
    if (!s->dense) {
        c.groups = b->groups;
        c.n_groups = b->n_groups;
        c.group_capacity = (uint32_t)s->capacity;
    }
    return c;
}

struct sqz_cuda_block_attention fixed_attention(const struct sqz_cuda_attend_args *a)
{
    struct sqz_cuda_block_attention c = block_attention(a);
    c.keys = a->layer->keys.data;
    c.values = a->layer->values.data;
    c.head_rows = a->layer->n_rows;
    c.n_rows = a->layer->n_fixed;
    return c;
}

struct sqz_cuda_block_attention user_attention(const struct sqz_cuda_attend_args *a)
{
    struct sqz_cuda_block_attention c = block_attention(a);
    c.keys = a->user_keys;
    c.values = a->user_values;
    c.head_rows = a->user_capacity_rows;
    c.n_rows = a->n_user;
    c.causal = true;
    c.first_row -= (int32_t)a->layer->n_rows;
    c.out_f32 = true;
    return c;
}

struct sqz_cuda_block_lookup block_lookup(const struct sqz_cuda_attend_args *a, uint32_t level)
{
    const struct sqz_layer *l = a->layer;
    struct sqz_cuda_block_lookup c;
    memset(&c, 0, sizeof c);
    c.type = sqz_cuda_number_type(l);
    c.n_head = l->shape.n_head;
    c.n_head_kv = l->shape.n_head_kv;
    c.head_dim = l->shape.head_dim;
    c.scale = l->shape.scale;
    c.n_tokens = a->n_tokens;
    c.queries = a->queries;
    c.n_clusters = l->level[level].n_clusters;
    const struct sqz_rows *centroids = &l->level[level].centroids;
    if (centroids->type == SQZ_ROW_I8) c.centroids_i8 = (const int8_t *)centroids->data;
    else c.centroids = centroids->data;
    c.centroid_scale = centroids->scale;
    c.key_mean = centroids->mean;
    c.variance = l->level[level].variance;
    c.variance_gain = a->plan.variance_gain;
    c.group_max = l->group == SQZ_GROUP_MAX;
    return c;
}

/* ---- Sequences together ---------------------------------------------------------------- */

/* The context for one token of all sequences, as if they were a block. */
struct sqz_cuda_block_attention together_attention(const struct sqz_cuda_attend_args *a, const struct sizes *s,
                                                   const struct buffers *b)
{
    struct sqz_cuda_block_attention c = context_attention(a, s, b);
    c.n_tokens = a->n_sequences;
    if (!s->dense) {
        c.groups = b->united_groups;
        c.n_groups = b->n_united_groups;
    }
    c.out = b->block_out;
    c.out_f32 = true;
    if (s->n_tail == 1) c.parts = b->tail_parts;
    else c.lse = b->block_lse;
    c.workspace = b->inner;
    c.workspace_bytes = b->inner_bytes;
    return c;
}

/* Of all sequences, as if they were a block. */
struct sqz_cuda_block_lookup together_lookup(const struct sqz_cuda_attend_args *a, const struct sizes *s,
                                             const struct buffers *b)
{
    struct sqz_cuda_block_lookup c = block_lookup(a, 0);
    c.n_tokens = a->n_sequences;
    c.log_threshold = a->plan.log_threshold;
    c.score = b->score;
    c.log_total = s->tail ? b->log_total : NULL;
    c.workspace = b->lookup;
    c.workspace_bytes = b->lookup_bytes;
    return c;
}

/* What is left of clusters, in the same pass, behind their lookup. */
struct sqz_cuda_block_tail pass_tail(const struct sqz_cuda_attend_args *a, const struct sizes *s,
                                     const struct buffers *b, const struct sqz_cuda_block_lookup *lookup)
{
    struct sqz_cuda_block_tail c;
    memset(&c, 0, sizeof c);
    sqz_cuda_block_tail_set(lookup, &c);
    c.value_centroids = a->layer->level[0].value_centroids.data;
    c.left = b->left;
    c.log_total = lookup->log_total;
    c.gain = a->plan.tail_gain;
    c.log_threshold = a->plan.log_threshold;
    c.token_stride = a->plan.per_sequence ? (uint32_t)s->k : 0;
    c.skip = a->plan.tail_skip;
    return c;
}

/* Numbers of its clusters that are padded to whole tiles. */
size_t padded_clusters(const struct sizes *s)
{
    return ceil_div(s->level[0].c, 128) * 128;
}

enum sqz_status unite(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                      void *stream)
{
    struct sqz_cuda_unite c;
    memset(&c, 0, sizeof c);
    c.n_sequences = (uint32_t)s->b;
    c.n_head_kv = (uint32_t)s->k;
    c.n_groups_of_head = (uint32_t)ceil_div(s->n, SQZ_GROUP_ROWS);
    c.mark_words = s->mark_words;
    c.marks = b->marks; /* of a layer with codes */
    c.groups = b->groups;
    c.n_groups = b->n_groups;
    c.group_capacity = (uint32_t)s->capacity;
    c.united = b->united;
    c.n_copies = s->tail ? (uint32_t)s->b : 1;
    return sqz_cuda_unite_launch(&c, true, stream);
}

/* From marks of n_pairs pairs. */
enum sqz_status list_marks(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                           void *stream)
{
    struct sqz_cuda_list_marks list;
    memset(&list, 0, sizeof list);
    list.n_pairs = (uint32_t)(s->together ? s->k : s->pairs);
    list.n_groups_of_head = (uint32_t)ceil_div(s->n, SQZ_GROUP_ROWS);
    list.mark_words = s->mark_words;
    list.marks = s->together ? b->united : b->marks;
    list.groups = s->together ? b->united_groups : b->groups;
    list.n_groups = s->together ? b->n_united_groups : b->n_groups;
    list.group_capacity = (uint32_t)s->capacity;
    list.n_retained = a->n_retained;
    list.arrived = b->arrived;
    list.n_arrived = (uint32_t)b->n_arrived;
    return sqz_cuda_list_marks_launch(&list, true, stream);
}

/* Thread blocks of attend_planes. */
uint32_t plane_blocks(void)
{
    const uint32_t n = 2 * (uint32_t)sqz_cuda_multiprocessors();
    return n < SQZ_ROWS_MAX_BLOCKS ? n : SQZ_ROWS_MAX_BLOCKS;
}

/* A token of each sequence over rows in planes. */
struct sqz_cuda_attend_planes planes_attention(const struct sqz_cuda_attend_args *a, const struct sizes *s,
                                               const struct buffers *b)
{
    struct sqz_cuda_attend_planes c;
    memset(&c, 0, sizeof c);
    c.layer = sqz_cuda_plane_layer_of(a->layer, a->layer->plane_index);
    c.n_head = a->layer->shape.n_head;
    c.n_sequences = a->n_sequences;
    c.scale = a->layer->shape.scale;
    c.together = s->together;
    c.queries = a->queries;
    if (!s->dense) {
        c.groups = s->together ? b->united_groups : b->groups;
        c.n_groups = s->together ? b->n_united_groups : b->n_groups;
    }
    c.group_capacity = (uint32_t)s->capacity;
    c.n_blocks = plane_blocks();
    c.parts = b->attend_parts;
    c.part_out = b->part_out;
    c.arrived = b->arrived;
    return c;
}

/* The pass over a context in planes, which writes the last part of each that comes along to attend_rows itself. */
enum sqz_status attend_planes_together(const struct sqz_cuda_attend_args *a, const struct sizes *s,
                                       const struct buffers *b, void *stream)
{
    struct sqz_cuda_attend_planes c = planes_attention(a, s, b);
    c.to_parts = b->tail_parts;
    c.to_out = b->tail_out;
    c.n_to = s->n_tail;
    c.to = s->n_tail - 1;
    return sqz_cuda_attend_planes_launch(&c, !s->dense, stream);
}

/* The pass over the context, whose results come along to attend_rows as the last part of each. */
enum sqz_status attend_together(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                                bool after_ours, void *stream)
{
    if (s->planes) return attend_planes_together(a, s, b, stream);
    struct sqz_cuda_block_attention context = together_attention(a, s, b);
    const struct sqz_cuda_block_lookup lookup = together_lookup(a, s, b); /* looked at where there was one */
    if (s->tail_in_pass) context.tail = pass_tail(a, s, b, &lookup);
    if (s->dense) {
        context.arrived = b->arrived;
        context.n_arrived = (uint32_t)b->n_arrived;
    }
    const enum sqz_status status = sqz_cuda_block_attention_launch(&context, after_ours || !s->dense, stream);
    if (status != SQZ_OK || s->n_tail == 1) return status;
    struct sqz_cuda_join c;
    memset(&c, 0, sizeof c);
    c.n_pairs = (uint32_t)s->pairs;
    c.group = (uint32_t)s->g;
    c.head_dim = (uint32_t)s->d;
    c.n_parts = s->n_tail;
    c.part = s->n_tail - 1;
    c.out = b->block_out;
    c.lse = b->block_lse;
    c.parts = b->tail_parts;
    c.part_out = b->tail_out;
    return sqz_cuda_join_launch(&c, true, stream);
}

/* ---- Workspace ----------------------------------------------------------------------- */

void *aligned(void *p)
{
    return p ? (void *)(ceil_div((uintptr_t)p, 256) * 256) : NULL;
}

void carve_together(struct buffers *b, struct sqz_arena *arena, const struct sizes *s,
                    const struct sqz_cuda_attend_args *a)
{
    if (!s->dense && !s->of_any)
        b->united = (uint32_t *)sqz_arena_take(arena, s->tail ? s->pairs : s->k, s->mark_words, sizeof(uint32_t));
    if (!s->dense) {
        b->united_groups = (uint32_t *)sqz_arena_take(arena, s->k, s->capacity, sizeof(uint32_t));
        b->n_united_groups = (uint32_t *)sqz_arena_take(arena, s->k, 1, sizeof(uint32_t));
    }
    /* Where it is all that comes along the pass writes it there. */
    b->block_out = s->n_tail > 1 ? (float *)sqz_arena_take(arena, s->b * s->h, s->d, sizeof(float)) : b->tail_out;
    b->block_lse = (float *)sqz_arena_take(arena, s->b, s->h, sizeof(float));
    struct sqz_cuda_block_attention context = together_attention(a, s, b);
    /* Sizes may follow from which pointers there are; the real ones need not exist yet. */
    context.out = (void *)16;
    context.lse = (float *)16;
    if (!s->dense) context.groups = context.n_groups = (const uint32_t *)16;
    b->inner_bytes = sqz_cuda_block_attention_workspace_bytes(&context);
    if (s->of_any) {
        const struct sqz_cuda_block_lookup lookup = together_lookup(a, s, b);
        b->lookup_bytes = sqz_cuda_block_lookup_workspace_bytes(&lookup);
        b->lookup = aligned(sqz_arena_take(arena, b->lookup_bytes + 256, 1, 1));
        b->score = (float *)sqz_arena_take(arena, s->k, s->level[0].c, sizeof(float));
        if (s->tail) b->left = (float *)sqz_arena_take(arena, s->k, padded_clusters(s), sizeof(float));
    }
    b->inner = aligned(sqz_arena_take(arena, b->inner_bytes + 256, 1, 1));
}

void carve_codes(struct buffers *b, struct sqz_arena *arena, const struct sizes *s, const struct sqz_layer *l)
{
    const size_t rows = s->pairs * s->g, coarse = s->n_levels > 1 ? s->level[1].c : 0; /* level 1 has the most */
    b->tables = (float *)sqz_arena_take(arena, rows * l->codes.n_words, SQZ_CODE_TABLE, sizeof(float));
    b->reach = (struct sqz_cuda_reach *)sqz_arena_take(arena, rows, 1, sizeof *b->reach);
    b->open_score = (float *)sqz_arena_take(arena, s->pairs, coarse, sizeof(float));
    b->closed_parts = (struct sqz_cuda_part *)sqz_arena_take(arena, rows, s->n_closed, sizeof *b->closed_parts);
    b->key_parts = (struct sqz_cuda_part *)sqz_arena_take(arena, rows, SQZ_CODES_MAX_SPLITS, sizeof *b->key_parts);
    b->opened = (uint32_t *)sqz_arena_take(arena, s->pairs, s->level[0].words, sizeof(uint32_t));
    b->marks = (uint32_t *)sqz_arena_take(arena, s->pairs, s->mark_words, sizeof(uint32_t));
    if (!s->peak_stride) return;
    b->level_total = (float *)sqz_arena_take(arena, rows, 1, sizeof(float));
    b->peaks = (uint32_t *)sqz_arena_take(arena, rows, s->peak_stride, sizeof(uint32_t));
}

void carve_ranks(struct buffers *b, struct sqz_arena *arena, const struct sizes *s, const struct sqz_cuda_ranks *ranks)
{
    const size_t rows = s->pairs * s->g, n = ranks->gather ? ranks->n_ranks : 0;
    b->rank_out = (float *)sqz_arena_take(arena, rows, s->d + 1, sizeof(float));
    b->all_out = (float *)sqz_arena_take(arena, n * rows, s->d + 1, sizeof(float));
    b->rank_parts = (struct sqz_cuda_part *)sqz_arena_take(arena, rows, 1, sizeof *b->rank_parts);
    b->all_parts = (struct sqz_cuda_part *)sqz_arena_take(arena, n, rows, sizeof *b->all_parts);
    b->rank_total = (struct sqz_cuda_part *)sqz_arena_take(arena, rows, 1, sizeof *b->rank_total);
}

/* Pairs of attend_planes' passes, and query rows of each. */
size_t plane_pairs(const struct sizes *s)
{
    return s->together ? s->k : s->pairs;
}
size_t plane_rows(const struct sizes *s)
{
    return s->together ? s->b * s->g : s->g;
}

/* Parts of attend_planes times their query rows, on whatever device: sqz_cuda_attend_planes_slots() at most. */
size_t parts_of_pairs(size_t pairs, size_t rows)
{
    return (3 * pairs + SQZ_ROWS_MAX_BLOCKS) * rows;
}
size_t plane_parts(const struct sizes *s)
{
    const size_t context = s->planes ? parts_of_pairs(plane_pairs(s), plane_rows(s)) : 0;
    return largest(context, s->own_planes ? parts_of_pairs(s->pairs, s->g) : 0);
}

void carve_rows(struct buffers *b, struct sqz_arena *arena, const struct sizes *s)
{
    const size_t slots = SQZ_ROWS_PIECES * SQZ_ROWS_MAX_BLOCKS + s->pairs, rows = s->pairs * s->g;
    const size_t parts = largest(slots * s->g, plane_parts(s));
    float *shared = NULL;
    size_t most = 0;
    for (uint32_t l = 0; l < s->n_levels; l++) most = largest(most, s->level[l].c);
    /* Only the tail asks for a level's logits after the next finer one. */
    if (s->n_levels && !s->tail && !s->of_any) shared = (float *)sqz_arena_take(arena, rows, most, sizeof(float));
    for (uint32_t l = 0; l < s->n_levels && !s->of_any; l++)
        b->logit[l] = s->tail ? (float *)sqz_arena_take(arena, rows, s->level[l].c, sizeof(float)) : shared;
    if (s->n_levels) {
        b->parts = (struct sqz_cuda_part *)sqz_arena_take(arena, rows, SQZ_ROWS_MAX_SPLITS, sizeof *b->parts);
        b->base_parts = (struct sqz_cuda_part *)sqz_arena_take(arena, rows, s->n_base, sizeof *b->base_parts);
        for (int i = 0; i < 2; i++) b->known[i] = (float *)sqz_arena_take(arena, rows, 1, sizeof(float));
    }
    if (s->tail_room) {
        b->tail_parts = (struct sqz_cuda_part *)sqz_arena_take(arena, rows, s->tail_room, sizeof *b->tail_parts);
        b->tail_out = (float *)sqz_arena_take(arena, rows * s->tail_room, s->d, sizeof(float));
    }
    b->attend_parts = (struct sqz_cuda_part *)sqz_arena_take(arena, parts, 1, sizeof *b->attend_parts);
    b->part_out = (float *)sqz_arena_take(arena, parts, s->d, sizeof(float));
    b->n_arrived = (s->pairs + 1) * ceil_div(s->g, 8);
    if (s->planes) b->n_arrived = largest(b->n_arrived, plane_pairs(s) * ceil_div(plane_rows(s), 4));
    if (s->own_planes) b->n_arrived = largest(b->n_arrived, s->pairs * ceil_div(s->g, 4));
    b->arrived = (uint32_t *)sqz_arena_take(arena, b->n_arrived, 1, sizeof(uint32_t));
}

void carve_block(struct buffers *b, struct sqz_arena *arena, const struct sizes *s,
                 const struct sqz_cuda_attend_args *a)
{
    const size_t rows = s->t * s->h;
    size_t most = 0;
    for (uint32_t l = 0; l < s->n_levels; l++) most = largest(most, s->level[l].c);
    b->score = (float *)sqz_arena_take(arena, s->k, most, sizeof(float));
    b->base = (float *)sqz_arena_take(arena, rows, 1, sizeof(float));
    b->limit = (float *)sqz_arena_take(arena, s->k, 1, sizeof(float));
    for (int i = 0; i < 2; i++) b->known_lse[i] = (float *)sqz_arena_take(arena, rows, 1, sizeof(float));
    if (s->n_parts > 1) {
        b->block_out = (float *)sqz_arena_take(arena, s->n_parts * rows, s->d, sizeof(float));
        b->block_lse = (float *)sqz_arena_take(arena, s->n_parts, rows, sizeof(float));
    }
    struct sqz_cuda_block_attention context = context_attention(a, s, b), fixed = fixed_attention(a),
                                    user = user_attention(a);
    /* Sizes may follow from which pointers there are; the real ones need not exist yet. */
    context.out = user.out = (void *)16;
    context.out_f32 = s->n_parts > 1;
    context.lse = fixed.lse = user.lse = (float *)16;
    if (!s->dense) context.groups = context.n_groups = (const uint32_t *)16;
    size_t bytes = sqz_cuda_block_attention_workspace_bytes(&context);
    if (!s->dense) bytes = largest(bytes, sqz_cuda_block_attention_workspace_bytes(&fixed));
    if (a->n_user) bytes = largest(bytes, sqz_cuda_block_attention_workspace_bytes(&user));
    for (user.n_tokens = 1; s->own_planes && user.n_tokens <= SQZ_CUDA_USER_BLOCK && user.n_tokens < s->t;
         user.n_tokens++)
        bytes = largest(bytes, sqz_cuda_block_attention_workspace_bytes(&user));
    if (s->own_planes) {
        b->own_keys = aligned(sqz_arena_take(arena, s->k * a->n_user * s->d * 2 + 256, 1, 1));
        b->own_values = aligned(sqz_arena_take(arena, s->k * a->n_user * s->d * 2 + 256, 1, 1));
    }
    for (uint32_t l = 0; l < s->n_levels; l++) {
        struct sqz_cuda_block_lookup lookup = block_lookup(a, l);
        if (s->tail_in_pass) {
            b->lookup_bytes = sqz_cuda_block_lookup_workspace_bytes(&lookup);
            b->lookup = aligned(sqz_arena_take(arena, b->lookup_bytes + 256, 1, 1));
            b->left = (float *)sqz_arena_take(arena, s->k, padded_clusters(s), sizeof(float));
        }
        bytes = largest(bytes, sqz_cuda_block_lookup_workspace_bytes(&lookup));
        if (!s->tail || s->tail_in_pass) continue;
        struct sqz_cuda_tail_block tail;
        memset(&tail, 0, sizeof tail);
        tail.lookup = lookup;
        bytes = largest(bytes, sqz_cuda_tail_block_workspace_bytes(&tail));
    }
    b->inner_bytes = ceil_div(bytes, 256) * 256 + 256;
    b->inner = sqz_arena_take(arena, b->inner_bytes, 1, 1);
    if (b->inner) b->inner = (void *)(ceil_div((uintptr_t)b->inner, 256) * 256);
    b->inner_bytes -= 256;
}

void carve(struct buffers *b, struct sqz_arena *arena, const struct sizes *s, const struct sqz_cuda_attend_args *a)
{
    const size_t pairs = s->pairs;
    memset(b, 0, sizeof *b);
    if (!s->dense && !s->of_any) {
        b->groups = (uint32_t *)sqz_arena_take(arena, pairs, s->capacity, sizeof(uint32_t));
        b->n_groups = (uint32_t *)sqz_arena_take(arena, pairs, 1, sizeof(uint32_t));
    }
    if (!s->dense) b->log_total = (float *)sqz_arena_take(arena, s->b * s->t, s->h, sizeof(float));
    for (uint32_t l = 0; l < s->n_levels; l++) {
        if (l + 1 < s->n_levels) {
            b->list[l] = (uint32_t *)sqz_arena_take(arena, pairs, s->level[l].list, sizeof(uint32_t));
            b->n_list[l] = (uint32_t *)sqz_arena_take(arena, pairs, 1, sizeof(uint32_t));
            b->active[l] = (uint32_t *)sqz_arena_take(arena, pairs, s->level[l].words, sizeof(uint32_t));
        }
        if ((s->tail && !(s->coded && l == 0) && !s->tail_in_pass) || (!s->rows && l > 0))
            b->pruned[l] = (uint32_t *)sqz_arena_take(arena, pairs, s->level[l].words, sizeof(uint32_t));
    }
    if (s->coded) carve_codes(b, arena, s, a->layer);
    if (s->rows && a->ranks) carve_ranks(b, arena, s, a->ranks);
    if (s->rows) carve_rows(b, arena, s);
    else carve_block(b, arena, s, a);
    if (s->together) carve_together(b, arena, s, a);
}

/* ---- Lookup --------------------------------------------------------------------------- */

struct sqz_cuda_offsets offsets_of(const struct sqz_layer *l, uint32_t level)
{
    struct sqz_cuda_offsets o;
    memset(&o, 0, sizeof o);
    o.level = level;
    for (uint32_t i = 0; i <= level; i++) {
        o.offset[i] = l->level[i].offset;
        o.n_clusters[i] = l->level[i].n_clusters;
    }
    return o;
}

/* What select_list takes from the layer, whichever way the scores came. Pair 0 of the list is pair first_pair. */
struct sqz_cuda_select_list select_list(const struct sqz_cuda_attend_args *a, const struct sizes *s,
                                        const struct buffers *b, uint32_t level, size_t first_pair)
{
    const struct sqz_layer *l = a->layer;
    struct sqz_cuda_select_list c;
    memset(&c, 0, sizeof c);
    c.n_head_kv = (uint32_t)s->k;
    c.offsets = offsets_of(l, level);
    c.log_threshold = a->plan.log_threshold;
    c.plan_stride = a->plan.per_sequence ? (uint32_t)s->k : 0;
    if (level + 1 < s->n_levels) {
        c.active = b->active[level] + first_pair * s->level[level].words;
        c.active_words = (uint32_t)s->level[level].words;
    }
    if (level == 0) {
        c.n_rows = l->n_rows;
        c.n_fixed = l->n_fixed;
        c.groups = b->groups + first_pair * s->capacity;
        c.n_groups = b->n_groups + first_pair;
        c.group_capacity = (uint32_t)s->capacity;
        c.n_retained = a->n_retained ? a->n_retained + first_pair : NULL;
    } else {
        c.read = a->read ? a->read + first_pair : NULL;
        c.n_rows = (uint32_t)s->level[level - 1].c;
        c.rows_bits = true;
        c.groups = b->list[level - 1] + first_pair * s->level[level - 1].list;
        c.n_groups = b->n_list[level - 1] + first_pair;
        c.group_capacity = (uint32_t)s->level[level - 1].list;
        c.active_out = b->active[level - 1] + first_pair * s->level[level - 1].words;
        c.active_out_words = (uint32_t)s->level[level - 1].words;
    }
    if (b->pruned[level]) {
        c.pruned_out = b->pruned[level] + first_pair * s->level[level].words;
        c.pruned_words = (uint32_t)s->level[level].words;
    }
    return c;
}

/* ---- One token, one level, in one launch ------------------------------------------------ */

struct sqz_cuda_context context_of(const struct sqz_cuda_attend_args *a)
{
    const struct sqz_layer *l = a->layer;
    struct sqz_cuda_context c;
    memset(&c, 0, sizeof c);
    c.level = sqz_cuda_level_of(&l->level[0]);
    if (sizes_of(a).coded) c.codes = l->codes;
    c.keys = l->keys.data;
    c.values = l->values.data;
    c.n_rows = l->n_rows;
    c.n_fixed = l->n_fixed;
    c.variance_gain = a->plan.variance_gain;
    c.tail_skip = a->plan.tail_skip;
    c.exact = l->rule != SQZ_RULE_PAPER;
    c.group_max = l->group == SQZ_GROUP_MAX;
    c.tail = a->plan.tail_gain != NULL;
    return c;
}

/* Thread blocks of a pair; 0: step by step. */
uint32_t choose_rows(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                     const struct sqz_cuda_fresh *fresh, const struct joint *joint, struct sqz_cuda_choose_rows *c)
{
    const struct sqz_layer *l = a->layer;
    memset(c, 0, sizeof *c);
    if (!s->rows || s->together || s->n_levels != 1 || (a->ranks && a->ranks->gather)) return 0;
    c->type = sqz_cuda_number_type(l);
    c->n_head = l->shape.n_head;
    c->n_head_kv = l->shape.n_head_kv;
    c->head_dim = l->shape.head_dim;
    c->n_sequences = a->n_sequences;
    c->scale = l->shape.scale;
    if (fresh) c->fresh = *fresh;
    c->queries = (void *)a->queries;
    c->level = sqz_cuda_level_of(&l->level[0]);
    if (s->coded) c->codes = l->codes;
    c->keys = fixed_keys(l);
    c->fixed_alone = s->planes;
    c->n_rows = l->n_rows;
    c->n_fixed = l->n_fixed;
    c->user_keys = a->user_keys;
    c->user_capacity_rows = a->user_capacity_rows;
    c->n_user = a->n_user;
    c->user_rows = a->user_rows;
    c->users = a->users;
    c->exact = l->rule != SQZ_RULE_PAPER;
    c->group_max = l->group == SQZ_GROUP_MAX;
    c->variance_gain = a->plan.variance_gain;
    c->log_threshold = a->plan.log_threshold;
    c->tail_gain = a->plan.tail_gain;
    c->plan_stride = a->plan.per_sequence ? (uint32_t)s->k : 0;
    c->tail_skip = a->plan.tail_skip;
    c->groups = b->groups;
    c->n_groups = b->n_groups;
    c->group_capacity = (uint32_t)s->capacity;
    c->n_retained = a->n_retained;
    c->read = a->read;
    c->log_total = b->log_total;
    c->tail_parts = s->tail ? b->tail_parts : NULL;
    c->tail_out = b->tail_out;
    c->known = s->own_planes ? b->tail_parts : NULL;
    c->arrived = b->arrived;
    c->n_arrived = (uint32_t)b->n_arrived;
    c->elsewhere = a->ranks;
    const uint32_t ranks = sqz_cuda_choose_contexts_ranks(c, joint ? &joint->contexts : NULL);
    c->n_tail = (s->tail ? ranks : 0) + s->own_planes;
    return ranks;
}

/* ---- Lookup of a layer with codes, one token ------------------------------------------- */

enum sqz_status code_tables(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                            void *stream)
{
    const struct sqz_layer *l = a->layer;
    struct sqz_cuda_code_tables c;
    memset(&c, 0, sizeof c);
    c.type = sqz_cuda_number_type(l);
    c.n_head = l->shape.n_head;
    c.n_head_kv = l->shape.n_head_kv;
    c.head_dim = l->shape.head_dim;
    c.n_sequences = (uint32_t)s->b;
    c.scale = l->shape.scale;
    c.queries = a->queries;
    c.codes = l->codes;
    c.variance_gain = a->plan.variance_gain;
    c.tables = b->tables;
    c.reach = b->reach;
    return sqz_cuda_code_tables_launch(&c, true, stream);
}

/* What follows a level's lookup of n_parts parts in place of select_list alone. */
enum sqz_status select_codes(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                             uint32_t level, uint32_t n_parts, uint32_t n_multiprocessors, void *stream)
{
    const struct sqz_layer *l = a->layer;
    struct sqz_cuda_select_list select = select_list(a, s, b, level, 0);
    struct sqz_cuda_lookup_codes c;
    memset(&c, 0, sizeof c);
    c.n_head_kv = (uint32_t)s->k;
    c.n_sequences = (uint32_t)s->b;
    c.group = (uint32_t)s->g;
    c.codes = l->codes;
    c.n_rows = l->n_rows;
    c.n_fixed = l->n_fixed;
    c.offsets = offsets_of(l, level);
    c.variance = l->level[level].variance;
    c.active = select.active;
    c.logit = b->logit[level];
    c.reach = b->reach;
    c.tables = b->tables;
    c.log_threshold = a->plan.log_threshold;
    c.plan_stride = a->plan.per_sequence ? (uint32_t)s->k : 0;
    c.group_max = l->group == SQZ_GROUP_MAX;
    c.parts = b->parts;
    c.base_parts = b->base_parts;
    c.closed_parts = b->closed_parts;
    c.n_parts = n_parts;
    c.n_base = s->n_base;
    c.n_closed = (s->n_levels - 1 - level) * SQZ_CODES_COARSE_SPLITS;
    c.closed_stride = s->n_closed;
    c.n_splits =
        sqz_cuda_lookup_codes_splits((uint32_t)s->pairs, level, (uint32_t)s->level[level].c, n_multiprocessors);
    c.key_parts = b->key_parts;
    c.opened = b->opened;
    c.read = a->read;
    c.score = b->open_score;
    c.marks = b->marks;
    c.mark_words = s->mark_words;
    c.level_total = b->level_total;
    c.peaks = b->peaks;
    c.peak_stride = s->peak_stride;
    c.log_total = b->log_total;
    c.tail_gain = a->plan.tail_gain;
    enum sqz_status status = sqz_cuda_open_clusters_launch(&c, true, stream);
    if (status != SQZ_OK) return status;
    if (level > 0) {
        select.n_sequences = (uint32_t)s->b;
        select.group = 1;
        select.score = b->open_score;
        return sqz_cuda_select_list_launch(&select, true, stream);
    }
    status = sqz_cuda_mark_keys_launch(&c, true, stream);
    if (status == SQZ_OK && s->together) {
        status = unite(a, s, b, stream);
        c.marks = b->united; /* the tail is of what nobody reads */
    }
    if (status == SQZ_OK && s->tail) status = sqz_cuda_weigh_left_launch(&c, true, stream);
    if (status != SQZ_OK) return status;
    return list_marks(a, s, b, stream);
}

/* Denominators of all ranks take the place of this one's parts; not of layers with codes. */
enum sqz_status total_of_ranks(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                               struct sqz_cuda_select_list *select, void *stream)
{
    struct sqz_cuda_rank_totals c;
    memset(&c, 0, sizeof c);
    c.ranks = a->ranks;
    c.n_pairs = (uint32_t)s->pairs;
    c.group = (uint32_t)s->g;
    c.parts = select->parts;
    c.base_parts = select->base_parts;
    c.n_splits = select->n_splits;
    c.n_base = select->n_base;
    c.mine = b->rank_parts;
    c.all = b->all_parts;
    c.total = b->rank_total;
    select->parts = b->rank_total;
    select->base_parts = NULL;
    select->n_splits = 1;
    select->n_base = 0;
    return sqz_cuda_rank_totals_launch(&c, stream);
}

enum sqz_status select_rows(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                            bool after_ours, void *stream)
{
    const uint32_t n_multiprocessors = (uint32_t)sqz_cuda_multiprocessors();
    enum sqz_status status = a->ranks && s->coded ? SQZ_ERROR_UNSUPPORTED : SQZ_OK;
    for (uint32_t level = s->n_levels; level-- > 0 && status == SQZ_OK;) {
        const bool top = level + 1 == s->n_levels;
        struct sqz_cuda_lookup_rows lookup;
        sqz_cuda_lookup_rows_set(&lookup, a->layer, level);
        lookup.n_sequences = (uint32_t)s->b;
        lookup.queries = a->queries;
        lookup.variance_gain = a->plan.variance_gain;
        lookup.n_base = top ? s->n_base : 0;
        lookup.n_known = lookup.n_base ? s->own_planes : 0;
        lookup.user_keys = a->user_keys;
        lookup.user_capacity_rows = a->user_capacity_rows;
        lookup.n_user = a->n_user;
        lookup.user_rows = a->user_rows;
        lookup.users = a->users;
        lookup.logit = b->logit[level];
        lookup.parts = b->parts;
        lookup.base_parts = b->base_parts;
        if (s->coded && level == 0) {
            lookup.clear = b->peaks;
            lookup.n_clear = s->pairs * s->g * s->peak_stride;
        }
        if (!top) {
            lookup.groups = b->list[level];
            lookup.n_groups = b->n_list[level];
            lookup.active = b->active[level];
            lookup.group_capacity = (uint32_t)s->level[level].list;
            lookup.active_words = (uint32_t)s->level[level].words;
        }
        lookup.n_splits = sqz_cuda_lookup_rows_splits((uint32_t)(top ? s->k : s->pairs), (uint32_t)s->level[level].c,
                                                      n_multiprocessors);
        /* code_tables reads the queries in this lookup's shadow: they have to be there when it starts. */
        status = sqz_cuda_lookup_rows_launch(&lookup, !top || (after_ours && !s->coded), stream);
        if (status == SQZ_OK && s->coded && top) status = code_tables(a, s, b, stream);
        if (status == SQZ_OK && s->coded)
            status = select_codes(a, s, b, level, lookup.n_splits, n_multiprocessors, stream);
        if (status != SQZ_OK || s->coded) continue;

        struct sqz_cuda_select_list select = select_list(a, s, b, level, 0);
        select.n_sequences = (uint32_t)s->b;
        select.group = (uint32_t)s->g;
        select.group_max = a->layer->group == SQZ_GROUP_MAX;
        select.logit = b->logit[level];
        select.parts = b->parts;
        select.base_parts = b->base_parts;
        select.n_splits = lookup.n_splits;
        select.n_base = top ? s->n_base : 0;
        select.known = top ? NULL : b->known[(level + 1) % 2];
        select.known_out = level ? b->known[level % 2] : NULL;
        select.log_total = b->log_total;
        if (level == 0) {
            select.arrived = b->arrived;
            select.n_arrived = (uint32_t)b->n_arrived;
        }
        if (a->ranks) status = total_of_ranks(a, s, b, &select, stream);
        if (status == SQZ_OK) status = sqz_cuda_select_list_launch(&select, true, stream);
        if (status != SQZ_OK || level > 0 || !s->together) continue;
        status = unite(a, s, b, stream);
        if (status == SQZ_OK) status = list_marks(a, s, b, stream);
    }
    return status;
}

/* The exact mass of fixed and own rows, by a lookup of no clusters. */
enum sqz_status base_of_rows(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                             bool after_ours, void *stream)
{
    struct sqz_cuda_lookup_rows c;
    sqz_cuda_lookup_rows_set(&c, a->layer, 0);
    c.level.n_clusters = 0;
    c.n_sequences = (uint32_t)s->b;
    c.queries = a->queries;
    c.n_base = s->n_base;
    c.n_known = s->n_base ? s->own_planes : 0;
    c.user_keys = a->user_keys;
    c.user_capacity_rows = a->user_capacity_rows;
    c.n_user = a->n_user;
    c.user_rows = a->user_rows;
    c.users = a->users;
    c.n_splits = 1;
    c.parts = b->parts;
    c.base_parts = b->base_parts;
    return s->n_base ? sqz_cuda_lookup_rows_launch(&c, after_ours, stream) : SQZ_OK;
}

/* What any sequence selects, by products for all of them. */
enum sqz_status select_of_any(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                              bool after_ours, void *stream)
{
    struct sqz_cuda_block_lookup lookup = together_lookup(a, s, b);
    struct sqz_cuda_select_list select = select_list(a, s, b, 0, 0);
    enum sqz_status status = base_of_rows(a, s, b, after_ours, stream);
    lookup.offsets = select.offsets;
    lookup.base_parts = b->base_parts;
    lookup.n_base = s->n_base;
    if (status == SQZ_OK) status = sqz_cuda_block_lookup_launch(&lookup, after_ours || s->n_base, stream);
    select.n_sequences = 1;
    select.group = 1;
    select.score = b->score;
    select.log_threshold = NULL;
    select.plan_stride = 0;
    select.groups = b->united_groups;
    select.n_groups = b->n_united_groups;
    select.left_out = b->left;
    select.left_stride = (uint32_t)padded_clusters(s);
    select.arrived = b->arrived;
    select.n_arrived = (uint32_t)b->n_arrived;
    return status == SQZ_OK ? sqz_cuda_select_list_launch(&select, true, stream) : status;
}

/* The score from which a block's clusters are retained that has so many rows to read. */
enum sqz_status row_limit(const struct sqz_cuda_attend_args *one, const struct sqz_cuda_block_lookup *scored,
                          const struct buffers *b, void *stream)
{
    struct sqz_cuda_row_limit c;
    memset(&c, 0, sizeof c);
    c.n_head_kv = scored->n_head_kv;
    c.offsets = scored->offsets;
    c.score = scored->score;
    c.retain_rows = one->plan.retain_rows;
    c.limit = b->limit;
    return sqz_cuda_row_limit_launch(&c, true, stream);
}

/* Of one sequence, whose queries `one` has. base: log of the exact mass; NULL: none. *tail is set where it goes with
 * the pass; NULL: there is no pass. */
enum sqz_status select_block(const struct sqz_cuda_attend_args *one, const struct sizes *s, const struct buffers *b,
                             size_t sequence, const float *base, struct sqz_cuda_block_tail *tail, bool after_ours,
                             void *stream)
{
    enum sqz_status status = SQZ_OK;
    const float *known = base;
    for (uint32_t level = s->n_levels; level-- > 0 && status == SQZ_OK;) {
        struct sqz_cuda_select_list select = select_list(one, s, b, level, sequence * s->k);
        struct sqz_cuda_block_lookup lookup = block_lookup(one, level);
        lookup.offsets = offsets_of(one->layer, level);
        lookup.base_lse = known;
        lookup.active = select.active;
        lookup.score = b->score;
        lookup.log_total = b->log_total + sequence * s->t * s->h;
        lookup.workspace = s->tail_in_pass ? b->lookup : b->inner;
        lookup.workspace_bytes = s->tail_in_pass ? b->lookup_bytes : b->inner_bytes;
        status = sqz_cuda_block_lookup_launch(&lookup, after_ours, stream);
        after_ours = true;
        if (tail && s->tail_in_pass) {
            *tail = pass_tail(one, s, b, &lookup);
            select.read = one->read ? one->read + sequence * s->k : NULL;
            select.left_out = b->left;
            select.left_stride = (uint32_t)padded_clusters(s);
        }
        if (status == SQZ_OK && level == 0 && one->plan.retain_rows) status = row_limit(one, &lookup, b, stream);
        if (status != SQZ_OK) break;
        if (level == 0 && one->plan.retain_rows) select.limit = b->limit;
        select.n_sequences = 1;
        select.group = 1;
        select.score = b->score;
        status = sqz_cuda_select_list_launch(&select, true, stream);
        if (status != SQZ_OK || level == 0) break;
        /* The pruned clusters' own denominators, with what was known: what is known below. */
        lookup.active = select.pruned_out;
        lookup.score = NULL;
        lookup.log_total = b->known_lse[level % 2];
        known = lookup.log_total;
        status = sqz_cuda_block_lookup_launch(&lookup, true, stream);
    }
    return status;
}

/* ---- The calls ----------------------------------------------------------------------- */

/* What pruned clusters of one level would have contributed. */
enum sqz_status tail_rows(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                          uint32_t level, void *stream)
{
    const struct sqz_layer *l = a->layer;
    struct sqz_cuda_tail_rows tail;
    memset(&tail, 0, sizeof tail);
    tail.type = sqz_cuda_number_type(l);
    tail.n_head = l->shape.n_head;
    tail.n_head_kv = l->shape.n_head_kv;
    tail.head_dim = l->shape.head_dim;
    tail.n_sequences = a->n_sequences;
    tail.scale = l->shape.scale;
    tail.queries = a->queries;
    tail.level = sqz_cuda_level_of(&l->level[level]);
    tail.offsets = offsets_of(l, level);
    tail.variance_gain = a->plan.variance_gain;
    tail.tail_gain = a->plan.tail_gain;
    tail.plan_stride = a->plan.per_sequence ? (uint32_t)s->k : 0;
    tail.logit = b->logit[level];
    tail.pruned = b->pruned[level];
    tail.pruned_words = (uint32_t)s->level[level].words;
    if (s->coded || s->together) {
        tail.marks = s->together ? b->united : b->marks;
        tail.mark_words = s->mark_words;
        tail.n_fixed = l->n_fixed;
        tail.united = s->together;
    }
    if (s->coded && level == 0) { /* every cluster that took part has something left, opened or not */
        tail.pruned = b->active[0];
        tail.opened = b->opened;
    }
    tail.log_total = b->log_total;
    tail.log_threshold = a->plan.log_threshold;
    tail.skip = a->plan.tail_skip;
    tail.read = a->read;
    tail.n_parts = s->n_tail;
    tail.first_part = level * SQZ_ROWS_TAIL_SPLITS;
    tail.parts = b->tail_parts;
    tail.out = b->tail_out;
    return sqz_cuda_tail_rows_launch(&tail, true, stream);
}

/* Own rows in planes, as part `to` of n_to that come along, and as the last of those that the lookup's denominators begin
 * with. Counters are 0, and are so again behind it. */
enum sqz_status attend_own_planes(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                                  uint32_t n_to, uint32_t to, bool after_ours, void *stream)
{
    struct sqz_cuda_attend_planes c;
    memset(&c, 0, sizeof c);
    c.layer = sqz_cuda_plane_layer_of(a->user_layer, a->user_layer->plane_index);
    c.n_head = a->layer->shape.n_head;
    c.n_sequences = a->n_sequences;
    c.scale = a->layer->shape.scale;
    c.queries = a->queries;
    c.users = a->users;
    c.of_users = true;
    c.n_blocks = plane_blocks();
    c.parts = b->attend_parts;
    c.part_out = b->part_out;
    c.arrived = b->arrived;
    c.to_parts = b->tail_parts;
    c.to_out = b->tail_out;
    c.n_to = n_to;
    c.to = to;
    c.base_parts = b->base_parts;
    c.n_base = s->n_base;
    return sqz_cuda_attend_planes_launch(&c, after_ours, stream);
}

/* The same, with counters set to 0 first where they are not. *after_ours: as sqz_launch() has it, from then on. */
enum sqz_status begin_own_planes(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                                 bool cleared, uint32_t n_to, uint32_t to, bool *after_ours, void *stream)
{
    enum sqz_status status = SQZ_OK;
    if (!s->own_planes) return SQZ_OK;
    if (!cleared) status = sqz_cuda_clear_launch(b->arrived, b->n_arrived * sizeof(uint32_t), stream);
    if (status == SQZ_OK) status = attend_own_planes(a, s, b, n_to, to, cleared && *after_ours, stream);
    *after_ours = true;
    return status;
}

/* What is read, and the tail, in n_tail partial results, of which the last are own rows in planes, and of sequences together
 * those of the context's pass. */
enum sqz_status find_rows(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                          const struct setting *how, uint32_t *n_tail, void *stream)
{
    struct sqz_cuda_choose_rows choose;
    const uint32_t ranks = choose_rows(a, s, b, how->fresh, how->joint, &choose);
    bool after_ours = how->after_ours;
    if (ranks) *n_tail = choose.n_tail;
    else if (how->fresh || how->joint) return SQZ_ERROR_UNSUPPORTED;
    enum sqz_status status =
        begin_own_planes(a, s, b, how->cleared, *n_tail, *n_tail - 1 - s->together, &after_ours, stream);
    if (status != SQZ_OK) return status;
    if (ranks)
        return sqz_cuda_choose_contexts_launch(&choose, how->joint ? &how->joint->contexts : NULL, ranks, after_ours,
                                               stream);
    status = s->of_any ? select_of_any(a, s, b, after_ours, stream) : select_rows(a, s, b, after_ours, stream);
    for (uint32_t level = 0; s->tail && !s->of_any && level < s->n_levels && status == SQZ_OK; level++)
        status = tail_rows(a, s, b, level, stream);
    return status;
}

/* Whether the blocks that finish attention of a pair tell its results to the first rank, or wait for them there. Who tells
 * waits for nobody; who waits has other parts to do where pairs are many, and merges them in a launch of its own. */
bool merges_at_once(const struct sqz_cuda_ranks *ranks, const struct sizes *s)
{
    enum { FEW = 32 };
    return ranks->led && (ranks->rank || s->pairs * ceil_div(s->g, 8) <= FEW);
}

/* What this rank has seen becomes what all have. */
enum sqz_status merge_ranks(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                            float *out_f32, void *stream)
{
    struct sqz_cuda_rank_merge c;
    memset(&c, 0, sizeof c);
    c.ranks = a->ranks;
    c.n_rows = (uint32_t)(s->pairs * s->g);
    c.head_dim = (uint32_t)s->d;
    c.mine = b->rank_out;
    c.all = b->all_out;
    c.type = a->layer->keys.type;
    c.out = a->out;
    c.out_f32 = out_f32;
    c.lse = a->lse;
    return sqz_cuda_rank_merge_launch(&c, stream);
}

/* Each sequence over what it reads of the context, in planes, and over its own rows. */
enum sqz_status attend_planes(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                              const struct setting *how, uint32_t n_tail, void *stream)
{
    struct sqz_cuda_attend_planes c = planes_attention(a, s, b);
    c.user_keys = a->user_keys;
    c.user_values = a->user_values;
    c.user_capacity_rows = a->user_capacity_rows;
    c.n_user = a->n_user;
    c.user_rows = a->user_rows;
    c.users = a->users;
    c.n_tail = n_tail;
    c.tail_parts = b->tail_parts;
    c.tail_out = b->tail_out;
    c.out = a->out;
    c.out_f32 = how->out_f32;
    c.lse = a->lse;
    return sqz_cuda_attend_planes_launch(&c, !s->dense || s->own_planes, stream);
}

/* Before a pass that reads everything. *after_ours: as sqz_launch() has it, from then on. */
enum sqz_status begin_dense(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                            const struct setting *how, bool *after_ours, void *stream)
{
    enum sqz_status status = SQZ_OK;
    const bool counted = s->own_planes || s->planes || !s->together; /* else the pass sets counters to 0 */
    if (counted && !how->cleared) {
        status = sqz_cuda_clear_launch(b->arrived, b->n_arrived * sizeof(uint32_t), stream);
        *after_ours = false;
    }
    if (status != SQZ_OK || !s->own_planes) return status;
    return begin_own_planes(a, s, b, true, s->n_tail, s->n_tail - 1 - s->together, after_ours, stream);
}

enum sqz_status attend_rows(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                            const struct setting *how, void *stream)
{
    const struct sqz_layer *l = a->layer;
    struct sqz_cuda_attend_rows c;
    enum sqz_status status = SQZ_OK;
    memset(&c, 0, sizeof c);
    bool after_ours = how->after_ours;
    c.n_tail = s->n_tail;
    status = s->dense ? begin_dense(a, s, b, how, &after_ours, stream) : find_rows(a, s, b, how, &c.n_tail, stream);
    if (status == SQZ_OK && s->together) status = attend_together(a, s, b, after_ours, stream);
    if (status != SQZ_OK) return status;
    if (s->planes && !s->together) return attend_planes(a, s, b, how, c.n_tail, stream);
    c.type = sqz_cuda_number_type(l);
    c.n_head = l->shape.n_head;
    c.n_head_kv = l->shape.n_head_kv;
    c.head_dim = l->shape.head_dim;
    c.n_sequences = a->n_sequences;
    c.scale = l->shape.scale;
    c.queries = a->queries;
    c.keys = l->keys.data;
    c.values = l->values.data;
    c.n_rows = s->together ? 0 : l->n_rows; /* own rows alone */
    if (!s->dense && !s->together) {
        c.groups = b->groups;
        c.n_groups = b->n_groups;
    }
    c.group_capacity = (uint32_t)s->capacity;
    c.user_keys = a->user_keys;
    c.user_values = a->user_values;
    c.user_capacity_rows = a->user_capacity_rows;
    c.n_user = a->n_user;
    c.user_rows = a->user_rows;
    c.users = a->users;
    c.tail_parts = b->tail_parts;
    c.tail_out = b->tail_out;
    c.n_blocks = sqz_cuda_attend_rows_blocks((uint32_t)sqz_cuda_multiprocessors());
    c.parts = b->attend_parts;
    c.part_out = b->part_out;
    c.arrived = b->arrived;
    c.out = a->out;
    c.out_f32 = how->out_f32;
    c.lse = a->lse;
    const bool merges = a->ranks && !merges_at_once(a->ranks, s);
    if (merges) {
        c.out_f32 = b->rank_out;
        c.lse = b->rank_out + s->pairs * s->g * s->d;
    } else {
        c.led = a->ranks;
    }
    status = sqz_cuda_attend_contexts_launch(&c, how->joint ? &how->joint->contexts : NULL, !s->dense || s->together,
                                             stream);
    return status == SQZ_OK && merges ? merge_ranks(a, s, b, how->out_f32, stream) : status;
}

/* One sequence of a call, as a call of its own. */
struct sqz_cuda_attend_args sequence_of(const struct sqz_cuda_attend_args *a, const struct sizes *s, size_t sequence)
{
    const size_t rows = sequence * s->t * s->h, user = sequence * s->k * a->user_capacity_rows * s->d * 2;
    struct sqz_cuda_attend_args one = *a;
    one.queries = (const char *)a->queries + rows * s->d * 2;
    one.out = a->out ? (char *)a->out + rows * s->d * 2 : NULL;
    one.lse = a->lse ? a->lse + rows : NULL;
    one.user_keys = a->n_user ? (const char *)a->user_keys + user : NULL;
    one.user_values = a->n_user ? (const char *)a->user_values + user : NULL;
    return one;
}

/* Partial results of the tail of one sequence, one a level: parts first_part and on. */
enum sqz_status tail_block(const struct sqz_cuda_attend_args *one, const struct sizes *s, const struct buffers *b,
                           size_t sequence, size_t first_part, void *stream)
{
    const size_t rows = s->t * s->h;
    enum sqz_status status = SQZ_OK;
    for (uint32_t level = 0; level < s->n_levels && status == SQZ_OK; level++) {
        struct sqz_cuda_tail_block tail;
        memset(&tail, 0, sizeof tail);
        tail.lookup = block_lookup(one, level);
        tail.lookup.offsets = offsets_of(one->layer, level);
        tail.lookup.active = b->pruned[level] + sequence * s->k * s->level[level].words;
        tail.lookup.log_total = b->log_total + sequence * rows;
        tail.value_centroids = one->layer->level[level].value_centroids.data;
        tail.tail_gain = one->plan.tail_gain;
        tail.log_threshold = one->plan.log_threshold;
        tail.skip = one->plan.tail_skip;
        tail.read = one->read ? one->read + sequence * s->k : NULL;
        tail.out = b->block_out + (first_part + level) * rows * s->d;
        tail.lse = b->block_lse + (first_part + level) * rows;
        tail.workspace = b->inner;
        tail.workspace_bytes = b->inner_bytes;
        status = sqz_cuda_tail_block_launch(&tail, true, stream);
    }
    return status;
}

/* Own rows of one sequence, of which some are in planes; out and lse: of `user`. Tokens of the same block of own rows see the
 * same ones as F16. */
enum sqz_status attend_own_blocks(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                                  const struct sqz_cuda_block_attention *user, void *stream)
{
    enum { BLOCK = SQZ_CUDA_USER_BLOCK };
    const uint32_t first = a->n_user - a->n_tokens;
    struct sqz_cuda_user_rows rows;
    struct sqz_cuda_flush_args flush;
    memset(&rows, 0, sizeof rows);
    memset(&flush, 0, sizeof flush);
    rows.layer = flush.layer = a->user_layer;
    rows.planes = flush.planes = a->user_planes;
    rows.plane_capacity_rows = flush.capacity_rows = a->user_plane_capacity_rows;
    rows.user_keys = a->user_keys;
    rows.user_values = a->user_values;
    rows.user_capacity_rows = flush.key_capacity_rows = a->user_capacity_rows;
    rows.user_first_row = a->user_first_row;
    rows.keys = b->own_keys;
    rows.values = b->own_values;
    rows.n_rows = a->n_user;
    enum sqz_status status = SQZ_OK;
    for (uint32_t t = 0, n, there = a->n_plane_rows; t < a->n_tokens && status == SQZ_OK; t += n) {
        const uint32_t own = first + t, read = own < BLOCK ? 0 : (own / BLOCK - 1) * BLOCK;
        n = BLOCK - own % BLOCK < a->n_tokens - t ? BLOCK - own % BLOCK : a->n_tokens - t;
        if (read > there) {
            const size_t from = (size_t)(there - a->user_first_row) * s->d * 2;
            flush.first_block = there / BLOCK;
            flush.n_blocks = (read - there) / BLOCK;
            flush.keys = (const char *)a->user_keys + from;
            flush.values = (const char *)a->user_values + from;
            status = sqz_cuda_flush(&flush, stream);
            there = read;
        }
        /* What has become another since the tokens before, at first everything. */
        rows.first = t ? rows.n_plane_rows : 0;
        rows.end = t ? read : a->n_user;
        rows.n_plane_rows = read;
        if (status == SQZ_OK) status = sqz_cuda_user_rows_launch(&rows, stream);
        struct sqz_cuda_block_attention some = *user;
        some.keys = b->own_keys;
        some.values = b->own_values;
        some.head_rows = a->n_user;
        some.n_rows = own + n;
        some.n_tokens = n;
        some.queries = (const char *)user->queries + (size_t)t * s->h * s->d * 2;
        some.out = user->out ? (float *)user->out + (size_t)t * s->h * s->d : NULL;
        some.lse = user->lse + (size_t)t * s->h;
        if (status == SQZ_OK) status = sqz_cuda_block_attention_launch(&some, true, stream);
    }
    return status;
}

enum sqz_status attend_block(const struct sqz_cuda_attend_args *a, const struct sizes *s, const struct buffers *b,
                             bool select_only, void *stream)
{
    const size_t rows = s->t * s->h;
    enum sqz_status status = SQZ_OK;
    bool ours = false; /* whether a kernel of this call is before the next one */
    for (size_t sequence = 0; sequence < s->b && status == SQZ_OK; sequence++) {
        const struct sqz_cuda_attend_args one = sequence_of(a, s, sequence);
        struct sqz_cuda_block_attention context = context_attention(a, s, b);
        if (a->n_user) {
            struct sqz_cuda_block_attention user = user_attention(&one);
            user.out = select_only ? NULL : b->block_out + rows * s->d;
            user.lse = b->block_lse + rows;
            user.workspace = b->inner;
            user.workspace_bytes = b->inner_bytes;
            status = s->own_planes ? attend_own_blocks(&one, s, b, &user, stream)
                                   : sqz_cuda_block_attention_launch(&user, ours, stream);
            ours = true;
        }
        if (!s->dense && status == SQZ_OK) {
            const float *base = NULL;
            if (a->layer->rule != SQZ_RULE_PAPER && (a->layer->n_fixed || a->n_user)) {
                base = b->base;
                if (a->layer->n_fixed) {
                    struct sqz_cuda_block_attention fixed = fixed_attention(&one);
                    fixed.lse = b->base;
                    fixed.workspace = b->inner;
                    fixed.workspace_bytes = b->inner_bytes;
                    status = sqz_cuda_block_attention_launch(&fixed, ours, stream);
                    ours = true;
                }
                if (a->n_user && status == SQZ_OK)
                    status = sqz_cuda_log_add_launch(a->layer->n_fixed ? b->base : NULL, b->block_lse + rows, b->base,
                                                     (uint32_t)rows, true, stream);
            }
            if (status == SQZ_OK)
                status = select_block(&one, s, b, sequence, base, select_only ? NULL : &context.tail, ours, stream);
            ours = true;
        }
        if (status != SQZ_OK || select_only) continue;
        context.queries = one.queries;
        if (!s->dense) {
            context.groups = b->groups + sequence * s->k * s->capacity;
            context.n_groups = b->n_groups + sequence * s->k;
        }
        context.out = s->n_parts > 1 ? b->block_out : one.out;
        context.out_f32 = s->n_parts > 1;
        context.lse = s->n_parts > 1 ? b->block_lse : one.lse;
        context.workspace = b->inner;
        context.workspace_bytes = b->inner_bytes;
        status = sqz_cuda_block_attention_launch(&context, ours, stream);
        ours = true;
        if (status == SQZ_OK && s->tail && !s->tail_in_pass)
            status = tail_block(&one, s, b, sequence, 1 + (a->n_user != 0), stream);
        if (status != SQZ_OK || s->n_parts == 1) continue;
        struct sqz_cuda_merge_args merge;
        memset(&merge, 0, sizeof merge);
        merge.n_parts = s->n_parts;
        merge.n_rows = (uint32_t)rows;
        merge.head_dim = (uint32_t)s->d;
        merge.parts = b->block_out;
        merge.parts_lse = b->block_lse;
        merge.type = sqz_cuda_number_type(a->layer);
        merge.out = one.out;
        merge.lse = one.lse;
        status = sqz_cuda_merge_launch(&merge, true, stream);
    }
    return status;
}

/* ---- Several contexts ----------------------------------------------------------------- */

bool reads_all(const struct sqz_cuda_attend_args *a)
{
    return a->dense || a->layer->n_levels == 0;
}

/* Whether kernels of one call's context are another's. */
bool alike(const struct sqz_cuda_attend_args *a, const struct sqz_cuda_attend_args *first)
{
    const struct sqz_layer *l = a->layer, *m = first->layer;
    if (a->together || a->windowed || a->n_tokens > 1 || !a->users || a->lse || a->ranks || a->user_layer ||
        sqz_row_is_planes(l->keys.type))
        return false;
    if (l->shape.n_head != m->shape.n_head || l->shape.n_head_kv != m->shape.n_head_kv ||
        l->shape.head_dim != m->shape.head_dim || l->shape.scale != m->shape.scale || l->keys.type != m->keys.type ||
        reads_all(a) != reads_all(first))
        return false;
    return reads_all(a) ||
           (a->plan.per_sequence && l->n_levels == 1 && m->n_levels == 1 &&
            l->level[0].centroids.type == m->level[0].centroids.type && l->codes.n_words == m->codes.n_words);
}

template <class T> bool goes_on(const T *here, const T *first, size_t n)
{
    return here == (first ? first + n : NULL);
}

/* Whether a call's arrays go on where `first` has had `sequence` sequences. */
bool follows(const struct sqz_cuda_attend_args *a, const struct sqz_cuda_attend_args *first, size_t sequence)
{
    const size_t k = first->layer->shape.n_head_kv, row = first->layer->shape.n_head * first->layer->shape.head_dim * 2;
    return goes_on((const char *)a->queries, (const char *)first->queries, sequence * row) &&
           goes_on((const char *)a->out, (const char *)first->out, sequence * row) &&
           goes_on(a->users, first->users, sequence) && goes_on(a->n_retained, first->n_retained, sequence * k) &&
           goes_on(a->read, first->read, sequence * k) &&
           (reads_all(a) || goes_on(a->plan.log_threshold, first->plan.log_threshold, sequence * k));
}

/* Adds a call to those before it. */
void join_call(struct joint *j, const struct sqz_cuda_attend_args *a)
{
    struct sqz_layer *l = &j->layer;
    const struct sqz_layer *m = a->layer;
    const uint32_t sequence = j->args.n_sequences;
    if (m->n_rows > l->n_rows) l->n_rows = m->n_rows;
    if (m->level[0].n_clusters > l->level[0].n_clusters) l->level[0].n_clusters = m->level[0].n_clusters;
    if (m->codes.n_directions > l->codes.n_directions) l->codes.n_directions = m->codes.n_directions;
    if (a->n_user > j->args.n_user) j->args.n_user = a->n_user;
    if (a->plan.tail_gain && !reads_all(a)) {
        j->args.plan.tail_gain = a->plan.tail_gain - sequence * (size_t)l->shape.n_head_kv;
        l->level[0].value_centroids = m->level[0].value_centroids;
    }
    memset(j->contexts.of + sequence, (int)j->contexts.n, a->n_sequences);
    j->contexts.context[j->contexts.n++] = context_of(a);
    j->args.n_sequences += a->n_sequences;
}

bool join(struct joint *j, const struct sqz_cuda_attend_args *calls, size_t n)
{
    if (!calls || n == 0 || n > SQZ_MOST_CONTEXTS) return false;
    j->contexts.n = 0;
    j->args = calls[0];
    j->layer = *calls[0].layer;
    j->args.layer = &j->layer;
    j->args.n_sequences = 0;
    j->args.plan.tail_gain = NULL;
    for (size_t i = 0; i < n; i++) {
        const struct sqz_cuda_attend_args *a = &calls[i];
        if (!sqz_cuda_attend_supported(a) || !alike(a, calls) || !follows(a, calls, j->args.n_sequences) ||
            j->args.n_sequences + a->n_sequences > SQZ_MOST_CONTEXT_SEQUENCES)
            return false;
        join_call(j, a);
    }
    return sizes_of(&j->args).rows;
}

/* ---- Rows in planes that are made F16 ones ------------------------------------------------ */

enum { MOST_PLANE_ROWS = 128 }; /* query rows of a head, 16 of which read planes at a time */

/* A call on a layer in planes as one on F16 rows in the front of its workspace. */
struct unpacked {
    struct sqz_cuda_attend_args args;
    struct sqz_layer layer;
};

/* Bytes of the F16 rows; 0: the call reads planes, or needs nothing. */
size_t unpack(const struct sqz_cuda_attend_args *a, struct unpacked *u)
{
    const struct sizes s = sizes_of(a);
    if (!s.planes || (s.rows && (!s.together || s.b * s.g <= MOST_PLANE_ROWS))) return 0;
    const size_t each = ceil_div(s.k * s.n * s.d * sizeof(uint16_t), 256) * 256;
    u->args = *a;
    u->layer = *a->layer;
    u->args.layer = &u->layer;
    memset(&u->layer.keys, 0, sizeof u->layer.keys);
    memset(&u->layer.values, 0, sizeof u->layer.values);
    u->layer.keys.type = u->layer.values.type = SQZ_ROW_F16;
    u->layer.keys.data = a->workspace;
    u->layer.values.data = (void *)((uintptr_t)a->workspace + each);
    u->args.workspace = (void *)((uintptr_t)a->workspace + 2 * each);
    u->args.workspace_bytes = a->workspace_bytes - 2 * each;
    return 2 * each;
}

/* Makes them, where there are to be some; *a is the call then. */
enum sqz_status make_unpacked(const struct sqz_cuda_attend_args **a, struct unpacked *u, void *stream)
{
    if (!unpack(*a, u)) return SQZ_OK;
    const struct sqz_cuda_plane_layer planes = sqz_cuda_plane_layer_of((*a)->layer, (*a)->layer->plane_index);
    *a = &u->args;
    return sqz_cuda_planes_to_f16_launch(&planes, (void *)u->layer.keys.data, (void *)u->layer.values.data, stream);
}

bool misaligned(const void *p)
{
    return (uintptr_t)p % 16 != 0;
}

bool rows_complete(const struct sqz_rows *rows)
{
    return rows->data && !misaligned(rows->data) && (rows->type != SQZ_ROW_I8 || (rows->scale && rows->mean));
}

bool planes_complete(const struct sqz_layer *l)
{
    const struct sqz_rows *const both[] = {&l->keys, &l->values};
    for (const struct sqz_rows *rows : both) {
        if (rows->type == SQZ_ROW_I44 && (!rows->planes.lower || misaligned(rows->planes.lower))) return false;
        if (rows->planes.n_whole && (!rows->planes.whole || misaligned(rows->planes.whole))) return false;
    }
    return l->values.mean && rows_complete(&l->level[0].centroids) && l->plane_index && !misaligned(l->plane_index);
}

bool layer_complete(const struct sqz_layer *l, bool dense, bool tail, bool coded)
{
    if (!rows_complete(&l->keys) || !rows_complete(&l->values)) return false;
    if (sqz_row_is_planes(l->keys.type) && !planes_complete(l)) return false;
    if (dense) return true;
    for (uint32_t i = 0; i < l->n_levels; i++) {
        const struct sqz_level *v = &l->level[i];
        if (!rows_complete(&v->centroids) || !v->offset) return false;
        if (tail && !v->value_centroids.data) return false;
    }
    if (!coded) return true;
    const struct sqz_codes *c = &l->codes;
    return c->words && c->directions && c->book && c->first && c->spread && !misaligned(c->directions);
}

/* Own rows that are not where `users` say. */
bool own_rows_complete(const struct sqz_cuda_attend_args *a)
{
    const uint32_t first = a->user_layer ? a->user_first_row : 0;
    if (!a->user_keys || !a->user_values || misaligned(a->user_keys) || misaligned(a->user_values) ||
        a->n_user < a->n_tokens || first > a->n_user || a->n_user - first > a->user_capacity_rows)
        return false;
    if (!a->user_layer) return true;
    if (a->n_tokens == 1) return false;
    /* Rows that the first token reads as F16 and those that go into planes are there. */
    const uint32_t block = SQZ_CUDA_USER_BLOCK, last = a->n_user - 1, begin = a->n_user - a->n_tokens;
    const uint32_t most = last < block ? 0 : (last / block - 1) * block,
                   least = begin < block ? 0 : (begin / block - 1) * block;
    const bool made =
        a->n_plane_rows % block == 0 && (most <= a->n_plane_rows || first <= a->n_plane_rows) && first <= least;
    return made && (!most || (a->user_planes && !misaligned(a->user_planes) && most <= a->user_plane_capacity_rows &&
                              a->user_plane_capacity_rows % block == 0));
}

enum sqz_status check(const struct sqz_cuda_attend_args *a, bool select_only)
{
    if (!a || !a->layer || !a->queries || !a->workspace || misaligned(a->queries) || (uintptr_t)a->workspace % 256)
        return SQZ_ERROR_ARGUMENT;
    if (a->layer->space != SQZ_SPACE_CUDA) return SQZ_ERROR_ARGUMENT;
    if (!select_only && (!a->out || misaligned(a->out))) return SQZ_ERROR_ARGUMENT;
    const size_t bytes = sqz_cuda_attend_workspace_bytes(a);
    if (bytes == 0 || sqz_cuda_multiprocessors() == 0) return SQZ_ERROR_UNSUPPORTED;
    const struct sizes s = sizes_of(a);
    if (select_only && s.dense) return SQZ_ERROR_ARGUMENT;
    if (!layer_complete(a->layer, s.dense, s.tail, s.coded) || (!s.dense && !a->plan.log_threshold))
        return SQZ_ERROR_ARGUMENT;
    if (!(a->plan.tail_skip >= 0) && s.tail) return SQZ_ERROR_ARGUMENT;
    if (a->n_user && !a->users && !own_rows_complete(a)) return SQZ_ERROR_ARGUMENT;
    if (s.own_planes && (a->user_layer->space != SQZ_SPACE_CUDA || !planes_complete(a->user_layer)))
        return SQZ_ERROR_ARGUMENT;
    return a->workspace_bytes < bytes ? SQZ_ERROR_ARGUMENT : SQZ_OK;
}

} // namespace

extern "C" void sqz_cuda_lookup_rows_set(struct sqz_cuda_lookup_rows *c, const struct sqz_layer *l, uint32_t level)
{
    memset(c, 0, sizeof *c);
    c->type = sqz_cuda_number_type(l);
    c->n_head = l->shape.n_head;
    c->n_head_kv = l->shape.n_head_kv;
    c->head_dim = l->shape.head_dim;
    c->scale = l->shape.scale;
    c->level = sqz_cuda_level_of(&l->level[level]);
    c->offsets = offsets_of(l, level);
    c->key_mean = c->level.centroids.mean;
    c->keys = fixed_keys(l);
    c->fixed_alone = sqz_row_is_planes(l->keys.type);
    c->n_rows = l->n_rows;
    c->n_fixed = l->n_fixed;
}

extern "C" const char *sqz_cuda_layer_obstacle(const struct sqz_layer *l)
{
    const uint32_t d = l->shape.head_dim;
    const enum sqz_row_type type = sqz_cuda_number_type(l);
    if (type != SQZ_ROW_F16 && type != SQZ_ROW_BF16) return "its keys are neither F16, BF16 nor in planes";
    if (l->values.type != l->keys.type) return "its values are not of the type of its keys";
    if (d != 64 && d != 96 && d != 128 && d != 256) return "its head dimension is not 64, 96, 128 or 256";
    if (l->shape.n_head == 0 || l->shape.n_head > 1024 || l->shape.n_head_kv == 0 ||
        l->shape.n_head % l->shape.n_head_kv)
        return "it has no heads, more than 1,024, or no whole number of them a key-value head";
    static_assert(SQZ_ROWS_MAX_ROWS == 8388608, "the words below");
    if (l->n_rows == 0 || l->n_rows > SQZ_ROWS_MAX_ROWS) return "it has no rows or more than 8,388,608";
    if (l->n_fixed > l->n_rows || l->n_levels > SQZ_MAX_LEVELS)
        return "it has more fixed rows or levels than there can be";
    for (uint32_t i = 0; i < l->n_levels; i++) {
        const struct sqz_level *v = &l->level[i];
        if (v->n_clusters == 0 || v->n_clusters > l->n_rows) return "it has no clusters or more than rows";
        if (v->centroids.type != type && v->centroids.type != SQZ_ROW_I8)
            return "its centroids are neither INT8 nor of the type of its keys";
        if (v->value_centroids.type != type && v->value_centroids.type != SQZ_ROW_NONE)
            return "its value centroids are not of the type of its keys";
    }
    if (sqz_row_is_planes(l->keys.type)) {
        const struct sqz_cuda_plane_layer planes = sqz_cuda_plane_layer_of(l, NULL);
        if (!l->n_levels || l->keys.planes.n_whole != l->n_fixed || l->values.planes.n_whole != l->n_fixed ||
            l->shape.n_head / l->shape.n_head_kv > SQZ_ROWS_MAX_GROUP || !sqz_cuda_planes_supported(&planes))
            return "its rows are in planes, without clusters, of a head dimension that is neither 64 nor 128 or with "
                   "more "
                   "than 64 heads a key-value head";
    }
    if (l->codes.n_words > 4 || (l->codes.n_words && (l->codes.n_directions == 0 || l->codes.n_directions > 256)))
        return "its codes have more than 4 words a key or 256 directions";
    return l->rule == SQZ_RULE_DEFAULT || l->rule == SQZ_RULE_PAPER ? NULL : "its rule is not known";
}

extern "C" bool sqz_cuda_layer_supported(const struct sqz_layer *l)
{
    return !sqz_cuda_layer_obstacle(l);
}

extern "C" const char *sqz_gpu_ranks_obstacle(const struct sqz_cuda_attend_args *a)
{
    struct sizes s;
    struct buffers none;
    struct sqz_cuda_choose_rows choose;
    if (sqz_row_is_planes(a->layer->keys.type)) return "its rows are in planes, which are not read over several cards";
    if (!sqz_cuda_attend_supported(a))
        return "it is not read over several cards: it has several levels, or too many heads";
    memset(&none, 0, sizeof none);
    s = sizes_of(a);
    if (s.coded && !choose_rows(a, &s, &none, NULL, NULL, &choose))
        return "its keys have codes, which over several cards are read of up to 8,192 clusters a card, on Hopper cards";
    return NULL;
}

extern "C" bool sqz_cuda_attend_supported(const struct sqz_cuda_attend_args *a)
{
    struct unpacked u;
    if (!a || !a->layer || !sqz_cuda_layer_supported(a->layer)) return false;
    if ((a->windowed || a->ranks) && (a->user_layer || sqz_row_is_planes(a->layer->keys.type))) return false;
    if (a->user_layer && a->n_user &&
        (!sqz_row_is_planes(a->user_layer->keys.type) || !sqz_cuda_layer_supported(a->user_layer) ||
         a->n_sequences > (a->n_tokens > 1 ? 1u : 512u)))
        return false;
    if (unpack(a, &u)) return sqz_cuda_attend_supported(&u.args);
    const bool one_pass = a->together && (a->dense || a->layer->n_levels == 0);
    if (a->n_sequences == 0 || a->n_sequences > (one_pass ? 512u : 64u) || a->n_tokens == 0 || a->n_tokens > 65536)
        return false;
    if (a->together && (a->n_tokens > 1 || (!one_pass && !a->plan.per_sequence))) return false;
    if (((a->n_user && (a->user_rows || a->users)) || a->plan.per_sequence) && a->n_tokens > 1) return false;
    const struct sizes s = sizes_of(a);
    if (a->windowed && (!s.dense || s.b > 1)) return false;
    if (a->ranks && a->ranks->led && a->layer->keys.type != SQZ_ROW_F16) return false;
    if (a->ranks && (!s.rows || s.together || s.n_levels > 1 || !sqz_cuda_ranks_good(a->ranks, s.b * s.h, s.d) ||
                     (s.coded && a->ranks->gather)))
        return false;
    if (s.rows && s.together) {
        struct buffers none;
        memset(&none, 0, sizeof none);
        struct sqz_cuda_block_attention context = together_attention(a, &s, &none);
        struct sqz_cuda_block_lookup lookup = block_lookup(a, 0); /* looked at where clusters are scored for all */
        return (s.planes || sqz_cuda_block_attention_supported(&context)) &&
               (!s.of_any || sqz_cuda_block_lookup_supported(&lookup));
    }
    if (s.rows) return true;
    if (a->together) return false;
    if ((a->n_user && (a->user_rows || a->users)) || a->plan.per_sequence) return false;
    struct buffers none;
    memset(&none, 0, sizeof none);
    struct sqz_cuda_block_attention context = context_attention(a, &s, &none), user = user_attention(a);
    if (!sqz_cuda_block_attention_supported(&context) || (a->n_user && !sqz_cuda_block_attention_supported(&user)))
        return false;
    for (uint32_t l = 0; l < s.n_levels; l++) {
        struct sqz_cuda_block_lookup lookup = block_lookup(a, l);
        if (!sqz_cuda_block_lookup_supported(&lookup)) return false;
    }
    return true;
}

extern "C" size_t sqz_cuda_attend_workspace_bytes(const struct sqz_cuda_attend_args *a)
{
    struct unpacked u;
    if (!sqz_cuda_attend_supported(a)) return 0;
    if (const size_t bytes = unpack(a, &u)) return bytes + sqz_cuda_attend_workspace_bytes(&u.args);
    const struct sizes s = sizes_of(a);
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct buffers b;
    carve(&b, &arena, &s, a);
    return sqz_arena_bytes(&arena);
}

extern "C" enum sqz_status sqz_cuda_attend(const struct sqz_cuda_attend_args *a, void *stream)
{
    const struct setting plain = {NULL, NULL, false, false, NULL};
    struct unpacked u;
    enum sqz_status status = check(a, false);
    if (status == SQZ_OK && a->ranks && a->ranks->led) status = SQZ_ERROR_UNSUPPORTED;
    if (status == SQZ_OK) status = make_unpacked(&a, &u, stream);
    if (status != SQZ_OK) return status;
    const struct sizes s = sizes_of(a);
    struct sqz_arena arena = sqz_arena_on(a->workspace);
    struct buffers b;
    carve(&b, &arena, &s, a);
    return s.rows ? attend_rows(a, &s, &b, &plain, stream) : attend_block(a, &s, &b, false, stream);
}

/* A call's tokens from where llama.cpp has them to where it wants their results. */
static enum sqz_status attend_tokens(const struct sqz_cuda_attend_args *a, const struct joint *joint,
                                     const struct sqz_gpu_node *node, float *out, void *stream)
{
    const struct sqz_cuda_ranks *led = a->ranks && a->ranks->led ? a->ranks : NULL;
    const bool results = !led || led->rank == 0;
    if ((results && !out) || misaligned(out) || node->queries_f16 != a->queries) return SQZ_ERROR_ARGUMENT;
    const struct sizes s = sizes_of(a);
    struct sqz_arena arena = sqz_arena_on(a->workspace);
    struct buffers b;
    carve(&b, &arena, &s, a);
    const struct sqz_cuda_fresh fresh = {
        node->queries,          node->query_token_stride, node->query_head_stride, node->keys,
        node->values,           node->key_token_stride,   node->key_head_stride,   node->value_token_stride,
        node->value_head_stride};
    struct sqz_cuda_choose_rows choose;
    const bool padded = node->padded_dim != node->head_dim;
    const bool chosen = choose_rows(a, &s, &b, &fresh, joint, &choose) != 0;
    struct setting how = {NULL, s.rows && !padded ? out : NULL, true, s.rows, joint};
    if (joint && !s.dense && !chosen) return SQZ_ERROR_UNSUPPORTED;
    const bool rows_go_along = node->keys ? a->users && node->users == a->users : a->n_user == 0;
    if (sqz_gpu_node_good(node) && !padded && rows_go_along && node->n_tokens == a->n_sequences && chosen &&
        !s.own_planes) {
        how.fresh = &fresh;
        how.after_ours = how.cleared = false;
        return attend_rows(a, &s, &b, &how, stream);
    }
    enum sqz_status status = sqz_gpu_take_and_clear(node, b.arrived, s.rows ? (uint32_t)b.n_arrived : 0, led, stream);
    if (status == SQZ_OK)
        status = s.rows ? attend_rows(a, &s, &b, &how, stream) : attend_block(a, &s, &b, false, stream);
    if (status != SQZ_OK || how.out_f32 || !results) return status;
    return sqz_gpu_give(out, a->out, (size_t)node->n_tokens * node->n_head, node->head_dim, node->padded_dim, stream);
}

extern "C" enum sqz_status sqz_gpu_attend_node(const struct sqz_cuda_attend_args *a, const struct sqz_gpu_node *node,
                                               float *out, void *stream)
{
    struct unpacked u;
    enum sqz_status status = check(a, false);
    if (status == SQZ_OK) status = make_unpacked(&a, &u, stream);
    return status == SQZ_OK ? attend_tokens(a, NULL, node, out, stream) : status;
}

extern "C" size_t sqz_gpu_several_workspace_bytes(const struct sqz_cuda_attend_args *calls, size_t n)
{
    struct joint j;
    return join(&j, calls, n) ? sqz_cuda_attend_workspace_bytes(&j.args) : 0;
}

extern "C" enum sqz_status sqz_gpu_attend_several(const struct sqz_cuda_attend_args *calls, size_t n,
                                                  const struct sqz_gpu_node *node, float *out, void *stream)
{
    struct joint j;
    if (!join(&j, calls, n)) return SQZ_ERROR_UNSUPPORTED;
    for (size_t i = 0; i < n; i++) {
        const struct sqz_cuda_attend_args *a = &calls[i];
        const struct sizes s = sizes_of(a);
        if (a->layer->space != SQZ_SPACE_CUDA || !layer_complete(a->layer, s.dense, s.tail, s.coded))
            return SQZ_ERROR_ARGUMENT;
    }
    const enum sqz_status status = check(&j.args, false);
    if (status == SQZ_OK && node->n_tokens != j.args.n_sequences) return SQZ_ERROR_ARGUMENT;
    return status == SQZ_OK ? attend_tokens(&j.args, &j, node, out, stream) : status;
}

extern "C" enum sqz_status sqz_cuda_select(const struct sqz_cuda_attend_args *a, struct sqz_cuda_selection *selection,
                                           void *stream)
{
    struct unpacked u;
    enum sqz_status status = check(a, true);
    if (status == SQZ_OK && a->ranks && a->ranks->led) status = SQZ_ERROR_UNSUPPORTED;
    if (status == SQZ_OK && a->together) return SQZ_ERROR_ARGUMENT; /* there is no selection of each */
    if (status == SQZ_OK) status = selection ? make_unpacked(&a, &u, stream) : SQZ_ERROR_ARGUMENT;
    if (status != SQZ_OK) return status;
    const struct sizes s = sizes_of(a);
    struct sqz_arena arena = sqz_arena_on(a->workspace);
    struct buffers b;
    carve(&b, &arena, &s, a);
    *selection = (struct sqz_cuda_selection){b.groups, b.n_groups, (uint32_t)s.capacity, b.log_total};
    if (!s.rows) return attend_block(a, &s, &b, true, stream);
    struct sqz_cuda_choose_rows choose;
    const uint32_t ranks = choose_rows(a, &s, &b, NULL, NULL, &choose), n_tail = ranks ? choose.n_tail : s.n_tail;
    bool after_ours = false;
    enum sqz_status done = begin_own_planes(a, &s, &b, false, n_tail, n_tail - 1, &after_ours, stream);
    if (done == SQZ_OK)
        done = ranks ? sqz_cuda_choose_rows_launch(&choose, ranks, after_ours, stream)
                     : select_rows(a, &s, &b, after_ours, stream);
    if (done == SQZ_OK && a->ranks && !a->ranks->gather) done = sqz_cuda_rank_end_launch(a->ranks, stream);
    return done;
}
