/*
 * A sequence's own rows that go into planes while it generates: what a flushed
 * block holds, against double precision; that attention reads what
 * user_rows.h says, at every place around a boundary, for one token, few and many;
 * and that going back leaves no trace.
 *
 * Tolerance of attention: own rows are compared with the F16 numbers that they hold,
 * as in test_plane_layers.c.
 */
#include "plane_twins.h"

#include "user_rows.h"

#if defined(__GLIBC__) && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 33)
#include <malloc.h>
#define HEAP_BYTES() (mallinfo2().uordblks + mallinfo2().hblkhd)
#else
#define HEAP_BYTES() ((size_t)0)
#endif

enum { CAPACITY = 1200, BLOCK = SQZ_USER_BLOCK };

/* A sequence's rows, and what was to be put there. */
struct own {
    const struct sqz_layer *layer;
    struct sqz_user_rows rows;
    void *memory;
    uint16_t *keys, *values; /* F16 [K][CAPACITY][D] */
};

static void make_own(struct own *o, const struct sqz_layer *layer, enum sqz_user_kind kind, size_t capacity,
                     uint64_t seed)
{
    struct material m = make_material(layer->shape, CAPACITY, 24, seed);
    struct sqz_arena arena = sqz_arena_on(NULL);
    sqz_user_rows_carve(&arena, &o->rows, layer, kind, capacity);
    o->memory = malloc(sqz_arena_bytes(&arena));
    assert_non_null(o->memory);
    memset(o->memory, 0xff, sqz_arena_bytes(&arena)); /* NaN: nothing may depend on it */
    arena = sqz_arena_on(o->memory);
    sqz_user_rows_carve(&arena, &o->rows, layer, kind, capacity);
    o->layer = layer;
    o->keys = m.keys;
    o->values = m.values;
    free(m.centres);
}

static void free_own(struct own *o)
{
    free(o->memory);
    free(o->keys);
    free(o->values);
}

/* Puts rows [n, n + n_more), at most a block, of other numbers where `junk`. */
static bool put_some(struct own *o, size_t n, size_t n_more, size_t n_kept, bool junk)
{
    const size_t d = o->rows.head_dim;
    if (!sqz_user_rows_ready(&o->rows, n, n_more, n_kept, 2)) return false;
    for (size_t r = n; r < n + n_more; r++) {
        const struct sqz_user_buffer *b = sqz_user_rows_block(&o->rows, r);
        assert_non_null(b);
        for (size_t h = 0; h < o->rows.n_head_kv; h++) {
            const size_t to = (h * o->rows.block_rows + r % o->rows.block_rows) * d, from = (h * CAPACITY + r) * d;
            memcpy(b->keys + to, (junk ? o->values : o->keys) + from, d * sizeof *b->keys);
            memcpy(b->values + to, (junk ? o->keys : o->values) + from, d * sizeof *b->values);
        }
    }
    return true;
}

/* Any number of them, as a run puts them that goes back to n when it fails. */
static void put(struct own *o, size_t n, size_t n_more, bool junk)
{
    const size_t most = sqz_user_rows_most(&o->rows);
    for (size_t at = n, some; at < n + n_more; at += some) {
        some = n + n_more - at < most ? n + n_more - at : most;
        assert_true(put_some(o, at, some, n, junk));
    }
}

/* ---- What a block holds --------------------------------------------------------------------- */

/* A row of the planes as the format's page has it, in double precision; *unit: what its numbers are steps of. */
static void read_turned(const struct sqz_rows *rows, size_t at, size_t d, double *turned, double *unit)
{
    const size_t bytes = sqz_plane_bytes(d);
    const uint8_t *upper = (const uint8_t *)rows->data + at * bytes;
    const uint8_t *lower = rows->planes.lower ? rows->planes.lower + at * bytes : NULL;
    *unit = half_value(rows->planes.step[at]) / (lower ? 16 : 1);
    for (size_t i = 0; i < d; i++) {
        const size_t byte = i / 32 * 16 + i % 16, shift = i % 32 < 16 ? 0 : 4;
        int u = (upper[byte] >> shift & 15) - 8;
        if (lower) u = u * 16 + (lower[byte] >> shift & 15);
        turned[i] = (u + 0.5) * *unit;
    }
}

