/* A pool of threads that are kept between calls. With nothing to do they look for work a short while, and then sleep.

   One caller at a time has the pool; another that finds it taken runs its job alone. A child process made by fork
   starts with an empty pool. */
#ifndef QSDPA_THREADS_H
#define QSDPA_THREADS_H

#include <stdlib.h>
#include <time.h>

#include "cores.h"
#include "vector.h"

/* Nanoseconds: a few times what it takes to fall asleep and be woken, or the calls of a layer to follow each other. */
enum { MOST_THREADS = 256, LONGEST_SPIN = 50000 };

/* Items of a job that one thread takes from the front, in order, and others, when theirs are done, from the back: a
   thread that wakes up late leaves them its own, and delays the job by no more than an item. */
typedef struct {
  _Alignas(64) uint64_t bounds; /* first item left, and in the high half the end */
} range;

typedef struct job job;

/* Where a thread gets the items of a job: first from its own range. */
typedef struct {
  job *from;
  int own;
} items;

/* Works on what take_item gives, until that is nothing. memory: the thread's own, of the size the job asked for. */
typedef void (*task)(void *argument, items of, float *memory);

struct job {
  task run;
  void *argument;
  long items;
  size_t memory; /* floats that each thread needs */
  range *dealt;
  int ranges, joined;
};

INLINE uint64_t bounds_of(long first, long end) { return (uint64_t)first | (uint64_t)end << 32; }

static void deal_items(job *j, int ranges, range *to) {
  j->dealt = to;
  j->ranges = ranges;
  j->joined = 0;
  for (int i = 0; i < ranges; i++) to[i].bounds = bounds_of(j->items * i / ranges, j->items * (i + 1) / ranges);
}

