/* Who is answered when; scheduler.h describes it. */
#define _POSIX_C_SOURCE 200809L
#include "scheduler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tool_calls.h"
#include "clock.h"
#include "conversation.h"
#include "crew.h"
#include "error.h"
#include "pace.h"
#include "preparing.h"
#include "session.h"

/* A prompt of more tokens is a document: streams wait for its pieces as for those of other documents. */
enum { N_USERS = 1024, LEAST_PIECE = 8, WHOLE_QUESTION = 64, QUESTION_TOKENS = 512 };
enum { LEAST_ON_CARD = 64 }; /* tokens of a piece that take a card hardly longer than one: docs/gpu.md */

/* What a user had so far, in tokens: the next place is for who had least. */
struct user {
    double served;
    unsigned n_active, n_waiting;
};

struct scheduler {
    struct scheduler_options o;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct request *waiting, **last; /* in order of arrival */
    struct request *displaced;       /* by others, and not told yet */
    atomic_size_t n_waiting, n_free; /* places that nobody has */
    struct user users[N_USERS];
    atomic_bool stopping;
    const char *_Atomic trouble; /* why it stops; NULL: it was told to */
    bool poked;
    double stop_at;

    /* Of the thread alone. */
    struct blanks *blanks;
    struct choice **active; /* [n_slots] */
    size_t n_active, first; /* whose turn it is to have the first piece */
    struct sqz_batch_item *items;
    struct choice **lanes; /* whose items they are */
    struct pace pace;
};

/* Why other ranks cannot be asked any more; NULL: they can. */
static const char *trouble_of(const struct scheduler *s)
{
    return s->o.trouble ? s->o.trouble() : NULL;
}

/* ---- Ends ----------------------------------------------------------------------------- */

static void close_choice(struct scheduler *s, struct choice *c)
{
    struct prompt *p = &c->request->ask.prompts[c->index / c->request->ask.n_each];
    if (c->session) {
        struct sqz_session_stats stats;
        sqz_session_get_stats(c->session, &stats);
        c->share = p->context ? sqz_attention_stats_share(&stats.attention) : 0;
        c->missed = p->context && c->request->ask.budget < 1 ? entry_missed(p->context, c->share) : 0;
        c->drafted = stats.speculation.n_drafted;
        c->accepted = stats.speculation.n_accepted;
        if (p->context && c->request->ask.read_map)
            c->passages = passages_of_answer(s->o.model, p->context, c->session, &c->n_passages);
        if (p->context) {
            const struct sqz_attention_stats *a = &stats.attention;
            metrics_add(s->o.metrics, METRIC_KEY_BYTES_READ, a->centroid_bytes + a->key_bytes + a->value_bytes);
            metrics_add(s->o.metrics, METRIC_KEY_BYTES_ALL, a->context_bytes);
        }
    }
    sqz_session_free(c->session);
    sqz_sampling_free(c->sampling);
    blanks_release(c->blank);
    c->session = NULL;
    c->sampling = NULL;
    c->blank = NULL;
    c->state = CHOICE_DONE;
}

static void end_request(struct scheduler *s, struct request *r)
{
    pthread_mutex_lock(&s->lock);
    s->users[r->user].n_active -= r->admitted;
    pthread_mutex_unlock(&s->lock);
    request_free(r, s->o.library);
}

/* All of a request's answers end, told or not. */
static void fail_request(struct scheduler *s, struct request *r, const struct fault *fault)
{
    size_t kept = 0;
    for (size_t i = 0; i < s->n_active; i++)
        if (s->active[i]->request == r) close_choice(s, s->active[i]);
        else s->active[kept++] = s->active[i];
    s->n_active = kept;
    if (fault && !stream_is_gone(r->stream)) {
        metrics_add(s->o.metrics, METRIC_FAILED, 1);
        r->writer->fail(r, fault);
    } else {
        metrics_add(s->o.metrics, METRIC_GONE, 1);
        stream_abort(r->stream);
    }
    end_request(s, r);
}

