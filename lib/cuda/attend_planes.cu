/*
 * Attention of one token over rows in planes (planes.h), read as they are: 4 bits a number, or 4 + 4.
 *
 *   logit = scale q.centroid + scale step (q'.u - middle sum q')              q' the query, turned as rows are
 *   out   = sum of w mean + turned back (sum of w step (u - middle))          u the stored number
 *
 * so a row costs integer products of its 4 bits as they lie there, and the output is turned once.
 *
 * The work is cut into stretches of one pair (a sequence and key-value head), one a thread block: each an equal share of
 * its groups of 8 rows in planes and of its F16 rows, the fixed and own ones. A block's warps share a stretch and wait for nobody:
 * each has its own ring in shared memory, which copies fill while it is busy with what came before. A warp's groups go
 * in chunks of up to 32, a lane each: the clusters that their keys belong to come first, as an item of the ring, and their logits
 * are computed, each once, by products of 16 centroids; then tiles of 32 rows (16 with both planes).
 *
 * Keys: an integer product of 16 rows by 8 columns, which are 4 queries in 16 bits, upper and lower 8 each: exact. Bytes of a row are
 * operands with one mask, or a shift and a mask, for 4 numbers.
 * Values: a product in F16 of 16 numbers of 16 rows by up to 8 queries' weights. Of two rows' words 4 bits each, under one mask, are two
 * F16 numbers below the normal ones, times 2^-24 or, for the upper half of a byte, 2^-20: the sums are multiplied once.
 * Weights are times the row's step, which is at most 1 there. The lower plane is 16 times less, in both products.
 *
 * The block that finishes a pair's last stretch merges all of them, in their order, and what comes along.
 *
 * Own rows in planes are read by the same kernel in a launch of their own (of_users): only where arrays are differs.
 */
#include "planes.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / SQZ_WARP,
    STAGES = 3,
    CHUNK = 32,   /* groups of a chunk, and clusters of their keys, at most */
    TOGETHER = 16 /* query rows of a pass, at most */
};

#define SLACK     10.0f
#define NO_GROUP  0x1fffffffu
#define LOW_HALF  0x000f000fu /* bits 0 to 3 of two F16 numbers: times 2^-24 */
#define HIGH_HALF 0x00f000f0u /* bits 4 to 7: times 2^-20 */

struct planes_call : sqz_cuda_attend_planes {
    uint32_t n_target;              /* stretches that there are to be */
    uint32_t n_pairs, n_query_rows; /* of a pair */
};

/* How rows lie in a stage of a warp's ring: keys' planes, values' planes, steps; or centroids of 16 bytes a swizzled chunk. */
template <int D, bool BOTH> struct ring_of {
    enum {
        ROW = D / 2,
        PLANES = BOTH ? 2 : 1,
        TILE = BOTH ? 16 : 32,
        GROUPS = TILE / SQZ_GROUP_ROWS,
        PLANE = TILE * ROW,
        STEPS = 2 * PLANES * PLANE, /* or a chunk's INT8 centroids: as many bytes */
        STAGE = STEPS + CHUNK * 4, /* steps of rows, or the centroids' scales; before, and of F16 ones, their numbers */
        BYTES = WARPS * STAGES * STAGE,
        WORDS = ROW / 16,  /* of a key's row in a lane */
        CHUNKS = ROW / 16, /* of 16 bytes in a row */
        NUMBERS = D / 16   /* bytes of a value's row in a lane: products of 16 numbers */
    };
};

/* Query rows of a block: as bytes of 16-bit integers, as they are and turned, and what products are multiplied by. */
template <int D, int R> struct query_rows {
    int8_t turned[2][R][D], plain[2][R][D]; /* upper, lower 8 bits */
    float factor[R], middle[R];             /* of the turned ones, and times the sum of the numbers the middle */
    float plain_factor[R], mean_logit[R];
};

template <int D, bool BOTH, int R> struct block_memory {
    union {
        uint8_t ring[ring_of<D, BOTH>::BYTES];
        struct {
            float out[WARPS][R][D], maximum[WARPS][R], sum[WARPS][R], scaled[WARPS][R];
        } state;
        float weight[ring_of<D, BOTH>::BYTES / 4];
    };
    float base[WARPS][CHUNK][R]; /* logits of a chunk's clusters, base 2 */
    uint32_t entry[WARPS]
                  [CHUNK]; /* a group's first cluster among those << 16, rows that exist << 8, beginnings of clusters */
    query_rows<D, R> queries;
    bool last;
};

/* ---- Products, copies --------------------------------------------------------------------- */

