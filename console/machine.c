/* The machine of a measurement; machine.h describes it. */
#define _GNU_SOURCE /* sysconf */
#include "machine.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "common.h"
#include "json_output.h"
#include "llama_library.h"

/* "model name" of /proc/cpuinfo; the machine's architecture where there is none. */
static void cpu_name(char *name, size_t size)
{
    char line[512];
    struct utsname system;
    FILE *file = fopen("/proc/cpuinfo", "r");
    snprintf(name, size, "%s", uname(&system) == 0 ? system.machine : "unknown");
    while (file && fgets(line, sizeof line, file)) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon) {
            snprintf(name, size, "%s", colon + 2);
            name[strcspn(name, "\n")] = '\0';
            break;
        }
    }
    if (file) fclose(file);
}

json_t *machine_json(int n_threads)
{
    char name[256];
    struct utsname system;
    struct sqz_variant_info variant = {.name = "unknown"};
    json_t *machine = json_object();
    cpu_name(name, sizeof name);
    for (size_t i = 0; sqz_variant_get(i, &variant) && !variant.chosen; i++) {
    }
    json_object_set_new(machine, "cpu", json_text(name));
    json_object_set_new(machine, "cores", json_count((uint64_t)sysconf(_SC_NPROCESSORS_ONLN)));
    json_object_set_new(machine, "threads", json_count((uint64_t)n_threads));
    json_object_set_new(machine, "instruction_set", json_text(variant.name));
    json_object_set_new(machine, "memory_bytes",
                        json_count((uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGE_SIZE)));
    json_object_set_new(machine, "compiler", json_text(__VERSION__));
    if (uname(&system) == 0) {
        json_object_set_new(machine, "system", json_text(system.sysname));
        json_object_set_new(machine, "kernel", json_text(system.release));
    }
    return machine;
}

void add_origin_json(json_t *root, int n_threads)
{
    json_object_set_new(root, "machine", machine_json(n_threads));
    json_object_set_new(root, "version", json_text(sqz_version()));
    json_object_set_new(root, "llama_version", json_text(sqz_llama_version()));
    json_object_set_new(root, "command", json_command_line());
}

/* ---- Read bandwidth ------------------------------------------------------------- */

double machine_read_bandwidth(int n_threads)
{
    enum { PASSES = 48 }; /* about a quarter of a second where 4 to 7 ms a pass is usual */
    struct memory_probe probe;
    double best = 0.0;
    if (!memory_probe_open(&probe, n_threads)) return 0.0;
    for (int pass = 0; pass < PASSES; pass++) {
        double rate = memory_probe_read(&probe);
        best = rate > best ? rate : best;
    }
    memory_probe_close(&probe);
    return best;
}
