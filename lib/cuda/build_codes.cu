/*
 * Codes of single keys, lib/codes.c on the GPU: the head's directions, their shares
 * of the bits, 16 entries a part, and the words of all keys. The steps and their
 * reasons stand there; what differs is in which order sums are taken.
 *
 * moment_kernel     second moment of the keys' differences to their centroids, 64 x 64
 *                   of it and a slice of the keys a thread block
 * directions_kernel a thread block a head: Cholesky's L of the queries' moment,
 *                   L^T S L, its eigenvectors by Jacobi's rotations, D / 2 disjoint ones
 *                   at a time; F64 but for the eigenvectors, which F32 gives to the three
 *                   digits that directions need
 * entries_kernel    a thread block a part: k-means of up to 4,096 keys' coordinates
 * words_kernel      64 keys a thread block: coordinates, nearest entries
 * Head dimensions up to 256: the matrix is in shared memory up to 128, else in L2.
 */
#include "build_layer.cuh"
#include "code_parts.h"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / SQZ_WARP,
    TILE = 64,   /* of the moment */
    SLICES = 16, /* of the keys */
    CHUNK = 16,  /* keys in shared memory at a time */
    BIG = 1024,  /* threads of directions_kernel */
    BIG_WARPS = BIG / SQZ_WARP,
    SWEEPS = 12,     /* most of Jacobi's; 6 to 8 are needed */
    SAMPLE = 4096,   /* keys that entries are found from */
    ITERATIONS = 10, /* of k-means */
    EACH = SAMPLE / THREADS,
    WORD_KEYS = 64, /* of a thread block of words_kernel */
    MAX_DIM = SQZ_BUILD_MAX_DIM,
    PARTS = SQZ_CODE_PARTS,
    ENTRIES = SQZ_CODE_ENTRIES
};

struct code_args {
    uint32_t n_rows, n_fixed, n_head, n_head_kv, head_dim, n_clusters, n_queries, n_words, n_directions, n_sample;
    const __half *keys, *queries;
    sqz_centroid_view centroids;
    const uint32_t *cluster_of, *offset;
    const float *variance;
    /* The layer's. */
    uint32_t *words, *first;
    __half *directions, *book;
    float *spread;
    /* Scratch, of each head. */
    float *moment;               /* [SLICES][D][D] */
    double *l, *product, *sum;   /* [D][D] */
    float *matrix, *vectors;     /* [D][D] */
    float *to_key, *coordinates; /* [M][D], [M][SAMPLE] */
};

__device__ __forceinline__ float difference(const code_args &a, uint32_t head, uint32_t key, uint32_t i)
{
    const uint32_t n = a.n_rows - a.n_fixed;
    const float x = __half2float(a.keys[((size_t)head * a.n_rows + a.n_fixed + key) * a.head_dim + i]);
    return x - a.centroids.number(head, a.cluster_of[(size_t)head * n + key], i);
}

/* Grid: tile of the lower triangle, head, slice. A thread has 4 x 4 of the tile. */
__global__ void __launch_bounds__(THREADS) moment_kernel(const code_args a)
{
    __shared__ float rows[CHUNK][TILE], columns[CHUNK][TILE];
    const uint32_t d = a.head_dim, n = a.n_rows - a.n_fixed, head = blockIdx.y;
    uint32_t tile_i = 0, tile_j = blockIdx.x;
    while (tile_j > tile_i) tile_j -= ++tile_i;
    const uint32_t first = (uint32_t)((uint64_t)n * blockIdx.z / SLICES),
                   last = (uint32_t)((uint64_t)n * (blockIdx.z + 1) / SLICES);
    const uint32_t y = threadIdx.x / 16 * 4, x = threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    for (uint32_t at = first; at < last; at += CHUNK) {
        for (uint32_t i = threadIdx.x; i < CHUNK * TILE; i += THREADS) {
            const uint32_t key = at + i / TILE, p = tile_i * TILE + i % TILE, q = tile_j * TILE + i % TILE;
            rows[i / TILE][i % TILE] = key < last && p < d ? difference(a, head, key, p) : 0.0f;
            columns[i / TILE][i % TILE] = key < last && q < d ? difference(a, head, key, q) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            const float4 u = *(const float4 *)&rows[k][y], v = *(const float4 *)&columns[k][x];
            const float p[4] = {u.x, u.y, u.z, u.w}, q[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] += p[i] * q[j];
        }
        __syncthreads();
    }
    float *out = a.moment + ((size_t)head * SLICES + blockIdx.z) * d * d;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            const uint32_t p = tile_i * TILE + y + i, q = tile_j * TILE + x + j;
            if (p >= d || q >= d) continue;
            out[(size_t)p * d + q] = sum[i][j];
            out[(size_t)q * d + p] = sum[i][j];
        }
}

