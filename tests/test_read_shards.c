/*
 * A text that is read into shards by several processes, which are threads here: what each block sees and what stays, in
 * layers with a window and without. A window's output is to the bit that of one process that has all rows, whoever reads;
 * a layer without is to the bit that of one process with as many shards, where processes are a power of two.
 */
#include "layer_fixture.h"

#include <pthread.h>

#include "attention.h"
#include "backend_cpu.h"
#include "read_shards.h"

enum { MOST_PROCESSES = 5, N_LAYERS = 2, WINDOW_LAYER = 0 };

struct read_case {
    uint32_t n, shards;
    size_t n_tokens, block, window;
};

/* ---- Processes that are threads --------------------------------------------------------------- */

/* What all have posted; the barrier stands between posting, taking and the next time. */
struct post {
    pthread_barrier_t barrier;
    struct sqz_message out[MOST_PROCESSES][MOST_PROCESSES], in[MOST_PROCESSES][MOST_PROCESSES];
    bool disagree; /* on the size of a message */
};

struct process {
    const struct read_case *c;
    const struct material *material;
    const float *queries; /* [T][H][D] */
    float *out;           /* [N_LAYERS][T][H][D], of all processes */
    struct post *post;
    uint32_t rank;
    size_t sent[N_LAYERS];
    uint32_t layer;        /* in work */
    uint16_t *window_rows; /* of the process with the first shard, at the end: keys, then values */
};

static void start(void *user_data, const struct sqz_message *out, const struct sqz_message *in)
{
    struct process *p = user_data;
    memcpy(p->post->out[p->rank], out, p->c->n * sizeof *out);
    memcpy(p->post->in[p->rank], in, p->c->n * sizeof *in);
}

static enum sqz_status finish(void *user_data, struct sqz_error *error)
{
    struct process *p = user_data;
    struct post *post = p->post;
    (void)error;
    pthread_barrier_wait(&post->barrier);
    for (uint32_t r = 0; r < p->c->n; r++) {
        const struct sqz_message *from = &post->out[r][p->rank], *to = &post->in[p->rank][r];
        if (r == p->rank) continue;
        p->sent[p->layer] += post->out[p->rank][r].n_bytes;
        if (from->n_bytes != to->n_bytes) post->disagree = true;
        else if (to->n_bytes) memcpy(to->bytes, from->bytes, to->n_bytes);
    }
    pthread_barrier_wait(&post->barrier);
    return SQZ_OK;
}

static void stop(void *user_data, const struct sqz_error *error)
{
    (void)user_data;
    (void)error;
}

/* ---- A process -------------------------------------------------------------------------------------- */

/* Rows that nobody has written are NaN, which one that sees them does not hide. */
static void plan_layer(struct sqz_layer_input *in, const struct read_case *c, const struct sqz_held_shards *held,
                       const struct sqz_layer_shape *shape, size_t window)
{
    const size_t room = sqz_held_room(held, window), n = shape->n_head_kv * room * shape->head_dim;
    *in = (struct sqz_layer_input){.shape = *shape,
                                   .keys = take(n, sizeof *in->keys),
                                   .values = take(n, sizeof *in->values),
                                   .window_tokens = window,
                                   .n_rows = window && window < c->n_tokens ? window : c->n_tokens};
    in->first_position = c->n_tokens - in->n_rows;
    for (size_t i = 0; i < n; i++) in->keys[i] = in->values[i] = HALF_NAN;
}

static void read_block(const struct process *p, struct sqz_reading_shards *r, uint32_t layer, size_t at, size_t n)
{
    const struct sqz_layer_shape *shape = &p->material->shape;
    const size_t d = shape->head_dim, row = shape->n_head * d, all = p->c->n_tokens;
    const struct sqz_attention_node node = {.layer = layer,
                                            .n_tokens = n,
                                            .queries = p->queries + at * row,
                                            .query_token_stride = row,
                                            .query_head_stride = d,
                                            .keys = p->material->keys + at * d,
                                            .values = p->material->values + at * d,
                                            .key_token_stride = d,
                                            .key_head_stride = all * d,
                                            .value_token_stride = d,
                                            .value_head_stride = all * d,
                                            .out = p->out + (layer * all + at) * row};
    struct sqz_error error;
    if (sqz_reading_shards_node(r, layer, n ? &node : NULL, 1, &error) != SQZ_OK) p->post->disagree = true;
}

