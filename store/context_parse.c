/*
 * The bounded walk over a GGUF's metadata. ggml's own reader is used for the
 * values, but it logs what it refuses, copies arrays of strings at several
 * times their size in the file, and lets C++ exceptions out when memory ends;
 * so nothing reaches it that was not walked here first: every length against
 * the bytes that remain, every type, no key or tensor twice, tensors one after
 * another without gap or overlap.
 */
#include "format.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

struct cursor {
    const uint8_t *data;
    uint64_t size, at; /* at <= size */
    const struct sqz_report *report;
};

struct text {
    const char *bytes;
    uint64_t n_bytes;
};

/* What the walk must have come across by the end of the keys. */
struct found {
    bool architecture, version, alignment;
    uint64_t checksum_at;
    uint64_t n_array_strings;
};

static enum sqz_status take(struct cursor *cursor, uint64_t n_bytes, const uint8_t **bytes, const char *what)
{
    if (n_bytes > cursor->size - cursor->at)
        return sqz_report_fail(cursor->report,
                               "cut off or damaged: %s at byte %" PRIu64 " needs %" PRIu64
                               " bytes, but the file has %" PRIu64,
                               what, cursor->at, n_bytes, cursor->size);
    if (n_bytes > SQZ_FORMAT_MAX_METADATA_BYTES - cursor->at)
        return sqz_report_fail(cursor->report,
                               "%s at byte %" PRIu64 " needs %" PRIu64 " bytes; allowed: at most %d bytes of metadata",
                               what, cursor->at, n_bytes, SQZ_FORMAT_MAX_METADATA_BYTES);
    *bytes = cursor->data + cursor->at;
    cursor->at += n_bytes;
    return SQZ_OK;
}

static enum sqz_status take_number(struct cursor *cursor, void *number, size_t n_bytes, const char *what)
{
    const uint8_t *bytes = NULL;
    const enum sqz_status status = take(cursor, n_bytes, &bytes, what);
    if (bytes) memcpy(number, bytes, n_bytes);
    return status;
}

static enum sqz_status take_text(struct cursor *cursor, struct text *text, const char *what)
{
    const uint8_t *bytes = NULL;
    enum sqz_status status;
    if ((status = take_number(cursor, &text->n_bytes, 8, what)) || (status = take(cursor, text->n_bytes, &bytes, what)))
        return status;
    text->bytes = (const char *)bytes;
    return SQZ_OK;
}

static bool text_is(const struct text *text, const char *other)
{
    return text->n_bytes == strlen(other) && !memcmp(text->bytes, other, text->n_bytes);
}

/* Copies for a message: printable ASCII only, so that a file cannot write to a terminal. */
static const char *printable(char buffer[65], const struct text *text)
{
    size_t n = text->n_bytes < 64 ? (size_t)text->n_bytes : 64;
    for (size_t i = 0; i < n; i++) buffer[i] = text->bytes[i] >= 0x20 && text->bytes[i] < 0x7f ? text->bytes[i] : '?';
    buffer[n] = '\0';
    return buffer;
}

/* Of a GGUF scalar; 0 for strings, arrays and unknown types. */
static unsigned scalar_bytes(int32_t type)
{
    switch (type) {
    case GGUF_TYPE_UINT8:
    case GGUF_TYPE_INT8:
    case GGUF_TYPE_BOOL: return 1;
    case GGUF_TYPE_UINT16:
    case GGUF_TYPE_INT16: return 2;
    case GGUF_TYPE_UINT32:
    case GGUF_TYPE_INT32:
    case GGUF_TYPE_FLOAT32: return 4;
    case GGUF_TYPE_UINT64:
    case GGUF_TYPE_INT64:
    case GGUF_TYPE_FLOAT64: return 8;
    default: return 0;
    }
}

/* ---- Header ---------------------------------------------------------------- */

