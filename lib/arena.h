/*
 * A bump allocator over the caller's workspace, with a count-only mode: the
 * same carving code that lays buffers out also says how many bytes it needs.
 * Every product and sum is checked. What does not fit is reported once, at
 * the end: the size is SIZE_MAX, which no allocation satisfies.
 */
#ifndef SQZ_LIB_ARENA_H
#define SQZ_LIB_ARENA_H

#include <stddef.h>
#include <stdint.h>

#define SQZ_ARENA_ALIGNMENT ((size_t)64)

/* For fuzzing under AddressSanitizer: forbidden bytes lie behind every piece, or one could run into the next unseen. */
#ifdef SQZ_ARENA_GAPS
#include <sanitizer/asan_interface.h>
#define SQZ_ARENA_GAP SQZ_ARENA_ALIGNMENT
#define SQZ_ARENA_FENCE(piece, bytes, bytes_with_gap)                                                                  \
    (__asan_unpoison_memory_region((piece), (bytes)),                                                                  \
     __asan_poison_memory_region((piece) + (bytes), (bytes_with_gap) - (bytes)))
#else
#define SQZ_ARENA_GAP                                 ((size_t)0)
#define SQZ_ARENA_FENCE(piece, bytes, bytes_with_gap) ((void)0)
#endif

struct sqz_arena {
    char *base;  /* NULL: count only */
    size_t used; /* SIZE_MAX: does not fit */
};

static inline struct sqz_arena sqz_arena_on(void *workspace)
{
    uintptr_t address = (uintptr_t)workspace;
    size_t pad = workspace ? (size_t)((SQZ_ARENA_ALIGNMENT - address % SQZ_ARENA_ALIGNMENT) % SQZ_ARENA_ALIGNMENT) : 0;
    return (struct sqz_arena){workspace ? (char *)workspace + pad : NULL, 0};
}

/* rows * columns elements, aligned to 64; NULL in count-only mode. */
static inline void *sqz_arena_take(struct sqz_arena *arena, size_t rows, size_t columns, size_t element_bytes)
{
    const size_t most = SIZE_MAX / 2, offset = arena->used;
    if (offset > most || (columns > 0 && rows > most / columns) || rows * columns > most / element_bytes ||
        rows * columns * element_bytes > most - offset) {
        arena->used = SIZE_MAX;
        return NULL;
    }
    const size_t bytes = rows * columns * element_bytes;
    arena->used = (offset + bytes + SQZ_ARENA_GAP + SQZ_ARENA_ALIGNMENT - 1) & ~(SQZ_ARENA_ALIGNMENT - 1);
    if (!arena->base) return NULL;
    SQZ_ARENA_FENCE(arena->base + offset, bytes, arena->used - offset);
    return arena->base + offset;
}

/* Bytes a workspace needs so that everything carved fits whatever its alignment. */
static inline size_t sqz_arena_bytes(const struct sqz_arena *arena)
{
    return arena->used == SIZE_MAX ? SIZE_MAX : arena->used + SQZ_ARENA_ALIGNMENT;
}

#endif
