/*
 * Is this llama.cpp right on this CPU? ggml's matrix products, each kind of
 * weights in each buffer that its CPU back end offers (plain, repacked, AMX),
 * against plain C in double precision. Run by scripts/setup.sh before a built
 * llama.cpp is used, and by cmake/llama_probe for an installed one.
 *
 *   prove [--sets "INSTRUCTION SETS"]
 *
 * Every pair is tried in a process of its own, so that a crash is an answer
 * like another. Prints a line for each, `ok BUFFER KIND: ...` or `failed
 * BUFFER KIND: ...`; exits with 0 when all are right and with 1 otherwise.
 *
 * Tests of set-up make it fail: SQUEEZE_PROOF_BREAK=SET:HOW breaks it where
 * --sets names SET. HOW: crash, corrupt (one block of weights), nan.
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml.h>

enum {
    MAX_ROWS = 33,     /* of activations: ggml has one path for a row, others from 2, 4, 8 and 32 rows on */
    BLOCK = 32,        /* weights that `corrupt` wipes out: one block of the small kinds */
    MAX_SECONDS = 120, /* for one pair; a hundred times what it takes */
};

/* What a child process tells its parent. */
enum { RIGHT = 0, WRONG = 1, NOT_TAKEN = 2, NO_SUCH_BUFFER = 3 };

/*
 * How far a product may be from the exact one. ggml rounds the activations:
 * to 8 bits, in blocks that share a scale, where the weights are quantised, or
 * to the weights' own 16-bit kind. The errors of a dot product's terms are
 * independent and uniform, so the error's standard deviation is known for each
 * result, and ten of them are not exceeded by chance. A wrong scale, sign or
 * block is an error of hundreds.
 */
struct kind {
    enum ggml_type type;
    size_t block;    /* activations that share a scale of 8 bits; 0: rounded one by one */
    double half_ulp; /* of those rounded one by one, relative */
};
static const struct kind kinds[] = {
    {GGML_TYPE_F16, 0, 0x1p-11}, {GGML_TYPE_BF16, 0, 0x1p-8}, {GGML_TYPE_Q4_0, 32, 0},
    {GGML_TYPE_Q4_1, 32, 0},     {GGML_TYPE_Q4_K, 256, 0},    {GGML_TYPE_Q5_K, 256, 0},
    {GGML_TYPE_Q6_K, 256, 0},    {GGML_TYPE_Q8_0, 32, 0},     {GGML_TYPE_IQ4_NL, 32, 0},
};
static const double allowed_deviations = 10, allowed_mean_square = 4;

/* Of weights. Repacked kinds want outputs by 8, AMX by 32; 576 is no multiple of the large blocks' 256. */
static const struct {
    size_t width, n_outputs;
} shapes[] = {{256, 32}, {576, 96}, {768, 40}, {1536, 32}, {2048, 64}};

static const size_t row_counts[] = {1, 2, 3, 4, 7, 8, 17, 32, MAX_ROWS};

static const char *breakage; /* how to fail on purpose; NULL: not at all */

static void *take(size_t count, size_t size)
{
    void *p = calloc(count, size);
    if (p) return p;
    fprintf(stderr, "prove: no memory for %zu times %zu bytes\n", count, size);
    exit(1);
}

/* ---- Numbers ----------------------------------------------------------------------- */

/* About normal: four uniform numbers of a linear congruential generator, whose high bits are good enough. */
static double normal(uint64_t *state)
{
    double sum = 0;
    for (int i = 0; i < 4; i++) {
        *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        sum += (double)(*state >> 40) / 0x1p24;
    }
    return (sum - 2) * sqrt(3);
}

/* Every block of its own size, so that a scale taken from another block shows; `offset` wants a kind's minima. */
static void fill(float *x, size_t count, double offset, uint64_t *state)
{
    double size = 1;
    for (size_t i = 0; i < count; i++) {
        if (i % BLOCK == 0) size = exp2(0.5 * normal(state));
        x[i] = (float)(size * (normal(state) + offset));
    }
}

/* ---- One product --------------------------------------------------------------------- */

struct product {
    size_t width, n_outputs;
    size_t weight_bytes;
    void *weights;      /* [n_outputs][width], of the kind */
    float *activations; /* [MAX_ROWS][width] */
    double *exact;      /* [MAX_ROWS][n_outputs] */
    double *deviation;  /* of each result, from the rounding of the activations */
};

/* The variance that rounding gives each activation of a row. */
static void rounding_variance(double *variance, const float *x, size_t width, const struct kind *kind)
{
    for (size_t i = 0; i < width; i++) {
        if (!kind->block) {
            const double half_ulp = kind->half_ulp * fabs((double)x[i]);
            variance[i] = half_ulp * half_ulp / 3;
            continue;
        }
        double largest = 0;
        const size_t first = i - i % kind->block;
        for (size_t j = first; j < first + kind->block && j < width; j++) largest = fmax(largest, fabs((double)x[j]));
        variance[i] = (largest / 127) * (largest / 127) / 12;
    }
}

