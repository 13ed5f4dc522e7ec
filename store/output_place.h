/*
 * Where a file will stand: a directory, held open, and a name in it. Everything
 * about the place is looked up in that directory, so that nobody who swaps a
 * part of the path meanwhile can lead the file elsewhere.
 */
#ifndef SQZ_STORE_OUTPUT_PLACE_H
#define SQZ_STORE_OUTPUT_PLACE_H

#include "format.h"

#include <sys/types.h>

struct sqz_output_place {
    int directory; /* descriptor; -1: none */
    char *base;    /* the name in it */
    bool replaces; /* a regular file stood there when it was looked at; then: */
    mode_t mode;
    uid_t owner;
    gid_t group;
};

/* Finds the place of a path. A symbolic link there is followed, and what it leads to will be replaced; refused are
 * directories, devices and the like, links that lead nowhere, and files that may not be written. After a failure, too,
 * sqz_output_place_close() must be called. */
enum sqz_status sqz_output_place_find(struct sqz_output_place *place, const char *path,
                                      const struct sqz_report *report);
void sqz_output_place_close(struct sqz_output_place *place);

/* Gives a file the mode, and where that is allowed owner and group, of the one it replaces. */
enum sqz_status sqz_output_place_dress(const struct sqz_output_place *place, int file, const struct sqz_report *report);

/* Puts the file of a temporary name in the directory in place. What stands there now must be a regular file or nothing;
 * another file than the one looked at hands on its own mode. */
enum sqz_status sqz_output_place_fill(struct sqz_output_place *place, const char *temporary, int file,
                                      const struct sqz_report *report);

/* Removes temporary files that were left behind: names of that pattern, of this user, untouched for a minute, whose
 * writer holds no lock on them any more. */
void sqz_output_place_clear(const struct sqz_output_place *place);

#endif
