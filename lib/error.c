/* Status names and error texts. */
#include "error.h"
#include "plain_text.h"

#include <stdarg.h>
#include <stdio.h>

#define STRINGIFY2(x) #x
#define STRINGIFY(x)  STRINGIFY2(x)

const char *sqz_version(void)
{
    return STRINGIFY(SQZ_VERSION_MAJOR) "." STRINGIFY(SQZ_VERSION_MINOR) "." STRINGIFY(SQZ_VERSION_PATCH);
}

const char *sqz_status_name(enum sqz_status status)
{
    switch (status) {
    case SQZ_OK: return "SQZ_OK";
    case SQZ_ERROR_ARGUMENT: return "SQZ_ERROR_ARGUMENT";
    case SQZ_ERROR_MEMORY: return "SQZ_ERROR_MEMORY";
    case SQZ_ERROR_IO: return "SQZ_ERROR_IO";
    case SQZ_ERROR_FORMAT: return "SQZ_ERROR_FORMAT";
    case SQZ_ERROR_UNSUPPORTED: return "SQZ_ERROR_UNSUPPORTED";
    case SQZ_ERROR_MISMATCH: return "SQZ_ERROR_MISMATCH";
    case SQZ_ERROR_LENGTH: return "SQZ_ERROR_LENGTH";
    case SQZ_ERROR_CANCELLED: return "SQZ_ERROR_CANCELLED";
    case SQZ_ERROR_TEXT: return "SQZ_ERROR_TEXT";
    case SQZ_ERROR_INTERNAL: return "SQZ_ERROR_INTERNAL";
    }
    return "SQZ_STATUS_UNKNOWN";
}

enum sqz_status sqz_error_set(struct sqz_error *error, enum sqz_status status, const char *format, ...)
{
    if (error) {
        va_list arguments;
        error->status = status;
        va_start(arguments, format);
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
        sqz_plain_text(error->message); /* of names and parsers' words, and cut off where it was too long */
    }
    return status;
}

enum sqz_status sqz_error_clear(struct sqz_error *error)
{
    if (error) {
        error->status = SQZ_OK;
        error->message[0] = '\0';
    }
    return SQZ_OK;
}
