/*
 * Maps whose pages may be lost; watched_map.h describes them. They stand in a
 * list that only grows, so that a signal handler can go through it at any
 * moment; places of maps that are no more are used again.
 */
#define _GNU_SOURCE /* MAP_ANONYMOUS */
#include "watched_map.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

struct sqz_watched_map {
    struct sqz_watched_map *next; /* set before it is in the list */
    atomic_bool taken, lost;
    _Atomic uintptr_t begin; /* 0: none, which bytes are then meaningless */
    _Atomic size_t bytes;
};

static struct sqz_watched_map *_Atomic first_map;

static struct sqz_watched_map *take_place(void)
{
    for (struct sqz_watched_map *w = atomic_load(&first_map); w; w = w->next)
        if (!atomic_exchange(&w->taken, true)) return w;
    struct sqz_watched_map *w = calloc(1, sizeof *w);
    if (!w) return NULL;
    atomic_store(&w->taken, true);
    w->next = atomic_load(&first_map);
    while (!atomic_compare_exchange_weak(&first_map, &w->next, w)) continue;
    return w;
}

struct sqz_watched_map *sqz_watch_begin(const void *map, size_t bytes)
{
    struct sqz_watched_map *w = take_place();
    if (!w) return NULL;
    atomic_store(&w->lost, false);
    atomic_store(&w->bytes, bytes);
    atomic_store(&w->begin, (uintptr_t)map);
    return w;
}

void sqz_watch_end(struct sqz_watched_map *w)
{
    if (!w) return;
    atomic_store(&w->begin, 0);
    atomic_store(&w->taken, false);
}

bool sqz_watch_is_lost(const struct sqz_watched_map *w)
{
    return atomic_load(&w->lost);
}

/* All of the map at once: one call whatever the file's size, and one piece of address space. It is noted before zeros
 * can be read, so that no thread computes from them and finds nothing noted. */
static bool put_zeros(struct sqz_watched_map *w, uintptr_t begin)
{
    const int before = errno;
    atomic_store(&w->lost, true);
    const void *zeros = mmap((void *)begin, atomic_load(&w->bytes), PROT_READ,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    errno = before;
    return zeros != MAP_FAILED;
}

bool sqz_watched_page_lost(const void *address)
{
    for (struct sqz_watched_map *w = atomic_load(&first_map); w; w = w->next) {
        const uintptr_t begin = atomic_load(&w->begin), at = (uintptr_t)address;
        if (begin && at >= begin && at - begin < atomic_load(&w->bytes)) return put_zeros(w, begin);
    }
    return false;
}
