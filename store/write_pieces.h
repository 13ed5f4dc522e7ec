/*
 * Pieces of memory into their places of a file, by several threads: while one
 * copies into the page cache, others make checksums or give the disk what has been
 * copied. Nothing of a file depends on how many there are.
 */
#ifndef SQZ_STORE_WRITE_PIECES_H
#define SQZ_STORE_WRITE_PIECES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SQZ_WRITING_THREADS = 8 /* more find nothing to do: a file takes copies one at a time */ };

struct sqz_piece {
    const void *bytes;
    uint64_t n_bytes, offset; /* in the file */
    uint64_t *checksum;       /* out: XXH3, 64 bits; NULL: none is wanted */
};

struct sqz_write_failure {
    int reason; /* errno; 0: no bytes were taken */
    uint64_t n_bytes, offset;
};

/* False: some bytes could not be written, which the failure describes; what else is written then is not said. */
bool sqz_write_pieces(int file, const struct sqz_piece *pieces, size_t n_pieces, int n_threads,
                      struct sqz_write_failure *failure);

#endif
