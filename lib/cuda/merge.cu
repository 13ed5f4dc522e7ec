/*
 * Small steps around the others: the merge of normalised partial results by their
 * log-sum-exp (one warp a row, 8 rows a thread block; bound by memory), the sum of
 * two log-sum-exps, and what the host asks about the device.
 */
#include "device.cuh"

namespace
{

enum { THREADS = 256, ROWS = THREADS / SQZ_WARP };

template <class Type> __global__ void __launch_bounds__(THREADS) merge_kernel(const sqz_cuda_merge_args a)
{
    const uint64_t row = (uint64_t)blockIdx.x * ROWS + threadIdx.x / SQZ_WARP;
    const int lane = threadIdx.x % SQZ_WARP;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (row >= a.n_rows) return;
    sqz_softmax_state all = sqz_softmax_empty();
    for (uint32_t p = 0; p < a.n_parts; p++) {
        const float lse = a.parts_lse[(size_t)p * a.n_rows + row];
        if (lse > -INFINITY) all = sqz_softmax_merged(all, {lse * SQZ_LOG2E, 1.0f});
    }
    const float inverse = all.sum > 0 ? 1.0f / all.sum : 0.0f;
    for (uint32_t d = 2 * lane; d < a.head_dim; d += 2 * SQZ_WARP) {
        float2 out = make_float2(0, 0);
        for (uint32_t p = 0; p < a.n_parts; p++) {
            const float lse = a.parts_lse[(size_t)p * a.n_rows + row];
            if (!(lse > -INFINITY)) continue;
            const float weight = exp2f(lse * SQZ_LOG2E - all.maximum) * inverse;
            const float2 x = *(const float2 *)(a.parts + ((size_t)p * a.n_rows + row) * a.head_dim + d);
            out.x += weight * x.x;
            out.y += weight * x.y;
        }
        ((uint32_t *)a.out)[(row * a.head_dim + d) / 2] = Type::pack(out.x, out.y);
    }
    if (a.lse && lane == 0) a.lse[row] = sqz_softmax_log2(all) * SQZ_LN2;
}

struct log_add_args {
    const float *a, *b; /* b may be NULL */
    float *out;
    uint32_t n;
};

__global__ void __launch_bounds__(THREADS) log_add_kernel(const log_add_args a)
{
    const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (i >= a.n) return;
    const float x = a.a ? a.a[i] : -INFINITY, y = a.b ? a.b[i] : -INFINITY, high = fmaxf(x, y), low = fminf(x, y);
    a.out[i] = low == -INFINITY ? high : high + log1pf(expf(low - high));
}

} // namespace

extern "C" int sqz_cuda_multiprocessors(void)
{
    const struct sqz_device device = sqz_device_get();
    return device.capability >= 80 ? device.n_multiprocessors : 0;
}

extern "C" bool sqz_cuda_device_supported(void)
{
    return sqz_cuda_multiprocessors() > 0;
}

extern "C" enum sqz_status sqz_cuda_clear_launch(void *memory, size_t n_bytes, void *stream)
{
    if (cudaMemsetAsync(memory, 0, n_bytes, (cudaStream_t)stream) == cudaSuccess) return SQZ_OK;
    cudaGetLastError();
    return SQZ_ERROR_INTERNAL;
}

extern "C" enum sqz_status sqz_cuda_merge(const struct sqz_cuda_merge_args *a, void *stream)
{
    return sqz_cuda_merge_launch(a, false, stream);
}

extern "C" enum sqz_status sqz_cuda_merge_launch(const struct sqz_cuda_merge_args *a, bool after_ours, void *stream)
{
    if (!a || !a->parts || !a->parts_lse || !a->out || a->head_dim % 2 || a->head_dim == 0 ||
        (a->type != SQZ_ROW_F16 && a->type != SQZ_ROW_BF16))
        return SQZ_ERROR_ARGUMENT;
    if (a->n_rows == 0) return SQZ_OK;
    if (sqz_device_get().capability < 80) return SQZ_ERROR_UNSUPPORTED;
    return sqz_launch(a->type == SQZ_ROW_F16 ? merge_kernel<sqz_f16> : merge_kernel<sqz_bf16>,
                      dim3((a->n_rows + ROWS - 1) / ROWS), THREADS, 0, 1, after_ours, *a, stream);
}

extern "C" enum sqz_status sqz_cuda_log_add_launch(const float *a, const float *b, float *out, uint32_t n,
                                                   bool after_ours, void *stream)
{
    const log_add_args args = {a, b, out, n};
    return sqz_launch(log_add_kernel, dim3((n + THREADS - 1) / THREADS), THREADS, 0, 1, after_ours, args, stream);
}
