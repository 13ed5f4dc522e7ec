/*
 * In place of ggml's CUDA back end: a module whose devices are ggml's CPU back end
 * under the name of cards, with streams and events that have nothing to do. Their
 * memory is host memory, but says that it is not, and each has its own kind of it,
 * so that graphs are split as between cards. It finds ggml in the program that loads
 * it, as the real one does.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

ggml_backend_reg_t ggml_backend_init(void);

enum { MOST_CARDS = 4 };
static struct ggml_backend_device devices[MOST_CARDS];
static struct ggml_backend_buffer_type memories[MOST_CARDS];
static struct ggml_backend_reg registry;

static ggml_backend_t inner_of(ggml_backend_t backend)
{
    return backend->context;
}

static ggml_backend_dev_t cpu(void)
{
    return ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
}

/* ---- The stream ------------------------------------------------------------------- */

static const char *stream_name(ggml_backend_t backend)
{
    return ggml_backend_dev_name(backend->device);
}

static void free_stream(ggml_backend_t backend)
{
    ggml_backend_free(inner_of(backend));
    free(backend);
}

static void set_async(ggml_backend_t backend, struct ggml_tensor *tensor, const void *data, size_t offset, size_t size)
{
    (void)backend;
    memcpy((char *)tensor->data + offset, data, size);
}

static void get_async(ggml_backend_t backend, const struct ggml_tensor *tensor, void *data, size_t offset, size_t size)
{
    (void)backend;
    memcpy(data, (const char *)tensor->data + offset, size);
}

static bool copy_async(ggml_backend_t from, ggml_backend_t to, const struct ggml_tensor *source,
                       struct ggml_tensor *copy)
{
    (void)from, (void)to;
    memcpy(copy->data, source->data, ggml_nbytes(source));
    return true;
}

/* With SQUEEZE_FAKE_WAITS a line goes to that file each time that somebody waits for a card. */
static void synchronize(ggml_backend_t backend)
{
    const char *path = getenv("SQUEEZE_FAKE_WAITS");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s\n", stream_name(backend));
    fclose(file);
}

static enum ggml_status compute(ggml_backend_t backend, struct ggml_cgraph *graph)
{
    return ggml_backend_graph_compute(inner_of(backend), graph);
}

static void event(ggml_backend_t backend, ggml_backend_event_t e)
{
    (void)backend, (void)e;
}

static ggml_backend_t init_stream(ggml_backend_dev_t d, const char *parameters)
{
    static uint8_t guid[16] = {0xfa, 0xce};
    ggml_backend_t backend = calloc(1, sizeof *backend);
    backend->guid = &guid;
    backend->device = d;
    backend->context = ggml_backend_dev_init(cpu(), parameters);
    backend->iface = (struct ggml_backend_i){.get_name = stream_name,
                                             .free = free_stream,
                                             .set_tensor_async = set_async,
                                             .get_tensor_async = get_async,
                                             .cpy_tensor_async = copy_async,
                                             .synchronize = synchronize,
                                             .graph_compute = compute,
                                             .event_record = event,
                                             .event_wait = event};
    return backend;
}

/* ---- The device --------------------------------------------------------------------- */

static const char *name(ggml_backend_dev_t d)
{
    static const char *const names[MOST_CARDS] = {"card 0", "card 1", "card 2", "card 3"};
    return names[d - devices];
}

static void memory(ggml_backend_dev_t d, size_t *free_bytes, size_t *total)
{
    (void)d;
    *free_bytes = *total = (size_t)64 << 30;
}

static enum ggml_backend_dev_type type(ggml_backend_dev_t d)
{
    (void)d;
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void props(ggml_backend_dev_t d, struct ggml_backend_dev_props *p)
{
    memset(p, 0, sizeof *p);
    p->name = p->description = name(d);
    p->type = type(d);
    memory(d, &p->memory_free, &p->memory_total);
    p->caps.async = p->caps.events = true;
}

static ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t d)
{
    return &memories[d - devices];
}

static const char *memory_name(ggml_backend_buffer_type_t t)
{
    return name(t->device);
}

static ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t t, size_t bytes)
{
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(cpu()), bytes);
    if (buffer) buffer->buft = t;
    return buffer;
}

static size_t alignment(ggml_backend_buffer_type_t t)
{
    (void)t;
    return ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(cpu()));
}

/* Attention of some head dimensions alone, as ggml's CUDA back end. */
static bool supports_op(ggml_backend_dev_t d, const struct ggml_tensor *op)
{
    (void)d;
    if (op->op == GGML_OP_FLASH_ATTN_EXT && (op->src[0]->ne[0] % 64 || op->src[0]->ne[0] == 192)) return false;
    return ggml_backend_dev_supports_op(cpu(), op);
}

static bool supports_buft(ggml_backend_dev_t d, ggml_backend_buffer_type_t t)
{
    return t == buffer_type(d);
}

static ggml_backend_event_t event_new(ggml_backend_dev_t d)
{
    ggml_backend_event_t e = calloc(1, sizeof *e);
    e->device = d;
    e->context = e;
    return e;
}

static void event_free(ggml_backend_dev_t d, ggml_backend_event_t e)
{
    (void)d;
    free(e);
}

static void event_synchronize(ggml_backend_dev_t d, ggml_backend_event_t e)
{
    (void)d, (void)e;
}

static const char *registry_name(ggml_backend_reg_t r)
{
    (void)r;
    return "card";
}

static size_t device_count(ggml_backend_reg_t r)
{
    const char *n = getenv("SQUEEZE_FAKE_CARDS");
    (void)r;
    return n && atoi(n) <= MOST_CARDS ? (size_t)atoi(n) : 1;
}

static ggml_backend_dev_t get_device(ggml_backend_reg_t r, size_t i)
{
    (void)r;
    return &devices[i];
}

ggml_backend_reg_t ggml_backend_init(void)
{
    registry = (struct ggml_backend_reg){.api_version = GGML_BACKEND_API_VERSION,
                                         .iface = {registry_name, device_count, get_device, NULL}};
    for (size_t i = 0; i < MOST_CARDS; i++) {
        memories[i] = (struct ggml_backend_buffer_type){
            .iface = {.get_name = memory_name, .alloc_buffer = allocate, .get_alignment = alignment},
            .device = &devices[i]};
        devices[i] = (struct ggml_backend_device){.reg = &registry,
                                                  .iface = {.get_name = name,
                                                            .get_description = name,
                                                            .get_memory = memory,
                                                            .get_type = type,
                                                            .get_props = props,
                                                            .init_backend = init_stream,
                                                            .get_buffer_type = buffer_type,
                                                            .supports_op = supports_op,
                                                            .supports_buft = supports_buft,
                                                            .event_new = event_new,
                                                            .event_free = event_free,
                                                            .event_synchronize = event_synchronize}};
    }
    return &registry;
}