static void *run_process(void *user_data)
{
    struct process *p = user_data;
    const struct read_case *c = p->c;
    const struct sqz_layer_shape *shape = &p->material->shape;
    const struct sqz_held_shards held = {{c->n_tokens, c->block, c->shards}, p->rank, c->n};
    const struct sqz_exchange exchange = {.n = c->n, .rank = p->rank, .user_data = p, start, finish, stop};
    struct sqz_layer_input inputs[N_LAYERS];
    struct sqz_reading_shards *r;
    struct sqz_backend *place;
    struct sqz_error error;
    for (uint32_t l = 0; l < N_LAYERS; l++) plan_layer(&inputs[l], c, &held, shape, l == WINDOW_LAYER ? c->window : 0);
    if (sqz_backend_cpu_create(&place, 1, &error) || place->ops->plan_reading(place, shape, &error) ||
        sqz_reading_shards_begin(&r, &held, c->n > 1 ? &exchange : NULL, place, inputs, N_LAYERS, &error))
        abort();
    for (size_t turn = 0; turn < c->n_tokens; turn += c->n * c->block) {
        const size_t at = turn + p->rank * c->block, left = at < c->n_tokens ? c->n_tokens - at : 0;
        sqz_reading_shards_turn(r, at, left < c->block ? left : c->block);
        for (p->layer = 0; p->layer < N_LAYERS; p->layer++)
            read_block(p, r, p->layer, at, left < c->block ? left : c->block);
    }
    sqz_reading_shards_end(r);
    sqz_reading_shards_free(r);
    if (p->rank == 0) {
        const struct sqz_layer_input *in = &inputs[WINDOW_LAYER];
        const size_t n = shape->n_head_kv * in->n_rows * shape->head_dim;
        p->window_rows = take(2 * n, sizeof *p->window_rows);
        memcpy(p->window_rows, in->keys, n * sizeof *in->keys);
        memcpy(p->window_rows + n, in->values, n * sizeof *in->values);
    }
    for (uint32_t l = 0; l < N_LAYERS; l++) {
        free(inputs[l].keys);
        free(inputs[l].values);
    }
    sqz_backend_cpu_free(place);
    return NULL;
}

/* All of the case's processes; [0]'s window_rows are the caller's. */
static void read_all(struct process *processes, const struct read_case *c, const struct material *m,
                     const float *queries, float *out)
{
    struct post post = {.disagree = false};
    pthread_t thread[MOST_PROCESSES];
    const size_t n = N_LAYERS * c->n_tokens * m->shape.n_head * m->shape.head_dim;
    for (size_t i = 0; i < n; i++) out[i] = NAN;
    assert_int_equal(pthread_barrier_init(&post.barrier, NULL, c->n), 0);
    for (uint32_t r = 0; r < c->n; r++) {
        processes[r] =
            (struct process){.c = c, .material = m, .queries = queries, .out = out, .post = &post, .rank = r};
        assert_int_equal(pthread_create(&thread[r], NULL, run_process, &processes[r]), 0);
    }
    for (uint32_t r = 0; r < c->n; r++) assert_int_equal(pthread_join(thread[r], NULL), 0);
    pthread_barrier_destroy(&post.barrier);
    check_true("messages agree", 0, post.disagree, 0, !post.disagree);
}

/* ---- What is wanted ------------------------------------------------------------------------------ */

/* The window's layer by one process that has all rows, in the same blocks. */
static void check_window_out(const struct read_case *c, const struct material *m, const float *queries,
                             const float *out)
{
    const size_t d = m->shape.head_dim, row = m->shape.n_head * d;
    float *wanted = take(c->block * row, sizeof *wanted);
    void *workspace = take(sqz_causal_workspace_bytes(&m->shape, 1), 1);
    for (size_t at = 0; at < c->n_tokens; at += c->block) {
        const size_t n = c->n_tokens - at < c->block ? c->n_tokens - at : c->block;
        sqz_attention_causal(&(struct sqz_causal_call){.shape = m->shape,
                                                       .queries = queries + at * row,
                                                       .out = wanted,
                                                       .query_token_stride = row,
                                                       .query_head_stride = d,
                                                       .out_token_stride = row,
                                                       .out_head_stride = d,
                                                       .n_tokens = n,
                                                       .first_position = at,
                                                       .window_tokens = c->window,
                                                       .keys = m->keys,
                                                       .values = m->values,
                                                       .capacity_rows = c->n_tokens,
                                                       .n_threads = 1,
                                                       .workspace = workspace});
        for (size_t i = 0; i < n * row; i++) {
            const float got = out[at * row + i];
            check_true("window", at * row + i, (double)got, (double)wanted[i], got == wanted[i]);
        }
    }
    free(wanted);
    free(workspace);
}

