/* The table of calls.h, on the CUDA runtime. Host code only. */
#include "calls.h"

#include <stdio.h>
#include <string.h>

#include "device.cuh"
#include "ops.h"

extern "C" size_t sqz_gpu_causal_workspace_bytes(const struct sqz_gpu_causal *args);
extern "C" enum sqz_status sqz_gpu_causal(const struct sqz_gpu_causal *args, void *stream);
extern "C" size_t sqz_gpu_build_workspace_bytes(const struct sqz_gpu_build *args);
extern "C" enum sqz_status sqz_gpu_build(const struct sqz_gpu_build *args, void *stream);
extern "C" size_t sqz_gpu_count_workspace_bytes(const struct sqz_gpu_count *args);
extern "C" enum sqz_status sqz_gpu_count(const struct sqz_gpu_count *args, void *stream);
extern "C" void *sqz_gpu_create_multiplier(void);
extern "C" void sqz_gpu_free_multiplier(void *multiplier);
extern "C" size_t sqz_gpu_product_workspace_bytes(const struct sqz_gpu_product *args);
extern "C" enum sqz_status sqz_gpu_product(void *multiplier, const struct sqz_gpu_product *args, void *stream);
extern "C" size_t sqz_gpu_projections_workspace_bytes(const struct sqz_gpu_projections *args);
extern "C" enum sqz_status sqz_gpu_project(const struct sqz_gpu_projections *args, void *stream);
extern "C" enum sqz_status sqz_gpu_widen(int type, const void *weights, size_t n, void *out, void *stream);

namespace
{

thread_local char words[256];

bool good(cudaError_t error)
{
    if (error == cudaSuccess) return true;
    snprintf(words, sizeof words, "%s", cudaGetErrorString(error));
    cudaGetLastError(); /* not to be found by the next launch */
    return false;
}

const char *complaint(void)
{
    return words[0] ? words : "CUDA refused a launch";
}

/* ---- Cards ------------------------------------------------------------------------- */

int count(void)
{
    int n = 0;
    if (!good(cudaGetDeviceCount(&n))) return 0;
    if (n == 0) snprintf(words, sizeof words, "the driver shows none");
    return n;
}

bool use(int device)
{
    return good(cudaSetDevice(device));
}

bool card(int device, struct sqz_gpu_card *out)
{
    cudaDeviceProp p;
    int before = 0;
    if (!good(cudaGetDevice(&before)) || !good(cudaGetDeviceProperties(&p, device))) return false;
    memset(out, 0, sizeof *out);
    snprintf(out->name, sizeof out->name, "%s", p.name);
    out->capability = p.major * 10 + p.minor;
    out->n_multiprocessors = p.multiProcessorCount;
    if (!use(device)) return false;
    const bool ok = good(cudaMemGetInfo(&out->free_bytes, &out->memory_bytes));
    out->supported = ok && sqz_cuda_device_supported();
    return use(before) && ok;
}

/* ---- Memory ------------------------------------------------------------------------- */

void *allocate(size_t bytes)
{
    void *p = NULL;
    return good(cudaMalloc(&p, bytes)) ? p : NULL;
}

void release(void *memory)
{
    good(cudaFree(memory));
}

void *allocate_pinned(size_t bytes)
{
    void *p = NULL;
    return good(cudaMallocHost(&p, bytes)) ? p : NULL;
}

void release_pinned(void *memory)
{
    good(cudaFreeHost(memory));
}

bool put(void *device, const void *host, size_t bytes, void *stream)
{
    return good(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, (cudaStream_t)stream));
}

bool get(void *host, const void *device, size_t bytes, void *stream)
{
    return good(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, (cudaStream_t)stream));
}

bool copy_runs(void *to, size_t to_stride, const void *from, size_t from_stride, size_t bytes, size_t n, void *stream)
{
    /* Runs that lie side by side are one: a two-dimensional copy of 128 MiB made 1.65 TB/s of an H200, read and written. */
    if (n == 1 || (to_stride == bytes && from_stride == bytes))
        return good(cudaMemcpyAsync(to, from, bytes * n, cudaMemcpyDefault, (cudaStream_t)stream));
    return good(cudaMemcpy2DAsync(to, to_stride, from, from_stride, bytes, n, cudaMemcpyDefault, (cudaStream_t)stream));
}

bool clear(void *device, size_t bytes, void *stream)
{
    return good(cudaMemsetAsync(device, 0, bytes, (cudaStream_t)stream));
}

