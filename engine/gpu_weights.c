/* gpu_weights.h, on ggml's public interface. */
#include "gpu_weights.h"

#include <stdint.h>
#include <stdlib.h>

#include "cuda/weights.h"
#include "ggml-alloc.h"
#include "ggml.h"
#include "gpu_products.h"

enum {
    TRIED_MATRICES = 8, /* that the measurement multiplies by: more than a cache holds */
    TRIALS = 5
};

/* Tokens for which products are timed. One alone is never faster with a copy, which is several times as large. */
static const int64_t points[] = {2, 4, 8, 16, 32, 64, 128, 256};
enum { N_POINTS = sizeof points / sizeof *points };

struct matrix {
    struct ggml_tensor *quantised, *copy;
};

/* What one graph brought. */
struct set {
    struct ggml_context *tensors;
    ggml_backend_buffer_t memory;
    struct set *next;
};

struct sqz_gpu_weights {
    struct matrix *matrices; /* [n] */
    size_t n, bytes;
    struct set *sets;
    bool refused, measured;
    bool faster[N_POINTS]; /* with copies */
};

struct sqz_gpu_weights *sqz_gpu_weights_create(void)
{
    return calloc(1, sizeof(struct sqz_gpu_weights));
}

void sqz_gpu_weights_free(struct sqz_gpu_weights *w)
{
    if (!w) return;
    for (struct set *s = w->sets, *next; s; s = next) {
        next = s->next;
        ggml_backend_buffer_free(s->memory);
        ggml_free(s->tensors);
        free(s);
    }
    free(w->matrices);
    free(w);
}

size_t sqz_gpu_weights_bytes(const struct sqz_gpu_weights *w)
{
    return w ? w->bytes : 0;
}

static struct ggml_tensor *copy_of(const struct sqz_gpu_weights *w, const struct ggml_tensor *quantised)
{
    for (size_t i = 0; i < w->n; i++)
        if (w->matrices[i].quantised == quantised) return w->matrices[i].copy;
    return NULL;
}