static void check_window_rows(const struct read_case *c, const struct material *m, const uint16_t *rows)
{
    const size_t d = m->shape.head_dim, k = m->shape.n_head_kv, all = c->n_tokens;
    const size_t n = c->window < all ? c->window : all;
    for (size_t h = 0; h < k; h++)
        for (size_t i = 0; i < n * d; i++) {
            const size_t from = (h * all + all - n) * d + i;
            check_true("key that stays", i, rows[h * n * d + i], m->keys[from], rows[h * n * d + i] == m->keys[from]);
            check_true("value that stays", i, rows[(k + h) * n * d + i], m->values[from],
                       rows[(k + h) * n * d + i] == m->values[from]);
        }
}

/* Tokens of process q whose rows process p has use for, found one by one: another token sees them, or they stay. Blocks go as
 * a whole. */
static size_t wanted_tokens(const struct read_case *c, uint32_t p, uint32_t q)
{
    size_t sum = 0;
    for (size_t begin = q * c->block; begin < c->n_tokens; begin += c->n * c->block) {
        const size_t end = begin + c->block < c->n_tokens ? begin + c->block : c->n_tokens;
        bool wanted = p == 0 && end + c->window > c->n_tokens;
        for (size_t t = end; t < c->n_tokens && t < end + c->window - 1; t++) wanted |= t / c->block % c->n == p;
        sum += wanted ? end - begin : 0;
    }
    return sum;
}

static void check_sent(const struct read_case *c, const struct process *processes)
{
    const struct sqz_layer_shape *shape = &processes->material->shape;
    for (uint32_t q = 0; q < c->n; q++) {
        size_t wanted = 0;
        for (uint32_t p = 0; p < c->n; p++)
            if (p != q) wanted += wanted_tokens(c, p, q) * 4 * shape->n_head_kv * shape->head_dim;
        check_true("bytes of a window's layer", q, (double)processes[q].sent[WINDOW_LAYER], (double)wanted,
                   processes[q].sent[WINDOW_LAYER] == wanted);
    }
}

static void check_case(const struct read_case *c, bool same_order)
{
    struct material m = make_material(make_shape(6, 2, 32), c->n_tokens, 20, 31 + c->n_tokens);
    const size_t n = c->n_tokens * 6 * 32;
    struct process processes[MOST_PROCESSES], alone[1];
    const struct read_case one = {1, c->shards, c->n_tokens, c->block, c->window};
    float *queries = make_queries(&m, c->n_tokens, 32, 1.5);
    float *out = take(N_LAYERS * n, sizeof *out), *by_one = take(N_LAYERS * n, sizeof *out);
    describe("%u processes, %u shards, %zu tokens in blocks of %zu, a window of %zu", c->n, c->shards, c->n_tokens,
             c->block, c->window);
    read_all(processes, c, &m, queries, out);
    read_all(alone, &one, &m, queries, by_one);
    check_window_out(c, &m, queries, out);
    check_window_out(c, &m, queries, by_one);
    check_window_rows(c, &m, processes->window_rows);
    check_window_rows(c, &m, alone->window_rows);
    check_sent(c, processes);
    for (size_t i = n; i < N_LAYERS * n; i++) {
        const double tolerance = same_order ? 0 : 1e-4; /* outputs of about 1; another order rounds otherwise */
        check_close("without a window", i, (double)out[i], (double)by_one[i], tolerance);
    }
    free(processes->window_rows);
    free(alone->window_rows);
    free(queries);
    free(out);
    free(by_one);
    free_material(&m);
}

