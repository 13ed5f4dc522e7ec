/*
 * What calibration counts of a layer, lib/calibrate.c on the GPU: the kept queries
 * against all rows exactly and through the lookup's estimate, a few of them at a
 * time, of all heads. Formulas and reasons stand there and in lib/method.h.
 *
 * A pair is (KV head, query of the batch), a row (pair, head of its group). Steps:
 *   products_kernel   logits of rows with keys, and with centroids (mma.sync)
 *   total_kernel      log denominators: exact, of the fixed rows, of the estimates
 *   gain_kernel       every fourth query: what each candidate of the variance gain keeps and loses
 *   open_kernel       scores of clusters, up to which point of the grid each is retained or opened
 *   estimate_kernel   with codes: logits of all keys from centroids and codes
 *   rows_kernel       every row into the histograms
 *   clusters_kernel   pruned clusters: what the tail adds and reads
 * Histograms are shared in a thread block and added to the head's sums in F64; counts
 * are exact, masses differ in their last bits from run to run.
 */
#include "build_layer.cuh"
#include "code_parts.h"
#include "tiles.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / SQZ_WARP,
    TILE_ROWS = 64, /* query rows of a thread block of products: 4 warps of 16 */
    TILE_THREADS = 128,
    POINTS = SQZ_CURVE_POINTS,
    SLOTS = SQZ_CURVE_SLOTS,
    MAX_GROUP = 16,
    STRIDE = 4, /* every fourth query chooses the variance gain */
    N_CANDIDATES = 6,
    BATCH = 16, /* most queries at a time */
    TABLE = SQZ_CODE_PARTS * SQZ_CODE_ENTRIES
};

static_assert(sizeof(struct sqz_curve_sums) == (9 * SLOTS + 1) * sizeof(double), "sums are rows of slots");
enum kind { KEYS, CODES, VALUES, VALUE_CENTROIDS, CENTROIDS, LOST, TRUE_MASS, ESTIMATED, FIXED_VALUES };

const size_t scratch_bytes = (size_t)256 << 20; /* of a batch's logits, where one query has room */

/* Fixed point, so that the choice of a gain does not depend on the order of sums: masses of a group are below 2^10. */
__device__ const double mass_unit = 1.0 / (double)(1ull << 40);

struct count_args {
    uint32_t n_rows, n_fixed, n_head, n_head_kv, group, head_dim, n_clusters, n_queries;
    uint32_t n_batch, first_query, query_step; /* query b of the batch is first_query + b * query_step */
    float scale;
    bool group_max, published, value_skip, tail, coded;
    const __half *queries, *keys;
    const int32_t *position;
    const uint32_t *offset;
    const float *variance;
    sqz_centroid_view centroids;
    uint32_t n_words, n_directions;
    const uint32_t *words, *first;
    const __half *directions, *book;
    const float *spread;

    float *gain;     /* [K] */
    double *sums;    /* [K] struct sqz_curve_sums */
    __half *plain;   /* [K][C][D] centroids */
    float *norm;     /* [rows] |q|^2 */
    float *logit;    /* [rows][N] natural, -INFINITY for rows behind the query */
    float *centroid; /* [rows][C] */
    float *log_true, *base, *log_total, *level_total, *deviation; /* [rows] */
    float *tables;                                                /* [pairs][W 8 16][G] */
    float *estimate;                                              /* [rows][n_rows - n_fixed] */
    int8_t *open;                                                 /* [pairs][C] */
    int8_t *point;                                                /* [pairs][n_rows - n_fixed] */
    uint32_t *cluster_of;                                         /* [K][n_rows - n_fixed] */
    unsigned long long *kept, *lost;                              /* [K][N_CANDIDATES][SLOTS] */
};

__device__ const float candidates[N_CANDIDATES] = {0.0f, 0.25f, 0.5f, 0.75f, 1.0f, 1.5f};

__device__ __forceinline__ uint32_t query_of(const count_args &a, uint32_t pair)
{
    return a.first_query + pair % a.n_batch * a.query_step;
}

__device__ __forceinline__ int point_of(float read_to)
{
    return sqz_curve_point(read_to, SQZ_CURVE_FIRST, SQZ_CURVE_STEP, POINTS);
}

__device__ __forceinline__ float spread_factor(const count_args &a, float gain, size_t row)
{
    return sqz_spread_factor(gain, a.scale, a.head_dim, a.norm[row]);
}

/* As lib/calibrate.c's rough_log(). */
__device__ __forceinline__ float rough_log(float x)
{
    return ((float)__float_as_uint(x) * 0x1p-23f - 126.957f) * 0.69314718f;
}

/* ---- Before the queries ------------------------------------------------------------------ */

/* Grid: 8 clusters, head. A warp a cluster. */
__global__ void __launch_bounds__(THREADS) plain_kernel(const count_args a)
{
    const uint32_t c = blockIdx.x * WARPS + threadIdx.x / SQZ_WARP, head = blockIdx.y, lane = threadIdx.x % SQZ_WARP;
    if (c >= a.n_clusters) return;
    const uint32_t *offset = a.offset + (size_t)head * (a.n_clusters + 1) + c;
    __half *to = a.plain + ((size_t)head * a.n_clusters + c) * a.head_dim;
    for (uint32_t i = lane; i < a.head_dim; i += SQZ_WARP) to[i] = __float2half_rn(a.centroids.number(head, c, i));
    for (uint32_t i = offset[0] + lane; i < offset[1]; i += SQZ_WARP)
        a.cluster_of[(size_t)head * (a.n_rows - a.n_fixed) + i] = c;
}

