/*
 * A pass of block lookup on Hopper (sm_90a); block_lookup.cu has the mathematics.
 *
 * Warpgroups hold 64 rows each as operands in registers; the columns come in tiles
 * of 64 by tensor copies, asked for by one thread two tiles ahead. A multiprocessor
 * has four warpgroups: some make products (wgmma) while others take exponentials, and
 * both units are nearly as busy (D 128: 256 cycles a tile each). All four belong to one
 * thread block of 256 rows where there is enough work, because every tile of columns
 * comes from the second-level cache once for a thread block, and 128 rows a tile would
 * ask for 7 TB/s; else to two of 128 rows (few query rows, or few tiles of them).
 * An earlier version had a warpgroup for the copies and exchanged registers
 * (setmaxnreg, two thread blocks a multiprocessor); its sums changed from call to call
 * on an H100, which this one's do not (bench/gpu/block.py).
 * Shared memory: (ROWS + STAGES * 64) * D * 2 bytes and columns' numbers: at D 128 98 KiB
 * with 128 rows and 4 stages, 163 KiB with 256 and 6.
 * Grid: as there. Head sizes: 64, 128.
 */
#include "block_lookup.cuh"
#include "hopper.cuh"

namespace {

enum { BN = SQZ_LOOKUP_COLUMNS, AHEAD = 2 /* tiles */ };

template <int D, int ROWS>
struct shape {
    static const int threads = 2 * ROWS, blocks = 256 / ROWS, stages = ROWS == 128 ? 4 : 6;
    static const int row_bytes = ROWS * D * 2, tile_bytes = BN * D * 2, number_bytes = BN * (int)sizeof(float2);
    static const size_t shared_bytes = 1024 + (size_t)row_bytes + stages * (tile_bytes + number_bytes) + 128;
};

struct hopper_args {
    sqz_lookup_pass p;
    CUtensorMap rows, columns;
};

template <class Type, int D, int PASS, bool SPREAD, int ROWS>
__global__ void __launch_bounds__(shape<D, ROWS>::threads, shape<D, ROWS>::blocks) lookup_hopper(const __grid_constant__ hopper_args args)
{
#ifdef SQZ_HOPPER_CODE
    typedef shape<D, ROWS> L;
    constexpr int STAGES = L::stages;
    extern __shared__ char raw[];
    char *const rows = raw + (1024 - sqz_shared(raw) % 1024) % 1024, *const columns = rows + L::row_bytes;
    char *const numbers = columns + STAGES * L::tile_bytes;
    uint64_t *const row_full = (uint64_t *)(numbers + STAGES * L::number_bytes), *const full = row_full + 1,
                    *const free = full + STAGES;
    const sqz_lookup_pass &p = args.p;
    const uint32_t head = blockIdx.y, split = blockIdx.z, row0 = blockIdx.x * ROWS;
    const uint32_t all_tiles = (p.n_columns + BN - 1) / BN;
    const uint32_t first = (uint32_t)((uint64_t)all_tiles * split / p.n_splits),
                   n_tiles = (uint32_t)((uint64_t)all_tiles * (split + 1) / p.n_splits) - first;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto ask_for = [&](uint32_t tile) { /* by one thread; the stage is free */
        const uint32_t stage = tile % STAGES, column = (first + tile) * BN;
        sqz_barrier_expect(full + stage, L::tile_bytes + L::number_bytes);
        sqz_copy_rows(columns + stage * L::tile_bytes, &args.columns, (int)column, (int)head, full + stage);
        sqz_copy_bytes(numbers + stage * L::number_bytes, p.column_numbers + (size_t)head * p.column_stride + column,
                       L::number_bytes, full + stage);
    };
    if (threadIdx.x == 0) {
        sqz_barrier_init(row_full, 1);
        for (int i = 0; i < STAGES; i++) {
            sqz_barrier_init(full + i, 1);
            sqz_barrier_init(free + i, L::threads / 32);
        }
        sqz_barrier_init_done();
        sqz_barrier_expect(row_full, L::row_bytes);
        sqz_copy_rows(rows, &args.rows, (int)row0, (int)head, row_full);
        for (uint32_t i = 0; i < AHEAD && i < n_tiles; i++) ask_for(i);
    }
    __syncthreads();

    const uint32_t row = row0 + warp * 16 + lane / 4;
    sqz_lookup_rows_state<PASS> state;
    state.reset(p, head, row);
    uint32_t operand[D / 16][4];
    sqz_barrier_wait(row_full, 0);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const int r = warp * 16 + lane % 16, chunk = 2 * k + lane / 16;
        sqz_fragments(operand[k], sqz_shared(rows) + chunk / 8 * ROWS * 128 + r * 128 + ((chunk ^ r) & 7) * 16);
    }
    const uint64_t first_column = sqz_operand(columns, 16, 1024);
    for (uint32_t tile = 0; tile < n_tiles; tile++) {
        const uint32_t stage = tile % STAGES, next = tile + AHEAD;
        if (threadIdx.x == 0 && next < n_tiles) {
            if (next >= STAGES) sqz_barrier_wait(free + next % STAGES, (next / STAGES - 1) & 1);
            ask_for(next);
        }
        __syncwarp();
        sqz_barrier_wait(full + stage, tile / STAGES & 1);
        float s[BN / 2];
        sqz_hold(s);
        sqz_wgmma_begin();
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            sqz_wgmma_rs_rows<Type>(s, operand[k][0], operand[k][1], operand[k][2], operand[k][3],
                                    first_column + ((stage * L::tile_bytes + (k / 4) * BN * 128 + (k % 4) * 32) >> 4),
                                    k > 0);
        sqz_wgmma_commit();
        sqz_wgmma_wait<0>();
        sqz_hold(s);
        state.template add<BN, SPREAD>(s, sqz_shared(numbers) + stage * L::number_bytes, p.scale_log2);
        __syncwarp();
        if (lane == 0) sqz_barrier_arrive(free + stage);
    }
    state.write(p, head, split, row);
#endif
}

