/*
 * Copies of what steers: cluster offsets, parts of codes, curves, variances and
 * the tokens. Every attention reads them again, to form pointers and counts, and
 * whoever may write the file could change them after they were checked. They are
 * some thousandths of the file. Positions, four bytes a row and head, are checked
 * as well but not copied: only squeezing again reads them, and it holds each
 * against the room there is.
 */
#include "open_context.h"
#include "arena.h"

#include <stdlib.h>

static uint64_t offset_of(const struct sqz_context *context, const void *array)
{
    return (uint64_t)((const uint8_t *)array - context->file.map);
}

/* The array's copy, in the arena; while it only counts, the array itself. */
static enum sqz_status copy_array(const struct sqz_context *context, struct sqz_arena *arena, const void **array,
                                  uint64_t bytes, const struct sqz_report *report)
{
    void *copy = sqz_arena_take(arena, 1, (size_t)bytes, 1);
    if (!arena->base) return SQZ_OK;
    const enum sqz_status status =
        sqz_file_read(&context->file, copy, (size_t)bytes, offset_of(context, *array), report);
    *array = copy;
    return status;
}

static enum sqz_status copy_layer(struct sqz_context *context, struct sqz_arena *arena, uint32_t index,
                                  const struct sqz_report *report)
{
    struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS];
    struct sqz_layer *layer = &context->layers[index];
    const size_t n = sqz_layer_tensors(specs, layer, index);
    enum sqz_status status;
    for (size_t i = 0; i < n; i++) {
        const void *array = sqz_slot_get(layer, specs[i].slot);
        if (!specs[i].steers || !array) continue;
        if ((status = copy_array(context, arena, &array, specs[i].bytes, report))) return status;
        sqz_slot_set(layer, specs[i].slot, array);
    }
    sqz_layer_join_planes(layer);
    return SQZ_OK;
}

static enum sqz_status carve(struct sqz_context *context, struct sqz_arena *arena, const struct sqz_report *report)
{
    const void *tokens = context->meta.tokens;
    enum sqz_status status;
    if ((status = copy_array(context, arena, &tokens, context->meta.n_tokens * sizeof(int32_t), report))) return status;
    context->meta.tokens = tokens;
    for (uint32_t i = 0; context->layers && i < context->meta.n_layer; i++)
        if ((status = copy_layer(context, arena, i, report))) return status;
    return SQZ_OK;
}

enum sqz_status sqz_copy_steering(struct sqz_context *context, const struct sqz_report *report)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    carve(context, &arena, report);
    const size_t bytes = sqz_arena_bytes(&arena);
    context->copies = malloc(bytes);
    if (!context->copies) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for %zu bytes of its index", bytes);
    arena = sqz_arena_on(context->copies);
    return carve(context, &arena, report);
}
