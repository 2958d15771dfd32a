/* Packed rows of keys and values to tiles of bytes, four codes in each 32-bit lane, for byte_dots.h.

   Keys become [dim / 4][TILE]: a lane holds four dimensions of a key. Values become [TILE / 4][dim]: a lane holds one
   dimension of four keys. Codes of 4 bits stay two to a byte, in half as many rows or columns: the products take them
   apart (code_vector), where the processor has instructions to spare. The order of dimensions in a tile is what is
   cheapest to make; that of values is in order_values, that of keys in order_queries. */
#ifndef QSDPA_CODE_TILES_H
#define QSDPA_CODE_TILES_H

#include "byte_dots.h"
#include "unpack.h"

/* A tile's rows of codes and the distance between them: in place, or for one with fewer keys copied to `rows`, with
   zeros behind them. */
static const uint8_t *tile_rows(const packed *p, long sequence, long head, long first, long count, uint8_t *rows,
                                long *stride) {
  const uint8_t *from = row_of(&p->codes, sequence, head, first);
  const long size = p->dim / 8 * p->bits;
  *stride = p->codes.row;
  if (count == TILE) return from;
  for (long t = 0; t < count; t++) memcpy(rows + t * size, from + t * p->codes.row, (size_t)size);
  memset(rows + count * size, 0, (size_t)((TILE - count) * size));
  *stride = size;
  return rows;
}

/* Vector `i` of a tile's row: of codes of 4 bits, two come from one vector in memory, the low halves of its bytes
   first. */
INLINE vu code_vector(int nibbles, const uint32_t *row, long i) {
  if (!nibbles) return load_words(row + i * LANES);
  return load_words(row + i / 2 * LANES) >> (uint32_t)(i % 2 * 4) & 0x0f0f0f0fu;
}

/* ---- keys ---- */

/* A query in the order of a tile's dimensions: codes of 4 bits come in even and odd ones of eight. */
static void order_queries(long bits, long dim, const float *restrict q, float *restrict to) {
  if (bits != 4) memcpy(to, q, (size_t)dim * sizeof *to);
  for (long d = 0; bits == 4 && d < dim; d += 8) {
    for (long i = 0; i < 4; i++) to[d + i] = q[d + 2 * i], to[d + 4 + i] = q[d + 2 * i + 1];
  }
}

/* 32 dimensions of a tile, from words [bits][TILE]. */
INLINE void spread_key_codes(int bits, const uint32_t *words, uint32_t *to) {
  const uint32_t mask = (1u << bits) - 1;
  for (int t = 0; t < TILE; t += LANES) {
    UNROLL for (int i = 0; i < 32; i += 4) {
      vu codes = {0};
      UNROLL for (int k = 0; k < 4; k++) {
        const int word = (i + k) * bits / 32, shift = (i + k) * bits % 32;
        vu code = load_words(words + word * TILE + t) >> shift;
        if (shift + bits > 32) code |= load_words(words + (word + 1) * TILE + t) << (32 - shift);
        codes |= (code & mask) << 8 * k;
      }
      store_words(to + i / 4 * TILE + t, codes);
    }
  }
}

INLINE void spread_keys(int bits, long dim, const uint32_t *words, uint32_t *to) {
  for (long d = 0; d < dim; d += 32) spread_key_codes(bits, words + d / 32 * bits * TILE, to + d / 4 * TILE);
}

/* Keys first .. first + count in `to`. `work`: dim * TILE bytes; `rows` as many. Fetches the first
   half of the next tile; code_score_tile fetches the other. */
static void load_key_codes(const packed *p, long sequence, long head, long first, long count, uint32_t *work,
                           uint8_t *rows, uint32_t *to) {
  const coming_codes coming = codes_to_come(p, sequence, head, first + TILE, TILE / 2, 1);
  const long words = p->dim * p->bits / 32;
  long stride;
  const uint8_t *from = tile_rows(p, sequence, head, first, count, rows, &stride);
  transpose_words(from, stride, words, TILE, coming, p->bits == 4 || p->bits == 8 ? to : work);
  switch (p->bits) {
    case 2: spread_keys(2, p->dim, work, to); break;
    case 3: spread_keys(3, p->dim, work, to); break;
    case 5: spread_keys(5, p->dim, work, to); break;
    case 6: spread_keys(6, p->dim, work, to); break;
  }
}

