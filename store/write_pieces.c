/* Writing by several threads; write_pieces.h describes it. */
#define _GNU_SOURCE /* sync_file_range */
#include "write_pieces.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <unistd.h>

/* What one thread copies and hands to the disk at once. One thread that did so for whole tensors let the disk wait while it
 * copied, and copied nothing while it handed over: 1.4 GB/s, where this writes 2.5 to the same disk. */
enum { PART_BYTES = 8 << 20, LEAST_WRITEBACK_BYTES = 1 << 20 };

struct writing {
    int file;
    const struct sqz_piece *pieces;
    struct sqz_write_failure *failure;
    atomic_int failed;
};

static bool write_at(struct writing *w, const char *bytes, uint64_t n_bytes, uint64_t offset)
{
    while (n_bytes) {
        const ssize_t n = pwrite(w->file, bytes, (size_t)n_bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            const int reason = n ? errno : 0;
            if (!atomic_exchange(&w->failed, 1)) *w->failure = (struct sqz_write_failure){reason, n_bytes, offset};
            return false;
        }
        bytes += n;
        n_bytes -= (uint64_t)n;
        offset += (uint64_t)n;
    }
    return true;
}

/* The disk begins with it at once: left to itself, the system lets gigabytes pile up, which the sync at the end then waits
 * for. A hint. */
static void begin_writeback(const struct writing *w, uint64_t offset, uint64_t bytes)
{
#ifdef SYNC_FILE_RANGE_WRITE
    if (bytes >= LEAST_WRITEBACK_BYTES) sync_file_range(w->file, (off_t)offset, (off_t)bytes, SYNC_FILE_RANGE_WRITE);
#else
    (void)w, (void)offset, (void)bytes;
#endif
}

static uint64_t parts_of(const struct sqz_piece *p)
{
    return (p->n_bytes + PART_BYTES - 1) / PART_BYTES;
}

static void write_part(struct writing *w, const struct sqz_piece *p, uint64_t part)
{
    const uint64_t at = part * PART_BYTES, left = p->n_bytes - at, n = left < PART_BYTES ? left : PART_BYTES;
    if (atomic_load(&w->failed)) return;
    if (write_at(w, (const char *)p->bytes + at, n, p->offset + at)) begin_writeback(w, p->offset + at, n);
}

/* Checksums first, the large ones of them, which come last in a file, before the others: each is one thread's. */
static void do_task(struct writing *w, size_t n_pieces, uint64_t task)
{
    if (task < n_pieces) {
        const struct sqz_piece *p = &w->pieces[n_pieces - 1 - task];
        if (p->checksum) *p->checksum = XXH3_64bits(p->bytes, (size_t)p->n_bytes);
        return;
    }
    task -= n_pieces;
    const struct sqz_piece *p = w->pieces;
    for (; task >= parts_of(p); p++) task -= parts_of(p);
    write_part(w, p, task);
}

bool sqz_write_pieces(int file, const struct sqz_piece *pieces, size_t n_pieces, int n_threads,
                      struct sqz_write_failure *failure)
{
    struct writing w = {file, pieces, failure, 0};
    uint64_t n_tasks = n_pieces;
    for (size_t i = 0; i < n_pieces; i++) n_tasks += parts_of(&pieces[i]);
    if (n_threads > SQZ_WRITING_THREADS) n_threads = SQZ_WRITING_THREADS;
    if (n_threads < 1 || n_tasks < 4 + n_pieces) n_threads = 1; /* a few megabytes are not worth waking anybody */
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (uint64_t task = 0; task < n_tasks; task++) do_task(&w, n_pieces, task);
    return !atomic_load(&w.failed);
}