/* One answer is complete; true when it was the last of its request, which is then no more. */
static bool finish_choice(struct scheduler *s, struct choice *c, enum finish why)
{
    struct request *r = c->request;
    c->finish = why;
    spoken_end(&c->spoken);
    close_choice(s, c);
    r->writer->choice_end(r, c);
    if (--r->n_left) return false;
    r->writer->end(r);
    end_request(s, r);
    return true;
}

/* ---- Places --------------------------------------------------------------------------------- */

static bool comes_before(const struct scheduler *s, const struct request *a, const struct request *b)
{
    const struct user *x = &s->users[a->user], *y = &s->users[b->user];
    if (x->n_active != y->n_active) return x->n_active < y->n_active;
    return x->served < y->served; /* of one user, and of equals, who came first */
}

static void unlink_waiting(struct scheduler *s, struct request **at)
{
    struct request *r = *at;
    *at = r->next;
    if (!r->next) s->last = at;
    r->next = NULL;
    s->n_waiting--;
    s->users[r->user].n_waiting--;
    metrics_set(s->o.metrics, METRIC_WAITING, s->n_waiting);
}

/* The request whose turn it is, taken out of the queue; NULL: none that fits. */
static struct request *next_request(struct scheduler *s)
{
    struct request **best = NULL, *r = NULL;
    pthread_mutex_lock(&s->lock);
    for (struct request **at = &s->waiting; *at; at = &(*at)->next)
        if (!best || comes_before(s, *at, *best)) best = at;
    if (best && (*best)->n_choices <= s->o.n_slots - s->n_active) {
        r = *best;
        unlink_waiting(s, best);
        r->admitted = true;
        s->users[r->user].n_active++;
        s->n_free -= r->n_choices;
    }
    pthread_mutex_unlock(&s->lock);
    return r;
}

/* Of rows that are rounded otherwise than to 4 + 4 bits nothing is exact to anything: all of them are read, as ever. */
static enum sqz_exact exact_to(enum ask_exact asked, const struct sqz_context_info *info)
{
    if (asked == ASK_EXACT_NO) return SQZ_EXACT_NO;
    if (asked == ASK_EXACT_F16) return SQZ_EXACT_F16;
    if (asked == ASK_EXACT_INT8) return SQZ_EXACT_INT8;
    if (!info->rounded_keys) return SQZ_EXACT_F16;
    return info->squeeze.rows == SQZ_ROWS_INT4_4 ? SQZ_EXACT_INT8 : SQZ_EXACT_NO;
}

static enum sqz_status open_choice(struct scheduler *s, struct choice *c, struct sqz_error *error)
{
    const struct ask *ask = &c->request->ask;
    const struct prompt *p = &ask->prompts[c->index / ask->n_each];
    struct sqz_sampling_options sampling = ask->sampling;
    struct sqz_session_options options;
    const struct sqz_context *context = p->context ? p->context->context : NULL;
    enum sqz_status status = SQZ_OK;
    sqz_session_options_default(&options);
    options.budget = ask->budget;
    options.n_user_tokens = p->n_tokens + ask->max_tokens;
    options.attention_map = ask->read_map && context;
    if (context) options.exact = c->exact = exact_to(ask->exact, &p->context->info);
    sampling.seed += c->index; /* several answers to one question are several */
    if (!context) {
        status = blanks_get(s->blanks, p->tokens[0], &c->blank, error);
        if (status != SQZ_OK) return status;
        context = c->blank->context;
        c->n_read = p->n_tokens > 1; /* one alone has no logits yet: it is read once more behind itself */
    }
    status = sqz_session_create(&c->session, s->o.model, context, &options, error);
    if (status == SQZ_OK) status = sqz_sampling_create(&c->sampling, s->o.model, &sampling, error);
    if (status == SQZ_OK) sqz_session_sample_by(c->session, c->sampling);
    return status;
}

static const struct prompt *prompt_of(const struct choice *c)
{
    return &c->request->ask.prompts[c->index / c->request->ask.n_each];
}

/* A context that cannot be read any more is nobody's from then on; this request is told so as later ones are. One whose
 * other ranks are lost is not at fault. */