/* The orthonormal Hadamard matrix of every run of the largest power of two that divides d. */
static void turn_exactly(const double *x, size_t d, double *turned)
{
    const size_t n = d & (~d + 1);
    for (size_t i = 0; i < d; i++) {
        double sum = 0;
        for (size_t j = 0; j < n; j++)
            sum += x[i / n * n + j] * (__builtin_popcount((unsigned)(i % n & j)) % 2 ? -1.0 : 1.0);
        turned[i] = sum / sqrt((double)n);
    }
}

/* Every number of the row is in the step that it belongs to. F32 has the rest to 2^-24 of the largest numbers, and turning
 * adds up n of them. */
static void check_row(const struct sqz_rows *rows, size_t at, const double *row, const double *base, size_t d)
{
    double rest[MAX_HEAD_DIM], wanted[MAX_HEAD_DIM], got[MAX_HEAD_DIM], unit, size = 0;
    for (size_t i = 0; i < d; i++) {
        rest[i] = row[i] - base[i];
        size = fmax(size, fabs(row[i]) + fabs(base[i]));
    }
    turn_exactly(rest, d, wanted);
    read_turned(rows, at, d, got, &unit);
    const double off = 16 * UNIT * size * sqrt((double)d);
    for (size_t i = 0; i < d; i++) check_close("a turned number", at * d + i, got[i], wanted[i], 0.5 * unit + off);
}

static void check_block(const struct own *o, size_t h, size_t block)
{
    const size_t d = o->rows.head_dim;
    const struct sqz_rows keys = sqz_rows_of_head(&o->rows.keys, o->rows.n_plane_rows, d, h);
    const struct sqz_rows values = sqz_rows_of_head(&o->rows.values, o->rows.n_plane_rows, d, h);
    const uint16_t *centroid = (const uint16_t *)keys.planes.centres.data + block * d;
    double key[MAX_HEAD_DIM], value[MAX_HEAD_DIM], centre[MAX_HEAD_DIM], mean[MAX_HEAD_DIM], value_mean[MAX_HEAD_DIM];
    memset(mean, 0, sizeof mean);
    for (size_t r = 0; r < BLOCK; r++)
        for (size_t i = 0; i < d; i++)
            mean[i] += half_value(o->keys[(h * CAPACITY + block * BLOCK + r) * d + i]) / BLOCK;
    for (size_t i = 0; i < d; i++) {
        centre[i] = half_value(centroid[i]);
        value_mean[i] = (double)o->layer->values.mean[h * d + i];
        check_close("centroid", i, centre[i], mean[i], 0x1p-11 * fabs(mean[i]) + 0x1p-24 + 128 * UNIT * 4);
    }
    for (size_t r = 0; r < BLOCK; r++) {
        for (size_t i = 0; i < d; i++) {
            key[i] = half_value(o->keys[(h * CAPACITY + block * BLOCK + r) * d + i]);
            value[i] = half_value(o->values[(h * CAPACITY + block * BLOCK + r) * d + i]);
        }
        check_row(&keys, block * BLOCK + r, key, centre, d);
        check_row(&values, block * BLOCK + r, value, value_mean, d);
    }
}

static const struct variation variations[] = {
    {6, 2, 64, 1, 2, SQZ_ROWS_INT4_4, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, true, false},
    {6, 2, 64, 1, 2, SQZ_ROWS_INT4_4, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, true, true},
    {3, 1, 80, 1, 0, SQZ_ROWS_INT4, SQZ_INDEX_F16, SQZ_RULE_PAPER, true, false},
    {17, 1, 32, 1, 0, SQZ_ROWS_INT4, SQZ_INDEX_INT8, SQZ_RULE_PAPER, true, false},
};

