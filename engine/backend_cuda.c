/*
 * Attention on a graphics card; backend_cuda.h.
 *
 * A pass, which is one run of llama.cpp, begins with begin(): contexts are seen
 * to be on the card, own rows to have room, and what differs from token to token
 * goes there in one copy, the frame: where each token's own rows are and how many,
 * and its thresholds, for every layer. From then on a node is launches alone,
 * whose arguments stay the same as long as the key does that begin() gives, so
 * that all of a token can be one CUDA graph.
 *
 * Every token is a sequence of its own to the kernels, with a selection of its
 * own, as on the CPU; tokens of a long question (more than EACH_MOST) share one,
 * because selections of hundreds of tokens read most of a context hundreds of times.
 */
#include "backend_cuda.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend_cpu.h"
#include "error.h"
#include "lookup.h"

enum {
    EACH_MOST = 64,   /* tokens with a selection each: sequences of one call */
    FIRST_ROOM = 256, /* own rows that there is room for at first; then twice as many */
    USER_STEP = 1024, /* launches are laid out for own rows in such steps */
    ALIGN = 256
};
static const size_t reserve_bytes = (size_t)1 << 30; /* left to llama.cpp when the limit is not given */

/* A layer on the card. */
struct layer_copy {
    struct sqz_layer layer;
    void *memory; /* all arrays; NULL: not there */
    const float *variance_gain;
    size_t bytes;
    bool on_cpu; /* has no kernel */
};

/* A context, shared by all who bound it. */
struct sqz_bound {
    struct cuda *cuda;
    const struct sqz_context *context;
    struct sqz_bound *cpu;     /* the CPU place's */
    struct layer_copy *layers; /* [n_layer] */
    uint32_t n_layer, n_on_cpu;
    size_t n_refs, bytes;
    bool resident, busy; /* busy: of the pass in flight */
    uint64_t last_used, generation;
    struct sqz_bound *next;
};

struct sqz_own_rows {
    struct sqz_bound *bound;
    struct sqz_own_rows *cpu; /* the CPU place's, for layers that are computed there */
    size_t capacity, room, bytes;
    void *memory;              /* NULL: no room yet */
    uint16_t **keys, **values; /* [n_layer] into memory, F16 [K][room][D] each */
};

/* Neighbouring tokens of a batch that one call computes. */
struct group {
    struct sqz_bound *bound;
    struct sqz_own_rows *own; /* of the only part, where the tokens share a selection */
    size_t first_token, n_tokens, n_user;
    bool shared, dense;
};

/* Of one layer in the frame. */
struct frame_layer {
    size_t users, thresholds, tails,
        retained;   /* offsets: struct sqz_cuda_user [T], float [T][K] twice; uint32_t [T][K] */
    bool runs_here; /* with fewer layers on the card than the model has some never come */
};

/* Keys and values of a layer while a text is read. */
struct reading_rows {
    uint16_t *keys, *values; /* [K][capacity][D]; NULL: on the CPU */
    size_t capacity, bytes;
};

struct cuda {
    struct sqz_backend base;
    const struct sqz_gpu_calls *calls;
    struct sqz_backend *cpu;
    int card;
    void *stream; /* of uploads */
    size_t limit, used;
    uint64_t clock, generation;
    struct sqz_bound *contexts;
    size_t n_uploads, n_evictions;

    /* The pass in flight. */
    struct group groups[SQZ_MOST_SEQUENCES];
    size_t n_groups, n_tokens;
    struct frame_layer *frame_layers; /* [n_frame_layers] */
    uint32_t n_frame_layers;
    char *frame, *frame_host; /* on the card; pinned */
    uint32_t *retained, *retained_host;
    size_t frame_bytes, frame_room, frame_host_room, retained_bytes, retained_room, retained_host_room;

    /* Scratch on the card. */
    char *queries, *out; /* F16 [T][H][D] */
    size_t queries_room, out_room;
    char *workspace;
    size_t workspace_room;

    /* Copies of a node's tokens for the CPU. */
    char *staging; /* pinned */
    size_t staging_room;
    struct sqz_attention_node staged;

    struct reading_rows *reading; /* [n_reading] */
    uint32_t n_reading;
};

static struct cuda *cuda_of(struct sqz_backend *backend)
{
    return (struct cuda *)backend;
}

