/* What a question attends to, for SnapKV; snapkv_scores.h. */
#include "snapkv_scores.h"

#include "kernels.h"
#include "user_rows.h"

void snapkv_add(float *weight, float *logits, const struct sqz_attend_call *call, size_t head, size_t token)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_layer *layer = call->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv, n = layer->n_rows;
    const size_t n_user = call->n_user - call->n_tokens + token + 1;
    const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, n, d, head);
    struct sqz_user_whole whole;
    const struct sqz_user_rows *own = sqz_user_rows_of_call(call, &whole);
    for (size_t g = 0; g < group; g++) {
        const struct sqz_row_queries query = {.f32 = call->queries + token * call->query_token_stride +
                                                     (head * group + g) * call->query_head_stride,
                                              .n = 1,
                                              .scale = layer->shape.scale};
        sqz_rows_logits(logits, n + n_user, &query, &keys, 0, n, d, NULL);
        for (size_t at = 0, end; at < n_user; at = end) { /* F16, as the context's are */
            const struct sqz_user_part part = sqz_user_part(own, head, at, n_user, 0, false);
            end = part.end;
            sqz_rows_logits(logits + n + at, n + n_user, &query, &part.keys, part.at, end - at, d, NULL);
        }
        const float sum = k->exp_sum(logits, n + n_user, k->max(logits, n + n_user));
        k->add_scaled(weight, weight, 1.0f / sum, logits, n);
    }
}

void snapkv_pool(float *pooled, const float *weight, size_t n)
{
    const size_t reach = SNAPKV_POOL / 2;
    for (size_t i = 0; i < n; i++) {
        const size_t first = i < reach ? 0 : i - reach, end = i + reach + 1 < n ? i + reach + 1 : n;
        pooled[i] = sqz_kernels_get()->max(weight + first, end - first);
    }
}
