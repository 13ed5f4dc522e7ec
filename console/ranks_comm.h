/*
 * What ranks say to each other, and how they wait. Every wait sleeps, and ends
 * when the other one has died: each rank tells rank 0, and rank 0 each, four
 * times a second that it lives.
 *
 * Of a node: CALL goes from rank 0 to all (in two chains: rank 0 sends to 1 and 2,
 * rank r to r + 2), TOTAL from each to rank 0, WHOLE to all, PART and READ from
 * each to rank 0. Other CALLs go to each rank by rank 0.
 */
#ifndef SQZ_CONSOLE_RANKS_COMM_H
#define SQZ_CONSOLE_RANKS_COMM_H

#include <mpi.h>
#include <stdbool.h>

#include "backend_shards.h"
#include "memory_probe.h"

enum ranks_tag { TAG_CALL = 1, TAG_ANSWER, TAG_TOTAL, TAG_WHOLE, TAG_PART, TAG_READ };
enum ranks_kind { KIND_OPEN, KIND_CLOSE, KIND_NODE, KIND_BYE, KIND_ECHO, KIND_HELLO };
/* Stands for a context in a NODE of which nothing is computed: ranks_lead_try(). Its layer is the bytes of memory that each rank
 * reads instead, in each of both steps. */
#define RANKS_NO_CONTEXT UINT32_MAX

/* Head of a CALL. Of HELLO, the first of all, what rank 0 was started as follows; of OPEN the path; of a NODE its parts, then
 * queries F32 [T][H][D]. */
struct ranks_call {
    uint32_t kind, context;       /* of OPEN and CLOSE */
    uint64_t checksum, of_layers; /* of OPEN: of the index's metadata; sqz_context_kind() */
    uint32_t layer, n_parts, n_tokens, n_head, head_dim;
    uint32_t path_bytes;
};

/* How a HELLO or an OPEN went: what rank and file have to do with it is in the message. */
struct ranks_answer {
    uint32_t status;
    char message[1020];
};

/* In sent_bytes: a file of the context changed while it was open, and the PART is worth nothing. */
#define RANKS_FILE_CHANGED ((uint64_t)1 << 63)
/* Behind a PART, as far as ranks_read_bytes() says. */
struct ranks_read {
    uint64_t sent_bytes; /* since the start, of nodes; and RANKS_FILE_CHANGED */
    struct sqz_attention_stats stats[SQZ_MOST_SEQUENCES];
};
size_t ranks_read_bytes(size_t n_parts);

struct ranks_comm {
    int n, rank, n_here; /* n_here: of this host */
    MPI_Comm work;
};
extern struct ranks_comm ranks;

/* Starts MPI, within so many seconds, the heartbeat, and takes this rank's share of the host's processors. */
void ranks_comm_begin(double start_seconds);
/* Ends both; nobody is lost. */
void ranks_comm_end(void);

/* Ends the job, not well: by MPI, and soon by itself. */
void ranks_abort(int code);

/* Whether all requests are done by now. */
bool ranks_are_done(MPI_Request *requests, int n);
/* Waits until all requests are done; false: a rank is lost, and they may never be. */
bool ranks_wait(MPI_Request *requests, int n);
/* A moment of a wait that began at `since` (now_seconds()): others get the processor soon, and all of it when nothing
 * happens. */
void ranks_rest(double since);
/* Waits for a CALL and says how long it is; false: as above. */
bool ranks_wait_call(int *source, int *bytes);
/* The rank that is lost, or -1. Of several the first. */
int ranks_lost(void);
const char *ranks_lost_text(void);

/* Whom this rank has things of all from, and those that it sends them on to: at most two. */
int ranks_parent(void);
int ranks_children(int child[2]);

/* Program and arguments as ranks must have them in common, in a HELLO: of *bytes bytes, malloc'ed. */
char *ranks_started_as(char **argv, size_t *bytes);

/* The work of all ranks but the first, until it says that there is no more. */
void ranks_work(char **argv);

/* Rank 0's side of struct sqz_elsewhere. Ends the program where another rank was started otherwise. */
void ranks_lead_begin(char **argv);
/* False: in the middle of a node, where nobody can stop in peace. */
bool ranks_lead_end(void);
/* Most bytes that a rank has sent for a token and layer of nodes, and those of a partial output (with its LSE); 0: there was
 * no node yet. */
double ranks_lead_bytes(double *partial);

/* What messages take, for ranks_try(): a node of one token by the messages of any other, in whose steps all read so many
 * bytes; and a message of so many bytes to a rank and back, in seconds. Both end the program when a rank is lost. */
void ranks_lead_try(uint32_t n_head, uint32_t head_dim, struct memory_probe *probe, uint32_t bytes);
double ranks_lead_echo(int rank, size_t bytes);

#endif
