/*
 * gpu_device.h on ggml's internal structures, those of the pinned llama.cpp, by
 * whose headers this file is compiled.
 *
 * A graph with attention nodes is cut there, and at products that are ours. Eagerly:
 * a piece goes to ggml's back end; an event on its stream lets ours follow; ours
 * launches; an event lets ggml's follow. Captured: ours begins, draws ggml's in by an event, the same
 * pieces are launched, and ggml's joins again. What other cards do for the nodes, on streams that wait for nothing of
 * this one (struct sqz_gpu_beside), becomes a graph of each.
 *
 * ggml's back end captures CUDA graphs of its own, which cannot be nested. It
 * does so for a piece that has come before unchanged; so that none ever does,
 * every piece begins with a node that computes nothing and is another one each
 * time. Graphs without our attention (llama.cpp's own run) keep ggml's capture.
 */
#include "gpu_device.h"
#include "gpu_bands.h"
#include "gpu_products.h"

#include <limits.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

_Static_assert(GGML_BACKEND_API_VERSION == 2, "ggml's back ends have another interface: compare this file with it");

static struct device {
    struct ggml_backend_device base;
    ggml_backend_dev_t inner;
    const struct sqz_gpu_calls *calls;
    int card;
    /* Of the same card once more: a kind of memory of its own, by which llama.cpp tells it from the first. */
    struct ggml_backend_buffer_type memory;
    char memory_name[32];
    bool is_again;
} devices[SQZ_MOST_CARDS], devices_again[SQZ_MOST_CARDS][SQZ_MOST_BANDS];
static int n_devices;

static ggml_backend_buffer_type_t memory_of(struct device *d)
{
    return d->is_again ? &d->memory : d->inner->iface.get_buffer_type(d->inner);
}

/* llama.cpp takes kinds of memory of one name for one. */
static const char *again_name(ggml_backend_buffer_type_t t)
{
    return ((const struct device *)(const void *)((const char *)t - offsetof(struct device, memory)))->memory_name;
}

static bool is_again_memory(ggml_backend_buffer_type_t t)
{
    const uintptr_t begin = (uintptr_t)devices_again, at = (uintptr_t)t;
    return at >= begin && at < begin + sizeof devices_again;
}

/* A result, or a view of it, that has another place while its graph is launched. */
struct moved {
    struct ggml_tensor *tensor;
    void *data;
};

/* A product that is taken with a copy of its matrix, while its graph is launched. */
struct swapped {
    struct ggml_tensor *node, *matrix;
};

/* One stream of llama.cpp's contexts on a card. */
struct engine {
    ggml_backend_t inner;
    ggml_backend_event_t theirs, ours; /* the last things on ggml's stream and on ours */
    struct device *device;
    void *stream;
    struct ggml_tensor **nodes; /* [n_nodes] room for a piece */
    struct swapped *swapped;    /* [n_nodes] */
    bool *done;                 /* [n_nodes] nodes of this graph that went with earlier ones */
    struct moved *moved;        /* [n_nodes] */
    int n_nodes, n_swapped, n_moved;
    bool at_ours;     /* our stream is the one that goes on; else ggml's */
    bool after_ours;  /* and what was launched on it last is of our library */
    void *multiplier; /* NULL: none yet, or */
    bool no_products; /* of many tokens: those are ggml's */
    bool no_groups;   /* of few tokens: */
    char *workspace;  /* of products */
    size_t workspace_room;
    const struct ggml_tensor *multiplied; /* in this graph, last */
    uint64_t uid, key;                    /* of the graph that ran last */
    void *captured;                       /* that graph; NULL: not yet */
    struct sqz_gpu_beside beside;         /* of the graph that runs, */
    struct sqz_gpu_beside with;           /* and of the captured one, with */
    void *captured_with[SQZ_MOST_BESIDE]; /* what these launch when it is launched */
    bool refused;                         /* nothing can be captured here */
    ggml_backend_event_t last_wait;       /* event that ggml's stream was told to wait for last; NULL: none */
};

static _Thread_local const struct sqz_gpu_handler *handler;
static struct {
    _Atomic uint64_t captured, replayed, eager, products, groups;
} counts;

void sqz_gpu_device_enter(const struct sqz_gpu_handler *h)
{
    handler = h;
}