/* Grid: pair. Norms; with codes tables and deviations, a warp a row. */
__global__ void __launch_bounds__(THREADS) tables_kernel(const count_args a)
{
    __shared__ float x[SQZ_BUILD_MAX_DIM], row[SQZ_BUILD_MAX_DIM], widths[WARPS];
    const uint32_t pair = blockIdx.x, head = pair / a.n_batch, query = query_of(a, pair), d = a.head_dim;
    const uint32_t m = a.n_directions, lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    const uint32_t *first = a.first + (size_t)head * (SQZ_CODE_PARTS * a.n_words + 1);
    for (uint32_t g = 0; g < a.group; g++) {
        const size_t at = (size_t)pair * a.group + g;
        const __half *q = a.queries + ((size_t)query * a.n_head + head * a.group + g) * d;
        for (uint32_t i = threadIdx.x; i < d; i += THREADS) row[i] = __half2float(q[i]);
        __syncthreads();
        if (threadIdx.x == 0) {
            float norm = 0;
            for (uint32_t i = 0; i < d; i++) norm += row[i] * row[i];
            a.norm[at] = norm;
        }
        if (!a.coded) {
            __syncthreads();
            continue;
        }
        float width = 0;
        for (uint32_t i = warp; i < m; i += WARPS) {
            const __half *direction = a.directions + ((size_t)head * m + i) * d;
            float sum = 0;
            for (uint32_t j = lane; j < d; j += SQZ_WARP) sum += row[j] * __half2float(direction[j]);
            for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (lane == 0) x[i] = sum;
            width += sum * sum * a.spread[(size_t)head * m + i];
        }
        if (lane == 0) widths[warp] = width;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (uint32_t w = 1; w < WARPS; w++) width += widths[w];
            a.deviation[at] = a.scale * sqrtf(width);
        }
        for (uint32_t i = threadIdx.x; i < a.n_words * TABLE; i += THREADS) {
            const uint32_t p = i / SQZ_CODE_ENTRIES, e = i % SQZ_CODE_ENTRIES;
            float sum = 0;
            for (uint32_t j = first[p]; j < first[p + 1]; j++)
                sum += x[j] * __half2float(a.book[((size_t)head * SQZ_CODE_ENTRIES + e) * m + j]);
            a.tables[((size_t)pair * a.n_words * TABLE + i) * a.group + g] = a.scale * sum;
        }
        __syncthreads();
    }
}

/* ---- Logits ---------------------------------------------------------------------------------- */

struct product_args {
    count_args a;
    const __half *rows; /* [K][n][D] */
    float *out;         /* [rows][n] */
    uint32_t n;
    bool masked; /* by position */
};

template <int D> struct tile_shape {
    static const int bn = D == 256 ? 32 : 64;
    static constexpr size_t shared_bytes = (size_t)(TILE_ROWS + bn) * sqz_tile<D>::stride;
};

/* Grid: BN columns, 64 query rows of the head, head. */
template <int D> __global__ void __launch_bounds__(TILE_THREADS) products_kernel(const product_args p)
{
    typedef sqz_tile<D> Tile;
    constexpr int BN = tile_shape<D>::bn;
    extern __shared__ __align__(128) char shared[];
    const count_args &a = p.a;
    const uint32_t queries = (uint32_t)__cvta_generic_to_shared(shared), rows = queries + TILE_ROWS * Tile::stride;
    const uint32_t head = blockIdx.z, row0 = blockIdx.y * TILE_ROWS, n_query_rows = a.n_batch * a.group;
    const uint32_t column0 = blockIdx.x * BN;
    for (uint32_t i = threadIdx.x; i < TILE_ROWS * Tile::chunks; i += TILE_THREADS) {
        const uint32_t r = i / Tile::chunks, c = i % Tile::chunks, row = row0 + r;
        const bool exists = row < n_query_rows;
        const size_t query = exists ? a.first_query + (size_t)(row / a.group) * a.query_step : 0;
        const size_t at = ((query * a.n_head + head * a.group + (exists ? row % a.group : 0)) * D) + c * 8;
        sqz_copy16(Tile::at(queries, r, c), a.queries + at, exists);
    }
    for (uint32_t i = threadIdx.x; i < BN * Tile::chunks; i += TILE_THREADS) {
        const uint32_t r = i / Tile::chunks, c = i % Tile::chunks;
        const bool exists = column0 + r < p.n;
        sqz_copy16(Tile::at(rows, r, c), p.rows + ((size_t)head * p.n + (exists ? column0 + r : 0)) * D + c * 8,
                   exists);
    }
    sqz_copy16_commit();
    sqz_copy16_wait<0>();
    __syncthreads();
    float s[BN / 2];
    const int warp = threadIdx.x / SQZ_WARP, lane = threadIdx.x % SQZ_WARP;
    sqz_tile_products<sqz_f16, D, BN>(s, queries, warp * 16, rows);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t row = row0 + warp * 16 + lane / 4 + 8 * half;
        if (row >= n_query_rows) continue;
        const size_t base = ((size_t)head * n_query_rows + row) * p.n;
        const int32_t last = (int32_t)(a.n_rows - a.n_queries + a.first_query + row / a.group * a.query_step);
#pragma unroll
        for (int j = 0; j < BN / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t column = column0 + 8 * j + 2 * (lane % 4) + i;
                if (column >= p.n) continue;
                const bool hidden = p.masked && a.position[(size_t)head * p.n + column] > last;
                p.out[base + column] = hidden ? -INFINITY : a.scale * s[4 * j + 2 * half + i];
            }
    }
}

