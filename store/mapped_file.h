/*
 * A file that is mapped and may be changed by others meanwhile. What must hold
 * still is read into memory of the caller's own; the rest is used in place, and
 * whether the file is still the one that was opened can be asked at any time.
 * The map is a watched one (watched_map.h).
 */
#ifndef SQZ_STORE_MAPPED_FILE_H
#define SQZ_STORE_MAPPED_FILE_H

#include "format.h"
#include "watched_map.h"

#include <time.h>

struct sqz_mapped_file {
    char *path;
    int descriptor;     /* kept open to look at the file again; -1: none */
    const uint8_t *map; /* NULL: none */
    struct sqz_watched_map *watched;
    size_t bytes;
    struct timespec written; /* when its content changed last, as of opening */
};

/* Opens and maps a regular file. After a failure, too, sqz_file_close() must be called. */
enum sqz_status sqz_file_open(struct sqz_mapped_file *file, const char *path, const struct sqz_report *report);
void sqz_file_close(struct sqz_mapped_file *file);

/* Copies bytes of the file. Unlike the map it cannot end the process when the file was cut off: that is an error. */
enum sqz_status sqz_file_read(const struct sqz_mapped_file *file, void *to, size_t bytes, uint64_t at,
                              const struct sqz_report *report);

/* Asks the disk for bytes of a map that will be read soon. A hint: failing changes nothing. */
void sqz_file_will_read(const void *begin, size_t bytes);

/* Refuses a file that is mostly holes, which cost its maker nothing and its reader as much as data. */
enum sqz_status sqz_file_check_holes(const struct sqz_mapped_file *file, const struct sqz_report *report);

/* SQZ_ERROR_IO when the file has another size, or was written to, or a page of it was lost, since it was opened. That
 * its name now leads elsewhere, or nowhere, is fine. */
enum sqz_status sqz_file_check_unchanged(const struct sqz_mapped_file *file, struct sqz_error *error);

#endif