struct sqz_gpu_device_counts sqz_gpu_device_count(void)
{
    return (struct sqz_gpu_device_counts){counts.captured, counts.replayed, counts.eager, counts.products,
                                          counts.groups};
}

static struct engine *engine_of(ggml_backend_t backend)
{
    return backend->context;
}

static struct device *device_of(ggml_backend_dev_t base)
{
    return (struct device *)base;
}

/* ---- Running graphs ------------------------------------------------------------------ */

static bool is_attention(const struct ggml_tensor *node)
{
    return node->op == GGML_OP_FLASH_ATTN_EXT;
}

static uint32_t count_attention(const struct ggml_cgraph *graph)
{
    uint32_t n = 0;
    for (int i = 0; i < graph->n_nodes; i++) n += is_attention(graph->nodes[i]);
    return n;
}

static bool ours_follows(struct engine *e)
{
    if (e->at_ours) return true;
    e->at_ours = true;
    e->after_ours = false;
    e->inner->iface.event_record(e->inner, e->theirs);
    return e->device->calls->follow(e->stream, e->theirs->context);
}

static bool theirs_follows(struct engine *e)
{
    if (!e->at_ours) return true;
    e->at_ours = false;
    if (!e->device->calls->record(e->ours->context, e->stream)) return false;
    e->inner->iface.event_wait(e->inner, e->ours);
    return true;
}

/* Nodes take 16-bit copies of weights where these are faster, until they are put back. */
static void swap_weights(struct engine *e, const struct ggml_cgraph *piece)
{
    const struct sqz_gpu_weights *weights = handler->weights ? handler->weights[e->device->card] : NULL;
    e->n_swapped = 0;
    for (int i = 1; weights && i < piece->n_nodes; i++) {
        struct ggml_tensor *node = piece->nodes[i], *copy = sqz_gpu_weights_for(weights, node);
        if (!copy) continue;
        e->swapped[e->n_swapped++] = (struct swapped){node, node->src[0]};
        node->src[0] = copy;
    }
}

static void put_weights_back(struct engine *e)
{
    for (int i = 0; i < e->n_swapped; i++) e->swapped[i].node->src[0] = e->swapped[i].matrix;
    e->n_swapped = 0;
}

/* Nodes [from, to) by ggml's back end, see above. */
static bool run_piece(struct engine *e, struct ggml_cgraph *graph, int from, int to)
{
    static _Atomic uint64_t turn;
    struct ggml_tensor first = {.type = GGML_TYPE_F32, .op = GGML_OP_NONE, .ne = {1, 1, 1, 1}, .nb = {4, 4, 4, 4}};
    int n = 0;
    for (int i = from; i < to; i++)
        if (!e->done[i]) e->nodes[++n] = graph->nodes[i];
    while (n > 0 && sqz_gpu_computes_nothing(e->nodes[n])) n--;
    if (n == 0) return true;
    if (!theirs_follows(e)) return false;
    const uint64_t now = atomic_fetch_add(&turn, 1);
    memcpy(first.op_params, &now, sizeof now);
    e->nodes[0] = &first;
    struct ggml_cgraph piece = ggml_graph_view(graph, from, to);
    piece.nodes = e->nodes;
    piece.n_nodes = n + 1;
    piece.uid = 0;
    swap_weights(e, &piece);
    const bool ok = e->inner->iface.graph_compute(e->inner, &piece) == GGML_STATUS_SUCCESS;
    put_weights_back(e);
    return ok;
}

static bool run_attention(struct engine *e, struct ggml_tensor *node)
{
    if (handler->inspect && theirs_follows(e)) e->inner->iface.synchronize(e->inner);
    if (!ours_follows(e)) return false;
    e->after_ours = true;
    return handler->node(handler->user_data, node, e->device->card, e->stream);
}

/* ---- Products ------------------------------------------------------------------------ */

static bool is_plain(const struct ggml_tensor *t, const void *device)
{
    struct device *const d = (struct device *)(uintptr_t)device;
    const struct ggml_tensor *owner = t->view_src ? t->view_src : t;
    return ggml_is_contiguous(t) && t->ne[2] == 1 && t->ne[3] == 1 && owner->buffer &&
           owner->buffer->buft == memory_of(d);
}

