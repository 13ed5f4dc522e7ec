/*
 * Lookup of one token: logits of all clusters of a level (or of those in a
 * list), with the exact mass of fixed and user rows for the denominator.
 *
 * A warp takes tiles of 16 centroids. Its lanes' 16-byte loads are the operands of
 * the tensor core as they come (sqz_mma_chunk), 8 query rows at a time: those of a
 * KV head's group in all sequences when every cluster is read, so a batch reads
 * centroids once for 8 of them. Bound by memory: the next tile's loads are on their way while one is computed with.
 *
 * Thread blocks, one after the other:
 *   clusters   (split, head, pass of 8 query rows), or (split, sequence, head, pass) with lists
 *   user rows  (sequence, head, block of SQZ_ROWS_USER_ROWS rows, pass)
 * The first split of a head adds up the fixed rows too.
 */
#include "row_tiles.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / SQZ_WARP, COLUMNS = 8, TILE = 16 };

/* What a lane knows about query row `column` of the pass. */
struct column_place {
    bool exists;
    uint32_t sequence, member; /* of B, of G */
};

/* Merges the states of a block's warps, columns 2t and 2t + 1 a lane, into `to` in a fixed order. */
__device__ void store_states(sqz_softmax_state (&state)[2], sqz_softmax_state *shared, sqz_cuda_part *to, bool exists)
{
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int step = 4; step < SQZ_WARP; step *= 2) {
            sqz_softmax_state other;
            other.maximum = __shfl_xor_sync(~0u, state[i].maximum, step);
            other.sum = __shfl_xor_sync(~0u, state[i].sum, step);
            state[i] = sqz_softmax_merged(state[i], other);
        }
        if (lane < 4) shared[warp * COLUMNS + 2 * lane + i] = state[i];
    }
    __syncthreads();
    if (threadIdx.x < COLUMNS && exists) {
        sqz_softmax_state all = shared[threadIdx.x];
        for (int w = 1; w < WARPS; w++) all = sqz_softmax_merged(all, shared[w * COLUMNS + threadIdx.x]);
        *to = {all.maximum, all.sum};
    }
    __syncthreads();
}

/* Exact logits of rows [first, end), warps in turn. */
template <class Type, int D>
__device__ void add_exact(sqz_softmax_state (&state)[2], const typename Type::element *rows, uint32_t first,
                          uint32_t end, const uint4 (&query)[D / 32], float factor)
{
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    for (uint32_t at = first + threadIdx.x / SQZ_WARP * TILE; at < end; at += WARPS * TILE) {
        const uint32_t low = at + g, high = low + 8;
        sqz_half_rows<Type, D> tile;
        float c[4] = {0, 0, 0, 0};
        tile.load(rows, low, high, low < end, high < end, t);
        tile.product(c, query);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (low < end) sqz_softmax_add(&state[i], c[i] * factor, 1.0f);
            if (high < end) sqz_softmax_add(&state[i], c[2 + i] * factor, 1.0f);
        }
    }
}

/* Which clusters a block goes through: tiles of 16 in order, or pairs of groups of 8 from a list. */
struct cluster_tiles {
    const uint32_t *groups; /* NULL: all */
    const uint32_t *active;
    uint32_t n_groups, n_clusters;
    __device__ __forceinline__ uint32_t n_tiles() const
    {
        return groups ? (n_groups + 1) / 2 : (n_clusters + TILE - 1) / TILE;
    }
    /* Cluster of row `g` of the tile's half (0 or 1); n_clusters where there is none. */
    __device__ __forceinline__ uint32_t cluster(uint32_t tile, int half, int g) const
    {
        const uint32_t i = 2 * tile + half;
        if (!groups) return min(8 * i + g, n_clusters);
        if (i >= n_groups) return n_clusters;
        const uint32_t c = 8 * groups[i] + g;
        return c < n_clusters && active[c / 32] >> c % 32 & 1 ? c : n_clusters;
    }
};

/* The numbers of a cluster beside its centroid: loaded with it, so that no tile waits for them. Nothing is computed of
 * them before the tile is: that would wait for them at once. */