/* ---- Directions -------------------------------------------------------------------------- */

/* Sum over the thread block; scratch: BIG_WARPS numbers, shared. */
__device__ double block_sum(double x, double *scratch)
{
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    __syncthreads();
    if (threadIdx.x % SQZ_WARP == 0) scratch[threadIdx.x / SQZ_WARP] = x;
    __syncthreads();
    double sum = 0;
    for (uint32_t w = 0; w < blockDim.x / SQZ_WARP; w++) sum += scratch[w];
    return sum;
}

/* l = second moment of the head's queries relative to its mean eigenvalue, with the floor of lib/codes.c. */
__device__ void query_moment(const code_args &a, uint32_t head, double *l, double *scratch)
{
    const uint32_t d = a.head_dim, group = a.n_head / a.n_head_kv, n = a.n_queries * group;
    double trace = 0;
    for (uint32_t e = threadIdx.x; e < d * d; e += BIG) {
        float sum = 0;
        for (uint32_t r = 0; r < n; r++) {
            const __half *row = a.queries + ((size_t)(r / group) * a.n_head + head * group + r % group) * d;
            sum += __half2float(row[e / d]) * __half2float(row[e % d]);
        }
        l[e] = (double)sum / n;
        if (e / d == e % d) trace += l[e];
    }
    const double mean = block_sum(trace, scratch) / d;
    for (uint32_t e = threadIdx.x; e < d * d; e += BIG)
        l[e] = (mean > 0 ? l[e] / mean : l[e]) + (e / d == e % d ? 0.02 : 0.0);
    __syncthreads();
}

/* l becomes its Cholesky factor, zeros above the diagonal; column by column. */
__device__ void cholesky(uint32_t d, double *l, double *column, double *scratch)
{
    double trace = 0;
    for (uint32_t i = threadIdx.x; i < d; i += BIG) trace += l[i * d + i];
    const double least = 1e-12 * block_sum(trace, scratch);
    for (uint32_t k = 0; k < d; k++) {
        const double pivot = sqrt(fmax(l[k * d + k], least));
        __syncthreads();
        for (uint32_t i = k + threadIdx.x; i < d; i += BIG) column[i] = i == k ? pivot : l[i * d + k] / pivot;
        __syncthreads();
        for (uint32_t e = threadIdx.x; e < d * d; e += BIG) {
            const uint32_t i = e / d, j = e % d;
            if (j == k) l[e] = i < k ? 0.0 : column[i];
            else if (j > k && i >= j) l[e] -= column[i] * column[j];
        }
        __syncthreads();
    }
    for (uint32_t e = threadIdx.x; e < d * d; e += BIG)
        if (e % d > e / d) l[e] = 0.0;
    __syncthreads();
}

/* matrix = L^T S L. */
__device__ void project(const code_args &a, uint32_t head, const double *l, double *product, double *s, float *matrix)
{
    const uint32_t d = a.head_dim;
    const float *parts = a.moment + (size_t)head * SLICES * d * d;
    for (uint32_t e = threadIdx.x; e < d * d; e += BIG) {
        double sum = 0;
        for (uint32_t i = 0; i < SLICES; i++) sum += parts[(size_t)i * d * d + e];
        s[e] = sum / (a.n_rows - a.n_fixed);
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < d * d; e += BIG) {
        const uint32_t i = e / d, j = e % d;
        double sum = 0;
        for (uint32_t x = j; x < d; x++) sum += s[i * d + x] * l[x * d + j];
        product[e] = sum;
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < d * d; e += BIG) {
        const uint32_t i = e / d, j = e % d;
        double sum = 0;
        for (uint32_t x = i; x < d; x++) sum += l[x * d + i] * product[x * d + j];
        matrix[e] = (float)sum;
    }
    __syncthreads();
}

