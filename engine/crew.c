/* How many threads; crew.h describes it. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "crew.h"

#include <math.h>

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

int sqz_crew_step(struct sqz_crew *crew, size_t n_tokens)
{
    if (crew->fixed) return crew->now;
    look(crew);
    crew->now = n_tokens >= BATCH_TOKENS ? crew->most : crew->left;
    return crew->now;
}

void sqz_crew_pause(struct sqz_crew *crew)
{
    if (!crew->fixed) crew->ended_at = sqz_clock_seconds();
}

void sqz_crew_dismiss(void)
{
#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
    omp_pause_resource_all(omp_pause_soft);
#endif
}