static void flushed_blocks(void **unused)
{
    (void)unused;
    for (size_t v = 0; v < COUNT(variations); v++) {
        struct twins t = make_twins(&variations[v], 300, 40 + v);
        struct own o;
        make_own(&o, t.layer, SQZ_USER_PLANES, 700, 60 + v);
        put(&o, 0, 600, false);
        assert_int_equal(o.rows.n_flushed_blocks, 600 / BLOCK - 1);
        for (size_t b = 0; b < o.rows.n_flushed_blocks; b++)
            for (size_t h = 0; h < o.rows.n_head_kv; h++) {
                describe("variation %zu, block %zu, head %zu", v, b, h);
                check_block(&o, h, b);
            }
        free_own(&o);
        free_twins(&t);
    }
}

/* Rows in planes take half or a quarter, and nothing but the first rows is needed for a context of F16 rows. */
static void counted_bytes(void **unused)
{
    (void)unused;
    for (size_t v = 0; v < COUNT(variations); v++) {
        struct twins t = make_twins(&variations[v], 300, 40 + v);
        const size_t k = t.layer->shape.n_head_kv, d = t.layer->shape.head_dim, n = 1100;
        struct own planes, whole;
        make_own(&planes, t.layer, SQZ_USER_PLANES, CAPACITY, 1);
        make_own(&whole, t.layer, SQZ_USER_WHOLE, CAPACITY, 1);
        for (size_t r = 0; r < n; r++) put(&planes, r, 1, false);
        put(&whole, 0, n, false);
        describe("variation %zu", v);
        const size_t flushed = n / BLOCK - 1, row = sqz_row_bytes(t.layer->keys.type, d);
        const size_t in_planes = k * flushed * (BLOCK * 2 * row + 2 * d), buffer = k * BLOCK * 4 * d;
        check_close("bytes as F16", 0, (double)sqz_user_rows_bytes(&whole.rows), (double)(k * n * 4 * d), 0);
        check_close("bytes in planes", 0, (double)sqz_user_rows_bytes(&planes.rows), (double)(in_planes + 3 * buffer),
                    0);
        free_own(&planes);
        free_own(&whole);
        free_twins(&t);
    }
}

/* ---- What a token reads ------------------------------------------------------------------------ */

/* Keys and values as the last of n_rows has them: [K][CAPACITY][D]. */
static void as_read(const struct own *o, size_t n_rows, bool upper, uint16_t *keys, uint16_t *values)
{
    const size_t d = o->rows.head_dim, all = o->rows.n_head_kv * CAPACITY * d * sizeof *keys;
    const size_t flushed = sqz_user_rows_flushed(&o->rows, n_rows);
    memcpy(keys, o->keys, all);
    memcpy(values, o->values, all);
    for (size_t h = 0; h < o->rows.n_head_kv && flushed; h++) {
        struct sqz_rows k = sqz_rows_of_head(&o->rows.keys, o->rows.n_plane_rows, d, h);
        struct sqz_rows v = sqz_rows_of_head(&o->rows.values, o->rows.n_plane_rows, d, h);
        if (upper) k = sqz_rows_upper(&k), v = sqz_rows_upper(&v);
        sqz_rows_to_f16(keys + h * CAPACITY * d, &k, 0, flushed, d);
        sqz_rows_to_f16(values + h * CAPACITY * d, &v, 0, flushed, d);
    }
}

/* Of own rows too. */
static double magnitude_of(const struct own *o, const struct twins *t, const float *queries, size_t n_tokens,
                           size_t n_rows)
{
    const size_t d = o->rows.head_dim, h = o->layer->shape.n_head, group = h / o->rows.n_head_kv;
    double most = largest_magnitude(&t->twin, queries, n_tokens);
    for (size_t q = 0; q < n_tokens * h; q++)
        for (size_t i = 0; i < n_rows; i++)
            exact_logit(queries + q * d, o->keys + (q % h / group * CAPACITY + i) * d, d, (double)o->layer->shape.scale,
                        &most);
    return most;
}

