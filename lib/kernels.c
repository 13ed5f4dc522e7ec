/*
 * The one table of kernel variants and the choice among them. Dispatch, the
 * tests, the bench and sqz_variant_get() all read this table, so a variant
 * cannot exist without being tested.
 */
#include "kernels.h"

#include <stdatomic.h>
#include <string.h>

#include "cpu_features.h"
#include "kernels_variants.h"
#include "squeeze.h"

struct variant {
    const char *name;
    const struct sqz_kernels *kernels; /* NULL: not compiled in */
    uint32_t needed;                   /* CPU features without which it cannot run */
    uint32_t preferred;                /* and those without which another one is chosen */
};

#if defined(__x86_64__)
#define IF_X86(kernels) (kernels)
#else
#define IF_X86(kernels) NULL
#endif
#if defined(__aarch64__)
#define IF_ARM64(kernels) (kernels)
#else
#define IF_ARM64(kernels) NULL
#endif

/* Of each architecture the fastest last. */
static const struct variant variants[] = {
    {"portable", &sqz_kernels_portable, 0, 0},
    {"avx2", IF_X86(&sqz_kernels_avx2), SQZ_CPU_ALL_AVX2, 0},
    {"avx512", IF_X86(&sqz_kernels_avx512), SQZ_CPU_ALL_AVX512, SQZ_CPU_PREFER_512},
    {"avx512-vnni", IF_X86(&sqz_kernels_avx512_vnni), SQZ_CPU_ALL_AVX512 | SQZ_CPU_AVX512VNNI, SQZ_CPU_PREFER_512},
    {"neon", IF_ARM64(&sqz_kernels_neon), SQZ_CPU_NEON, 0},
};
#define N_VARIANTS (sizeof variants / sizeof variants[0])

static _Atomic(const struct sqz_kernels *) chosen;

static bool is_supported(const struct variant *variant)
{
    return variant->kernels && (sqz_cpu_features() & variant->needed) == variant->needed;
}

const struct sqz_kernels *sqz_kernels_get(void)
{
    const struct sqz_kernels *kernels = atomic_load_explicit(&chosen, memory_order_acquire);
    const struct sqz_kernels *none = NULL;

    if (kernels) return kernels;
    kernels = &sqz_kernels_portable;
    for (size_t i = 0; i < N_VARIANTS; i++)
        if (is_supported(&variants[i]) && (sqz_cpu_features() & variants[i].preferred) == variants[i].preferred)
            kernels = variants[i].kernels;
    /* sqz_kernels_force() in another thread wins over the default. */
    if (!atomic_compare_exchange_strong(&chosen, &none, kernels)) kernels = none;
    return kernels;
}

const struct sqz_kernels *sqz_kernels_variant(size_t index, bool *supported)
{
    for (size_t i = 0; i < N_VARIANTS; i++) {
        if (variants[i].kernels && index-- == 0) {
            *supported = is_supported(&variants[i]);
            return variants[i].kernels;
        }
    }
    *supported = false;
    return NULL;
}

bool sqz_kernels_force(const char *name)
{
    for (size_t i = 0; i < N_VARIANTS; i++) {
        if (strcmp(variants[i].name, name) == 0 && is_supported(&variants[i])) {
            atomic_store_explicit(&chosen, variants[i].kernels, memory_order_release);
            return true;
        }
    }
    return false;
}

bool sqz_variant_get(size_t index, struct sqz_variant_info *info)
{
    if (index >= N_VARIANTS) return false;
    info->name = variants[index].name;
    info->built = variants[index].kernels != NULL;
    info->supported = is_supported(&variants[index]);
    info->chosen = info->built && variants[index].kernels == sqz_kernels_get();
    return true;
}
