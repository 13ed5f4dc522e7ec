/*
 * Room for a file, taken by a thread of its own while a text is read: /dev/shm clears 9 GB in a second.
 */
#ifndef SQZ_ENGINE_RESERVING_H
#define SQZ_ENGINE_RESERVING_H

#include "context_file.h"

struct sqz_reserving;

/* Begins; waits for a moment, in which most disks are done. Nobody else touches the writer before _end(). Errors: those of
 * the reservation, as far as it is known, and MEMORY. */
enum sqz_status sqz_reserving_begin(struct sqz_reserving **out, struct sqz_context_writer *writer,
                                    struct sqz_error *error);
/* What is known by now. NULL is fine: it is done. */
enum sqz_status sqz_reserving_look(struct sqz_reserving *r, struct sqz_error *error);
/* Waits; frees. NULL is fine. */
enum sqz_status sqz_reserving_end(struct sqz_reserving *r, struct sqz_error *error);

#endif
