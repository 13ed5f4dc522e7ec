/*
 * From rows to a context's file: layers are clustered and calibrated where their rows lie, and written, some of them while
 * others are still read; or the same of a context in shards.
 */
#ifndef SQZ_ENGINE_FINISHING_H
#define SQZ_ENGINE_FINISHING_H

#include "building.h"
#include "reading.h"
#include "reserving.h"
#include "write_shards.h"

struct sqz_finishing {
    struct sqz_reading *reading; /* which outlives it */
    const struct sqz_prepare_options *options;
    const struct sqz_context *source; /* whose rows and queries these are; NULL: a model's */
    struct sqz_layer *layers;         /* [n_layer] planned from the reading's inputs */
    struct sqz_context_writer *writer;
    struct sqz_reserving *reserving;   /* of the writer's file, beside reading; NULL: done */
    struct sqz_shards_writing *shards; /* in place of layers and writer */
    struct sqz_building building;      /* begun when it has layers */
    double building_seconds;           /* of what was built while others were read */
};

/* Decides the layers' counts and begins to reserve the file: a path that cannot be written or a disk without room is found
 * before minutes of work, here or by _look(). reading, options and source are set; meta's tokens stay until _write().
 * Errors: those of files, UNSUPPORTED, MEMORY. */
enum sqz_status sqz_finishing_plan(struct sqz_finishing *f, const struct sqz_context_meta *meta, const char *out_path,
                                   struct sqz_error *error);
/* Whether the file has got its room, as far as is known: to be asked while the text is read. Errors: IO. */
enum sqz_status sqz_finishing_look(void *finishing, struct sqz_error *error);
/* Behind a band: layers up to `end` are built, and begin to be written while the next ones are read. */
enum sqz_status sqz_finishing_band(void *finishing, uint32_t end, struct sqz_error *error);
/* When all is read: builds what is left and writes the file. Errors: CANCELLED, IO, MEMORY, INTERNAL. */
enum sqz_status sqz_finishing_write(struct sqz_finishing *f, int n_threads, struct sqz_prepare_report *report,
                                    struct sqz_error *error);
/* Before the reading; what was not written is gone. */
void sqz_finishing_free(struct sqz_finishing *f);

#endif