/* ---- values ---- */

#define ZIP4(a, b) a, b, a + 1, b + 1, a + 2, b + 2, a + 3, b + 3
#define ZIP8(a, b) ZIP4(a, b), ZIP4(a + 4, b + 4)

/* SIZE bytes of four rows: lane j of vector i, in each 128 bits, gets bytes 4 * i + j of all. */
#define DEFINE_QUADS(SIZE, LOW8, HIGH8, LOW16, HIGH16)                                             \
  typedef uint8_t bytes##SIZE __attribute__((vector_size(SIZE)));                                  \
  typedef uint16_t halves##SIZE __attribute__((vector_size(SIZE)));                                \
  typedef uint32_t quads##SIZE __attribute__((vector_size(SIZE)));                                 \
  INLINE void interleave_quad##SIZE(const uint8_t *from, long row, quads##SIZE *q) {               \
    bytes##SIZE r[4];                                                                              \
    halves##SIZE h[4];                                                                             \
    UNROLL for (int k = 0; k < 4; k++) memcpy(&r[k], from + k * row, SIZE);                        \
    UNROLL for (int k = 0; k < 2; k++) {                                                           \
      h[2 * k] = (halves##SIZE)__builtin_shufflevector(r[2 * k], r[2 * k + 1], LOW8);              \
      h[2 * k + 1] = (halves##SIZE)__builtin_shufflevector(r[2 * k], r[2 * k + 1], HIGH8);         \
    }                                                                                              \
    UNROLL for (int k = 0; k < 2; k++) {                                                           \
      q[2 * k] = (quads##SIZE)__builtin_shufflevector(h[k], h[k + 2], LOW16);                      \
      q[2 * k + 1] = (quads##SIZE)__builtin_shufflevector(h[k], h[k + 2], HIGH16);                 \
    }                                                                                              \
  }                                                                                                \
  INLINE void spread_quad##SIZE(const uint8_t *from, long row, uint32_t *to) {                     \
    quads##SIZE q[4];                                                                              \
    interleave_quad##SIZE(from, row, q);                                                           \
    UNROLL for (int i = 0; i < 4; i++) memcpy(to + i * (SIZE / 4), &q[i], SIZE);                   \
  }
DEFINE_QUADS(16, ARGS(ZIP8(0, 16)), ARGS(ZIP8(8, 24)), ARGS(ZIP4(0, 8)), ARGS(ZIP4(4, 12)))
#if LANES >= 8
DEFINE_QUADS(32, ARGS(ZIP8(0, 32), ZIP8(16, 48)), ARGS(ZIP8(8, 40), ZIP8(24, 56)), ARGS(ZIP4(0, 16), ZIP4(8, 24)),
             ARGS(ZIP4(4, 20), ZIP4(12, 28)))
#endif
#if LANES >= 16
DEFINE_QUADS(64, ARGS(ZIP8(0, 64), ZIP8(16, 80), ZIP8(32, 96), ZIP8(48, 112)),
             ARGS(ZIP8(8, 72), ZIP8(24, 88), ZIP8(40, 104), ZIP8(56, 120)),
             ARGS(ZIP4(0, 32), ZIP4(8, 40), ZIP4(16, 48), ZIP4(24, 56)),
             ARGS(ZIP4(4, 36), ZIP4(12, 44), ZIP4(20, 52), ZIP4(28, 60)))
#endif

/* Bytes that are spread at once: of one group, so that its lanes share scales. */
INLINE long chunk_size(long bits, long group_size) {
  const long size = bits == 4 ? group_size / 2 : group_size;
  return size < 4 * LANES ? size : 4 * LANES;
}

/* A row in a tile's order of dimensions, put in order. `work`: dim numbers. */
static void order_values(const packed *p, float *values, float *work) {
  const long chunk = chunk_size(p->bits, p->group_size), parts = p->bits == 4 ? 2 : 1;
  memcpy(work, values, (size_t)p->dim * sizeof *work);
  long lane = 0; /* of a row of the tile */
  for (long first = 0; first < p->dim / parts; first += chunk) {
    for (long i = 0; i < 4; i++) {
      for (long byte = first + 4 * i; byte < first + chunk; byte += 16) {
        for (long j = 0; j < 4; j++, lane++) {
          const float *from = work + lane / LANES * LANES * parts + lane % LANES;
          for (long part = 0; part < parts; part++) values[(byte + j) * parts + part] = from[part * LANES];
        }
      }
    }
  }
}

INLINE void spread_quad(int chunk, const uint8_t *from, long row, uint32_t *to) {
#if LANES >= 16
  if (chunk == 64) spread_quad64(from, row, to);
#endif
#if LANES >= 8
  if (chunk == 32) spread_quad32(from, row, to);
#endif
  if (chunk == 16) spread_quad16(from, row, to);
}

#if LANES >= 16
/* Two chunks of 32 bytes at once. */
INLINE void spread_two_quads32(const uint8_t *from, long row, uint32_t *to) {
  quads64 q[4];
  interleave_quad64(from, row, q);
  UNROLL for (int i = 0; i < 4; i += 2) {
    const quads64 first =
      __builtin_shufflevector(q[i], q[i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const quads64 second =
      __builtin_shufflevector(q[i], q[i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    store_words(to + 8 * i, first);
    store_words(to + 32 + 8 * i, second);
  }
}
#endif

/* Rows of `size` bytes. */
INLINE void spread_values(int chunk, long size, const uint8_t *from, long row, coming_codes coming, uint32_t *to) {
  coming.step /= TILE / 4;
  for (long t = 0; t < TILE; t += 4, from += 4 * row) {
    long i = 0;
    fetch_step(&coming);
#if LANES >= 16
    if (chunk == 32) {
      for (; i + 64 <= size; i += 64, to += 64) spread_two_quads32(from + i, row, to);
    }
#endif
    for (; i < size; i += chunk, to += chunk) spread_quad(chunk, from + i, row, to);
  }
}

/* Rows of codes of other widths as rows of bytes. */
INLINE void widen_codes(int bits, long dim, const uint8_t *from, long row, uint8_t *to) {
  typedef uint8_t lane_bytes __attribute__((vector_size(LANES)));
  for (long t = 0; t < TILE; t++, from += row) {
    for (long d = 0; d < dim; d += 16) {
      UNROLL for (int i = 0; i < 16; i += LANES, to += LANES) {
        const lane_bytes bytes = __builtin_convertvector(value_codes(bits, from + d / 8 * bits, i), lane_bytes);
        memcpy(to, &bytes, sizeof bytes);
      }
    }
  }
}

/* Values first .. first + count in `to`. `rows` and `wide`: dim * TILE bytes each. Fetches the first
   half of the next tile; code_output_tile fetches the other. */
static void load_value_codes(const packed *p, long sequence, long head, long first, long count, uint8_t *rows,
                             uint8_t *wide, uint32_t *to) {
  long stride;
  const uint8_t *from = tile_rows(p, sequence, head, first, count, rows, &stride);
  const coming_codes coming = codes_to_come(p, sequence, head, first + TILE, TILE / 2, 1);
  switch (p->bits) {
    case 2: widen_codes(2, p->dim, from, stride, wide); break;
    case 3: widen_codes(3, p->dim, from, stride, wide); break;
    case 5: widen_codes(5, p->dim, from, stride, wide); break;
    case 6: widen_codes(6, p->dim, from, stride, wide); break;
  }
  if (p->bits != 4 && p->bits != 8) from = wide, stride = p->dim;
  const long size = p->bits == 4 ? p->dim / 2 : p->dim;
  switch (chunk_size(p->bits, p->group_size)) {
    case 16: spread_values(16, size, from, stride, coming, to); break;
    case 32: spread_values(32, size, from, stride, coming, to); break;
    case 64: spread_values(64, size, from, stride, coming, to); break;
  }
}

#endif