/* Windows below a block, of one, across a turn, beyond some and beyond the text; texts that end in, at and behind a block. */
static void test_windows(void **state)
{
    static const struct read_case cases[] = {
        {1, 2, 300, 32, 20},   {2, 2, 300, 32, 20},  {2, 4, 320, 32, 32},  {2, 2, 161, 32, 33},  {4, 4, 129, 32, 34},
        {4, 8, 700, 32, 100},  {2, 2, 400, 32, 200}, {4, 4, 500, 32, 499}, {4, 4, 500, 32, 500}, {2, 2, 70, 32, 1000},
        {4, 4, 1000, 16, 130}, {2, 2, 200, 32, 1},   {4, 4, 260, 32, 2},
    };
    (void)state;
    for (size_t i = 0; i < COUNT(cases); i++) check_case(&cases[i], true);
}

static void test_odd_processes(void **state)
{
    static const struct read_case cases[] = {{3, 6, 500, 32, 90}, {5, 5, 331, 32, 65}, {3, 3, 200, 32, 31}};
    (void)state;
    for (size_t i = 0; i < COUNT(cases); i++) check_case(&cases[i], false);
}

/* One process in steps of any length, as serve reads a document between answers. */
static void test_steps(void **state)
{
    const struct read_case c = {1, 2, 500, 64, 50};
    struct material m = make_material(make_shape(6, 2, 32), c.n_tokens, 20, 77);
    const struct sqz_held_shards held = {{c.n_tokens, c.block, c.shards}, 0, 1};
    const size_t row = 6 * 32, steps[] = {64, 1, 40, 23, 7, 57};
    float *queries = make_queries(&m, c.n_tokens, 78, 1.5), *out = take(N_LAYERS * c.n_tokens * row, sizeof *out);
    struct post post = {.disagree = false};
    struct process p = {.c = &c, .material = &m, .queries = queries, .out = out, .post = &post};
    struct sqz_layer_input inputs[N_LAYERS];
    struct sqz_reading_shards *r;
    struct sqz_backend *place;
    struct sqz_error error;
    (void)state;
    describe("steps");
    for (uint32_t l = 0; l < N_LAYERS; l++)
        plan_layer(&inputs[l], &c, &held, &m.shape, l == WINDOW_LAYER ? c.window : 0);
    assert_int_equal(sqz_backend_cpu_create(&place, 1, &error), SQZ_OK);
    assert_int_equal(place->ops->plan_reading(place, &m.shape, &error), SQZ_OK);
    assert_int_equal(sqz_reading_shards_begin(&r, &held, NULL, place, inputs, N_LAYERS, &error), SQZ_OK);
    for (size_t at = 0, i = 0, n; at < c.n_tokens; at += n, i++) {
        n = steps[i % COUNT(steps)];
        if (n > c.block - at % c.block) n = c.block - at % c.block;
        if (n > c.n_tokens - at) n = c.n_tokens - at;
        sqz_reading_shards_turn(r, at, n);
        for (uint32_t l = 0; l < N_LAYERS; l++) read_block(&p, r, l, at, n);
    }
    sqz_reading_shards_end(r);
    sqz_reading_shards_free(r);
    /* Other blocks are other tiles: the last bits differ. */
    float *by_blocks = take(N_LAYERS * c.n_tokens * row, sizeof *by_blocks);
    struct process alone[1];
    read_all(alone, &c, &m, queries, by_blocks);
    for (size_t i = 0; i < N_LAYERS * c.n_tokens * row; i++)
        check_close("in steps", i, (double)out[i], (double)by_blocks[i], 1e-4);
    const size_t n_rows = 2 * inputs[WINDOW_LAYER].n_rows * 32;
    assert_memory_equal(alone->window_rows, inputs[WINDOW_LAYER].keys, n_rows * sizeof(uint16_t));
    assert_memory_equal(alone->window_rows + n_rows, inputs[WINDOW_LAYER].values, n_rows * sizeof(uint16_t));
    free(alone->window_rows);
    for (uint32_t l = 0; l < N_LAYERS; l++) {
        free(inputs[l].keys);
        free(inputs[l].values);
    }
    sqz_backend_cpu_free(place);
    free(queries);
    free(out);
    free(by_blocks);
    free_material(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_windows), cmocka_unit_test(test_odd_processes),
                                       cmocka_unit_test(test_steps)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