static enum sqz_status walk_header(struct cursor *cursor, uint64_t *n_tensors, uint64_t *n_keys)
{
    const uint8_t *magic;
    uint32_t version = 0;
    enum sqz_status status;
    if (cursor->size < 4 || memcmp(cursor->data, GGUF_MAGIC, 4)) {
        char found[65];
        const struct text start = {(const char *)cursor->data, cursor->size < 4 ? cursor->size : 4};
        return sqz_report_as(cursor->report, cursor->report->status,
                             "not a GGUF file: it begins with '%s', a context file with 'GGUF'; "
                             "give a file that 'prepare' wrote",
                             printable(found, &start));
    }
    if ((status = take(cursor, 4, &magic, "the magic")) ||
        (status = take_number(cursor, &version, 4, "the GGUF version")) ||
        (status = take_number(cursor, n_tensors, 8, "the number of tensors")) ||
        (status = take_number(cursor, n_keys, 8, "the number of keys")))
        return status;
    if (version != GGUF_VERSION)
        return sqz_report_fail(cursor->report, "GGUF version %" PRIu32 "%s; allowed: %d", version,
                               version && !(version & 0xffff) ? ", perhaps big endian" : "", GGUF_VERSION);
    return SQZ_OK;
}

/* ---- Keys ------------------------------------------------------------------- */

/* What the file says it is decides before anything else in it is judged. */
static enum sqz_status check_identity(const struct cursor *cursor, const struct text *key, int32_t type,
                                      const struct text *value, uint64_t value_at, struct found *found)
{
    char name[65];
    if (text_is(key, "general.architecture")) {
        if (type != GGUF_TYPE_STRING) return sqz_report_fail(cursor->report, "general.architecture is not a string");
        if (!text_is(value, SQZ_FORMAT_ARCHITECTURE))
            return sqz_report_as(cursor->report, cursor->report->status,
                                 "this is a model (%s), not a prepared context; give it with -m",
                                 printable(name, value));
        found->architecture = true;
    }
    if (text_is(key, SQZ_KEY_VERSION)) {
        uint32_t version = 0;
        if (type != GGUF_TYPE_UINT32) return sqz_report_fail(cursor->report, SQZ_KEY_VERSION " is not a u32");
        memcpy(&version, cursor->data + value_at, sizeof version);
        if (version < SQZ_FORMAT_OLDEST || version > SQZ_FORMAT_NEWEST)
            return sqz_report_as(cursor->report, version ? SQZ_ERROR_UNSUPPORTED : cursor->report->status,
                                 "context file version %" PRIu32 "; this build reads versions %d to %d; "
                                 "use a build that knows it, or prepare the document again",
                                 version, SQZ_FORMAT_OLDEST, SQZ_FORMAT_NEWEST);
        found->version = true;
    }
    /* GGUF's own reader takes any power of two, and 32 without the key; ours needs the one that rows are aligned to. */
    if (text_is(key, GGUF_KEY_GENERAL_ALIGNMENT)) {
        uint32_t alignment = 0;
        if (type == GGUF_TYPE_UINT32) memcpy(&alignment, cursor->data + value_at, sizeof alignment);
        if (alignment != SQZ_FORMAT_ALIGNMENT)
            return sqz_report_fail(cursor->report, GGUF_KEY_GENERAL_ALIGNMENT " is %" PRIu32 "; allowed: %d", alignment,
                                   SQZ_FORMAT_ALIGNMENT);
        found->alignment = true;
    }
    if (text_is(key, SQZ_KEY_CHECKSUM_METADATA) && type == GGUF_TYPE_UINT64) found->checksum_at = value_at;
    return SQZ_OK;
}