/* c += a b, 16 x 32 unsigned (centroids: signed) by 32 x 8 signed bytes; lanes as in sqz_mma(), four bytes a register. */
__device__ __forceinline__ void product_u8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                           uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void product_s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                           uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy_16(void *to, const void *from, bool exists)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(exists ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_4(void *to, const void *from, bool exists)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(exists ? 4 : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ __forceinline__ void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Where 16 bytes of a row lie among them in shared memory, so that lanes that load different rows meet no bank twice. */
template <int ROW> __device__ __forceinline__ int swizzled(int chunk, int row)
{
    return ROW == 64 ? chunk ^ (row & 2) : chunk;
}
template <int D> __device__ __forceinline__ int swizzled_centroid(int chunk, int row)
{
    return D == 128 ? chunk ^ (row & 1) : chunk;
}

__device__ __forceinline__ float warp_total(float x)
{
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* ---- What is read ------------------------------------------------------------------------- */

/* A head's rows in planes, and what they are relative to. */
struct plane_source {
    const uint8_t *keys[2], *values[2]; /* upper, lower */
    const uint8_t *bytes;               /* INT8 centroids, or NULL, and */
    const __half *halves;
    const float *centroid_scale, *value_unit;
    const uint32_t *steps, *place; /* place: of groups, or NULL: a cluster has 128 rows */
    uint32_t n_planes;
};

template <int D, bool BOTH>
__device__ __forceinline__ plane_source source_of_user(const planes_call &a, uint32_t pair, uint32_t head)
{
    const sqz_cuda_user &user = a.users[pair / a.layer.n_head_kv];
    const uint32_t n = user.plane_capacity_rows;
    const sqz_cuda_user_places at = sqz_cuda_user_places_of(a.layer.n_head_kv, D, n);
    const size_t rows = (size_t)head * n;
    const uint8_t *planes = (const uint8_t *)user.planes;
    plane_source s;
    s.keys[0] = planes + at.upper[0] + rows * (D / 2);
    s.values[0] = planes + at.upper[1] + rows * (D / 2);
    s.keys[1] = BOTH ? planes + at.lower[0] + rows * (D / 2) : NULL;
    s.values[1] = BOTH ? planes + at.lower[1] + rows * (D / 2) : NULL;
    s.bytes = NULL;
    s.halves = (const __half *)(planes + at.centroids) + rows / SQZ_CUDA_USER_BLOCK * D;
    s.centroid_scale = NULL;
    s.value_unit = (const float *)(planes + at.unit) + head;
    s.steps = (const uint32_t *)(planes + at.steps) + rows;
    s.place = NULL;
    s.n_planes = user.n_plane_rows;
    return s;
}

template <int D, bool BOTH>
__device__ __forceinline__ plane_source source_of(const planes_call &a, uint32_t pair, uint32_t head)
{
    if (a.of_users) return source_of_user<D, BOTH>(a, pair, head);
    const sqz_cuda_plane_layer &l = a.layer;
    const uint32_t n = l.n_rows - l.n_whole, n_groups = (l.n_rows + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS;
    const size_t rows = (size_t)head * n, clusters = (size_t)head * l.n_clusters;
    const bool bytes = l.centroids.type == SQZ_ROW_I8;
    plane_source s;
    s.keys[0] = l.keys.upper + rows * (D / 2);
    s.values[0] = l.values.upper + rows * (D / 2);
    s.keys[1] = BOTH ? l.keys.lower + rows * (D / 2) : NULL;
    s.values[1] = BOTH ? l.values.lower + rows * (D / 2) : NULL;
    s.bytes = bytes ? (const uint8_t *)l.centroids.data + clusters * D : NULL;
    s.halves = (const __half *)l.centroids.data + clusters * D;
    s.centroid_scale = l.centroids.scale + clusters;
    s.value_unit = l.value_unit + head;
    s.steps = l.steps + rows;
    s.place = l.place + (size_t)head * n_groups;
    s.n_planes = n;
    return s;
}

/* ---- Which work --------------------------------------------------------------------------- */

struct stretch_of {
    uint32_t pair, first, end; /* groups of its list behind those that are in no plane */
    uint32_t whole, whole_end; /* F16 rows: those that are in no plane and, behind them, own ones */
};

__device__ __forceinline__ uint32_t own_rows_of(const planes_call &a, uint32_t pair)
{
    if (!a.n_user || a.together) return 0;
    const uint32_t sequence = pair / a.layer.n_head_kv;
    if (a.users) return min(a.users[sequence].n_rows, a.n_user);
    return a.user_rows ? min(a.user_rows[sequence], a.n_user) : a.n_user;
}

/* Groups before the first that has rows in planes. */
__device__ __forceinline__ uint32_t skipped_groups(const planes_call &a)
{
    return a.layer.n_whole / SQZ_GROUP_ROWS;
}

__device__ __forceinline__ uint32_t groups_of_head(const planes_call &a)
{
    return (uint32_t)(((uint64_t)a.layer.n_rows + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS);
}

__device__ __forceinline__ uint32_t plane_groups_of(const planes_call &a, uint32_t pair)
{
    if (a.of_users) return a.users[pair / a.layer.n_head_kv].n_plane_rows / SQZ_GROUP_ROWS;
    const uint32_t n = a.groups ? a.n_groups[pair] : groups_of_head(a), skipped = skipped_groups(a);
    return n > skipped ? n - skipped : 0;
}

/* n / d rounded up. */
__device__ __forceinline__ uint32_t parts_of(uint32_t n, uint32_t d)
{
    return (n + d - 1) / d;
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t x)
{
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* Work of a pair, in tiles of 32 rows in planes. None is without: its part says that it reads nothing. */
__device__ __forceinline__ uint32_t units_of(const planes_call &a, uint32_t pair)
{
    return max(parts_of(plane_groups_of(a, pair), 4) + parts_of(a.layer.n_whole + own_rows_of(a, pair), 8), 1u);
}

/* By one warp: prefix[p], stretches before pair p, with the fewest units of a stretch that make not more than wanted. */
__device__ void cut(const planes_call &a, uint32_t *prefix)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, n = a.n_pairs;
    uint32_t total = 0;
    for (uint32_t p = lane; p < n; p += SQZ_WARP) {
        const uint32_t units = units_of(a, p);
        prefix[p] = units;
        total += units;
    }
    total = warp_sum(total);
    const uint32_t wanted = max(a.n_target, n);
    uint32_t low = max(parts_of(total, wanted), 1u), high = max(wanted > n ? total / (wanted - n) + 1 : total, low);
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        uint32_t stretches = 0;
        for (uint32_t p = lane; p < n; p += SQZ_WARP) stretches += parts_of(prefix[p], middle);
        if (warp_sum(stretches) <= wanted) high = middle;
        else low = middle + 1;
    }
    __syncwarp();
    uint32_t before = 0;
    for (uint32_t from = 0; from < n; from += SQZ_WARP) {
        const uint32_t p = from + lane, mine = p < n ? parts_of(prefix[p], low) : 0;
        uint32_t inclusive = mine;
#pragma unroll
        for (int step = 1; step < SQZ_WARP; step *= 2) {
            const uint32_t x = __shfl_up_sync(~0u, inclusive, step);
            if ((int)lane >= step) inclusive += x;
        }
        if (p < n) prefix[p] = before + inclusive - mine;
        before += __shfl_sync(~0u, inclusive, 31);
    }
    if (lane == 0) prefix[n] = before;
}

/* Share i of n of `count`. */
__device__ __forceinline__ uint32_t share_of(uint32_t count, uint32_t i, uint32_t n)
{
    return (uint32_t)((uint64_t)count * i / n);
}

/* ---- Queries ------------------------------------------------------------------------------- */

/* Sequence and head of query row r of a pair. */
__device__ __forceinline__ size_t query_row_of(const planes_call &a, uint32_t pair, uint32_t r)
{
    const uint32_t group = a.n_head / a.layer.n_head_kv;
    if (a.together) return (size_t)(r / group) * a.n_head + pair * group + r % group;
    return (size_t)pair * group + r;
}

/* Rounds the D numbers of a warp to 16 bits; returns what they are to be multiplied by, and their sum. */
template <int D>
__device__ __forceinline__ float round_row(const float (&x)[D / 32], int8_t *upper, int8_t *lower, float *sum)
{
    const int lane = threadIdx.x % SQZ_WARP;
    float largest = 0, total = 0;
#pragma unroll
    for (int j = 0; j < D / 32; j++) largest = fmaxf(largest, fabsf(x[j]));
#pragma unroll
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float most = 32512, inverse = largest > 0 ? most / largest : 0.0f; /* 127 * 256 */
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        const int n = max(-32512, min(32512, __float2int_rn(x[j] * inverse))), high = (n + 128) >> 8;
        upper[lane + 32 * j] = (int8_t)high;
        lower[lane + 32 * j] = (int8_t)(n - 256 * high);
        total += (float)n;
    }
    *sum = warp_total(total);
    return largest / most;
}

template <int D, bool BOTH, int R>
__device__ void load_queries(block_memory<D, BOTH, R> *m, const planes_call &a, uint32_t pair, uint32_t first_row,
                             uint32_t n_rows)
{
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    const uint32_t head = a.together ? pair : pair % a.layer.n_head_kv;
    const float scale = a.scale * SQZ_LOG2E;
#pragma unroll 1
    for (int r = warp; r < R; r += WARPS) {
        float x[D / 32], mean = 0, sum;
        const __half *q = (const __half *)a.queries + query_row_of(a, pair, first_row + r) * D;
#pragma unroll
        for (int j = 0; j < D / 32; j++) x[j] = r < n_rows ? __half2float(q[lane + 32 * j]) : 0.0f;
        if (a.layer.centroids.type == SQZ_ROW_I8) {
#pragma unroll
            for (int j = 0; j < D / 32; j++) mean += x[j] * a.layer.centroids.mean[(size_t)head * D + lane + 32 * j];
            mean = warp_total(mean);
        }
        const float plain = round_row<D>(x, m->queries.plain[0][r], m->queries.plain[1][r], &sum) * scale;
        sqz_turn_warp<D>(x);
        const float factor =
            round_row<D>(x, m->queries.turned[0][r], m->queries.turned[1][r], &sum) * scale * (BOTH ? 0.0625f : 1.0f);
        if (lane) continue;
        m->queries.plain_factor[r] = plain;
        m->queries.mean_logit[r] = mean * scale;
        m->queries.factor[r] = factor;
        m->queries.middle[r] = factor * sum * (BOTH ? 127.5f : 7.5f);
    }
}

/* ---- Clusters of a chunk --------------------------------------------------------------------- */

/* Group number i behind those in no plane. */
__device__ __forceinline__ uint32_t group_at(const planes_call &a, const uint32_t *list, uint32_t i)
{
    return list ? list[i] : i + skipped_groups(a);
}

/* Logits of clusters [at, at + 16) of the chunk whose INT8 centroids and scales are in `from`. */
template <int D, bool BOTH, int R>
__device__ __forceinline__ void base_of_bytes(block_memory<D, BOTH, R> *m, const uint8_t *from, int at)
{
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    float(*base)[R] = m->base[threadIdx.x / SQZ_WARP];
    const float *scale = (const float *)(from + ring_of<D, BOTH>::STEPS) + at + g;
    uint4 rows[2][D / 64];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int j = 0; j < D / 64; j++) {
            const int row = at + g + 8 * half, chunk = swizzled_centroid<D>(t * (D / 64) + j, row);
            rows[half][j] = *(const uint4 *)(from + row * D + 16 * chunk);
        }
#pragma unroll
    for (int q = 0; q < R / 4; q++) {
        int sum[4] = {0, 0, 0, 0};
        const int8_t *query = m->queries.plain[g % 2][4 * q + g / 2] + t * (D / 4);
#pragma unroll
        for (int j = 0; j < D / 64; j++) {
            const uint4 b = *(const uint4 *)(query + 16 * j);
            product_s8(sum, rows[0][j].x, rows[1][j].x, rows[0][j].y, rows[1][j].y, b.x, b.y);
            product_s8(sum, rows[0][j].z, rows[1][j].z, rows[0][j].w, rows[1][j].w, b.z, b.w);
        }
        const float factor = m->queries.plain_factor[4 * q + t], mean = m->queries.mean_logit[4 * q + t];
        base[at + g][4 * q + t] = scale[0] * factor * (float)(256 * sum[0] + sum[1]) + mean;
        base[at + g + 8][4 * q + t] = scale[8] * factor * (float)(256 * sum[2] + sum[3]) + mean;
    }
}

/* The same of F16 centroids, whose numbers are there. */
template <int D, bool BOTH, int R>
__device__ __forceinline__ void base_of_halves(block_memory<D, BOTH, R> *m, const planes_call &a,
                                               const __half *centroids, uint32_t pair, uint32_t first_row,
                                               uint32_t n_rows, const uint8_t *from, int at)
{
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    float(*base)[R] = m->base[threadIdx.x / SQZ_WARP];
    const uint32_t *number = (const uint32_t *)(from + ring_of<D, BOTH>::STEPS) + at + g;
    const __half *low_row = centroids + (size_t)number[0] * D, *high_row = centroids + (size_t)number[8] * D;
    float sum[(R + 7) / 8][4];
#pragma unroll
    for (int q = 0; q < (R + 7) / 8; q++) sum[q][0] = sum[q][1] = sum[q][2] = sum[q][3] = 0;
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        const uint4 x = *(const uint4 *)(low_row + 8 * (t + 4 * j)), y = *(const uint4 *)(high_row + 8 * (t + 4 * j));
#pragma unroll
        for (int q = 0; q < (R + 7) / 8; q++) {
            const uint32_t row = first_row + 8 * q + g;
            uint4 b = make_uint4(0, 0, 0, 0);
            if (8 * q + g < n_rows)
                b = *(const uint4 *)((const __half *)a.queries + query_row_of(a, pair, row) * D + 8 * (t + 4 * j));
            sqz_mma_chunk<sqz_f16>(sum[q], x, y, b);
        }
    }
    const float factor = a.scale * SQZ_LOG2E;
#pragma unroll
    for (int q = 0; q < (R + 7) / 8; q++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int row = 8 * q + 2 * t + e;
            if (row >= R) continue;
            base[at + g][row] = sum[q][e] * factor;
            base[at + g + 8][row] = sum[q][2 + e] * factor;
        }
}

/* ---- Rows in planes --------------------------------------------------------------------------- */

/* State of a warp. Lane 4 g + t has logits of query rows 4 q + t with rows g and g + 8 of 16, and of the output products
 * of numbers with query rows 8 n + 2t and 8 n + 2t + 1. */
template <int D, int R> struct plane_state {
    enum { N = (R + 7) / 8, NUMBERS = D / 16 };
    float maximum[R / 4], sum[R / 4], scaled[R / 4]; /* sum: of weights, scaled: of weights times steps */
    float out[N][NUMBERS][4];

    __device__ __forceinline__ void reset()
    {
#pragma unroll
        for (int q = 0; q < R / 4; q++) maximum[q] = -INFINITY, sum[q] = scaled[q] = 0;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < NUMBERS; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[n][i][e] = 0;
    }

    /* Logits become weights. */
    template <int M> __device__ __forceinline__ void weigh(float (&y)[R / 4][2 * M])
    {
        bool above = false;
#pragma unroll
        for (int q = 0; q < R / 4; q++)
#pragma unroll
            for (int i = 0; i < 2 * M; i++) above |= y[q][i] > maximum[q] + SLACK;
        if (__any_sync(~0u, above)) raise<M>(y);
#pragma unroll
        for (int q = 0; q < R / 4; q++) {
            const float base = maximum[q] == -INFINITY ? 0.0f : maximum[q];
#pragma unroll
            for (int i = 0; i < 2 * M; i++) {
                y[q][i] = sqz_exp2(y[q][i] - base);
                sum[q] += y[q][i];
            }
        }
    }

    template <int M> __device__ __forceinline__ void raise(const float (&y)[R / 4][2 * M])
    {
        const int t = threadIdx.x % 4;
        float factor[R / 4];
#pragma unroll
        for (int q = 0; q < R / 4; q++) {
            float largest = y[q][0];
#pragma unroll
            for (int i = 1; i < 2 * M; i++) largest = fmaxf(largest, y[q][i]);
#pragma unroll
            for (int step = 4; step < SQZ_WARP; step *= 2)
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
            const float raised = fmaxf(maximum[q], largest);
            factor[q] = sqz_softmax_factor(maximum[q], raised);
            maximum[q] = raised;
            sum[q] *= factor[q];
            scaled[q] *= factor[q];
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            float f[2]; /* of query rows 8 n + 2t and the next: in blocks 2 n + t / 2 of four */
#pragma unroll
            for (int e = 0; e < 2; e++) {
                f[e] = __shfl_sync(~0u, factor[2 * n], (2 * t + e) % 4);
                if (2 * n + 1 < R / 4) {
                    const float other = __shfl_sync(~0u, factor[(2 * n + 1) % (R / 4)], (2 * t + e) % 4);
                    if (t >= 2) f[e] = other;
                }
            }
#pragma unroll
            for (int i = 0; i < NUMBERS; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) out[n][i][e] *= f[e % 2];
        }
    }
};

template <int D, bool BOTH, int R> struct plane_reader {
    typedef ring_of<D, BOTH> ring;
    block_memory<D, BOTH, R> *memory;
    plane_source source;
    const uint32_t *list;
    const planes_call *a;
    uint32_t end; /* where the warp's groups end */
    /* The chunk that is being brought: groups [first, first + n) of the list, of which `brought` are on their way. */
    uint32_t first, n, brought, n_slots;
    uint32_t group, entry;           /* lane l: of group l */
    uint32_t next_group, next_place; /* the same of the groups behind it */

    __device__ __forceinline__ uint8_t *stage(uint32_t i) const
    {
        return memory->ring + (threadIdx.x / SQZ_WARP * STAGES + i) * ring::STAGE;
    }

    __device__ __forceinline__ void look_groups(uint32_t from)
    {
        const uint32_t i = from + threadIdx.x % SQZ_WARP;
        next_group = i < end ? group_at(*a, list, i) : NO_GROUP;
    }
    __device__ __forceinline__ void look_places()
    {
        next_place = next_group == NO_GROUP ? 0
                     : source.place         ? source.place[next_group]
                                            : next_group / (SQZ_CUDA_USER_BLOCK / SQZ_GROUP_ROWS) << 8;
    }

    /* For the warp's groups [from, until) of the list. */
    __device__ __forceinline__ void begin(uint32_t from, uint32_t until)
    {
        first = from, end = until, n = brought = 0;
        look_groups(from);
        look_places();
    }

    /* Begins to bring the next item: a chunk's centroids, or a tile; nothing behind the last. */
    __device__ __forceinline__ void bring(uint8_t *to)
    {
        if (brought < n) {
            bring_tile(to);
            if (brought == 0) look_places(); /* of groups that have been looked up since */
            brought += ring::GROUPS;
        } else if (first + n < end) bring_centroids(to);
        copies_commit();
    }

    __device__ __forceinline__ void bring_centroids(uint8_t *to)
    {
        const int lane = threadIdx.x % SQZ_WARP;
        first += n;
        group = next_group;
        const uint32_t starts = next_place & 0xff, cluster = next_place >> 8, row = group * SQZ_GROUP_ROWS;
        const bool in = group != NO_GROUP;
        const uint32_t before = __shfl_up_sync(~0u, cluster + __popc(starts), 1);
        const uint32_t shared = lane && before == cluster, n_new = in ? 1 + __popc(starts) - shared : 0;
        uint32_t inclusive = n_new;
#pragma unroll
        for (int step = 1; step < SQZ_WARP; step *= 2) {
            const uint32_t x = __shfl_up_sync(~0u, inclusive, step);
            if (lane >= step) inclusive += x;
        }
        /* A tile's groups always fit: 8 clusters a group. */
        n = __popc(__ballot_sync(~0u, in && inclusive <= CHUNK));
        if (first + n < end) n = n / ring::GROUPS * ring::GROUPS;
        n_slots = __shfl_sync(~0u, inclusive, n - 1);
        brought = 0;
        const uint32_t slot = inclusive - n_new - shared;
        uint32_t *number = (uint32_t *)(to + ring::STEPS);
        number[lane] = 0;
        entry = 0;
        __syncwarp();
        if (lane < n) {
            const uint32_t from = row < a->layer.n_whole ? min(a->layer.n_whole - row, 8u) : 0;
            const uint32_t until = min(a->layer.n_rows - row, 8u);
            entry = slot << 16 | ((0xffu << from) & (0xffu >> (8 - until)) & 0xff) << 8 | starts;
            for (uint32_t j = shared; j < n_new + shared; j++) number[slot + j] = cluster + j;
        }
        __syncwarp();
        look_groups(first + n);
        if (!source.bytes) return;
        const uint32_t mine = number[lane];
        enum { CHUNKS = D / 16, ROWS = SQZ_WARP / CHUNKS };
#pragma unroll 2
        for (int i = 0; i < n_slots; i += ROWS) {
            const int at = i + lane / CHUNKS, chunk = lane % CHUNKS;
            const uint32_t c = __shfl_sync(~0u, mine, at);
            copy_16(to + at * D + 16 * swizzled_centroid<D>(chunk, at), source.bytes + (size_t)c * D + 16 * chunk,
                    at < n_slots);
        }
        __syncwarp(); /* all have read their numbers */
        copy_4(number + lane, source.centroid_scale + mine, lane < n_slots);
    }

    __device__ __forceinline__ void bring_tile(uint8_t *to) const
    {
        const int lane = threadIdx.x % SQZ_WARP;
        enum { CHUNKS = ring::CHUNKS, ROWS = SQZ_WARP / CHUNKS };
#pragma unroll
        for (int i = 0; i < ring::TILE / ROWS; i++) {
            const int row = i * ROWS + lane / CHUNKS, chunk = lane % CHUNKS;
            const uint32_t of = __shfl_sync(~0u, group, brought + row / SQZ_GROUP_ROWS);
            const uint32_t local = of * SQZ_GROUP_ROWS + row % SQZ_GROUP_ROWS - a->layer.n_whole;
            const bool exists = local < source.n_planes;
            const uint32_t from = exists ? local * ring::ROW + 16 * chunk : 0;
            uint8_t *at = to + row * ring::ROW + 16 * swizzled<ring::ROW>(chunk, row);
#pragma unroll
            for (int p = 0; p < ring::PLANES; p++) {
                copy_16(at + p * ring::PLANE, source.keys[p] + from, exists);
                copy_16(at + (ring::PLANES + p) * ring::PLANE, source.values[p] + from, exists);
            }
        }
        const int row = lane % ring::TILE;
        const uint32_t of = __shfl_sync(~0u, group, brought + row / SQZ_GROUP_ROWS);
        const uint32_t local = of * SQZ_GROUP_ROWS + row % SQZ_GROUP_ROWS - a->layer.n_whole;
        if (lane < ring::TILE)
            copy_4(to + ring::STEPS + 4 * row, source.steps + (local < source.n_planes ? local : 0),
                   local < source.n_planes);
    }

    /* Lane t has bytes [t * ROW / 4, (t + 1) * ROW / 4) of rows g and g + 8 of 16 of keys; logits without their steps. */
    __device__ __forceinline__ void multiply(int (&sum)[R / 4][4], const uint8_t *from,
                                             const uint32_t (&query)[R / 4][ring::WORDS][2]) const
    {
        enum { Q = R / 4, WORDS = ring::WORDS };
        const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int q = 0; q < Q; q++) sum[q][0] = sum[q][1] = sum[q][2] = sum[q][3] = 0;
#pragma unroll
        for (int p = 0; p < ring::PLANES; p++) {
            const uint8_t *row =
                from + p * ring::PLANE + g * ring::ROW + 16 * swizzled<ring::ROW>(t * WORDS / 4, g) + t * WORDS % 4 * 4;
            uint32_t low[WORDS], high[WORDS];
            if (WORDS == 4) {
                const uint4 x = *(const uint4 *)row, y = *(const uint4 *)(row + 8 * ring::ROW);
                low[0] = x.x, low[1] = x.y, low[WORDS - 2] = x.z, low[WORDS - 1] = x.w;
                high[0] = y.x, high[1] = y.y, high[WORDS - 2] = y.z, high[WORDS - 1] = y.w;
            } else {
                const uint2 x = *(const uint2 *)row, y = *(const uint2 *)(row + 8 * ring::ROW);
                low[0] = x.x, low[1] = x.y;
                high[0] = y.x, high[1] = y.y;
            }
            if (p)
#pragma unroll
                for (int q = 0; q < Q; q++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[q][i] *= 16;
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                const uint32_t mask = 0x0f0f0f0f, a0 = low[i] & mask, a1 = high[i] & mask, a2 = low[i] >> 4 & mask,
                               a3 = high[i] >> 4 & mask;
#pragma unroll
                for (int q = 0; q < Q; q++) product_u8(sum[q], a0, a1, a2, a3, query[q][i][0], query[q][i][1]);
            }
        }
    }

    /* Adds 16 rows' values, from `from` on, by their weights. */
    __device__ __forceinline__ void add_values(plane_state<D, R> &state, const uint8_t *from,
                                               const uint32_t (&weight)[plane_state<D, R>::N][2]) const
    {
        const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int p = 0; p < ring::PLANES; p++) {
            uint32_t b[plane_state<D, R>::N][2];
#pragma unroll
            for (int n = 0; n < plane_state<D, R>::N; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    b[n][i] = weight[n][i];
                    if (BOTH && p == 0) {
                        __half2 h;
                        memcpy(&h, &b[n][i], sizeof h);
                        h = __hmul2(h, __half2half2(__ushort_as_half(0x4c00))); /* 16 */
                        memcpy(&b[n][i], &h, sizeof h);
                    }
                }
            const uint8_t *base = from + p * ring::PLANE;
            uint32_t x[4][ring::NUMBERS / 4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = t + 4 * i;
                if (ring::NUMBERS == 8) {
                    const uint2 v =
                        *(const uint2 *)(base + row * ring::ROW + 16 * swizzled<ring::ROW>(g / 2, row) + g % 2 * 8);
                    x[i][0] = v.x, x[i][ring::NUMBERS / 4 - 1] = v.y;
                } else x[i][0] = *(const uint32_t *)(base + row * ring::ROW + 4 * g);
            }
#pragma unroll
            for (int w = 0; w < ring::NUMBERS / 4; w++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const unsigned select = h ? 0x7632 : 0x5410;
                    uint32_t one = __byte_perm(x[0][w], x[1][w], select), two = __byte_perm(x[2][w], x[3][w], select);
#pragma unroll
                    for (int byte = 0; byte < 2; byte++) {
                        if (byte) one >>= 8, two >>= 8;
#pragma unroll
                        for (int n = 0; n < plane_state<D, R>::N; n++)
                            sqz_mma<sqz_f16>(state.out[n][4 * w + 2 * h + byte], one & LOW_HALF, one & HIGH_HALF,
                                             two & LOW_HALF, two & HIGH_HALF, b[n][0], b[n][1]);
                    }
                }
        }
    }

    /* The tile in `from`, whose groups have entries `at`. */
    __device__ __forceinline__ void add(plane_state<D, R> &state, const uint8_t *from, const uint32_t *at,
                                        const uint32_t (&query)[R / 4][ring::WORDS][2], const float (&factor)[R / 4],
                                        const float (&middle)[R / 4]) const
    {
        enum { Q = R / 4, M = ring::TILE / 16, N = plane_state<D, R>::N };
        const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
        const float(*base)[R] = memory->base[threadIdx.x / SQZ_WARP];
        float y[Q][2 * M], value_step[2 * M];
#pragma unroll
        for (int m = 0; m < M; m++) {
            int sum[Q][4];
            multiply(sum, from + 16 * m * ring::ROW, query);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = 2 * m + half;
                const uint32_t entry = at[i], slot = (entry >> 16) + __popc(entry & ((2u << g) - 1) & 0xff);
                const uint32_t step = *(const uint32_t *)(from + ring::STEPS + 4 * (g + 8 * i));
                const float2 both = sqz_f16::unpack(step);
                const bool exists = entry >> (8 + g) & 1;
                value_step[i] = both.y;
#pragma unroll
                for (int q = 0; q < Q; q++) {
                    const float product = (float)(256 * sum[q][2 * half] + sum[q][2 * half + 1]);
                    const float logit = both.x * (factor[q] * product - middle[q]) + base[slot][4 * q + t];
                    y[q][i] = exists ? logit : -INFINITY;
                }
            }
        }
        state.template weigh<M>(y);