static void fault_of(struct scheduler *s, const struct choice *c, const struct sqz_error *error, struct fault *fault)
{
    struct entry *e = prompt_of(c)->context;
    const char *trouble = error->status == SQZ_ERROR_IO ? trouble_of(s) : NULL;
    if (trouble) {
        fault_of_end(fault, trouble);
        return;
    }
    if (e && (error->status == SQZ_ERROR_IO || error->status == SQZ_ERROR_FORMAT)) {
        library_spoil(s->o.library, e, error);
        entry_is_ready(e, fault);
    }
    fault_from(fault, error); /* keeps what is set */
}

/* Errors of a session that cannot be: the request's own. */
static void admit(struct scheduler *s, struct request *r)
{
    struct sqz_error error;
    r->began = sqz_clock_seconds();
    for (unsigned i = 0; i < r->n_choices; i++) {
        struct choice *c = &r->choices[i];
        s->active[s->n_active++] = c;
        if (open_choice(s, c, &error) != SQZ_OK) {
            struct fault fault = {0};
            fault_of(s, c, &error, &fault);
            fail_request(s, r, &fault);
            return;
        }
        const struct prompt *p = &r->ask.prompts[i / r->ask.n_each];
        metrics_add(s->o.metrics, METRIC_PROMPT_TOKENS, p->n_tokens);
        metrics_add(s->o.metrics, METRIC_CACHED_TOKENS, p->n_prefix);
    }
    r->writer->begin(r);
}

static void refuse(struct fault *fault, size_t n_waiting)
{
    fault->retry_after = 1 + (int)(n_waiting / 64);
    fault_set(fault, 429, "queue_full", NULL, "%zu requests wait already: try again in %d s", n_waiting,
              fault->retry_after);
}

/* With the lock, the queue being full: one who has more in it than another gives up what came last. */
static bool displace_for(struct scheduler *s, unsigned user)
{
    struct request **most = NULL;
    for (struct request **at = &s->waiting; *at; at = &(*at)->next)
        if (!most || s->users[(*at)->user].n_waiting >= s->users[(*most)->user].n_waiting) most = at;
    if (!most || s->users[(*most)->user].n_waiting <= s->users[user].n_waiting + 1) return false;
    struct request *r = *most;
    unlink_waiting(s, most);
    r->next = s->displaced;
    s->displaced = r;
    return true;
}

static void tell_displaced(struct scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    struct request *r = s->displaced;
    s->displaced = NULL;
    pthread_mutex_unlock(&s->lock);
    while (r) {
        struct request *next = r->next;
        struct fault fault = {0};
        r->next = NULL;
        refuse(&fault, s->n_waiting);
        fail_request(s, r, &fault);
        r = next;
    }
}

/* Who left, and who waited too long. */
static void tidy_waiting(struct scheduler *s, double now)
{
    struct request *dead = NULL;
    pthread_mutex_lock(&s->lock);
    for (struct request **at = &s->waiting; *at;) {
        struct request *r = *at;
        if (!s->stopping && now < r->deadline && !stream_is_gone(r->stream)) {
            at = &r->next;
            continue;
        }
        unlink_waiting(s, at);
        r->next = dead;
        dead = r;
    }
    const bool stopping = s->stopping;
    pthread_mutex_unlock(&s->lock);
    while (dead) {
        struct request *r = dead;
        struct fault fault = {.retry_after = 5};
        dead = r->next;
        if (stopping) fault_of_end(&fault, s->trouble);
        else fault_set(&fault, 503, "timeout", NULL, "no place became free in time");
        fail_request(s, r, &fault);
    }
}

static void tidy_active(struct scheduler *s, double now)
{
    for (size_t i = 0; i < s->n_active;) {
        struct request *r = s->active[i]->request;
        struct fault fault = {0};
        const bool over = s->stopping && now >= s->stop_at, late = now >= r->deadline;
        if (!over && !late && !stream_is_gone(r->stream)) {
            i++;
            continue;
        }
        if (over) fault_of_end(&fault, s->trouble);
        else fault_set(&fault, 504, "timeout", NULL, "the answer took too long");
        fail_request(s, r, &fault);
        i = 0;
    }
}

/* ---- A step ------------------------------------------------------------------------------------ */