struct cluster_numbers {
    uint32_t first_key, end_key;
    float spread, unit;
    __device__ __forceinline__ float keys() const
    {
        return (float)(end_key - first_key);
    }
    __device__ __forceinline__ void load(const sqz_cuda_lookup_rows &a, uint32_t head, uint32_t cluster)
    {
        if (cluster >= a.level.n_clusters) return;
        const size_t at = (size_t)head * a.level.n_clusters + cluster;
        if (a.offsets.level == 0) {
            const uint32_t *offset = a.offsets.offset[0] + at + head;
            first_key = __ldg(offset), end_key = __ldg(offset + 1);
        } else {
            first_key = 0, end_key = sqz_keys_under(a.offsets, head, cluster);
        }
        spread = a.level.variance ? __ldg(a.level.variance + at) : 0.0f;
        unit = a.level.centroids.scale ? __ldg(a.level.centroids.scale + at) : 1.0f;
    }
};

template <class Type, int D, bool INT8>
__global__ void __launch_bounds__(THREADS, D == 256 ? 1 : 2) lookup_kernel(const sqz_cuda_lookup_rows a)
{
    typedef typename Type::element element;
    __shared__ sqz_softmax_state shared[WARPS * COLUMNS];
    const uint32_t group = a.n_head / a.n_head_kv, n_kv = a.n_head_kv;
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP, g = lane / 4, t = lane % 4;
    const bool listed = a.groups != NULL;
    const uint32_t sequences_apart = listed ? a.n_sequences : 1;
    const uint32_t shared_columns = listed ? group : group * a.n_sequences;
    const uint32_t passes = (shared_columns + COLUMNS - 1) / COLUMNS, user_passes = (group + COLUMNS - 1) / COLUMNS;
    const uint32_t n_cluster_blocks = a.n_splits * n_kv * sequences_apart * passes;
    sqz_let_next_start();
    sqz_wait_for_previous();
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < a.n_clear / 4; i += (size_t)gridDim.x * THREADS)
        ((uint4 *)a.clear)[i] = make_uint4(0, 0, 0, 0);

    /* Where this block stands. */
    const bool user = blockIdx.x >= n_cluster_blocks;
    uint32_t at = user ? blockIdx.x - n_cluster_blocks : blockIdx.x, pass, sequence = 0, head, part;
    if (user) {
        pass = at % user_passes, at /= user_passes;
        const uint32_t n_parts = a.n_base - 1 - a.n_known;
        part = at % n_parts, at /= n_parts;
        head = at % n_kv, sequence = at / n_kv;
    } else {
        pass = at % passes, at /= passes;
        sequence = at % sequences_apart, at /= sequences_apart;
        head = at % n_kv, part = at / n_kv;
    }
    const bool own_sequence = user || listed;
    const uint32_t n_columns = own_sequence ? group : shared_columns;
    auto place = [&](int column) {
        const uint32_t i = pass * COLUMNS + column;
        return column_place{i < n_columns, own_sequence ? sequence : i / group, own_sequence ? i : i % group};
    };
    auto pair_of = [&](const column_place &p) { return (size_t)p.sequence * n_kv + head; };

    uint4 query[D / 32];
    float norm = 0, mean = 0;
    {
        const column_place p = place(g);
        const element *q = (const element *)a.queries + ((size_t)p.sequence * a.n_head + head * group + p.member) * D;
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            const int first = 8 * (t + 4 * j);
            query[j] = p.exists ? *(const uint4 *)(q + first) : make_uint4(0, 0, 0, 0);
            const uint32_t pairs[4] = {query[j].x, query[j].y, query[j].z, query[j].w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 x = Type::unpack(pairs[i]);
                norm += x.x * x.x + x.y * x.y;
                if (INT8) {
                    const float *m = a.key_mean + (size_t)head * D + first + 2 * i;
                    mean += x.x * m[0] + x.y * m[1];
                }
            }
        }
    }
    const float factor = a.scale * SQZ_LOG2E;
    sqz_softmax_state state[2] = {sqz_softmax_empty(), sqz_softmax_empty()};
    const column_place mine = place(threadIdx.x % COLUMNS); /* of threads below COLUMNS, who store */

    if (user) {
        const sqz_cuda_user *own = a.users ? a.users + sequence : NULL;
        const uint32_t n = own           ? min(own->n_rows, a.n_user)
                           : a.user_rows ? min(a.user_rows[sequence], a.n_user)
                                         : a.n_user;
        const uint32_t first = min(part * SQZ_ROWS_USER_ROWS, n), end = min(first + SQZ_ROWS_USER_ROWS, n);
        const element *rows =
            own ? (const element *)own->keys + (size_t)head * own->capacity_rows * D
                : (const element *)a.user_keys + ((size_t)sequence * n_kv + head) * a.user_capacity_rows * D;
        add_exact<Type, D>(state, rows, first, end, query, factor);
        store_states(state, shared, a.base_parts + (pair_of(mine) * a.n_base + 1 + part) * group + mine.member,
                     mine.exists);
        return;
    }
    if (part == 0 && a.n_base) {
        const size_t n_keys = a.fixed_alone ? a.n_fixed : a.n_rows;
        add_exact<Type, D>(state, (const element *)a.keys + head * n_keys * D, 0, a.n_fixed, query, factor);
        store_states(state, shared, a.base_parts + pair_of(mine) * a.n_base * group + mine.member, mine.exists);
        state[0] = state[1] = sqz_softmax_empty();
    }

    const uint32_t n_clusters = a.level.n_clusters;
    const size_t list = (size_t)sequence * n_kv + head;
    const cluster_tiles tiles = {listed ? a.groups + list * a.group_capacity : NULL,
                                 listed ? a.active + list * a.active_words : NULL, listed ? a.n_groups[list] : 0,
                                 n_clusters};
    const float2 norms = sqz_for_columns(norm, t), means = sqz_for_columns(mean, t);
    const float gain = a.variance_gain && a.level.variance ? a.variance_gain[head] : 0.0f;
    const float column_gain[2] = {sqz_spread_factor(gain, a.scale, D, norms.x) * SQZ_LOG2E,
                                  sqz_spread_factor(gain, a.scale, D, norms.y) * SQZ_LOG2E};
    const float column_mean[2] = {means.x, means.y};
    float *logit[2];
    bool stored[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const column_place p = place(2 * t + i);
        stored[i] = p.exists;
        logit[i] = a.logit + pair_of(p) * n_clusters * group + p.member;
    }
    const size_t first_centroid = (size_t)head * n_clusters;

    typename std::conditional<INT8, sqz_int8_rows<Type, D>, sqz_half_rows<Type, D>>::type rows, next_rows;
    typedef typename std::conditional<INT8, int8_t, element>::type stored_type;
    const stored_type *centroids = (const stored_type *)a.level.centroids.data + first_centroid * D;
    const uint32_t n_tiles = tiles.n_tiles(), step = WARPS;
    /* The first split has fixed rows to read, and takes fewer tiles for it. */
    const uint32_t fixed_tiles = !listed && a.n_base ? (a.n_fixed + TILE - 1) / TILE + WARPS : 0;
    const uint64_t even = (uint64_t)n_tiles + (a.n_splits > 1 ? fixed_tiles : 0);
    auto edge = [&](uint32_t i) {
        const uint64_t at = even * i / a.n_splits, before = even - n_tiles;
        return at > before ? (uint32_t)(at - before) : 0;
    };
    const uint32_t begin = part ? edge(part) : 0, end = edge(part + 1);
    uint32_t low = n_clusters, high = n_clusters;
    if (begin + warp < end) {
        low = tiles.cluster(begin + warp, 0, g);
        high = tiles.cluster(begin + warp, 1, g);
    }
    cluster_numbers numbers[2] = {}, next_numbers[2] = {};
    rows.load(centroids, low, high, low < n_clusters, high < n_clusters, t);
    numbers[0].load(a, head, low);
    numbers[1].load(a, head, high);
    for (uint32_t tile = begin + warp; tile < end; tile += step) {
        uint32_t next_low = n_clusters, next_high = n_clusters;
        if (tile + step < end) {
            next_low = tiles.cluster(tile + step, 0, g);
            next_high = tiles.cluster(tile + step, 1, g);
        }
        next_rows.load(centroids, next_low, next_high, next_low < n_clusters, next_high < n_clusters, t);
        next_numbers[0].load(a, head, next_low);
        next_numbers[1].load(a, head, next_high);
        float c[4] = {0, 0, 0, 0};
        rows.product(c, query);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!stored[i]) continue;
            float y[2], largest = state[i].maximum;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t cluster = half ? high : low;
                const cluster_numbers &of = numbers[half];
                const float dot = INT8 ? c[2 * half + i] * of.unit + column_mean[i] : c[2 * half + i];
                y[half] = dot * factor + column_gain[i] * of.spread;
                if (cluster < n_clusters) logit[i][(size_t)cluster * group] = y[half];
                else y[half] = -INFINITY;
                largest = fmaxf(largest, y[half]);
            }
            if (largest == -INFINITY) continue;
            state[i].sum *= sqz_exp2(state[i].maximum - largest);
            state[i].maximum = largest;
