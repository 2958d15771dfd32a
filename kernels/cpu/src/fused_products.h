/* The two products for few rows over 4-bit and 8-bit affine formats, with the unpacking inside them.

   With few rows, unpacking takes as long as the products. In one loop the two overlap, and the unpacked numbers never
   leave the registers. Everything else unpacks a tile first (unpack.h) and multiplies then (products.h). */
#ifndef QSDPA_FUSED_PRODUCTS_H
#define QSDPA_FUSED_PRODUCTS_H

#include "products.h"

/* With queries of 16 bits, scales and biases are applied to whole groups of products: score = scale * (codes . q) +
   bias * sum(q). That costs digits where a group's bias is much larger than its values, which those of float32 lack:
   for these (`exact`) values are scaled one by one, and scores are not computed here. */
static int can_fuse(const packed *p, long rows, int exact) {
  return rows <= (exact ? 4 : ROW_BLOCK) && p->kind == AFFINE && (p->bits == 4 || p->bits == 8) && p->group_size >= 32;
}

/* Queries [rows][dim] as [dim][rows], followed by their sums over each group, [groups][rows]. */
static void prepare_fused_queries(const packed *p, const float *restrict q, long rows, float *restrict to) {
  float *sums = to + p->dim * rows;
  memset(sums, 0, (size_t)(p->dim / p->group_size * rows) * sizeof *sums);
  for (long d = 0; d < p->dim; d++) {
    for (long r = 0; r < rows; r++) {
      to[d * rows + r] = q[r * p->dim + d];
      sums[d / p->group_size * rows + r] += q[r * p->dim + d];
    }
  }
}

INLINE void fused_score_block(int bits, int rows, const packed *p, const key_parts *k, const float *q,
                              float *scores) {
  const int chains = rows <= 2 ? 2 : 1; /* sums of even and odd dimensions, to hide the latency of the adders */
  const int codes = 32 / bits;
  const long groups = p->dim / p->group_size, group_words = p->group_size / codes;
  for (int t = 0; t < TILE; t += 2 * LANES) {
    vf sum[2][ROW_BLOCK][2];
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int c = 0; c < chains; c++) sum[c][r][0] = sum[c][r][1] = (vf){0};
    }
    const uint32_t *word = k->words + t;
    const float *x = q, *q_sum = q + p->dim * rows;
    for (long g = 0; g < groups; g++, q_sum += rows) {
      const vf scale0 = load(k->scales + g * TILE + t), scale1 = load(k->scales + g * TILE + t + LANES);
      const vf bias0 = load(k->biases + g * TILE + t), bias1 = load(k->biases + g * TILE + t + LANES);
      for (long w = 0; w < group_words; w++, word += TILE, x += codes * rows) {
        const vu word0 = load_words(word), word1 = load_words(word + LANES);
        UNROLL for (int i = 0; i < codes; i++) {
          const vf key0 = keep(to_float((word0 >> i * bits) & ((1u << bits) - 1)));
          const vf key1 = keep(to_float((word1 >> i * bits) & ((1u << bits) - 1)));
          UNROLL for (int r = 0; r < rows; r++) {
            const vf query = splat(x[i * rows + r]);
            sum[i % chains][r][0] += query * key0;
            sum[i % chains][r][1] += query * key1;
          }
        }
      }
      UNROLL for (int r = 0; r < rows; r++) {
        float *to = scores + r * TILE + t;
        vf sum0 = sum[0][r][0], sum1 = sum[0][r][1];
        if (chains == 2) sum0 += sum[1][r][0], sum1 += sum[1][r][1];
        sum0 = sum0 * scale0 + bias0 * q_sum[r], sum1 = sum1 * scale1 + bias1 * q_sum[r];
        if (g) sum0 += load(to), sum1 += load(to + LANES);
        UNROLL for (int c = 0; c < chains; c++) sum[c][r][0] = sum[c][r][1] = (vf){0};
        store(to, sum0);
        store(to + LANES, sum1);
      }
    }
  }
}

/* What the products with values need of a tile. Exact: weights [rows][TILE], scales and biases [TILE][groups]. Else:
   weights times scales, [groups][rows][TILE], and in `biases` the sums of weights times biases, [groups][rows]. */
typedef struct {
  const uint8_t *codes;
  const float *weights, *scales, *biases, *decay;
  long count;
} value_parts;

