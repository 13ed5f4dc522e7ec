/*
 * Attention of one token over rows in planes (planes.h), read as they are: 4 bits a number, or 4 + 4.
 *
 *   logit = scale q.centroid + scale step (q'.u - middle sum q')              q' the query, turned as rows are
 *   out   = sum of w mean + turned back (sum of w step (u - middle))          u the stored number
 *
 * so a row costs integer products of its 4 bits as they lie there, and the output is turned once.
 *
 * The work is cut into stretches of one pair (a sequence and key-value head), one a thread block: of groups of 8 rows
 * in planes, or of F16 rows (fixed and own ones), which are few. Of a stretch a block takes chunks of up to 256
 * groups: it finds which clusters their keys belong to and computes those clusters' logits, each once, by products of
 * 16 centroids; then each warp goes through tiles of 32 rows (16 with both planes), which copies have brought to a
 * ring of its own in shared memory while it was busy with those before.
 *
 * Keys: an integer product of 16 rows by 8 columns, which are 4 queries in 16 bits, upper and lower 8 each: exact. Bytes of a row are
 * operands with one mask, or a shift and a mask, for 4 numbers.
 * Values: a product in F16 of 16 numbers of 16 rows by up to 8 queries' weights. Of two rows' words 4 bits each, under one mask, are two
 * F16 numbers below the normal ones, times 2^-24 or, for the upper half of a byte, 2^-20: the sums are multiplied once.
 * Weights are times the row's step, which is at most 1 there. The lower plane is 16 times less, in both products.
 *
 * The block that finishes a pair's last stretch merges all of them, in their order, and what comes along.
 */
#include "planes.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / SQZ_WARP,
    STAGES = 3,
    ENTRIES = THREADS, /* groups of a chunk */
    SHARE = 32,        /* a chunk ends at a multiple of so many groups: a tile for each warp */
    FIXED_ROWS = 512,  /* F16 rows of a stretch, but */
    FIXED_PARTS = 32,  /* not more stretches of them a pair than this */
    TOGETHER = 16      /* query rows of a pass, at most */
};

#define SLACK     10.0f
#define NO_GROUP  0x1fffffffu
#define LOW_HALF  0x000f000fu /* bits 0 to 3 of two F16 numbers: times 2^-24 */
#define HIGH_HALF 0x00f000f0u /* bits 4 to 7: times 2^-20 */

struct planes_call : sqz_cuda_attend_planes {
    uint32_t n_target;    /* stretches that there are to be */
    uint32_t fixed_each;  /* F16 rows of a stretch */
    uint32_t n_pairs, n_query_rows; /* of a pair */
};

/* How rows lie in a stage of a warp's ring: keys' planes, values' planes, steps. */
template <int D, bool BOTH> struct ring_of {
    enum {
        ROW = D / 2,
        PLANES = BOTH ? 2 : 1,
        TILE = BOTH ? 16 : 32,
        GROUPS = TILE / SQZ_GROUP_ROWS,
        PLANE = TILE * ROW,
        STEPS = 2 * PLANES * PLANE,
        STAGE = STEPS + TILE * 4,
        BYTES = WARPS * STAGES * STAGE,
        WORDS = ROW / 16,   /* of a key's row in a lane */
        CHUNKS = ROW / 16,  /* of 16 bytes in a row */
        NUMBERS = D / 16    /* bytes of a value's row in a lane: products of 16 numbers */
    };
};

/* Query rows of a block: as bytes of 16-bit integers, as they are and turned, and what products are multiplied by. */
template <int D, int R> struct query_rows {
    int8_t turned[2][R][D], plain[2][R][D]; /* upper, lower 8 bits */
    float factor[R], middle[R];             /* of the turned ones, and times the sum of the numbers the middle */
    float plain_factor[R], mean_logit[R];
};

template <int D, bool BOTH, int R> struct block_memory {
    enum { SLOTS = R > 4 ? 256 : 384 }; /* clusters of a chunk's keys; at least 8 for each of SHARE groups */
    union {
        uint8_t ring[ring_of<D, BOTH>::BYTES];
        struct {
            float out[WARPS][R][D], maximum[WARPS][R], sum[WARPS][R], scaled[WARPS][R];
        } state;
        struct {
            float query[R][D];
        } fixed;
        float weight[ring_of<D, BOTH>::BYTES / 4];
    };
    float base[SLOTS][R];      /* logits of the chunk's clusters, base 2; before, the first is the cluster's number */
    uint32_t entry[ENTRIES];   /* slot of a group's first cluster << 16, rows that exist << 8, beginnings of clusters */
    query_rows<D, R> queries;
    uint32_t warp_sums[WARPS], n_slots;
    bool last;
};