/* The last n_tokens of n_user rows, against each of them over arrays of the F16 numbers that it reads. Returns how many were
 * compared: selections may differ where a cluster is at the threshold. */
static size_t check_reading(const struct twins *t, const struct own *o, const struct sqz_attend_call *how)
{
    const struct sqz_layer *l = t->layer;
    const size_t d = l->shape.head_dim, heads = l->shape.n_head, n = how->n_tokens;
    uint16_t *keys = take(l->shape.n_head_kv * CAPACITY * d, sizeof *keys);
    uint16_t *values = take(l->shape.n_head_kv * CAPACITY * d, sizeof *values);
    const double off = 2 * 0x1p-9 * magnitude_of(o, t, how->queries, n, how->n_user);
    struct run got = run(l, how);
    size_t n_compared = 0;
    for (size_t i = 0; i < n; i++) {
        const size_t place = (how->n_user - n + i) % BLOCK;
        if (i > 0 && i + 1 < n && place > 0 && place + 1 < BLOCK && i % 50) continue; /* as its neighbours */
        struct sqz_attend_call one = *how;
        one.user = NULL;
        one.user_keys = keys;
        one.user_values = values;
        one.user_capacity_rows = CAPACITY;
        one.n_user = how->n_user - n + i + 1;
        one.n_tokens = 1;
        one.queries = how->queries + i * heads * d;
        as_read(o, one.n_user, how->upper, keys, values);
        struct run wanted = run(l, &one);
        const bool same = how->budget == 1 || n > 1 || got.stats.retained_keys == wanted.stats.retained_keys;
        for (size_t j = 0; j < heads && same; j++) {
            double size = 0;
            check_close("lse", i * heads + j, got.lse[i * heads + j], wanted.lse[j], off);
            for (size_t x = 0; x < d; x++) size = fmax(size, fabs((double)wanted.out[j * d + x]));
            for (size_t x = 0; x < d; x++)
                check_close("output", (i * heads + j) * d + x, got.out[(i * heads + j) * d + x], wanted.out[j * d + x],
                            off * (size + 1) + 0x1p-10 * 5);
        }
        n_compared += same;
        free_run(&wanted);
    }
    free_run(&got);
    free(keys);
    free(values);
    return n_compared;
}

static struct sqz_attend_call call_on(const struct own *o, const struct variation *v, const float *queries,
                                      size_t n_tokens, size_t n_user, float budget)
{
    return (struct sqz_attend_call){.queries = queries,
                                    .n_tokens = n_tokens,
                                    .block_tokens = 1,
                                    .n_user = n_user,
                                    .user = &o->rows,
                                    .n_context_tokens = o->layer->n_rows,
                                    .budget = budget,
                                    .upper = v->upper,
                                    .n_threads = 1};
}

static void read_at_boundaries(void **unused)
{
    (void)unused;
    static const size_t places[] = {1, 127, 128, 129, 255, 256, 257, 383, 384, 385, 640, 1100};
    for (size_t v = 0; v < COUNT(variations); v++) {
        struct twins t = make_twins(&variations[v], 300, 40 + v);
        struct own o;
        size_t n_compared = 0, at = 0;
        make_own(&o, t.layer, SQZ_USER_PLANES, CAPACITY, 60 + v);
        for (size_t i = 0; i < COUNT(places); i++) {
            float *queries = make_queries(&t.material, 1, 70 + i, 0.4);
            put(&o, at, places[i] - at, false);
            at = places[i];
            describe("variation %zu, %zu rows", v, at);
            const struct sqz_attend_call all = call_on(&o, &variations[v], queries, 1, at, 1);
            assert_int_equal(check_reading(&t, &o, &all), 1);
            const struct sqz_attend_call some = call_on(&o, &variations[v], queries, 1, at, 0.15f);
            n_compared += check_reading(&t, &o, &some);
            free(queries);
        }
        check_true("compared", 0, (double)n_compared, COUNT(places), 2 * n_compared > COUNT(places));
        free_own(&o);
        free_twins(&t);
    }
}

