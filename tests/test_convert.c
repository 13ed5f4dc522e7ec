/* Kinds of documents by their bytes, and the confined child process that makes text of them. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h needs these four first. */
#include <cmocka.h>
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "child.h"
#include "clock.h"
#include "convert.h"

#define KIND(bytes) document_kind(bytes, sizeof(bytes) - 1)

static void test_kinds(void **state)
{
    const struct document_kind *html = KIND("<!DOCTYPE html>\n<p>x");
    const struct document_kind *pdf = KIND("%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"),
                               *docx = KIND("PK\3\4........word/document.xml");
    const struct document_kind *epub = KIND("PK\3\4......mimetypeapplication/epub+zipPK\3\4OEBPS/x.html");
    const struct document_kind *odt = KIND("PK\3\4mimetypeapplication/vnd.oasis.opendocument.text");
    (void)state;
    assert_non_null(html);
    assert_non_null(pdf);
    assert_non_null(docx);
    assert_non_null(epub);
    assert_non_null(odt);
    assert_true(html != pdf && pdf != docx && docx != epub && epub != odt);
    assert_ptr_equal(KIND("\xef\xbb\xbf \r\n<HTML lang=de><body>"), html);
    assert_ptr_equal(KIND("<?xml version='1.0'?>\n<!-- <p> --><!-- a --><!doctype HTML PUBLIC \"x\">"), html);
    /* Text, or nothing that is read. */
    assert_null(KIND(""));
    assert_null(KIND("<"));
    assert_null(KIND("<!--"));
    assert_null(KIND("<!-- <html> "));
    assert_null(KIND("<?xml version='1.0'?><svg/>"));
    assert_null(KIND("<htmlx> is no element"));
    assert_null(KIND("<!doctype html5"));
    assert_null(KIND("Of <html> and its end"));
    assert_null(KIND(" %PDF-1.7"));
    assert_null(KIND("PK\3\4......anything.txt"));
    assert_null(KIND("\x89PNG\r\n\x1a\n<html>"));
}

/* ---- Children --------------------------------------------------------------------------------------------------- */

static bool always(void *data)
{
    (void)data;
    return true;
}

static bool so_often(void *data)
{
    return (*(int *)data)-- > 0;
}

static const struct child_limits usual = {.memory_bytes = 1u << 30, .output_bytes = 1 << 22, .seconds = 20};

/* Of a command line of bash, whose output is said as text. */
static enum child_end run(const char *command, const char *input, struct child_limits limits, struct bytes *output)
{
    const char *arguments[] = {"/bin/bash", "-c", command, NULL};
    int code;
    return child_run(arguments, input, strlen(input), &limits, always, NULL, output, &code);
}

static void expect(enum child_end wanted, const char *command, struct child_limits limits)
{
    struct bytes output = {0};
    const enum child_end got = run(command, "", limits, &output);
    if (got != wanted)
        fail_msg("%s: got %d, wanted %d; output '%.200s'", command, (int)got, (int)wanted,
                 output.data ? output.data : "");
    bytes_free(&output);
}

static void test_passes_all(void **state)
{
    enum { BYTES = 3000000 };
    const char *arguments[] = {"/bin/cat", NULL};
    char *input = malloc(BYTES);
    struct bytes output = {0};
    int code;
    (void)state;
    for (size_t i = 0; i < BYTES; i++) input[i] = (char)(i * 2654435761u >> 13);
    assert_int_equal(child_run(arguments, input, BYTES, &usual, always, NULL, &output, &code), CHILD_DONE);
    assert_int_equal(output.n, BYTES);
    assert_memory_equal(output.data, input, BYTES);
    bytes_free(&output);
    free(input);
}