static size_t aligned(size_t bytes)
{
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

/* ---- Memory on the card ---------------------------------------------------------------- */

static void evict(struct sqz_bound *b)
{
    struct cuda *cuda = b->cuda;
    if (!b->resident) return;
    for (uint32_t l = 0; l < b->n_layer; l++) {
        if (b->layers[l].memory) cuda->calls->release(b->layers[l].memory);
        b->layers[l].memory = NULL;
    }
    cuda->used -= b->bytes;
    b->bytes = 0;
    b->resident = false;
}

static struct sqz_bound *least_recently_used(struct cuda *cuda)
{
    struct sqz_bound *oldest = NULL;
    for (struct sqz_bound *b = cuda->contexts; b; b = b->next)
        if (b->resident && !b->busy && (!oldest || b->last_used < oldest->last_used)) oldest = b;
    return oldest;
}

/* Contexts that nobody is asking now leave until so many bytes fit below the limit. */
static bool make_space(struct cuda *cuda, size_t bytes)
{
    while (cuda->used + bytes > cuda->limit) {
        struct sqz_bound *oldest = least_recently_used(cuda);
        if (!oldest) return false;
        evict(oldest);
        cuda->n_evictions++;
    }
    return true;
}

/* NULL where there is none, also after all others have left. */
static void *take_memory(struct cuda *cuda, size_t bytes)
{
    if (!make_space(cuda, bytes)) return NULL;
    void *memory = cuda->calls->allocate(bytes);
    while (!memory) {
        struct sqz_bound *oldest = least_recently_used(cuda);
        if (!oldest) return NULL;
        evict(oldest);
        cuda->n_evictions++;
        memory = cuda->calls->allocate(bytes);
    }
    cuda->used += bytes;
    return memory;
}

static void give_memory(struct cuda *cuda, void *memory, size_t bytes)
{
    if (!memory) return;
    cuda->calls->release(memory);
    cuda->used -= bytes;
}

static enum sqz_status no_memory(const struct cuda *cuda, size_t bytes, const char *what, struct sqz_error *error)
{
    return sqz_error_set(error, SQZ_ERROR_MEMORY,
                         "out of memory on the card: %zu MiB for %s, %zu of %zu MiB are taken (--gpu-memory)",
                         (bytes >> 20) + 1, what, cuda->used >> 20, cuda->limit >> 20);
}

/* A buffer of at least so many bytes; what it held is lost. */
static bool grow(struct cuda *cuda, char **memory, size_t *room, size_t bytes)
{
    if (bytes <= *room) return true;
    give_memory(cuda, *memory, *room);
    *memory = take_memory(cuda, bytes);
    *room = *memory ? bytes : 0;
    return *memory != NULL;
}

static bool grow_pinned(struct cuda *cuda, void **memory, size_t *room, size_t bytes)
{
    if (bytes <= *room) return true;
    if (*memory) cuda->calls->release_pinned(*memory);
    *memory = cuda->calls->allocate_pinned(bytes);
    *room = *memory ? bytes : 0;
    return *memory != NULL;
}

/* ---- Contexts ------------------------------------------------------------------------------ */

/* An array of a layer: where it comes from and whose pointer it becomes. */
struct piece {
    const void *from;
    size_t bytes;
    const void **to;
};
enum { MOST_PIECES = 12 + 8 * SQZ_MAX_LEVELS };

static void add_piece(struct piece *pieces, size_t *n, const void *from, size_t bytes, const void **to)
{
    *to = NULL;
    if (from && bytes) pieces[(*n)++] = (struct piece){from, bytes, to};
}

/* n rows a head. */
static void rows_pieces(struct piece *pieces, size_t *n, const struct sqz_layer_shape *shape, size_t n_rows,
                        const struct sqz_rows *from, struct sqz_rows *to)
{
    const size_t k = shape->n_head_kv, d = shape->head_dim;
    to->type = from->type;
    add_piece(pieces, n, from->data, k * n_rows * sqz_row_data_bytes(from->type, d), &to->data);
    add_piece(pieces, n, from->scale, k * n_rows * sizeof(float), (const void **)&to->scale);
    add_piece(pieces, n, from->mean, k * d * sizeof(float), (const void **)&to->mean);
}

static void level_pieces(struct piece *pieces, size_t *n, const struct sqz_layer *from, uint32_t i,
                         struct sqz_level *to)
{
    const struct sqz_level *v = &from->level[i];
    const size_t k = from->shape.n_head_kv, c = v->n_clusters;
    to->n_clusters = v->n_clusters;
    rows_pieces(pieces, n, &from->shape, c, &v->centroids, &to->centroids);
    rows_pieces(pieces, n, &from->shape, c, &v->value_centroids, &to->value_centroids);
    add_piece(pieces, n, v->offset, k * (c + 1) * sizeof(uint32_t), (const void **)&to->offset);
    add_piece(pieces, n, v->variance, k * c * sizeof(float), (const void **)&to->variance);
}

static void codes_pieces(struct piece *pieces, size_t *n, const struct sqz_layer *from, struct sqz_codes *to)
{
    const struct sqz_codes *codes = &from->codes;
    const size_t k = from->shape.n_head_kv, m = codes->n_directions, w = codes->n_words;
    to->n_words = codes->n_words;
    to->n_directions = codes->n_directions;
    add_piece(pieces, n, codes->words, k * w * (from->n_rows - from->n_fixed) * sizeof(uint32_t),
              (const void **)&to->words);
    add_piece(pieces, n, codes->directions, k * m * from->shape.head_dim * 2, (const void **)&to->directions);
    add_piece(pieces, n, codes->book, k * 16 * m * 2, (const void **)&to->book);
    add_piece(pieces, n, codes->first, k * (8 * w + 1) * sizeof(uint32_t), (const void **)&to->first);
    add_piece(pieces, n, codes->spread, k * m * sizeof(float), (const void **)&to->spread);
}

/* Everything that the kernels know of a layer's structure is here. */
static size_t describe_layer(struct layer_copy *copy, const struct sqz_layer *from, struct piece *pieces)
{
    struct sqz_layer *to = &copy->layer;
    size_t n = 0;
    memset(to, 0, sizeof *to);
    to->space = SQZ_SPACE_CUDA;
    to->shape = from->shape;
    to->n_rows = from->n_rows;
    to->n_fixed = from->n_levels ? from->n_fixed : 0;
    to->n_levels = from->n_levels;
    to->rule = from->rule;
    to->group = from->group;
    rows_pieces(pieces, &n, &from->shape, from->n_rows, &from->keys, &to->keys);
    rows_pieces(pieces, &n, &from->shape, from->n_rows, &from->values, &to->values);
    add_piece(pieces, &n, from->variance_gain, from->shape.n_head_kv * sizeof(float),
              (const void **)&copy->variance_gain);
    for (uint32_t i = 0; i < from->n_levels; i++) level_pieces(pieces, &n, from, i, &to->level[i]);
    if (from->codes.n_words && from->n_levels) codes_pieces(pieces, &n, from, &to->codes);
    return n;
}

static enum sqz_status upload_layer(struct cuda *cuda, struct layer_copy *copy, const struct sqz_layer *from,
                                    struct sqz_error *error)
{
    struct piece pieces[MOST_PIECES];
    const size_t n = describe_layer(copy, from, pieces);
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) bytes += aligned(pieces[i].bytes);
    copy->memory = take_memory(cuda, bytes);
    copy->bytes = copy->memory ? bytes : 0;
    if (!copy->memory) return no_memory(cuda, bytes, "a layer of the context", error);
    char *at = copy->memory;
    for (size_t i = 0; i < n; i++, at += aligned(pieces[i - 1].bytes)) {
        *pieces[i].to = at;
        if (!cuda->calls->put(at, pieces[i].from, pieces[i].bytes, cuda->stream))
            return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", cuda->calls->complaint());
    }
    return SQZ_OK;
}

