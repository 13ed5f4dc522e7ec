/*
 * Cuts one caller-owned block into arrays, each on a 64-byte boundary, or
 * only counts the bytes when the block is NULL. Every product is checked; a
 * size that does not fit is reported once, at the end, as SIZE_MAX.
 */
#ifndef SQZ_LIB_LAYOUT_H
#define SQZ_LIB_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

struct sqz_layout {
    unsigned char *base; /* NULL: count only */
    size_t used;         /* SIZE_MAX: does not fit */
};

static inline struct sqz_layout sqz_layout_begin(void *base)
{
    return (struct sqz_layout){base, 0};
}

/* rows * columns elements; NULL when only counting. */
static inline void *sqz_layout_take(struct sqz_layout *layout, size_t rows, size_t columns, size_t element_bytes)
{
    const size_t most = SIZE_MAX / 2;
    const size_t offset = layout->used;
    if (offset > most || (columns > 0 && rows > most / columns) || rows * columns > most / element_bytes ||
        rows * columns * element_bytes > most - offset) {
        layout->used = SIZE_MAX;
        return NULL;
    }
    layout->used = (offset + rows * columns * element_bytes + 63) & ~(size_t)63;
    return layout->base ? layout->base + offset : NULL;
}

static inline size_t sqz_layout_end(const struct sqz_layout *layout)
{
    return layout->used;
}

#endif
