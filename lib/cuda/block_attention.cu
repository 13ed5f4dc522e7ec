/*
 * Attention of a block of tokens: the call, its splits and their merge, and the
 * kernel for sm_80 and newer (mma.sync, cp.async). Where the device is a Hopper
 * and the shape allows, block_attention_hopper.cu has the products.
 *
 * Math: as there, online softmax over tiles of BN keys.
 * Grid: x the block of 128 query rows (8 warps of 16), y the KV head, z the split
 * of its list; causal blocks stop at the last row that one of their tokens sees,
 * windowed ones begin at the first.
 * Shared memory: (128 + 4 BN) rows of D numbers padded to a power of two: queries
 * and two tiles of keys and of values; 96 KiB at D 128 (BN 64), 128 KiB at 256
 * (BN 32; devices of sm_86 and sm_89 have 99 KiB and refuse it).
 * Head sizes: 64, 96, 128, 256.
 *
 * TAIL: the columns are pruned clusters of a list, keys and values their centroids
 * (tail_block.cu); they differ from rows in how they are found and in their logits.
 *
 * Splits: few query rows leave multiprocessors idle, so a head's list is cut until
 * the grid's last wave is nine tenths full, and the parts merge by their sums. (The
 * Hopper kernel cuts the tiles of all heads evenly.)
 */
#include "block_attention.cuh"
#include "tiles.cuh"

namespace
{

template <int D> struct shape {
    static const int bn = D == 256 ? 32 : 64;
    static const int tile_bytes = bn * sqz_tile<D>::stride;
    static const int number_bytes = bn * 3 * (int)sizeof(float);
    static constexpr size_t shared_bytes(bool tail)
    {
        return (size_t)SQZ_BLOCK_QUERY_ROWS * sqz_tile<D>::stride + 4 * tile_bytes + (tail ? 2 * number_bytes : 0);
    }
};

/* Products of a tile become logits relative to log Z. */
template <int BN>
__device__ __forceinline__ void tail_logits(float (&s)[BN / 2], uint32_t numbers, const float (&x)[2],
                                            const float (&norm)[2])
{
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        const uint32_t at = numbers + (8 * j + 2 * (threadIdx.x % 4)) * (uint32_t)sizeof(float);
        const float2 count = sqz_load_shared8(at), part = sqz_load_shared8(at + BN * 4),
                     factor = sqz_load_shared8(at + BN * 8);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float &a = s[4 * j + 2 * r], &b = s[4 * j + 2 * r + 1];
            a = fminf(fmaf(a, factor.x, fmaf(norm[r], part.x, x[r])), 0.0f) + count.x;
            b = fminf(fmaf(b, factor.y, fmaf(norm[r], part.y, x[r])), 0.0f) + count.y;
        }
    }
}

/* Logits of columns before a row's first one, of row r of two; counted from the tile's first column. */
template <int BN> __device__ __forceinline__ void hide_before(float (&s)[BN / 2], int r, int64_t first)
{
#pragma unroll
    for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (8 * j + 2 * (threadIdx.x % 4) + i < first) s[4 * j + 2 * r + i] = -INFINITY;
}