static enum sqz_status make_resident(struct sqz_bound *b, struct sqz_error *error)
{
    struct cuda *cuda = b->cuda;
    enum sqz_status status = SQZ_OK;
    const bool was_busy = b->busy;
    b->last_used = ++cuda->clock;
    if (b->resident) return SQZ_OK;
    b->resident = b->busy = true; /* not to be evicted while it comes */
    for (uint32_t l = 0; l < b->n_layer && status == SQZ_OK; l++) {
        if (b->layers[l].on_cpu) continue;
        status = upload_layer(cuda, &b->layers[l], sqz_context_layer(b->context, l), error);
        b->bytes += b->layers[l].bytes;
    }
    if (!cuda->calls->wait(cuda->stream) && status == SQZ_OK)
        status = sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", cuda->calls->complaint());
    b->busy = was_busy;
    if (status != SQZ_OK) evict(b);
    b->generation = ++cuda->generation;
    cuda->n_uploads++;
    return status;
}

static bool has_kernel(const struct cuda *cuda, const struct sqz_layer *layer)
{
    struct piece pieces[MOST_PIECES];
    struct layer_copy copy;
    if (layer->sliding_window) return false;
    describe_layer(&copy, layer, pieces);
    struct sqz_cuda_attend_args args = {.layer = &copy.layer, .n_sequences = 1, .n_tokens = 1};
    if (!cuda->calls->supported(&args)) return false;
    args.dense = layer->n_levels == 0;
    args.n_tokens = SQZ_BATCH_TOKENS;
    return cuda->calls->supported(&args);
}

static void unbind(struct sqz_bound *b)
{
    if (!b || --b->n_refs) return;
    struct cuda *cuda = b->cuda;
    cuda->calls->use(cuda->card);
    cuda->calls->wait(cuda->stream);
    evict(b);
    for (struct sqz_bound **p = &cuda->contexts; *p; p = &(*p)->next)
        if (*p == b) {
            *p = b->next;
            break;
        }
    if (b->cpu) cuda->cpu->ops->unbind(b->cpu);
    free(b->layers);
    free(b);
}

static enum sqz_status bind(struct sqz_backend *backend, const struct sqz_context *context, struct sqz_bound **bound,
                            struct sqz_error *error)
{
    struct cuda *cuda = cuda_of(backend);
    *bound = NULL;
    cuda->calls->use(cuda->card);
    for (struct sqz_bound *b = cuda->contexts; b; b = b->next)
        if (b->context == context) {
            b->n_refs++;
            *bound = b;
            return SQZ_OK;
        }
    struct sqz_bound *b = calloc(1, sizeof *b);
    if (!b) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a bound context");
    b->cuda = cuda;
    b->context = context;
    b->n_refs = 1;
    b->n_layer = sqz_context_get_meta(context)->n_layer;
    b->layers = calloc(b->n_layer, sizeof *b->layers);
    b->next = cuda->contexts;
    cuda->contexts = b;
    enum sqz_status status = b->layers ? cuda->cpu->ops->bind(cuda->cpu, context, &b->cpu, error)
                                       : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a bound context");
    for (uint32_t l = 0; l < b->n_layer && status == SQZ_OK; l++) {
        b->layers[l].on_cpu = !has_kernel(cuda, sqz_context_layer(context, l));
        b->n_on_cpu += b->layers[l].on_cpu;
    }
    if (status == SQZ_OK) status = make_resident(b, error);
    if (status != SQZ_OK) {
        unbind(b);
        return status;
    }
    *bound = b;
    return SQZ_OK;
}

/* ---- Own rows ------------------------------------------------------------------------------- */

static void free_own(struct sqz_own_rows *own)
{
    if (!own) return;
    struct cuda *cuda = own->bound->cuda;
    cuda->calls->use(cuda->card);
    give_memory(cuda, own->memory, own->bytes);
    if (own->cpu) cuda->cpu->ops->free_own(own->cpu);
    free(own->keys);
    free(own);
}

static enum sqz_status create_own(struct sqz_backend *backend, struct sqz_bound *bound, size_t capacity,
                                  struct sqz_own_rows **out, struct sqz_error *error)
{
    struct cuda *cuda = cuda_of(backend);
    struct sqz_own_rows *own = calloc(1, sizeof *own);
    *out = NULL;
    if (!own) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sequence");
    own->bound = bound;
    own->capacity = capacity;
    own->keys = calloc(2 * (size_t)bound->n_layer, sizeof *own->keys);
    own->values = own->keys ? own->keys + bound->n_layer : NULL;
    /* Address space alone, where every layer has a kernel. */
    const enum sqz_status status = own->keys
                                       ? cuda->cpu->ops->create_own(cuda->cpu, bound->cpu, capacity, &own->cpu, error)
                                       : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sequence");
    if (status != SQZ_OK) {
        free_own(own);
        return status;
    }
    *out = own;
    return SQZ_OK;
}

static size_t layer_row_bytes(const struct sqz_bound *bound, uint32_t l)
{
    const struct sqz_layer_shape *s = &sqz_context_layer(bound->context, l)->shape;
    return bound->layers[l].on_cpu ? 0 : (size_t)s->n_head_kv * s->head_dim * sizeof(uint16_t);
}

/* Room for n rows, the first n_kept of which stay. */
static enum sqz_status make_room(struct cuda *cuda, struct sqz_own_rows *own, size_t n, size_t n_kept, void *stream,
                                 struct sqz_error *error)
{
    const struct sqz_gpu_calls *calls = cuda->calls;
    size_t room = own->room ? own->room : FIRST_ROOM, row = 0;
    if (n <= own->room) return SQZ_OK;
    while (room < n) room *= 2;
    for (uint32_t l = 0; l < own->bound->n_layer; l++) row += 2 * layer_row_bytes(own->bound, l);
    char *memory = take_memory(cuda, row * room), *at = memory;
    if (!memory && row) return no_memory(cuda, row * room, "a session's tokens", error);
    bool ok = true;
    for (uint32_t l = 0; l < own->bound->n_layer; l++) {
        const size_t heads = sqz_context_layer(own->bound->context, l)->shape.n_head_kv;
        const size_t each = layer_row_bytes(own->bound, l) / heads; /* a row of a head */
        uint16_t **const rows[2] = {&own->keys[l], &own->values[l]};
        for (size_t i = 0; i < 2 && each; i++, at += each * heads * room) {
            if (n_kept)
                ok &= calls->copy_runs(at, each * room, *rows[i], each * own->room, each * n_kept, heads, stream);
            *rows[i] = (uint16_t *)at;
        }
    }
    ok &= calls->wait(stream);
    give_memory(cuda, own->memory, own->bytes);
    own->memory = memory;
    own->bytes = row * room;
    own->room = room;
    if (ok) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", calls->complaint());
}

