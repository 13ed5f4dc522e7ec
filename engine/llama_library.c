/* llama.cpp as a library, see llama_library.h. */
#include "llama_library.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "llama.h"
#include "squeeze.h"

const char *sqz_llama_version(void)
{
    return llama_version();
}

/* ---- Its log, kept for error messages ---------------------------------------- */

static bool taken;
static char complaint[256];

static void keep_complaint(enum ggml_log_level level, const char *text, void *user_data)
{
    (void)user_data;
    if (level != GGML_LOG_LEVEL_ERROR || complaint[0]) return; /* the first error is the cause */
    snprintf(complaint, sizeof complaint, "%s", text);
    size_t n = strlen(complaint);
    while (n && (complaint[n - 1] == '\n' || complaint[n - 1] == ' ')) complaint[--n] = '\0';
}

void sqz_llama_log_take(void)
{
    llama_log_set(keep_complaint, NULL);
    taken = true;
    sqz_llama_complaint_clear();
}

const char *sqz_llama_complaint(const char *otherwise)
{
    if (!taken) return "llama.cpp's log says why";
    return complaint[0] ? complaint : otherwise;
}

void sqz_llama_complaint_clear(void)
{
    complaint[0] = '\0';
}
