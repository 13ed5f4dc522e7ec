/* What is wrong with a request, in HTTP's terms and the API's. */
#ifndef SQZ_SERVER_FAULT_H
#define SQZ_SERVER_FAULT_H

#include <stdbool.h>

#include "bytes.h"
#include "squeeze.h"

struct fault {
    int status;       /* HTTP; 0: nothing is wrong */
    const char *code; /* static: "context_length_exceeded"; NULL: none */
    char param[64];   /* "": none */
    char message[512];
    int retry_after;     /* seconds; 0: not said */
    char request_id[32]; /* "": not said */
};

/* Notes the first fault only. Returns false. */
__attribute__((format(printf, 5, 6))) bool fault_set(struct fault *fault, int status, const char *code,
                                                     const char *param, const char *format, ...);
/* Requests that end because the server does. trouble: why, of one whose ranks are lost (struct server_ranks); NULL: it was
 * told to. Returns false. */
bool fault_of_end(struct fault *fault, const char *trouble);
/* From the engine's error. Returns false. */
bool fault_from(struct fault *fault, const struct sqz_error *error);

enum api { API_OPENAI, API_ANTHROPIC };
/* The body that says it, as the API's clients read it. */
void fault_body(const struct fault *fault, enum api api, struct bytes *body);

#endif