/* ---- Products, copies --------------------------------------------------------------------- */

/* c += a b, 16 x 32 unsigned (centroids: signed) by 32 x 8 signed bytes; lanes as in sqz_mma(), four bytes a register. */
__device__ __forceinline__ void product_u8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                           uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void product_s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                           uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
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
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from),
                 "r"(exists ? 4 : 0)
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

__device__ __forceinline__ float warp_total(float x)
{
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* ---- Which work --------------------------------------------------------------------------- */

struct stretch_of {
    uint32_t pair, first, end; /* groups of its list behind those that are in no plane, or F16 rows */
    bool fixed;
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
    const uint32_t n = a.groups ? a.n_groups[pair] : groups_of_head(a), skipped = skipped_groups(a);
    return n > skipped ? n - skipped : 0;
}

/* n / d rounded up. */
__device__ __forceinline__ uint32_t parts_of(uint32_t n, uint32_t d)
{
    return (n + d - 1) / d;
}

/* One without rows where a pair reads nothing. */
__device__ __forceinline__ uint32_t fixed_stretches_of(const planes_call &a, uint32_t pair)
{
    const uint32_t n = parts_of(a.layer.n_whole + own_rows_of(a, pair), a.fixed_each);
    return n == 0 && plane_groups_of(a, pair) == 0 ? 1 : n;
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t x)
{
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* By one warp: prefix[p], stretches in planes before pair p; fixed[p], F16 ones behind all those; returns the most
 * groups of a stretch, a multiple of a tile for each warp: the fewest with which stretches are not more than wanted. */
__device__ uint32_t cut(const planes_call &a, uint32_t *prefix, uint32_t *fixed)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, n = a.n_pairs;
    uint32_t total = 0, n_fixed = 0;
    for (uint32_t p = lane; p < n; p += SQZ_WARP) {
        const uint32_t units = parts_of(plane_groups_of(a, p), 4);
        prefix[p] = units;
        fixed[p] = fixed_stretches_of(a, p);
        total += units, n_fixed += fixed[p];
    }
    total = warp_sum(total), n_fixed = warp_sum(n_fixed);
    const uint32_t wanted = a.n_target > n_fixed + n ? a.n_target - n_fixed : n;
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
    for (uint32_t from = 0, after = before; from < n; from += SQZ_WARP) {
        const uint32_t p = from + lane, mine = p < n ? fixed[p] : 0;
        uint32_t inclusive = mine;
#pragma unroll
        for (int step = 1; step < SQZ_WARP; step *= 2) {
            const uint32_t x = __shfl_up_sync(~0u, inclusive, step);
            if ((int)lane >= step) inclusive += x;
        }
        if (p < n) fixed[p] = after + inclusive - mine;
        after += __shfl_sync(~0u, inclusive, 31);
        if (lane == 0 && from + SQZ_WARP >= n) fixed[n] = after;
    }
    if (lane == 0) prefix[n] = before;
    return low * 4;
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
        const float factor = round_row<D>(x, m->queries.turned[0][r], m->queries.turned[1][r], &sum) * scale *
                             (BOTH ? 0.0625f : 1.0f);
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

/* The chunk of groups that begins with `first`: its entries and clusters; returns how many groups it has. */
template <int D, bool BOTH, int R>
__device__ uint32_t begin_chunk(block_memory<D, BOTH, R> *m, const planes_call &a, uint32_t head, const uint32_t *list,
                                uint32_t first, uint32_t end)
{
    const uint32_t i = threadIdx.x, n = min(end - first, (uint32_t)ENTRIES);
    const uint32_t *place = a.layer.place + (size_t)head * groups_of_head(a);
    uint32_t starts = 0, exist = 0, cluster = 0, n_new = 0, shared = 0;
    if (i < n) {
        const uint32_t group = group_at(a, list, first + i), word = place[group], row = group * SQZ_GROUP_ROWS;
        const uint32_t before = i ? place[group_at(a, list, first + i - 1)] : 0;
        starts = word & 0xff, cluster = word >> 8;
        const uint32_t from = row < a.layer.n_whole ? min(a.layer.n_whole - row, 8u) : 0, to = min(a.layer.n_rows - row, 8u);
        exist = (0xffu << from) & (0xffu >> (8 - to)) & 0xff;
        shared = i && (before >> 8) + __popc(before & 0xff) == cluster;
        n_new = 1 + __popc(starts) - shared;
    }
    uint32_t total;
    const uint32_t slot = sqz_block_scan<WARPS>(n_new, m->warp_sums, &total) - shared;
    uint32_t fit = (uint32_t)__syncthreads_count(i < n && slot + shared + n_new <= m->SLOTS);
    if (fit < n) fit = fit / SHARE * SHARE;
    if (i < fit) {
        m->entry[i] = slot << 16 | exist << 8 | starts;
        for (uint32_t j = shared; j < n_new + shared; j++) m->base[slot + j][0] = __uint_as_float(cluster + j);
        if (i == fit - 1) m->n_slots = slot + shared + n_new;
    } else m->entry[i] = 0;
    __syncthreads();
    return fit;
}

/* Logits of 16 clusters from slot `at` on, INT8. */
template <int D, bool BOTH, int R>
__device__ __forceinline__ void base_of_bytes(block_memory<D, BOTH, R> *m, const planes_call &a, uint32_t head,
                                              uint32_t at)
{
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const sqz_cuda_rows &c = a.layer.centroids;
    uint4 rows[2][D / 64];
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t slot = at + g + 8 * half;
        const size_t row = (size_t)head * a.layer.n_clusters + (slot < m->n_slots ? __float_as_uint(m->base[slot][0]) : 0);
        const uint4 *from = (const uint4 *)((const int8_t *)c.data + row * D) + t * (D / 64);
#pragma unroll
        for (int j = 0; j < D / 64; j++) rows[half][j] = slot < m->n_slots ? from[j] : make_uint4(0, 0, 0, 0);
        scale[half] = slot < m->n_slots ? c.scale[row] : 0.0f;
    }
    __syncwarp(); /* all have read their numbers */
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
        const uint32_t low = at + g, high = low + 8;
        if (low < m->SLOTS) m->base[low][4 * q + t] = scale[0] * factor * (float)(256 * sum[0] + sum[1]) + mean;
        if (high < m->SLOTS) m->base[high][4 * q + t] = scale[1] * factor * (float)(256 * sum[2] + sum[3]) + mean;
    }
}

