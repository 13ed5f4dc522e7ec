/*
 * Models and machines by name. Shapes are those of the models' published
 * configuration files. Peak rates are the makers' own, dense unless the name of
 * the precision says sparse, tensor cores with the accumulator that gives
 * the higher rate.
 *
 * Ridge points of the talk: A100 161, A6000 403, H100 485. Published figures
 * that give them, found by trying the peak FP16 rates and bandwidths of the
 * variants of each card:
 *   A100   312 TFLOP/s / 1.935 TB/s = 161.2   (80 GB, PCIe)
 *   A6000  309.7 TFLOP/s / 768 GB/s = 403.2   (with 2:4 sparsity; dense it is half)
 *   H100   989.4 TFLOP/s / 2.039 TB/s = 485.2 (the rate of the SXM5 board over the
 *          bandwidth of the PCIe board; no single board has both: h100-sxm 295,
 *          h100-pcie 371, h100-nvl 212)
 * Presets a100, a6000 and h100 are these, so that the talk's figures come out.
 */
#include <string.h>

#include "squeeze_roofline.h"

/* clang-format off */
static const struct sqz_model_shape shapes[] = {
    {.name = "llama-2-7b", .n_layer = 32, .n_embd = 4096, .n_head = 32, .n_head_kv = 32, .head_dim = 128,
     .n_ff = 11008, .n_vocab = 32000, .gated_ffn = true},
    {.name = "llama-2-13b", .n_layer = 40, .n_embd = 5120, .n_head = 40, .n_head_kv = 40, .head_dim = 128,
     .n_ff = 13824, .n_vocab = 32000, .gated_ffn = true},
    {.name = "llama-2-70b", .n_layer = 80, .n_embd = 8192, .n_head = 64, .n_head_kv = 8, .head_dim = 128,
     .n_ff = 28672, .n_vocab = 32000, .gated_ffn = true},
    {.name = "llama-3-8b", .n_layer = 32, .n_embd = 4096, .n_head = 32, .n_head_kv = 8, .head_dim = 128,
     .n_ff = 14336, .n_vocab = 128256, .gated_ffn = true},
    {.name = "llama-3-70b", .n_layer = 80, .n_embd = 8192, .n_head = 64, .n_head_kv = 8, .head_dim = 128,
     .n_ff = 28672, .n_vocab = 128256, .gated_ffn = true},
    {.name = "mistral-7b", .n_layer = 32, .n_embd = 4096, .n_head = 32, .n_head_kv = 8, .head_dim = 128,
     .n_ff = 14336, .n_vocab = 32000, .gated_ffn = true},
    {.name = "mixtral-8x7b", .n_layer = 32, .n_embd = 4096, .n_head = 32, .n_head_kv = 8, .head_dim = 128,
     .n_ff = 14336, .n_vocab = 32000, .n_expert = 8, .n_expert_used = 2, .gated_ffn = true},
    {.name = "qwen2.5-0.5b", .n_layer = 24, .n_embd = 896, .n_head = 14, .n_head_kv = 2, .head_dim = 64,
     .n_ff = 4864, .n_vocab = 151936, .gated_ffn = true, .tied_embeddings = true},
    {.name = "qwen2.5-7b", .n_layer = 28, .n_embd = 3584, .n_head = 28, .n_head_kv = 4, .head_dim = 128,
     .n_ff = 18944, .n_vocab = 152064, .gated_ffn = true},
    {.name = "smollm2-135m", .n_layer = 30, .n_embd = 576, .n_head = 9, .n_head_kv = 3, .head_dim = 64,
     .n_ff = 1536, .n_vocab = 49152, .gated_ffn = true, .tied_embeddings = true},
    {.name = "gemma-3-270m", .n_layer = 18, .n_embd = 640, .n_head = 4, .n_head_kv = 1, .head_dim = 256,
     .n_ff = 2048, .n_vocab = 262144, .n_window_layer = 15, .n_window_tokens = 512, .gated_ffn = true,
     .tied_embeddings = true},
    {.name = "gpt-2", .n_layer = 12, .n_embd = 768, .n_head = 12, .n_head_kv = 12, .head_dim = 64, .n_ff = 3072,
     .n_vocab = 50257, .tied_embeddings = true},
};
/* clang-format on */

#define FP32        [SQZ_PRECISION_FP32]
#define TF32        [SQZ_PRECISION_TF32]
#define FP16        [SQZ_PRECISION_FP16]
#define FP16_SPARSE [SQZ_PRECISION_FP16_SPARSE]
#define FP8         [SQZ_PRECISION_FP8]
#define INT8        [SQZ_PRECISION_INT8]
#define INT4        [SQZ_PRECISION_INT4]