static int view_uses(struct ggml_cgraph *graph, int i)
{
    return ggml_node_get_use_count(graph, i);
}

static int uses(struct ggml_cgraph *graph, int i)
{
    const struct ggml_tensor *node = graph->nodes[i];
    return node->view_src || node->flags & GGML_TENSOR_FLAG_OUTPUT ? INT_MAX : ggml_node_get_use_count(graph, i);
}

static struct sqz_gpu_graph known_of(const struct engine *e, struct ggml_cgraph *graph)
{
    return (struct sqz_gpu_graph){graph, e->device->calls, is_plain, uses, view_uses, e->device};
}

/* Whether a node is a product of ours, which it describes then. */
static bool is_product(const struct engine *e, struct ggml_cgraph *graph, const struct ggml_tensor *node,
                       struct sqz_gpu_product *p)
{
    const struct sqz_gpu_graph g = known_of(e, graph);
    if (e->no_products || !sqz_gpu_multiplies_plainly(&g, node)) return false;
    const struct ggml_tensor *const weights = node->src[0], *const in = node->src[1];
    *p = (struct sqz_gpu_product){.type = weights->type,
                                  .weights = weights->data,
                                  .n_in = (uint32_t)weights->ne[0],
                                  .n_out = (uint32_t)weights->ne[1],
                                  .n_tokens = (uint32_t)in->ne[1],
                                  .in = in->data,
                                  .same_in = e->multiplied == in,
                                  .out = node->data,
                                  .workspace = e->workspace,
                                  .workspace_bytes = e->workspace_room};
    return e->device->calls->product_workspace_bytes(p) != 0;
}

static bool run_product(struct engine *e, const struct ggml_tensor *node, const struct sqz_gpu_product *p)
{
    e->multiplied = node->src[1];
    e->after_ours = false;
    counts.products++;
    if (ours_follows(e) && e->device->calls->product(e->multiplier, p, e->stream) == SQZ_OK) return true;
    handler->product_failed(handler->user_data);
    return false;
}

/* Whether a group of products of few tokens begins with node i. */
static bool is_group(const struct engine *e, struct ggml_cgraph *graph, int i, struct sqz_gpu_group *group)
{
    const struct sqz_gpu_graph g = known_of(e, graph);
    const enum ggml_op op = graph->nodes[i]->op;
    return !e->no_groups && (op == GGML_OP_MUL_MAT || op == GGML_OP_RMS_NORM) &&
           sqz_gpu_find_group(&g, i, e->done, group);
}

static size_t moved_bytes(const struct ggml_tensor *t)
{
    return t ? GGML_PAD(ggml_nbytes(t), 256) : 0;
}

/* What a group asks for of the workspace: the call's, and places of results that are moved. */
static size_t group_bytes(const struct engine *e, const struct sqz_gpu_group *group)
{
    size_t bytes = GGML_PAD(e->device->calls->projections_workspace_bytes(&group->call), 256);
    for (int k = 0; k < SQZ_MOST_PROJECTIONS; k++) bytes += moved_bytes(group->moved[k]);
    return bytes;
}

static void move(struct engine *e, struct ggml_tensor *t, char *by)
{
    e->moved[e->n_moved++] = (struct moved){t, t->data};
    t->data = by;
}

/* Results whose place is in use get one behind the call's workspace, and so do their views. */
static void move_results(struct engine *e, struct ggml_cgraph *graph, struct sqz_gpu_group *group)
{
    char *to = e->workspace + GGML_PAD(e->device->calls->projections_workspace_bytes(&group->call), 256);
    for (int k = 0; k < SQZ_MOST_PROJECTIONS; k++) {
        struct ggml_tensor *const t = group->moved[k];
        if (!t) continue;
        const char *const was = t->data;
        for (int i = 0; i < graph->n_nodes; i++) {
            struct ggml_tensor *const view = graph->nodes[i];
            if (view->view_src == t) move(e, view, to + ((char *)view->data - was));
        }
        move(e, t, to);
        group->call.matrices[k].out = t->data;
        to += moved_bytes(t);
    }
}

