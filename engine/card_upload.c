/*
 * From memory that files are mapped into to the card; card.h.
 *
 * The card's copy engine reads pinned memory at the full speed of the bus and any
 * other at a third of it. So all threads bring the pages into pinned buffers, in
 * turn, and while one is filled the others are on their way. Arrays that lie behind
 * each other on the card go together. What is another way on the card (padded rows,
 * INT8 keys as F16) is made so while a buffer is filled.
 */
#include "card.h"

#include <stdint.h>
#include <string.h>

static const size_t piece_bytes = (size_t)512 << 10; /* that a thread brings at a time */

void sqz_card_fill(char *to, const char *from, size_t bytes, int n_threads)
{
    const size_t n_pieces = (bytes + piece_bytes - 1) / piece_bytes;
#pragma omp parallel for num_threads(n_threads) schedule(dynamic) if (n_pieces > 1)
    for (size_t i = 0; i < n_pieces; i++) {
        const size_t at = i * piece_bytes, left = bytes - at;
        memcpy(to + at, from + at, left < piece_bytes ? left : piece_bytes);
    }
    (void)n_threads;
}

/* Rows [first, first + n) of an array as the card has them. */
static void make_rows(char *to, const struct sqz_card_array *a, size_t first, size_t n)
{
    const char *from = (const char *)a->host + first * a->host_bytes;
    for (size_t i = 0; i < n; i++, from += a->host_bytes, to += a->card_bytes) {
        if (a->rows) {
            const size_t head = (first + i) / a->head_rows, row = (first + i) % a->head_rows;
            const struct sqz_rows of_head = sqz_rows_of_head(a->rows, a->head_rows, a->head_dim, head);
            sqz_rows_to_f16((uint16_t *)to, &of_head, row, 1, a->head_dim);
        } else if (a->factor != 0.0f) {
            for (size_t j = 0; j < a->host_bytes; j += sizeof(float))
                *(float *)(to + j) = a->factor * *(const float *)(from + j);
        } else {
            memcpy(to, from, a->host_bytes);
        }
        memset(to + a->host_bytes, 0, a->card_bytes - a->host_bytes);
    }
}

static void fill_rows(char *to, const struct sqz_card_array *a, size_t first, size_t n, int n_threads)
{
    const size_t each = piece_bytes / a->card_bytes + 1, n_pieces = (n + each - 1) / each;
    if (!a->rows && a->factor == 0.0f && a->host_bytes == a->card_bytes) {
        sqz_card_fill(to, (const char *)a->host + first * a->host_bytes, n * a->host_bytes, n_threads);
        return;
    }
#pragma omp parallel for num_threads(n_threads) schedule(dynamic) if (n_pieces > 1)
    for (size_t i = 0; i < n_pieces; i++) {
        const size_t at = i * each, left = n - at;
        make_rows(to + at * a->card_bytes, a, first + at, left < each ? left : each);
    }
}

static struct sqz_card_buffer *current(struct sqz_card *cuda)
{
    return &cuda->uploads[cuda->n_flushed % SQZ_CARD_BUFFERS];
}

bool sqz_card_send(struct sqz_card *cuda)
{
    struct sqz_card_buffer *b = current(cuda);
    if (b->used == 0) return true;
    const bool ok = cuda->calls->put(b->device, b->memory, b->used, b->stream);
    b->used = 0;
    cuda->n_flushed++;
    return ok;
}

/* Whether a buffer can be used: it is there, and what it held before has left. */
bool sqz_card_ready_buffer(struct sqz_card *cuda, struct sqz_card_buffer *b)
{
    if (!b->stream) b->stream = cuda->calls->create_stream();
    if (!b->memory) b->memory = cuda->calls->allocate_pinned(SQZ_CARD_BUFFER_BYTES);
    return b->stream && b->memory && cuda->calls->wait(b->stream);
}

/* Makes the current buffer ready for what begins at `device`. */
static bool begin_buffer(struct sqz_card *cuda, char *device)
{
    struct sqz_card_buffer *b = current(cuda);
    b->device = device;
    return sqz_card_ready_buffer(cuda, b);
}

/* Where `device` lies in the current buffer, which has what comes shortly before; SIZE_MAX: nowhere. */
static size_t place_in(const struct sqz_card_buffer *b, const char *device)
{
    if (b->used == 0 || device < b->device + b->used) return SIZE_MAX;
    const size_t at = (size_t)(device - b->device);
    return at < b->used + SQZ_CARD_ALIGN && at < SQZ_CARD_BUFFER_BYTES ? at : SIZE_MAX;
}

bool sqz_card_upload(struct sqz_card *cuda, void *device, const struct sqz_card_array *array)
{
    for (size_t done = 0; done < array->n_rows;) {
        char *to = (char *)device + done * array->card_bytes;
        size_t at = place_in(current(cuda), to);
        if (at == SIZE_MAX || SQZ_CARD_BUFFER_BYTES - at < array->card_bytes) {
            if (!sqz_card_send(cuda) || !begin_buffer(cuda, to)) return false;
            at = 0;
        }
        struct sqz_card_buffer *b = current(cuda);
        const size_t left = array->n_rows - done, room = (SQZ_CARD_BUFFER_BYTES - at) / array->card_bytes;
        const size_t n = left < room ? left : room;
        fill_rows((char *)b->memory + at, array, done, n, cuda->n_threads);
        b->used = at + n * array->card_bytes;
        done += n;
    }
    return true;
}

bool sqz_card_finish_uploads(struct sqz_card *cuda)
{
    bool ok = sqz_card_send(cuda);
    for (size_t i = 0; i < SQZ_CARD_BUFFERS; i++)
        if (cuda->uploads[i].stream) ok &= cuda->calls->wait(cuda->uploads[i].stream);
    return ok;
}

void sqz_card_free_uploads(struct sqz_card *cuda)
{
    for (size_t i = 0; i < SQZ_CARD_BUFFERS; i++) {
        if (cuda->uploads[i].stream) cuda->calls->free_stream(cuda->uploads[i].stream);
        if (cuda->uploads[i].memory) cuda->calls->release_pinned(cuda->uploads[i].memory);
    }
}