#pragma unroll
        for (int m = 0; m < M; m++) {
            /* Weights of rows t, t + 4 and t + 8, t + 12 of query row g, from the lanes that have them. */
            uint32_t weight[N][2];
#pragma unroll
            for (int q = 0; q < Q; q++) {
                const uint32_t mine =
                    sqz_f16::pack(y[q][2 * m] * value_step[2 * m], y[q][2 * m + 1] * value_step[2 * m + 1]);
                const float2 rounded = sqz_f16::unpack(mine);
                state.scaled[q] += rounded.x + rounded.y;
                const uint32_t near = __shfl_sync(~0u, mine, 4 * t + g % 4),
                               far = __shfl_sync(~0u, mine, 16 + 4 * t + g % 4);
                const uint32_t b0 = __byte_perm(near, far, 0x5410), b1 = __byte_perm(near, far, 0x7632);
                if (q % 2 == 0 || g >= 4) weight[q / 2][0] = b0, weight[q / 2][1] = b1;
            }
            add_values(state, from + ring::PLANES * ring::PLANE + 16 * m * ring::ROW, weight);
        }
    }
};

/* Stores a warp's state where the block merges: outputs turned, [row][number]. */
template <int D, bool BOTH, int R>
__device__ __forceinline__ void store_state(block_memory<D, BOTH, R> *m, plane_state<D, R> &state)
{
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int q = 0; q < R / 4; q++) {
#pragma unroll
        for (int step = 4; step < SQZ_WARP; step *= 2) {
            state.sum[q] += __shfl_xor_sync(~0u, state.sum[q], step);
            state.scaled[q] += __shfl_xor_sync(~0u, state.scaled[q], step);
        }
        if (g) continue;
        m->state.maximum[warp][4 * q + t] = state.maximum[q];
        m->state.sum[warp][4 * q + t] = state.sum[q];
        m->state.scaled[warp][4 * q + t] = state.scaled[q];
    }
