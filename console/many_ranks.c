/* The program under mpirun; many_ranks.h. */
#define _DEFAULT_SOURCE /* on_exit */
#include "many_ranks.h"

#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "options.h"

/* How many processes mpirun has started this as: 1 by itself. */
static int world_size(void)
{
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *text = getenv(names[i]);
        if (text && atoi(text) > 1) return atoi(text);
    }
    return 1;
}

/* With what mpirun takes to end the others, an error comes within 10 s. */
static const double start_seconds = 8, least_start_seconds = 1, most_start_seconds = 3600;

double ranks_start_seconds(void)
{
    const char *text = getenv(RANKS_START_VARIABLE);
    double seconds = start_seconds;
    if (!text || !*text) return seconds;
    if (!parse_real_text(text, strlen(text), &seconds) ||
        !(seconds >= least_start_seconds && seconds <= most_start_seconds))
        die(RANKS_START_VARIABLE "='%s': allowed are %g to %g seconds", text, least_start_seconds, most_start_seconds);
    return seconds;
}

#ifdef SQUEEZE_MPI
#include "context_file.h"
#include "ranks_comm.h"
#include "ranks_exchange.h"

/* Commands that prepare contexts or attend to them. */
static const char *const commands[] = {"prepare", "ask", "chat", "eval", "compare", "bench", "serve", "analyze"};

/* However rank 0 ends, the others do, too. */
static void end_all(int code, void *data)
{
    (void)data;
    if (ranks_prepare_is_over() && ranks_lead_end()) ranks_comm_end();
    else ranks_abort(code ? code : 1);
}

void ranks_begin(char **argv)
{
    const char *command = argv[1];
    bool known = false;
    if (world_size() == 1) return;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) known |= strcmp(commands[i], command) == 0;
    if (!known)
        die("'%s' is one process; of several under mpirun are: prepare, ask, chat, eval, compare, bench, serve, "
            "analyze",
            command);
    ranks_comm_begin(ranks_start_seconds());
    if (ranks.n < 2) {
        ranks_comm_end();
        return;
    }
    sqz_shards_hold((uint32_t)ranks.n, (uint32_t)ranks.rank);
    if (ranks.rank > 0) {
        ranks_work(argv);
        ranks_comm_end();
        exit(0);
    }
    on_exit(end_all, NULL);
    ranks_lead_begin(argv);
}

unsigned ranks_count(void)
{
    return (unsigned)ranks.n;
}

const char *ranks_trouble(void)
{
    return ranks_lost() >= 0 ? ranks_lost_text() : NULL;
}

bool ranks_built(void)
{
    return true;
}

json_t *ranks_json(void)
{
    double partial = 0;
    if (ranks.n < 2) return NULL;
    const double bytes = ranks_lead_bytes(&partial);
    json_t *prepared = bytes > 0 ? NULL : ranks_prepare_json();
    if (prepared) return prepared;
    json_t *root = json_object();
    json_object_set_new(root, "n", json_integer(ranks.n));
    json_object_set_new(root, "bytes_a_token_layer", json_real(bytes));
    json_object_set_new(root, "partial_output_bytes", json_real(partial));
    return root;
}

#else

bool ranks_try(struct ranks_trial *trial, uint32_t n_head, uint32_t head_dim, size_t layer_weights, int n_threads)
{
    (void)n_head, (void)head_dim, (void)layer_weights, (void)n_threads;
    *trial = (struct ranks_trial){.n = 1};
    return false;
}

void ranks_begin(char **argv)
{
    if (world_size() > 1)
        die("this squeeze was built without MPI (SQUEEZE_MPI): '%s' cannot run as %d processes", argv[1], world_size());
}

unsigned ranks_count(void)
{
    return 1;
}

const char *ranks_trouble(void)
{
    return NULL;
}

bool ranks_built(void)
{
    return false;
}

json_t *ranks_json(void)
{
    return NULL;
}

void ranks_prepare_begin(const struct sqz_prepare_options *options, const char *model, const char *fingerprint,
                         size_t n_threads, double rope_scale, const char *output, const char *text, size_t n_bytes)
{
    (void)options, (void)model, (void)fingerprint, (void)n_threads, (void)rope_scale, (void)output, (void)text;
    (void)n_bytes;
}

void ranks_prepare_end(enum sqz_status status, const struct sqz_error *error, size_t n_tokens,
                       const struct sqz_model_info *model)
{
    (void)status, (void)error, (void)n_tokens, (void)model;
}

#endif

void ranks_take_shards(size_t *n_shards, size_t *gpu_layers)
{
    const unsigned n = ranks_count();
    if (n == 1) return;
    if (*gpu_layers != SIZE_MAX && *gpu_layers) usage_error("--gpu-layers: shards are written by a model on the CPU");
    if (*n_shards % n)
        usage_error("--shards %zu: allowed under mpirun -n %u are its multiples; without it %u", *n_shards, n, n);
    if (!*n_shards) *n_shards = n;
    *gpu_layers = 0;
}