/* Batches that end at, begin at and cross a boundary: few tokens, by slices and not, and a block of many. */
static void read_by_batches(void **unused)
{
    (void)unused;
    static const struct {
        size_t n_before, n_tokens;
    } batches[] = {{0, 128}, {128, 128}, {250, 16}, {380, 5}, {383, 2}, {384, 16}, {500, 100}, {639, 127}};
    for (size_t v = 0; v < COUNT(variations); v++)
        for (size_t n_rows = 300; n_rows <= 2300; n_rows += 2000) {
            struct twins t = make_twins(&variations[v], n_rows, 40 + v);
            struct own o;
            size_t at = 0;
            make_own(&o, t.layer, SQZ_USER_PLANES, CAPACITY, 60 + v);
            for (size_t i = 0; i < COUNT(batches); i++) {
                const size_t n = batches[i].n_tokens;
                /* Of many tokens the reference takes long, and of more rows of the context they go the same way. */
                if (n > 16 && n_rows > 300 && (i > 1 || v > 0)) continue;
                float *queries = make_queries(&t.material, n, 70 + i, 0.4);
                if (batches[i].n_before > at) put(&o, at, batches[i].n_before - at, false);
                put(&o, batches[i].n_before, n, false);
                at = batches[i].n_before + n;
                describe("variation %zu, %zu tokens behind %zu, context of %zu", v, n, batches[i].n_before, n_rows);
                const struct sqz_attend_call all = call_on(&o, &variations[v], queries, n, at, 1);
                assert_true(check_reading(&t, &o, &all) >= (n > 1 ? 2 : 1));
                free(queries);
            }
            free_own(&o);
            free_twins(&t);
        }
}

/* Tokens of two sequences that go through the context together. */
static void read_jointly(void **unused)
{
    (void)unused;
    const struct variation *v = &variations[0];
    struct twins t = make_twins(v, 300, 40);
    const size_t d = t.layer->shape.head_dim, heads = t.layer->shape.n_head;
    struct own o[2];
    float *queries = make_queries(&t.material, 3, 7, 0.4);
    static const size_t rows[3] = {300, 512, 513}, of[3] = {0, 1, 1};
    struct sqz_joint_token joint[3] = {{0}};
    for (size_t i = 0; i < 2; i++) {
        make_own(&o[i], t.layer, SQZ_USER_PLANES, CAPACITY, 60 + i);
        put(&o[i], 0, i ? 511 : 300, false);
    }
    put(&o[1], 511, 2, false); /* two tokens of one batch, across a boundary */
    struct sqz_attend_call together = call_on(&o[0], v, queries, 3, 513, 1);
    for (size_t i = 0; i < 3; i++)
        joint[i] = (struct sqz_joint_token){.at = i, .n_rows = rows[i], .user = &o[of[i]].rows};
    together.user = NULL;
    together.joint = joint;
    struct run got = run(t.layer, &together);
    for (size_t i = 0; i < 3; i++) {
        const struct sqz_attend_call one = call_on(&o[of[i]], v, queries + i * heads * d, 1, rows[i], 1);
        struct run wanted = run(t.layer, &one);
        const double off = 2 * 0x1p-9 * magnitude_of(&o[of[i]], &t, one.queries, 1, rows[i]);
        describe("joint token %zu", i);
        for (size_t j = 0; j < heads * d; j++)
            check_close("output", j, got.out[i * heads * d + j], wanted.out[j], off * 6);
        free_run(&wanted);
    }
    free_run(&got);
    free(queries);
    free_own(&o[0]);
    free_own(&o[1]);
    free_twins(&t);
}

