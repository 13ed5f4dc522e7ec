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
    if (gpu.n_cards == 0)
        snprintf(gpu.reason, sizeof gpu.reason, "no NVIDIA card: %s",
                 calls->complaint()[0] ? calls->complaint() : "the driver shows none");
    return gpu.n_cards > 0;
}

static bool load_ggml(void)
{
#ifdef SQZ_GPU_DEVICE
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
#else
    snprintf(
        gpu.reason, sizeof gpu.reason,
        "this squeeze was built with an installed llama.cpp, which does not show how a device of one's own is made");
    return false;
#endif
}

/* Cards are used in the driver's order up to the first that cannot be. */
static void add_devices(void)
{
#ifdef SQZ_GPU_DEVICE
    struct sqz_gpu_card card;
    int n = (int)ggml_backend_reg_dev_count(gpu.ggml);
    if (n > gpu.n_cards) n = gpu.n_cards;
    if (n > SQZ_MOST_CARDS) n = SQZ_MOST_CARDS;
    while (gpu.n_usable < n && gpu.calls->card(gpu.n_usable, &card) && card.supported)
        sqz_gpu_device_add(ggml_backend_reg_dev_get(gpu.ggml, (size_t)gpu.n_usable++), gpu.calls);
#endif
    if (gpu.n_usable == 0)
        snprintf(
            gpu.reason, sizeof gpu.reason,
            "the first card is not supported: needed are compute capability 8.0 and a driver for CUDA 12 or newer");
}

static void load(void)
{
    if (load_kernels() && load_ggml()) add_devices();
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

const struct sqz_gpu_calls *sqz_gpu_calls_of(void)
{
    load_once();
    return gpu.calls;
}
