/* Which core a thread runs on, and which it may run on: on Linux. Elsewhere there is no way to choose. */
#ifndef QSDPA_CORES_H
#define QSDPA_CORES_H

#include <pthread.h>
#include <sched.h>

#if defined(__linux__)
static int this_core(void) { return sched_getcpu(); }

/* Lets a thread run on all cores that the caller may use but `core`; where that leaves none, on those it has. */
static void keep_off_core(pthread_t thread, int core) {
  cpu_set_t cores;
  if (pthread_getaffinity_np(pthread_self(), sizeof cores, &cores)) return;
  CPU_CLR(core, &cores);
  if (CPU_COUNT(&cores) > 0) pthread_setaffinity_np(thread, sizeof cores, &cores);
}
#else
static int this_core(void) { return -1; }

static void keep_off_core(pthread_t thread, int core) { (void)thread, (void)core; }
#endif

#endif
