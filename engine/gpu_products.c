/* gpu_products.h. */
#include "gpu_products.h"

#include <limits.h>
#include <stdint.h>
#include <string.h>

enum { LOOKED_AHEAD = 16 }; /* nodes, for products of the same input */

static bool overlap(const struct ggml_tensor *a, const struct ggml_tensor *b)
{
    const char *const x = a->data, *const y = b->data;
    return x < y + ggml_nbytes(b) && y < x + ggml_nbytes(a);
}

bool sqz_gpu_computes_nothing(const struct ggml_tensor *node)
{
    return node->op == GGML_OP_NONE || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_VIEW ||
           node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE;
}

static struct ggml_tensor *node_at(const struct sqz_gpu_graph *g, int i)
{
    return i < ggml_graph_n_nodes(g->graph) ? ggml_graph_node(g->graph, i) : NULL;
}

/* The next node that computes something, or the number of nodes. */
static int after(const struct sqz_gpu_graph *g, int i)
{
    for (i++; i < ggml_graph_n_nodes(g->graph) && sqz_gpu_computes_nothing(node_at(g, i));) i++;
    return i;
}

bool sqz_gpu_multiplies(const struct ggml_tensor *node)
{
    if (node->op != GGML_OP_MUL_MAT) return false;
    const struct ggml_tensor *const weights = node->src[0], *const in = node->src[1];
    return in->type == GGML_TYPE_F32 && node->type == GGML_TYPE_F32 && ggml_is_contiguous(weights) &&
           weights->ne[2] == 1 && weights->ne[3] == 1 && in->ne[2] == 1 && in->ne[3] == 1;
}

bool sqz_gpu_multiplies_plainly(const struct sqz_gpu_graph *g, const struct ggml_tensor *node)
{
    if (!sqz_gpu_multiplies(node)) return false;
    const struct ggml_tensor *const weights = node->src[0], *const in = node->src[1];
    return g->is_plain(weights, g->user_data) && g->is_plain(in, g->user_data) && g->is_plain(node, g->user_data) &&
           weights->ne[0] <= UINT32_MAX && weights->ne[1] <= UINT32_MAX && in->ne[1] <= UINT32_MAX;
}

/* Whether a node is a product that a call of its own could be, which it describes then. */
static bool describe(const struct sqz_gpu_graph *g, const struct ggml_tensor *node, struct sqz_gpu_projections *p)
{
    if (!sqz_gpu_multiplies_plainly(g, node)) return false;
    const struct ggml_tensor *const weights = node->src[0], *const in = node->src[1];
    if (in->ne[1] > SQZ_MOST_PROJECTED || overlap(in, node) || ((uintptr_t)weights->data | (uintptr_t)in->data) % 16)
        return false;
    *p = (struct sqz_gpu_projections){
        .type = weights->type,
        .n_in = (uint32_t)weights->ne[0],
        .n_tokens = (uint32_t)in->ne[1],
        .n_matrices = 1,
        .matrices[0] = {.weights = weights->data, .n_out = (uint32_t)weights->ne[1], .out = node->data},
        .in = in->data};
    return g->calls->projections_workspace_bytes(p) != 0;
}

static void note(struct sqz_gpu_group *group, int i)
{
    group->nodes[group->n_nodes++] = i;
}

/* Whether `what` can be added to each token's results: a token's own row, or one for all. */
static bool addable(const struct sqz_gpu_graph *g, const struct ggml_tensor *what, const struct ggml_tensor *product)
{
    return what->type == GGML_TYPE_F32 && what->ne[0] == product->ne[0] &&
           (ggml_nrows(what) == 1 || ggml_are_same_shape(what, product)) && g->is_plain(what, g->user_data);
}

/* Takes the addition behind product i, where it can be: its node, or the product's. `only_constants`: what is added
 * must not be a result of the graph. */
