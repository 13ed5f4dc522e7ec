/* Loading the GPU libraries, gpu.h. */
#define _GNU_SOURCE /* dladdr */
#include "gpu.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-backend.h"
#ifdef SQZ_GPU_DEVICE
#include "gpu_device.h"
#endif

static struct {
    const struct sqz_gpu_calls *calls;
    ggml_backend_reg_t ggml;
    ggml_backend_dev_t devices[SQZ_MOST_CARDS];
    bool by_callback;
    int n_cards, n_usable;
    char kernels_path[PATH_MAX], ggml_path[PATH_MAX], reason[PATH_MAX + 128];
} gpu;

/* ---- Finding the files -------------------------------------------------------------- */

/* The folder of the program or shared library that this function is in; false where it cannot be told. */
static bool own_folder(char *out)
{
    Dl_info info;
    char path[PATH_MAX];
    if (!dladdr((void *)(uintptr_t)own_folder, &info) || !info.dli_fname) return false;
    /* Of a program without an absolute name the kernel knows better. */
    if (!realpath(strchr(info.dli_fname, '/') ? info.dli_fname : "/proc/self/exe", path)) return false;
    char *slash = strrchr(path, '/');
    if (!slash) return false;
    *slash = '\0';
    memcpy(out, path, (size_t)(slash - path) + 1);
    return true;
}

/* Opens the library of that name from the first folder that has it. What went wrong is in `reason`. */
static void *open_library(const char *name, char *path, char *reason, size_t reason_size)
{
    static const char installed[] = "/../" SQZ_LIBRARY_FOLDER "/squeeze", beside_it[] = "/../" SQZ_LIBRARY_FOLDER;
    static const char *const below[] = {"", installed, beside_it};
    const char *asked = getenv("SQUEEZE_GPU_PATH");
    char folder[PATH_MAX];
    if (asked && asked[0]) snprintf(folder, sizeof folder, "%s", asked);
    else if (!own_folder(folder)) folder[0] = '\0';
    for (size_t i = 0; folder[0] && i < (asked && asked[0] ? 1 : sizeof below / sizeof *below); i++) {
        const int n = snprintf(path, PATH_MAX, "%s%s/%s", folder, below[i], name);
        FILE *file = n > 0 && n < PATH_MAX ? fopen(path, "rb") : NULL;
        if (!file) continue;
        fclose(file);
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library) return library;
        const char *words = dlerror();
        snprintf(reason, reason_size, "%s cannot be loaded: %s", name, words ? words : path);
        path[0] = '\0';
        return NULL;
    }
    path[0] = '\0';
    snprintf(reason, reason_size, "this build has no %s (looked in %s)", name, folder[0] ? folder : "no folder");
    return NULL;
}

/* ---- Loading -------------------------------------------------------------------------- */

static bool load_kernels(void)
{
    const struct sqz_gpu_calls *(*get)(void) = NULL;
    void *library = open_library("libsqueeze_cuda.so." SQZ_GPU_SONAME, gpu.kernels_path, gpu.reason, sizeof gpu.reason);
    if (!library) return false;
    *(void **)&get = dlsym(library, SQZ_GPU_CALLS_NAME);
    const struct sqz_gpu_calls *calls = get ? get() : NULL;
    if (!calls || calls->size != sizeof *calls || calls->version != SQZ_GPU_VERSION) {
        snprintf(gpu.reason, sizeof gpu.reason, "%s is of another version of squeeze", gpu.kernels_path);
        return false;
    }
    gpu.calls = calls;
    gpu.n_cards = calls->count();
    if (gpu.n_cards == 0) snprintf(gpu.reason, sizeof gpu.reason, "no NVIDIA card: %s", calls->complaint());
    return gpu.n_cards > 0;
}

#ifdef SQZ_GPU_DEVICE
static bool load_ggml(void)
{
    ggml_backend_reg_t (*begin)(void) = NULL;
    void *library = open_library("libggml-cuda.so", gpu.ggml_path, gpu.reason, sizeof gpu.reason);
    if (!library) return false;
    *(void **)&begin = dlsym(library, "ggml_backend_init");
    gpu.ggml = begin ? begin() : NULL;
    if (!gpu.ggml || !sqz_gpu_device_fits(gpu.ggml)) {
        snprintf(gpu.reason, sizeof gpu.reason, "%s is of another version of ggml", gpu.ggml_path);
        return false;
    }
    return true;
}
#else
static bool load_ggml(void)
{
    gpu.by_callback = true;
    gpu.ggml = ggml_backend_reg_by_name("CUDA");
    if (!gpu.ggml) ggml_backend_load_all();
    if (!gpu.ggml) gpu.ggml = ggml_backend_reg_by_name("CUDA");
    if (!gpu.ggml)
        snprintf(gpu.reason, sizeof gpu.reason, "the llama.cpp that this squeeze was built with has no CUDA back end");
    return gpu.ggml != NULL;
}
#endif