/* 32 * `halves` dimensions of `rows` output rows: out = out * decay + weights * values. */
INLINE void fused_output_block(int exact, int bits, int rows, int halves, const packed *p, long d,
                               const value_parts *k, float *out) {
  const int vectors = 32 / LANES; /* in a half: it lies in one group */
  const long groups = p->dim / p->group_size;
  const vf one = splat(1), zero = {0};
  const uint8_t *codes = k->codes + d / 8 * bits;
  const float *scales = k->scales, *biases = k->biases, *weights[4];
  long group[4];
  vf sum[ROW_BLOCK][4 * 32 / LANES];
  UNROLL for (int h = 0; h < halves; h++) {
    group[h] = (d + 32 * h) / p->group_size;
    weights[h] = exact ? k->weights : k->weights + group[h] * rows * TILE;
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int v = 0; v < halves * vectors; v++) {
      sum[r][v] = exact ? load(out + r * p->dim + d + v * LANES) * k->decay[r] : zero;
    }
  }
  for (long t = 0; t < k->count; t++, codes += p->codes.row) {
    UNROLL for (int h = 0; h < halves; h++) {
      const vf scale = exact ? splat(scales[t * groups + group[h]]) : one;
      const vf bias = exact ? splat(biases[t * groups + group[h]]) : zero;
      UNROLL for (int v = 0; v < vectors; v++) {
        const int i = v * LANES;
        const uint8_t *from = codes + (4 * h + i / 16 * 2) * bits;
        const vf value = exact ? unpack_value_vector(AFFINE, bits, from, i % 16, scale, bias)
                               : unscaled_value_vector(bits, from, i % 16);
        UNROLL for (int r = 0; r < rows; r++) {
          sum[r][h * vectors + v] += splat(weights[h][r * TILE + t]) * keep(value);
        }
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int v = 0; v < halves * vectors; v++) {
      float *to = out + r * p->dim + d + v * LANES;
      vf total = sum[r][v];
      if (!exact) {
        total = total * unscaled_factors(bits) + biases[group[v / vectors] * rows + r];
        total += load(to) * k->decay[r];
      }
      store(to, total);
    }
  }
}

INLINE void fused_output_rows(int exact, int bits, int rows, int halves, const packed *p, const value_parts *k,
                              float *out) {
  long d = 0;
  for (; d + 32 * halves <= p->dim; d += 32 * halves) fused_output_block(exact, bits, rows, halves, p, d, k, out);
  for (; d < p->dim; d += 32) fused_output_block(exact, bits, rows, 1, p, d, k, out);
}

/* Weights [rows][TILE] times scales [groups][TILE], and their sums with the biases. */
static void scale_weights(long groups, long rows, const float *weights, const float *scales, const float *biases,
                          float *scaled, float *sums) {
  for (long g = 0; g < groups; g++) {
    for (long r = 0; r < rows; r++) {
      vf sum = {0};
      UNROLL for (int t = 0; t < TILE; t += LANES) {
        const vf weight = load(weights + r * TILE + t);
        store(scaled + (g * rows + r) * TILE + t, weight * load(scales + g * TILE + t));
        sum += weight * load(biases + g * TILE + t);
      }
      sums[g * rows + r] = lanes_sum(sum);
    }
  }
}

/* Dispatch to code made for the very bits and rows. */
#define FOR_FEW_ROWS(CASE, bits) CASE(bits, 1) CASE(bits, 2) CASE(bits, 3) CASE(bits, 4)
#if ROW_BLOCK == 8
#define FOR_ROWS(CASE, bits) FOR_FEW_ROWS(CASE, bits) CASE(bits, 5) CASE(bits, 6) CASE(bits, 7) CASE(bits, 8)
#else
#define FOR_ROWS(CASE, bits) FOR_FEW_ROWS(CASE, bits)
#endif

/* scores [rows][TILE] = q, as prepared, times keys first .. first + count. `work`: see load_key_parts. */
static void fused_score_tile(long rows, const packed *p, long sequence, long head, long first, long count, float *work,
                             const float *q, float *scores) {
  const key_parts k = load_key_parts(p, sequence, head, first, count, work);
#define CASE(bits, rows) \
  case bits * 16 + rows: fused_score_block(bits, rows, p, &k, q, scores); break;
  switch (p->bits * 16 + rows) { FOR_ROWS(CASE, 4) FOR_ROWS(CASE, 8) }
#undef CASE
}

/* out [rows][dim] = out * decay [rows] + weights [rows][TILE] times values first .. first + count. `work`: 4 * groups
   * TILE numbers; `scaled`: groups * rows * (TILE + 1). */
static void fused_output_tile(int exact, long rows, const packed *p, long sequence, long head, long first, long count,
                              float *work, float *scaled, const float *weights, const float *decay, float *out) {
  const long groups = p->dim / p->group_size;
  float *scales = work, *biases = scales + groups * TILE, *by_group = biases + groups * TILE;
  load_scales(p, sequence, head, first, count, scales, biases);
  value_parts k = {row_of(&p->codes, sequence, head, first), weights, scales, biases, decay, count};
  if (!exact) {
    transpose_floats(scales, groups, by_group);
    transpose_floats(biases, groups, by_group + groups * TILE);
    k.weights = scaled, k.biases = scaled + groups * rows * TILE;
    scale_weights(groups, rows, weights, by_group, by_group + groups * TILE, scaled, scaled + groups * rows * TILE);
  }
#define HALVES(rows) (LANES == 16 ? ((rows) == 1 ? 4 : (rows) <= 4 ? 2 : 1) : (rows) == 1 ? 2 : 1)
#define EXACT(bits, rows) \
  case bits * 16 + rows: fused_output_rows(1, bits, rows, HALVES(rows), p, &k, out); break;
#define SCALED(bits, rows) \
  case bits * 16 + rows: fused_output_rows(0, bits, rows, HALVES(rows), p, &k, out); break;
  if (exact) {
    switch (p->bits * 16 + rows) { FOR_FEW_ROWS(EXACT, 4) FOR_FEW_ROWS(EXACT, 8) }
  } else {
    switch (p->bits * 16 + rows) { FOR_ROWS(SCALED, 4) FOR_ROWS(SCALED, 8) }
  }
#undef EXACT
#undef SCALED
  for (long t = 0; t < count; t++) prefetch(k.codes + (TILE + t) * p->codes.row, p->dim / 8 * p->bits);
}

#endif