static const struct ggml_tensor *take_addition(const struct sqz_gpu_graph *g, int i, bool only_constants,
                                               struct sqz_gpu_group *group, uint32_t k)
{
    struct ggml_tensor *const product = node_at(g, i), *const sum = node_at(g, after(g, i));
    if (!sum || sum->op != GGML_OP_ADD || (sum->src[0] != product && sum->src[1] != product) ||
        g->uses(g->graph, i) != 1 || !g->is_plain(sum, g->user_data) || sum->type != GGML_TYPE_F32 ||
        !ggml_are_same_shape(sum, product))
        return product;
    const struct ggml_tensor *const what = sum->src[0] == product ? sum->src[1] : sum->src[0];
    if (!addable(g, what, product) || (only_constants && what->op != GGML_OP_NONE) || overlap(sum, product->src[1]) ||
        (sum->data != what->data && overlap(sum, what)))
        return product;
    if (sum->data == what->data && !ggml_are_same_shape(sum, what)) return product;
    group->call.matrices[k].add = what->data;
    group->call.matrices[k].add_stride = ggml_nrows(what) == 1 ? 0 : (uint32_t)product->ne[0];
    group->call.matrices[k].out = sum->data;
    note(group, after(g, i));
    return sum;
}

/* A product, another of the same input behind it, and the gate of the two. */
static bool take_gate(const struct sqz_gpu_graph *g, int i, struct sqz_gpu_group *group)
{
    const int j = after(g, i), k = after(g, j);
    struct ggml_tensor *const first = node_at(g, i), *const second = node_at(g, j), *const gate = node_at(g, k);
    struct sqz_gpu_projections other;
    if (!gate || gate->op != GGML_OP_GLU || ggml_get_glu_op(gate) != GGML_GLU_OP_SWIGLU || gate->type != GGML_TYPE_F32)
        return false;
    if (second->src[1] != first->src[1] || !describe(g, second, &other) || other.type != group->call.type ||
        !ggml_are_same_shape(first, second) || !ggml_are_same_shape(first, gate))
        return false;
    const bool in_order = gate->src[0] == first && gate->src[1] == second;
    if ((!in_order && (gate->src[0] != second || gate->src[1] != first)) || g->uses(g->graph, i) != 1 ||
        g->uses(g->graph, j) != 1 || !g->is_plain(gate, g->user_data) || overlap(gate, first->src[1]))
        return false;
    group->call.matrices[1] = other.matrices[0];
    if (!in_order) {
        group->call.matrices[1] = group->call.matrices[0];
        group->call.matrices[0] = other.matrices[0];
    }
    group->call.matrices[0].out = gate->data;
    group->call.n_matrices = 2;
    group->call.gated = true;
    note(group, j);
    note(group, k);
    return g->calls->projections_workspace_bytes(&group->call) != 0;
}

static bool in_group(const struct sqz_gpu_group *group, int i)
{
    for (int k = 0; k < group->n_nodes; k++)
        if (group->nodes[k] == i) return true;
    return false;
}

/* Whether `out` can be written at node i instead of j: nothing in between reads or writes there. */
static bool can_come_early(const struct sqz_gpu_graph *g, const struct sqz_gpu_group *group, int i, int j,
                           const struct ggml_tensor *out)
{
    for (int k = i; k < j; k++) {
        const struct ggml_tensor *const node = node_at(g, k);
        if (sqz_gpu_computes_nothing(node)) continue;
        if (overlap(node, out)) return false;
        for (int s = 0; s < GGML_MAX_SRC && !in_group(group, k); s++)
            if (node->src[s] && node->src[s]->data && overlap(node->src[s], out)) return false;
    }
    return true;
}

/* Whether node j's result and its views are needed by this graph alone. */
static bool stays_here(const struct sqz_gpu_graph *g, int j)
{
    const struct ggml_tensor *const t = node_at(g, j);
    long wanted = g->uses(g->graph, j), found = 0;
    if (wanted == INT_MAX || t->view_src) return false;
    for (int i = j + 1; i < ggml_graph_n_nodes(g->graph); i++) {
        const struct ggml_tensor *const node = node_at(g, i);
        if (node->view_src == t) {
            if (node->flags & GGML_TENSOR_FLAG_OUTPUT) return false;
            wanted += g->view_uses(g->graph, i);
        }
        for (int s = 0; s < GGML_MAX_SRC; s++)
            found += node->src[s] && (node->src[s] == t || node->src[s]->view_src == t);
    }
    return found == wanted;
}