static void multiply_exactly(struct product *p, const struct kind *kind)
{
    float *weights = take(p->n_outputs * p->width, sizeof *weights);
    double *variance = take(p->width, sizeof *variance);
    ggml_get_type_traits(kind->type)->to_float(p->weights, weights, (int64_t)(p->n_outputs * p->width));
    for (size_t r = 0; r < MAX_ROWS; r++) {
        const float *x = p->activations + r * p->width;
        rounding_variance(variance, x, p->width, kind);
        for (size_t o = 0; o < p->n_outputs; o++) {
            const float *w = weights + o * p->width;
            double sum = 0, size = 0, error = 0;
            for (size_t i = 0; i < p->width; i++) {
                sum += (double)w[i] * x[i];
                size += fabs((double)w[i] * x[i]);
                error += (double)w[i] * w[i] * variance[i];
            }
            p->exact[r * p->n_outputs + o] = sum;
            p->deviation[r * p->n_outputs + o] = sqrt(error) + 0x1p-22 * size; /* the sums are in single precision */
        }
    }
    free(variance);
    free(weights);
}

static void product_init(struct product *p, const struct kind *kind, size_t width, size_t n_outputs)
{
    uint64_t state = width * 1000 + n_outputs;
    *p = (struct product){.width = width, .n_outputs = n_outputs};
    float *weights = take(n_outputs * width, sizeof *weights);
    fill(weights, n_outputs * width, 0.5, &state);
    p->weight_bytes = n_outputs * ggml_row_size(kind->type, (int64_t)width);
    p->weights = take(p->weight_bytes, 1);
    ggml_quantize_chunk(kind->type, weights, p->weights, 0, (int64_t)n_outputs, (int64_t)width, NULL);
    free(weights);
    p->activations = take(MAX_ROWS * width, sizeof *p->activations);
    fill(p->activations, MAX_ROWS * width, 0, &state);
    p->exact = take(MAX_ROWS * n_outputs, sizeof *p->exact);
    p->deviation = take(MAX_ROWS * n_outputs, sizeof *p->deviation);
    multiply_exactly(p, kind);
}

static void product_free(struct product *p)
{
    free(p->weights);
    free(p->activations);
    free(p->exact);
    free(p->deviation);
}

/* ---- The back end ----------------------------------------------------------------------- */

struct cpu {
    ggml_backend_dev_t device;
    ggml_backend_t backend;
    ggml_backend_buffer_type_t buffer_type; /* of the weights */
    ggml_backend_set_n_threads_t set_threads;
};

/* Buffer 0 is the plain one, the others are what the device offers for weights. False: there is none of that number. */
static bool cpu_init(struct cpu *cpu, int buffer)
{
    cpu->device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!cpu->device) return false;
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(cpu->device);
    cpu->buffer_type = ggml_backend_dev_buffer_type(cpu->device);
    if (buffer > 0) {
        ggml_backend_dev_get_extra_bufts_t get_extra;
        *(void **)&get_extra = ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts");
        ggml_backend_buffer_type_t *extra = get_extra ? get_extra(cpu->device) : NULL;
        for (int i = 1; extra && *extra && i < buffer; i++) extra++;
        if (!extra || !*extra) return false;
        cpu->buffer_type = *extra;
    }
    *(void **)&cpu->set_threads = ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads");
    cpu->backend = ggml_backend_dev_init(cpu->device, NULL);
    return cpu->backend != NULL;
}

/* A product as ggml is asked for it: the weights in the buffer on trial, the rest in the plain one. */
struct request {
    struct ggml_context *fixed, *context;
    struct ggml_tensor *weights, *rows, *result;
    ggml_backend_buffer_t fixed_buffer, buffer;
};

static void request_init(struct request *r, const struct cpu *cpu, enum ggml_type type, size_t width, size_t n_outputs,
                         size_t n_rows)
{
    const struct ggml_init_params params = {16 * ggml_tensor_overhead() + ggml_graph_overhead(), NULL, true};
    r->fixed = ggml_init(params);
    r->context = ggml_init(params);
    r->weights = ggml_new_tensor_2d(r->fixed, type, (int64_t)width, (int64_t)n_outputs);
    r->rows = ggml_new_tensor_2d(r->context, GGML_TYPE_F32, (int64_t)width, (int64_t)n_rows);
    r->result = ggml_mul_mat(r->context, r->weights, r->rows);
    r->fixed_buffer = ggml_backend_alloc_ctx_tensors_from_buft(r->fixed, cpu->buffer_type);
    r->buffer = ggml_backend_alloc_ctx_tensors_from_buft(r->context, ggml_backend_dev_buffer_type(cpu->device));
    if (!r->fixed_buffer || !r->buffer) exit(WRONG);
}