/* The pair of rows that turn against each other: number i of round r, every two of d rows once in d - 1 rounds. */
__device__ __forceinline__ void pair_of(uint32_t d, uint32_t r, uint32_t i, uint32_t *p, uint32_t *q)
{
    *p = i ? (r + i) % (d - 1) : d - 1;
    *q = i ? (r + d - 1 - i) % (d - 1) : r;
}

__device__ double off_diagonal(uint32_t d, const float *a, bool whole, double *scratch)
{
    double sum = 0;
    for (uint32_t e = threadIdx.x; e < d * d; e += BIG)
        if (whole || e / d != e % d) sum += (double)a[e] * a[e];
    return block_sum(sum, scratch);
}

/* a becomes diagonal, vectors (rows) its eigenvectors. turn, pairs: [d / 2]. */
__device__ void jacobi(uint32_t d, float *a, float *vectors, float2 *turn, uint2 *pairs, double *scratch)
{
    const uint32_t half = d / 2, lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    for (uint32_t e = threadIdx.x; e < d * d; e += BIG) vectors[e] = e / d == e % d ? 1.0f : 0.0f;
    const double norm = off_diagonal(d, a, true, scratch);
    for (int sweep = 0; sweep < SWEEPS && off_diagonal(d, a, false, scratch) > 1e-11 * norm; sweep++)
        for (uint32_t r = 0; r + 1 < d; r++) {
            for (uint32_t i = threadIdx.x; i < half; i += BIG) {
                uint32_t p, q;
                pair_of(d, r, i, &p, &q);
                pairs[i] = make_uint2(p * d, q * d);
                const float apq = a[p * d + q], theta = 0.5f * (a[q * d + q] - a[p * d + p]) / apq;
                const float t = copysignf(1.0f, theta) / (fabsf(theta) + sqrtf(theta * theta + 1.0f));
                const float cosine = 1.0f / sqrtf(t * t + 1.0f);
                const bool still = (double)apq * apq <= 1e-16 * norm / d || !isfinite(theta);
                turn[i] = still ? make_float2(1.0f, 0.0f) : make_float2(cosine, t * cosine);
            }
            __syncthreads();
            /* A warp a pair of rows. */
            for (uint32_t j = lane; j < half; j += SQZ_WARP) {
                uint32_t u, v;
                pair_of(d, r, j, &u, &v);
                const float2 right = turn[j];
                for (uint32_t i = warp; i < half; i += BIG_WARPS) {
                    const float2 left = turn[i];
                    float *p = a + pairs[i].x, *q = a + pairs[i].y;
                    const float pu = p[u], pv = p[v], qu = q[u], qv = q[v];
                    const float x = left.x * pu - left.y * qu, y = left.x * pv - left.y * qv;
                    const float z = left.y * pu + left.x * qu, w = left.y * pv + left.x * qv;
                    p[u] = right.x * x - right.y * y;
                    p[v] = right.y * x + right.x * y;
                    q[u] = right.x * z - right.y * w;
                    q[v] = right.y * z + right.x * w;
                }
            }
            for (uint32_t i = warp; i < half; i += BIG_WARPS) {
                const float2 left = turn[i];
                float *p = vectors + pairs[i].x, *q = vectors + pairs[i].y;
                for (uint32_t k = lane; k < d; k += SQZ_WARP) {
                    const float x = p[k], y = q[k];
                    p[k] = left.x * x - left.y * y;
                    q[k] = left.y * x + left.x * y;
                }
            }
            __syncthreads();
        }
}