static void move_back(struct engine *e)
{
    while (e->n_moved > 0) {
        e->n_moved--;
        e->moved[e->n_moved].tensor->data = e->moved[e->n_moved].data;
    }
}

static bool run_group(struct engine *e, struct ggml_cgraph *graph, struct sqz_gpu_group *group)
{
    if (!ours_follows(e)) return false;
    move_results(e, graph, group);
    group->call.workspace = e->workspace;
    group->call.workspace_bytes = e->workspace_room;
    group->call.after_ours = e->after_ours;
    e->after_ours = true;
    for (int i = 0; i < group->n_nodes; i++) e->done[group->nodes[i]] = true;
    counts.groups++;
    if (e->device->calls->project(&group->call, e->stream) == SQZ_OK) return true;
    handler->product_failed(handler->user_data);
    return false;
}

static void forget_products(struct engine *e)
{
    const struct sqz_gpu_calls *calls = e->device->calls;
    if (e->workspace) calls->wait(e->stream), calls->release(e->workspace);
    if (e->multiplier) calls->free_multiplier(e->multiplier);
    e->multiplier = NULL;
    e->workspace = NULL;
    e->workspace_room = 0;
}

/* The workspace that the graph's products need; *many: there are such of many tokens. */
static size_t most_product_bytes(const struct engine *e, struct ggml_cgraph *graph, bool *many)
{
    size_t most = 0;
    *many = false;
    for (int i = 0; i < graph->n_nodes; i++) {
        struct sqz_gpu_product p;
        struct sqz_gpu_group group;
        size_t bytes = 0;
        if (is_product(e, graph, graph->nodes[i], &p)) {
            bytes = e->device->calls->product_workspace_bytes(&p);
            *many = true;
        } else if (is_group(e, graph, i, &group)) {
            bytes = group_bytes(e, &group);
        }
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* Room for the largest product of the graph; where there is none, they are ggml's from then on, and so are those of
 * many tokens where there is no way to multiply. */
static void make_ready_to_multiply(struct engine *e, struct ggml_cgraph *graph)
{
    const struct sqz_gpu_calls *calls = e->device->calls;
    bool many;
    memset(e->done, 0, (size_t)graph->n_nodes * sizeof *e->done);
    e->multiplied = NULL;
    size_t most = most_product_bytes(e, graph, &many);
    if (many && !e->multiplier) {
        e->multiplier = calls->create_multiplier();
        e->no_products = !e->multiplier;
        if (e->no_products) most = most_product_bytes(e, graph, &many);
    }
    if (most <= e->workspace_room) return;
    if (e->workspace) calls->wait(e->stream), calls->release(e->workspace);
    e->workspace = calls->allocate(most);
    e->workspace_room = e->workspace ? most : 0;
    if (!e->workspace) e->no_products = e->no_groups = true, forget_products(e);
}

/* Nodes [from, to). */
static bool run_pieces(struct engine *e, struct ggml_cgraph *graph, int from, int to)
{
    make_ready_to_multiply(e, graph);
    for (int i = from; i < to; i++) {
        struct ggml_tensor *node = graph->nodes[i];
        struct sqz_gpu_product product;
        struct sqz_gpu_group group;
        if (e->done[i]) continue;
        const bool multiplies = is_product(e, graph, node, &product),
                   grouped = !multiplies && is_group(e, graph, i, &group);
        if (!multiplies && !grouped && !is_attention(node)) continue;
        if (!run_piece(e, graph, from, i)) return false;
        if (multiplies ? !run_product(e, node, &product)
            : grouped  ? !run_group(e, graph, &group)
                       : !run_attention(e, node))
            return false;
        from = i + 1;
    }
    return run_piece(e, graph, from, to);
}

static bool run_all(struct engine *e, struct ggml_cgraph *graph)
{
    const bool ok = run_pieces(e, graph, 0, graph->n_nodes) && theirs_follows(e);
    move_back(e);
    return ok;
}

/* ---- Bands of layers ------------------------------------------------------------------- */

static bool enter_ours(void *engine)
{
    struct engine *e = engine;
    e->after_ours = false;
    return ours_follows(e);
}

static bool run_nodes(void *engine, struct ggml_cgraph *graph, int from, int to)
{
    return run_pieces(engine, graph, from, to);
}

static bool leave_ours(void *engine)
{
    const bool ok = theirs_follows(engine);
    move_back(engine);
    return ok;
}

static bool run_bands(struct engine *e, struct ggml_cgraph *graph, uint32_t n_attention)
{
    const struct sqz_gpu_segment segment = {.known = known_of(e, graph),
                                            .card = e->device->card,
                                            .engine = e,
                                            .stream = e->stream,
                                            .event = e->ours->context,
                                            .enter = enter_ours,
                                            .run = run_nodes,
                                            .leave = leave_ours};
    return sqz_gpu_bands_run(handler->bands, &segment, n_attention, handler->go_to, handler->user_data);
}

/* ---- Captured graphs ------------------------------------------------------------------- */

static bool begin_captures_beside(struct engine *e)
{
    const struct sqz_gpu_calls *calls = e->device->calls;
    bool ok = true;
    e->with.n = 0;
    for (uint32_t i = 0; i < e->beside.n && ok; i++) {
        ok = calls->use(e->beside.of[i].card) && calls->begin_capture(e->beside.of[i].stream);
        e->captured_with[i] = NULL;
        if (ok) e->with.of[e->with.n++] = e->beside.of[i];
    }
    return calls->use(e->device->card) && ok;
}

static bool end_captures_beside(struct engine *e)
{
    const struct sqz_gpu_calls *calls = e->device->calls;
    bool ok = true;
    for (uint32_t i = 0; i < e->with.n; i++) {
        ok = calls->use(e->with.of[i].card) && ok;
        e->captured_with[i] = calls->end_capture(e->with.of[i].stream);
        ok = e->captured_with[i] && ok;
    }
    return calls->use(e->device->card) && ok;
}

/* What other cards have of it is done when a pass is. */
static void forget_captured(struct engine *e)
{
    const struct sqz_gpu_calls *calls = e->device->calls;
    for (uint32_t i = 0; i < e->with.n; i++)
        if (e->captured_with[i] && calls->use(e->with.of[i].card)) calls->free_captured(e->captured_with[i]);
    e->with.n = 0;
    calls->use(e->device->card);
    if (!e->captured) return;
    calls->wait(e->stream);
    calls->free_captured(e->captured);
    e->captured = NULL;
}

/* Whether the graph is captured. False and not refused: what was to be launched failed. */
static bool capture(struct engine *e, struct ggml_cgraph *graph)
{
    const struct sqz_gpu_calls *calls = e->device->calls;
    e->refused = !calls->begin_capture(e->stream);
    if (e->refused) return false;
    bool ok = begin_captures_beside(e) && theirs_follows(e) && run_all(e, graph) && ours_follows(e);
    ok = end_captures_beside(e) && ok;
    e->captured = calls->end_capture(e->stream);
    if (e->captured) counts.captured++;
    if (ok && e->captured) return true;
    forget_captured(e);
    return false;
}

/* The card's own graph first, which has products to compute before the others are waited for. */
static bool launch_captured(struct engine *e)
{
    const struct sqz_gpu_calls *calls = e->device->calls;
    bool ok = calls->launch(e->captured, e->stream);
    if (e->with.n) e->beside.ready(e->beside.user_data);
    for (uint32_t i = 0; i < e->with.n && ok; i++)
        ok = calls->use(e->with.of[i].card) && calls->launch(e->captured_with[i], e->with.of[i].stream);
    return (!e->with.n || calls->use(e->device->card)) && ok;
}

static bool replay(struct engine *e, uint32_t n_attention)
{
    if (!ours_follows(e) || !launch_captured(e) || !theirs_follows(e)) return false;
    handler->replayed(handler->user_data, n_attention);
    counts.replayed++;
    return true;
}

static bool make_room(struct engine *e, int n_nodes)
{
    if (n_nodes <= e->n_nodes) return true;
    struct ggml_tensor **nodes = realloc(e->nodes, (size_t)n_nodes * sizeof *nodes);
    if (nodes) e->nodes = nodes;
    struct swapped *swapped = realloc(e->swapped, (size_t)n_nodes * sizeof *swapped);
    if (swapped) e->swapped = swapped;
    struct moved *moved = realloc(e->moved, (size_t)n_nodes * sizeof *moved);
    if (moved) e->moved = moved;
    bool *done = realloc(e->done, (size_t)n_nodes * sizeof *done);
    if (done) e->done = done;
    if (!nodes || !swapped || !moved || !done) return false;
    e->n_nodes = n_nodes;
    return true;
}

/* Copies of the weights that the graph multiplies by, where they are wanted. Without memory for them it runs as it is. */
static bool made_copies(struct engine *e, struct ggml_cgraph *graph)
{
    struct sqz_gpu_weights **weights = handler->weights ? &handler->weights[e->device->card] : NULL;
    if (!weights || handler->inspect) return false;
    if (!*weights) *weights = sqz_gpu_weights_create();
    return *weights && sqz_gpu_weights_make(*weights, e->inner, graph, e->device->calls, e->stream);
}

/* The first time eagerly, so that everything that ggml sets up once is there; the second time it is captured. */
static bool run_with_ours(struct engine *e, struct ggml_cgraph *graph, uint32_t n_attention)
{
    uint64_t key = 0;
    e->at_ours = false;
    e->beside.n = 0;
    if (!make_room(e, graph->n_nodes + 1) || !e->device->calls->use(e->device->card) || !ours_follows(e) ||
        !handler->begin(handler->user_data, e->device->card, e->stream, &key, &e->beside))
        return false;
    bool again = graph->uid && key && graph->uid == e->uid && key == e->key;
    if (!(again && e->captured) && made_copies(e, graph)) again = false;
    if (!again) forget_captured(e);
    e->uid = graph->uid;
    e->key = key;
    /* Those that are captured now have gone to the handler one by one. */
    if (again && e->captured) return replay(e, n_attention);
    if (again && !e->refused && capture(e, graph)) return replay(e, 0);
    if (again && !e->refused) return false;
    counts.eager++;
    return handler->bands && handler->bands->n > 1 ? run_bands(e, graph, n_attention) : run_all(e, graph);
}

static enum ggml_status compute(ggml_backend_t backend, struct ggml_cgraph *graph)
{
    struct engine *e = engine_of(backend);
    const uint32_t n_attention = handler ? count_attention(graph) : 0;
    if (n_attention == 0) return e->inner->iface.graph_compute(e->inner, graph);
    return run_with_ours(e, graph, n_attention) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

/* ---- The stream: everything else is handed on ------------------------------------------ */

static const char *stream_name(ggml_backend_t backend)
{
    return engine_of(backend)->inner->iface.get_name(engine_of(backend)->inner);
}

static void free_engine(struct engine *e)
{
    const struct sqz_gpu_calls *calls = e->device->calls;
    calls->use(e->device->card);
    if (e->inner) e->inner->iface.synchronize(e->inner);
    forget_captured(e);
    forget_products(e);
    if (e->stream) calls->wait(e->stream), calls->free_stream(e->stream);
    if (e->theirs) ggml_backend_event_free(e->theirs);
    if (e->ours) ggml_backend_event_free(e->ours);
    if (e->inner) ggml_backend_free(e->inner);
    free(e->nodes);
    free(e->swapped);
    free(e->moved);
    free(e->done);
    free(e);
}

static void free_stream(ggml_backend_t backend)
{
    free_engine(engine_of(backend));
    free(backend);
}

/* ggml's back end insists that a tensor lies in its own kind of memory, which that of a card once more is but for its
 * name. Returns what it says. */
static ggml_backend_buffer_type_t show_memory(ggml_backend_t b, const struct ggml_tensor *t,
                                              ggml_backend_buffer_type_t type)
{
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    const ggml_backend_buffer_type_t was = buffer->buft;
    if (engine_of(b)->device->is_again) buffer->buft = type;
    return was;
}

static void set_async(ggml_backend_t b, struct ggml_tensor *t, const void *data, size_t offset, size_t size)
{
    struct engine *e = engine_of(b);
    const ggml_backend_buffer_type_t was = show_memory(b, t, e->inner->device->iface.get_buffer_type(e->inner->device));
    e->inner->iface.set_tensor_async(e->inner, t, data, offset, size);
    show_memory(b, t, was);
}

static void get_async(ggml_backend_t b, const struct ggml_tensor *t, void *data, size_t offset, size_t size)
{
    struct engine *e = engine_of(b);
    const ggml_backend_buffer_type_t was = show_memory(b, t, e->inner->device->iface.get_buffer_type(e->inner->device));
    e->inner->iface.get_tensor_async(e->inner, t, data, offset, size);
    show_memory(b, t, was);
}

/* From one card to another. The scheduler has `to` wait until the run that had this place last is done with it, but the
 * copy is made on the stream of `from`, which may be several runs ahead: it waits for the same. */
static bool copy_async(ggml_backend_t from, ggml_backend_t to, const struct ggml_tensor *source,
                       struct ggml_tensor *copy)
{
    if (from->iface.free != free_stream || to->iface.free != free_stream) return false;
    struct ggml_backend *source_stream = engine_of(from)->inner, *inner = engine_of(to)->inner;
    if (!inner->iface.cpy_tensor_async) return false;
    if (engine_of(to)->last_wait) source_stream->iface.event_wait(source_stream, engine_of(to)->last_wait);
    return inner->iface.cpy_tensor_async(source_stream, inner, source, copy);
}

static void synchronize(ggml_backend_t b)
{
    engine_of(b)->last_wait = NULL;
    engine_of(b)->inner->iface.synchronize(engine_of(b)->inner);
}

static void event_record(ggml_backend_t b, ggml_backend_event_t event)
{
    engine_of(b)->inner->iface.event_record(engine_of(b)->inner, event);
}

static void event_wait(ggml_backend_t b, ggml_backend_event_t event)
{
    engine_of(b)->last_wait = event;
    engine_of(b)->inner->iface.event_wait(engine_of(b)->inner, event);
}

static void optimize(ggml_backend_t b, struct ggml_cgraph *graph, struct ggml_backend_graph_optimize_params *params)
{
    engine_of(b)->inner->iface.graph_optimize(engine_of(b)->inner, graph, params);
}

static ggml_backend_t init_stream(ggml_backend_dev_t base, const char *params)
{
    static uint8_t guid[16] = {0x73, 0x71, 0x75, 0x65, 0x65, 0x7a, 0x65, 0x2d, 0x63, 0x75, 0x64, 0x61, 0, 0, 0, 1};
    struct device *device = device_of(base);
    struct engine *e = calloc(1, sizeof *e);
    ggml_backend_t backend = calloc(1, sizeof *backend);
    if (e) {
        e->device = device;
        const char *theirs = getenv("SQUEEZE_GPU_PRODUCTS");
        e->no_products = theirs && !strcmp(theirs, "ggml");
        e->no_groups = theirs && (!strcmp(theirs, "ggml") || !strcmp(theirs, "few"));
        e->inner = device->inner->iface.init_backend(device->inner, params);
        e->theirs = ggml_backend_event_new(device->inner);
        e->ours = ggml_backend_event_new(device->inner);
        if (device->calls->use(device->card)) e->stream = device->calls->create_stream();
    }
    if (!backend || !e || !e->inner || !e->theirs || !e->ours || !e->stream) {
        if (e) free_engine(e);
        free(backend);
        return NULL;
    }
    backend->guid = &guid;
    backend->device = base;
    backend->context = e;
    backend->iface = (struct ggml_backend_i){
        .get_name = stream_name,
        .free = free_stream,
        .set_tensor_async = set_async,
        .get_tensor_async = get_async,
        .cpy_tensor_async = copy_async,
        .synchronize = synchronize,
        .graph_compute = compute,
        .event_record = event_record,
        .event_wait = event_wait,
        .graph_optimize = e->inner->iface.graph_optimize ? optimize : NULL,
    };
    return backend;
}

/* ---- The device ------------------------------------------------------------------------ */

#define INNER(base) (device_of(base)->inner)

static const char *name(ggml_backend_dev_t d)
{
    return INNER(d)->iface.get_name(INNER(d));
}

static const char *description(ggml_backend_dev_t d)
{
    return INNER(d)->iface.get_description(INNER(d));
}

static void memory(ggml_backend_dev_t d, size_t *free_bytes, size_t *total)
{
    INNER(d)->iface.get_memory(INNER(d), free_bytes, total);
}

static enum ggml_backend_dev_type type(ggml_backend_dev_t d)
{
    return INNER(d)->iface.get_type(INNER(d));
}

static void props(ggml_backend_dev_t d, struct ggml_backend_dev_props *p)
{
    INNER(d)->iface.get_props(INNER(d), p);
}

static ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t d)
{
    return memory_of(device_of(d));
}

static ggml_backend_buffer_type_t host_buffer_type(ggml_backend_dev_t d)
{
    return INNER(d)->iface.get_host_buffer_type(INNER(d));
}

/* While a run of ours splits its graph, attention is ours, whatever shapes ggml has kernels for. */
static bool supports_op(ggml_backend_dev_t d, const struct ggml_tensor *op)
{
    return (handler && is_attention(op)) || INNER(d)->iface.supports_op(INNER(d), op);
}

static bool supports_buft(ggml_backend_dev_t d, ggml_backend_buffer_type_t t)
{
    if (is_again_memory(t)) return device_of(d)->is_again && t == &device_of(d)->memory;
    return !device_of(d)->is_again && INNER(d)->iface.supports_buft(INNER(d), t);
}

static bool offload_op(ggml_backend_dev_t d, const struct ggml_tensor *op)
{
    return INNER(d)->iface.offload_op(INNER(d), op);
}

static ggml_backend_event_t event_new(ggml_backend_dev_t d)
{
    return INNER(d)->iface.event_new(INNER(d));
}

static void event_free(ggml_backend_dev_t d, ggml_backend_event_t event)
{
    INNER(d)->iface.event_free(INNER(d), event);
}

static void event_synchronize(ggml_backend_dev_t d, ggml_backend_event_t event)
{
    INNER(d)->iface.event_synchronize(INNER(d), event);
}

static const char *registry_name(ggml_backend_reg_t r)
{
    (void)r;
    return "squeeze";
}

static size_t registry_count(ggml_backend_reg_t r)
{
    (void)r;
    return (size_t)n_devices;
}

static ggml_backend_dev_t registry_device(ggml_backend_reg_t r, size_t i)
{
    (void)r;
    return &devices[i].base;
}

static void *registry_address(ggml_backend_reg_t r, const char *function)
{
    (void)r;
    return ggml_backend_reg_get_proc_address(devices[0].inner->reg, function);
}

static struct ggml_backend_reg registry = {
    .api_version = GGML_BACKEND_API_VERSION,
    .iface = {registry_name, registry_count, registry_device, registry_address},
};

bool sqz_gpu_device_fits(ggml_backend_reg_t theirs)
{
    return theirs->api_version == GGML_BACKEND_API_VERSION;
}

static void set_device(struct device *d, ggml_backend_dev_t inner, const struct sqz_gpu_calls *calls, int card)
{
    d->inner = inner;
    d->calls = calls;
    d->card = card;
    d->base.reg = &registry;
    d->base.iface = (struct ggml_backend_device_i){
        .get_name = name,
        .get_description = description,
        .get_memory = memory,
        .get_type = type,
        .get_props = props,
        .init_backend = init_stream,
        .get_buffer_type = buffer_type,
        .get_host_buffer_type = d->inner->iface.get_host_buffer_type ? host_buffer_type : NULL,
        .supports_op = supports_op,
        .supports_buft = supports_buft,
        .offload_op = d->inner->iface.offload_op ? offload_op : NULL,
        .event_new = event_new,
        .event_free = event_free,
        .event_synchronize = event_synchronize,
    };
}

ggml_backend_dev_t sqz_gpu_device_add(ggml_backend_dev_t inner, const struct sqz_gpu_calls *calls)
{
    struct device *d = &devices[n_devices];
    set_device(d, inner, calls, n_devices++);
    return &d->base;
}

ggml_backend_dev_t sqz_gpu_device_again(int card, uint32_t number)
{
    const struct device *first = &devices[card];
    struct device *d = &devices_again[card][number];
    if (d->is_again) return &d->base;
    set_device(d, first->inner, first->calls, card);
    d->memory = *first->inner->iface.get_buffer_type(first->inner);
    d->memory.iface.get_name = again_name;
    snprintf(d->memory_name, sizeof d->memory_name, "card %d, once more %u", card, number);
    d->is_again = true;
    return &d->base;
}