#pragma unroll
    for (int n = 0; n < plane_state<D, R>::N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int row = 8 * n + 2 * t + e;
            if (row >= R) continue;
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                float *to = m->state.out[warp][row] + sqz_plane_number(D / 16 * g + i);
                to[0] = state.out[n][i][e] * 16777216.0f;
                to[16] = state.out[n][i][2 + e] * 1048576.0f;
            }
        }
}

/* Merges the warps' states and writes part `slot`. All threads. */
template <int D, bool BOTH, int R>
__device__ void store_part(block_memory<D, BOTH, R> *m, const planes_call &a, size_t slot, uint32_t pair, uint32_t head,
                           uint32_t first_row, uint32_t n_rows)
{
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    __syncthreads();
#pragma unroll 1
    for (uint32_t r = warp; r < n_rows; r += WARPS) {
        float maximum = -INFINITY, sum = 0, scaled = 0, x[D / 32];
#pragma unroll
        for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, m->state.maximum[w][r]);
#pragma unroll
        for (int j = 0; j < D / 32; j++) x[j] = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = sqz_softmax_factor(m->state.maximum[w][r], maximum);
            sum += m->state.sum[w][r] * factor;
            scaled += m->state.scaled[w][r] * factor;
#pragma unroll
            for (int j = 0; j < D / 32; j++) x[j] += m->state.out[w][r][lane + 32 * j] * factor;
        }
        const float unit = (sum > 0 ? *source_of<D, BOTH>(a, pair, head).value_unit : 0.0f) * (BOTH ? 0.0625f : 1.0f);