static void request_free(struct request *r)
{
    ggml_backend_buffer_free(r->buffer);
    ggml_backend_buffer_free(r->fixed_buffer);
    ggml_free(r->context);
    ggml_free(r->fixed);
}

/* Whether the buffer serves products with such weights; llama.cpp asks the same before it puts weights there. */
static bool takes(const struct cpu *cpu, enum ggml_type type, size_t width, size_t n_outputs)
{
    struct request r;
    request_init(&r, cpu, type, width, n_outputs, 1);
    const bool taken = ggml_backend_dev_supports_op(cpu->device, r.result);
    request_free(&r);
    return taken;
}

/* Computes the first n_rows of the product. */
static void multiply(float *out, const struct product *p, const struct kind *kind, const struct cpu *cpu, size_t n_rows)
{
    const size_t out_bytes = n_rows * p->n_outputs * sizeof(float);
    struct request r;
    request_init(&r, cpu, kind->type, p->width, p->n_outputs, n_rows);
    struct ggml_cgraph *graph = ggml_new_graph(r.context);
    ggml_build_forward_expand(graph, r.result);
    ggml_backend_tensor_set(r.weights, p->weights, 0, p->weight_bytes);
    ggml_backend_tensor_set(r.rows, p->activations, 0, n_rows * p->width * sizeof(float));
    ggml_backend_tensor_set(r.result, out, 0, out_bytes); /* so that what is not computed is what was there */
    ggml_backend_graph_compute(cpu->backend, graph);
    ggml_backend_tensor_get(r.result, out, 0, out_bytes);
    request_free(&r);
}

static void log_errors(enum ggml_log_level level, const char *text, void *user_data)
{
    (void)user_data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

/* ---- One pair of buffer and kind, in a process of its own ------------------------------------ */

/* Writes what the parent prints; a line without a newline. */
static FILE *answer;

/* Compares n_rows of results; *largest in deviations. What is no number is never within the bounds. */
static bool compare(const float *got, const struct product *p, size_t n_rows, int n_threads, double *largest)
{
    const size_t count = n_rows * p->n_outputs;
    double squares = 0;
    for (size_t i = 0; i < count; i++) {
        const double error = fabs(got[i] - p->exact[i]) / p->deviation[i];
        squares += error * error;
        *largest = fmax(*largest, error);
        if (error <= allowed_deviations) continue;
        fprintf(answer, "%zu x %zu weights, %zu rows, %d threads: result %zu of row %zu is %g, not %g", p->n_outputs,
                p->width, n_rows, n_threads, i % p->n_outputs, i / p->n_outputs, (double)got[i], p->exact[i]);
        return false;
    }
    if (squares / (double)count <= allowed_mean_square) return true;
    fprintf(answer, "%zu x %zu weights, %zu rows, %d threads: results are %.1f times as far off as rounding explains",
            p->n_outputs, p->width, n_rows, n_threads, sqrt(squares / (double)count));
    return false;
}

static bool try_product(const struct product *p, const struct kind *kind, const struct cpu *cpu, double *largest)
{
    static const int thread_counts[] = {1, 3};
    float *got = take(MAX_ROWS * p->n_outputs, sizeof *got);
    bool right = true;
    for (size_t t = 0; t < sizeof thread_counts / sizeof *thread_counts && right; t++) {
        if (cpu->set_threads) cpu->set_threads(cpu->backend, thread_counts[t]);
        for (size_t r = 0; r < sizeof row_counts / sizeof *row_counts && right; r++) {
            for (size_t i = 0; i < MAX_ROWS * p->n_outputs; i++) got[i] = NAN;
            multiply(got, p, kind, cpu, row_counts[r]);
            if (breakage && strcmp(breakage, "nan") == 0) got[p->n_outputs - 1] = NAN;
            right = compare(got, p, row_counts[r], thread_counts[t], largest);
        }
    }
    free(got);
    return right;
}

static void break_product(struct product *p, const struct kind *kind)
{
    if (strcmp(breakage, "crash") == 0) raise(SIGSEGV);
    if (strcmp(breakage, "corrupt") != 0) return;
    const size_t block = (size_t)ggml_blck_size(kind->type), row = p->weight_bytes / p->n_outputs;
    const size_t bytes = ggml_row_size(kind->type, (int64_t)(block > BLOCK ? block : BLOCK));
    memset((char *)p->weights + p->n_outputs / 2 * row, 0, bytes);
}

static int try_pair(int buffer, const struct kind *kind)
{
    struct cpu cpu;
    ggml_log_set(log_errors, NULL);
    if (!cpu_init(&cpu, buffer)) return NO_SUCH_BUFFER;
    fprintf(answer, "%s %s: ", ggml_backend_buft_name(cpu.buffer_type), ggml_type_name(kind->type));
    fflush(answer); /* a crash says no more */
    int outcome = NOT_TAKEN;
    double largest = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes && outcome != WRONG; s++) {
        struct product p;
        const size_t width = shapes[s].width, n_outputs = shapes[s].n_outputs;
        if (width % (size_t)ggml_blck_size(kind->type) || !takes(&cpu, kind->type, width, n_outputs)) continue;
        product_init(&p, kind, width, n_outputs);
        if (breakage) break_product(&p, kind);
        outcome = try_product(&p, kind, &cpu, &largest) ? RIGHT : WRONG;
        product_free(&p);
    }
    ggml_backend_free(cpu.backend);
    if (outcome == RIGHT) fprintf(answer, "largest error %.1f of %.0f deviations", largest, allowed_deviations);
    return outcome;
}

