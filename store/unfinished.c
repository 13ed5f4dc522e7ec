/* Names of unfinished files; unfinished.h describes it. */
#define _POSIX_C_SOURCE 200809L
#include "unfinished.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

enum { SLOTS = 8, FREE = 0, TAKEN, NOTED };

/* One list a process: a signal ends all of it. */
static struct slot {
    atomic_int state;
    int directory;
    char name[SQZ_UNFINISHED_NAME_BYTES];
} slots[SLOTS];

int sqz_unfinished_note(int directory, const char name[SQZ_UNFINISHED_NAME_BYTES])
{
    for (int i = 0; i < SLOTS; i++) {
        int expected = FREE;
        if (!atomic_compare_exchange_strong(&slots[i].state, &expected, TAKEN)) continue;
        slots[i].directory = directory;
        memcpy(slots[i].name, name, sizeof slots[i].name);
        atomic_store(&slots[i].state, NOTED);
        return i;
    }
    return -1;
}

void sqz_unfinished_drop(int number)
{
    if (number >= 0) atomic_store(&slots[number].state, FREE);
}

void sqz_unfinished_remove(void)
{
    const int reason = errno;
    for (int i = 0; i < SLOTS; i++)
        if (atomic_load(&slots[i].state) == NOTED) unlinkat(slots[i].directory, slots[i].name, 0);
    errno = reason;
}
