/* Calls of tools as models write them: each family was taught marks of its own. */
#ifndef SQZ_SERVER_TOOL_CALLS_H
#define SQZ_SERVER_TOOL_CALLS_H

#include <jansson.h>

#include "bytes.h"

enum call_format {
    CALLS_MARKED,  /* <tool_call>{"name", "arguments"}</tool_call>: Hermes, Qwen, SmolLM2 and others */
    CALLS_MISTRAL, /* [TOOL_CALLS][{"name", "arguments"}], or [TOOL_CALLS]name[ARGS]{...} */
    CALLS_LLAMA    /* {"name", "parameters"} and nothing else, perhaps behind <|python_tag|>: Llama 3.1 and later */
};

/* The format that a model's chat template speaks of. template: NULL for none. */
enum call_format calls_format(const char *chat_template);
/* Whether the text of a special token is a mark of calls: such a token is part of what an answer says. */
bool calls_is_mark(const char *text, size_t n);

/* A call, and what a tool said, as a conversation holds them. */
void calls_put(struct bytes *text, enum call_format format, const char *name, const char *arguments);
void calls_put_response(struct bytes *text, enum call_format format, const char *said, size_t n);
/* What stands before the arguments of a call by that name, and behind them. */
void calls_put_before(struct bytes *text, enum call_format format, const char *name);
const char *calls_behind(enum call_format format);

/* Bytes of an answer so far that are surely no call. */
size_t calls_plain_bytes(enum call_format format, const char *text, size_t n);
/* The calls of an answer, {"name", "arguments": text} each, an array; NULL: none that can be read. Marks of every format
 * are known, whatever the model's own is. *n_plain: bytes of text before them. */
json_t *calls_read(enum call_format format, const char *text, size_t n, size_t *n_plain);

#endif
