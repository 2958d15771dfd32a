/* What this machine can do at best, measured with the kernels' own threads and vectors: the yardsticks for them. */
#ifndef QSDPA_LIMITS_H
#define QSDPA_LIMITS_H

#include "threads.h"
#include "vector.h"

enum { READ_PIECE = 1 << 18, CHAINS = LANES == 8 ? 12 : 16 }; /* floats; accumulators */

static void read_piece(const float *from, float *memory) {
  vf sum[8] = {{0}};
  for (long i = 0; i < READ_PIECE; i += 8 * LANES) {
    UNROLL for (int k = 0; k < 8; k++) {
      if (k * LANES % 16 == 0) __builtin_prefetch(from + i + 4096 / 4 + k * LANES);
      sum[k] += load(from + i + k * LANES);
    }
  }
  UNROLL for (int k = 1; k < 8; k++) sum[0] += sum[k];
  store(memory, sum[0]);
}

static void read_pieces(void *argument, items of, float *memory) {
  for (long item; (item = take_item(of)) >= 0;) read_piece((const float *)argument + item * READ_PIECE, memory);
}

/* Reads `pieces` pieces of 1 MiB once, on `threads` threads. Returns 0, or 1 without memory. */
__attribute__((visibility("default"))) int qsdpa_read(const float *from, long pieces, long threads) {
  job j = {.run = read_pieces, .argument = (void *)from, .items = pieces, .memory = LANES};
  return !run_job(&j, (int)threads);
}

static void multiply_add_piece(long rounds, long item, float *memory) {
  const vf factor = splat(0.999f + 1e-9f * (float)item), term = splat(1e-3f);
  vf sum[CHAINS];
  UNROLL for (int k = 0; k < CHAINS; k++) sum[k] = splat((float)k);
  for (long i = 0; i < rounds; i++) {
    UNROLL for (int k = 0; k < CHAINS; k++) sum[k] = keep(sum[k] * factor + term);
  }
  UNROLL for (int k = 1; k < CHAINS; k++) sum[0] += sum[k];
  store(memory, sum[0]);
}

static void multiply_add_pieces(void *argument, items of, float *memory) {
  for (long item; (item = take_item(of)) >= 0;) multiply_add_piece(*(const long *)argument, item, memory);
}

/* Does about `count` float32 multiply-adds on `threads` threads. Returns how many, or 0 without memory. */
__attribute__((visibility("default"))) long qsdpa_multiply_add(long count, long threads) {
  const long items = 16 * threads;
  long rounds = count / (items * CHAINS * LANES) + 1;
  job j = {.run = multiply_add_pieces, .argument = &rounds, .items = items, .memory = LANES};
  return run_job(&j, (int)threads) ? items * rounds * CHAINS * LANES : 0;
}

#endif