static void add_item(struct scheduler *s, size_t *n, struct choice *c, const int32_t *tokens, size_t n_tokens)
{
    s->items[*n] = (struct sqz_batch_item){.session = c->session, .tokens = tokens, .n_tokens = n_tokens};
    s->lanes[(*n)++] = c;
}

static size_t add_answers(struct scheduler *s)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n_active; i++) {
        struct choice *c = s->active[i];
        if (c->state == CHOICE_ANSWERING && stream_has_room(c->request->stream)) add_item(s, &n, c, &c->next, 1);
    }
    return n;
}

static bool is_document(const struct choice *c)
{
    return prompt_of(c)->n_tokens > QUESTION_TOKENS;
}

/* How many prompts are being read, and whether all of them are documents. */
static size_t count_reading(const struct scheduler *s, bool *documents)
{
    size_t n = 0;
    *documents = true;
    for (size_t i = 0; i < s->n_active; i++) {
        if (s->active[i]->state != CHOICE_READING) continue;
        n++;
        if (!is_document(s->active[i])) *documents = false;
    }
    return n;
}

/* Pieces of the prompts that wait, each prompt's alike, of n_tokens tokens together; the first have theirs where that is
 * too little for all. Returns the tokens taken. */
static size_t add_pieces(struct scheduler *s, size_t *n, size_t n_reading, size_t n_tokens)
{
    size_t taken = 0;
    s->first++;
    for (size_t i = 0; i < s->n_active && n_reading && taken < n_tokens; i++) {
        struct choice *c = s->active[(s->first + i) % s->n_active];
        if (c->state != CHOICE_READING) continue;
        const struct prompt *p = prompt_of(c);
        const size_t left = p->n_tokens - c->n_read, room = n_tokens - taken;
        size_t piece = (room + n_reading - 1) / n_reading;
        if (piece < LEAST_PIECE) piece = LEAST_PIECE;
        if (piece > room) piece = room;
        if (piece > left) piece = left;
        add_item(s, n, c, p->tokens + c->n_read, piece);
        taken += piece;
        n_reading--;
    }
    return taken;
}

/* What the step runs: an exact answer that is alone may draft, which takes longer than a token, as nobody else has to wait for
 * it. True: it may have. */
static bool run_items(struct scheduler *s, size_t n, size_t n_lanes, bool alone)
{
    struct sqz_error error;
    struct sqz_batch_item *only = &s->items[0];
    if (alone && n == 1 && n_lanes == 1 && s->lanes[0]->request->ask.exact != ASK_EXACT_NO) {
        only->status = sqz_session_run(only->session, only->tokens, only->n_tokens, &only->error);
        return true;
    }
    if (sqz_batch_run(s->items, n, &error) != SQZ_OK)
        for (size_t i = 0; i < n; i++) s->items[i].status = error.status, s->items[i].error = error;
    return false;
}

static void note_time(struct scheduler *s, size_t n_lanes, size_t n_piece, double seconds)
{
    const uint64_t us = (uint64_t)(seconds * 1e6);
    metrics_add(s->o.metrics, METRIC_STEPS, 1);
    metrics_add(s->o.metrics, METRIC_STEP_MICROSECONDS, us);
    if (us > atomic_load(&s->o.metrics->value[METRIC_LONGEST_STEP_MICROSECONDS]))
        metrics_set(s->o.metrics, METRIC_LONGEST_STEP_MICROSECONDS, us);
    pace_note(&s->pace, PACE_WITH_ANSWERS, n_lanes, n_piece, seconds);
}

static void say(struct scheduler *s, struct choice *c, const struct sqz_choice *chosen)
{
    const struct ask *ask = &c->request->ask;
    char piece[512];
    size_t n = sqz_model_token_text(s->o.model, chosen->token, piece, sizeof piece);
    if (n == 0 && ask->tools) { /* marks of calls may be special tokens, which have no text otherwise */
        n = sqz_model_special_text(s->o.model, chosen->token, piece, sizeof piece);
        if (!calls_is_mark(piece, n)) n = 0;
    }
    spoken_put(&c->spoken, &ask->stops, piece, n);
    if (ask->n_likely < 0) return;
    if (!(c->n_said & (c->n_said - 1))) { /* at powers of two there is no room left */
        struct said *grown = realloc(c->said, (c->n_said ? 2 * c->n_said : 1) * sizeof *grown);
        if (!grown) return;
        c->said = grown;
    }
    c->said[c->n_said++] = (struct said){*chosen, c->spoken.text.n};
}