template <class Type, int D, int PASS, bool SPREAD, int ROWS>
enum sqz_status launch_rows(const sqz_lookup_pass &p, enum sqz_cuda_type type, uint32_t n_head_kv, void *stream)
{
    hopper_args h;
    h.p = p;
    if (!sqz_hopper_kernel((const void *)lookup_hopper<Type, D, PASS, SPREAD, ROWS>) ||
        !sqz_tensor_map(&h.rows, type, p.rows, n_head_kv, p.n_rows, p.n_rows, D, ROWS) ||
        !sqz_tensor_map(&h.columns, type, p.columns, n_head_kv, p.n_columns, p.n_columns, D, BN))
        return SQZ_ERROR_UNSUPPORTED;
    return sqz_launch(lookup_hopper<Type, D, PASS, SPREAD, ROWS>,
                      dim3((p.n_rows + ROWS - 1) / ROWS, n_head_kv, p.n_splits), shape<D, ROWS>::threads,
                      shape<D, ROWS>::shared_bytes, 1, false, h, stream);
}

template <class Type, int D, int PASS, bool SPREAD>
enum sqz_status launch(const sqz_lookup_pass &p, enum sqz_cuda_type type, uint32_t n_head_kv, void *stream)
{
    const bool few_rows = p.n_rows < 1024 && (p.n_rows + 127) / 128 % 2; /* half a thread block would idle */
    return few_rows || p.n_columns < 8 * BN
               ? launch_rows<Type, D, PASS, SPREAD, 128>(p, type, n_head_kv, stream)
               : launch_rows<Type, D, PASS, SPREAD, 256>(p, type, n_head_kv, stream);
}

template <class Type, int D>
enum sqz_status launch_any(const sqz_lookup_pass &p, int pass, enum sqz_cuda_type type, uint32_t n_head_kv,
                           bool spread, void *stream)
{
    if (pass == 1)
        return spread ? launch<Type, D, 1, true>(p, type, n_head_kv, stream)
                      : launch<Type, D, 1, false>(p, type, n_head_kv, stream);
    return spread ? launch<Type, D, 2, true>(p, type, n_head_kv, stream)
                  : launch<Type, D, 2, false>(p, type, n_head_kv, stream);
}

} // namespace

enum sqz_status sqz_block_lookup_hopper(const sqz_lookup_pass &p, int pass, enum sqz_cuda_type type, uint32_t head_dim,
                                        uint32_t n_head_kv, bool spread, void *stream)
{
    const bool f16 = type == SQZ_CUDA_F16;
    switch (head_dim) {
    case 64:
        return f16 ? launch_any<sqz_f16, 64>(p, pass, type, n_head_kv, spread, stream)
                   : launch_any<sqz_bf16, 64>(p, pass, type, n_head_kv, spread, stream);
    case 128:
        return f16 ? launch_any<sqz_f16, 128>(p, pass, type, n_head_kv, spread, stream)
                   : launch_any<sqz_bf16, 128>(p, pass, type, n_head_kv, spread, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}