enum sqz_status launch_products(const product_args &p, void *stream)
{
    const uint32_t d = p.a.head_dim, bn = d == 256 ? 32 : 64;
    const dim3 grid((p.n + bn - 1) / bn, (p.a.n_batch * p.a.group + TILE_ROWS - 1) / TILE_ROWS, p.a.n_head_kv);
    switch (d) {
    case 64:
        return sqz_launch(products_kernel<64>, grid, TILE_THREADS, tile_shape<64>::shared_bytes, 1, false, p, stream);
    case 96:
        return sqz_launch(products_kernel<96>, grid, TILE_THREADS, tile_shape<96>::shared_bytes, 1, false, p, stream);
    case 128:
        return sqz_launch(products_kernel<128>, grid, TILE_THREADS, tile_shape<128>::shared_bytes, 1, false, p, stream);
    case 256:
        return sqz_launch(products_kernel<256>, grid, TILE_THREADS, tile_shape<256>::shared_bytes, 1, false, p, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}

/* ---- Denominators ------------------------------------------------------------------------------- */

/* A natural softmax's maximum and sum; as sqz_softmax_state, which is base 2. */
__device__ __forceinline__ void add_logit(sqz_softmax_state &s, float x, float count)
{
    if (x > s.maximum) {
        s.sum *= expf(s.maximum - x);
        s.maximum = x;
    }
    if (x > -INFINITY) s.sum += count * expf(x - s.maximum);
}
__device__ __forceinline__ sqz_softmax_state merged(sqz_softmax_state a, sqz_softmax_state b)
{
    const float most = fmaxf(a.maximum, b.maximum);
    if (most == -INFINITY) return a;
    return {most, a.sum * expf(a.maximum - most) + b.sum * expf(b.maximum - most)};
}
/* The logarithm of the whole thread block's sum; scratch: WARPS states, shared. */
__device__ float block_log(sqz_softmax_state s, sqz_softmax_state *scratch)
{
    for (int step = 16; step; step /= 2) {
        const sqz_softmax_state other = {__shfl_xor_sync(~0u, s.maximum, step), __shfl_xor_sync(~0u, s.sum, step)};
        s = merged(s, other);
    }
    __syncthreads();
    if (threadIdx.x % SQZ_WARP == 0) scratch[threadIdx.x / SQZ_WARP] = s;
    __syncthreads();
    s = scratch[0];
    for (uint32_t w = 1; w < WARPS; w++) s = merged(s, scratch[w]);
    return s.sum > 0 ? s.maximum + logf(s.sum) : -INFINITY;
}

/* Grid: row. */
__global__ void __launch_bounds__(THREADS) total_kernel(const count_args a)
{
    __shared__ sqz_softmax_state scratch[WARPS];
    const size_t row = blockIdx.x;
    const float *x = a.logit + row * a.n_rows;
    sqz_softmax_state fixed = sqz_softmax_empty(), all;
    for (uint32_t i = threadIdx.x; i < a.n_fixed; i += THREADS) add_logit(fixed, x[i], 1.0f);
    all = fixed;
    for (uint32_t i = a.n_fixed + threadIdx.x; i < a.n_rows; i += THREADS) add_logit(all, x[i], 1.0f);
    const float base = block_log(fixed, scratch), total = block_log(all, scratch);
    if (threadIdx.x) return;
    a.base[row] = a.published ? -INFINITY : base;
    a.log_true[row] = total;
}

/* Z of level 0 under a gain, of a row. */
__device__ float level_total(const count_args &a, uint32_t head, size_t row, float factor, sqz_softmax_state *scratch)
{
    const float *x = a.centroid + row * a.n_clusters, *variance = a.variance + (size_t)head * a.n_clusters;
    const uint32_t *offset = a.offset + (size_t)head * (a.n_clusters + 1);
    sqz_softmax_state s = sqz_softmax_empty();
    for (uint32_t c = threadIdx.x; c < a.n_clusters; c += THREADS)
        add_logit(s, x[c] + factor * variance[c], (float)(offset[c + 1] - offset[c]));
    if (threadIdx.x == 0) add_logit(s, a.base[row], 1.0f);
    return block_log(s, scratch);
}

/* Grid: row. Of the estimates of single keys. */
__global__ void __launch_bounds__(THREADS) key_total_kernel(const count_args a)
{
    __shared__ sqz_softmax_state scratch[WARPS];
    const size_t row = blockIdx.x, n = a.n_rows - a.n_fixed;
    sqz_softmax_state s = sqz_softmax_empty();
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) add_logit(s, a.estimate[row * n + i], 1.0f);
    if (threadIdx.x == 0) add_logit(s, a.base[row], 1.0f);
    const float total = block_log(s, scratch);
    if (threadIdx.x == 0) a.log_total[row] = total;
}

/* ---- The variance gain ------------------------------------------------------------------------------ */

/* Score of a cluster: the mean or the largest over the group. log_total: of the group's rows. */
__device__ __forceinline__ float score_of(const count_args &a, size_t row0, uint32_t c, float variance, float gain,
                                          const float *log_total)
{
    float score = 0;
    for (uint32_t g = 0; g < a.group; g++) {
        const float y = a.centroid[(row0 + g) * a.n_clusters + c] + spread_factor(a, gain, row0 + g) * variance;
        score = sqz_add_score(score, expf(y - log_total[g]), a.group, a.group_max);
    }
    return score;
}

/* Grid: pair, candidate. */
__global__ void __launch_bounds__(THREADS) gain_kernel(const count_args a)
{
    __shared__ sqz_softmax_state scratch[WARPS];
    __shared__ float total[MAX_GROUP];
    __shared__ unsigned long long kept[SLOTS], lost[SLOTS];
    const uint32_t pair = blockIdx.x, head = pair / a.n_batch;
    const size_t row0 = (size_t)pair * a.group;
    const float gain = candidates[blockIdx.y];
    const uint32_t *offset = a.offset + (size_t)head * (a.n_clusters + 1);
    for (uint32_t i = threadIdx.x; i < SLOTS; i += THREADS) kept[i] = lost[i] = 0;
    for (uint32_t g = 0; g < a.group; g++) {
        const float z = level_total(a, head, row0 + g, spread_factor(a, gain, row0 + g), scratch);
        if (threadIdx.x == 0) total[g] = z;
    }
    __syncthreads();
    for (uint32_t c = threadIdx.x; c < a.n_clusters; c += THREADS) {
        const float score = score_of(a, row0, c, a.variance[(size_t)head * a.n_clusters + c], gain, total);
        float mass = 0;
        for (uint32_t g = 0; g < a.group; g++) {
            const float *x = a.logit + (row0 + g) * a.n_rows + a.n_fixed;
            for (uint32_t i = offset[c]; i < offset[c + 1]; i++) mass += expf(x[i] - a.log_true[row0 + g]);
        }
        const uint32_t slot = (uint32_t)(point_of(logf(score)) + 1);
        atomicAdd(&kept[slot], (unsigned long long)(offset[c + 1] - offset[c]));
        atomicAdd(&lost[slot], (unsigned long long)((double)mass / a.group / mass_unit));
    }
    __syncthreads();
    const size_t at = ((size_t)head * N_CANDIDATES + blockIdx.y) * SLOTS;
    for (uint32_t i = threadIdx.x; i < SLOTS; i += THREADS) {
        atomicAdd(&a.kept[at + i], kept[i]);
        atomicAdd(&a.lost[at + i], lost[i]);
    }
}

/* Grid: head; one thread. The candidate that loses least at 0.08 of the keys, as in lib/calibrate.c. */
__global__ void choose_kernel(const count_args a)
{
    const uint32_t head = blockIdx.x;
    const double used = (a.n_queries + STRIDE - 1) / STRIDE;
    const double target = 0.08 * (double)(a.n_rows - a.n_fixed) * used;
    double best = INFINITY;
    float gain = 0;
    for (uint32_t c = 0; c < N_CANDIDATES; c++) {
        const unsigned long long *keys = a.kept + ((size_t)head * N_CANDIDATES + c) * SLOTS;
        const unsigned long long *lost = a.lost + ((size_t)head * N_CANDIDATES + c) * SLOTS;
        double kept = 0, kept_mass = 0, total = 0;
        for (int i = 0; i <= POINTS; i++) total += (double)lost[i] * mass_unit;
        for (int i = POINTS; i >= 0 && kept < target; i--) {
            const double n = (double)keys[i], part = kept + n > target ? (target - kept) / n : 1.0;
            kept += part * n;
            kept_mass += part * (double)lost[i] * mass_unit;
        }
        if (total - kept_mass < best) {
            best = total - kept_mass;
            gain = candidates[c];
        }
    }
    a.gain[head] = gain;
}

/* ---- Counting -------------------------------------------------------------------------------------------- */

/* Grid: pair. The points up to which clusters are retained, with codes opened. */
__global__ void __launch_bounds__(THREADS) open_kernel(const count_args a)
{
    __shared__ sqz_softmax_state scratch[WARPS];
    __shared__ float total[MAX_GROUP];
    const uint32_t pair = blockIdx.x, head = pair / a.n_batch;
    const size_t row0 = (size_t)pair * a.group;
    const float gain = a.gain[head];
    for (uint32_t g = 0; g < a.group; g++) {
        const float z = level_total(a, head, row0 + g, spread_factor(a, gain, row0 + g), scratch);
        if (threadIdx.x) continue;
        total[g] = z;
        a.level_total[row0 + g] = z;
        if (!a.coded) a.log_total[row0 + g] = z;
    }
    __syncthreads();
    for (uint32_t c = threadIdx.x; c < a.n_clusters; c += THREADS) {
        const float variance = a.variance[(size_t)head * a.n_clusters + c];
        int point = point_of(sqz_cluster_read_to(logf(score_of(a, row0, c, variance, gain, total)), 0));
        const float deviation = sqz_open_deviations(0) * sqrtf(variance);
        for (uint32_t g = 0; a.coded && g < a.group; g++)
            point = max(point, point_of(sqz_reach(a.centroid[(row0 + g) * a.n_clusters + c], deviation,
                                                  a.deviation[row0 + g], total[g])));
        a.open[(size_t)pair * a.n_clusters + c] = (int8_t)point;
    }
}

/* Grid: keys, pair. Shared memory: the pair's tables, [W 8 16][Q]. Q: at least the group. */
template <int Q> __global__ void __launch_bounds__(THREADS) estimate_kernel(const count_args a)
{
    extern __shared__ float4 table[];
    const uint32_t pair = blockIdx.y, head = pair / a.n_batch, n = a.n_rows - a.n_fixed, group = a.group;
    const uint32_t size = a.n_words * TABLE, key = blockIdx.x * THREADS + threadIdx.x;
    for (uint32_t i = threadIdx.x; i < size * Q; i += THREADS) {
        const bool exists = i % Q < group;
        ((float *)table)[i] = exists ? a.tables[((size_t)pair * size + i / Q) * group + i % Q] : 0.0f;
    }
    __syncthreads();
    if (key >= n) return;
    const uint32_t c = a.cluster_of[(size_t)head * n + key];
    float4 sum[Q / 4] = {};
    for (uint32_t w = 0; w < a.n_words; w++) {
        const uint32_t word = a.words[((size_t)head * a.n_words + w) * n + key];
#pragma unroll
        for (uint32_t p = 0; p < SQZ_CODE_PARTS; p++) {
            const uint32_t entry = (w * SQZ_CODE_PARTS + p) * SQZ_CODE_ENTRIES + (word >> 4 * p & 15);
#pragma unroll
            for (uint32_t i = 0; i < Q / 4; i++) {
                const float4 x = table[entry * (Q / 4) + i];
                sum[i].x += x.x;
                sum[i].y += x.y;
                sum[i].z += x.z;
                sum[i].w += x.w;
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < Q / 4; i++) {
        const float x[4] = {sum[i].x, sum[i].y, sum[i].z, sum[i].w};
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            const size_t row = (size_t)pair * group + 4 * i + j;
            if (4 * i + j < group) a.estimate[row * n + key] = x[j] + a.centroid[row * a.n_clusters + c];
        }
    }
}

/* Masses of a thread block: exact, estimated. */
struct histograms {
    double of[2][SLOTS];
    __device__ void clear()
    {
        for (uint32_t i = threadIdx.x; i < 2 * SLOTS; i += THREADS) (&of[0][0])[i] = 0;
        __syncthreads();
    }
    __device__ void flush(const count_args &a, uint32_t head, int number, int kind, double times)
    {
        double *to = a.sums + (size_t)head * (9 * SLOTS + 1) + (size_t)kind * SLOTS;
        for (uint32_t i = threadIdx.x; i < SLOTS; i += THREADS)
            if (of[number][i] != 0) atomicAdd(&to[i], times * of[number][i]);
    }
};

/* Adds to a slot for the whole warp: lanes of the same slot go together. Every lane calls; slot < 0: nothing. */
__device__ __forceinline__ void add_together(double *slots, int slot, double x)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP;
    const uint32_t same = __match_any_sync(~0u, slot);
    double sum = 0;
    for (uint32_t left = same; __any_sync(~0u, left); left &= left - 1) {
        const int from = left ? __ffs(left) - 1 : (int)lane;
        const double other = __shfl_sync(~0u, x, from);
        if (left) sum += other;
    }
    if (slot >= 0 && lane == (uint32_t)__ffs(same) - 1) atomicAdd(&slots[slot], sum);
}

/* Grid: parts of the rows, pair. Every row by up to which point it is retained, and its value read. */
__global__ void __launch_bounds__(THREADS) rows_kernel(const count_args a)
{
    const uint32_t n_parts = gridDim.x;
    __shared__ histograms sums;
    __shared__ uint32_t keys[SLOTS], values[SLOTS], fixed[SLOTS];
    const uint32_t pair = blockIdx.y, head = pair / a.n_batch, n = a.n_rows - a.n_fixed;
    const size_t row0 = (size_t)pair * a.group;
    for (uint32_t i = threadIdx.x; i < SLOTS; i += THREADS) keys[i] = values[i] = fixed[i] = 0;
    sums.clear();
    const float zero = SQZ_CURVE_FIRST + logf(SQZ_VALUE_SKIP);
    const uint32_t begin = (uint32_t)((uint64_t)a.n_rows * blockIdx.x / n_parts),
                   end = (uint32_t)((uint64_t)a.n_rows * (blockIdx.x + 1) / n_parts);
    for (uint32_t first = begin; first < end; first += THREADS) {
        const uint32_t row = first + threadIdx.x;
        const bool exists = row < end, is_key = exists && row >= a.n_fixed;
        const uint32_t key = is_key ? row - a.n_fixed : 0;
        float best = 0, score = 0, mass = 0, guess = 0;
        for (uint32_t g = 0; exists && g < a.group; g++) {
            const float weight = expf(a.logit[(row0 + g) * a.n_rows + row] - a.log_true[row0 + g]);
            best = fmaxf(best, weight);
            mass += weight;
            if (!a.coded || !is_key) continue;
            const float estimate = a.estimate[(row0 + g) * n + key];
            score = sqz_add_score(score, expf(estimate - a.log_total[row0 + g]), a.group, a.group_max);
            guess += expf(estimate - a.log_true[row0 + g]);
        }
        int point = POINTS - 1;
        if (is_key) {
            const int open = a.open[(size_t)pair * a.n_clusters + a.cluster_of[(size_t)head * n + key]];
            point = a.coded ? min(point_of(rough_log(score)), open) : open;
            if (a.coded) a.point[(size_t)pair * n + key] = (int8_t)point;
        }
        const float at = (rough_log(best) - zero) * (1.0f / SQZ_CURVE_STEP);
        const int read = a.value_skip ? min(at >= 0 ? (int)at : -1, point) : point;
        if (is_key && point >= 0) atomicAdd(&keys[point + 1], 1u);
        if (is_key && read >= 0) atomicAdd(&values[read + 1], 1u);
        if (exists && !is_key && read >= 0) atomicAdd(&fixed[read + 1], 1u);
        add_together(sums.of[0], is_key ? point + 1 : -1, (double)mass);
        if (a.coded) add_together(sums.of[1], is_key ? point + 1 : -1, (double)guess);
    }
    __syncthreads();
    sums.flush(a, head, 0, TRUE_MASS, 1.0);
    sums.flush(a, head, 0, LOST, 1.0 / a.group);
    if (a.coded) sums.flush(a, head, 1, ESTIMATED, 1.0);
    double *to = a.sums + (size_t)head * (9 * SLOTS + 1);
    for (uint32_t i = threadIdx.x; i < SLOTS; i += THREADS) {
        if (keys[i]) atomicAdd(&to[KEYS * SLOTS + i], (double)keys[i]);
        if (values[i]) atomicAdd(&to[VALUES * SLOTS + i], (double)values[i]);
        if (fixed[i]) atomicAdd(&to[FIXED_VALUES * SLOTS + i], (double)fixed[i]);
    }
}

/* A warp's share of keys of a cluster: weights under the estimates' total, and points. */
struct some_keys {
    float weight[MAX_GROUP][SQZ_WARP];
    int point[SQZ_WARP];
};

/* Weights of the keys from `begin` on, a lane a key; each lane gets its own key's sum and largest over the group. */
__device__ void load_keys(const count_args &a, some_keys *some, uint32_t pair, size_t row0, uint32_t begin,
                          uint32_t end, float *sum, float *largest)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, n = a.n_rows - a.n_fixed, i = begin + lane;
    *sum = *largest = 0;
    __syncwarp();
    some->point[lane] = i < end ? a.point[(size_t)pair * n + i] : POINTS;
    for (uint32_t g = 0; g < a.group; g++) {
        const float w = i < end ? expf(a.estimate[(row0 + g) * n + i] - a.log_total[row0 + g]) : 0.0f;
        some->weight[g][lane] = w;
        *sum += w;
        *largest = fmaxf(*largest, w);
    }
    __syncwarp();
}

