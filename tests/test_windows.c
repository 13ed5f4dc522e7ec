/* The engine on the second model: sliding windows shorter than the context, head dimension 256, one KV head. */
#define _POSIX_C_SOURCE  200809L /* sigaction, utimensat */
#define MODEL_VARIABLE   "SQUEEZE_MODEL2"
#define N_CONTEXT_TOKENS 1100
#include "engine_cases.h"

int main(void)
{
    return run_engine_cases("windows");
}
