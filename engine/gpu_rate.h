/* How fast a graphics card moves bytes, for predictions. Of CUDA nothing is seen here. */
#ifndef SQZ_ENGINE_GPU_RATE_H
#define SQZ_ENGINE_GPU_RATE_H

#include <stddef.h>

#include "squeeze.h"

struct sqz_gpu_rate {
    char card[128];
    double memory_bytes;
    double copy_bytes_per_second; /* of a long copy within the card, what is read and what is written both counted */
};

/* Of card number `card`, from 0. It needs 256 MiB there for a moment, and no run of a model at the same time. Errors:
 * UNSUPPORTED (no such card), MEMORY, INTERNAL (the card refused). */
enum sqz_status sqz_gpu_measure_rate(struct sqz_gpu_rate *rate, int card, struct sqz_error *error);

#endif