/* At how many points the value centroid of an opened cluster with codes is read (count_value_centroid() of
 * lib/calibrate.c): a lane has points first + 1 + lane, and 32 on, 64 on. first: of the keys. */
template <int Q>
__device__ void count_opened(const count_args &a, some_keys *some, uint32_t pair, size_t row0, uint32_t begin,
                             uint32_t end, int first, int last, int *value_centroids)
{
    enum { MOST = (POINTS + SQZ_WARP - 1) / SQZ_WARP };
    const int lane = threadIdx.x % SQZ_WARP;
    float below[MOST][Q] = {}, sum, most;
    for (uint32_t at = begin; at < end; at += SQZ_WARP) {
        const int n = (int)min(end - at, (uint32_t)SQZ_WARP);
        load_keys(a, some, pair, row0, at, end, &sum, &most);
        for (int i = 0; i < n; i++) {
            const int past = some->point[i] - first - 1 - lane; /* below 0: what the lane's first point is behind */
            float weight[Q];
#pragma unroll
            for (int g = 0; g < Q; g++) weight[g] = g < (int)a.group ? some->weight[g][i] : 0.0f;
#pragma unroll
            for (int s = 0; s < MOST; s++) {
                if (first + 1 + s * SQZ_WARP > last) break;
#pragma unroll
                for (int g = 0; g < Q; g++) below[s][g] += past < s * SQZ_WARP ? weight[g] : 0.0f;
            }
        }
    }
#pragma unroll
    for (int s = 0; s < MOST; s++) {
        const int t = first + 1 + s * SQZ_WARP + lane;
        float largest = 0;
#pragma unroll
        for (int g = 0; g < Q; g++) largest = fmaxf(largest, below[s][g]);
        if (t > last) continue;
        if (a.value_skip && largest < sqz_value_limit(SQZ_CURVE_FIRST + SQZ_CURVE_STEP * (float)t)) continue;
        atomicAdd(&value_centroids[t + 1], 1);
        atomicAdd(&value_centroids[t + 2], -1);
    }
}

