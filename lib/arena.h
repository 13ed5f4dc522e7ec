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
    arena->used = (offset + rows * columns * element_bytes + SQZ_ARENA_ALIGNMENT - 1) & ~(SQZ_ARENA_ALIGNMENT - 1);
    return arena->base ? arena->base + offset : NULL;
}

/* Bytes a workspace needs so that everything carved fits whatever its alignment. */
static inline size_t sqz_arena_bytes(const struct sqz_arena *arena)
{
    return arena->used == SIZE_MAX ? SIZE_MAX : arena->used + SQZ_ARENA_ALIGNMENT;
}

#endif
