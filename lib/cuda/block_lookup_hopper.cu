/*
 * A pass of block lookup on Hopper (sm_90a); block_lookup.cu has the mathematics.
 *
 * Warpgroups hold 64 rows each; the columns come in tiles of 128 by tensor copies,
 * asked for by one thread some tiles before they are needed. Products (wgmma) and
 * exponentials keep their units equally busy (D 128: 512 cycles a tile and warpgroup
 * each), so a multiprocessor has four warpgroups, some at the one and some at the
 * other: one thread block of 256 rows, or, of few rows or columns, two of 128, which
 * start while others end. Measured on an H100 and not better: rows as operands in
 * registers with tiles of 64 (3.5 against 3.3 ms of 4,096 queries), turns among the
 * warpgroups by named barriers (no change), 128 rows a thread block (no change).
 * An earlier version had a warpgroup for the copies and exchanged registers
 * (setmaxnreg, two thread blocks a multiprocessor); its sums changed from call to call
 * on an H100, which this one's do not (bench/gpu/block.py).
 * Shared memory: (ROWS + stages * 128) * D * 2 bytes and columns' numbers: at D 128
 * 100 KiB with 128 rows and 2 stages, 200 KiB with 256 and 4.
 * Grid: x the block of rows, y the KV head, z the split. Head sizes: 64, 128.
 */
#include "block_lookup.cuh"
#include "hopper.cuh"

namespace
{

enum { BN = 128 /* columns of a tile */, FEW_ROWS = 128, MANY_ROWS = 256 };

template <int D, int ROWS> struct shape {
    static const int threads = 2 * ROWS, blocks = 256 / ROWS;
    static const int stages = ROWS == FEW_ROWS ? 2 : 4;
    static const int row_bytes = ROWS * D * 2, tile_bytes = BN * D * 2, number_bytes = BN * 3 * (int)sizeof(float);
    static const size_t shared_bytes = 1024 + (size_t)row_bytes + stages * (tile_bytes + number_bytes) + 256;
};

struct hopper_args {
    sqz_lookup_pass p;
    CUtensorMap rows, columns;
};

template <class Type, int D, int PASS, bool SPREAD, bool FACTORS, int ROWS>
__global__ void __launch_bounds__(shape<D, ROWS>::threads, shape<D, ROWS>::blocks)
    lookup_hopper(const __grid_constant__ hopper_args args)
{
#ifdef SQZ_HOPPER_CODE
    typedef shape<D, ROWS> L;
    constexpr int STAGES = L::stages, AHEAD = STAGES / 2;
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
    auto ask_for =
        [&](uint32_t tile) { /* by one thread; the stage is free */
        const bool factors = PASS == 1 && FACTORS;
        const uint32_t stage = tile % STAGES, column = (first + tile) * BN;
        char *const to = numbers + stage * L::number_bytes;
        const size_t from = (size_t)head * p.column_stride + column;
        sqz_barrier_expect(full + stage, L::tile_bytes + BN * 4 * (1 + SPREAD + factors));
        sqz_copy_rows(columns + stage * L::tile_bytes, &args.columns, (int)column, (int)head, full + stage);
        sqz_copy_bytes(to, p.column_x + from, BN * 4, full + stage);
        if (SPREAD) sqz_copy_bytes(to + BN * 4, p.column_y + from, BN * 4, full + stage);
        if (factors) sqz_copy_bytes(to + BN * 8, p.factor + from, BN * 4, full + stage);
    };
    sqz_let_next_start();
    sqz_wait_for_previous();
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
    sqz_lookup_rows_state<PASS, SPREAD, FACTORS> state;
    state.reset(p, head, row);
    const uint64_t first_row = sqz_operand(rows + warp / 4 * 64 * 128, 16, 1024),
                   first_column = sqz_operand(columns, 16, 1024);
    sqz_barrier_wait(row_full, 0);
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
            sqz_wgmma_ss<Type, BN>(s, first_row + ((k / 4 * ROWS * 128 + k % 4 * 32) >> 4),
                                   first_column + ((stage * L::tile_bytes + k / 4 * BN * 128 + k % 4 * 32) >> 4),
                                   k > 0);
        sqz_wgmma_commit();
        sqz_wgmma_wait<0>();
        sqz_hold(s);
        const uint32_t from = sqz_shared(numbers) + stage * L::number_bytes;
        state.template add<BN>(s, {from, from + BN * 4, from + BN * 8});
        __syncwarp();
        if (lane == 0) sqz_barrier_arrive(free + stage);
    }
    state.write(p, head, split, row);
#endif
}

