/*
 * Lines between hosts that are network namespaces, on a kernel without `tc netem`: a TAP device in each, and this program in
 * the middle, a switch that hands frames on late, or not at all.
 *
 *     slow_line DEVICE NAMESPACE...
 *
 * creates DEVICE in each namespace (without address and down), says "ready" and then takes lines from its standard input, each of
 * which says how all lines are from now on, and is answered by another "ready":
 *
 *     DELAY_US JITTER_US LOSS_PERCENT RATE_MBIT       (a rate of 0: none)
 *
 * Until the first it is a switch. When its input or its parent ends it ends, and devices are gone. What is said holds for the
 * frames that a host sends, as a queueing discipline of its device would: each is lost with that probability, the others go out
 * one behind another at the rate, and arrive DELAY after that, give or take up to JITTER, none before one that was sent earlier.
 * A host may have 1,400 frames under way; what it sends beyond that is lost. Losses are drawn from a fixed seed.
 *
 * One thread: it sleeps until a frame comes or is due. Frames are handed on some 10 us late on an idle machine.
 */
#define _GNU_SOURCE /* setns, ppoll */
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST_HOSTS = 16, FRAME_BYTES = 1600, ROOM = 1400, MAC_BYTES = 6 };

struct frame {
    int64_t due; /* ns */
    int n_bytes;
    unsigned char bytes[FRAME_BYTES];
};

/* Frames that a host has sent, in the order in which they are due. */
struct host {
    int tap;
    unsigned char mac[MAC_BYTES]; /* of its last frame */
    struct frame *frames;         /* [ROOM], from first on, round */
    int first, n;
    int64_t idle_at, last_due; /* when its line has sent all so far; the last frame is due */
};

static struct host hosts[MOST_HOSTS];
static int n_hosts;
static struct {
    int64_t delay, jitter; /* ns */
    double loss;           /* 0 to 1 */
    double bit;            /* ns of each; 0: none */
} line;

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* 0 <= x < 1: xorshift. */
static double draw(void)
{
    static uint64_t state = 0x9e3779b97f4a7c15;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (double)(state >> 11) * 0x1p-53;
}

static bool enter(const char *namespace_file)
{
    const int there = open(namespace_file, O_RDONLY | O_CLOEXEC);
    const bool entered = there >= 0 && setns(there, CLONE_NEWNET) == 0;
    if (there >= 0) close(there);
    return entered;
}

/* A device of that name in the namespace, where this process is then; -1: errno says why not. */
static int open_tap(const char *device, const char *namespace)
{
    char path[300];
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    snprintf(path, sizeof path, "/var/run/netns/%s", namespace);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", device);
    if (!enter(path)) return -1;
    const int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    return tap >= 0 && ioctl(tap, TUNSETIFF, &request) == 0 ? tap : -1;
}

static void hand_on(const struct host *from, const struct frame *f)
{
    const struct host *to = NULL;
    for (int i = 0; i < n_hosts && !(f->bytes[0] & 1); i++) /* odd: for all */
        if (&hosts[i] != from && memcmp(hosts[i].mac, f->bytes, MAC_BYTES) == 0) to = &hosts[i];
    for (int i = 0; i < n_hosts; i++)
        if (&hosts[i] != from && (!to || to == &hosts[i]) && write(hosts[i].tap, f->bytes, (size_t)f->n_bytes) < 0)
            continue; /* its device is down: lost, as on a line that is cut off */
}

