/* The memory limit of the machine and of the control groups around the process, see memory_limit.h. */
#define _DEFAULT_SOURCE /* PATH_MAX */
#include "memory_limit.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* A file that holds one number; "max" and everything else that is none: no limit. */
static uint64_t read_limit(const char *path)
{
    uint64_t limit;
    FILE *file = fopen(path, "re");
    if (!file) return UINT64_MAX;
    if (fscanf(file, "%" SCNu64, &limit) != 1) limit = UINT64_MAX;
    fclose(file);
    return limit;
}

/* The least limit of a group and of all groups above it: `group` is a path such as /a/b and is shortened. A container
 * may see its own group at the root of the file system, so that is looked at too. */
static uint64_t group_limit(const char *mount, char *group, const char *name)
{
    uint64_t least = UINT64_MAX;
    for (;;) {
        char path[PATH_MAX];
        char *slash = strrchr(group, '/');
        const int n = snprintf(path, sizeof path, "%s%s/%s", mount, strcmp(group, "/") ? group : "", name);
        const uint64_t limit = n > 0 && (size_t)n < sizeof path ? read_limit(path) : UINT64_MAX;
        least = limit < least ? limit : least;
        if (!slash || !*group) return least;
        *slash = '\0';
    }
}

uint64_t sqz_memory_limit(void)
{
    const long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    uint64_t least = pages > 0 && page_bytes > 0 ? (uint64_t)pages * (uint64_t)page_bytes : UINT64_MAX;
    char line[PATH_MAX];
    /* Lines such as 0::/a/b (version 2) and 4:memory:/a/b (version 1). */
    FILE *groups = fopen("/proc/self/cgroup", "re");
    while (groups && fgets(line, sizeof line, groups)) {
        char *kind = strchr(line, ':'), *group = kind ? strchr(kind + 1, ':') : NULL;
        uint64_t limit = UINT64_MAX;
        line[strcspn(line, "\n")] = '\0';
        if (!group) continue;
        *group++ = '\0';
        if (!strcmp(kind, ":")) limit = group_limit("/sys/fs/cgroup", group, "memory.max");
        else if (!strcmp(kind, ":memory")) limit = group_limit("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes");
        least = limit < least ? limit : least;
    }
    if (groups) fclose(groups);
    return least;
}
