/*
 * What it costs that a sequence's own rows go into planes (`squeeze bench kernels --rows`, the rows `flush`): a block of 128 keys
 * and values of every KV head, which comes once in 128 tokens. What a block holds is held against the rows before anything
 * is timed: no turned number is off by more than half a step, so no row by more than that times the root of its numbers.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench_kernels.h"
#include "common.h"
#include "json_output.h"
#include "kernels.h"
#include "times.h"
#include "user_rows.h"

enum { BLOCK = SQZ_USER_BLOCK, BEFORE = 2 * BLOCK, MAX_NUMBERS = 256 };

struct flush {
    const struct sqz_layer *from; /* whose first F16 rows are put */
    struct sqz_layer layer;       /* of the same shape, in planes */
    struct sqz_user_rows rows;
    void *memory;
    float *mean;
};

static void make(struct flush *f, const struct sqz_layer *from, enum sqz_row_type type)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    *f = (struct flush){.from = from, .layer = *from};
    f->mean = calloc((size_t)from->shape.n_head_kv * from->shape.head_dim, sizeof *f->mean);
    f->layer.keys.type = f->layer.values.type = type;
    f->layer.values.mean = f->mean;
    sqz_user_rows_carve(&arena, &f->rows, &f->layer, SQZ_USER_PLANES, 4 * BLOCK);
    f->memory = malloc(sqz_arena_bytes(&arena));
    if (!f->mean || !f->memory) die("out of memory for own rows");
    arena = sqz_arena_on(f->memory);
    sqz_user_rows_carve(&arena, &f->rows, &f->layer, SQZ_USER_PLANES, 4 * BLOCK);
}

static void discard(struct flush *f)
{
    free(f->memory);
    free(f->mean);
}

/* Two blocks, none of which is flushed. */
static void put(struct flush *f)
{
    const size_t d = f->rows.head_dim;
    for (size_t at = 0; at < BEFORE; at += BLOCK) {
        if (!sqz_user_rows_ready(&f->rows, at, BLOCK, at, 1)) die("own rows: no room for row %zu", at);
        const struct sqz_user_buffer *b = sqz_user_rows_block(&f->rows, at);
        for (size_t h = 0; h < f->rows.n_head_kv; h++) {
            const size_t from = (h * f->from->n_rows + at) * d, to = h * BLOCK * d;
            memcpy(b->keys + to, sqz_rows_f16(&f->from->keys) + from, BLOCK * d * sizeof *b->keys);
            memcpy(b->values + to, sqz_rows_f16(&f->from->values) + from, BLOCK * d * sizeof *b->values);
        }
    }
}

/* The next row, before which the first block is flushed. */
static double flush(struct flush *f, int n_threads)
{
    const double since = now_seconds();
    if (!sqz_user_rows_ready(&f->rows, BEFORE, 1, BEFORE, n_threads)) die("own rows: the first block is not flushed");
    return now_seconds() - since;
}

static double largest_error(const struct sqz_rows *rows, const struct sqz_rows *from, size_t d)
{
    const double unit = rows->type == SQZ_ROW_I44 ? 1.0 / 16 : 1.0;
    float got[MAX_NUMBERS], wanted[MAX_NUMBERS], step;
    double worst = 0;
    for (size_t r = 0; r < BLOCK; r++) {
        double off = 0;
        sqz_rows_to_f32(got, rows, r, 1, d);
        sqz_rows_to_f32(wanted, from, r, 1, d);
        sqz_kernels_get()->f16_to_f32(&step, rows->planes.step + r, 1);
        for (size_t i = 0; i < d; i++) off = fmax(off, fabs((double)got[i] - (double)wanted[i]));
        worst = fmax(worst, off / (0.5 * unit * (double)step * sqrt((double)d)));
    }
    return worst;
}

/* What rows are off by, as a share of what they may be. Dies when it is more. */
static double check(const struct flush *f)
{
    const size_t d = f->rows.head_dim;
    double worst = 0;
    for (size_t h = 0; h < f->rows.n_head_kv; h++) {
        const struct sqz_rows keys = sqz_rows_of_head(&f->rows.keys, f->rows.n_plane_rows, d, h);
        const struct sqz_rows values = sqz_rows_of_head(&f->rows.values, f->rows.n_plane_rows, d, h);
        const struct sqz_rows from_keys = sqz_rows_of_head(&f->from->keys, f->from->n_rows, d, h);
        const struct sqz_rows from_values = sqz_rows_of_head(&f->from->values, f->from->n_rows, d, h);
        worst = fmax(worst, fmax(largest_error(&keys, &from_keys, d), largest_error(&values, &from_values, d)));
    }
    if (!(worst <= 1.01)) die("own rows in planes are off by %g of what they may be, nothing was timed", worst);
    return worst;
}

static json_t *flush_json(const struct flush *f, const struct bench_rows_options *o)
{
    static const char *const names[] = {[SQZ_ROW_I4] = "int4", [SQZ_ROW_I44] = "int4+4"};
    struct bench_times times = {0};
    struct flush again = *f;
    json_t *row = json_object(), *all = json_array();
    double error = 0;
    for (size_t i = 0; i < o->n_repeats && !signal_caught(); i++) {
        put(&again);
        times.seconds[times.n++] = flush(&again, o->layer->options.n_threads);
        if (i == 0) error = check(&again);
    }
    const double seconds = bench_quantile(&times, 0.5);
    const double bytes = (double)(BLOCK * f->rows.n_head_kv * f->rows.head_dim * 2 * sizeof(uint16_t));
    for (size_t i = 0; i < times.n; i++) json_array_append_new(all, json_number(times.seconds[i]));
    json_object_set_new(row, "op", json_string("flush"));
    json_object_set_new(row, "rows", json_string(names[f->layer.keys.type]));
    json_object_set_new(row, "tokens", json_count(BLOCK));
    json_object_set_new(row, "queries", json_count(0));
    json_object_set_new(row, "seconds", json_number(seconds));
    json_object_set_new(row, "seconds_a_token", json_number(seconds / BLOCK));
    json_object_set_new(row, "seconds_all", all);
    json_object_set_new(row, "bytes", json_number(bytes));
    json_object_set_new(row, "gb_s", json_number(bytes / seconds / 1e9));
    json_object_set_new(row, "verified", json_true());
    json_object_set_new(row, "error", json_number(error));
    return row;
}

bool bench_own_rows_run(const struct bench_rows_options *o, json_t *rows)
{
    static const enum sqz_row_type types[] = {SQZ_ROW_I44, SQZ_ROW_I4};
    if (o->layer->layer.n_rows < BEFORE) return true;
    for (size_t i = 0; i < 2 && !signal_caught(); i++) {
        struct flush f;
        make(&f, &o->layer->layer, types[i]);
        json_array_append_new(rows, flush_json(&f, o));
        discard(&f);
    }
    return !signal_caught();
}