/* Own rows of other numbers than the context's: a context of F16 rows under them. */
static void read_beside_f16(void **unused)
{
    (void)unused;
    const struct variation *v = &variations[0];
    struct twins t = make_twins(v, 300, 40);
    struct sqz_layer *planes = t.layer;
    struct own o;
    float *queries = make_queries(&t.material, 4, 7, 0.4);
    make_own(&o, planes, SQZ_USER_PLANES, CAPACITY, 60);
    put(&o, 0, 500, false);
    t.layer = &t.twin;
    for (size_t n = 1; n <= 4; n += 3) {
        const struct sqz_attend_call all = call_on(&o, v, queries, n, 500, 1);
        describe("over F16 rows, %zu tokens", n);
        assert_true(check_reading(&t, &o, &all) >= (n > 1 ? 2 : 1));
    }
    t.layer = planes;
    free(queries);
    free_own(&o);
    free_twins(&t);
}

/* The denominators that places tell each other. */
static void totals(void **unused)
{
    (void)unused;
    for (size_t v = 0; v < 2; v++) {
        struct twins t = make_twins(&variations[v], 300, 40);
        const size_t heads = t.layer->shape.n_head;
        struct own o;
        float *queries = make_queries(&t.material, 2, 7, 0.4), *total = take(2 * heads, sizeof *total);
        make_own(&o, t.layer, SQZ_USER_PLANES, CAPACITY, 60);
        put(&o, 0, 513, false);
        struct sqz_attend_call all = call_on(&o, &variations[v], queries, 2, 513, 1);
        struct run wanted = run(t.layer, &all);
        const double off = 2 * 0x1p-9 * magnitude_of(&o, &t, queries, 2, 513);
        all.layer = t.layer;
        all.query_token_stride = heads * t.layer->shape.head_dim;
        all.query_head_stride = t.layer->shape.head_dim;
        const size_t bytes = sqz_attend_thread_bytes(t.layer, 513, 1);
        void *workspace = malloc(sqz_attend_batch_workspace_bytes(bytes, 1, 2));
        assert_non_null(workspace);
        sqz_attend_totals(&(struct sqz_attend_batch){&all, 1, 2, bytes, workspace}, &total);
        describe("totals, variation %zu", v);
        for (size_t i = 0; i < 2 * heads; i++) check_close("total", i, total[i], wanted.lse[i], off);
        free(workspace);
        free_run(&wanted);
        free(queries);
        free(total);
        free_own(&o);
        free_twins(&t);
    }
}

/* ---- Going back ------------------------------------------------------------------------------------ */

/* That two sequences have the same rows in planes, and a token gets the same bits from both. */
static void check_same(const struct twins *t, const struct own *a, const struct own *b, size_t n_user)
{
    const struct sqz_layer *l = t->layer;
    const size_t d = l->shape.head_dim, bytes = sqz_plane_bytes(d), flushed = sqz_user_rows_flushed(&a->rows, n_user);
    float *queries = make_queries(&t->material, 1, n_user, 0.4);
    for (size_t h = 0; h < l->shape.n_head_kv; h++) {
        const size_t at = h * a->rows.n_plane_rows;
        assert_memory_equal((const uint8_t *)a->rows.keys.data + at * bytes,
                            (const uint8_t *)b->rows.keys.data + at * bytes, flushed * bytes);
        assert_memory_equal((const uint8_t *)a->rows.values.data + at * bytes,
                            (const uint8_t *)b->rows.values.data + at * bytes, flushed * bytes);
        assert_memory_equal(a->rows.keys.planes.step + at, b->rows.keys.planes.step + at, flushed * 2);
    }
    struct sqz_attend_call one = call_on(a, &variations[0], queries, 1, n_user, 0.15f);
    struct run first = run(l, &one);
    one.user = &b->rows;
    struct run second = run(l, &one);
    assert_memory_equal(first.out, second.out, l->shape.n_head * d * sizeof *first.out);
    free_run(&first);
    free_run(&second);
    free(queries);
}

/* One sequence puts its rows one by one. Another drafts before each, up to as many as may be forgotten, verifies in batches
 * of which a part is forgotten, and runs and fails now and then: everything is the same, to the bit. */