/* Grid: parts of the clusters, pair; a warp a cluster. What stands for pruned keys. Q: at least the group. */
template <int Q> __global__ void __launch_bounds__(THREADS) clusters_kernel(const count_args a)
{
    __shared__ double estimates[WARPS][SLOTS]; /* a warp has its own */
    __shared__ int value_centroids[SLOTS], codes[SLOTS];
    __shared__ some_keys some[WARPS];
    const uint32_t pair = blockIdx.y, head = pair / a.n_batch, lane = threadIdx.x % SQZ_WARP;
    const uint32_t warp = threadIdx.x / SQZ_WARP;
    const size_t row0 = (size_t)pair * a.group;
    const uint32_t *offset = a.offset + (size_t)head * (a.n_clusters + 1);
    for (uint32_t i = threadIdx.x; i < WARPS * SLOTS; i += THREADS) (&estimates[0][0])[i] = 0;
    for (uint32_t i = threadIdx.x; i < SLOTS; i += THREADS) value_centroids[i] = codes[i] = 0;
    __syncthreads();
    for (uint32_t c = blockIdx.x * WARPS + warp; c < a.n_clusters; c += gridDim.x * WARPS) {
        const int open = a.open[(size_t)pair * a.n_clusters + c];
        const uint32_t begin = offset[c], end = offset[c + 1];
        const float keys = (float)(end - begin), s = a.variance[(size_t)head * a.n_clusters + c];
        float closed = 0, largest = -INFINITY; /* of the centroid: a lane a head of the group */
        if (lane < a.group) {
            const float x = sqz_tail_logit(a.centroid[(row0 + lane) * a.n_clusters + c],
                                           spread_factor(a, 1.0f, row0 + lane), s, 0.0f);
            closed = keys * expf(x - a.log_true[row0 + lane]);
            largest = x - a.log_total[row0 + lane];
        }
        for (int step = 8; step; step /= 2) {
            closed += __shfl_xor_sync(~0u, closed, step);
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
        }
        if (a.coded) {
            /* Its keys: what they weigh together, under the exact total, and by the score. */
            float score = 0, estimated = 0;
            int first = POINTS;
            for (uint32_t at = begin; at < end; at += SQZ_WARP) {
                float sum, most;
                load_keys(a, &some[warp], pair, row0, at, end, &sum, &most);
                first = min(first, some[warp].point[lane]);
                score += a.group_max ? most * (float)a.group : sum;
                for (uint32_t g = 0; g < a.group; g++)
                    estimated += some[warp].weight[g][lane] * expf(a.log_total[row0 + g] - a.log_true[row0 + g]);
            }
            for (int step = 16; step; step /= 2) {
                score += __shfl_xor_sync(~0u, score, step);
                estimated += __shfl_xor_sync(~0u, estimated, step);
                first = min(first, __shfl_xor_sync(~0u, first, step));
            }
            const int last = min(a.value_skip ? point_of(sqz_value_read_to(logf(score))) : POINTS - 1, open);
            if (a.tail && last > first)
                count_opened<Q>(a, &some[warp], pair, row0, begin, end, first, last, value_centroids);
            closed -= estimated;
            if (lane == 0) atomicAdd(&codes[open + 1], (int)(end - begin));
        }
        if (lane) continue;
        estimates[warp][open + 1] += (double)closed;
        if (!a.tail) continue;
        const int last = a.value_skip ? point_of(sqz_value_read_to(largest + logf(keys))) : POINTS - 1;
        if (last <= open) continue;
        atomicAdd(&value_centroids[open + 2], 1);
        atomicAdd(&value_centroids[last + 2], -1);
    }
    __syncthreads();
    double *to = a.sums + (size_t)head * (9 * SLOTS + 1);
    for (uint32_t i = threadIdx.x; i < SLOTS; i += THREADS) {
        double estimated = 0;
        for (uint32_t w = 0; w < WARPS; w++) estimated += estimates[w][i];
        if (estimated != 0) atomicAdd(&to[ESTIMATED * SLOTS + i], estimated);
        if (value_centroids[i]) atomicAdd(&to[VALUE_CENTROIDS * SLOTS + i], (double)value_centroids[i]);
        if (codes[i]) atomicAdd(&to[CODES * SLOTS + i], (double)codes[i]);
    }
}