/* ---- A pass ------------------------------------------------------------------------------------ */

static enum sqz_status fail_part(struct sqz_backend_part *p, enum sqz_status status)
{
    p->status = status;
    return status;
}

static enum sqz_status prepare_part(struct cuda *cuda, struct sqz_backend_part *p, void *stream)
{
    struct sqz_own_rows *own = p->own;
    own->bound->busy = true;
    enum sqz_status status = make_resident(own->bound, p->error);
    if (status == SQZ_OK) status = make_room(cuda, own, p->n_own + p->n_tokens, p->n_own, stream, p->error);
    return status == SQZ_OK ? SQZ_OK : fail_part(p, status);
}

/* What the kernels are told of own rows: more than there are, in steps, so that launches stay the same for long. */
static size_t user_bound(const struct sqz_backend_part *p)
{
    return (p->n_own + p->n_tokens + USER_STEP - 1) / USER_STEP * USER_STEP;
}

/* Whether a part's tokens go through the context together: many, or where there is nothing to select. */
static bool is_shared(const struct sqz_backend_part *p)
{
    return p->n_tokens > EACH_MOST || (p->n_tokens > 1 && p->budget >= 1.0f);
}

static bool joins(const struct group *g, const struct sqz_backend_part *p, bool dense)
{
    return !g->shared && g->bound == p->own->bound && g->dense == dense && g->n_tokens + p->n_tokens <= EACH_MOST &&
           g->first_token + g->n_tokens == p->first_token;
}

static void add_to_groups(struct cuda *cuda, const struct sqz_backend_part *p)
{
    const bool dense = p->budget >= 1.0f, shared = is_shared(p);
    struct group *g = cuda->n_groups ? &cuda->groups[cuda->n_groups - 1] : NULL;
    if (g && !shared && joins(g, p, dense)) {
        g->n_tokens += p->n_tokens;
        if (user_bound(p) > g->n_user) g->n_user = user_bound(p);
        return;
    }
    cuda->groups[cuda->n_groups++] = (struct group){.bound = p->own->bound,
                                                    .own = p->own,
                                                    .first_token = p->first_token,
                                                    .n_tokens = p->n_tokens,
                                                    .n_user = shared ? p->n_own + p->n_tokens : user_bound(p),
                                                    .shared = shared,
                                                    .dense = dense};
}

/* The frame's layout for n_tokens tokens of layers of this shape. */
static bool lay_out_frame(struct cuda *cuda, const struct sqz_bound *bound, size_t n_tokens)
{
    size_t at = 0, retained = 0;
    if (cuda->n_frame_layers < bound->n_layer) {
        struct frame_layer *layers = realloc(cuda->frame_layers, bound->n_layer * sizeof *layers);
        if (!layers) return false;
        memset(layers + cuda->n_frame_layers, 0, (bound->n_layer - cuda->n_frame_layers) * sizeof *layers);
        cuda->frame_layers = layers;
        cuda->n_frame_layers = bound->n_layer;
    }
    for (uint32_t l = 0; l < bound->n_layer; l++) {
        struct frame_layer *f = &cuda->frame_layers[l];
        const size_t numbers = n_tokens * sqz_context_layer(bound->context, l)->shape.n_head_kv;
        f->users = at;
        f->thresholds = at += aligned(n_tokens * sizeof(struct sqz_cuda_user));
        f->tails = at += aligned(numbers * sizeof(float));
        at += aligned(numbers * sizeof(float));
        f->retained = retained;
        retained += numbers;
    }
    cuda->frame_bytes = at;
    cuda->retained_bytes = retained * sizeof(uint32_t);
    cuda->n_tokens = n_tokens;
    return grow(cuda, &cuda->frame, &cuda->frame_room, at) &&
           grow_pinned(cuda, (void **)&cuda->frame_host, &cuda->frame_host_room, at) &&
           grow(cuda, (char **)&cuda->retained, &cuda->retained_room, cuda->retained_bytes) &&
           grow_pinned(cuda, (void **)&cuda->retained_host, &cuda->retained_host_room, cuda->retained_bytes);
}

static void fill_frame(struct cuda *cuda, const struct sqz_backend_part *p)
{
    const struct sqz_own_rows *own = p->own;
    for (uint32_t l = 0; l < own->bound->n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(own->bound->context, l);
        const struct frame_layer *f = &cuda->frame_layers[l];
        const size_t k = layer->shape.n_head_kv;
        struct sqz_cuda_user *users = (struct sqz_cuda_user *)(cuda->frame_host + f->users) + p->first_token;
        float *threshold = (float *)(cuda->frame_host + f->thresholds) + p->first_token * k;
        float *tail = (float *)(cuda->frame_host + f->tails) + p->first_token * k;
        for (size_t h = 0; h < k; h++) {
            const struct sqz_head_plan plan = sqz_head_plan_at(layer, (uint32_t)h, p->budget, p->log_offset);
            threshold[h] = plan.log_threshold;
            tail[h] = plan.tail_gain;
        }
        for (size_t t = 0; t < p->n_tokens; t++) {
            users[t] =
                (struct sqz_cuda_user){own->keys[l], own->values[l], (uint32_t)own->room, (uint32_t)(p->n_own + t + 1)};
            if (t == 0) continue;
            memcpy(threshold + t * k, threshold, k * sizeof *threshold);
            memcpy(tail + t * k, tail, k * sizeof *tail);
        }
    }
}