static enum sqz_status walk_array(struct cursor *cursor, const struct text *key, struct found *found)
{
    int32_t type = 0;
    uint64_t n = 0;
    const uint8_t *values;
    char name[65];
    enum sqz_status status;
    if ((status = take_number(cursor, &type, 4, "an array's type")) ||
        (status = take_number(cursor, &n, 8, "an array's length")))
        return status;
    if (type == GGUF_TYPE_STRING) {
        if (n > SQZ_FORMAT_MAX_ARRAY_STRINGS - found->n_array_strings)
            return sqz_report_fail(cursor->report, "key %s: an array of %" PRIu64 " strings; allowed: %d in the file",
                                   printable(name, key), n, SQZ_FORMAT_MAX_ARRAY_STRINGS);
        found->n_array_strings += n;
        struct text string = {NULL, 0};
        while (n-- > 0)
            if ((status = take_text(cursor, &string, "a string of an array"))) return status;
        return SQZ_OK;
    }
    const unsigned bytes = scalar_bytes(type);
    if (!bytes)
        return sqz_report_fail(cursor->report, "key %s: an array of unknown type %" PRId32, printable(name, key), type);
    if (n > UINT64_MAX / bytes) n = UINT64_MAX / bytes; /* far more than any file has: take() says so */
    return take(cursor, n * bytes, &values, "an array");
}

static enum sqz_status walk_key(struct cursor *cursor, struct text *key, struct found *found)
{
    int32_t type = 0;
    enum sqz_status status;
    char name[65];
    if ((status = take_text(cursor, key, "a key"))) return status;
    if (!key->n_bytes || memchr(key->bytes, '\0', key->n_bytes))
        return sqz_report_fail(cursor->report, "a key before byte %" PRIu64 " is empty or has a zero byte", cursor->at);
    if ((status = take_number(cursor, &type, 4, "a key's type"))) return status;

    const uint64_t value_at = cursor->at;
    struct text value = {NULL, 0};
    const uint8_t *scalar;
    if (type == GGUF_TYPE_ARRAY) status = walk_array(cursor, key, found);
    else if (type == GGUF_TYPE_STRING) status = take_text(cursor, &value, "a string");
    else if (scalar_bytes(type)) status = take(cursor, scalar_bytes(type), &scalar, "a value");
    else status = sqz_report_fail(cursor->report, "key %s has the unknown type %" PRId32, printable(name, key), type);
    if (status) return status;

    return check_identity(cursor, key, type, &value, value_at, found);
}

static int compare_text(const char *a, uint64_t a_bytes, const char *b, uint64_t b_bytes)
{
    const int order = memcmp(a, b, a_bytes < b_bytes ? a_bytes : b_bytes);
    return order ? order : (a_bytes > b_bytes) - (a_bytes < b_bytes);
}

static int compare_keys(const void *a, const void *b)
{
    const struct text *x = a, *y = b;
    return compare_text(x->bytes, x->n_bytes, y->bytes, y->n_bytes);
}

static enum sqz_status walk_keys(struct cursor *cursor, uint64_t n_keys, uint64_t *checksum_at)
{
    struct found found = {.checksum_at = 0};
    enum sqz_status status = SQZ_OK;
    char name[65];
    /* Allowed before the first key is seen, so that a model is recognised however much it holds. */
    const uint64_t n_kept = n_keys < SQZ_FORMAT_MAX_KEYS ? n_keys : SQZ_FORMAT_MAX_KEYS;
    struct text *keys = malloc((n_kept + 1) * sizeof *keys);
    if (!keys) return sqz_report_as(cursor->report, SQZ_ERROR_MEMORY, "no memory for %" PRIu64 " keys", n_kept);
    for (uint64_t i = 0; i < n_kept && !status; i++) status = walk_key(cursor, &keys[i], &found);
    if (!status && n_keys > n_kept)
        status = sqz_report_fail(cursor->report, "%" PRIu64 " keys; allowed: at most %d", n_keys, SQZ_FORMAT_MAX_KEYS);
    if (!status) {
        qsort(keys, n_kept, sizeof *keys, compare_keys);
        for (uint64_t i = 1; i < n_kept && !status; i++)
            if (!compare_keys(&keys[i - 1], &keys[i]))
                status = sqz_report_fail(cursor->report, "key %s stands there twice", printable(name, &keys[i]));
    }
    free(keys);
    if (!status && (!found.architecture || !found.version || !found.alignment))
        status = sqz_report_fail(cursor->report, "key %s is missing",
                                 !found.architecture ? "general.architecture"
                                 : !found.version    ? SQZ_KEY_VERSION
                                                     : GGUF_KEY_GENERAL_ALIGNMENT);
    *checksum_at = found.checksum_at;
    return status;
}