/* A conversation in plain text ends where the next question would begin. */
static bool ends_plainly(struct choice *c)
{
    bool ended = false;
    if (!c->request->ask.plain || !c->spoken.text.data) return false;
    const size_t sure = sqz_session_answer_bytes(c->session, c->spoken.text.data, c->spoken.text.n, &ended);
    if (ended) c->spoken.text.n = sure;
    if (c->spoken.n_ready > sure) c->spoken.n_ready = sure;
    return ended;
}

/* The next token from a session's logits. Returns how the answer ended, if it did. */
static enum finish take_token(struct scheduler *s, struct choice *c)
{
    const struct ask *ask = &c->request->ask;
    struct sqz_choice chosen;
    sqz_session_next(c->session, ask->n_likely, &chosen);
    if (c->request->first_token == 0) c->request->first_token = sqz_clock_seconds();
    if (chosen.ends || chosen.stuck) return FINISH_STOP;
    c->n_tokens++;
    metrics_add(s->o.metrics, METRIC_ANSWER_TOKENS, 1);
    c->next = chosen.token;
    say(s, c, &chosen);
    if (ends_plainly(c) || c->spoken.stop >= 0) return FINISH_STOP;
    return c->n_tokens >= ask->max_tokens ? FINISH_LENGTH : FINISH_NONE;
}

static void send_piece(struct choice *c)
{
    const struct ask *ask = &c->request->ask;
    const char *text = c->spoken.text.data;
    const size_t n = ask->tools && text ? calls_plain_bytes(ask->calls, text, c->spoken.n_ready) : c->spoken.n_ready;
    if (!ask->events || n <= c->n_sent) return;
    c->request->writer->piece(c->request, c, text + c->n_sent, n - c->n_sent);
    c->n_sent = n;
}

static void drop_lane(struct scheduler *s, const struct choice *c)
{
    size_t kept = 0;
    for (size_t i = 0; i < s->n_active; i++)
        if (s->active[i] != c) s->active[kept++] = s->active[i];
    s->n_active = kept;
}

/* What the first prompt's session has read goes to the document that is prepared from it. */
static void follow_reader(struct scheduler *s, const struct choice *c)
{
    struct ask *ask = &c->request->ask;
    if (!ask->reader || c->index != 0) return;
    if (!jobs_follow(s->o.jobs, ask->reader, c->session, c->n_read)) ask->reader = 0;
}

/* What a step brought one answer. False: its whole request failed. */
static bool take_result(struct scheduler *s, struct choice *c, const struct sqz_batch_item *item)
{
    enum finish finish = FINISH_NONE;
    pthread_mutex_lock(&s->lock);
    s->users[c->request->user].served += (double)item->n_tokens;
    pthread_mutex_unlock(&s->lock);
    if (item->status == SQZ_ERROR_LENGTH && c->state == CHOICE_ANSWERING) finish = FINISH_LENGTH;
    else if (item->status != SQZ_OK) {
        struct fault fault = {0};
        fault_of(s, c, &item->error, &fault);
        fail_request(s, c->request, &fault);
        return false;
    }
    if (c->state == CHOICE_READING) c->n_read += item->n_tokens;
    follow_reader(s, c);
    if (c->state == CHOICE_READING) {
        if (c->n_read < prompt_of(c)->n_tokens) return true;
        c->state = CHOICE_ANSWERING;
    }
    if (finish == FINISH_NONE) finish = take_token(s, c);
    if (finish == FINISH_NONE) {
        send_piece(c);
        return true;
    }
    spoken_end(&c->spoken);
    send_piece(c);
    drop_lane(s, c);
    finish_choice(s, c, finish);
    return true;
}