template <class Type, int D, int PASS, bool SPREAD, bool FACTORS, int ROWS>
enum sqz_status launch_rows(const sqz_lookup_pass &p, enum sqz_row_type type, uint32_t n_head_kv, void *stream)
{
    hopper_args h;
    h.p = p;
    if (!sqz_hopper_kernel((const void *)lookup_hopper<Type, D, PASS, SPREAD, FACTORS, ROWS>) ||
        !sqz_tensor_map(&h.rows, type, p.rows, n_head_kv, p.n_rows, p.n_rows, D, ROWS) ||
        !sqz_tensor_map(&h.columns, type, p.columns, n_head_kv, p.n_columns, p.n_columns, D, BN))
        return SQZ_ERROR_UNSUPPORTED;
    return sqz_launch(lookup_hopper<Type, D, PASS, SPREAD, FACTORS, ROWS>,
                      dim3((p.n_rows + ROWS - 1) / ROWS, n_head_kv, p.n_splits), shape<D, ROWS>::threads,
                      shape<D, ROWS>::shared_bytes, 1, true, h, stream);
}

template <class Type, int D, int PASS, bool SPREAD, bool FACTORS>
enum sqz_status launch(const sqz_lookup_pass &p, enum sqz_row_type type, uint32_t n_head_kv, void *stream)
{
    return sqz_block_lookup_hopper_rows(p.n_rows, p.n_columns) == FEW_ROWS
               ? launch_rows<Type, D, PASS, SPREAD, FACTORS, FEW_ROWS>(p, type, n_head_kv, stream)
               : launch_rows<Type, D, PASS, SPREAD, FACTORS, MANY_ROWS>(p, type, n_head_kv, stream);
}

template <class Type, int D, int PASS>
enum sqz_status launch_pass(const sqz_lookup_pass &p, enum sqz_row_type type, uint32_t n_head_kv, bool spread,
                            void *stream)
{
    if (p.factor) return launch<Type, D, PASS, true, true>(p, type, n_head_kv, stream);
    return spread ? launch<Type, D, PASS, true, false>(p, type, n_head_kv, stream)
                  : launch<Type, D, PASS, false, false>(p, type, n_head_kv, stream);
}

template <class Type, int D>
enum sqz_status launch_any(const sqz_lookup_pass &p, int pass, enum sqz_row_type type, uint32_t n_head_kv, bool spread,
                           void *stream)
{
    if (pass == 1) return launch_pass<Type, D, 1>(p, type, n_head_kv, spread, stream);
    if (pass == 2) return launch_pass<Type, D, 2>(p, type, n_head_kv, spread, stream);
    return pass == 3 ? launch_pass<Type, D, 3>(p, type, n_head_kv, spread, stream)
                     : launch_pass<Type, D, 4>(p, type, n_head_kv, spread, stream);
}

} // namespace

uint32_t sqz_block_lookup_hopper_rows(uint64_t n_rows, uint64_t n_columns)
{
    return n_rows <= FEW_ROWS || n_columns < 3 * BN ? FEW_ROWS : MANY_ROWS;
}

enum sqz_status sqz_block_lookup_hopper(const sqz_lookup_pass &p, int pass, enum sqz_row_type type, uint32_t head_dim,
                                        uint32_t n_head_kv, bool spread, void *stream)
{
    const bool f16 = type == SQZ_ROW_F16;
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
