/* Tools: told to the model in its first turn, called by it in the marks that it was taught. */
#ifndef SQZ_SERVER_TOOLS_H
#define SQZ_SERVER_TOOLS_H

#include "tool_calls.h"
#include "input.h"
#include "talk.h"

enum tool_choice { TOOL_NONE, TOOL_AUTO, TOOL_REQUIRED };

struct tool {
    const char *name, *description; /* description: NULL for none */
    const json_t *parameters;       /* a schema; NULL: none */
};

struct tools {
    struct tool *tool; /* malloc'ed */
    size_t n;
    enum tool_choice choice;
    int named; /* the one that must be called; -1: any */
    enum call_format format;
};

/* Adds a tool; its strings and schema stay the client's JSON's. */
bool tools_add(struct tools *tools, const char *name, const char *description, const json_t *parameters,
               struct fault *fault);
/* The number of the tool of this name; -1 and the fault: none. */
int tools_find(const struct tools *tools, const char *name, const char *param, struct fault *fault);
/* Keeps those alone that are allowed, one truth a tool. */
void tools_keep(struct tools *tools, const bool *allowed);
/* A call that must come needs a tool. */
bool tools_check_choice(const struct tools *tools, struct fault *fault);
void tools_free(struct tools *tools);

/* Puts them in front of the conversation. */
bool tools_tell(const struct tools *tools, struct talk *talk, struct fault *fault);
/* The grammar of a call, where there must be one. */
bool tools_grammar(const struct tools *tools, struct bytes *grammar, struct fault *fault);

#endif
