/* gpu_cuts.h. */
#include "gpu_cuts.h"

static bool is_attention(const struct ggml_tensor *node)
{
    return node->op == GGML_OP_FLASH_ATTN_EXT;
}

/* Results of other nodes that a node needs; what comes from outside the graph computes nothing. */
static int count_sources(const struct ggml_tensor *node)
{
    int n = 0;
    for (int s = 0; s < GGML_MAX_SRC; s++) n += node->src[s] && node->src[s]->op != GGML_OP_NONE;
    return n;
}

/* Layers add to what they were given. */
static bool is_sum(const struct sqz_gpu_graph *g, const struct ggml_tensor *node)
{
    return node->op == GGML_OP_ADD && !node->view_src && node->type == GGML_TYPE_F32 &&
           g->is_plain(node, g->user_data) && ggml_are_same_shape(node->src[0], node->src[1]) &&
           !(node->flags & GGML_TENSOR_FLAG_OUTPUT);
}

static const struct ggml_tensor *keys_of(const struct ggml_tensor *attention)
{
    const struct ggml_tensor *const keys = attention->src[1];
    return keys->view_src ? keys->view_src : keys;
}

/* Whether a node of the graph stores into that memory. */
static bool is_stored(const struct sqz_gpu_graph *g, const struct ggml_tensor *keys)
{
    const int n = ggml_graph_n_nodes(g->graph);
    for (int i = 0; i < n; i++) {
        const struct ggml_tensor *const node = ggml_graph_node(g->graph, i);
        if ((node->op == GGML_OP_SET_ROWS || node->op == GGML_OP_CPY) && node->view_src == keys) return true;
    }
    return false;
}

bool sqz_gpu_shares_keys(const struct sqz_gpu_graph *g)
{
    const int n = ggml_graph_n_nodes(g->graph);
    for (int i = 0; i < n; i++) {
        struct ggml_tensor *const one = ggml_graph_node(g->graph, i);
        if (is_attention(one) && !is_stored(g, keys_of(one))) return true;
        for (int j = i + 1; is_attention(one) && j < n; j++) {
            struct ggml_tensor *const other = ggml_graph_node(g->graph, j);
            if (is_attention(other) && keys_of(other) == keys_of(one)) return true;
        }
    }
    return false;
}

int sqz_gpu_find_cut(const struct sqz_gpu_graph *g, uint32_t n_layers, bool last)
{
    const int n = ggml_graph_n_nodes(g->graph);
    uint32_t n_attention = 0;
    long needed = 0; /* of the nodes so far, by those behind them */
    int cut = 0;
    for (int i = 0; i < n; i++) {
        struct ggml_tensor *const node = ggml_graph_node(g->graph, i);
        const int uses = g->view_uses(g->graph, i);
        needed += uses - count_sources(node);
        n_attention += is_attention(node);
        if (n_attention > n_layers) return last ? 0 : cut;
        if (n_attention == n_layers && is_sum(g, node) && needed == uses) cut = i + 1;
        if (cut && !last) return cut;
    }
    return cut;
}