static const struct sqz_machine machines[] = {
    {"p100",
     "Tesla P100 SXM2 16 GB; FP16 without tensor cores",
     2016,
     732e9,
     16e9,
     {FP32 = 10.6e12, FP16 = 21.2e12},
     SQZ_PRECISION_FP16},
    {"v100", "Tesla V100 SXM2 32 GB", 2017, 900e9, 32e9, {FP32 = 15.7e12, FP16 = 125e12}, SQZ_PRECISION_FP16},
    {"a100",
     "A100 PCIe 80 GB: the talk's ridge point, 161",
     2020,
     1935e9,
     80e9,
     {FP32 = 19.5e12, TF32 = 156e12, FP16 = 312e12, FP16_SPARSE = 624e12, INT8 = 624e12, INT4 = 1248e12},
     SQZ_PRECISION_FP16},
    {"a100-sxm",
     "A100 SXM4 80 GB",
     2020,
     2039e9,
     80e9,
     {FP32 = 19.5e12, TF32 = 156e12, FP16 = 312e12, FP16_SPARSE = 624e12, INT8 = 624e12, INT4 = 1248e12},
     SQZ_PRECISION_FP16},
    {"a6000",
     "RTX A6000; the talk's ridge point, 403, takes the rate with 2:4 sparsity",
     2020,
     768e9,
     48e9,
     {FP32 = 38.7e12, TF32 = 77.4e12, FP16 = 154.8e12, FP16_SPARSE = 309.7e12, INT8 = 309.7e12, INT4 = 619.3e12},
     SQZ_PRECISION_FP16_SPARSE},
    {"h100",
     "the talk's ridge point, 485: rate of the SXM5 board, bandwidth of the PCIe board",
     2022,
     2039e9,
     80e9,
     {FP32 = 66.9e12, TF32 = 494.7e12, FP16 = 989.4e12, FP16_SPARSE = 1978.9e12, FP8 = 1978.9e12, INT8 = 1978.9e12},
     SQZ_PRECISION_FP16},
    {"h100-sxm",
     "H100 SXM5 80 GB",
     2022,
     3350e9,
     80e9,
     {FP32 = 66.9e12, TF32 = 494.7e12, FP16 = 989.4e12, FP16_SPARSE = 1978.9e12, FP8 = 1978.9e12, INT8 = 1978.9e12},
     SQZ_PRECISION_FP16},
    {"h100-pcie",
     "H100 PCIe 80 GB",
     2022,
     2039e9,
     80e9,
     {FP32 = 51.2e12, TF32 = 378e12, FP16 = 756e12, FP16_SPARSE = 1513e12, FP8 = 1513e12, INT8 = 1513e12},
     SQZ_PRECISION_FP16},
    {"h100-nvl",
     "H100 NVL 94 GB",
     2023,
     3938e9,
     94e9,
     {FP32 = 60e12, TF32 = 417.5e12, FP16 = 835.5e12, FP16_SPARSE = 1671e12, FP8 = 1671e12, INT8 = 1671e12},
     SQZ_PRECISION_FP16},
    {"h200",
     "H200 SXM 141 GB",
     2023,
     4800e9,
     141e9,
     {FP32 = 66.9e12, TF32 = 494.7e12, FP16 = 989.4e12, FP16_SPARSE = 1978.9e12, FP8 = 1978.9e12, INT8 = 1978.9e12},
     SQZ_PRECISION_FP16},
    {"rtx-4090",
     "GeForce RTX 4090; FP16 with FP16 accumulation",
     2022,
     1008e9,
     24e9,
     {FP32 = 82.6e12, TF32 = 82.6e12, FP16 = 330.3e12, FP16_SPARSE = 660.6e12, FP8 = 660.6e12, INT8 = 660.6e12,
      INT4 = 1321.2e12},
     SQZ_PRECISION_FP16},
};

enum { N_SHAPES = sizeof shapes / sizeof *shapes, N_MACHINES = sizeof machines / sizeof *machines };

bool sqz_shape_get(size_t index, struct sqz_model_shape *shape)
{
    if (index >= N_SHAPES) return false;
    *shape = shapes[index];
    return true;
}

bool sqz_shape_preset(const char *name, struct sqz_model_shape *shape)
{
    size_t i = 0;
    while (i < N_SHAPES && strcmp(shapes[i].name, name) != 0) i++;
    return sqz_shape_get(i, shape);
}

bool sqz_machine_get(size_t index, struct sqz_machine *machine)
{
    if (index >= N_MACHINES) return false;
    *machine = machines[index];
    return true;
}

bool sqz_machine_preset(const char *name, struct sqz_machine *machine)
{
    size_t i = 0;
    while (i < N_MACHINES && strcmp(machines[i].name, name) != 0) i++;
    return sqz_machine_get(i, machine);
}

const char *sqz_precision_name(enum sqz_precision precision)
{
    static const char *const names[SQZ_N_PRECISIONS] = {"fp32", "tf32", "fp16", "fp16-sparse", "fp8", "int8", "int4"};
    return (unsigned)precision < SQZ_N_PRECISIONS ? names[precision] : "unknown";
}
