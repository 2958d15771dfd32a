/* The two products of attention over one tile of keys, blocked for registers.

   Both hold a block of accumulators, read each vector of the tile once for all rows of the block and each number of
   the other operand once for all vectors. Blocks of few rows are wider or unrolled, to hide the adders' latency. */
#ifndef QSDPA_PRODUCTS_H
#define QSDPA_PRODUCTS_H

#include "unpack.h"

#if LANES == 16
#define ROW_BLOCK 8
#else
#define ROW_BLOCK 4
#endif
#define KEY_VECTORS (LANES == 4 ? 4 : 2) /* vectors of keys in a block of scores */

INLINE void score_block(int rows, int steps, const float *q, long q_row, long dim, const float *keys, float *scores) {
  for (int t = 0; t < TILE; t += KEY_VECTORS * LANES) {
    vf sum[4][ROW_BLOCK][KEY_VECTORS];
    UNROLL for (int s = 0; s < steps; s++) {
      UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < KEY_VECTORS; v++) sum[s][r][v] = (vf){0};
      }
    }
    for (long d = 0; d < dim; d += steps) {
      UNROLL for (int s = 0; s < steps; s++) {
        vf key[KEY_VECTORS];
        UNROLL for (int v = 0; v < KEY_VECTORS; v++) key[v] = keep(load(keys + (d + s) * TILE + t + v * LANES));
        UNROLL for (int r = 0; r < rows; r++) {
          const vf x = splat(q[r * q_row + d + s]);
          UNROLL for (int v = 0; v < KEY_VECTORS; v++) sum[s][r][v] += x * key[v];
        }
      }
    }
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int v = 0; v < KEY_VECTORS; v++) {
        vf total = sum[0][r][v];
        UNROLL for (int s = 1; s < steps; s++) total += sum[s][r][v];
        store(scores + r * TILE + t + v * LANES, total);
      }
    }
  }
}

/* scores [rows][TILE] = q [rows][q_row] times keys [dim][TILE]; dim is a multiple of 4. */
static void score_tile(long rows, const float *q, long q_row, long dim, const float *keys, float *scores) {
  while (rows > 0) {
    switch (rows < ROW_BLOCK ? rows : ROW_BLOCK) {
      case 1: score_block(1, 4, q, q_row, dim, keys, scores); break;
      case 2: score_block(2, 2, q, q_row, dim, keys, scores); break;
      case 3: score_block(3, 2, q, q_row, dim, keys, scores); break;
      case 4: score_block(4, 1, q, q_row, dim, keys, scores); break;
#if ROW_BLOCK == 8
      case 5: score_block(5, 1, q, q_row, dim, keys, scores); break;
      case 6: score_block(6, 1, q, q_row, dim, keys, scores); break;
      case 7: score_block(7, 1, q, q_row, dim, keys, scores); break;
      default: score_block(8, 1, q, q_row, dim, keys, scores); break;
#endif
    }
    rows -= ROW_BLOCK, q += ROW_BLOCK * q_row, scores += ROW_BLOCK * TILE;
  }
}

/* The same with sums in double: float32 queries are promised 1e-5, and where one channel of the keys is much larger
   than the others, rounding it into every sum that follows costs more. */
typedef double vd __attribute__((vector_size(4 * LANES)));
#define HALF (LANES / 2)
#define HALVES_AT_ONCE (LANES == 16 ? 4 : 2)

INLINE vd keep_doubles(vd v) { return (vd)keep((vf)v); }

/* sums [rows][TILE] += q [rows][q_row] times keys [dim][TILE]. */
INLINE void exact_score_block(int rows, const double *q, long q_row, long dim, const double *keys, double *sums) {
  for (int t = 0; t < TILE; t += HALVES_AT_ONCE * HALF) {
    vd sum[4][HALVES_AT_ONCE];
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int v = 0; v < HALVES_AT_ONCE; v++) memcpy(&sum[r][v], sums + r * TILE + t + v * HALF, sizeof(vd));
    }
    for (long d = 0; d < dim; d++) {
      vd key[HALVES_AT_ONCE];
      UNROLL for (int v = 0; v < HALVES_AT_ONCE; v++) {
        memcpy(&key[v], keys + d * TILE + t + v * HALF, sizeof(vd));
        key[v] = keep_doubles(key[v]);
      }
      UNROLL for (int r = 0; r < rows; r++) {
        const vd x = q[r * q_row + d] - (vd){0};
        UNROLL for (int v = 0; v < HALVES_AT_ONCE; v++) sum[r][v] += x * key[v];
      }
    }
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int v = 0; v < HALVES_AT_ONCE; v++) memcpy(sums + r * TILE + t + v * HALF, &sum[r][v], sizeof(vd));
    }
  }
}

