/* How many threads; crew.h describes it. */
#define _GNU_SOURCE /* sched_setaffinity, clock_gettime */
#include "crew.h"

#include <math.h>
#include <sched.h>

#include "clock.h"
#include "threads.h"

/* Of a core, what others may use before a thread makes room for them: /proc/stat counts in hundredths of a second, and
 * small things run on every machine. The first look comes after a short time, while the model was opened; a thread
 * comes back only when its core is nearly unused. */
static const double first_slack = 0.6, slack = 0.35, return_slack = 0.2;

/* Between two looks. Reading /proc/stat takes longer the more CPUs there are, and its error grows. */
static double look_seconds(const struct sqz_crew *crew)
{
    return 0.15 + 0.005 * crew->cores.n_allowed;
}

/* Tokens of a run that are worth all threads: reading 560 tokens on two cores of a Zen 3 takes one thread 6.06 s and
 * two 5.31 s beside one busy process, 12.6 and 8.5 s beside three; 3.0 s on the idle machine. */
enum { BATCH_TOKENS = 128 };

/* A longer pause between runs says nothing about now. */
static const double stale_seconds = 0.5;

int sqz_crew_most(void)
{
    struct sqz_cores cores;
    sqz_cores_find(&cores);
    return sqz_default_threads(sqz_cores_count(&cores));
}

void sqz_crew_begin(struct sqz_crew *crew, int n_threads)
{
    *crew = (struct sqz_crew){.fixed = n_threads > 0};
    sqz_cores_find(&crew->cores);
    crew->most = n_threads > 0 ? n_threads : sqz_default_threads(sqz_cores_count(&crew->cores));
    crew->left = crew->now = crew->most;
    if (crew->most == 1 || !sqz_cores_read(&crew->cores, &crew->last)) crew->fixed = true;
    crew->ended_at = crew->last.at;
}

/* Whole cores that are left when others use `used` of `all`. */
static int cores_left(double all, double used, double spare)
{
    return (int)floor(all - fmax(used, 0) + spare);
}

void sqz_crew_decide(struct sqz_crew *crew, const struct sqz_cores_reading *r)
{
    const struct sqz_cores_reading *last = &crew->last;
    const double seconds = r->at - last->at, own = r->own - last->own;
    const double others = (r->all - last->all - own) / seconds, group = (r->group - last->group - own) / seconds;
    if (!(seconds > 0)) return;
    const double spare[2] = {crew->settled ? slack : first_slack, return_slack};
    int left[2];
    for (int i = 0; i < 2; i++) {
        left[i] = cores_left(crew->cores.n_allowed, others, spare[i]);
        if (crew->cores.group_stat[0]) left[i] = (int)fmin(left[i], cores_left(crew->cores.quota, group, spare[i]));
        left[i] = (int)fmax(1, fmin(left[i], crew->most));
    }
    if (crew->left > left[0]) crew->left = left[0];
    else if (crew->left < left[1]) crew->left = left[1];
    crew->settled = true;
    crew->last = *r;
}

/* Looks, when it is time to. */
static void look(struct sqz_crew *crew)
{
    const double now = sqz_clock_seconds(), wanted = look_seconds(crew) * (crew->settled ? 1 : 0.5);
    const bool stale = now - crew->ended_at > stale_seconds;
    struct sqz_cores_reading reading;
    if (!stale && now - crew->last.at < wanted) return;
    if (!sqz_cores_read(&crew->cores, &reading)) return;
    if (stale) crew->last = reading;
    else sqz_crew_decide(crew, &reading);
}

/* ---- Where they run ----------------------------------------------------------------- */

/* The CPU that the calling thread has to stay on, and 1; 0: it goes where it is sent. */
static _Thread_local int place;
static _Thread_local cpu_set_t allowed_between; /* runs */

static void stay_on(int cpu)
{
    cpu_set_t set;
    if (place == cpu + 1) return;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) == 0) place = cpu + 1;
}

static void go_anywhere(const cpu_set_t *allowed)
{
    if (place && sched_setaffinity(0, sizeof *allowed, allowed) == 0) place = 0;
}

/* CPU number n of a set. */
static int cpu_of(const cpu_set_t *set, int n)
{
    int cpu = 0;
    while (!CPU_ISSET(cpu, set) || n-- > 0) cpu++;
    return cpu;
}

/* Each thread has a CPU for itself while there are as many; else they go anywhere. Looked at before every run: OpenMP's
 * threads come and go with the size of its team, each new one where the calling thread may be, which is therefore last. */
static void take_places(const struct sqz_crew *crew)
{
    cpu_set_t allowed;
    if (crew->now == 1 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    const bool one_each = CPU_COUNT(&allowed) == crew->now;
#pragma omp parallel num_threads(crew->now)
    if (sqz_thread_number() != 0) {
        if (one_each) stay_on(cpu_of(&allowed, sqz_thread_number()));
        else go_anywhere(&allowed);
    }
    if (!one_each) return;
    allowed_between = allowed;
    stay_on(cpu_of(&allowed, 0));
}

int sqz_crew_step(struct sqz_crew *crew, size_t n_tokens)
{
    if (!crew->fixed) {
        look(crew);
        crew->now = n_tokens >= BATCH_TOKENS ? crew->most : crew->left;
    }
    if (crew->placed) take_places(crew);
    return crew->now;
}

void sqz_crew_pause(struct sqz_crew *crew)
{
    if (crew->placed) go_anywhere(&allowed_between); /* and so do threads that it starts */
    if (!crew->fixed) crew->ended_at = sqz_clock_seconds();
}

void sqz_crew_dismiss(void)
{
#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
    omp_pause_resource_all(omp_pause_soft);
#endif
}