template <class Type, int D, bool TAIL>
__global__ void __launch_bounds__(256, 1) attend_block(const sqz_block_attention_params p)
{
    typedef sqz_tile<D> Tile;
    constexpr int BN = shape<D>::bn;
    extern __shared__ __align__(128) char shared[];
    const uint32_t queries = (uint32_t)__cvta_generic_to_shared(shared),
                   keys = queries + SQZ_BLOCK_QUERY_ROWS * Tile::stride, values = keys + 2 * shape<D>::tile_bytes,
                   numbers = values + 2 * shape<D>::tile_bytes;
    const uint32_t head = blockIdx.y, split = blockIdx.z, row0 = blockIdx.x * SQZ_BLOCK_QUERY_ROWS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t n_groups = 0, n_columns;
    sqz_let_next_start();
    sqz_wait_for_previous();
    sqz_block_clear_arrived<256>(p);
    if (TAIL) n_columns = p.n_list[head];
    else sqz_block_count(p, head, &n_groups, &n_columns);
    const uint32_t hidden = p.causal ? p.n_rows - p.n_tokens + 1 : 0; /* token t sees hidden + t rows */
    if (p.causal) {
        const uint32_t last_token = min(row0 + SQZ_BLOCK_QUERY_ROWS - 1, p.n_query_rows - 1) / p.group;
        n_columns = min(n_columns, hidden + last_token);
    }
    uint32_t begin = 0; /* tiles that nobody sees */
    if (p.windowed) begin = (uint32_t)min(max((int64_t)p.first_row + row0 / p.group, (int64_t)0), (int64_t)n_columns) / BN;
    const uint32_t n_tiles = (n_columns + BN - 1) / BN - begin;
    const uint32_t first = begin + (uint32_t)((uint64_t)n_tiles * split / p.n_splits),
                   last = begin + (uint32_t)((uint64_t)n_tiles * (split + 1) / p.n_splits);
    const uint32_t *const list = TAIL       ? p.list + (size_t)head * p.list_capacity
                                 : p.groups ? p.groups + (size_t)head * p.group_capacity
                                            : NULL;

    auto load = [&](uint32_t to, const void *from, uint32_t tile) {
        for (int i = threadIdx.x; i < BN * Tile::chunks; i += 256) {
            const int r = i / Tile::chunks, c = i % Tile::chunks;
            uint32_t row = p.n_rows;
            if (TAIL) {
                if (tile * BN + r < n_columns) row = list[tile * BN + r];
            } else {
                const uint32_t g = tile * (BN / 8) + r / 8;
                if (g < n_groups) row = (list ? list[g] : g) * 8 + r % 8;
            }
            const bool exists = row < p.n_rows;
            const size_t at = exists ? ((size_t)head * p.head_rows + row) * D + c * 8 : 0;
            sqz_copy16(Tile::at(to, r, c), (const char *)from + at * 2, exists);
        }
    };
    auto load_tile = [&](uint32_t stage, uint32_t tile) {
        load(keys + stage * shape<D>::tile_bytes, p.keys, tile);
        load(values + stage * shape<D>::tile_bytes, p.values, tile);
        const uint32_t part = threadIdx.x % (BN / 4), which = threadIdx.x / (BN / 4);
        if (TAIL && which < 3)
            sqz_copy16(numbers + stage * shape<D>::number_bytes + threadIdx.x * 16,
                       p.numbers + ((size_t)head * 3 + which) * p.list_capacity + tile * BN + 4 * part, true);
    };
    for (int i = threadIdx.x; i < SQZ_BLOCK_QUERY_ROWS * Tile::chunks; i += 256) {
        const int r = i / Tile::chunks, c = i % Tile::chunks;
        const bool exists = row0 + r < p.n_query_rows;
        const size_t at = exists ? sqz_block_row(p, head, row0 + r) * D + c * 8 : 0;
        sqz_copy16(Tile::at(queries, r, c), (const char *)p.queries + at * 2, exists);
    }
    float s[BN / 2], o[D / 2], factor[2];
    sqz_block_rows rows;
    rows.reset();
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0.0f;
    float query_x[2], norm[2];
#pragma unroll
    for (int r = 0; TAIL && r < 2; r++) {
        const uint32_t row = row0 + warp * 16 + lane / 4 + 8 * r; /* query_stride is whole blocks of rows */
        query_x[r] = p.query_x[(size_t)head * p.query_stride + row];
        norm[r] = p.query_norm[(size_t)head * p.query_stride + row];
    }
    const float scale_log2 = TAIL ? 1.0f : p.scale_log2;
    if (first < last) load_tile(0, first);
    sqz_copy16_commit();
    for (uint32_t tile = first; tile < last; tile++) {
        const uint32_t stage = (tile - first) & 1;
        sqz_copy16_wait<0>();
        __syncthreads(); /* this tile has come, and all warps have left the one before */
        if (tile + 1 < last) load_tile(stage ^ 1, tile + 1);
        sqz_copy16_commit();
        sqz_tile_products<Type, D, BN>(s, queries, warp * 16, keys + stage * shape<D>::tile_bytes);
        if (TAIL) tail_logits<BN>(s, numbers + stage * shape<D>::number_bytes, query_x, norm);
        int limit[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t token = (row0 + warp * 16 + lane / 4 + 8 * r) / p.group;
            const uint32_t end = p.causal ? min(n_columns, hidden + token) : n_columns;
            limit[r] = (int)min((int64_t)BN, (int64_t)end - (int64_t)tile * BN);
            if (p.windowed) hide_before<BN>(s, r, (int64_t)p.first_row + token - (int64_t)tile * BN);
        }
        if (rows.soften<BN>(s, factor, scale_log2, limit[0], limit[1])) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i] *= factor[i / 2 % 2];
        }
        const uint32_t v = values + stage * shape<D>::tile_bytes;
