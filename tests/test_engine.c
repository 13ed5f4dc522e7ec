/* The engine on the default model: grouped heads, head dimension 64, every layer full. */
#define _POSIX_C_SOURCE  200809L /* sigaction, utimensat */
#define MODEL_VARIABLE   "SQUEEZE_MODEL"
#define N_CONTEXT_TOKENS 900
#include "engine_cases.h"

int main(void)
{
    return run_engine_cases("engine");
}
