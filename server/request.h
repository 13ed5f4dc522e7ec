/* A request at work: its answers, and where they go. */
#ifndef SQZ_SERVER_REQUEST_H
#define SQZ_SERVER_REQUEST_H

#include "ask.h"
#include "blanks.h"
#include "passages.h"
#include "stream.h"

enum choice_state { CHOICE_READING, CHOICE_ANSWERING, CHOICE_DONE };
enum finish { FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_TOOLS };

/* A token of an answer with its probability, for those who want to see it. */
struct said {
    struct sqz_choice choice;
    size_t text_at; /* where its bytes end in the answer */
};

struct request;

struct choice {
    struct request *request;
    unsigned index;
    enum choice_state state;
    enum finish finish;
    struct sqz_session *session;
    struct sqz_sampling *sampling;
    struct blank *blank; /* without a prepared context */
    size_t n_read;       /* of the prompt's tokens */
    int32_t next;        /* to run */
    size_t n_tokens;     /* of the answer */
    struct spoken spoken;
    size_t n_sent; /* bytes of the spoken text that went out */
    struct said *said;
    size_t n_said, n_said_sent;
    double share, missed;       /* of the context, when it is done */
    enum sqz_exact exact;       /* to what rows the session is */
    uint64_t drafted, accepted; /* tokens, then too */
    struct passage *passages;   /* malloc'ed, where it attended to; NULL: not asked for, or not known */
    size_t n_passages;
    bool called;    /* tools, which the writer found in the text */
    size_t n_plain; /* bytes of the text before them */
    bool opened;    /* the writer began its block */
};

/* How an API's answers are written: into the stream, piece by piece of one that goes out as events, or whole. */
struct writer {
    void (*begin)(struct request *request);
    void (*piece)(struct request *request, struct choice *choice, const char *text, size_t n);
    void (*choice_end)(struct request *request, struct choice *choice);
    void (*end)(struct request *request);
    void (*fail)(struct request *request, const struct fault *fault);
};

struct request {
    struct ask ask;
    struct stream *stream;
    const struct writer *writer;
    const struct sqz_model *model;
    struct choice *choices; /* [n_choices] */
    unsigned n_choices, n_left;
    unsigned user;
    double arrived, began, deadline;
    double first_token; /* when it came; 0: not yet */
    bool admitted, failed;
    unsigned sequence; /* of events */
    struct request *next;
};

struct usage {
    size_t prompt, cached, completion;
    double share, missed;
    uint64_t drafted, accepted; /* tokens; 0 but of exact answers */
    bool exact;
    const char *exact_to;           /* "f16" or "int8"; NULL: to neither, all of the context's rounded rows were read */
    bool squeezed;                  /* some of it was answered on a context */
    bool read_map;                  /* wanted */
    const struct passage *passages; /* of the first such answer */
    size_t n_passages;
};
struct usage request_usage(const struct request *request);

#endif