#pragma unroll
        for (int j = 0; j < D / 32; j++) x[j] = (x[j] - (BOTH ? 127.5f : 7.5f) * scaled) * unit;
        sqz_turn_warp<D>(x);
#pragma unroll
        for (int j = 0; j < D / 32; j++) x[j] += sum * a.layer.value_mean[(size_t)head * D + lane + 32 * j];
        const size_t to = slot * a.n_query_rows + first_row + r;
        if (lane == 0) a.parts[to] = {maximum, sum};
#pragma unroll
        for (int j = 0; j < D / 32; j++) a.part_out[to * D + lane + 32 * j] = x[j];
    }
}

/* Adds F16 rows [first, end) of those that are in no plane and, behind them, the user's, to a warp's empty state, as if
 * they were in planes: turned, relative to the mean, in units of steps. scratch: 4 D floats of the warp. */
template <int D, bool BOTH, int R>
__device__ __forceinline__ void add_whole(const planes_call &a, uint32_t pair, uint32_t head, uint32_t first_row,
                                          uint32_t n_rows, uint32_t first, uint32_t end, plane_state<D, R> &state,
                                          float *scratch)
{
    enum { EACH = D / 32, ROWS = 2 };
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const uint32_t n_whole = a.layer.n_whole, sequence = a.together ? 0 : pair / a.layer.n_head_kv;
    const sqz_cuda_user *own = a.n_user && a.users && !a.together ? a.users + sequence : NULL;
    const size_t user_at = (own ? (size_t)head * own->capacity_rows : (size_t)pair * a.user_capacity_rows) * D;
    const __half *whole_keys = (const __half *)a.layer.keys.whole + (size_t)head * n_whole * D;
    const __half *whole_values = (const __half *)a.layer.values.whole + (size_t)head * n_whole * D;
    const __half *user_keys = (const __half *)(own ? own->keys : a.user_keys) + user_at;
    const __half *user_values = (const __half *)(own ? own->values : a.user_values) + user_at;
    const float inverse = (BOTH ? 16.0f : 1.0f) / a.layer.value_unit[head];
#pragma unroll
    for (int q = 0; q < R / 4; q++) {
        float query[4][EACH], out[4][EACH], maximum[4], sum[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const bool is = 4 * q + r < n_rows;
            const __half *from =
                (const __half *)a.queries + query_row_of(a, pair, first_row + (is ? 4 * q + r : 0)) * D + lane;
            maximum[r] = -INFINITY, sum[r] = 0;
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                query[r][j] = is ? __half2float(from[32 * j]) * (a.scale * SQZ_LOG2E) : 0.0f;
                out[r][j] = 0;
            }
        }
#pragma unroll 1
        for (uint32_t row = first; row < end; row += ROWS) {
            float key[ROWS][EACH], value[ROWS][EACH];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const uint32_t at = min(row + i, end - 1);
                const bool user = at >= n_whole;
                const size_t from = (size_t)(user ? at - n_whole : at) * D + lane;
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    key[i][j] = __half2float((user ? user_keys : whole_keys)[from + 32 * j]);
                    value[i][j] = __half2float((user ? user_values : whole_values)[from + 32 * j]);
                }
            }
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float y[ROWS], largest = maximum[r];
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    y[i] = 0;
#pragma unroll
                    for (int j = 0; j < EACH; j++) y[i] += query[r][j] * key[i][j];
                    y[i] = warp_total(y[i]);
                    if (row + i >= end) y[i] = -INFINITY;
                    largest = fmaxf(largest, y[i]);
                }
                const float factor = sqz_softmax_factor(maximum[r], largest);
                maximum[r] = largest;
                sum[r] *= factor;
