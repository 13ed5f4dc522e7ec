/*
 * Large blocks of memory for measurements: page-aligned, zeroed, in 2 MiB pages where the system gives them. With
 * 4 KiB pages every page costs a walk of the page tables (two dimensions of them in a virtual machine), which is a
 * quarter of the read bandwidth of the machine that docs/method.md measured on; that is a property of the memory
 * handed out, not of the code that reads it.
 */
#ifndef SQZ_CONSOLE_PAGES_H
#define SQZ_CONSOLE_PAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pages {
    char *data; /* aligned to 2 MiB; NULL: none */
    size_t bytes;
    void *map;
    size_t map_bytes;
};

/* False when there is no memory; pages->data is then NULL. huge: ask for 2 MiB pages, else forbid them. Nothing is
 * touched yet. */
bool pages_take(struct pages *pages, size_t bytes, bool huge);
void pages_give_back(struct pages *pages); /* all zeroes are fine */

/* Bytes that can be taken without swapping, as the system (and a cgroup's limit) says; SIZE_MAX when unknown. */
size_t pages_available_bytes(void);

#endif
