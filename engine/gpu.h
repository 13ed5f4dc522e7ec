/*
 * Graphics cards: our kernels (libsqueeze_cuda) and ggml's CUDA back end
 * (libggml-cuda, a module that finds ggml in this program), both loaded when the
 * program runs. Where one is missing everything is as before, on the CPU, and
 * the reason is to be had.
 *
 * There are two ways to llama.cpp's attention on a card: a ggml device of our own
 * (gpu_device.h), and the public callback, which has the host wait at every layer.
 * An installed llama.cpp has the second alone, with the CUDA back end that it came
 * with; SQUEEZE_GPU_WAY=callback asks for it elsewhere.
 *
 * Both libraries are looked for in the folder that SQUEEZE_GPU_PATH names, or else beside
 * the program or library that this is part of, or where the install rules put them
 * from there.
 */
#ifndef SQZ_ENGINE_GPU_H
#define SQZ_ENGINE_GPU_H

#include "cuda/calls.h"
#include "ggml-backend.h"

enum { SQZ_MOST_CARDS = 16 }; /* that a model is spread over */

/* Cards that can be used; loads what is needed on the first call, from any thread. */
int sqz_gpu_count(void);
/* Why there are none, a sentence; "" where there are. */
const char *sqz_gpu_reason(void);
/* Cards that the driver shows, whether they can be used or not; 0 where that cannot be asked. */
int sqz_gpu_card_count(void);
/* False where it cannot be asked. */
bool sqz_gpu_card(int card, struct sqz_gpu_card *out);
/* Which file each library was loaded from; "" where it was not. */
const char *sqz_gpu_kernels_path(void);
const char *sqz_gpu_ggml_path(void);

/* Attention comes by the callback; else by a device of ours. */
bool sqz_gpu_by_callback(void);

/* Of cards that can be used: what llama.cpp is to run on, and the number of the card that it calls so, or -1. */
ggml_backend_dev_t sqz_gpu_llama_device(int card);
/* The same card once more, number 0 to SQZ_MOST_BANDS - 1: llama.cpp gives each device of its list layers that follow one
 * another. NULL: by the callback there are none. */
ggml_backend_dev_t sqz_gpu_llama_device_again(int card, uint32_t number);
int sqz_gpu_card_of(ggml_backend_dev_t device);
/* Of a card that can be used. */
const struct sqz_gpu_calls *sqz_gpu_calls_of(void);

#endif
