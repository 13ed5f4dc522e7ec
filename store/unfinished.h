/*
 * Names of files that are being written and must not stay when the process ends
 * suddenly. Each is noted before the file is made; a signal handler that ends
 * the process removes them all.
 */
#ifndef SQZ_STORE_UNFINISHED_H
#define SQZ_STORE_UNFINISHED_H

enum { SQZ_UNFINISHED_NAME_BYTES = 32 };

/* Notes a name in an open directory. Returns a number for _drop(); -1 when eight are noted already: such a file stays
 * until the next one is written to its directory. */
int sqz_unfinished_note(int directory, const char name[SQZ_UNFINISHED_NAME_BYTES]);
void sqz_unfinished_drop(int number); /* the file is gone or has its final name; -1 is fine */

/* Removes every file that is noted. For signal handlers: it takes no lock and no memory. */
void sqz_unfinished_remove(void);

#endif