/* The same, F16. */
template <int D, bool BOTH, int R>
__device__ __forceinline__ void base_of_halves(block_memory<D, BOTH, R> *m, const planes_call &a, uint32_t head,
                                               uint32_t pair, uint32_t first_row, uint32_t n_rows, uint32_t at)
{
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const __half *centroids = (const __half *)a.layer.centroids.data + (size_t)head * a.layer.n_clusters * D;
    const uint32_t low = at + g, high = low + 8;
    const __half *low_row = centroids + (low < m->n_slots ? (size_t)__float_as_uint(m->base[low][0]) * D : 0);
    const __half *high_row = centroids + (high < m->n_slots ? (size_t)__float_as_uint(m->base[high][0]) * D : 0);
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
    __syncwarp(); /* all have read their numbers */
#pragma unroll
    for (int q = 0; q < (R + 7) / 8; q++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int row = 8 * q + 2 * t + e;
            if (row >= R) continue;
            if (low < m->SLOTS) m->base[low][row] = sum[q][e] * factor;
            if (high < m->SLOTS) m->base[high][row] = sum[q][2 + e] * factor;
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
    __device__ __forceinline__ void weigh(float (&y)[R / 4][2])
    {
        bool above = false;
#pragma unroll
        for (int q = 0; q < R / 4; q++) above |= fmaxf(y[q][0], y[q][1]) > maximum[q] + SLACK;
        if (__any_sync(~0u, above)) raise(y);
#pragma unroll
        for (int q = 0; q < R / 4; q++) {
            const float base = maximum[q] == -INFINITY ? 0.0f : maximum[q];
            y[q][0] = sqz_exp2(y[q][0] - base);
            y[q][1] = sqz_exp2(y[q][1] - base);
            sum[q] += y[q][0] + y[q][1];
        }
    }

    __device__ __forceinline__ void raise(const float (&y)[R / 4][2])
    {
        const int t = threadIdx.x % 4;
        float factor[R / 4];
#pragma unroll
        for (int q = 0; q < R / 4; q++) {
            float largest = fmaxf(y[q][0], y[q][1]);
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
    const uint8_t *keys[2], *values[2]; /* of the head; upper, lower */
    const uint32_t *steps, *list;
    const planes_call *a;
    uint32_t n_planes, end; /* rows of a head in planes; where the stretch's groups end */
    uint32_t next;          /* the next tile's group number lane % GROUPS of the list */

    __device__ __forceinline__ uint8_t *stage(uint32_t i) const
    {
        return memory->ring + (threadIdx.x / SQZ_WARP * STAGES + i) * ring::STAGE;
    }

    /* Looks up the groups of the tile that begins with group `first` of the stretch's list. */
    __device__ __forceinline__ void look(uint32_t first)
    {
        const uint32_t i = first + threadIdx.x % SQZ_WARP % ring::GROUPS;
        next = i < end ? group_at(*a, list, i) : NO_GROUP;
    }

    /* Begins to bring the tile that look() has found. */
    __device__ __forceinline__ void bring(uint32_t to_stage)
    {
        const int lane = threadIdx.x % SQZ_WARP;
        uint8_t *to = stage(to_stage);
        enum { CHUNKS = ring::CHUNKS, ROWS = SQZ_WARP / CHUNKS };
#pragma unroll
        for (int i = 0; i < ring::TILE / ROWS; i++) {
            const int row = i * ROWS + lane / CHUNKS, chunk = lane % CHUNKS;
            const uint32_t group = __shfl_sync(~0u, next, row / SQZ_GROUP_ROWS);
            const uint32_t local = group * SQZ_GROUP_ROWS + row % SQZ_GROUP_ROWS - a->layer.n_whole;
            const bool exists = local < n_planes;
            const size_t from = exists ? (size_t)local * ring::ROW + 16 * chunk : 0;
            uint8_t *at = to + row * ring::ROW + 16 * swizzled<ring::ROW>(chunk, row);
#pragma unroll
            for (int p = 0; p < ring::PLANES; p++) {
                copy_16(at + p * ring::PLANE, keys[p] + from, exists);
                copy_16(at + (ring::PLANES + p) * ring::PLANE, values[p] + from, exists);
            }
        }
        const int row = lane % ring::TILE;
        const uint32_t group = __shfl_sync(~0u, next, row / SQZ_GROUP_ROWS);
        const uint32_t local = group * SQZ_GROUP_ROWS + row % SQZ_GROUP_ROWS - a->layer.n_whole;
        if (lane < ring::TILE) copy_4(to + ring::STEPS + 4 * row, steps + (local < n_planes ? local : 0), local < n_planes);
    }

    /* 16 rows from row `first` of the tile in `from` on, whose groups are entries at[0] and at[1]. */
    __device__ __forceinline__ void add(plane_state<D, R> &state, const uint8_t *from, int first, const uint32_t *at,
                                        const uint32_t (&query)[R / 4][ring::WORDS][2], const float (&factor)[R / 4],
                                        const float (&middle)[R / 4]) const
    {
        enum { Q = R / 4, WORDS = ring::WORDS };
        const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
        int sum[Q][4];
#pragma unroll
        for (int q = 0; q < Q; q++) sum[q][0] = sum[q][1] = sum[q][2] = sum[q][3] = 0;
#pragma unroll
        for (int p = 0; p < ring::PLANES; p++) {
            /* Lane t has bytes [t * ROW / 4, (t + 1) * ROW / 4) of rows g and g + 8. */
            const uint8_t *row = from + p * ring::PLANE + (first + g) * ring::ROW +
                                 16 * swizzled<ring::ROW>(t * WORDS / 4, g) + t * WORDS % 4 * 4;
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
        float y[Q][2], value_step[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t entry = at[half], slot = (entry >> 16) + __popc(entry & ((2u << g) - 1) & 0xff);
            const uint32_t step = *(const uint32_t *)(from + ring::STEPS + 4 * (first + g + 8 * half));
            const float2 both = sqz_f16::unpack(step);
            const bool exists = entry >> (8 + g) & 1;
            value_step[half] = both.y;
#pragma unroll
            for (int q = 0; q < Q; q++) {
                const float product = (float)(256 * sum[q][2 * half] + sum[q][2 * half + 1]);
                const float logit = both.x * (factor[q] * product - middle[q]) + memory->base[slot][4 * q + t];
                y[q][half] = exists ? logit : -INFINITY;
            }
        }
        state.weigh(y);
        /* Weights of rows t, t + 4 and t + 8, t + 12 of query row g, from the lanes that have them. */
        uint32_t weight[plane_state<D, R>::N][2];
#pragma unroll
        for (int q = 0; q < Q; q++) {
            const uint32_t mine = sqz_f16::pack(y[q][0] * value_step[0], y[q][1] * value_step[1]);
            const float2 rounded = sqz_f16::unpack(mine);
            state.scaled[q] += rounded.x + rounded.y;
            const uint32_t near = __shfl_sync(~0u, mine, 4 * t + g % 4), far = __shfl_sync(~0u, mine, 16 + 4 * t + g % 4);
            const uint32_t b0 = __byte_perm(near, far, 0x5410), b1 = __byte_perm(near, far, 0x7632);
            if (q % 2 == 0 || g >= 4) weight[q / 2][0] = b0, weight[q / 2][1] = b1;
        }
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
            const uint8_t *base = from + (ring::PLANES + p) * ring::PLANE + first * ring::ROW;
            uint32_t x[4][ring::NUMBERS / 4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = t + 4 * i;
                if (ring::NUMBERS == 8) {
                    const uint2 v = *(const uint2 *)(base + row * ring::ROW + 16 * swizzled<ring::ROW>(g / 2, row) + g % 2 * 8);
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

/* Merges the warps' states and writes part `slot`. turned: of rows in planes. All threads. */
template <int D, bool BOTH, int R>
__device__ void store_part(block_memory<D, BOTH, R> *m, const planes_call &a, size_t slot, uint32_t head,
                           uint32_t first_row, uint32_t n_rows, bool turned)
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
        if (turned) {
            const float unit = a.layer.value_unit[head] * (BOTH ? 0.0625f : 1.0f);
#pragma unroll
            for (int j = 0; j < D / 32; j++) x[j] = (x[j] - (BOTH ? 127.5f : 7.5f) * scaled) * unit;
            sqz_turn_warp<D>(x);
#pragma unroll
            for (int j = 0; j < D / 32; j++) x[j] += sum * a.layer.value_mean[(size_t)head * D + lane + 32 * j];
        }
        const size_t to = slot * a.n_query_rows + first_row + r;
        if (lane == 0) a.parts[to] = {maximum, sum};
#pragma unroll
        for (int j = 0; j < D / 32; j++) a.part_out[to * D + lane + 32 * j] = x[j];
    }
}

template <int D, bool BOTH, int R>
__device__ void read_planes(block_memory<D, BOTH, R> *m, const planes_call &a, const stretch_of &s, uint32_t head,
                            uint32_t first_row, uint32_t n_rows)
{
    typedef ring_of<D, BOTH> ring;
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP, g = lane / 4, t = lane % 4;
    const uint32_t n_planes = a.layer.n_rows - a.layer.n_whole;
    const size_t of_head = (size_t)head * n_planes;
    plane_reader<D, BOTH, R> reader;
    reader.memory = m;
    reader.a = &a;
    reader.keys[0] = a.layer.keys.upper + of_head * ring::ROW;
    reader.values[0] = a.layer.values.upper + of_head * ring::ROW;
    reader.keys[1] = BOTH ? a.layer.keys.lower + of_head * ring::ROW : NULL;
    reader.values[1] = BOTH ? a.layer.values.lower + of_head * ring::ROW : NULL;
    reader.steps = a.layer.steps + of_head;
    reader.list = a.groups ? a.groups + (size_t)s.pair * a.group_capacity + skipped_groups(a) : NULL;
    reader.n_planes = n_planes;
    reader.end = s.end;
    const uint32_t stride = WARPS * ring::GROUPS;
    uint32_t ahead = s.first + warp * ring::GROUPS; /* the tile that is brought next */
    reader.look(ahead);
    uint32_t stage = 0, fill = 0;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        reader.bring(fill++);
        copies_commit();
        reader.look(ahead += stride);
    }
    load_queries<D, BOTH, R>(m, a, s.pair, first_row, n_rows);
    uint32_t query[R / 4][ring::WORDS][2];
    float factor[R / 4], middle[R / 4];
    plane_state<D, R> state;
    state.reset();
    bool begun = false;
#pragma unroll 1
    for (uint32_t first = s.first, n; first < s.end; first += n) {
        __syncthreads(); /* queries are there; the chunk before has been read */
        if (!begun) {
            begun = true;
#pragma unroll
            for (int q = 0; q < R / 4; q++) {
                factor[q] = m->queries.factor[4 * q + t], middle[q] = m->queries.middle[4 * q + t];
#pragma unroll
                for (int i = 0; i < ring::WORDS; i++) {
                    const int8_t *from = m->queries.turned[g % 2][4 * q + g / 2] + sqz_plane_number(t * ring::ROW / 4 + 4 * i);
                    query[q][i][0] = *(const uint32_t *)from;
                    query[q][i][1] = *(const uint32_t *)(from + 16);
                }
            }
        }
        n = begin_chunk(m, a, head, reader.list, first, s.end);
#pragma unroll 1
        for (uint32_t slot = 16 * warp; slot < m->n_slots; slot += 16 * WARPS) {
            if (a.layer.centroids.type == SQZ_ROW_I8) base_of_bytes<D, BOTH, R>(m, a, head, slot);
            else base_of_halves<D, BOTH, R>(m, a, head, s.pair, first_row, n_rows, slot);
        }
        __syncthreads();
#pragma unroll 1
        for (uint32_t at = warp * ring::GROUPS; at < n; at += stride) {
            copies_wait<STAGES - 2>();
            __syncwarp();
            if (fill == STAGES) fill = 0;
            reader.bring(fill++);
            copies_commit();
            reader.look(ahead += stride);
#pragma unroll
            for (int i = 0; i < ring::TILE / 16; i++)
                reader.add(state, reader.stage(stage), 16 * i, m->entry + at + 2 * i, query, factor, middle);
            if (++stage == STAGES) stage = 0;
        }
    }
    copies_wait<0>();
    __syncthreads(); /* the ring becomes what is merged */
    store_state<D, BOTH, R>(m, state);
}

/* ---- F16 rows ------------------------------------------------------------------------------------ */

/* Rows [first, end) of those that are in no plane and, behind them, the user's. */
template <int D, bool BOTH, int R>
__device__ void read_fixed(block_memory<D, BOTH, R> *m, const planes_call &a, const stretch_of &s, uint32_t head,
                           uint32_t first_row, uint32_t n_rows)
{
    enum { EACH = D / 32, ROWS = 4 };
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    const uint32_t n_whole = a.layer.n_whole, sequence = a.together ? 0 : s.pair / a.layer.n_head_kv;
    const sqz_cuda_user *own = a.n_user && a.users && !a.together ? a.users + sequence : NULL;
    const size_t user_at = (own ? (size_t)head * own->capacity_rows : (size_t)s.pair * a.user_capacity_rows) * D;
    const __half *whole_keys = (const __half *)a.layer.keys.whole + (size_t)head * n_whole * D;
    const __half *whole_values = (const __half *)a.layer.values.whole + (size_t)head * n_whole * D;
    const __half *user_keys = (const __half *)(own ? own->keys : a.user_keys) + user_at;
    const __half *user_values = (const __half *)(own ? own->values : a.user_values) + user_at;
    const float scale = a.scale * SQZ_LOG2E;
    for (uint32_t i = threadIdx.x; i < R * D; i += THREADS) {
        const uint32_t r = i / D;
        const __half *q = (const __half *)a.queries + query_row_of(a, s.pair, first_row + r) * D;
        m->fixed.query[r][i % D] = r < n_rows ? __half2float(q[i % D]) * scale : 0.0f;
    }
    __syncthreads();
    float maximum[R], sum[R], out[R][EACH];
#pragma unroll
    for (int r = 0; r < R; r++) {
        maximum[r] = -INFINITY, sum[r] = 0;
#pragma unroll
        for (int e = 0; e < EACH; e++) out[r][e] = 0;
    }
#pragma unroll 1
    for (uint32_t row = s.first + warp * ROWS; row < s.end; row += WARPS * ROWS) {
        float key[ROWS][EACH], value[ROWS][EACH];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const uint32_t at = row + i;
            const bool user = at >= n_whole;
            const size_t from = (size_t)(user ? at - n_whole : at) * D + lane * EACH;
            uint32_t k[EACH / 2], v[EACH / 2];
#pragma unroll
            for (int e = 0; e < EACH / 2; e++) {
                k[e] = at < s.end ? ((const uint32_t *)((user ? user_keys : whole_keys) + from))[e] : 0;
                v[e] = at < s.end ? ((const uint32_t *)((user ? user_values : whole_values) + from))[e] : 0;
                const float2 x = sqz_f16::unpack(k[e]), z = sqz_f16::unpack(v[e]);
                key[i][2 * e] = x.x, key[i][2 * e + 1] = x.y;
                value[i][2 * e] = z.x, value[i][2 * e + 1] = z.y;
            }
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            float y[ROWS], largest = maximum[r];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                y[i] = 0;
#pragma unroll
                for (int e = 0; e < EACH; e++) y[i] += m->fixed.query[r][lane * EACH + e] * key[i][e];
                y[i] = warp_total(y[i]);
                if (row + i >= s.end) y[i] = -INFINITY;
                largest = fmaxf(largest, y[i]);
            }
            const float factor = sqz_softmax_factor(maximum[r], largest);
            maximum[r] = largest;
            sum[r] *= factor;
#pragma unroll
            for (int e = 0; e < EACH; e++) out[r][e] *= factor;
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const float w = largest == -INFINITY ? 0.0f : sqz_exp2(y[i] - largest);
                sum[r] += w;
#pragma unroll
                for (int e = 0; e < EACH; e++) out[r][e] += w * value[i][e];
            }
        }
    }
    __syncthreads(); /* queries become what is merged */
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (lane == 0) {
            m->state.maximum[warp][r] = maximum[r];
            m->state.sum[warp][r] = sum[r];
            m->state.scaled[warp][r] = 0;
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) m->state.out[warp][r][lane * EACH + e] = out[r][e];
    }
}

/* ---- Merging --------------------------------------------------------------------------------------- */

/* Merges a pair's parts, [first, + n) in planes and [fixed, + n_fixed) of F16 rows, and what comes along. */
template <int D, bool BOTH, int R>
__device__ void finish_pair(block_memory<D, BOTH, R> *m, const planes_call &a, uint32_t pair, uint32_t head,
                            uint32_t first_row, uint32_t n_rows, uint32_t first, uint32_t n_planes, uint32_t fixed,
                            uint32_t n_fixed)
{
    enum { COLUMNS = R * D / 4, SHARES = THREADS / COLUMNS > 0 ? THREADS / COLUMNS : 1, LOADS = 8 };
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    const uint32_t own = n_planes + n_fixed, n = own + a.n_tail, group = a.n_head / a.layer.n_head_kv;
    float *weight = m->weight; /* [n][R] */
    __shared__ float total[R], largest[R];
    auto place = [&](uint32_t i, uint32_t r) { /* of part i and query row r of the block */
        return (size_t)(i < n_planes ? first + i : fixed + i - n_planes) * a.n_query_rows + first_row + r;
    };
    auto tail_place = [&](uint32_t i, uint32_t r) { return ((size_t)pair * a.n_tail + i - own) * group + first_row + r; };
#pragma unroll 1
    for (uint32_t r = warp; r < n_rows; r += WARPS) {
        float maximum = -INFINITY, sum = 0;
        for (uint32_t i = lane; i < n; i += SQZ_WARP) {
            const float2 x = __ldcg((const float2 *)(i < own ? a.parts + place(i, r) : a.tail_parts + tail_place(i, r)));
            maximum = fmaxf(maximum, x.y > 0 ? x.x : -INFINITY);
        }
#pragma unroll
        for (int step = 16; step; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
        for (uint32_t i = lane; i < n; i += SQZ_WARP) {
            const float2 x = __ldcg((const float2 *)(i < own ? a.parts + place(i, r) : a.tail_parts + tail_place(i, r)));
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
            continue;
        }
        const float inverse = total[r] > 0 ? 1.0f / total[r] : 0.0f;
        out.x *= inverse, out.y *= inverse, out.z *= inverse, out.w *= inverse;
        if (a.out_f32) *(float4 *)(a.out_f32 + row * D + d) = out;
        else *(uint2 *)((uint16_t *)a.out + row * D + d) = make_uint2(sqz_f16::pack(out.x, out.y), sqz_f16::pack(out.z, out.w));
        if (a.lse && d == 0) a.lse[row] = sqz_softmax_log2({largest[r], total[r]}) * SQZ_LN2;
    }
    __syncthreads();
}

template <int D, bool BOTH, int R>
__global__ void __launch_bounds__(THREADS, R > 8 ? 1 : 2) attend_planes_kernel(const __grid_constant__ planes_call a)
{
    extern __shared__ uint4 dynamic[];
    block_memory<D, BOTH, R> *m = (block_memory<D, BOTH, R> *)dynamic;
    uint32_t *prefix = (uint32_t *)(m + 1), *fixed = prefix + a.n_pairs + 1;
    __shared__ uint32_t each_groups;
    const uint32_t first_row = blockIdx.y * R, n_rows = min(a.n_query_rows - first_row, (uint32_t)R);
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (threadIdx.x < SQZ_WARP) {
        const uint32_t each = cut(a, prefix, fixed);
        if (threadIdx.x == 0) each_groups = each;
    }
    __syncthreads();
    const uint32_t n_planes = prefix[a.n_pairs], n_stretches = fixed[a.n_pairs];
#pragma unroll 1
    for (uint32_t i = blockIdx.x; i < n_stretches; i += gridDim.x) {
        stretch_of s;
        s.fixed = i >= n_planes;
        s.pair = sqz_place_of(s.fixed ? fixed : prefix, a.n_pairs, i);
        const uint32_t head = a.together ? s.pair : s.pair % a.layer.n_head_kv;
        const uint32_t of_planes = prefix[s.pair + 1] - prefix[s.pair], of_fixed = fixed[s.pair + 1] - fixed[s.pair];
        if (s.fixed) {
            s.first = (i - fixed[s.pair]) * a.fixed_each;
            s.end = min(s.first + a.fixed_each, a.layer.n_whole + own_rows_of(a, s.pair));
            read_fixed<D, BOTH, R>(m, a, s, head, first_row, n_rows);
        } else {
            s.first = (i - prefix[s.pair]) * each_groups;
            s.end = min(s.first + each_groups, plane_groups_of(a, s.pair));
            read_planes<D, BOTH, R>(m, a, s, head, first_row, n_rows);
        }
        store_part<D, BOTH, R>(m, a, i, head, first_row, n_rows, !s.fixed);
        __syncthreads();
        uint32_t *arrived = a.arrived + (size_t)s.pair * gridDim.y + blockIdx.y;
        if (threadIdx.x == 0) {
            __threadfence(); /* of all that the block wrote: the barrier orders it before this */
            m->last = atomicAdd(arrived, 1) == of_planes + of_fixed - 1;
            if (m->last) *arrived = 0;
            __threadfence();
        }
        __syncthreads();
        if (m->last)
            finish_pair<D, BOTH, R>(m, a, s.pair, head, first_row, n_rows, prefix[s.pair], of_planes, fixed[s.pair], of_fixed);
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
    const uint32_t n_fixed = a->layer.n_whole + (a->together ? 0 : a->n_user);
    c.fixed_each = (n_fixed + FIXED_PARTS - 1) / FIXED_PARTS;
    if (c.fixed_each < FIXED_ROWS) c.fixed_each = FIXED_ROWS;
    /* Where there are more pairs than thread blocks, blocks take several stretches, in turn. */
    const uint32_t least = c.n_pairs * (1 + (n_fixed + c.fixed_each - 1) / c.fixed_each);
    c.n_target = a->n_blocks;
    if (2 * least > a->n_blocks) c.n_target = (2 * least + a->n_blocks - 1) / a->n_blocks * a->n_blocks;
    return c;
}

template <int D, bool BOTH, int R>
enum sqz_status launch(const struct planes_call *c, bool after_ours, void *stream)
{
    const size_t shared = sizeof(block_memory<D, BOTH, R>) + 2 * (c->n_pairs + 1) * sizeof(uint32_t);
    return sqz_launch(attend_planes_kernel<D, BOTH, R>, dim3(c->n_blocks, (c->n_query_rows + R - 1) / R), THREADS, shared,
                      1, after_ours, *c, stream);
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
    return c.n_target + c.n_pairs * (FIXED_PARTS + 1);
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
