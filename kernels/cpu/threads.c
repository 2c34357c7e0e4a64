/* A small persistent pool of threads, and scratch memory of each thread. */
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#define MAX_WORKERS 63
#define SPINS 4000 /* some ten microseconds: the pause between two products of one layer */

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* held by the one caller that has the pool */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int num_workers;

static void (*job)(void *, long);
static void *job_argument;
static long job_count;
static int job_workers;
static atomic_long next_item;
static atomic_int num_running;
static atomic_ulong job_number;

static void take_items(void) {
    for (;;) {
        long i = atomic_fetch_add(&next_item, 1);
        if (i >= job_count) return;
        job(job_argument, i);
    }
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

struct worker {
    int index;
    unsigned long seen;
};
static struct worker workers[MAX_WORKERS];

static void *work_on(void *argument) {
    struct worker *self = argument;
    unsigned long seen = self->seen;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&job_number) == seen; i++) pause_briefly();
        if (atomic_load(&job_number) == seen) {
            pthread_mutex_lock(&lock);
            while (atomic_load(&job_number) == seen) pthread_cond_wait(&wake, &lock);
            pthread_mutex_unlock(&lock);
        }
        seen = atomic_load(&job_number);
        if (self->index < job_workers) take_items();
        atomic_fetch_sub(&num_running, 1);
    }
    return NULL;
}

/* The threads of the parent are not in the child: it starts its own. */
static void forget_workers(void) {
    pthread_mutex_init(&busy, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
    num_workers = 0;
}

static void start_workers(int wanted) {
    static int registered;
    if (!registered) {
        registered = 1;
        pthread_atfork(NULL, NULL, forget_workers);
    }
    while (num_workers < wanted) {
        pthread_t thread;
        workers[num_workers] = (struct worker){num_workers, atomic_load(&job_number)};
        if (pthread_create(&thread, NULL, work_on, &workers[num_workers])) return; /* fewer will do */
        pthread_detach(thread);
        num_workers++;
    }
}

void tandem_parallel(void (*work)(void *, long), void *argument, long count, int num_threads) {
    int wanted = num_threads - 1 < MAX_WORKERS ? num_threads - 1 : MAX_WORKERS;
    if (wanted > count - 1) wanted = (int)(count - 1);
    if (wanted <= 0 || pthread_mutex_trylock(&busy)) {
        for (long i = 0; i < count; i++) work(argument, i);
        return;
    }
    start_workers(wanted);
    job = work;
    job_argument = argument;
    job_count = count;
    job_workers = wanted;
    atomic_store(&next_item, 0);
    atomic_store(&num_running, num_workers);
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&job_number, 1);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    take_items();
    /* Every worker must have left the job before the next one may overwrite it. */
    for (int i = 0; atomic_load(&num_running) > 0; i++)
        if (i < SPINS) pause_briefly();
        else sched_yield();
    pthread_mutex_unlock(&busy);
}

static _Thread_local struct {
    void *memory;
    size_t bytes;
} scratch[SCRATCH_SLOTS];

void *tandem_scratch(int slot, size_t bytes) {
    if (scratch[slot].bytes < bytes) {
        size_t rounded = (bytes + 4095) & ~(size_t)4095;
        free(scratch[slot].memory);
        scratch[slot].memory = aligned_alloc(4096, rounded);
        if (!scratch[slot].memory) {
            fprintf(stderr, "tandem kernels: no memory for %zu bytes of scratch\n", rounded);
            abort();
        }
        scratch[slot].bytes = rounded;
    }
    return scratch[slot].memory;
}
