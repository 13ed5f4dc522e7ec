/* Conversations and texts as tokens behind the right context. */
#ifndef SQZ_SERVER_PROMPT_H
#define SQZ_SERVER_PROMPT_H

#include "core.h"

/* The context that a model's name asks for, "model:context": a reference in *entry, NULL when it names the model alone.
 * False, and the fault, for a name that is neither, or a context that cannot be asked. Fills ask->model. */
bool prompt_model(struct server *server, const char *name, struct ask *ask, struct entry **entry, struct fault *fault);

/* Adds the conversation as a prompt. entry: the context that was asked for, or NULL: whichever it begins with. Takes
 * the reference. Messages change. */
bool prompt_talk(struct server *server, struct ask *ask, struct talk *talk, struct entry *entry, struct fault *fault);

/* The same for a text, and for tokens, which it takes; both go on behind an entry's tokens. */
bool prompt_text(struct server *server, struct ask *ask, const char *text, size_t n_bytes, struct entry *entry,
                 struct fault *fault);
bool prompt_tokens(struct server *server, struct ask *ask, int32_t *tokens, size_t n_tokens, struct entry *entry,
                   struct fault *fault);

#endif