/* ---- The parent: never enters ggml's back end itself ------------------------------------------ */

static void run_child(int buffer, const struct kind *kind, int out)
{
    const struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    alarm(MAX_SECONDS);
    answer = fdopen(out, "w");
    if (!answer) _exit(WRONG);
    const int outcome = try_pair(buffer, kind);
    fflush(answer);
    _exit(outcome); /* no handlers of a library that may be broken */
}

/* What the child wrote, up to its end; the buffer is always terminated. */
static void read_answer(int in, char *text, size_t size)
{
    size_t n = 0;
    ssize_t got;
    while (n < size - 1 && (got = read(in, text + n, size - 1 - n)) > 0) n += (size_t)got;
    text[n] = '\0';
}

/* Returns the child's outcome after printing what it found; a signal is as wrong as a number. */
static int prove_pair(int buffer, const struct kind *kind)
{
    char text[512];
    int ends[2], status = 0;
    fflush(stdout);
    if (pipe(ends) != 0) {
        perror("prove: pipe");
        exit(1);
    }
    const pid_t child = fork();
    if (child < 0) {
        perror("prove: fork");
        exit(1);
    }
    if (child == 0) {
        close(ends[0]);
        run_child(buffer, kind, ends[1]);
    }
    close(ends[1]);
    read_answer(ends[0], text, sizeof text);
    close(ends[0]);
    if (waitpid(child, &status, 0) != child) exit(1);
    if (WIFSIGNALED(status)) {
        const int number = WTERMSIG(status);
        printf("failed %s%s (signal %d)\n",
               text[0] ? text : "the CPU back end's start: ", number == SIGALRM ? "it does not end" : strsignal(number),
               number);
        return WRONG;
    }
    const int outcome = WEXITSTATUS(status);
    if (outcome == RIGHT) printf("ok %s\n", text);
    if (outcome != RIGHT && outcome != NOT_TAKEN && outcome != NO_SUCH_BUFFER) {
        printf("failed %s\n", text);
        return WRONG;
    }
    return outcome;
}

/* SQUEEZE_PROOF_BREAK=SET:HOW counts where SET is a word of `sets`. */
static void set_breakage(const char *sets)
{
    const char *order = getenv("SQUEEZE_PROOF_BREAK");
    const char *colon = order ? strchr(order, ':') : NULL;
    if (!colon) return;
    const size_t length = (size_t)(colon - order);
    for (const char *word = sets; *word; word += strspn(word, " ")) {
        const size_t n = strcspn(word, " ");
        if (n == length && strncmp(word, order, n) == 0) breakage = colon + 1;
        word += n;
    }
}

int main(int argc, char **argv)
{
    if (argc != 1 && (argc != 3 || strcmp(argv[1], "--sets") != 0)) {
        fprintf(stderr, "usage: prove [--sets \"INSTRUCTION SETS\"]\n");
        return 2;
    }
    if (argc == 3) set_breakage(argv[2]);
    int n_right = 0, n_wrong = 0;
    for (int buffer = 0, last = 0; !last; buffer++) {
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds && !last; k++) {
            const int outcome = prove_pair(buffer, &kinds[k]);
            n_right += outcome == RIGHT;
            n_wrong += outcome == WRONG;
            /* Who crashes before it looks does not say which buffer is the last. */
            last = outcome == NO_SUCH_BUFFER || buffer > 15;
        }
    }
    if (n_right == 0 && n_wrong == 0) printf("failed this llama.cpp has no CPU back end\n");
    return n_right > 0 && n_wrong == 0 ? 0 : 1;
}