static void forgotten_without_trace(void **unused)
{
    (void)unused;
    struct twins t = make_twins(&variations[0], 300, 40);
    struct own plain, drafted;
    struct sqz_random random;
    sqz_random_seed(&random, 3);
    make_own(&plain, t.layer, SQZ_USER_PLANES, CAPACITY, 60);
    make_own(&drafted, t.layer, SQZ_USER_PLANES, CAPACITY, 60);
    put(&plain, 0, 100, false);
    put(&drafted, 0, 100, false);
    for (size_t n = 100, kept; n < 700; n += kept) {
        const size_t draft = 1 + sqz_random_below(&random, n % 5 == 0 ? BLOCK : 15), batch = 1 + n % 15;
        kept = 1 + sqz_random_below(&random, batch);
        for (size_t i = 0; i < draft; i++) assert_true(put_some(&drafted, n + i, 1, n + i, true));
        if (n % 7 == 0) put(&drafted, n, 290, true); /* fails */
        put(&drafted, n, batch, false);
        for (size_t i = 0; i < kept; i++) put(&plain, n + i, 1, false);
        if (n % 3 == 0 || (n + kept) / BLOCK != n / BLOCK) check_same(&t, &plain, &drafted, n + kept);
    }
    put(&drafted, 0, 200, false); /* from the beginning */
    put(&plain, 0, 200, false);
    check_same(&t, &plain, &drafted, 200);
    free_own(&plain);
    free_own(&drafted);
    free_twins(&t);
}

/* A batch is read as its tokens one by one are: what is read follows from their places. */
static void cut_anywhere(void **unused)
{
    (void)unused;
    struct twins t = make_twins(&variations[0], 300, 40);
    const size_t d = t.layer->shape.head_dim, heads = t.layer->shape.n_head, row = heads * d;
    enum { N = 60, BEFORE = 490 };
    struct own one, many;
    float *queries = make_queries(&t.material, N, 9, 0.4);
    make_own(&one, t.layer, SQZ_USER_PLANES, CAPACITY, 60);
    make_own(&many, t.layer, SQZ_USER_PLANES, CAPACITY, 60);
    put(&one, 0, BEFORE, false);
    put(&many, 0, 77, false);
    put(&many, 77, BEFORE - 77, false);
    put(&many, BEFORE, N, false);
    const struct sqz_attend_call batch = call_on(&many, &variations[0], queries, N, BEFORE + N, 0.15f);
    struct run got = run(t.layer, &batch);
    for (size_t i = 0; i < N; i++) {
        const struct sqz_attend_call single =
            call_on(&one, &variations[0], queries + i * row, 1, BEFORE + i + 1, 0.15f);
        put(&one, BEFORE + i, 1, false);
        struct run wanted = run(t.layer, &single);
        assert_memory_equal(got.out + i * row, wanted.out, row * sizeof *wanted.out);
        free_run(&wanted);
    }
    free_run(&got);
    free(queries);
    free_own(&one);
    free_own(&many);
    free_twins(&t);
}

/* What is no more is not read. */
static void refused_rows(void **unused)
{
    (void)unused;
    struct twins t = make_twins(&variations[0], 300, 40);
    struct own o;
    make_own(&o, t.layer, SQZ_USER_PLANES, CAPACITY, 60);
    put(&o, 0, 800, false);
    assert_false(put_some(&o, 801, 1, 801, false)); /* a row was left out */
    assert_false(put_some(&o, 800, BLOCK + 1, 800, false));
    assert_false(put_some(&o, 800, 0, 800, false));
    assert_false(put_some(&o, 500, 1, 500, false)); /* of block 3, which reads block 2 */
    assert_true(put_some(&o, 800, 1, 800, false));
    assert_true(put_some(&o, 801 - BLOCK, 1, 801 - BLOCK, false));
    assert_true(put_some(&o, 0, 1, 0, false));
    free_own(&o);
    free_twins(&t);
}