/* Grid: head. */
__global__ void end_kernel(const count_args a)
{
    a.sums[(size_t)blockIdx.x * (9 * SLOTS + 1) + 9 * SLOTS] = a.n_queries;
}

/* ---- The call ------------------------------------------------------------------------------------------------ */

uint32_t batch_of(const struct sqz_layer *l)
{
    const size_t each = (size_t)l->shape.n_head * l->n_rows * sizeof(float);
    size_t n = scratch_bytes / each;
    if (n < 1) n = 1;
    if (n > BATCH) n = BATCH;
    return (uint32_t)(n < l->n_queries ? n : l->n_queries);
}

void carve(count_args *c, struct sqz_arena *arena, const struct sqz_layer *l)
{
    const size_t k = l->shape.n_head_kv, d = l->shape.head_dim, n_c = l->level[0].n_clusters, n = l->n_rows;
    const size_t pairs = k * batch_of(l), rows = pairs * (l->shape.n_head / k), keys = n - l->n_fixed;
    const size_t w = l->codes.n_words;
    auto floats = [&](size_t x, size_t y) { return (float *)sqz_arena_take(arena, x, y, sizeof(float)); };
    c->plain = (__half *)sqz_arena_take(arena, k * n_c, d, 2);
    c->norm = floats(rows, 1);
    c->logit = floats(rows, n);
    c->centroid = floats(rows, n_c);
    c->log_true = floats(rows, 1);
    c->base = floats(rows, 1);
    c->log_total = floats(rows, 1);
    c->level_total = floats(rows, 1);
    c->deviation = floats(rows, 1);
    c->tables = floats(rows, w * TABLE);
    c->estimate = w ? floats(rows, keys) : NULL;
    c->open = (int8_t *)sqz_arena_take(arena, pairs, n_c, 1);
    c->point = w ? (int8_t *)sqz_arena_take(arena, pairs, keys, 1) : NULL;
    c->cluster_of = (uint32_t *)sqz_arena_take(arena, k, keys, sizeof(uint32_t));
    c->kept = (unsigned long long *)sqz_arena_take(arena, k * N_CANDIDATES, SLOTS, sizeof *c->kept);
    c->lost = (unsigned long long *)sqz_arena_take(arena, k * N_CANDIDATES, SLOTS, sizeof *c->lost);
}