static void test_ends(void **state)
{
    const char *none[] = {"/nonexistent/program", NULL}, *code_three[] = {"/bin/sh", "-c", "exit 3", NULL};
    struct bytes output = {0};
    struct child_limits short_time = usual;
    int code, times = 3;
    (void)state;
    assert_int_equal(child_run(none, "", 0, &usual, always, NULL, &output, &code), CHILD_FAILED);
    assert_int_equal(child_run(code_three, "", 0, &usual, always, NULL, &output, &code), CHILD_FAILED);
    assert_int_equal(code, 3);
    const double began = sqz_clock_seconds();
    const char *sleeping[] = {"/bin/sleep", "50", NULL};
    assert_int_equal(child_run(sleeping, "", 0, &usual, so_often, &times, &output, &code), CHILD_STOPPED);
    short_time.seconds = 1;
    expect(CHILD_LATE, "sleep 50", short_time);
    expect(CHILD_LATE, "while :; do :; done", short_time);
    expect(CHILD_LATE, "exec >&-; sleep 50", usual); /* says nothing more, and stays */
    assert_true(sqz_clock_seconds() - began < 30);
    bytes_free(&output);
}

static void test_limits(void **state)
{
    struct child_limits little = usual;
    (void)state;
    expect(CHILD_LARGE, "exec yes", usual);
    expect(CHILD_DONE, "x=$(yes | head -c 20000000); [ ${#x} -gt 19000000 ]", usual);
    little.memory_bytes = 64 << 20;
    struct bytes output = {0};
    assert_int_not_equal(run("x=$(yes | head -c 200000000); [ ${#x} -gt 19000000 ]", "", little, &output), CHILD_DONE);
    bytes_free(&output);
}

static void test_environment(void **state)
{
    struct bytes output = {0};
    (void)state;
    setenv("SQUEEZE_SECRET", "not for children", 1);
    const char *arguments[] = {"/usr/bin/env", NULL};
    int code;
    assert_int_equal(child_run(arguments, "", 0, &usual, always, NULL, &output, &code), CHILD_DONE);
    assert_string_equal(output.data, "PATH=/usr/bin:/bin\nLC_ALL=C.UTF-8\nHOME=/nonexistent\n");
    bytes_free(&output);
    /* No descriptor of ours. */
    const int open_one = dup(2);
    char command[64];
    snprintf(command, sizeof command, "! : 2>/dev/null >&%d", open_one);
    expect(CHILD_DONE, command, usual);
    close(open_one);
}

static void test_no_network(void **state)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof address;
    char command[128];
    const int listening = socket(AF_INET, SOCK_STREAM, 0);
    (void)state;
    assert_int_equal(bind(listening, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(listening, 1), 0);
    assert_int_equal(getsockname(listening, (struct sockaddr *)&address, &n), 0);
    snprintf(command, sizeof command, "exec 3<>/dev/tcp/127.0.0.1/%d", (int)ntohs(address.sin_port));
    char outside[160];
    snprintf(outside, sizeof outside, "/bin/bash -c '%s'", command);
    assert_int_equal(system(outside), 0); /* who is not confined can */
    expect(CHILD_FAILED, command, usual);
    close(listening);
}

static void test_no_files(void **state)
{
    char name[] = "/tmp/squeeze-convert-XXXXXX", command[128];
    const int file = mkstemp(name);
    struct stat about;
    (void)state;
    assert_true(file >= 0);
    snprintf(command, sizeof command, "echo text > %s", name);
    expect(CHILD_FAILED, command, usual);
    assert_int_equal(fstat(file, &about), 0);
    assert_int_equal(about.st_size, 0);
    expect(CHILD_FAILED, "kill -0 $PPID", usual);
#ifdef SYS_landlock_create_ruleset
    if (syscall(SYS_landlock_create_ruleset, NULL, 0, 1) > 0) {
        snprintf(command, sizeof command, "cat %s", name);
        expect(CHILD_FAILED, command, usual);
        expect(CHILD_FAILED, "cat /etc/passwd", usual);
        expect(CHILD_FAILED, "cat /proc/$PPID/environ", usual);
    }
#endif
    close(file);
    unlink(name);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kinds),    cmocka_unit_test(test_passes_all),  cmocka_unit_test(test_ends),
        cmocka_unit_test(test_limits),   cmocka_unit_test(test_environment), cmocka_unit_test(test_no_network),
        cmocka_unit_test(test_no_files),
    };
    return cmocka_run_group_tests_name("convert", tests, NULL, NULL);
}
