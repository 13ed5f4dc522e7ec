/* The OpenAPI document, server/openapi.json, as the build makes a source of it. */
#ifndef SQZ_SERVER_OPENAPI_H
#define SQZ_SERVER_OPENAPI_H

#include <stddef.h>

extern const unsigned char openapi_json[];
extern const size_t openapi_json_bytes;

#endif
