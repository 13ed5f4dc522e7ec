/* Speculative sampling; rejection.h describes it. */
#include "rejection.h"

#include "random.h"

/* Of word i. */
static double more(const float *odds, const float *less, int32_t without, size_t i)
{
    if (!less) return (int32_t)i == without ? 0 : (double)odds[i];
    return odds[i] > less[i] ? (double)odds[i] - (double)less[i] : 0;
}

/* By u from what the odds have more than `less`, or of all words but one; -1: nothing is left. */
static int32_t draw_more(const float *odds, const float *less, size_t n, int32_t without, double u)
{
    double whole = 0, sum = 0;
    int32_t last = -1;
    for (size_t i = 0; i < n; i++) whole += more(odds, less, without, i);
    for (size_t i = 0; i < n; i++) {
        const double part = more(odds, less, without, i);
        if (part <= 0) continue;
        sum += part;
        last = (int32_t)i;
        if (sum > u * whole) break;
    }
    return last;
}

int32_t sqz_draw(const float *odds, size_t n, double u)
{
    return draw_more(odds, NULL, n, -1, u);
}

int32_t sqz_reject(const float *odds, const float *draft_odds, size_t n, int32_t draft, double keep, double u)
{
    const double drafted = draft_odds ? (double)draft_odds[draft] : 1;
    if (keep * drafted < (double)odds[draft]) return draft;
    const int32_t other = draw_more(odds, draft_odds, n, draft, u);
    return other >= 0 ? other : draft; /* both are the same, up to rounding */
}

double sqz_draw_number(uint32_t seed, size_t place, enum sqz_draw_use use)
{
    uint64_t state = ((uint64_t)seed << 32) ^ ((uint64_t)place * 4 + use) * UINT64_C(0xd1342543de82ef95);
    sqz_splitmix64(&state);
    return (double)(sqz_splitmix64(&state) >> 11) * 0x1.0p-53;
}
