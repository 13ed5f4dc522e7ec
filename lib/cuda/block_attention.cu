#include "ops.h"
extern "C" bool sqz_cuda_block_attention_supported(const struct sqz_cuda_block_attention *) { return false; }
extern "C" size_t sqz_cuda_block_attention_workspace_bytes(const struct sqz_cuda_block_attention *) { return 0; }
extern "C" enum sqz_status sqz_cuda_block_attention_launch(const struct sqz_cuda_block_attention *, void *) { return SQZ_ERROR_UNSUPPORTED; }