void describe(count_args *c, const struct sqz_gpu_count *args)
{
    const struct sqz_layer *l = args->layer;
    c->n_rows = l->n_rows;
    c->n_fixed = l->n_fixed;
    c->n_head = l->shape.n_head;
    c->n_head_kv = l->shape.n_head_kv;
    c->group = l->shape.n_head / l->shape.n_head_kv;
    c->head_dim = l->shape.head_dim;
    c->n_clusters = l->level[0].n_clusters;
    c->n_queries = l->n_queries;
    c->scale = l->shape.scale;
    c->group_max = l->group == SQZ_GROUP_MAX;
    c->published = l->rule == SQZ_RULE_PAPER;
    c->value_skip = l->value_skip;
    c->tail = l->tail;
    c->coded = l->codes.n_words > 0;
    c->queries = (const __half *)l->queries;
    c->keys = (const __half *)l->keys.data;
    c->position = l->position;
    c->offset = l->level[0].offset;
    c->variance = l->level[0].variance;
    c->centroids = sqz_centroids_of(l);
    c->n_words = l->codes.n_words;
    c->n_directions = l->codes.n_directions;
    c->words = l->codes.words;
    c->first = l->codes.first;
    c->directions = (const __half *)l->codes.directions;
    c->book = (const __half *)l->codes.book;
    c->spread = l->codes.spread;
    c->gain = sqz_writable(l->variance_gain);
    c->sums = (double *)args->sums;
}

