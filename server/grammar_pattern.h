/* Regular expressions of JSON schemas as expressions of llama.cpp's grammars. */
#ifndef SQZ_SERVER_GRAMMAR_PATTERN_H
#define SQZ_SERVER_GRAMMAR_PATTERN_H

#include <stdbool.h>

#include "bytes.h"

/* Appends the expression of what stands between the quotes of a JSON string that the pattern is found in. It may refer
 * to a rule `char`, any character of such a string. Of ECMAScript's syntax there are alternatives, groups, classes,
 * quantifiers, escapes, and ^ and $ at the ends. Of what it allows, what has least to most characters (most: -1 for any
 * number): where one part alone may have several lengths, that part is counted. False, and what is wrong: it is no
 * pattern, or more than these. */
bool grammar_pattern(struct bytes *out, const char *pattern, long least, long most, const char **problem);

#endif