/* A call of one group at a layer, all but the workspace. */
static struct sqz_cuda_attend_args args_of(const struct cuda *cuda, const struct group *g, uint32_t l)
{
    const struct sqz_layer *layer = sqz_context_layer(g->bound->context, l);
    const struct frame_layer *f = &cuda->frame_layers[l];
    const size_t k = layer->shape.n_head_kv, row = (size_t)layer->shape.n_head * layer->shape.head_dim * 2;
    struct sqz_cuda_attend_args a = {
        .layer = &g->bound->layers[l].layer,
        .plan = {.log_threshold = (const float *)(cuda->frame + f->thresholds) + g->first_token * k,
                 .variance_gain = g->bound->layers[l].variance_gain,
                 .tail_gain = layer->tail ? (const float *)(cuda->frame + f->tails) + g->first_token * k : NULL},
        .dense = g->dense || layer->n_levels == 0,
        .n_sequences = g->shared ? 1 : (uint32_t)g->n_tokens,
        .n_tokens = g->shared ? (uint32_t)g->n_tokens : 1,
        .queries = cuda->queries + g->first_token * row,
        .out = cuda->out + g->first_token * row,
        .n_user = (uint32_t)g->n_user,
        .n_retained = cuda->retained + f->retained + g->first_token * k,
        .workspace = cuda->workspace,
        .workspace_bytes = cuda->workspace_room,
    };
    if (g->shared) {
        a.user_keys = g->own->keys[l];
        a.user_values = g->own->values[l];
        a.user_capacity_rows = (uint32_t)g->own->room;
    } else {
        a.users = (const struct sqz_cuda_user *)(cuda->frame + f->users) + g->first_token;
        a.plan.per_sequence = true;
    }
    return a;
}

static bool make_scratch(struct cuda *cuda, const struct sqz_bound *bound)
{
    size_t row = 0, workspace = 0;
    for (uint32_t l = 0; l < bound->n_layer; l++) {
        const struct sqz_layer_shape *s = &sqz_context_layer(bound->context, l)->shape;
        const size_t bytes = (size_t)s->n_head * s->head_dim * 2;
        if (bytes > row) row = bytes;
    }
    if (!grow(cuda, &cuda->queries, &cuda->queries_room, cuda->n_tokens * row) ||
        !grow(cuda, &cuda->out, &cuda->out_room, cuda->n_tokens * row))
        return false;
    for (size_t i = 0; i < cuda->n_groups; i++)
        for (uint32_t l = 0; l < bound->n_layer; l++) {
            const struct group *g = &cuda->groups[i];
            if (g->bound->layers[l].on_cpu) continue;
            const struct sqz_cuda_attend_args a = args_of(cuda, g, l);
            const size_t bytes = cuda->calls->workspace_bytes(&a);
            if (bytes > workspace) workspace = bytes;
        }
    return grow(cuda, &cuda->workspace, &cuda->workspace_room, workspace);
}

static uint64_t mixed(uint64_t key, uint64_t x)
{
    return (key ^ x) * 0x100000001b3ull;
}

/* What the launches of the pass depend on; 0 where they cannot be the same twice. */
static uint64_t key_of_pass(const struct cuda *cuda)
{
    uint64_t key = 0xcbf29ce484222325ull;
    const void *const scratch[] = {cuda->frame, cuda->retained, cuda->queries, cuda->out, cuda->workspace};
    for (size_t i = 0; i < sizeof scratch / sizeof *scratch; i++) key = mixed(key, (uintptr_t)scratch[i]);
    key = mixed(key, cuda->n_tokens);
    for (size_t i = 0; i < cuda->n_groups; i++) {
        const struct group *g = &cuda->groups[i];
        if (g->shared || g->bound->n_on_cpu) return 0;
        key = mixed(mixed(mixed(key, g->bound->generation), g->first_token), g->n_tokens);
        key = mixed(mixed(key, g->n_user), g->dense);
    }
    return key ? key : 1;
}

static uint64_t begin(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct cuda *cuda = cuda_of(backend);
    size_t n_tokens = 0;
    const struct sqz_bound *bound = NULL;
    cuda->n_groups = 0;
    cuda->calls->use(cuda->card);
    for (struct sqz_bound *b = cuda->contexts; b; b = b->next) b->busy = false;
    for (size_t i = 0; i < call->n_parts; i++) {
        struct sqz_backend_part *p = call->parts[i];
        if (prepare_part(cuda, p, call->stream) != SQZ_OK) continue;
        bound = p->own->bound;
        if (p->first_token + p->n_tokens > n_tokens) n_tokens = p->first_token + p->n_tokens;
        add_to_groups(cuda, p);
    }
    if (!bound) return 0;
    bool ok = lay_out_frame(cuda, bound, n_tokens) && make_scratch(cuda, bound);
    for (size_t i = 0; i < call->n_parts && ok; i++)
        if (call->parts[i]->status == SQZ_OK) fill_frame(cuda, call->parts[i]);
    if (ok) ok = cuda->calls->put(cuda->frame, cuda->frame_host, cuda->frame_bytes, call->stream);
    if (ok) return key_of_pass(cuda);
    for (size_t i = 0; i < call->n_parts; i++)
        fail_part(call->parts[i], no_memory(cuda, cuda->frame_bytes, "a batch", call->parts[i]->error));
    cuda->n_groups = 0;
    return 0;
}

/* ---- On the CPU, from copies --------------------------------------------------------------------- */

struct cpu_call {
    struct sqz_backend_call call;
    struct sqz_backend_part parts[SQZ_MOST_SEQUENCES], *pointers[SQZ_MOST_SEQUENCES];
};

static void cpu_call_of(struct cpu_call *c, const struct sqz_backend_call *call, const struct sqz_attention_node *node)
{
    c->call = *call;
    c->call.node = node;
    c->call.parts = c->pointers;
    c->call.stream = NULL;
    for (size_t i = 0; i < call->n_parts; i++) {
        c->parts[i] = *call->parts[i];
        c->parts[i].own = call->parts[i]->own->cpu;
        c->pointers[i] = &c->parts[i];
    }
}

