/* Which layers are a band; bands.h. */
#include "bands.h"

#include <stdlib.h>

/* What is written beside reading need not be written behind it, so the last band is a sixteenth of the layers. */
enum { BANDS = 5 };

/* Of n bands, the first has n + 1 parts, the others n - 1 to 1. */
static uint32_t parts_before(uint32_t n, uint32_t band)
{
    uint32_t parts = 0;
    for (uint32_t i = 0; i < band; i++) parts += i == 0 ? n + 1 : n - i;
    return parts;
}

uint32_t sqz_bands_plan(uint32_t end[SQZ_MOST_BANDS], uint32_t n_layer, uint32_t n_cards, uint32_t most)
{
    const char *asked = getenv("SQUEEZE_GPU_BANDS");
    const int wanted = asked ? atoi(asked) : BANDS;
    const uint32_t n_rounds = n_layer / n_cards;
    uint32_t n = wanted < 1 ? 1 : (uint32_t)wanted;
    if (most > SQZ_MOST_BANDS) most = SQZ_MOST_BANDS;
    if (n > most) n = most;
    if (n > n_rounds) n = n_rounds;
    if (n < 1) n = 1;
    for (uint32_t i = 0, before = 0; i < n; i++) {
        uint32_t round = n_rounds * parts_before(n, i + 1) / parts_before(n, n);
        if (round <= before) round = before + 1;
        if (round > n_rounds - (n - 1 - i)) round = n_rounds - (n - 1 - i);
        before = round;
        end[i] = i + 1 < n ? round * n_cards : n_layer;
    }
    return n;
}