/* Further products of node i's input. */
static void take_more(const struct sqz_gpu_graph *g, int i, const bool *done, struct sqz_gpu_group *group)
{
    const struct ggml_tensor *const in = node_at(g, i)->src[1];
    for (int j = i + 1; j < i + LOOKED_AHEAD && node_at(g, j) && group->call.n_matrices < SQZ_MOST_PROJECTIONS; j++) {
        struct ggml_tensor *const node = node_at(g, j);
        struct sqz_gpu_projections other;
        if (node->op == GGML_OP_FLASH_ATTN_EXT) return;
        if (done[j] || in_group(group, j) || node->op != GGML_OP_MUL_MAT || node->src[1] != in ||
            !describe(g, node, &other) || other.type != group->call.type)
            continue;
        struct sqz_gpu_group with = *group;
        const uint32_t k = with.call.n_matrices++;
        with.call.matrices[k] = other.matrices[0];
        note(&with, j);
        const struct ggml_tensor *const out = take_addition(g, j, true, &with, k);
        const bool early = can_come_early(g, group, i, j, out);
        const int last = with.nodes[with.n_nodes - 1]; /* the product, or what is added to it */
        if (!early && !stays_here(g, last)) continue;
        if (!early) with.moved[k] = node_at(g, last);
        *group = with;
    }
}

static bool find_products(const struct sqz_gpu_graph *g, int i, const bool *done, struct sqz_gpu_group *group)
{
    *group = (struct sqz_gpu_group){0};
    if (!describe(g, node_at(g, i), &group->call)) return false;
    note(group, i);
    const struct sqz_gpu_group alone = *group;
    if (take_gate(g, i, group)) return true;
    *group = alone;
    take_addition(g, i, false, group, 0);
    take_more(g, i, done, group);
    return true;
}

/* Whether a result of the group lies where x does. */
static bool writes_over(const struct sqz_gpu_group *group, const struct ggml_tensor *x)
{
    const struct sqz_gpu_projections *const c = &group->call;
    for (uint32_t k = 0; k < (c->gated ? 1 : c->n_matrices); k++) {
        const char *const out = (const char *)c->matrices[k].out, *const in = x->data;
        if (group->moved[k]) continue;
        if (out < in + ggml_nbytes(x) && in < out + (size_t)c->n_tokens * c->matrices[k].n_out * sizeof(float))
            return true;
    }
    return false;
}

/* Products of what a norm makes, for nothing else: with the norm, node i. */
static bool find_normalised(const struct sqz_gpu_graph *g, int i, const bool *done, struct sqz_gpu_group *group)
{
    const int j = after(g, i), k = after(g, j);
    struct ggml_tensor *const norm = node_at(g, i), *const scaled = node_at(g, j), *const product = node_at(g, k);
    if (!product || scaled->op != GGML_OP_MUL || scaled->src[0] != norm || product->op != GGML_OP_MUL_MAT ||
        product->src[1] != scaled || g->uses(g->graph, i) != 1 || !find_products(g, k, done, group))
        return false;
    const struct ggml_tensor *const x = norm->src[0], *const factors = scaled->src[1];
    if (g->uses(g->graph, j) != (int)group->call.n_matrices || x->type != GGML_TYPE_F32 ||
        !ggml_are_same_shape(x, scaled) || !g->is_plain(x, g->user_data) || factors->op != GGML_OP_NONE ||
        factors->type != GGML_TYPE_F32 || ggml_nelements(factors) != x->ne[0] || !g->is_plain(factors, g->user_data) ||
        ((uintptr_t)x->data | (uintptr_t)factors->data) % 16 || writes_over(group, x))
        return false;
    group->call.in = x->data;
    group->call.norm = factors->data;
    memcpy(&group->call.norm_epsilon, norm->op_params, sizeof(float));
    note(group, i);
    note(group, j);
    return true;
}

bool sqz_gpu_find_group(const struct sqz_gpu_graph *g, int i, const bool *done, struct sqz_gpu_group *group)
{
    return node_at(g, i)->op == GGML_OP_RMS_NORM ? find_normalised(g, i, done, group)
                                                 : find_products(g, i, done, group);
}
