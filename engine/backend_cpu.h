/* Attention on the CPU, in lib/: the place that is always there. */
#ifndef SQZ_ENGINE_BACKEND_CPU_H
#define SQZ_ENGINE_BACKEND_CPU_H

#include "attention.h"
#include "backend.h"
#include "cpu_cost.h"

/* For calls of at most n_threads threads. Errors: MEMORY. */
enum sqz_status sqz_backend_cpu_create(struct sqz_backend **out, int n_threads, struct sqz_error *error);
/* How tokens on one context go through it from now on: EACH until then; CHEAPEST, by this cost; ALL. */
void sqz_backend_cpu_set_ways(struct sqz_backend *backend, enum sqz_together together, const struct sqz_cpu_cost *cost);
bool sqz_backend_cpu_reads_all(const struct sqz_backend *backend); /* the way is ALL */
/* Own rows of sequences that are created from now on are F16, whatever the context's; a card's, which has its own. */
void sqz_backend_cpu_keep_own_f16(struct sqz_backend *backend, bool f16);
void sqz_backend_cpu_free(struct sqz_backend *backend);

/* A part as lib/ takes it, with the place's scratch memory. Valid while own and node are. */
struct sqz_attend_call sqz_backend_cpu_attend_call(struct sqz_backend *backend, const struct sqz_backend_call *call,
                                                   const struct sqz_backend_part *part);

/* Scratch memory of at least so many bytes. Errors: MEMORY (it stays as it was). */
enum sqz_status sqz_backend_cpu_reserve(struct sqz_backend *backend, size_t bytes, struct sqz_error *error);

#endif
