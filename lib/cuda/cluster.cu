#include "ops.h"
extern "C" bool sqz_cuda_cluster_supported(const struct sqz_cuda_cluster_args *) { return false; }
extern "C" size_t sqz_cuda_cluster_workspace_bytes(const struct sqz_cuda_cluster_args *) { return 0; }
extern "C" enum sqz_status sqz_cuda_cluster(const struct sqz_cuda_cluster_args *, void *) { return SQZ_ERROR_UNSUPPORTED; }