#pragma unroll
                for (int j = 0; j < EACH; j++) out[r][j] *= factor;
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    const float w = largest == -INFINITY ? 0.0f : sqz_exp2(y[i] - largest);
                    sum[r] += w;
#pragma unroll
                    for (int j = 0; j < EACH; j++) out[r][j] += w * value[i][j];
                }
            }
        }
        __syncwarp(); /* of the four query rows before, all is read */
#pragma unroll
        for (int r = 0; r < 4; r++) {
#pragma unroll
            for (int j = 0; j < EACH; j++)
                out[r][j] = (out[r][j] - sum[r] * a.layer.value_mean[(size_t)head * D + lane + 32 * j]) * inverse;
            sqz_turn_warp<D>(out[r]);
#pragma unroll
            for (int j = 0; j < EACH; j++) scratch[r * D + lane + 32 * j] = out[r][j];
            if (t == r) state.maximum[q] = maximum[r], state.sum[q] = g == 0 ? sum[r] : 0.0f;
        }
        __syncwarp();
        if (t / 2 == q % 2)
#pragma unroll
            for (int i = 0; i < D / 16; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float *from = scratch + (2 * t + e) % 4 * D + sqz_plane_number(D / 16 * g + i);
                    state.out[q / 2][i][e] = from[0] * (1.0f / 16777216.0f);
                    state.out[q / 2][i][2 + e] = from[16] * (1.0f / 1048576.0f);
                }
    }
    __syncwarp();
}