static void nothing_allocated(void **unused)
{
    (void)unused;
    struct twins t = make_twins(&variations[0], 300, 40);
    struct own o;
    make_own(&o, t.layer, SQZ_USER_PLANES, CAPACITY, 60);
    put(&o, 0, 400, false); /* the first flush starts threads */
    const size_t before = HEAP_BYTES();
    put(&o, 400, 700, false);
    assert_int_equal(HEAP_BYTES(), before);
    free_own(&o);
    free_twins(&t);
}

/* ---- A window -------------------------------------------------------------------------------------- */

/* Rows that the window of no token to come has are overwritten, the others are there as F16: as a sequence that keeps all. */
static void seen_through_a_window(void **unused)
{
    (void)unused;
    static const uint32_t windows[] = {1, 128, 300};
    struct sqz_squeeze_options o;
    const struct sqz_layer_shape shape = make_shape(4, 2, 64);
    struct material m = make_material(shape, 200, 24, 5);
    struct sqz_layer *layer;
    struct sqz_error error;
    float *queries = make_queries(&m, 24, 9, 0.4);
    sqz_squeeze_options_default(&o, SQZ_RULE_DEFAULT);
    assert_int_equal(sqz_layer_create(&layer, &shape, m.keys, m.values, 200, queries, 24, &o, 2, &error), SQZ_OK);
    for (size_t w = 0; w < COUNT(windows); w++) {
        struct sqz_layer window = *layer;
        struct own ring, whole;
        struct sqz_random random;
        window.sliding_window = true;
        window.n_window_tokens = windows[w];
        window.n_levels = 0;
        if (window.n_rows > windows[w]) window.n_rows = windows[w];
        sqz_random_seed(&random, w);
        make_own(&ring, &window, SQZ_USER_WINDOW, CAPACITY, 60);
        make_own(&whole, &window, SQZ_USER_WHOLE, CAPACITY, 60);
        for (size_t n = 0, n_more; n + BLOCK < CAPACITY; n += n_more) {
            n_more = 1 + sqz_random_below(&random, n % 2 ? BLOCK : 9);
            const size_t n_tokens = n_more < 24 ? n_more : 24;
            if (n % 3 == 0) put(&ring, n, n + 400 < CAPACITY ? 400 : 20, true); /* fails */
            put(&ring, n, n_more, false);
            put(&whole, n, n_more, false);
            struct sqz_attend_call call = call_on(&ring, &variations[0], queries, n_tokens, n + n_more, 1);
            call.upper = false;
            call.n_context_tokens = 200;
            struct run got = run(&window, &call);
            call.user = &whole.rows;
            struct run wanted = run(&window, &call);
            describe("window %u, %zu tokens behind %zu", windows[w], n_more, n);
            /* The same rows, added up in other pieces: weights and sums to some 2^-22. */
            for (size_t i = 0; i < n_tokens * 4 * 64; i++) check_close("output", i, got.out[i], wanted.out[i], 1e-4);
            free_run(&got);
            free_run(&wanted);
        }
        free_own(&ring);
        free_own(&whole);
    }
    free(queries);
    free_material(&m);
    sqz_layer_free(layer);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(flushed_blocks),
        cmocka_unit_test(counted_bytes),
        cmocka_unit_test(read_at_boundaries),
        cmocka_unit_test(read_by_batches),
        cmocka_unit_test(read_jointly),
        cmocka_unit_test(read_beside_f16),
        cmocka_unit_test(totals),
        cmocka_unit_test(forgotten_without_trace),
        cmocka_unit_test(cut_anywhere),
        cmocka_unit_test(refused_rows),
        cmocka_unit_test(nothing_allocated),
        cmocka_unit_test(seen_through_a_window),
    };
    bool supported;
    int failed = 0;
    for (size_t i = 0; sqz_kernels_variant(i, &supported); i++) {
        if (!supported) continue;
        assert_true(sqz_kernels_force(sqz_kernels_variant(i, &supported)->name));
        failed += cmocka_run_group_tests_name(sqz_kernels_get()->name, tests, NULL, NULL);
    }
    return failed;
}