/* Norms, logits and exact denominators of a batch. */
enum sqz_status load_batch(const count_args &a, void *stream)
{
    const uint32_t pairs = a.n_head_kv * a.n_batch;
    const product_args keys = {a, a.keys, a.logit, a.n_rows, true};
    const product_args centroids = {a, a.plain, a.centroid, a.n_clusters, false};
    enum sqz_status status = sqz_launch(tables_kernel, dim3(pairs), THREADS, 0, 1, false, a, stream);
    if (status == SQZ_OK) status = launch_products(keys, stream);
    if (status == SQZ_OK) status = launch_products(centroids, stream);
    return status == SQZ_OK ? sqz_launch(total_kernel, dim3(pairs * a.group), THREADS, 0, 1, false, a, stream) : status;
}

enum sqz_status count_batch(const count_args &a, void *stream)
{
    const uint32_t pairs = a.n_head_kv * a.n_batch, n = a.n_rows - a.n_fixed;
    const bool small = a.group <= 4;
    const size_t table_bytes = (size_t)a.n_words * TABLE * (small ? 4 : MAX_GROUP) * sizeof(float);
    const uint32_t parts = (a.n_clusters + 32 * WARPS - 1) / (32 * WARPS);
    enum sqz_status status = load_batch(a, stream);
    if (status == SQZ_OK) status = sqz_launch(open_kernel, dim3(pairs), THREADS, 0, 1, false, a, stream);
    if (status == SQZ_OK && a.coded)
        status = sqz_launch(small ? estimate_kernel<4> : estimate_kernel<MAX_GROUP>,
                            dim3((n + THREADS - 1) / THREADS, pairs), THREADS, table_bytes, 1, false, a, stream);
    if (status == SQZ_OK && a.coded)
        status = sqz_launch(key_total_kernel, dim3(pairs * a.group), THREADS, 0, 1, false, a, stream);
    if (status == SQZ_OK)
        status = sqz_launch(rows_kernel, dim3((a.n_rows + 8191) / 8192, pairs), THREADS, 0, 1, false, a, stream);
    if (status != SQZ_OK) return status;
    return sqz_launch(small ? clusters_kernel<4> : clusters_kernel<MAX_GROUP>, dim3(parts, pairs), THREADS, 0, 1, false,
                      a, stream);
}

/* Calls `run` for every query_step-th query, as many at a time as there is room for. */
enum sqz_status each_batch(count_args a, uint32_t most, uint32_t query_step,
                           enum sqz_status (*run)(const count_args &a, void *stream), void *stream)
{
    const uint32_t n = (a.n_queries + query_step - 1) / query_step;
    enum sqz_status status = SQZ_OK;
    a.query_step = query_step;
    for (uint32_t at = 0; at < n && status == SQZ_OK; at += a.n_batch) {
        a.first_query = at * query_step;
        a.n_batch = n - at < most ? n - at : most;
        status = run(a, stream);
    }
    return status;
}

enum sqz_status try_gains(const count_args &a, void *stream)
{
    const enum sqz_status status = load_batch(a, stream);
    const dim3 grid(a.n_head_kv * a.n_batch, N_CANDIDATES);
    return status == SQZ_OK ? sqz_launch(gain_kernel, grid, THREADS, 0, 1, false, a, stream) : status;
}

bool supported(const struct sqz_layer *l)
{
    const uint32_t d = l->shape.head_dim;
    return l->n_levels == 1 && l->keys.type == SQZ_ROW_F16 && l->n_queries && l->n_fixed < l->n_rows &&
           (d == 64 || d == 96 || d == 128 || d == 256) && l->shape.n_head / l->shape.n_head_kv <= MAX_GROUP;
}

} // namespace

extern "C" size_t sqz_gpu_count_workspace_bytes(const struct sqz_gpu_count *args)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    count_args c;
    if (!supported(args->layer)) return 0;
    carve(&c, &arena, args->layer);
    return sqz_arena_bytes(&arena);
}

extern "C" enum sqz_status sqz_gpu_count(const struct sqz_gpu_count *args, void *stream)
{
    const struct sqz_layer *l = args->layer;
    const size_t bytes = sqz_gpu_count_workspace_bytes(args);
    if (bytes == 0) return SQZ_ERROR_UNSUPPORTED;
    if (args->workspace_bytes < bytes) return SQZ_ERROR_ARGUMENT;
    struct sqz_arena arena = sqz_arena_on(args->workspace);
    count_args a;
    memset(&a, 0, sizeof a);
    carve(&a, &arena, l);
    describe(&a, args);
    const uint32_t k = a.n_head_kv, most = batch_of(l);
    const size_t histogram = (size_t)k * N_CANDIDATES * SLOTS * sizeof *a.kept;
    enum sqz_status status = sqz_cuda_clear_launch(a.sums, k * sizeof(struct sqz_curve_sums), stream);
    if (status == SQZ_OK) status = sqz_cuda_clear_launch(a.gain, k * sizeof *a.gain, stream);
    if (status == SQZ_OK) status = sqz_cuda_clear_launch(a.kept, histogram, stream);
    if (status == SQZ_OK) status = sqz_cuda_clear_launch(a.lost, histogram, stream);
    if (status == SQZ_OK)
        status = sqz_launch(plain_kernel, dim3((a.n_clusters + WARPS - 1) / WARPS, k), THREADS, 0, 1, false, a, stream);
    if (status == SQZ_OK && args->fit_variance) {
        status = each_batch(a, most, STRIDE, try_gains, stream);
        if (status == SQZ_OK) status = sqz_launch(choose_kernel, dim3(k), 1, 0, 1, false, a, stream);
    }
    if (status == SQZ_OK) status = each_batch(a, most, 1, count_batch, stream);
    return status == SQZ_OK ? sqz_launch(end_kernel, dim3(k), 1, 0, 1, false, a, stream) : status;
}