static bool choose_way(void)
{
    const char *way = getenv("SQUEEZE_GPU_WAY");
    if (!way || !way[0]) return true;
    if (strcmp(way, "callback") == 0) gpu.by_callback = true;
    else if (strcmp(way, "device") != 0 || gpu.by_callback) {
        snprintf(gpu.reason, sizeof gpu.reason, "SQUEEZE_GPU_WAY is \"%.32s\": allowed here is callback%s", way,
                 gpu.by_callback ? "" : " or device");
        return false;
    }
    return true;
}

/* With it ggml moves nodes to streams of its own, past ours. */
static bool refuse_reordering(void)
{
    const char *asked = getenv("GGML_CUDA_GRAPH_OPT");
    if (!asked || strcmp(asked, "1") != 0) return false;
    snprintf(gpu.reason, sizeof gpu.reason,
             "GGML_CUDA_GRAPH_OPT=1 is not supported with attention of our own; unset it");
    return true;
}

/* Cards are used in the driver's order up to the first that cannot be. */
static void add_devices(void)
{
    struct sqz_gpu_card card;
    int n = (int)ggml_backend_reg_dev_count(gpu.ggml);
    if (n > gpu.n_cards) n = gpu.n_cards;
    if (n > SQZ_MOST_CARDS) n = SQZ_MOST_CARDS;
    for (; gpu.n_usable < n && gpu.calls->card(gpu.n_usable, &card) && card.supported; gpu.n_usable++) {
        ggml_backend_dev_t *device = &gpu.devices[gpu.n_usable];
        *device = ggml_backend_reg_dev_get(gpu.ggml, (size_t)gpu.n_usable);
#ifdef SQZ_GPU_DEVICE
        if (!gpu.by_callback) *device = sqz_gpu_device_add(*device, gpu.calls);
#endif
    }
    if (gpu.n_usable == 0)
        snprintf(
            gpu.reason, sizeof gpu.reason,
            "the first card is not supported: needed are compute capability 8.0 and a driver for CUDA 12 or newer");
}

static void load(void)
{
    if (!refuse_reordering() && load_kernels() && load_ggml() && choose_way()) add_devices();
}

static void load_once(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
}

int sqz_gpu_count(void)
{
    load_once();
    return gpu.n_usable;
}

const char *sqz_gpu_reason(void)
{
    load_once();
    return gpu.n_usable ? "" : gpu.reason;
}

int sqz_gpu_card_count(void)
{
    load_once();
    return gpu.n_cards;
}

bool sqz_gpu_card(int card, struct sqz_gpu_card *out)
{
    load_once();
    return gpu.calls && card >= 0 && card < gpu.n_cards && gpu.calls->card(card, out);
}

const char *sqz_gpu_kernels_path(void)
{
    load_once();
    return gpu.kernels_path;
}

const char *sqz_gpu_ggml_path(void)
{
    load_once();
    return gpu.ggml_path;
}

bool sqz_gpu_by_callback(void)
{
    load_once();
    return gpu.by_callback;
}

ggml_backend_dev_t sqz_gpu_llama_device(int card)
{
    load_once();
    return gpu.devices[card];
}

ggml_backend_dev_t sqz_gpu_llama_device_again(int card, uint32_t number)
{
    load_once();
#ifdef SQZ_GPU_DEVICE
    if (!gpu.by_callback) return sqz_gpu_device_again(card, number);
#endif
    (void)card, (void)number;
    return NULL;
}

int sqz_gpu_card_of(ggml_backend_dev_t device)
{
    for (int i = 0; i < sqz_gpu_count(); i++)
        if (gpu.devices[i] == device) return i;
    return -1;
}

const struct sqz_gpu_calls *sqz_gpu_calls_of(void)
{
    load_once();
    return gpu.calls;
}