#pragma unroll
            for (int half = 0; half < 2; half++) state[i].sum += numbers[half].keys() * sqz_exp2(y[half] - largest);
        }
        numbers[0] = next_numbers[0];
        numbers[1] = next_numbers[1];
        rows = next_rows;
        low = next_low;
        high = next_high;
    }
    store_states(state, shared, a.parts + (pair_of(mine) * a.n_splits + part) * group + mine.member, mine.exists);
}

template <class Type, int D>
enum sqz_status launch(const struct sqz_cuda_lookup_rows *a, uint32_t n_blocks, bool after_ours, void *stream)
{
    const bool i8 = a->level.centroids.type == SQZ_ROW_I8;
    return sqz_launch(i8 ? lookup_kernel<Type, D, true> : lookup_kernel<Type, D, false>, dim3(n_blocks), THREADS, 0, 1,
                      after_ours, *a, stream);
}

template <class Type>
enum sqz_status launch_type(const struct sqz_cuda_lookup_rows *a, uint32_t n_blocks, bool after_ours, void *stream)
{
    switch (a->head_dim) {
    case 64: return launch<Type, 64>(a, n_blocks, after_ours, stream);
    case 96: return launch<Type, 96>(a, n_blocks, after_ours, stream);
    case 128: return launch<Type, 128>(a, n_blocks, after_ours, stream);
    case 256: return launch<Type, 256>(a, n_blocks, after_ours, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}

} // namespace

/* As many as fill the multiprocessors twice, no part smaller than a tile a warp; twice that where a part has 8 tiles a
 * warp even so, because not all multiprocessors are equally fast (H100, 32 heads: the whole call 8 us earlier; 8 heads,
 * whose parts would be smaller: 7 us later). */
extern "C" uint32_t sqz_cuda_lookup_rows_splits(uint32_t n_head_kv, uint32_t n_clusters, uint32_t n_multiprocessors)
{
    const uint32_t most = (n_clusters + TILE * WARPS - 1) / (TILE * WARPS), fill = 2 * n_multiprocessors / n_head_kv;
    const uint32_t whole = most / 8, twice = 2 * fill < whole ? 2 * fill : whole, once = fill < most ? fill : most;
    const uint32_t n = twice > once ? twice : once;
    return n < 1 ? 1 : n > SQZ_ROWS_MAX_SPLITS ? SQZ_ROWS_MAX_SPLITS : n;
}

extern "C" enum sqz_status sqz_cuda_lookup_rows_launch(const struct sqz_cuda_lookup_rows *a, bool after_ours,
                                                       void *stream)
{
    const uint64_t group = a->n_head / a->n_head_kv, own = (group + COLUMNS - 1) / COLUMNS;
    const uint64_t together = (group * a->n_sequences + COLUMNS - 1) / COLUMNS;
    const uint64_t passes = a->groups ? own * a->n_sequences : together;
    const uint64_t n_user = a->n_base > a->n_known ? a->n_base - 1 - a->n_known : 0;
    const uint64_t user = own * n_user * a->n_head_kv * a->n_sequences;
    const uint64_t n_blocks = a->n_splits * (uint64_t)a->n_head_kv * passes + user;
    if (n_blocks > 0x7fffffffu) return SQZ_ERROR_UNSUPPORTED;
    return a->type == SQZ_ROW_F16 ? launch_type<sqz_f16>(a, (uint32_t)n_blocks, after_ours, stream)
                                  : launch_type<sqz_bf16>(a, (uint32_t)n_blocks, after_ours, stream);
}
