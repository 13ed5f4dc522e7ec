/* The CPU back end as ggml's registry describes it. */
#include "cpu_products.h"

#include "ggml-backend.h"

static ggml_backend_reg_t registry_of(ggml_backend_dev_t device)
{
    return device ? ggml_backend_dev_backend_reg(device) : NULL;
}

const char *sqz_llama_cpu_feature(size_t index)
{
    ggml_backend_reg_t registry = registry_of(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
    ggml_backend_get_features_t get = NULL;
    if (registry) *(void **)&get = ggml_backend_reg_get_proc_address(registry, "ggml_backend_get_features");
    const struct ggml_backend_feature *feature = get ? get(registry) : NULL;
    for (size_t i = 0; feature && feature->name && i < index; i++) feature++;
    return feature ? feature->name : NULL;
}

const char *sqz_llama_cpu_buffer(size_t index)
{
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_dev_get_extra_bufts_t get = NULL;
    if (!device) return NULL;
    if (index == 0) return ggml_backend_buft_name(ggml_backend_dev_buffer_type(device));
    *(void **)&get = ggml_backend_reg_get_proc_address(registry_of(device), "ggml_backend_dev_get_extra_bufts");
    ggml_backend_buffer_type_t *type = get ? get(device) : NULL;
    for (size_t i = 1; type && *type && i < index; i++) type++;
    return type && *type ? ggml_backend_buft_name(*type) : NULL;
}
