/* What llama.cpp makes of this CPU: what it was compiled for and where it puts weights. */
#ifndef SQZ_ENGINE_CPU_PRODUCTS_H
#define SQZ_ENGINE_CPU_PRODUCTS_H

#include <stddef.h>

/* Name `index` of what ggml's CPU back end was compiled with and this CPU has ("AVX2", "REPACK"); NULL: no more. */
const char *sqz_llama_cpu_feature(size_t index);

/* Name `index` of the buffers for weights: the plain one, then those that repack them; NULL: no more. */
const char *sqz_llama_cpu_buffer(size_t index);

#endif