/* A warp a direction: L v for keys, and v = L^T x solved for queries. */
__device__ void write_direction(const code_args &a, uint32_t head, uint32_t i, const float *v, const double *l,
                                double *solution)
{
    const uint32_t d = a.head_dim, lane = threadIdx.x % SQZ_WARP;
    const size_t at = ((size_t)head * a.n_directions + i) * d;
    for (uint32_t j = lane; j < d; j += SQZ_WARP) {
        double sum = 0;
        for (uint32_t x = 0; x <= j; x++) sum += l[j * d + x] * v[x];
        a.to_key[at + j] = (float)sum;
    }
    for (uint32_t j = d; j-- > 0;) {
        double sum = 0;
        for (uint32_t x = j + 1 + lane; x < d; x += SQZ_WARP) sum += l[x * d + j] * solution[x];
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) {
            solution[j] = (v[j] - sum) / l[j * d + j];
            a.directions[at + j] = __float2half_rn((float)solution[j]);
        }
        __syncwarp();
    }
}

/* Grid: head. */
__global__ void __launch_bounds__(BIG, 1) directions_kernel(const code_args a)
{
    extern __shared__ float shared[];
    __shared__ double scratch[BIG_WARPS], column[MAX_DIM], values[MAX_DIM], left[MAX_DIM], bits[MAX_DIM];
    __shared__ double solution[8][MAX_DIM];
    __shared__ float2 turn[MAX_DIM / 2];
    __shared__ uint2 pairs[MAX_DIM / 2]; /* where the rows begin */
    __shared__ uint32_t order[MAX_DIM], part_of[MAX_DIM], chosen[MAX_DIM];
    const uint32_t head = blockIdx.x, d = a.head_dim, m = a.n_directions, n_parts = PARTS * a.n_words;
    const size_t square = (size_t)d * d;
    double *l = a.l + head * square, *product = a.product + head * square;
    float *matrix = d <= 128 ? shared : a.matrix + head * square;
    float *vectors = d <= 128 ? shared + square : a.vectors + head * square;
    query_moment(a, head, l, scratch);
    cholesky(d, l, column, scratch);
    project(a, head, l, product, a.sum + head * square, matrix);
    jacobi(d, matrix, vectors, turn, pairs, scratch);
    for (uint32_t i = threadIdx.x; i < d; i += BIG) { /* by value, the largest first */
        const float own = matrix[i * d + i];
        uint32_t rank = 0;
        for (uint32_t j = 0; j < d; j++) rank += matrix[j * d + j] > own || (matrix[j * d + j] == own && j < i);
        order[rank] = i;
        values[rank] = fmaxf(own, 0.0f);
    }
    double weight = 0;
    const uint32_t *offset = a.offset + (size_t)head * (a.n_clusters + 1);
    for (uint32_t c = threadIdx.x; c < a.n_clusters; c += BIG)
        weight += (double)a.variance[(size_t)head * a.n_clusters + c] * (offset[c + 1] - offset[c]);
    const double mean = block_sum(weight, scratch) / (a.n_rows - a.n_fixed);
    if (threadIdx.x == 0)
        sqz_share_directions(m, n_parts, values, left, bits, part_of, chosen, a.first + (size_t)head * (n_parts + 1));
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < m; i += BIG)
        a.spread[(size_t)head * m + i] = mean > 0 ? (float)(values[chosen[i]] / mean) : 0.0f;
    const uint32_t warp = threadIdx.x / SQZ_WARP;
    for (uint32_t i = warp; warp < 8 && i < m; i += 8)
        write_direction(a, head, i, vectors + (size_t)order[chosen[i]] * d, l, solution[warp]);
}

/* ---- Entries and words ------------------------------------------------------------------------ */

/* The largest (value, and of equal ones the first place) over the thread block. */
__device__ uint32_t block_farthest(float value, uint32_t place, float *values, uint32_t *places)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    for (int step = 16; step; step /= 2) {
        const float v = __shfl_xor_sync(~0u, value, step);
        const uint32_t p = __shfl_xor_sync(~0u, place, step);
        if (v > value || (v == value && p < place)) value = v, place = p;
    }
    __syncthreads();
    if (lane == 0) values[warp] = value, places[warp] = place;
    __syncthreads();
    for (uint32_t w = 0; w < WARPS; w++)
        if (values[w] > value || (values[w] == value && places[w] < place)) value = values[w], place = places[w];
    return place;
}