/* ---- Tensors ------------------------------------------------------------------- */

/* Sets entry->bytes from type and dimensions. */
static enum sqz_status measure(const struct cursor *cursor, struct sqz_tensor_entry *entry, const char *name)
{
    const bool known = entry->type >= 0 && entry->type < GGML_TYPE_COUNT;
    const int64_t block = known ? ggml_blck_size((enum ggml_type)entry->type) : 0;
    if (block < 1) /* also types that ggml has given up */
        return sqz_report_fail(cursor->report, "tensor %s has the unknown type %" PRId32, name, entry->type);
    if (entry->ne[0] % block)
        return sqz_report_fail(cursor->report,
                               "tensor %s: rows of %" PRId64 " elements; allowed: a multiple of %" PRId64, name,
                               entry->ne[0], block);
    const uint64_t block_bytes = ggml_type_size((enum ggml_type)entry->type);
    uint64_t n = block_bytes * (uint64_t)(entry->ne[0] / block);
    bool fits = (uint64_t)(entry->ne[0] / block) <= INT64_MAX / 2 / block_bytes;
    for (int i = 1; i < GGML_MAX_DIMS && fits; i++) {
        fits = n <= INT64_MAX / 2 / (uint64_t)entry->ne[i];
        n *= fits ? (uint64_t)entry->ne[i] : 1;
    }
    if (!fits)
        return sqz_report_fail(cursor->report,
                               "tensor %s: %" PRId64 " x %" PRId64 " x %" PRId64 " x %" PRId64
                               " elements are more than a file can hold",
                               name, entry->ne[0], entry->ne[1], entry->ne[2], entry->ne[3]);
    entry->bytes = n;
    return SQZ_OK;
}

static enum sqz_status walk_tensor(struct cursor *cursor, struct sqz_tensor_entry *entry)
{
    struct text text = {NULL, 0};
    uint32_t n_dims = 0;
    char name[65];
    enum sqz_status status;
    if ((status = take_text(cursor, &text, "a tensor's name"))) return status;
    if (!text.n_bytes || text.n_bytes >= GGML_MAX_NAME || memchr(text.bytes, '\0', text.n_bytes))
        return sqz_report_fail(cursor->report, "a tensor's name has %" PRIu64 " bytes or a zero byte; allowed: 1 to %d",
                               text.n_bytes, GGML_MAX_NAME - 1);
    printable(name, &text);
    entry->name = text.bytes;
    entry->name_bytes = text.n_bytes;
    if ((status = take_number(cursor, &n_dims, 4, "a tensor's number of dimensions"))) return status;
    if (n_dims < 1 || n_dims > GGML_MAX_DIMS)
        return sqz_report_fail(cursor->report, "tensor %s: %" PRIu32 " dimensions; allowed: 1 to %d", name, n_dims,
                               GGML_MAX_DIMS);
    for (uint32_t i = 0; i < GGML_MAX_DIMS; i++) {
        entry->ne[i] = 1;
        if (i < n_dims && (status = take_number(cursor, &entry->ne[i], 8, "a tensor's dimension"))) return status;
        if (entry->ne[i] < 1)
            return sqz_report_fail(cursor->report,
                                   "tensor %s: dimension %" PRIu32 " is %" PRId64 "; allowed: at least 1", name, i,
                                   entry->ne[i]);
    }
    if ((status = take_number(cursor, &entry->type, 4, "a tensor's type")) ||
        (status = take_number(cursor, &entry->offset, 8, "a tensor's offset")))
        return status;
    return measure(cursor, entry, name);
}