/* Takes what a host has sent, and says when each frame is due. */
static void take(struct host *h)
{
    struct frame lost;
    for (;;) {
        struct frame *f = h->n < ROOM ? &h->frames[(h->first + h->n) % ROOM] : &lost;
        const ssize_t n = read(h->tap, f->bytes, sizeof f->bytes);
        if (n < 2 * MAC_BYTES) return;
        const int64_t now = now_ns();
        memcpy(h->mac, f->bytes + MAC_BYTES, MAC_BYTES);
        if (f == &lost || draw() < line.loss) continue;
        if (h->idle_at < now) h->idle_at = now;
        h->idle_at += (int64_t)(8 * (double)n * line.bit);
        f->due = h->idle_at + line.delay + (int64_t)((2 * draw() - 1) * (double)line.jitter);
        if (f->due < h->last_due) f->due = h->last_due;
        h->last_due = f->due;
        f->n_bytes = (int)n;
        h->n++;
    }
}

/* Hands on what is due; when the next one is, INT64_MAX: there is none. */
static int64_t send_due(void)
{
    int64_t next = INT64_MAX;
    for (struct host *h = hosts; h < hosts + n_hosts; h++) {
        for (; h->n && h->frames[h->first].due <= now_ns(); h->n--) {
            hand_on(h, &h->frames[h->first]);
            h->first = (h->first + 1) % ROOM;
        }
        if (h->n && h->frames[h->first].due < next) next = h->frames[h->first].due;
    }
    return next;
}

/* A line of the input; false: it has ended, or says nothing that could be done. */
static bool change(void)
{
    char text[200];
    double delay, jitter, loss, rate;
    const ssize_t n = read(0, text, sizeof text - 1);
    if (n <= 0) return false;
    text[n] = '\0';
    if (sscanf(text, "%lf %lf %lf %lf", &delay, &jitter, &loss, &rate) != 4 ||
        !(delay >= 0 && delay <= 1e7 && jitter >= 0 && jitter <= delay && loss >= 0 && loss <= 100 && rate >= 0)) {
        fprintf(stderr, "slow_line: '%s' is not DELAY_US JITTER_US LOSS_PERCENT RATE_MBIT\n", text);
        return false;
    }
    line.delay = (int64_t)(1e3 * delay);
    line.jitter = (int64_t)(1e3 * jitter);
    line.loss = loss / 100;
    line.bit = rate > 0 ? 1e3 / rate : 0;
    puts("ready");
    return true;
}

int main(int argc, char **argv)
{
    struct pollfd polled[MOST_HOSTS + 1] = {{.fd = 0, .events = POLLIN}};
    char home[64];
    if (argc < 4 || argc - 2 > MOST_HOSTS) {
        fprintf(stderr, "usage: slow_line DEVICE NAMESPACE... (2 to %d)\n", MOST_HOSTS);
        return 2;
    }
    for (n_hosts = 0; n_hosts < argc - 2; n_hosts++) {
        struct host *h = &hosts[n_hosts];
        h->tap = open_tap(argv[1], argv[2 + n_hosts]);
        h->frames = malloc(ROOM * sizeof *h->frames);
        if (h->tap < 0 || !h->frames) {
            fprintf(stderr, "slow_line: %s in namespace %s: %s\n", argv[1], argv[2 + n_hosts], strerror(errno));
            return 1;
        }
        polled[1 + n_hosts] = (struct pollfd){.fd = h->tap, .events = POLLIN};
    }
    /* Out of the last host, whose processes may be looked for. */
    snprintf(home, sizeof home, "/proc/%d/ns/net", (int)getppid());
    if (!enter(home)) perror("slow_line: its parent's namespace");
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_TIMERSLACK, 1UL);
    puts("ready");
    for (;;) {
        const int64_t next = send_due(), left = next - now_ns();
        const struct timespec until = {.tv_sec = left > 0 ? left / 1000000000 : 0,
                                       .tv_nsec = left > 0 ? left % 1000000000 : 0};
        if (ppoll(polled, (nfds_t)n_hosts + 1, next == INT64_MAX ? NULL : &until, NULL) < 0 && errno != EINTR) return 1;
        if (polled[0].revents && !change()) return 0;
        for (int i = 0; i < n_hosts; i++)
            if (polled[1 + i].revents) take(&hosts[i]);
    }
}