__device__ __forceinline__ float distance_to(const float *x, size_t stride, const float *entry, uint32_t n_dim)
{
    float distance = 0;
    for (uint32_t j = 0; j < n_dim; j++) {
        const float t = x[j * stride] - entry[j];
        distance += t * t;
    }
    return distance;
}

__device__ __forceinline__ uint32_t nearest_entry(const float *x, size_t stride, const float *entries, uint32_t n_dim)
{
    uint32_t best = 0;
    float least = INFINITY;
    for (uint32_t e = 0; e < ENTRIES; e++) {
        const float distance = distance_to(x, stride, entries + e * n_dim, n_dim);
        if (distance < least) least = distance, best = e;
    }
    return best;
}

/* Coordinates [n_dim][SAMPLE] of the sample's keys in a part's directions; a warp a key. */
__device__ void find_coordinates(const code_args &a, uint32_t head, uint32_t begin, uint32_t n_dim, float *x)
{
    const uint32_t n = a.n_rows - a.n_fixed, d = a.head_dim, lane = threadIdx.x % SQZ_WARP;
    for (uint32_t i = threadIdx.x / SQZ_WARP; i < a.n_sample; i += WARPS) {
        const uint32_t key = (uint32_t)((uint64_t)i * n / a.n_sample);
        float part[MAX_DIM / SQZ_WARP];
        for (uint32_t y = lane, s = 0; y < d; y += SQZ_WARP, s++) part[s] = difference(a, head, key, y);
        for (uint32_t j = 0; j < n_dim; j++) {
            const float *to_key = a.to_key + ((size_t)head * a.n_directions + begin + j) * d;
            float sum = 0;
            for (uint32_t y = lane, s = 0; y < d; y += SQZ_WARP, s++) sum += to_key[y] * part[s];
            for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (lane == 0) x[(size_t)j * SAMPLE + i] = sum;
        }
    }
    __syncthreads();
}

/* Starts from points far from one another, as lib/codes.c does. */
__device__ void seed_entries(const float *x, uint32_t n, uint32_t n_dim, float *entries, float *values,
                             uint32_t *places)
{
    float distance[EACH];
    uint32_t next = 0;
    for (int s = 0; s < EACH; s++) distance[s] = INFINITY;
    for (uint32_t e = 0; e < ENTRIES; e++) {
        for (uint32_t j = threadIdx.x; j < n_dim; j += THREADS) entries[e * n_dim + j] = x[(size_t)j * SAMPLE + next];
        __syncthreads();
        float most = -1.0f;
        uint32_t place = 0;
        for (int s = 0; s < EACH; s++) {
            const uint32_t i = s * THREADS + threadIdx.x;
            if (i >= n) continue;
            distance[s] = fminf(distance[s], distance_to(x + i, SAMPLE, entries + e * n_dim, n_dim));
            if (distance[s] > most) most = distance[s], place = i;
        }
        next = block_farthest(most, place, values, places);
    }
    __syncthreads();
}

/* Entries become means of their points: 16 threads a entry each add up a slice of them. */
__device__ void move_entries(const float *x, uint32_t n, uint32_t n_dim, float *entries, const uint8_t *code,
                             double (*sum)[THREADS / ENTRIES], uint32_t (*count)[THREADS / ENTRIES])
{
    const uint32_t n_slices = THREADS / ENTRIES, e = threadIdx.x / n_slices, s = threadIdx.x % n_slices;
    const uint32_t first = n * s / n_slices, last = n * (s + 1) / n_slices;
    for (uint32_t j = 0; j < n_dim; j++) {
        double own = 0;
        uint32_t points = 0;
        for (uint32_t i = first; i < last; i++)
            if (code[i] == e) own += x[(size_t)j * SAMPLE + i], points++;
        sum[e][s] = own;
        count[e][s] = points;
        __syncthreads();
        if (s == 0) {
            for (uint32_t y = 1; y < n_slices; y++) own += sum[e][y], points += count[e][y];
            if (points) entries[e * n_dim + j] = (float)(own / points);
        }
        __syncthreads();
    }
}

