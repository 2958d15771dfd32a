/* The two products for few rows over 4-bit and 8-bit affine formats, with the unpacking inside them.

   With few rows, unpacking takes as long as the products. In one loop the two overlap, and the unpacked numbers never
   leave the registers. Everything else unpacks a tile first (unpack.h) and multiplies then (products.h). */
#ifndef QSDPA_FUSED_PRODUCTS_H
#define QSDPA_FUSED_PRODUCTS_H

#include "products.h"

static int can_fuse(const packed *p, long rows) {
  return rows <= ROW_BLOCK && p->kind == AFFINE && (p->bits == 4 || p->bits == 8) && p->group_size >= 32;
}

INLINE void fused_score_block(int bits, int rows, const packed *p, const uint32_t *words, const float *scales,
                              const float *biases, const float *q, float *scores) {
  const int chains = rows <= 2 ? 2 : 1; /* sums of even and odd dimensions, to hide the latency of the adders */
  const int codes = 32 / bits;
  const long groups = p->dim / p->group_size, group_words = p->group_size / codes;
  for (int t = 0; t < TILE; t += 2 * LANES) {
    vf sum[2][ROW_BLOCK][2];
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int k = 0; k < chains; k++) sum[k][r][0] = sum[k][r][1] = (vf){0};
    }
    const uint32_t *word = words + t;
    const float *x = q;
    for (long g = 0; g < groups; g++) {
      const vf scale0 = load(scales + g * TILE + t), scale1 = load(scales + g * TILE + t + LANES);
      const vf bias0 = load(biases + g * TILE + t), bias1 = load(biases + g * TILE + t + LANES);
      for (long w = 0; w < group_words; w++, word += TILE, x += codes * rows) {
        const vu word0 = load_words(word), word1 = load_words(word + LANES);
        UNROLL for (int i = 0; i < codes; i++) {
          const vf key0 = keep(to_float((word0 >> i * bits) & ((1u << bits) - 1)) * scale0 + bias0);
          const vf key1 = keep(to_float((word1 >> i * bits) & ((1u << bits) - 1)) * scale1 + bias1);
          UNROLL for (int r = 0; r < rows; r++) {
            const vf query = splat(x[i * rows + r]);
            sum[i % chains][r][0] += query * key0;
            sum[i % chains][r][1] += query * key1;
          }
        }
      }
    }
    UNROLL for (int r = 0; r < rows; r++) {
      store(scores + r * TILE + t, chains == 2 ? sum[0][r][0] + sum[1][r][0] : sum[0][r][0]);
      store(scores + r * TILE + t + LANES, chains == 2 ? sum[0][r][1] + sum[1][r][1] : sum[0][r][1]);
    }
  }
}

/* 32 * `halves` dimensions of `rows` output rows: out = out * decay + weights * values. */
INLINE void fused_output_block(int bits, int rows, int halves, const packed *p, long d, const uint8_t *codes,
                               const float *scales, const float *biases, const float *weights, const float *decay,
                               long count, float *out) {
  const int vectors = 32 / LANES; /* in a half: it lies in one group */
  const long groups = p->dim / p->group_size;
  long group[4];
  vf sum[ROW_BLOCK][4 * 32 / LANES];
  UNROLL for (int h = 0; h < halves; h++) group[h] = (d + 32 * h) / p->group_size;
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int v = 0; v < halves * vectors; v++) sum[r][v] = load(out + r * p->dim + d + v * LANES) * decay[r];
  }
  codes += d / 8 * bits;
  for (long t = 0; t < count; t++, codes += p->codes.row, scales += groups, biases += groups) {
    UNROLL for (int h = 0; h < halves; h++) {
      const vf scale = splat(scales[group[h]]), bias = splat(biases[group[h]]);
      UNROLL for (int v = 0; v < vectors; v++) {
        const int i = v * LANES;
        const vf value = keep(unpack_value_vector(AFFINE, bits, codes + (4 * h + i / 16 * 2) * bits, i % 16, scale, bias));
        UNROLL for (int r = 0; r < rows; r++) sum[r][h * vectors + v] += splat(weights[r * TILE + t]) * value;
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int v = 0; v < halves * vectors; v++) store(out + r * p->dim + d + v * LANES, sum[r][v]);
  }
}

INLINE void fused_output_rows(int bits, int rows, int halves, const packed *p, const uint8_t *codes,
                              const float *scales, const float *biases, const float *weights, const float *decay,
                              long count, float *out) {
  long d = 0;
  for (; d + 32 * halves <= p->dim; d += 32 * halves) {
    fused_output_block(bits, rows, halves, p, d, codes, scales, biases, weights, decay, count, out);
  }
  for (; d < p->dim; d += 32) {
    fused_output_block(bits, rows, 1, p, d, codes, scales, biases, weights, decay, count, out);
  }
}

/* Dispatch to code made for the very bits and rows. */
#define FOR_ROWS(CASE, bits) \
  CASE(bits, 1) CASE(bits, 2) CASE(bits, 3) CASE(bits, 4) FOR_MORE_ROWS(CASE, bits)
#if ROW_BLOCK == 8
#define FOR_MORE_ROWS(CASE, bits) CASE(bits, 5) CASE(bits, 6) CASE(bits, 7) CASE(bits, 8)
#else
#define FOR_MORE_ROWS(CASE, bits)
#endif

/* scores [rows][TILE] = q [dim][rows] times keys first .. first + count. `work` as for unpack_keys. */
static void fused_score_tile(long rows, const packed *p, long sequence, long head, long first, long count, float *work,
                             const float *q, float *scores) {
  const key_parts k = load_key_parts(p, sequence, head, first, count, work);
#define CASE(bits, rows) \
  case bits * 16 + rows: fused_score_block(bits, rows, p, k.words, k.scales, k.biases, q, scores); break;
  switch (p->bits * 16 + rows) { FOR_ROWS(CASE, 4) FOR_ROWS(CASE, 8) }
#undef CASE
}

/* out [rows][dim] = out * decay [rows] + weights [rows][TILE] times values first .. first + count. `work` as for
   unpack_values. */
static void fused_output_tile(long rows, const packed *p, long sequence, long head, long first, long count,
                              float *work, const float *weights, const float *decay, float *out) {
  const uint8_t *codes = row_of(&p->codes, sequence, head, first);
  const float *scales = work, *biases = work + p->dim / p->group_size * TILE;
  load_scales(p, sequence, head, first, count, work, work + p->dim / p->group_size * TILE);
#define HALVES(rows) (LANES == 16 ? ((rows) == 1 ? 4 : (rows) <= 4 ? 2 : 1) : (rows) == 1 ? 2 : 1)
#define CASE(bits, rows)                                                                                            \
  case bits * 16 + rows:                                                                                            \
    fused_output_rows(bits, rows, HALVES(rows), p, codes, scales, biases, weights, decay, count, out);              \
    break;
  switch (p->bits * 16 + rows) { FOR_ROWS(CASE, 4) FOR_ROWS(CASE, 8) }
#undef CASE
  for (long t = 0; t < count; t++) prefetch(codes + (TILE + t) * p->codes.row, p->dim / 8 * p->bits);
}

#endif
