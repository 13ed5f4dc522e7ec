/* Cores of this process and their use; cores.h describes it. */
#define _GNU_SOURCE /* sched_getaffinity, clock_gettime */
#include "cores.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "threads.h"

/* The CPU lines of /proc/stat on 1,024 CPUs; what follows them is cut off. */
enum { STAT_BYTES = 96 * 1024, SMALL_BYTES = 4096, N_STAT_FIELDS = 7 };

/* The beginning of a file as a string; false: it cannot be read. */
static bool read_text(const char *path, char *text, size_t size)
{
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    size_t n = 0;
    for (ssize_t got; n + 1 < size && (got = read(file, text + n, size - 1 - n)) > 0;) n += (size_t)got;
    close(file);
    text[n] = '\0';
    return n > 0;
}

/* ---- Formats ----------------------------------------------------------------------- */

double sqz_cores_parse_quota(const char *text)
{
    double quota = 0, period = 0;
    if (sscanf(text, "%lf %lf", &quota, &period) != 2 || !(quota > 0) || !(period > 0)) return 0;
    return quota / period;
}

/* user nice system idle iowait irq softirq, in ticks */
static double busy_ticks(const char *fields, bool with_niced)
{
    double f[N_STAT_FIELDS] = {0};
    char *end;
    for (int i = 0; i < N_STAT_FIELDS; i++, fields = end) f[i] = strtod(fields, &end);
    return f[0] + (with_niced ? f[1] : 0) + f[2] + f[5] + f[6];
}

double sqz_cores_parse_stat(const char *text, const struct sqz_cores *cores, bool with_niced, double ticks_a_second)
{
    double together = 0, sum = 0;
    int n_online = 0, n_seen = 0;
    if (strncmp(text, "cpu ", 4) != 0) return -1;
    together = busy_ticks(text + 4, with_niced);
    for (const char *line = strchr(text, '\n'); line && strncmp(line, "\ncpu", 4) == 0; line = strchr(line + 1, '\n')) {
        char *fields;
        const unsigned long cpu = strtoul(line + 4, &fields, 10);
        n_online++;
        if (cpu >= SQZ_CORES_MAX || !cores->allowed[cpu]) continue;
        n_seen++;
        sum += busy_ticks(fields, with_niced);
    }
    /* One sum has been rounded once, those of many CPUs often. */
    return (n_seen == n_online || n_seen == 0 ? together : sum) / ticks_a_second;
}

bool sqz_cores_parse_group(const char *text, const char *controller, char *path, size_t size)
{
    const size_t n = strlen(controller);
    for (const char *line = text; line && *line; line = strchr(line, '\n')) {
        line += *line == '\n';
        const char *names = strchr(line, ':'), *end = names ? strchr(names + 1, ':') : NULL;
        if (!end) return false;
        for (const char *at = names + 1; at <= end; at += strcspn(at, ",:") + 1) {
            if (strcspn(at, ",:") != n || strncmp(at, controller, n) != 0) continue;
            snprintf(path, size, "%.*s", (int)strcspn(end + 1, "\n"), end + 1);
            return true;
        }
    }
    return false;
}

/* ---- Control groups ------------------------------------------------------------------- */

/* Where the hierarchies are mounted, and what they call the quota. */
static const struct {
    const char *mount, *controller, *quota_file, *period_file;
} hierarchies[] = {
    {"/sys/fs/cgroup", "", "cpu.max", NULL},
    {"/sys/fs/cgroup/unified", "", "cpu.max", NULL},
    {"/sys/fs/cgroup/cpu", "cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"},
    {"/sys/fs/cgroup/cpu,cpuacct", "cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"},
};

/* The quota that one folder sets, in cores; 0: none. */
static double folder_quota(size_t hierarchy, const char *folder)
{
    char path[512], text[SMALL_BYTES] = "";
    size_t n = 0;
    snprintf(path, sizeof path, "%s/%s", folder, hierarchies[hierarchy].quota_file);
    if (!read_text(path, text, sizeof text / 2)) return 0;
    if (hierarchies[hierarchy].period_file) { /* version 1 has two files for what version 2 has on one line */
        n = strlen(text);
        snprintf(path, sizeof path, "%s/%s", folder, hierarchies[hierarchy].period_file);
        if (!read_text(path, text + n, sizeof text - n)) return 0;
    }
    return sqz_cores_parse_quota(text);
}

/* The smallest quota from this process's group up to the root of what is mounted. In a container the path may be one
 * of the host's; its own group is the root then. */
static void find_quota(struct sqz_cores *cores, size_t hierarchy, const char *groups)
{
    char group[256], folder[384];
    if (!sqz_cores_parse_group(groups, hierarchies[hierarchy].controller, group, sizeof group)) return;
    for (;;) {
        snprintf(folder, sizeof folder, "%s%s", hierarchies[hierarchy].mount, strcmp(group, "/") == 0 ? "" : group);
        const double quota = folder_quota(hierarchy, folder);
        if (quota > 0 && (cores->quota <= 0 || quota < cores->quota)) {
            cores->quota = quota;
            cores->group_stat[0] = '\0';
            if (!hierarchies[hierarchy].period_file && strlen(folder) + sizeof "/cpu.stat" <= sizeof cores->group_stat)
                snprintf(cores->group_stat, sizeof cores->group_stat, "%.240s/cpu.stat", folder);
        }
        char *last = strrchr(group, '/');
        if (!last) return;
        *last = '\0';
    }
}

/* ---- This process ------------------------------------------------------------------------ */

void sqz_cores_find(struct sqz_cores *cores)
{
    cpu_set_t set;
    char groups[SMALL_BYTES];
    memset(cores, 0, sizeof *cores);
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int i = 0; i < SQZ_CORES_MAX && i < CPU_SETSIZE; i++) {
            cores->allowed[i] = CPU_ISSET(i, &set);
            cores->n_allowed += cores->allowed[i];
        }
    }
    if (cores->n_allowed < 1) cores->n_allowed = sqz_core_count();
    if (!read_text("/proc/self/cgroup", groups, sizeof groups)) return;
    for (size_t i = 0; i < sizeof hierarchies / sizeof hierarchies[0]; i++) find_quota(cores, i, groups);
}

int sqz_cores_count(const struct sqz_cores *cores)
{
    const int granted = (int)(cores->quota + 0.5);
    if (cores->quota <= 0 || granted >= cores->n_allowed) return cores->n_allowed;
    return granted < 1 ? 1 : granted;
}

static double group_seconds(const struct sqz_cores *cores)
{
    char text[SMALL_BYTES];
    double microseconds = 0;
    if (!cores->group_stat[0] || !read_text(cores->group_stat, text, sizeof text)) return 0;
    return sscanf(text, "usage_usec %lf", &microseconds) == 1 ? 1e-6 * microseconds : 0;
}

bool sqz_cores_read(const struct sqz_cores *cores, struct sqz_cores_reading *reading)
{
    const bool niced = getpriority(PRIO_PROCESS, 0) > 0;
    struct timespec own;
    char *text = malloc(STAT_BYTES);
    reading->all = -1;
    if (text && read_text("/proc/stat", text, STAT_BYTES))
        reading->all = sqz_cores_parse_stat(text, cores, niced, (double)sysconf(_SC_CLK_TCK));
    free(text);
    reading->at = sqz_clock_seconds();
    reading->group = group_seconds(cores);
    if (clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own) != 0) return false;
    reading->own = (double)own.tv_sec + 1e-9 * (double)own.tv_nsec;
    return reading->all >= 0;
}