/* Grid: part, head. */
__global__ void __launch_bounds__(THREADS) entries_kernel(const code_args a)
{
    __shared__ float entries[ENTRIES * MAX_DIM], values[WARPS];
    __shared__ uint32_t places[WARPS], count[ENTRIES][THREADS / ENTRIES];
    __shared__ double sum[ENTRIES][THREADS / ENTRIES];
    __shared__ uint8_t code[SAMPLE];
    const uint32_t head = blockIdx.y, m = a.n_directions;
    const uint32_t *first = a.first + (size_t)head * (PARTS * a.n_words + 1);
    const uint32_t begin = first[blockIdx.x], n_dim = first[blockIdx.x + 1] - begin;
    float *x = a.coordinates + ((size_t)head * m + begin) * SAMPLE;
    if (n_dim == 0) return;
    find_coordinates(a, head, begin, n_dim, x);
    seed_entries(x, a.n_sample, n_dim, entries, values, places);
    for (int iteration = 0; iteration < ITERATIONS; iteration++) {
        for (uint32_t i = threadIdx.x; i < a.n_sample; i += THREADS)
            code[i] = (uint8_t)nearest_entry(x + i, SAMPLE, entries, n_dim);
        __syncthreads();
        move_entries(x, a.n_sample, n_dim, entries, code, sum, count);
    }
    for (uint32_t i = threadIdx.x; i < ENTRIES * n_dim; i += THREADS)
        a.book[((size_t)head * ENTRIES + i / n_dim) * m + begin + i % n_dim] =
            __float2half_rn(fminf(fmaxf(entries[i], -65504.0f), 65504.0f));
}

/* Grid: WORD_KEYS keys, head. Shared memory: differences [WORD_KEYS][D + 1], coordinates [M][WORD_KEYS], entries part by
 * part. */
__global__ void __launch_bounds__(THREADS) words_kernel(const code_args a)
{
    extern __shared__ float shared[];
    const uint32_t d = a.head_dim, m = a.n_directions, head = blockIdx.y, n = a.n_rows - a.n_fixed;
    const uint32_t key0 = blockIdx.x * WORD_KEYS, t = threadIdx.x % WORD_KEYS, stride = d + 1;
    float *rows = shared, *x = rows + WORD_KEYS * stride, *entries = x + m * WORD_KEYS;
    const uint32_t *first = a.first + (size_t)head * (PARTS * a.n_words + 1);
    for (uint32_t i = threadIdx.x; i < WORD_KEYS * d; i += THREADS)
        rows[i / d * stride + i % d] = key0 + i / d < n ? difference(a, head, key0 + i / d, i % d) : 0.0f;
    for (uint32_t p = 0; p < PARTS * a.n_words; p++) {
        const uint32_t begin = first[p], n_dim = first[p + 1] - begin;
        for (uint32_t i = threadIdx.x; i < ENTRIES * n_dim; i += THREADS)
            entries[ENTRIES * begin + i] =
                __half2float(a.book[((size_t)head * ENTRIES + i / n_dim) * m + begin + i % n_dim]);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x / WORD_KEYS * 4; i < m; i += THREADS / WORD_KEYS * 4) {
        const float *to_key = a.to_key + ((size_t)head * m + i) * d; /* 4 rows; there is room behind the last */
        float sum[4] = {};
        for (uint32_t y = 0; y < d; y += 4) {
            const float *own = rows + t * stride + y;
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const float4 x = *(const float4 *)(to_key + s * d + y);
                sum[s] += x.x * own[0] + x.y * own[1] + x.z * own[2] + x.w * own[3];
            }
        }
        for (uint32_t s = 0; s < 4 && i + s < m; s++) x[(i + s) * WORD_KEYS + t] = sum[s];
    }
    __syncthreads();
    for (uint32_t w = threadIdx.x / WORD_KEYS; w < a.n_words; w += THREADS / WORD_KEYS) {
        uint32_t word = 0;
        for (uint32_t p = 0; p < PARTS; p++) {
            const uint32_t begin = first[w * PARTS + p], n_dim = first[w * PARTS + p + 1] - begin;
            if (n_dim)
                word |= nearest_entry(x + begin * WORD_KEYS + t, WORD_KEYS, entries + ENTRIES * begin, n_dim) << 4 * p;
        }
        if (key0 + t < n) a.words[((size_t)head * a.n_words + w) * n + key0 + t] = word;
    }
}