static void take_results(struct scheduler *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct request *r = s->lanes[i] ? s->lanes[i]->request : NULL;
        if (!r || take_result(s, s->lanes[i], &s->items[i])) continue;
        for (size_t j = i + 1; j < n; j++) /* others of a request that failed are no more */
            if (s->lanes[j] && s->lanes[j]->request == r) s->lanes[j] = NULL;
    }
}

/* Returns how many answers had their token; whether pieces of prompts went with them is in *pieces. */
static size_t step_answers(struct scheduler *s, double share, bool *pieces)
{
    bool documents;
    size_t n = add_answers(s), n_piece = 0;
    const size_t n_lanes = n, n_reading = count_reading(s, &documents);
    const double seconds = share * pace_seconds(&s->pace, n_lanes, documents);
    size_t most = pace_tokens(&s->pace, PACE_WITH_ANSWERS, seconds);
    /* Where no answer waits, a short question goes whole: what it is answered does not depend on how fast others went. */
    if (n_lanes == 0 && most < WHOLE_QUESTION) most = WHOLE_QUESTION;
    const bool room = !documents || pace_has_room(&s->pace, PACE_WITH_ANSWERS, n_lanes);
    if (n_reading && room && !pace_wants_alone(&s->pace, n_lanes)) n_piece = add_pieces(s, &n, n_reading, most);
    if (n == 0) return 0;
    const double since = sqz_clock_seconds();
    const bool drafted = run_items(s, n, n_lanes, share >= 1 && s->n_active == 1);
    if (!drafted) note_time(s, n_lanes, n_piece, sqz_clock_seconds() - since);
    take_results(s, n);
    *pieces = n_piece != 0;
    return n_lanes;
}

static void step_document(struct scheduler *s, size_t n_lanes, double share)
{
    const double seconds = share * pace_seconds(&s->pace, n_lanes, true), since = sqz_clock_seconds();
    const size_t n = jobs_step(s->o.jobs, pace_tokens(&s->pace, PACE_APART, seconds));
    metrics_add(s->o.metrics, METRIC_DOCUMENT_TOKENS, n);
    if (n) pace_note(&s->pace, PACE_APART, 0, n, sqz_clock_seconds() - since);
}

/* ---- The thread ------------------------------------------------------------------------------------ */

static void wait_for_work(struct scheduler *s)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += 200000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    pthread_mutex_lock(&s->lock);
    if (!s->poked && !s->stopping) pthread_cond_timedwait(&s->changed, &s->lock, &until);
    s->poked = false;
    pthread_mutex_unlock(&s->lock);
}

/* Whether some answer can go on now: one whose client does not read waits for it. */
static bool has_answers(struct scheduler *s)
{
    for (size_t i = 0; i < s->n_active; i++)
        if (s->active[i]->state == CHOICE_READING || stream_has_room(s->active[i]->request->stream)) return true;
    return false;
}

/* Who left makes room, and who waits takes it. */
static void seat_requests(struct scheduler *s)
{
    const double now = sqz_clock_seconds();
    struct request *r;
    tell_displaced(s);
    tidy_waiting(s, now);
    tidy_active(s, now);
    s->n_free = s->o.n_slots - s->n_active;
    while (s->n_active < s->o.n_slots && (r = next_request(s))) admit(s, r);
    s->n_free = s->o.n_slots - s->n_active;
    metrics_set(s->o.metrics, METRIC_ANSWERING, s->n_active);
}

/* While a document is squeezed on this thread, answers go on. */
static void answer_meanwhile(void *data)
{
    struct scheduler *s = data;
    bool pieces;
    seat_requests(s);
    if (has_answers(s)) step_answers(s, 0.5, &pieces);
}

static void *serve(void *data)
{
    struct scheduler *s = data;
    for (;;) {
        seat_requests(s);
        if (s->stopping && s->n_active == 0 && s->n_waiting == 0 && !s->displaced) break;
        const bool document = !s->stopping && jobs_have_work(s->o.jobs), answers = has_answers(s);
        bool pieces = false;
        const size_t n_lanes = answers ? step_answers(s, document ? 0.5 : 1, &pieces) : 0;
        if (document && pace_has_room(&s->pace, PACE_APART, n_lanes)) step_document(s, n_lanes, pieces ? 0.5 : 1);
        if (!answers && !document) wait_for_work(s);
    }
    return NULL;
}