static int compare_tensors(const void *a, const void *b)
{
    const struct sqz_tensor_entry *x = a, *y = b;
    return compare_text(x->name, x->name_bytes, y->name, y->name_bytes);
}

/* Offsets must be the padded sum of the sizes before: then no two tensors overlap and no byte is left out. */
static enum sqz_status place_tensors(const struct cursor *cursor, struct sqz_walk *walk)
{
    char name[65];
    uint64_t end = 0;
    walk->data_offset = sqz_format_pad(cursor->at);
    for (size_t i = 0; i < walk->n_tensors; i++) {
        struct sqz_tensor_entry *entry = &walk->tensors[i];
        const struct text text = {entry->name, entry->name_bytes};
        if (entry->offset != end)
            return sqz_report_fail(
                cursor->report, "tensor %s is at offset %" PRIu64 "; allowed: %" PRIu64 ", right after the one before",
                printable(name, &text), entry->offset, end);
        entry->offset += walk->data_offset;
        end += sqz_format_pad(entry->bytes);
        if (end > INT64_MAX / 2)
            return sqz_report_fail(cursor->report, "tensor %s ends past what a file can hold", printable(name, &text));
    }
    walk->file_bytes = walk->data_offset + end;
    return SQZ_OK;
}

static enum sqz_status walk_tensors(struct cursor *cursor, struct sqz_walk *walk, uint64_t n_tensors)
{
    enum sqz_status status;
    char name[65];
    if (n_tensors < 1 || n_tensors > SQZ_FORMAT_MAX_TENSORS)
        return sqz_report_fail(cursor->report, "%" PRIu64 " tensors; allowed: 1 to %d", n_tensors,
                               SQZ_FORMAT_MAX_TENSORS);
    walk->n_tensors = (size_t)n_tensors;
    walk->tensors = calloc(walk->n_tensors, sizeof *walk->tensors);
    if (!walk->tensors)
        return sqz_report_as(cursor->report, SQZ_ERROR_MEMORY, "no memory for %" PRIu64 " tensor entries", n_tensors);
    for (size_t i = 0; i < walk->n_tensors; i++) {
        walk->tensors[i].id = (uint32_t)i;
        if ((status = walk_tensor(cursor, &walk->tensors[i]))) return status;
    }
    if ((status = place_tensors(cursor, walk))) return status;
    qsort(walk->tensors, walk->n_tensors, sizeof *walk->tensors, compare_tensors);
    for (size_t i = 1; i < walk->n_tensors; i++)
        if (!compare_tensors(&walk->tensors[i - 1], &walk->tensors[i])) {
            const struct text text = {walk->tensors[i].name, walk->tensors[i].name_bytes};
            return sqz_report_fail(cursor->report, "tensor %s stands there twice", printable(name, &text));
        }
    return SQZ_OK;
}

enum sqz_status sqz_walk_metadata(struct sqz_walk *walk, const uint8_t *data, size_t size,
                                  const struct sqz_report *report)
{
    struct cursor cursor = {data, size, 0, report};
    uint64_t n_tensors = 0, n_keys = 0;
    enum sqz_status status;
    memset(walk, 0, sizeof *walk);
    if ((status = walk_header(&cursor, &n_tensors, &n_keys)) ||
        (status = walk_keys(&cursor, n_keys, &walk->checksum_at)))
        return status;
    return walk_tensors(&cursor, walk, n_tensors);
}

struct sqz_tensor_entry *sqz_walk_find(const struct sqz_walk *walk, const char *name)
{
    struct sqz_tensor_entry key = {.name = name, .name_bytes = strlen(name)};
    return bsearch(&key, walk->tensors, walk->n_tensors, sizeof *walk->tensors, compare_tensors);
}
