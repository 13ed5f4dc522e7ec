/*
 * From memory that files are mapped into to the card; card.h.
 *
 * The card's copy engine reads pinned memory at the full speed of the bus and any
 * other at a third of it. So all threads bring the pages into pinned buffers, in
 * turn, and while one is filled the others are on their way. Arrays that lie behind
 * each other on the card go together.
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

bool sqz_card_upload(struct sqz_card *cuda, void *device, const void *host, size_t bytes)
{
    for (size_t done = 0; done < bytes;) {
        size_t at = place_in(current(cuda), (char *)device + done);
        if (at == SIZE_MAX) {
            if (!sqz_card_send(cuda) || !begin_buffer(cuda, (char *)device + done)) return false;
            at = 0;
        }
        struct sqz_card_buffer *b = current(cuda);
        const size_t room = SQZ_CARD_BUFFER_BYTES - at, n = bytes - done < room ? bytes - done : room;
        sqz_card_fill((char *)b->memory + at, (const char *)host + done, n, cuda->n_threads);
        b->used = at + n;
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