static void widen(const float *restrict from, long n, double *restrict to) {
  for (long i = 0; i < n; i++) to[i] = from[i];
}

/* `sums`: rows * TILE doubles to work with. The keys are widened a few dimensions at a time, so that they stay in the
   first level of cache. */
static void exact_score_tile(long rows, const double *q, long q_row, long dim, const float *keys, double *sums,
                             float *scores) {
  enum { STEP = 16 };
  double wide[STEP * TILE];
  memset(sums, 0, (size_t)(rows * TILE) * sizeof *sums);
  for (long d = 0; d < dim; d += STEP) {
    const long count = dim - d < STEP ? dim - d : STEP;
    widen(keys + d * TILE, count * TILE, wide);
    for (long r = 0; r < rows; r += 4) {
      const double *x = q + r * q_row + d;
      switch (rows - r < 4 ? rows - r : 4) {
        case 1: exact_score_block(1, x, q_row, count, wide, sums + r * TILE); break;
        case 2: exact_score_block(2, x, q_row, count, wide, sums + r * TILE); break;
        case 3: exact_score_block(3, x, q_row, count, wide, sums + r * TILE); break;
        default: exact_score_block(4, x, q_row, count, wide, sums + r * TILE); break;
      }
    }
  }
  for (long i = 0; i < rows * TILE; i++) scores[i] = (float)sums[i];
}

/* `vectors` vectors of `rows` output rows: out = out * decay + weights * values. */
INLINE void output_block(int rows, int vectors, const float *weights, const float *decay, const float *values,
                         long dim, long count, float *out) {
  vf sum[ROW_BLOCK][8];
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = load(out + r * dim + v * LANES) * decay[r];
  }
  for (long t = 0; t < count; t++) {
    vf value[8];
    UNROLL for (int v = 0; v < vectors; v++) value[v] = keep(load(values + t * dim + v * LANES));
    UNROLL for (int r = 0; r < rows; r++) {
      const vf x = splat(weights[r * TILE + t]);
      UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += x * value[v];
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int v = 0; v < vectors; v++) store(out + r * dim + v * LANES, sum[r][v]);
  }
}

INLINE void output_rows(int rows, int vectors, const float *weights, const float *decay, const float *values, long dim,
                        long count, float *out) {
  long d = 0;
  for (; d + vectors * LANES <= dim; d += vectors * LANES) {
    output_block(rows, vectors, weights, decay, values + d, dim, count, out + d);
  }
  for (; d < dim; d += 2 * LANES) output_block(rows, 2, weights, decay, values + d, dim, count, out + d);
}

/* out [rows][dim] = out * decay [rows] + weights [rows][TILE] times values [count][dim]; dim is a multiple of 32. */
static void output_tile(long rows, const float *weights, const float *decay, const float *values, long dim, long count,
                        float *out) {
  while (rows > 0) {
    switch (rows < ROW_BLOCK ? rows : ROW_BLOCK) {
      case 1: output_rows(1, 8, weights, decay, values, dim, count, out); break;
      case 2: output_rows(2, 4, weights, decay, values, dim, count, out); break;
      case 3: output_rows(3, LANES == 8 ? 2 : 4, weights, decay, values, dim, count, out); break;
      case 4: output_rows(4, LANES == 8 ? 2 : 4, weights, decay, values, dim, count, out); break;
#if ROW_BLOCK == 8
      case 5: output_rows(5, 2, weights, decay, values, dim, count, out); break;
      case 6: output_rows(6, 2, weights, decay, values, dim, count, out); break;
      case 7: output_rows(7, 2, weights, decay, values, dim, count, out); break;
      default: output_rows(8, 2, weights, decay, values, dim, count, out); break;
#endif
    }
    rows -= ROW_BLOCK, weights += ROW_BLOCK * TILE, decay += ROW_BLOCK, out += ROW_BLOCK * dim;
  }
}

#endif