/* The first or the last item of a range; -1 when there is none left. */
static long take_from(range *r, int last) {
  uint64_t old = __atomic_load_n(&r->bounds, __ATOMIC_RELAXED);
  for (;;) {
    const long first = (long)(uint32_t)old, end = (long)(old >> 32);
    if (first >= end) return -1;
    const uint64_t left = last ? bounds_of(first, end - 1) : bounds_of(first + 1, end);
    if (__atomic_compare_exchange_n(&r->bounds, &old, left, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      return last ? end - 1 : first;
    }
  }
}

static long take_item(items of) {
  job *const j = of.from;
  long item = of.own < j->ranges ? take_from(j->dealt + of.own, 0) : -1;
  for (int i = 0; item < 0 && i < j->ranges; i++) item = take_from(j->dealt + (of.own + i) % j->ranges, 1);
  return item;
}

static struct {
  pthread_mutex_t owner; /* held by the caller that has the pool */
  pthread_mutex_t lock;  /* guards what follows, but for memory */
  pthread_cond_t wake, idle;
  job *current;
  unsigned long jobs; /* so far */
  int started, active;
  int callers_core; /* that the threads have been moved off */
  pthread_t threads[MOST_THREADS];
  range dealt[MOST_THREADS]; /* the current job's items */
  struct {
    float *start;
    size_t size;
  } memory[MOST_THREADS]; /* of each worker; 0 is the caller */
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER,
          .idle = PTHREAD_COND_INITIALIZER};

static void forget_threads(void) {
  pthread_mutex_init(&pool.owner, NULL);
  pthread_mutex_init(&pool.lock, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pthread_cond_init(&pool.idle, NULL);
  pool.current = NULL;
  pool.started = pool.active = 0;
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

static float *aligned_floats(size_t count) {
  void *memory = NULL;
  return posix_memalign(&memory, 64, (count ? count : 1) * sizeof(float)) ? NULL : memory;
}

/* Memory of worker `index`, kept for the next job. */
static float *worker_memory(int index, size_t size) {
  if (pool.memory[index].size < size) {
    free(pool.memory[index].start);
    pool.memory[index].start = aligned_floats(size);
    pool.memory[index].size = pool.memory[index].start ? size : 0;
  }
  return pool.memory[index].start;
}

/* Without memory, the items are left to the other workers. */
static void run_items(job *j, int own, float *memory) {
  if (memory) j->run(j->argument, (items){j, own}, memory);
}

static int no_items_left(job *j) { return take_item((items){j, 0}) < 0; }

static void rest(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int is_idle(unsigned long last) {
  (void)last;
  return __atomic_load_n(&pool.active, __ATOMIC_ACQUIRE) == 0;
}

static int has_new_job(unsigned long last) { return __atomic_load_n(&pool.jobs, __ATOMIC_ACQUIRE) != last; }

/* Looks whether the pool `is_so` until it is, or it takes too long. Whoever else wants the core has it meanwhile: it may
   be Python, that waits for the result. */
static void spin(int (*is_so)(unsigned long last), unsigned long last) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  const int64_t start = now.tv_sec * 1000000000LL + now.tv_nsec;
  do {
    for (int i = 0; i < 16; i++) {
      if (is_so(last)) return;
      rest();
    }
    sched_yield();
    clock_gettime(CLOCK_MONOTONIC, &now);
  } while (now.tv_sec * 1000000000LL + now.tv_nsec - start < LONGEST_SPIN);
}

/* The lock is held for moments: waiting for it asleep would take longer. */
static void take_lock(void) {
  for (int i = 0; i < 100; i++) {
    if (!pthread_mutex_trylock(&pool.lock)) return;
    rest();
  }
  pthread_mutex_lock(&pool.lock);
}

static void *worker(void *argument) {
  const int index = (int)(intptr_t)argument;
  unsigned long last = 0;
  for (;;) {
    spin(has_new_job, last);
    take_lock();
    while (!pool.current || pool.jobs == last) pthread_cond_wait(&pool.wake, &pool.lock);
    job *j = pool.current;
    last = pool.jobs;
    __atomic_add_fetch(&pool.active, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&pool.lock);
    run_items(j, __atomic_add_fetch(&j->joined, 1, __ATOMIC_RELAXED), worker_memory(index, j->memory));
    take_lock();
    if (__atomic_sub_fetch(&pool.active, 1, __ATOMIC_RELEASE) == 0) pthread_cond_signal(&pool.idle);
    pthread_mutex_unlock(&pool.lock);
  }
  return NULL;
}

/* Called by the pool's owner. Fewer threads than asked for are no error. */
static void start_threads(int count) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  while (pool.started < count - 1) {
    void *const index = (void *)(intptr_t)(pool.started + 1);
    if (pthread_create(pool.threads + pool.started, &attributes, worker, index)) break;
    pool.started++;
    pool.callers_core = -1;
  }
  pthread_attr_destroy(&attributes);
}

/* Keeps the threads off the core that the caller is on. On the same core one would wait until the caller is done, and
   Linux may leave it there for seconds while another core has nothing to do. */
static void take_own_core(void) {
  const int core = this_core();
  if (core == pool.callers_core) return;
  for (int i = 0; i < pool.started; i++) keep_off_core(pool.threads[i], core);
  pool.callers_core = core;
}

/* Runs items 0 .. j->items on up to `threads` threads, this one included; returns when all are done. False when there
   was no memory for it. */
static int run_job(job *j, int threads) {
  range all;
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  if (pthread_mutex_trylock(&pool.owner)) {
    float *memory = aligned_floats(j->memory);
    deal_items(j, 1, &all);
    run_items(j, 0, memory);
    free(memory);
    return no_items_left(j);
  }
  if (threads < 2 || j->items < 2) {
    deal_items(j, 1, &all);
    run_items(j, 0, worker_memory(0, j->memory));
  } else {
    deal_items(j, threads, pool.dealt);
    start_threads(threads);
    take_own_core();
    take_lock();
    pool.current = j;
    __atomic_add_fetch(&pool.jobs, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    run_items(j, 0, worker_memory(0, j->memory));
    take_lock();
    pool.current = NULL; /* whoever wakes up only now has nothing to do */
    pthread_mutex_unlock(&pool.lock);
    spin(is_idle, 0);
    take_lock();
    while (pool.active) pthread_cond_wait(&pool.idle, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
  }
  const int done = no_items_left(j);
  pthread_mutex_unlock(&pool.owner);
  return done;
}

#endif