#pragma unroll
        for (int k = 0; k < BN / 16; k++) {
            const uint32_t a0 = Type::pack(s[8 * k], s[8 * k + 1]), a1 = Type::pack(s[8 * k + 2], s[8 * k + 3]),
                           a2 = Type::pack(s[8 * k + 4], s[8 * k + 5]), a3 = Type::pack(s[8 * k + 6], s[8 * k + 7]);
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                uint32_t b[4];
                sqz_fragments_transposed(b, Tile::at(v, 16 * k + lane / 8 % 2 * 8 + lane % 8, 2 * j + lane / 16));
                sqz_mma<Type>(*(float(*)[4])(o + 8 * j), a0, a1, a2, a3, b[0], b[1]);
                sqz_mma<Type>(*(float(*)[4])(o + 8 * j + 4), a0, a1, a2, a3, b[2], b[3]);
            }
        }
    }
    sqz_copy16_wait<0>();
    const size_t split_rows = (size_t)split * p.n_tokens * p.n_head;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float l = rows.sum[r];
        l += __shfl_xor_sync(~0u, l, 1);
        l += __shfl_xor_sync(~0u, l, 2);
        const uint32_t row = row0 + warp * 16 + lane / 4 + 8 * r;
        if (row >= p.n_query_rows) continue;
        const size_t at = sqz_block_row(p, head, row);
        const float inverse = l > 0 ? 1.0f / l : 0.0f;
        const float lse = l > 0 ? rows.maximum[r] * scale_log2 + log2f(l) : -INFINITY;
        if (p.out) {
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                const uint32_t column = 8 * j + 2 * (lane % 4);
                const float a = o[4 * j + 2 * r] * inverse, b = o[4 * j + 2 * r + 1] * inverse;
                if (p.n_splits > 1) *(float2 *)(p.part_out + (split_rows + at) * D + column) = make_float2(a, b);
                else sqz_block_store<Type>(p, at, D, column, a, b);
            }
        }
        if (lane % 4) continue;
        if (p.n_splits > 1) p.part_lse[split_rows + at] = lse;
        else sqz_block_store_lse(p, at, lse);
    }
}

struct merge_args {
    sqz_block_attention_params p;
    uint32_t head_dim;
};

/* A warp a row of [T][H]. */
template <class Type> __global__ void __launch_bounds__(256) merge_splits(const merge_args args)
{
    const sqz_block_attention_params &p = args.p;
    const size_t n = (size_t)p.n_tokens * p.n_head, row = (size_t)blockIdx.x * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (row >= n) return;
    float maximum = -INFINITY, sum = 0.0f;
    for (uint32_t i = 0; i < p.n_splits; i++) maximum = fmaxf(maximum, p.part_lse[i * n + row]);
    for (uint32_t i = 0; i < p.n_splits; i++)
        if (maximum > -INFINITY) sum += sqz_exp2(p.part_lse[i * n + row] - maximum);
    if (lane == 0) sqz_block_store_lse(p, row, sum > 0 ? maximum + log2f(sum) : -INFINITY);
    for (uint32_t c = 2 * lane; p.out && c < args.head_dim; c += 64) {
        float a = 0.0f, b = 0.0f;
        for (uint32_t i = 0; i < p.n_splits && sum > 0; i++) {
            const float w = sqz_exp2(p.part_lse[i * n + row] - maximum) / sum;
            const float2 x = *(const float2 *)(p.part_out + (i * n + row) * args.head_dim + c);
            a += w * x.x;
            b += w * x.y;
        }
        sqz_block_store<Type>(p, row, args.head_dim, c, a, b);
    }
}

template <class Type, int D> enum sqz_status launch(const sqz_block_attention_params &p, bool after_ours, void *stream)
{
    const dim3 grid((p.n_query_rows + SQZ_BLOCK_QUERY_ROWS - 1) / SQZ_BLOCK_QUERY_ROWS, p.n_head / p.group, p.n_splits);
    return sqz_launch(p.list ? attend_block<Type, D, true> : attend_block<Type, D, false>, grid, 256,
                      shape<D>::shared_bytes(p.list != NULL), 1, after_ours, p, stream);
}

