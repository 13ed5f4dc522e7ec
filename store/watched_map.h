/*
 * Maps of files that may lose pages: a file that is cut off, or whose disk
 * fails, raises SIGBUS when such a page is read. Whoever handles that signal
 * asks here whether the page was one of a watched map. All of that map then
 * reads as zeros, so that whatever was reading it, on any thread, goes on; and
 * that it was lost is remembered, so that what was computed can be refused.
 */
#ifndef SQZ_STORE_WATCHED_MAP_H
#define SQZ_STORE_WATCHED_MAP_H

#include <stdbool.h>
#include <stddef.h>

struct sqz_watched_map;

/* From now on the map is known to sqz_watched_page_lost(); NULL: no memory. The map must stay until sqz_watch_end(),
 * which comes before it is unmapped. */
struct sqz_watched_map *sqz_watch_begin(const void *map, size_t bytes);
void sqz_watch_end(struct sqz_watched_map *watched); /* NULL is fine */

/* Whether a page of it was lost since. */
bool sqz_watch_is_lost(const struct sqz_watched_map *watched);

/* False: the address is in no watched map, or zeros could not be put in its place. Async-signal-safe. */
bool sqz_watched_page_lost(const void *address);

#endif