/* ---- The calls ----------------------------------------------------------------------------------------- */

/* What requests would wait for later, some while others are answered: room for all places, and the context under most
 * sessions. One that cannot be made now is asked for again, and then said. */
static enum sqz_status make_ready(struct scheduler *s, struct sqz_error *error)
{
    static const struct sqz_message message = {"user", "?", 1};
    struct sqz_error ignored;
    struct blank *blank = NULL;
    int32_t *tokens = NULL;
    size_t n = 0;
    const enum sqz_status status = sqz_model_expect_sessions(s->o.model, s->o.n_slots, error);
    if (status != SQZ_OK) return status;
    if (sqz_conversation_tokens(s->o.model, true, &message, 1, &tokens, &n, &ignored) == SQZ_OK && n &&
        blanks_get(s->blanks, tokens[0], &blank, &ignored) == SQZ_OK)
        blanks_release(blank);
    free(tokens);
    sqz_crew_dismiss(); /* those of the scheduler's own thread compute from now on */
    return SQZ_OK;
}

enum sqz_status scheduler_start(struct scheduler **out, const struct scheduler_options *o, struct sqz_error *error)
{
    pthread_condattr_t monotonic;
    struct scheduler *s = calloc(1, sizeof *s);
    *out = s;
    if (!s) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    s->o = *o;
    s->last = &s->waiting;
    s->n_free = o->n_slots;
    pace_begin(&s->pace, o->step_seconds, o->on_card ? LEAST_ON_CARD : 1);
    jobs_meanwhile(o->jobs, answer_meanwhile, s);
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&s->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    s->blanks = blanks_create(o->model);
    s->active = calloc(o->n_slots, sizeof *s->active);
    s->lanes = calloc(o->n_slots, sizeof *s->lanes);
    s->items = calloc(o->n_slots, sizeof *s->items);
    if (!s->blanks || !s->active || !s->lanes || !s->items)
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %zu places", o->n_slots);
    const enum sqz_status status = make_ready(s, error);
    if (status != SQZ_OK) return status;
    if (pthread_create(&s->thread, NULL, serve, s) != 0)
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "no thread could be started");
    return SQZ_OK;
}

bool scheduler_submit(struct scheduler *s, struct request *r, struct fault *fault)
{
    pthread_mutex_lock(&s->lock);
    if (s->stopping) {
        fault_of_end(fault, s->trouble);
    } else if (s->n_waiting >= s->o.queue_limit + s->n_free && /* those whose turn is now do not wait */
               !displace_for(s, r->user)) {
        refuse(fault, s->n_waiting);
        metrics_add(s->o.metrics, METRIC_REFUSED, 1);
    } else {
        struct user *user = &s->users[r->user];
        if (user->n_active + user->n_waiting == 0) { /* who was away has no claim to what was served meanwhile */
            double least = INFINITY;
            for (int i = 0; i < N_USERS; i++)
                if (s->users[i].n_active + s->users[i].n_waiting && s->users[i].served < least)
                    least = s->users[i].served;
            if (isfinite(least) && user->served < least) user->served = least;
        }
        user->n_waiting++;
        *s->last = r;
        s->last = &r->next;
        s->n_waiting++;
        s->poked = true;
        metrics_add(s->o.metrics, METRIC_REQUESTS, 1);
        metrics_set(s->o.metrics, METRIC_WAITING, s->n_waiting);
        pthread_cond_signal(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    return fault->status == 0;
}

void scheduler_wake(struct scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    s->poked = true;
    pthread_cond_signal(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

void scheduler_stop(struct scheduler *s, double seconds, const char *trouble)
{
    pthread_mutex_lock(&s->lock);
    s->trouble = trouble;
    s->stopping = true;
    s->stop_at = sqz_clock_seconds() + seconds;
    pthread_cond_signal(&s->changed);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
}

void scheduler_free(struct scheduler *s)
{
    if (!s) return;
    blanks_free(s->blanks);
    free(s->active);
    free(s->lanes);
    free(s->items);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
}
