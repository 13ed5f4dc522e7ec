/*
 * A bump allocator over the caller's workspace, with a count-only mode: the
 * same carving code that lays buffers out also says how many bytes it needs.
 */
#ifndef SQZ_LIB_ARENA_H
#define SQZ_LIB_ARENA_H

#include <stddef.h>
#include <stdint.h>

#define SQZ_ARENA_ALIGNMENT ((size_t)64)

struct sqz_arena {
    char *base; /* NULL: count only */
    size_t used;
};

static inline struct sqz_arena sqz_arena_on(void *workspace)
{
    uintptr_t address = (uintptr_t)workspace;
    size_t pad = workspace ? (size_t)((SQZ_ARENA_ALIGNMENT - address % SQZ_ARENA_ALIGNMENT) % SQZ_ARENA_ALIGNMENT) : 0;
    return (struct sqz_arena){workspace ? (char *)workspace + pad : NULL, 0};
}

/* count elements of size bytes, aligned to 64; NULL in count-only mode. */
static inline void *sqz_arena_take(struct sqz_arena *arena, size_t count, size_t size)
{
    void *p = arena->base ? arena->base + arena->used : NULL;
    arena->used += (count * size + SQZ_ARENA_ALIGNMENT - 1) / SQZ_ARENA_ALIGNMENT * SQZ_ARENA_ALIGNMENT;
    return p;
}

/* Bytes a workspace needs so that everything carved fits whatever its alignment. */
static inline size_t sqz_arena_bytes(const struct sqz_arena *arena)
{
    return arena->used + SQZ_ARENA_ALIGNMENT;
}

#endif