/* ---- Streams and graphs --------------------------------------------------------------- */

void *create_stream(void)
{
    cudaStream_t s = NULL;
    return good(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)) ? s : NULL;
}

void free_stream(void *stream)
{
    good(cudaStreamDestroy((cudaStream_t)stream));
}

bool wait_for(void *stream)
{
    return good(cudaStreamSynchronize((cudaStream_t)stream));
}

void *create_event(void)
{
    cudaEvent_t e = NULL;
    return good(cudaEventCreateWithFlags(&e, cudaEventDisableTiming)) ? e : NULL;
}

void free_event(void *event)
{
    good(cudaEventDestroy((cudaEvent_t)event));
}

bool record(void *event, void *stream)
{
    return good(cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream));
}

bool follow(void *stream, void *event)
{
    return good(cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)event, 0));
}

bool begin_capture(void *stream)
{
    return good(cudaStreamBeginCapture((cudaStream_t)stream, cudaStreamCaptureModeRelaxed));
}

void *end_capture(void *stream)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t captured = NULL;
    if (!good(cudaStreamEndCapture((cudaStream_t)stream, &graph))) return NULL;
    const bool ok = good(cudaGraphInstantiate(&captured, graph, 0));
    good(cudaGraphDestroy(graph));
    return ok ? captured : NULL;
}

bool launch(void *captured, void *stream)
{
    return good(cudaGraphLaunch((cudaGraphExec_t)captured, (cudaStream_t)stream));
}

void free_captured(void *captured)
{
    good(cudaGraphExecDestroy((cudaGraphExec_t)captured));
}

/* Shared memory of a thread block that attend_planes.cu takes at most, of 16 query rows of 128 numbers. */
enum { PLANES_SHARED = 160 << 10 };

bool has_room_for_planes(void)
{
    int device, most;
    return good(cudaGetDevice(&device)) &&
           good(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) &&
           most >= PLANES_SHARED;
}

const char *obstacle(const struct sqz_cuda_attend_args *args)
{
    if (sqz_row_is_planes(args->layer->keys.type) && !has_room_for_planes())
        return "its rows are in planes, for which this card has too little shared memory";
    struct sqz_cuda_attend_args alone = *args;
    alone.ranks = NULL;
    if (sqz_cuda_attend_supported(&alone)) return args->ranks ? sqz_gpu_ranks_obstacle(args) : NULL;
    const char *why = sqz_cuda_layer_obstacle(args->layer);
    return why ? why : "it has more heads than a call takes";
}

bool connect(const int *cards, uint32_t n, char *why, size_t room)
{
    return sqz_cuda_ranks_connect(cards, n, why, room) == SQZ_OK;
}

const struct sqz_gpu_calls table = {
    sizeof(struct sqz_gpu_calls),
    SQZ_GPU_VERSION,
    count,
    card,
    use,
    complaint,
    allocate,
    release,
    allocate_pinned,
    release_pinned,
    put,
    get,
    copy_runs,
    clear,
    create_stream,
    free_stream,
    wait_for,
    create_event,
    free_event,
    record,
    follow,
    begin_capture,
    end_capture,
    launch,
    free_captured,
    obstacle,
    sqz_cuda_attend_workspace_bytes,
    sqz_cuda_attend,
    sqz_gpu_take,
    sqz_gpu_give,
    sqz_gpu_causal_workspace_bytes,
    sqz_gpu_causal,
    sqz_gpu_build_workspace_bytes,
    sqz_gpu_build,
    sqz_gpu_count_workspace_bytes,
    sqz_gpu_count,
    sqz_gpu_attend_node,
    sqz_gpu_create_multiplier,
    sqz_gpu_free_multiplier,
    sqz_gpu_product_workspace_bytes,
    sqz_gpu_product,
    sqz_gpu_projections_workspace_bytes,
    sqz_gpu_project,
    sqz_gpu_widen,
    sqz_gpu_several_workspace_bytes,
    sqz_gpu_attend_several,
    sqz_cuda_plane_index_bytes,
    sqz_cuda_plane_index,
    connect,
    sqz_cuda_mailbox_bytes,
    sqz_cuda_merge,
    sqz_cuda_user_planes_bytes,
    sqz_cuda_flush,
    sqz_cuda_move_user_planes,
};

} // namespace

extern "C" const struct sqz_gpu_calls *sqz_gpu_calls(void)
{
    return &table;
}