/* wait: for the kernel before, whose work the context's rows are not. */
template <int D, bool BOTH, int R>
__device__ void read_stretch(block_memory<D, BOTH, R> *m, const planes_call &a, const stretch_of &s, uint32_t head,
                             uint32_t first_row, uint32_t n_rows, bool wait)
{
    typedef ring_of<D, BOTH> ring;
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP, g = lane / 4, t = lane % 4;
    plane_reader<D, BOTH, R> reader;
    reader.memory = m;
    reader.a = &a;
    reader.source = source_of<D, BOTH>(a, s.pair, head);
    reader.list = a.groups ? a.groups + (size_t)s.pair * a.group_capacity + skipped_groups(a) : NULL;
    const uint32_t n_tiles = parts_of(s.end - s.first, ring::GROUPS);
    const uint32_t from = s.first + share_of(n_tiles, warp, WARPS) * ring::GROUPS;
    const uint32_t until = min(s.first + share_of(n_tiles, warp + 1, WARPS) * ring::GROUPS, s.end);
    static_assert(STAGES == 3,
                  "an item is begun two before it is read: what the reader knows is of the chunk read next");
    reader.begin(from, until);
    reader.bring(reader.stage(0));
    reader.bring(reader.stage(1));
    if (wait) sqz_wait_for_previous();
    load_queries<D, BOTH, R>(m, a, s.pair, first_row, n_rows);
    plane_state<D, R> state;
    state.reset();
    const uint32_t n_whole = s.whole_end - s.whole;
    const uint32_t whole = s.whole + share_of(n_whole, warp, WARPS),
                   whole_end = s.whole + share_of(n_whole, warp + 1, WARPS);
    if (whole < whole_end)
        add_whole<D, BOTH, R>(a, s.pair, head, first_row, n_rows, whole, whole_end, state, (float *)reader.stage(2));
    __syncthreads(); /* queries are there */
    uint32_t query[R / 4][ring::WORDS][2];
    float factor[R / 4], middle[R / 4];
#pragma unroll
    for (int q = 0; q < R / 4; q++) {
        factor[q] = m->queries.factor[4 * q + t], middle[q] = m->queries.middle[4 * q + t];
#pragma unroll
        for (int i = 0; i < ring::WORDS; i++) {
            const int8_t *x = m->queries.turned[g % 2][4 * q + g / 2] + sqz_plane_number(t * ring::ROW / 4 + 4 * i);
            query[q][i][0] = *(const uint32_t *)x;
            query[q][i][1] = *(const uint32_t *)(x + 16);
        }
    }
    uint32_t stage = 0, fill = 2, at = 0, n = 0; /* groups of the chunk that were read, of all */
    for (uint32_t left = until - from; left;) {
        copies_wait<STAGES - 2>();
        __syncwarp();
        const bool begins = at >= n;
        uint32_t n_slots = 0;
        if (begins) {
            n = reader.n, at = 0, n_slots = reader.n_slots;
            m->entry[warp][lane] = reader.entry;
        }
        reader.bring(reader.stage(fill));
        if (++fill == STAGES) fill = 0;
        const uint8_t *item = reader.stage(stage);
        if (++stage == STAGES) stage = 0;
        if (begins) {
#pragma unroll 1
            for (uint32_t slot = 0; slot < n_slots; slot += 16)
                if (reader.source.bytes) base_of_bytes<D, BOTH, R>(m, item, slot);
                else base_of_halves<D, BOTH, R>(m, a, reader.source.halves, s.pair, first_row, n_rows, item, slot);
            __syncwarp();
            continue;
        }
        reader.add(state, item, m->entry[warp] + at, query, factor, middle);
        at += ring::GROUPS;
        left -= min(left, (uint32_t)ring::GROUPS);
    }
    copies_wait<0>();
    __syncthreads(); /* the ring becomes what is merged */
    store_state<D, BOTH, R>(m, state);
}

/* ---- Merging --------------------------------------------------------------------------------------- */

