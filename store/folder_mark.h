/*
 * A mark in a folder: an empty file for a moment, by which processes find out
 * whether they see one folder or each its own under the same name.
 */
#ifndef SQZ_STORE_FOLDER_MARK_H
#define SQZ_STORE_FOLDER_MARK_H

#include <stdbool.h>

#include "squeeze.h"
#include "unfinished.h"

struct sqz_folder_mark {
    int directory;  /* descriptor; -1: there is no mark */
    int unfinished; /* of sqz_unfinished_note() */
    char name[SQZ_UNFINISHED_NAME_BYTES];
};

/* In the folder of a file's path. Its name is one of those that the next file written there removes, should the process be
 * killed. Errors: IO, with `path` and the reason; then there is nothing to remove. */
enum sqz_status sqz_folder_mark_make(struct sqz_folder_mark *mark, const char *path, struct sqz_error *error);
void sqz_folder_mark_remove(struct sqz_folder_mark *mark);

/* Whether a mark of that name is in the folder of a file's path, here. */
bool sqz_folder_mark_is_seen(const char *path, const char *name);

#endif
