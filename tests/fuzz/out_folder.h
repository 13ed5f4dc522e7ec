/* The folder, in memory where the system has one, that a target writes into; removed when the process ends. */
#ifndef SQZ_FUZZ_OUT_FOLDER_H
#define SQZ_FUZZ_OUT_FOLDER_H

#include "squeeze.h"

const char *out_folder(void);

/* Puts there an old file, links to it, to nowhere, to itself and to a folder, a pipe, and what a writer that was killed
 * long ago left: what a writer may be given. */
void out_folder_fill(void);

/* What another process may do to the places while a writer works: takes the new name, makes it a link, changes the old
 * file's mode, removes it. */
void out_folder_disturb(unsigned how);

/* After a call with this result: the path holds a whole file or what it held before, and nothing else was added.
 * Empties the folder. */
void out_folder_check(enum sqz_status status, const char *path, const char *message);

#endif