/* Whether a node is a product of tokens with a quantised matrix that lies on the card. */
static bool is_product(const struct ggml_tensor *node)
{
    if (!sqz_gpu_multiplies(node)) return false;
    const struct ggml_tensor *const matrix = node->src[0];
    const struct sqz_weights_block block = sqz_weights_block_of((int)matrix->type);
    return block.n && matrix->ne[0] % block.n == 0 && matrix->buffer && !matrix->view_src &&
           ggml_backend_buffer_get_usage(matrix->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

struct ggml_tensor *sqz_gpu_weights_for(const struct sqz_gpu_weights *w, const struct ggml_tensor *node)
{
    if (w->n == 0 || !is_product(node) || node->ne[1] < points[0]) return NULL;
    int at = 0;
    while (at + 1 < N_POINTS && points[at] < node->ne[1]) at++;
    return w->faster[at] ? copy_of(w, node->src[0]) : NULL;
}

/* ---- Making them ------------------------------------------------------------------------------------------ */

static bool fill_copies(const struct sqz_gpu_weights *w, size_t first, const struct sqz_gpu_calls *calls, void *stream)
{
    for (size_t i = first; i < w->n; i++) {
        const struct matrix *m = &w->matrices[i];
        if (calls->widen(m->quantised->type, m->quantised->data, (size_t)ggml_nelements(m->copy), m->copy->data,
                         stream) != SQZ_OK)
            return false;
    }
    return calls->wait(stream);
}

/* Room in w->matrices for all of the graph's; those without a copy are appended with none. */
static bool list_matrices(struct sqz_gpu_weights *w, struct ggml_cgraph *graph)
{
    const size_t most = w->n + (size_t)ggml_graph_n_nodes(graph);
    size_t n = w->n;
    struct matrix *matrices = realloc(w->matrices, most * sizeof *matrices);
    if (!matrices) return false;
    w->matrices = matrices;
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        struct ggml_tensor *node = ggml_graph_node(graph, i);
        if (!is_product(node)) continue;
        size_t at = 0;
        while (at < n && matrices[at].quantised != node->src[0]) at++;
        if (at == n) matrices[n++] = (struct matrix){.quantised = node->src[0]};
    }
    w->n = n;
    return true;
}

/* Memory for the copies of matrices from `first` on; NULL: not so much. */
static struct set *allocate(struct sqz_gpu_weights *w, size_t first, ggml_backend_dev_t device)
{
    size_t free_bytes = 0, total = 0;
    struct set *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->tensors = ggml_init((struct ggml_init_params){(w->n - first) * ggml_tensor_overhead(), NULL, true});
    for (size_t i = first; s->tensors && i < w->n; i++)
        w->matrices[i].copy = ggml_new_tensor_2d(s->tensors, GGML_TYPE_BF16, w->matrices[i].quantised->ne[0],
                                                 w->matrices[i].quantised->ne[1]);
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device);
    ggml_backend_dev_memory(device, &free_bytes, &total);
    if (s->tensors && ggml_backend_alloc_ctx_tensors_from_buft_size(s->tensors, type) <= free_bytes / 2)
        s->memory = ggml_backend_alloc_ctx_tensors_from_buft(s->tensors, type);
    if (s->memory) {
        ggml_backend_buffer_set_usage(s->memory, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        return s;
    }
    if (s->tensors) ggml_free(s->tensors);
    free(s);
    return NULL;
}

/* ---- Which is faster ----------------------------------------------------------------------------------------- */

/* Seconds of the products of n tokens with the first matrices, or with their copies; 0: there was no memory. */
static double time_products(const struct sqz_gpu_weights *w, ggml_backend_t backend, int64_t n, bool copies)
{
    const size_t n_tried = w->n < TRIED_MATRICES ? w->n : TRIED_MATRICES;
    const size_t bytes = 2 * TRIED_MATRICES * ggml_tensor_overhead() + ggml_graph_overhead();
    struct ggml_context *tensors = ggml_init((struct ggml_init_params){bytes, NULL, true});
    double best = 0;
    if (!tensors) return 0;
    struct ggml_cgraph *graph = ggml_new_graph(tensors);
    for (size_t i = 0; i < n_tried; i++) {
        struct ggml_tensor *matrix = copies ? w->matrices[i].copy : w->matrices[i].quantised;
        struct ggml_tensor *x = ggml_new_tensor_2d(tensors, GGML_TYPE_F32, matrix->ne[0], n);
        ggml_build_forward_expand(graph, ggml_mul_mat(tensors, matrix, x));
    }
    ggml_backend_buffer_t memory = ggml_backend_alloc_ctx_tensors(tensors, backend);
    if (memory) ggml_backend_buffer_clear(memory, 0);
    for (int i = 0; memory && i <= TRIALS; i++) {
        const int64_t from = ggml_time_us();
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) break;
        const double seconds = 1e-6 * (double)(ggml_time_us() - from + 1);
        if (i > 0 && (best == 0 || seconds < best)) best = seconds;
    }
    if (memory) ggml_backend_buffer_free(memory);
    ggml_free(tensors);
    return best;
}

/* SQUEEZE_GPU_COPIES_FROM: tokens, in place of a measurement. */
static void measure(struct sqz_gpu_weights *w, ggml_backend_t backend)
{
    const char *said = getenv("SQUEEZE_GPU_COPIES_FROM");
    const long from = said ? strtol(said, NULL, 10) : 0;
    w->measured = true;
    for (int i = 0; i < N_POINTS; i++) {
        w->faster[i] = from > 0 && points[i] >= from;
        if (from > 0) continue;
        const double as_is = time_products(w, backend, points[i], false),
                     copied = time_products(w, backend, points[i], true);
        w->faster[i] = copied > 0 && copied < as_is;
    }
}

bool sqz_gpu_weights_make(struct sqz_gpu_weights *w, ggml_backend_t backend, struct ggml_cgraph *graph,
                          const struct sqz_gpu_calls *calls, void *stream)
{
    const size_t first = w->n;
    if (w->refused || !list_matrices(w, graph) || w->n == first) return false;
    struct set *s = allocate(w, first, ggml_backend_get_device(backend));
    if (!s || !fill_copies(w, first, calls, stream)) {
        if (s) ggml_backend_buffer_free(s->memory), ggml_free(s->tensors);
        free(s);
        w->refused = true;
        w->n = first;
        return false;
    }
    s->next = w->sets;
    w->sets = s;
    w->bytes += ggml_backend_buffer_get_size(s->memory);
    if (!w->measured) measure(w, backend);
    return true;
}
