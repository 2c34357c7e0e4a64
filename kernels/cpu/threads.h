/* A small persistent pool of threads, and scratch memory of each thread. */
#ifndef TANDEM_THREADS_H
#define TANDEM_THREADS_H

#include <stddef.h>

/* Runs work(argument, i) for i = 0 .. count - 1 on up to num_threads threads, the caller among them; each i once, in
 * any order. Runs all of it on the caller when the pool is taken by another caller. */
void tandem_parallel(void (*work)(void *argument, long i), void *argument, long count, int num_threads);

/* At least `bytes` of this thread's memory, aligned to 64; the next call on this thread with the same slot ends it. */
void *tandem_scratch(int slot, size_t bytes);

enum { SCRATCH_GEMM = 0, SCRATCH_ATTENTION = 1, SCRATCH_SLOTS = 2 };

#endif
