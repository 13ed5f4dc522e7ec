/* From the card to host memory, the way of card_upload.c back; card.h. */
#include "card.h"

/* Piece i goes by buffer i % SQZ_CARD_BUFFERS: while one is emptied, the others are on their way. */
static size_t piece_bytes(size_t i, size_t bytes)
{
    const size_t left = bytes - i * SQZ_CARD_BUFFER_BYTES;
    return left < SQZ_CARD_BUFFER_BYTES ? left : SQZ_CARD_BUFFER_BYTES;
}

bool sqz_card_download(struct sqz_card *cuda, void *host, const void *device, size_t bytes)
{
    const size_t n = (bytes + SQZ_CARD_BUFFER_BYTES - 1) / SQZ_CARD_BUFFER_BYTES;
    bool ok = true;
    for (size_t i = 0; i < n + SQZ_CARD_BUFFERS && ok; i++) {
        struct sqz_card_buffer *b = &cuda->uploads[i % SQZ_CARD_BUFFERS];
        const size_t done = i - SQZ_CARD_BUFFERS, at = i * SQZ_CARD_BUFFER_BYTES;
        ok = sqz_card_ready_buffer(cuda, b);
        if (ok && i >= SQZ_CARD_BUFFERS && done < n)
            sqz_card_fill((char *)host + done * SQZ_CARD_BUFFER_BYTES, b->memory, piece_bytes(done, bytes),
                          cuda->n_threads);
        if (ok && i < n) ok = cuda->calls->get(b->memory, (const char *)device + at, piece_bytes(i, bytes), b->stream);
    }
    return ok;
}
