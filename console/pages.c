/* Large blocks of memory; pages.h describes them. */
#define _GNU_SOURCE /* MAP_ANONYMOUS, madvise */
#include "pages.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { HUGE_PAGE = 2 << 20 };

bool pages_take(struct pages *pages, size_t bytes, bool huge)
{
    memset(pages, 0, sizeof *pages);
    if (bytes == 0 || bytes > SIZE_MAX / 2) return false;
    const size_t whole = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void *map =
        mmap(NULL, whole + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return false;
    pages->map = map;
    pages->map_bytes = whole + HUGE_PAGE;
    pages->bytes = bytes;
    pages->data = (char *)map + (HUGE_PAGE - (uintptr_t)map % HUGE_PAGE) % HUGE_PAGE;
#if defined(MADV_HUGEPAGE)
    /* Advice: refused by kernels without it, which is no reason to stop. */
    madvise(pages->data, whole, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
    (void)huge;
#endif
    return true;
}

void pages_give_back(struct pages *pages)
{
    if (pages->map) munmap(pages->map, pages->map_bytes);
    memset(pages, 0, sizeof *pages);
}

/* The number behind `key` in a file of lines; false when it is not there. */
static bool read_number(const char *path, const char *key, unsigned long long *value)
{
    char line[256];
    bool found = false;
    FILE *file = fopen(path, "r");
    while (file && !found && fgets(line, sizeof line, file)) {
        size_t n = strlen(key);
        found = strncmp(line, key, n) == 0 && sscanf(line + n, "%llu", value) == 1;
    }
    if (file) fclose(file);
    return found;
}

size_t pages_available_bytes(void)
{
    unsigned long long kilobytes, limit, used;
    size_t available = SIZE_MAX;
    if (read_number("/proc/meminfo", "MemAvailable:", &kilobytes)) available = (size_t)kilobytes * 1024;
    if (read_number("/sys/fs/cgroup/memory.max", "", &limit) &&
        read_number("/sys/fs/cgroup/memory.current", "", &used)) {
        size_t left = limit > used ? (size_t)(limit - used) : 0;
        available = left < available ? left : available;
    }
    return available;
}