void carve(code_args *c, struct sqz_arena *arena, const struct sqz_layer *l)
{
    const size_t k = l->shape.n_head_kv, d = l->shape.head_dim, m = l->codes.n_directions;
    c->moment = (float *)sqz_arena_take(arena, k * SLICES, d * d, sizeof(float));
    c->l = (double *)sqz_arena_take(arena, k, d * d, sizeof(double));
    c->product = (double *)sqz_arena_take(arena, k, d * d, sizeof(double));
    c->sum = (double *)sqz_arena_take(arena, k, d * d, sizeof(double));
    c->matrix = (float *)sqz_arena_take(arena, k, d * d, sizeof(float));
    c->vectors = (float *)sqz_arena_take(arena, k, d * d, sizeof(float));
    c->to_key = (float *)sqz_arena_take(arena, k * m + 3, d, sizeof(float));
    c->coordinates = (float *)sqz_arena_take(arena, k * m, SAMPLE, sizeof(float));
}

} // namespace

size_t sqz_build_codes_bytes(const struct sqz_layer *l)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    code_args c;
    carve(&c, &arena, l);
    return sqz_arena_bytes(&arena);
}

enum sqz_status sqz_build_codes(const struct sqz_layer *l, const uint32_t *cluster_of, void *workspace, void *stream)
{
    const uint32_t d = l->shape.head_dim, k = l->shape.n_head_kv, m = l->codes.n_directions, w = l->codes.n_words;
    const uint32_t n = l->n_rows - l->n_fixed, tiles = (d + TILE - 1) / TILE;
    struct sqz_arena arena = sqz_arena_on(workspace);
    code_args c;
    memset(&c, 0, sizeof c);
    carve(&c, &arena, l);
    c.n_rows = l->n_rows;
    c.n_fixed = l->n_fixed;
    c.n_head = l->shape.n_head;
    c.n_head_kv = k;
    c.head_dim = d;
    c.n_clusters = l->level[0].n_clusters;
    c.n_queries = l->n_queries;
    c.n_words = w;
    c.n_directions = m;
    c.n_sample = n < SAMPLE ? n : (uint32_t)SAMPLE;
    c.keys = (const __half *)l->keys.data;
    c.queries = (const __half *)l->queries;
    c.centroids = sqz_centroids_of(l);
    c.cluster_of = cluster_of;
    c.offset = l->level[0].offset;
    c.variance = l->level[0].variance;
    c.words = sqz_writable(l->codes.words);
    c.first = sqz_writable(l->codes.first);
    c.directions = (__half *)sqz_writable(l->codes.directions);
    c.book = (__half *)sqz_writable(l->codes.book);
    c.spread = sqz_writable(l->codes.spread);
    const size_t square = d <= 128 ? 2 * (size_t)d * d * sizeof(float) : 0;
    const size_t words = ((size_t)WORD_KEYS * (d + 1) + (size_t)m * (WORD_KEYS + ENTRIES)) * sizeof(float);
    enum sqz_status status =
        sqz_launch(moment_kernel, dim3(tiles * (tiles + 1) / 2, k, SLICES), THREADS, 0, 1, false, c, stream);
    if (status == SQZ_OK) status = sqz_launch(directions_kernel, dim3(k), BIG, square, 1, false, c, stream);
    if (status == SQZ_OK) status = sqz_launch(entries_kernel, dim3(w * PARTS, k), THREADS, 0, 1, false, c, stream);
    return status == SQZ_OK
               ? sqz_launch(words_kernel, dim3((n + WORD_KEYS - 1) / WORD_KEYS, k), THREADS, words, 1, false, c, stream)
               : status;
}