/* Merges a pair's parts, [first, + own), and what comes along. */
template <int D, bool BOTH, int R>
__device__ void finish_pair(block_memory<D, BOTH, R> *m, const planes_call &a, uint32_t pair, uint32_t head,
                            uint32_t first_row, uint32_t n_rows, uint32_t first, uint32_t own)
{
    enum { COLUMNS = R * D / 4, SHARES = THREADS / COLUMNS > 0 ? THREADS / COLUMNS : 1, LOADS = 8 };
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    const uint32_t n = own + a.n_tail, group = a.n_head / a.layer.n_head_kv;
    float *weight = m->weight; /* [n][R] */
    __shared__ float total[R], largest[R];
    auto place = [&](uint32_t i, uint32_t r) { /* of part i and query row r of the block */
                                               return (size_t)(first + i) * a.n_query_rows + first_row + r;
    };
    auto tail_place = [&](uint32_t i, uint32_t r) {
        return ((size_t)pair * a.n_tail + i - own) * group + first_row + r;
    };
#pragma unroll 1
    for (uint32_t r = warp; r < n_rows; r += WARPS) {
        float maximum = -INFINITY, sum = 0;
        for (uint32_t i = lane; i < n; i += SQZ_WARP) {
            const float2 x =
                __ldcg((const float2 *)(i < own ? a.parts + place(i, r) : a.tail_parts + tail_place(i, r)));
            maximum = fmaxf(maximum, x.y > 0 ? x.x : -INFINITY);
        }
#pragma unroll
        for (int step = 16; step; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
        for (uint32_t i = lane; i < n; i += SQZ_WARP) {
            const float2 x =
                __ldcg((const float2 *)(i < own ? a.parts + place(i, r) : a.tail_parts + tail_place(i, r)));
            const float w = x.y > 0 ? sqz_softmax_factor(x.x, maximum) : 0.0f;
            weight[i * R + r] = w;
            sum += x.y * w;
        }
        sum = warp_total(sum);
        if (lane == 0) total[r] = sum, largest[r] = maximum;
    }
    __syncthreads();
    float4 *sums = (float4 *)(weight + (size_t)n * R + (4 - n * R % 4) % 4);
#pragma unroll 1
    for (uint32_t c = threadIdx.x; c < COLUMNS * SHARES; c += THREADS) {
        const uint32_t column = c % COLUMNS, share = c / COLUMNS, r = column / (D / 4), d = column % (D / 4) * 4;
        float4 out = make_float4(0, 0, 0, 0);
        if (r < n_rows)
#pragma unroll 1
            for (uint32_t i = share; i < n; i += SHARES * LOADS) {
                float4 x[LOADS];
                float w[LOADS];
#pragma unroll
                for (int j = 0; j < LOADS; j++) {
                    const uint32_t part = i + j * SHARES;
                    w[j] = part < n ? weight[part * R + r] : 0.0f;
                    x[j] = make_float4(0, 0, 0, 0);
                    if (w[j] != 0)
                        x[j] = __ldcg((const float4 *)((part < own ? a.part_out + place(part, r) * D
                                                                   : a.tail_out + tail_place(part, r) * D) +
                                                       d));
                }
#pragma unroll
                for (int j = 0; j < LOADS; j++)
                    out.x += w[j] * x[j].x, out.y += w[j] * x[j].y, out.z += w[j] * x[j].z, out.w += w[j] * x[j].w;
            }
        if (SHARES > 1) {
            sums[c] = out;
            __syncthreads();
            if (share) continue; /* the only round */
            for (int i = 1; i < SHARES; i++) {
                const float4 x = sums[c + i * COLUMNS];
                out.x += x.x, out.y += x.y, out.z += x.z, out.w += x.w;
            }
        }
        if (r >= n_rows) continue;
        const size_t row = query_row_of(a, pair, first_row + r);
        if (a.to_parts) {
            const size_t to = (row / group * a.n_to + a.to) * group + row % group;
            *(float4 *)(a.to_out + to * D + d) = out;
            if (d == 0) a.to_parts[to] = {largest[r], total[r]};
            if (d == 0 && a.base_parts)
                a.base_parts[(row / group * a.n_base + a.n_base - 1) * group + row % group] = {largest[r], total[r]};
            continue;
        }
        const float inverse = total[r] > 0 ? 1.0f / total[r] : 0.0f;
        out.x *= inverse, out.y *= inverse, out.z *= inverse, out.w *= inverse;
        if (a.out_f32) *(float4 *)(a.out_f32 + row * D + d) = out;
        else
            *(uint2 *)((uint16_t *)a.out + row * D + d) =
                make_uint2(sqz_f16::pack(out.x, out.y), sqz_f16::pack(out.z, out.w));
        if (a.lse && d == 0) a.lse[row] = sqz_softmax_log2({largest[r], total[r]}) * SQZ_LN2;
    }
    __syncthreads();
}

template <int D, bool BOTH, int R>
__global__ void __launch_bounds__(THREADS, R > 8 ? 1 : 2) attend_planes_kernel(const __grid_constant__ planes_call a)
{
    extern __shared__ uint4 dynamic[];
    block_memory<D, BOTH, R> *m = (block_memory<D, BOTH, R> *)dynamic;
    uint32_t *prefix = (uint32_t *)(m + 1);
    const uint32_t first_row = blockIdx.y * R, n_rows = min(a.n_query_rows - first_row, (uint32_t)R);
    sqz_let_next_start();
    bool wait = !a.groups;
    if (!wait) sqz_wait_for_previous();
    if (threadIdx.x < SQZ_WARP) cut(a, prefix);
    __syncthreads();
    const uint32_t n_stretches = prefix[a.n_pairs];
#pragma unroll 1
    for (uint32_t i = blockIdx.x; i < n_stretches; i += gridDim.x) {
        const uint32_t pair = sqz_place_of(prefix, a.n_pairs, i), first = prefix[pair], n = prefix[pair + 1] - first;
        const uint32_t head = a.together ? pair : pair % a.layer.n_head_kv, groups = plane_groups_of(a, pair);
        const uint32_t tiles = parts_of(groups, ring_of<D, BOTH>::GROUPS),
                       whole = a.layer.n_whole + own_rows_of(a, pair);
        stretch_of s;
        s.pair = pair;
        s.first = share_of(tiles, i - first, n) * ring_of<D, BOTH>::GROUPS;
        s.end = min(share_of(tiles, i - first + 1, n) * ring_of<D, BOTH>::GROUPS, groups);
        s.whole = share_of(whole, i - first, n);
        s.whole_end = share_of(whole, i - first + 1, n);
        read_stretch<D, BOTH, R>(m, a, s, head, first_row, n_rows, wait);
        wait = false;
        store_part<D, BOTH, R>(m, a, i, pair, head, first_row, n_rows);
        __syncthreads();
        uint32_t *arrived = a.arrived + (size_t)pair * gridDim.y + blockIdx.y;
        if (threadIdx.x == 0) {
            __threadfence(); /* of all that the block wrote: the barrier orders it before this */
            m->last = atomicAdd(arrived, 1) == n - 1;
            if (m->last) *arrived = 0;
            __threadfence();
        }
        __syncthreads();
        if (m->last) finish_pair<D, BOTH, R>(m, a, pair, head, first_row, n_rows, first, n);
        __syncthreads();
    }
}

/* ---- Launching --------------------------------------------------------------------------------------- */

uint32_t query_rows_of(const struct sqz_cuda_attend_planes *a)
{
    const uint32_t group = a->n_head / a->layer.n_head_kv;
    return a->together ? a->n_sequences * group : group;
}

struct planes_call call_of(const struct sqz_cuda_attend_planes *a)
{
    struct planes_call c;
    memset(&c, 0, sizeof c);
    (struct sqz_cuda_attend_planes &)c = *a;
    c.n_pairs = a->together ? a->layer.n_head_kv : a->n_sequences * a->layer.n_head_kv;
    c.n_query_rows = query_rows_of(a);
    if (a->of_users) {
        c.layer.n_whole = c.n_user = 0;
        c.layer.n_rows = 0u - SQZ_GROUP_ROWS; /* every group has all its rows */
        c.layer.centroids.type = SQZ_ROW_F16;
    }
    /* Where there are more pairs than thread blocks, blocks take several stretches, in turn. */
    c.n_target = a->n_blocks;
    if (2 * c.n_pairs > a->n_blocks) c.n_target = (2 * c.n_pairs + a->n_blocks - 1) / a->n_blocks * a->n_blocks;
    return c;
}

template <int D, bool BOTH, int R> enum sqz_status launch(const struct planes_call *c, bool after_ours, void *stream)
{
    const size_t shared = sizeof(block_memory<D, BOTH, R>) + (c->n_pairs + 1) * sizeof(uint32_t);
    return sqz_launch(attend_planes_kernel<D, BOTH, R>, dim3(c->n_blocks, (c->n_query_rows + R - 1) / R), THREADS,
                      shared, 1, after_ours, *c, stream);
}

template <int D, bool BOTH> enum sqz_status launch_rows(const struct planes_call *c, bool after_ours, void *stream)
{
    if (c->n_query_rows <= 4) return launch<D, BOTH, 4>(c, after_ours, stream);
    if (c->n_query_rows <= 8) return launch<D, BOTH, 8>(c, after_ours, stream);
    return launch<D, BOTH, TOGETHER>(c, after_ours, stream);
}

} // namespace

extern "C" bool sqz_cuda_planes_supported(const struct sqz_cuda_plane_layer *l)
{
    return (l->head_dim == 64 || l->head_dim == 128) && l->n_clusters > 0 && l->n_clusters < 1u << 24 &&
           (l->centroids.type == SQZ_ROW_F16 || l->centroids.type == SQZ_ROW_I8) && l->n_whole < l->n_rows;
}

extern "C" uint32_t sqz_cuda_attend_planes_slots(const struct sqz_cuda_attend_planes *a)
{
    const struct planes_call c = call_of(a);
    return c.n_target + c.n_pairs;
}

extern "C" uint32_t sqz_cuda_attend_planes_counters(const struct sqz_cuda_attend_planes *a)
{
    const struct planes_call c = call_of(a);
    return c.n_pairs * ((c.n_query_rows + 3) / 4);
}

extern "C" enum sqz_status sqz_cuda_attend_planes_launch(const struct sqz_cuda_attend_planes *a, bool after_ours,
                                                         void *stream)
{
    const struct planes_call c = call_of(a);
    const bool both = a->layer.keys.lower && a->layer.values.lower;
    if (a->layer.head_dim == 64)
        return both ? launch_rows<64, true>(&c, after_ours, stream) : launch_rows<64, false>(&c, after_ours, stream);
    return both ? launch_rows<128, true>(&c, after_ours, stream) : launch_rows<128, false>(&c, after_ours, stream);
}
