/*
 * ggml's own attention operator, see baseline_attention.h.
 *
 * The tensors lie over the caller's arrays: no row is copied. A head's rows lie side by side, which is the kindest
 * layout for ggml: in llama.cpp's own cache the rows of all heads of a token do, and those of one head are apart.
 */
#include "baseline_attention.h"

#include <stdlib.h>
#include <string.h>

#include <ggml-backend.h>
#include <ggml.h>

#include "error.h"

enum { MASKED = 0xfc00 }; /* -infinity as F16 */

struct sqz_baseline_attention {
    ggml_backend_t backend;
    struct ggml_context *tensors;
    struct ggml_cgraph *graph;
    ggml_backend_buffer_t buffers[5];
    size_t n_buffers;
    void *mask_block; /* malloc'ed */
};

static size_t context_bytes(void)
{
    enum { TENSORS = 8 };
    return TENSORS * ggml_tensor_overhead() + ggml_graph_overhead();
}

static size_t mask_bytes(size_t n_rows, size_t n_tokens)
{
    return n_tokens > 1 ? n_tokens * n_rows * sizeof(uint16_t) : 0;
}

size_t sqz_baseline_attention_bytes(size_t n_rows, size_t n_tokens)
{
    return mask_bytes(n_rows, n_tokens) + context_bytes();
}

void sqz_baseline_attention_free(struct sqz_baseline_attention *a)
{
    if (!a) return;
    for (size_t i = 0; i < a->n_buffers; i++) ggml_backend_buffer_free(a->buffers[i]);
    ggml_free(a->tensors);
    ggml_backend_free(a->backend);
    free(a->mask_block);
    free(a);
}

/* Gives a tensor the caller's memory. */
static bool place(struct sqz_baseline_attention *a, struct ggml_tensor *tensor, const void *data)
{
    void *writable = (void *)(uintptr_t)data;
    ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_from_ptr(writable, ggml_nbytes(tensor));
    if (!buffer) return false;
    a->buffers[a->n_buffers++] = buffer;
    return ggml_backend_tensor_alloc(buffer, tensor, writable) == GGML_STATUS_SUCCESS;
}

/* [D, rows, K], heads head_rows rows apart. */
static struct ggml_tensor *rows_tensor(struct sqz_baseline_attention *a, const struct sqz_baseline_attention_args *args)
{
    const int64_t d = args->shape.head_dim;
    struct ggml_tensor *t =
        ggml_new_tensor_3d(a->tensors, GGML_TYPE_F16, d, (int64_t)args->n_rows, args->shape.n_head_kv);
    t->nb[2] = args->head_rows * t->nb[1];
    t->nb[3] = t->nb[2] * args->shape.n_head_kv;
    return t;
}

/* [rows, T]: 0 where a token sees a row, -infinity elsewhere. */
static struct ggml_tensor *make_mask(struct sqz_baseline_attention *a, const struct sqz_baseline_attention_args *args)
{
    const size_t bytes = mask_bytes(args->n_rows, args->n_tokens);
    a->mask_block = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!a->mask_block) return NULL;
    uint16_t *mask = a->mask_block;
    memset(mask, 0, bytes);
    for (size_t t = 0; t < args->n_tokens; t++)
        for (size_t r = args->n_rows - args->n_tokens + t + 1; r < args->n_rows; r++)
            mask[t * args->n_rows + r] = MASKED;
    struct ggml_tensor *tensor =
        ggml_new_tensor_2d(a->tensors, GGML_TYPE_F16, (int64_t)args->n_rows, (int64_t)args->n_tokens);
    return place(a, tensor, mask) ? tensor : NULL;
}

/* The CPU back end names its own settings; they are looked up, so that a back end loaded at run time works too. */
static void configure(ggml_backend_t backend, const struct sqz_baseline_attention_args *args)
{
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    ggml_backend_set_n_threads_t set_threads =
        (ggml_backend_set_n_threads_t)ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads");
    ggml_backend_set_abort_callback_t set_abort = (ggml_backend_set_abort_callback_t)ggml_backend_reg_get_proc_address(
        registry, "ggml_backend_set_abort_callback");
    if (set_threads) set_threads(backend, args->n_threads);
    if (set_abort && args->cancelled) set_abort(backend, args->cancelled, args->user_data);
}

enum sqz_status sqz_baseline_attention_create(struct sqz_baseline_attention **out,
                                              const struct sqz_baseline_attention_args *args, struct sqz_error *error)
{
    const int64_t d = args->shape.head_dim, n_head = args->shape.n_head, n_tokens = (int64_t)args->n_tokens;
    struct sqz_baseline_attention *a = calloc(1, sizeof *a);
    *out = NULL;
    if (!a) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for ggml's attention");
    a->backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL);
    if (!a->backend) {
        sqz_baseline_attention_free(a);
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "this ggml has no CPU back end");
    }
    configure(a->backend, args);
    a->tensors = ggml_init((struct ggml_init_params){context_bytes(), NULL, true});
    if (!a->tensors) goto no_memory;
    struct ggml_tensor *mask = NULL;
    if (args->n_tokens > 1 && !(mask = make_mask(a, args))) goto no_memory;
    struct ggml_tensor *k = rows_tensor(a, args), *v = rows_tensor(a, args);
    struct ggml_tensor *q = ggml_new_tensor_3d(a->tensors, GGML_TYPE_F32, d, n_tokens, n_head);
    q->nb[1] = (size_t)(d * n_head) * sizeof(float); /* [T][H][D] seen as [D, T, H] */
    q->nb[2] = (size_t)d * sizeof(float);
    struct ggml_tensor *node = ggml_flash_attn_ext(a->tensors, q, k, v, mask, args->shape.scale, 0.0f, 0.0f);
    if (!place(a, k, args->keys) || !place(a, v, args->values) || !place(a, q, args->queries) ||
        !place(a, node, args->out))
        goto no_memory;
    a->graph = ggml_new_graph(a->tensors);
    ggml_build_forward_expand(a->graph, node);
    *out = a;
    return SQZ_OK;
no_memory:
    sqz_baseline_attention_free(a);
    return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for ggml's attention: %zu bytes",
                         sqz_baseline_attention_bytes(args->n_rows, args->n_tokens));
}

enum sqz_status sqz_baseline_attention_run(struct sqz_baseline_attention *a, struct sqz_error *error)
{
    const enum ggml_status status = ggml_backend_graph_compute(a->backend, a->graph);
    if (status == GGML_STATUS_SUCCESS) return SQZ_OK;
    if (status == GGML_STATUS_ABORTED) return sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "ggml's attention failed: %s", ggml_status_to_string(status));
}