/* The node's tokens in host memory, plain rows. False: no memory, or the card refused. */
static bool stage_node(struct cuda *cuda, const struct sqz_attention_node *node, const struct sqz_layer_shape *shape,
                       void *stream)
{
    const struct sqz_gpu_calls *calls = cuda->calls;
    const size_t t = node->n_tokens, d = shape->head_dim, q = shape->n_head * d, kv = shape->n_head_kv * d;
    if (!grow_pinned(cuda, (void **)&cuda->staging, &cuda->staging_room, t * (8 * q + 4 * kv))) return false;
    float *queries = (float *)cuda->staging, *out = queries + t * q;
    uint16_t *keys = (uint16_t *)(out + t * q), *values = keys + t * kv;
    bool ok = true;
    for (size_t h = 0; h < shape->n_head; h++)
        ok &= calls->copy_runs(queries + h * d, q * 4, node->queries + h * node->query_head_stride,
                               node->query_token_stride * 4, d * 4, t, stream);
    for (size_t h = 0; h < shape->n_head_kv; h++) {
        ok &= calls->copy_runs(keys + h * d, kv * 2, node->keys + h * node->key_head_stride, node->key_token_stride * 2,
                               d * 2, t, stream);
        ok &= calls->copy_runs(values + h * d, kv * 2, node->values + h * node->value_head_stride,
                               node->value_token_stride * 2, d * 2, t, stream);
    }
    cuda->staged = (struct sqz_attention_node){.layer = node->layer,
                                               .n_tokens = t,
                                               .queries = queries,
                                               .query_token_stride = q,
                                               .query_head_stride = d,
                                               .keys = keys,
                                               .values = values,
                                               .key_token_stride = kv,
                                               .key_head_stride = d,
                                               .value_token_stride = kv,
                                               .value_head_stride = d,
                                               .out = out};
    return calls->wait(stream) && ok;
}

static bool put_staged(struct cuda *cuda, const struct sqz_attention_node *node, const struct sqz_layer_shape *shape,
                       void *stream)
{
    const size_t bytes = node->n_tokens * shape->n_head * shape->head_dim * sizeof *node->out;
    return cuda->calls->put(node->out, cuda->staged.out, bytes, stream) && cuda->calls->wait(stream);
}

static void fail_all(const struct cuda *cuda, const struct sqz_backend_call *call, enum sqz_status status)
{
    for (size_t i = 0; i < call->n_parts; i++)
        fail_part(call->parts[i], sqz_error_set(call->parts[i]->error, status, "attention on the card failed: %s",
                                                cuda->calls->complaint()));
}

/* Whether this node is the CPU's; all contexts of a model have layers of the same shapes. */
static bool is_on_cpu(const struct sqz_backend_call *call)
{
    return !call->stream || call->parts[0]->own->bound->layers[call->node->layer].on_cpu;
}

static const struct sqz_layer_shape *shape_of(const struct sqz_backend_call *call)
{
    return &sqz_context_layer(call->parts[0]->own->bound->context, call->node->layer)->shape;
}

static void take_on_cpu(struct cuda *cuda, const struct sqz_backend_call *call)
{
    struct cpu_call c;
    if (call->stream && !stage_node(cuda, call->node, shape_of(call), call->stream)) {
        fail_all(cuda, call, SQZ_ERROR_INTERNAL);
        return;
    }
    cpu_call_of(&c, call, call->stream ? &cuda->staged : call->node);
    cuda->cpu->ops->take(cuda->cpu, &c.call);
}

static void attend_on_cpu(struct cuda *cuda, const struct sqz_backend_call *call)
{
    struct cpu_call c;
    cpu_call_of(&c, call, call->stream ? &cuda->staged : call->node);
    cuda->cpu->ops->attend(cuda->cpu, &c.call);
    for (size_t i = 0; i < call->n_parts; i++)
        if (c.parts[i].status != SQZ_OK) call->parts[i]->status = c.parts[i].status;
    if (call->stream && !put_staged(cuda, call->node, shape_of(call), call->stream))
        fail_all(cuda, call, SQZ_ERROR_INTERNAL);
}

/* ---- Attention ---------------------------------------------------------------------------------------- */

static struct sqz_gpu_node node_of(const struct sqz_attention_node *node, const struct sqz_layer_shape *shape)
{
    return (struct sqz_gpu_node){
        .n_tokens = (uint32_t)node->n_tokens,
        .n_head = shape->n_head,
        .n_head_kv = shape->n_head_kv,
        .head_dim = shape->head_dim,
        .queries = node->queries,
        .query_token_stride = node->query_token_stride,
        .query_head_stride = node->query_head_stride,
        .keys = node->keys,
        .values = node->values,
        .key_token_stride = node->key_token_stride,
        .key_head_stride = node->key_head_stride,
        .value_token_stride = node->value_token_stride,
        .value_head_stride = node->value_head_stride,
    };
}

static void take(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct cuda *cuda = cuda_of(backend);
    if (is_on_cpu(call)) {
        take_on_cpu(cuda, call);
        return;
    }
    const struct sqz_layer_shape *shape = shape_of(call);
    const struct frame_layer *f = &cuda->frame_layers[call->node->layer];
    const size_t row = (size_t)shape->n_head * shape->head_dim * 2;
    for (size_t i = 0; i < cuda->n_groups; i++) {
        const struct group *g = &cuda->groups[i];
        const struct sqz_attention_node part = sqz_node_part(call->node, shape, g->first_token, g->n_tokens);
        struct sqz_gpu_node node = node_of(&part, shape);
        node.users = (const struct sqz_cuda_user *)(cuda->frame + f->users) + g->first_token;
        node.queries_f16 = cuda->queries + g->first_token * row;
        const enum sqz_status status = cuda->calls->take(&node, call->stream);
        if (status != SQZ_OK) fail_all(cuda, call, status);
    }
}

static void attend(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct cuda *cuda = cuda_of(backend);
    if (is_on_cpu(call)) {
        attend_on_cpu(cuda, call);
        return;
    }
    const struct sqz_layer_shape *shape = shape_of(call);
    const size_t row = (size_t)shape->n_head * shape->head_dim;
    cuda->frame_layers[call->node->layer].runs_here = true;
    for (size_t i = 0; i < cuda->n_groups; i++) {
        const struct group *g = &cuda->groups[i];
        const struct sqz_cuda_attend_args args = args_of(cuda, g, call->node->layer);
        enum sqz_status status = cuda->calls->attend(&args, call->stream);
        if (status == SQZ_OK)
            status =
                cuda->calls->give(call->node->out + g->first_token * row, args.out, g->n_tokens * row, call->stream);
        if (status != SQZ_OK) fail_all(cuda, call, status);
    }
}

