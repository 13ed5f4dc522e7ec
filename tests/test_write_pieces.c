/*
 * Pieces of memory into a file, by one thread and by several: what stands in the
 * file and the checksums are the same, and bytes that cannot be written are said.
 */
#define _GNU_SOURCE /* memfd_create */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "write_pieces.h"

/* Around the 8 MiB that a thread writes at once; none at all. */
static const uint64_t sizes[] = {1, 0, 4096, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, 17 << 20, 5, 1 << 20};
enum { N = sizeof sizes / sizeof *sizes, GAP = 64 /* between two pieces, which nobody writes */ };

static struct sqz_piece pieces[N];
static uint64_t checksums[N], all_bytes;

static int set_up(void **state)
{
    (void)state;
    for (size_t i = 0; i < N; i++) {
        uint32_t *bytes = malloc((size_t)sizes[i] + 4);
        for (size_t j = 0; j <= sizes[i] / 4; j++) bytes[j] = (uint32_t)(j * 2654435761u + i);
        pieces[i] = (struct sqz_piece){bytes, sizes[i], all_bytes, &checksums[i]};
        all_bytes += sizes[i] + GAP;
    }
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (size_t i = 0; i < N; i++) free((void *)(uintptr_t)pieces[i].bytes);
    return 0;
}

static void check_file(int file)
{
    static const char zeros[GAP];
    char *map = mmap(NULL, (size_t)all_bytes, PROT_READ, MAP_SHARED, file, 0);
    assert_ptr_not_equal(map, MAP_FAILED);
    for (size_t i = 0; i < N; i++) {
        const char *at = map + pieces[i].offset;
        assert_memory_equal(at, pieces[i].bytes, (size_t)sizes[i]);
        assert_memory_equal(at + sizes[i], zeros, GAP);
        if (pieces[i].checksum) assert_true(checksums[i] == XXH3_64bits(pieces[i].bytes, (size_t)sizes[i]));
    }
    munmap(map, (size_t)all_bytes);
}

static void test_threads(void **state)
{
    static const int threads[] = {1, 2, 3, 8, 100, 0, -1};
    struct sqz_write_failure failure;
    (void)state;
    for (size_t i = 0; i < sizeof threads / sizeof *threads; i++) {
        const int file = memfd_create("pieces", 0);
        assert_int_equal(ftruncate(file, (off_t)all_bytes), 0);
        memset(checksums, 0, sizeof checksums);
        pieces[6].checksum = i % 2 ? &checksums[6] : NULL;
        assert_true(sqz_write_pieces(file, pieces, N, threads[i], &failure));
        check_file(file);
        close(file);
    }
    pieces[6].checksum = &checksums[6];
}

/* A file that may not grow so far, and one that is not open: the piece that was refused is named. */
static void test_failures(void **state)
{
    const char *folder = getenv("SQUEEZE_TEST_FOLDER");
    char path[1024];
    struct rlimit old, limit;
    struct sqz_write_failure failure;
    (void)state;
    snprintf(path, sizeof path, "%s/pieces.XXXXXX", folder ? folder : "/tmp");
    const int file = mkstemp(path);
    assert_true(file >= 0);
    unlink(path);
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    limit = (struct rlimit){20 << 20, old.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    for (int threads = 1; threads <= 8; threads *= 2) {
        assert_false(sqz_write_pieces(file, pieces, N, threads, &failure));
        assert_int_equal(failure.reason, EFBIG);
        assert_true(failure.offset >= 20 << 20 && failure.n_bytes > 0 && failure.n_bytes <= 8 << 20);
    }
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    close(file);
    for (int threads = 1; threads <= 8; threads *= 2) {
        assert_false(sqz_write_pieces(-1, pieces, N, threads, &failure));
        assert_int_equal(failure.reason, EBADF);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_threads), cmocka_unit_test(test_failures)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
