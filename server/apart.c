/* Requests served apart; apart.h describes it. */
#define _GNU_SOURCE /* gettid */
#include "apart.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { N_THREADS = 4, NICER = 5 };

struct apart {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct apart_work *first, **last;
    bool closed;
    pthread_t threads[N_THREADS];
    int n_threads;
};

void apart_come_last(int nicer)
{
    const id_t thread = (id_t)syscall(SYS_gettid);
    setpriority(PRIO_PROCESS, thread, getpriority(PRIO_PROCESS, thread) + nicer);
}

/* The next one; NULL: there will be none. */
static struct apart_work *next_work(struct apart *a)
{
    pthread_mutex_lock(&a->lock);
    while (!a->first && !a->closed) pthread_cond_wait(&a->changed, &a->lock);
    struct apart_work *work = a->first;
    if (work && !(a->first = work->next)) a->last = &a->first;
    pthread_mutex_unlock(&a->lock);
    return work;
}

static void *serve(void *data)
{
    apart_come_last(NICER);
    for (struct apart_work *work; (work = next_work(data));) work->run(work);
    return NULL;
}

struct apart *apart_create(void)
{
    struct apart *a = calloc(1, sizeof *a);
    if (!a) return NULL;
    a->last = &a->first;
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->changed, NULL);
    while (a->n_threads < N_THREADS && pthread_create(&a->threads[a->n_threads], NULL, serve, a) == 0) a->n_threads++;
    if (a->n_threads) return a;
    apart_free(a);
    return NULL;
}

bool apart_put(struct apart *a, struct apart_work *work)
{
    pthread_mutex_lock(&a->lock);
    const bool taken = !a->closed;
    if (taken) {
        work->next = NULL;
        *a->last = work;
        a->last = &work->next;
        pthread_cond_signal(&a->changed);
    }
    pthread_mutex_unlock(&a->lock);
    return taken;
}

void apart_close(struct apart *a)
{
    pthread_mutex_lock(&a->lock);
    a->closed = true;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
    while (a->n_threads) pthread_join(a->threads[--a->n_threads], NULL);
}

void apart_free(struct apart *a)
{
    if (!a) return;
    apart_close(a);
    pthread_cond_destroy(&a->changed);
    pthread_mutex_destroy(&a->lock);
    free(a);
}