/* A context of this place lies in this place alone. */
static void total(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    (void)backend;
    for (size_t i = 0; i < call->n_parts; i++)
        fail_part(call->parts[i], sqz_error_set(call->parts[i]->error, SQZ_ERROR_UNSUPPORTED,
                                                "a context in several places is not supported on a card"));
}

/* ---- What a pass read ------------------------------------------------------------------------------------ */

static void add_stats(const struct cuda *cuda, const struct sqz_backend_part *p, uint32_t l)
{
    const struct sqz_layer *layer = sqz_context_layer(p->own->bound->context, l);
    const size_t k = layer->shape.n_head_kv, n = layer->n_rows, row = (size_t)layer->shape.head_dim * 2;
    const bool dense = p->budget >= 1.0f || layer->n_levels == 0, shared = is_shared(p);
    const uint32_t *groups = cuda->retained_host + cuda->frame_layers[l].retained + p->first_token * k;
    const size_t n_selections = (shared ? 1 : p->n_tokens) * k;
    uint64_t rows = 0, centroids = 0;
    for (size_t i = 0; i < n_selections; i++) {
        const uint64_t read = dense ? n : (uint64_t)groups[i] * 8;
        rows += read < n ? read : n;
    }
    for (uint32_t i = 0; i < layer->n_levels && !dense; i++) centroids += layer->level[i].n_clusters;
    p->stats->n_selections += n_selections;
    p->stats->context_bytes += n_selections * 2 * n * row;
    p->stats->centroid_bytes += centroids * n_selections * sqz_centroid_bytes(layer);
    p->stats->key_bytes += rows * row;
    p->stats->value_bytes += rows * row;
    p->stats->retained_keys += rows;
    p->stats->total_keys += n_selections * n;
}

static void finish(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct cuda *cuda = cuda_of(backend);
    if (cuda->n_groups == 0) return;
    cuda->calls->use(cuda->card);
    if (!cuda->calls->get(cuda->retained_host, cuda->retained, cuda->retained_bytes, call->stream) ||
        !cuda->calls->wait(call->stream)) {
        fail_all(cuda, call, SQZ_ERROR_INTERNAL);
        return;
    }
    for (size_t i = 0; i < call->n_parts; i++) {
        const struct sqz_bound *bound = call->parts[i]->own->bound;
        for (uint32_t l = 0; l < bound->n_layer && call->parts[i]->status == SQZ_OK; l++)
            if (cuda->frame_layers[l].runs_here) add_stats(cuda, call->parts[i], l);
    }
    cuda->n_groups = 0;
}

/* ---- Reading a text ------------------------------------------------------------------------------------------ */

static void end_reading(struct sqz_backend *backend)
{
    struct cuda *cuda = cuda_of(backend);
    cuda->calls->use(cuda->card);
    cuda->calls->wait(cuda->stream);
    for (uint32_t l = 0; l < cuda->n_reading; l++) give_memory(cuda, cuda->reading[l].keys, cuda->reading[l].bytes);
    free(cuda->reading);
    cuda->reading = NULL;
    cuda->n_reading = 0;
}

static enum sqz_status plan_reading(struct sqz_backend *backend, const struct sqz_layer_shape *shape,
                                    struct sqz_error *error)
{
    end_reading(backend);
    return cuda_of(backend)->cpu->ops->plan_reading(cuda_of(backend)->cpu, shape, error);
}

static struct sqz_gpu_causal causal_of(const struct sqz_backend_reading *r)
{
    return (struct sqz_gpu_causal){.shape = r->shape,
                                   .n_tokens = (uint32_t)r->node->n_tokens,
                                   .n_rows = (uint32_t)(r->first_position + r->node->n_tokens),
                                   .capacity_rows = r->capacity_rows,
                                   .out = r->node->out};
}

/* The layer's rows on the card; NULL: it has no kernel, or there is no memory, and it is read on the CPU. */
static struct reading_rows *rows_of_layer(struct cuda *cuda, const struct sqz_backend_reading *r)
{
    const uint32_t l = r->node->layer;
    if (l >= cuda->n_reading) {
        struct reading_rows *rows = realloc(cuda->reading, (l + 1) * sizeof *rows);
        if (!rows) return NULL;
        memset(rows + cuda->n_reading, 0, (l + 1 - cuda->n_reading) * sizeof *rows);
        cuda->reading = rows;
        cuda->n_reading = l + 1;
    }
    struct reading_rows *rows = &cuda->reading[l];
    if (r->first_position == 0 && !rows->keys) {
        const struct sqz_gpu_causal causal = causal_of(r);
        const size_t n = (size_t)r->shape.n_head_kv * r->capacity_rows * r->shape.head_dim;
        const bool slides = r->window_tokens && r->window_tokens < r->capacity_rows;
        if (slides || cuda->calls->causal_workspace_bytes(&causal) == 0) return NULL;
        rows->bytes = 2 * n * sizeof(uint16_t);
        rows->keys = take_memory(cuda, rows->bytes);
        rows->values = rows->keys ? rows->keys + n : NULL;
        rows->capacity = r->capacity_rows;
    }
    return rows->keys && rows->capacity == r->capacity_rows ? rows : NULL;
}

static enum sqz_status card_failed(const struct cuda *cuda, enum sqz_status status, struct sqz_error *error)
{
    return sqz_error_set(error, status, "attention on the card failed: %s", cuda->calls->complaint());
}

static enum sqz_status read_on_cpu(struct cuda *cuda, const struct sqz_backend_reading *r, struct sqz_error *error)
{
    struct sqz_backend_reading host = *r;
    host.stream = NULL;
    if (r->stream) {
        if (!stage_node(cuda, r->node, &r->shape, r->stream)) return card_failed(cuda, SQZ_ERROR_INTERNAL, error);
        host.node = &cuda->staged;
    }
    const enum sqz_status status = cuda->cpu->ops->read(cuda->cpu, &host, error);
    if (status != SQZ_OK || !r->stream || put_staged(cuda, r->node, &r->shape, r->stream)) return status;
    return card_failed(cuda, SQZ_ERROR_INTERNAL, error);
}

