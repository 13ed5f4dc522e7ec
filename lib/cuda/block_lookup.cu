#include "ops.h"
extern "C" bool sqz_cuda_block_lookup_supported(const struct sqz_cuda_block_lookup *) { return false; }
extern "C" size_t sqz_cuda_block_lookup_workspace_bytes(const struct sqz_cuda_block_lookup *) { return 0; }
extern "C" enum sqz_status sqz_cuda_block_lookup_launch(const struct sqz_cuda_block_lookup *, void *) { return SQZ_ERROR_UNSUPPORTED; }