template <class Type>
enum sqz_status launch_type(const sqz_block_attention_params &p, uint32_t d, bool after_ours, void *stream)
{
    switch (d) {
    case 64: return launch<Type, 64>(p, after_ours, stream);
    case 96: return launch<Type, 96>(p, after_ours, stream);
    case 128: return launch<Type, 128>(p, after_ours, stream);
    case 256: return launch<Type, 256>(p, after_ours, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}

/* Only on the call's shape and the device, so that workspace and launch agree. */
uint32_t splits_of(uint64_t n_tokens, uint64_t n_head, uint64_t n_head_kv, uint64_t n_rows)
{
    const int n = sqz_device_get().n_multiprocessors;
    const uint64_t sm = n > 0 ? (uint64_t)n : 132;
    const uint64_t rows = n_tokens * (n_head / n_head_kv);
    const uint64_t blocks = (rows + SQZ_BLOCK_QUERY_ROWS - 1) / SQZ_BLOCK_QUERY_ROWS * n_head_kv;
    const uint64_t most = (n_rows + 127) / 128 / 4;
    return sqz_cuda_splits_for(blocks, sm, most < SQZ_BLOCK_MAX_SPLITS ? most : SQZ_BLOCK_MAX_SPLITS);
}

size_t aligned(size_t bytes)
{
    return (bytes + 255) & ~(size_t)255;
}

} // namespace

extern "C" bool sqz_cuda_block_attention_supported(const struct sqz_cuda_block_attention *a)
{
    const uint32_t d = a->head_dim;
    return (a->type == SQZ_ROW_F16 || a->type == SQZ_ROW_BF16) && (d == 64 || d == 96 || d == 128 || d == 256) &&
           a->n_head_kv && a->n_head_kv <= SQZ_BLOCK_MAX_HEADS && a->n_head && a->n_head % a->n_head_kv == 0 &&
           a->n_tokens && (!a->causal || a->n_rows >= a->n_tokens);
}

size_t sqz_block_attention_portable_bytes(const struct sqz_cuda_block_attention *a)
{
    const uint32_t s = splits_of(a->n_tokens, a->n_head, a->n_head_kv, a->n_rows);
    if (s == 1) return 0;
    const size_t rows = (size_t)a->n_tokens * a->n_head;
    return aligned(s * rows * a->head_dim * sizeof(float)) + aligned(s * rows * sizeof(float));
}

enum sqz_status sqz_block_attention_portable(const sqz_block_attention_params &params, enum sqz_row_type type,
                                             uint32_t head_dim, void *workspace, size_t workspace_bytes,
                                             bool after_ours, void *stream)
{
    sqz_block_attention_params p = params;
    const size_t rows = (size_t)p.n_tokens * p.n_head;
    p.n_splits = splits_of(p.n_tokens, p.n_head, p.n_head / p.group, p.n_rows);
    if (p.n_splits > 1) {
        const size_t out_bytes = aligned(p.n_splits * rows * head_dim * sizeof(float));
        if (workspace_bytes < out_bytes + aligned(p.n_splits * rows * sizeof(float))) return SQZ_ERROR_ARGUMENT;
        p.part_out = (float *)workspace;
        p.part_lse = (float *)((char *)workspace + out_bytes);
    }
    const bool f16 = type == SQZ_ROW_F16;
    const enum sqz_status status = f16 ? launch_type<sqz_f16>(p, head_dim, after_ours, stream)
                                       : launch_type<sqz_bf16>(p, head_dim, after_ours, stream);
    if (status != SQZ_OK || p.n_splits == 1) return status;
    const merge_args args = {p, head_dim};
    const dim3 grid((unsigned)((rows + 7) / 8));
    return f16 ? sqz_launch(merge_splits<sqz_f16>, grid, 256, 0, 1, true, args, stream)
               : sqz_launch(merge_splits<sqz_bf16>, grid, 256, 0, 1, true, args, stream);
}

/* Which kernel runs is known at the launch, so there is room for either. */
extern "C" size_t sqz_cuda_block_attention_workspace_bytes(const struct sqz_cuda_block_attention *a)
{
    const size_t portable = sqz_block_attention_portable_bytes(a), hopper = sqz_block_attention_hopper_bytes(a);
    return portable > hopper ? portable : hopper;
}

extern "C" enum sqz_status sqz_cuda_block_attention_launch(const struct sqz_cuda_block_attention *a, bool after_ours,
                                                           void *stream)
{
    sqz_block_attention_params p;
    memset(&p, 0, sizeof p);
    p.queries = a->queries;
    p.keys = a->keys;
    p.values = a->values;
    p.groups = a->groups;
    p.n_groups = a->n_groups;
    p.head_rows = a->head_rows;
    p.n_head = a->n_head;
    p.group = a->n_head / a->n_head_kv;
    p.n_query_rows = a->n_tokens * p.group;
    p.n_rows = a->n_rows;
    p.group_capacity = a->group_capacity;
    p.n_tokens = a->n_tokens;
    p.scale_log2 = a->scale * SQZ_LOG2E;
    p.causal = a->causal;
    p.windowed = a->windowed;
    p.first_row = a->first_row;
    p.out_f32 = a->out_f32;
    p.out = a->out;
    p.lse = a->lse;
    p.parts = a->parts;
    p.tail = a->tail;
    p.arrived = a->arrived;
    p.n_arrived = a->n_arrived;
    enum sqz_status status = SQZ_ERROR_UNSUPPORTED;
    if (a->n_rows && !a->windowed && sqz_block_attention_hopper_has(a->head_dim, a->causal))
        status =
            sqz_block_attention_hopper(p, a->type, a->head_dim, a->workspace, a->workspace_bytes, after_ours, stream);
    if (status == SQZ_ERROR_UNSUPPORTED && !a->tail.centroids)
        status =
            sqz_block_attention_portable(p, a->type, a->head_dim, a->workspace, a->workspace_bytes, after_ours, stream);
    return status;
}