/* What the chunk's tokens add to the host's rows. */
static bool bring_rows(struct cuda *cuda, const struct sqz_backend_reading *r, const struct reading_rows *rows)
{
    const size_t d = r->shape.head_dim, at = r->first_position * d, stride = r->capacity_rows * d * 2;
    const size_t bytes = r->node->n_tokens * d * 2;
    return cuda->calls->copy_runs(r->keys + at, stride, rows->keys + at, stride, bytes, r->shape.n_head_kv,
                                  r->stream) &&
           cuda->calls->copy_runs(r->values + at, stride, rows->values + at, stride, bytes, r->shape.n_head_kv,
                                  r->stream);
}

static enum sqz_status read_on_card(struct cuda *cuda, const struct sqz_backend_reading *r, struct reading_rows *rows)
{
    struct sqz_gpu_causal causal = causal_of(r);
    struct sqz_gpu_node node = node_of(r->node, &r->shape);
    const size_t query_bytes = r->node->n_tokens * r->shape.n_head * r->shape.head_dim * 2;
    if (!grow(cuda, &cuda->queries, &cuda->queries_room, query_bytes) ||
        !grow(cuda, &cuda->workspace, &cuda->workspace_room, cuda->calls->causal_workspace_bytes(&causal)))
        return SQZ_ERROR_MEMORY;
    node.own_keys = rows->keys;
    node.own_values = rows->values;
    node.capacity_rows = r->capacity_rows;
    node.first_row = r->first_position;
    causal.queries = node.queries_f16 = cuda->queries;
    causal.keys = rows->keys;
    causal.values = rows->values;
    causal.workspace = cuda->workspace;
    causal.workspace_bytes = cuda->workspace_room;
    enum sqz_status status = cuda->calls->take(&node, r->stream);
    if (status == SQZ_OK) status = cuda->calls->causal(&causal, r->stream);
    if (status == SQZ_OK && !bring_rows(cuda, r, rows)) status = SQZ_ERROR_INTERNAL;
    return status;
}

static enum sqz_status read(struct sqz_backend *backend, const struct sqz_backend_reading *r, struct sqz_error *error)
{
    struct cuda *cuda = cuda_of(backend);
    struct reading_rows *rows = r->stream ? rows_of_layer(cuda, r) : NULL;
    if (!rows) return read_on_cpu(cuda, r, error);
    const enum sqz_status status = read_on_card(cuda, r, rows);
    return status == SQZ_OK ? SQZ_OK : card_failed(cuda, status, error);
}

static bool fetch_queries(struct sqz_backend *backend, const struct sqz_attention_node *node,
                          const struct sqz_layer_shape *shape, void *stream, struct sqz_attention_node *host)
{
    struct cuda *cuda = cuda_of(backend);
    if (!stage_node(cuda, node, shape, stream)) return false;
    *host = cuda->staged;
    return true;
}

/* ---- The place -------------------------------------------------------------------------------------------------- */

static const struct sqz_backend_ops ops = {
    .name = "CUDA",
    .steered = true,
    .bind = bind,
    .unbind = unbind,
    .create_own = create_own,
    .free_own = free_own,
    .begin = begin,
    .take = take,
    .attend = attend,
    .total = total,
    .finish = finish,
    .plan_reading = plan_reading,
    .read = read,
    .end_reading = end_reading,
    .fetch_queries = fetch_queries,
};

static size_t free_on_card(const struct sqz_gpu_calls *calls, int card)
{
    struct sqz_gpu_card info;
    if (!calls->card(card, &info)) return 0;
    return info.free_bytes > reserve_bytes ? info.free_bytes - reserve_bytes : 0;
}

enum sqz_status sqz_backend_cuda_create(struct sqz_backend **out, const struct sqz_gpu_calls *calls, int card,
                                        size_t memory_bytes, int n_threads, struct sqz_error *error)
{
    struct cuda *cuda = calloc(1, sizeof *cuda);
    *out = NULL;
    if (!cuda) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for attention");
    cuda->base.ops = &ops;
    cuda->calls = calls;
    cuda->card = card;
    enum sqz_status status = sqz_backend_cpu_create(&cuda->cpu, n_threads, error);
    if (status == SQZ_OK && (!calls->use(card) || !(cuda->stream = calls->create_stream())))
        status = sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "card %d cannot be used: %s", card, calls->complaint());
    cuda->limit = memory_bytes ? memory_bytes : free_on_card(calls, card);
    if (status != SQZ_OK) {
        sqz_backend_cuda_free(&cuda->base);
        return status;
    }
    *out = &cuda->base;
    return SQZ_OK;
}

void sqz_backend_cuda_free(struct sqz_backend *backend)
{
    if (!backend) return;
    struct cuda *cuda = cuda_of(backend);
    const struct sqz_gpu_calls *calls = cuda->calls;
    calls->use(cuda->card);
    if (cuda->stream) end_reading(backend), calls->free_stream(cuda->stream);
    give_memory(cuda, cuda->frame, cuda->frame_room);
    give_memory(cuda, cuda->retained, cuda->retained_room);
    give_memory(cuda, cuda->queries, cuda->queries_room);
    give_memory(cuda, cuda->out, cuda->out_room);
    give_memory(cuda, cuda->workspace, cuda->workspace_room);
    if (cuda->frame_host) calls->release_pinned(cuda->frame_host);
    if (cuda->retained_host) calls->release_pinned(cuda->retained_host);
    if (cuda->staging) calls->release_pinned(cuda->staging);
    sqz_backend_cpu_free(cuda->cpu);
    free(cuda->frame_layers);
    free(cuda);
}

struct sqz_backend_cuda_use sqz_backend_cuda_use(const struct sqz_backend *backend)
{
    const struct cuda *cuda = (const struct cuda *)backend;
    struct sqz_backend_cuda_use use = {.memory_bytes = cuda->used,
                                       .limit_bytes = cuda->limit,
                                       .n_uploads = cuda->n_uploads,
                                       .n_evictions = cuda->n_evictions};
    for (const struct sqz_bound *b = cuda->contexts; b; b = b->next) {
        use.n_resident += b->resident;
        use.n_cpu_layers += b->n_on_cpu;
    }
    return use;
}
