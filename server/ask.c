/* What a request wants; ask.h describes it. */
#include "ask.h"

#include <stdlib.h>
#include <string.h>

void ask_free(struct ask *ask, struct library *library)
{
    for (unsigned i = 0; i < ask->n_prompts; i++) {
        free(ask->prompts[i].tokens);
        free(ask->prompts[i].echo);
        library_release(library, ask->prompts[i].context);
    }
    if (ask->reader) jobs_release(ask->jobs, ask->reader);
    free(ask->grammar);
    free(ask->biases);
    json_decref(ask->shown);
    stops_free(&ask->stops);
    memset(ask, 0, sizeof *ask);
}
