/* Packed rows of keys and values to float tiles.

   Keys become a transposed tile [dim][TILE]: a vector holds one dimension of LANES keys. The 32-bit words of the rows
   are transposed first; a word vector then gives its codes by constant shifts, at every bit width, codes that straddle
   two words included. Values become a tile [TILE][dim]: a vector holds LANES dimensions of one key. Both are scaled
   here, with one multiply-add for each vector, so that what follows is arithmetic on plain floats. */
#ifndef QSDPA_UNPACK_H
#define QSDPA_UNPACK_H

#include "convert.h"

#define TILE 64 /* keys */

enum { AFFINE, E2M1, E4M3 };

/* A 4-dimensional array: where it starts, and strides in bytes, 0 along axes of size 1. All zero: there is none. */
typedef struct {
  const uint8_t *data;
  int64_t sequence, head, row, column;
} view;

typedef struct {
  int64_t kind, bits, group_size, symmetric, scale_type, dim;
} format;

typedef struct {
  view codes, scales, biases;
  int64_t kind, bits, group_size, symmetric, scale_type, dim;
} packed; /* what the views hold is in the fields of format */

/* Hardware prefetchers stop at a page's end, and a tile of one head is about that long. */
INLINE void prefetch(const uint8_t *from, long size) {
  for (long i = 0; i < size; i += 64) __builtin_prefetch(from + i);
}

INLINE const uint8_t *row_of(const view *v, long sequence, long head, long row) {
  return v->data + sequence * v->sequence + head * v->head + row * v->row;
}

/* Codes to come, which the loops over a tile fetch into the cache as they go, `step` bytes in each round: all at once
   there would be more than a core can wait for, and it would stop. */
typedef struct {
  const uint8_t *next;
  long step;
} coming_codes;

/* `count` rows from `first` on, in so many rounds. */
INLINE coming_codes codes_to_come(const packed *p, long sequence, long head, long first, long count, long rounds) {
  return (coming_codes){row_of(&p->codes, sequence, head, first), count * p->codes.row / rounds};
}

INLINE void fetch_step(coming_codes *c) {
  prefetch(c->next, c->step);
  c->next += c->step;
}

/* The numbers that codes of floating-point formats stand for: sign, exponent and mantissa are moved to a float32's
   places; exponent 0 is read as exponent 1, less its implicit bit. */
INLINE vf decode_minifloat(vu code, int mantissa, int exponent_bias, int bits) {
  vu magnitude = code & ((1u << (bits - 1)) - 1);
  vi subnormal = (vi)(magnitude < (1u << mantissa));
  vu moved = (magnitude << (23 - mantissa)) + ((127u - (unsigned)exponent_bias) << 23);
  moved += (vu)subnormal & (1u << 23);
  vf implicit = (vf)((vu)subnormal & ((128u - (unsigned)exponent_bias) << 23));
  vf value = (vf)moved - implicit;
  return (vf)((vu)value | (code >> (bits - 1)) << 31);
}

INLINE vf decode(vu code, int kind) {
#if LANES == 16 && !defined(__clang__) /* clang looks lanes up one by one */
  if (kind == E2M1) {
    const vf numbers = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    return __builtin_shuffle(numbers, (vi)code);
  }
#endif
  if (kind == E2M1) return decode_minifloat(code, 1, 1, 4);
  if (kind == E4M3) return decode_minifloat(code, 3, 7, 8);
  return to_float(code);
}

/* ---- scales and biases ---- */

/* Scales and biases of `count` rows as floats [TILE][groups]; zeros after the last row. */
static void load_scales(const packed *p, long sequence, long head, long first, long count, float *scales,
                        float *biases) {
  const long groups = p->dim / p->group_size;
  const int type = (int)p->scale_type;
  const int contiguous = p->scales.row == groups * type_size(type);
  const long rows = contiguous ? 1 : count, length = contiguous ? count * groups : groups;
  for (long t = 0; t < rows; t++) {
    to_floats(row_of(&p->scales, sequence, head, first + t), type, length, scales + t * groups);
  }
  if (p->biases.data) {
    const int same = p->biases.row == groups * type_size(type);
    const long bias_rows = same ? 1 : count, bias_length = same ? count * groups : groups;
    for (long t = 0; t < bias_rows; t++) {
      to_floats(row_of(&p->biases, sequence, head, first + t), type, bias_length, biases + t * groups);
    }
  } else {
    const float middle = p->symmetric ? -(float)(1 << (p->bits - 1)) : 0.0f;
    for (long i = 0; i < count * groups; i++) biases[i] = scales[i] * middle;
  }
  memset(scales + count * groups, 0, (size_t)((TILE - count) * groups) * 4);
  memset(biases + count * groups, 0, (size_t)((TILE - count) * groups) * 4);
}

INLINE void transpose_columns(long columns, const float *restrict from, float *restrict to) {
  for (long c = 0; c < columns; c++) {
    for (long t = 0; t < TILE; t++) to[c * TILE + t] = from[t * columns + c];
  }
}

/* [TILE][columns] to [columns][TILE]. The usual numbers of groups become loops of constant strides, which vectorize. */
static void transpose_floats(const float *restrict from, long columns, float *restrict to) {
  switch (columns) {
    case 1: memcpy(to, from, TILE * sizeof *to); break;
    case 2: transpose_columns(2, from, to); break;
    case 4: transpose_columns(4, from, to); break;
    default: transpose_columns(columns, from, to);
  }
}

/* ---- words ---- */

#define ARGS(...) __VA_ARGS__

/* N rows of N words, transposed: log2(N) perfect shuffles of the rows. */
#define DEFINE_TRANSPOSE(N, LOW, HIGH)                                                                     \
  typedef uint32_t words##N __attribute__((vector_size(4 * N)));                                           \
  INLINE void transpose##N(const uint8_t *from, long row, uint32_t *to) {                                  \
    words##N r[N], s[N];                                                                                   \
    UNROLL for (int i = 0; i < N; i++) memcpy(&r[i], from + i * row, sizeof r[i]);                         \
    UNROLL for (int step = 1; step < N; step *= 2) {                                                       \
      UNROLL for (int i = 0; i < N / 2; i++) {                                                             \
        s[2 * i] = __builtin_shufflevector(r[i], r[i + N / 2], LOW);                                       \
        s[2 * i + 1] = __builtin_shufflevector(r[i], r[i + N / 2], HIGH);                                  \
      }                                                                                                    \
      UNROLL for (int i = 0; i < N; i++) r[i] = s[i];                                                      \
    }                                                                                                      \
    UNROLL for (int i = 0; i < N; i++) memcpy(to + i * TILE, &r[i], sizeof r[i]);                          \
  }
DEFINE_TRANSPOSE(4, ARGS(0, 4, 1, 5), ARGS(2, 6, 3, 7))
#if LANES >= 8
DEFINE_TRANSPOSE(8, ARGS(0, 8, 1, 9, 2, 10, 3, 11), ARGS(4, 12, 5, 13, 6, 14, 7, 15))
#endif
#if LANES >= 16
/* The same for sixteen, by the faster shuffles within 128 bits, then those of whole 128 bits. */
INLINE void transpose16(const uint8_t *from, long row, uint32_t *to) {
  vu r[16], s[16];
  UNROLL for (int i = 0; i < 16; i++) r[i] = keep_words(load_words((const uint32_t *)(from + i * row)));
#define FOUR(a, b, c, d, n) (a) + (n), (b) + (n), (c) + (n), (d) + (n)
#define QUARTERS(a, b, c, d) FOUR(a, b, c, d, 0), FOUR(a, b, c, d, 4), FOUR(a, b, c, d, 8), FOUR(a, b, c, d, 12)
#define WHOLE(a) a, (a) + 1, (a) + 2, (a) + 3
  UNROLL for (int i = 0; i < 16; i += 2) {
    s[i] = __builtin_shufflevector(r[i], r[i + 1], QUARTERS(0, 16, 1, 17));
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], QUARTERS(2, 18, 3, 19));
  }
  UNROLL for (int i = 0; i < 16; i += 4) { /* quarter L of r[i + k]: word 4 L + k of rows i .. i + 4 */
    UNROLL for (int k = 0; k < 2; k++) {
      r[i + 2 * k] = __builtin_shufflevector(s[i + k], s[i + k + 2], QUARTERS(0, 1, 16, 17));
      r[i + 2 * k + 1] = __builtin_shufflevector(s[i + k], s[i + k + 2], QUARTERS(2, 3, 18, 19));
    }
  }
  UNROLL for (int k = 0; k < 4; k++) {
    vu t[4];
    UNROLL for (int i = 0; i < 2; i++) {
      t[i] = __builtin_shufflevector(r[8 * i + k], r[8 * i + 4 + k], WHOLE(0), WHOLE(8), WHOLE(16), WHOLE(24));
      t[2 + i] = __builtin_shufflevector(r[8 * i + k], r[8 * i + 4 + k], WHOLE(4), WHOLE(12), WHOLE(20), WHOLE(28));
    }
    UNROLL for (int i = 0; i < 2; i++) {
      const vu low = __builtin_shufflevector(t[2 * i], t[2 * i + 1], WHOLE(0), WHOLE(8), WHOLE(16), WHOLE(24));
      const vu high = __builtin_shufflevector(t[2 * i], t[2 * i + 1], WHOLE(4), WHOLE(12), WHOLE(20), WHOLE(28));
      store_words(to + (4 * i + k) * TILE, low);
      store_words(to + (4 * i + 8 + k) * TILE, high);
    }
  }
#undef FOUR
#undef QUARTERS
#undef WHOLE
}
#endif

INLINE void transpose_block(int n, const uint8_t *from, long row, uint32_t *to) {
#if LANES >= 16
  if (n == 16) transpose16(from, row, to);
#endif
#if LANES >= 8
  if (n == 8) transpose8(from, row, to);
#endif
  if (n == 4) transpose4(from, row, to);
}

/* Whole tile in blocks of n; the last block of columns ends with the row, so that nothing behind it is read. */
INLINE void transpose_tile(int n, const uint8_t *from, long row, long words, coming_codes coming, uint32_t *to) {
  coming.step /= (words + n - 1) / n * (TILE / n);
  for (long c = 0; c < words; c += n) {
    const long column = c + n <= words ? c : words - n;
    for (long t = 0; t < TILE; t += n) {
      const uint8_t *block = from + t * row + column * 4;
      fetch_step(&coming);
      transpose_block(n, block, row, to + column * TILE + t);
    }
  }
}

static void transpose_words(const uint8_t *from, long row, long words, long count, coming_codes coming, uint32_t *to) {
  if (count < TILE || words < 4) {
    for (long w = 0; w < words; w++) {
      for (long t = 0; t < TILE; t++) {
        uint32_t word = 0;
        if (t < count) memcpy(&word, from + t * row + w * 4, 4);
        to[w * TILE + t] = word;
      }
    }
  } else if (LANES >= 16 && words >= 16) {
    transpose_tile(16, from, row, words, coming, to);
  } else if (LANES >= 8 && words >= 8) {
    transpose_tile(8, from, row, words, coming, to);
  } else {
    transpose_tile(4, from, row, words, coming, to);
  }
}

/* ---- keys ---- */

/* 32 dimensions of a tile. scales and biases: [2][TILE], of the first and the second 16 dimensions. */
INLINE void unpack_key_block(int kind, int bits, const uint32_t *words, const float *const scales[2],
                             const float *const biases[2], float *to) {
  const uint32_t mask = (1u << bits) - 1;
  for (int t = 0; t < TILE; t += LANES) {
    UNROLL for (int half = 0; half < 2; half++) {
      const vf scale = load(scales[half] + t), bias = load(biases[half] + t);
      UNROLL for (int i = half * 16; i < half * 16 + 16; i++) {
        const int word = i * bits / 32, shift = i * bits % 32;
        vu code = load_words(words + word * TILE + t) >> shift;
        if (shift + bits > 32) code |= load_words(words + (word + 1) * TILE + t) << (32 - shift);
        if (shift + bits != 32) code &= mask;
        const vf value = decode(code, kind);
        store(to + i * TILE + t, kind == AFFINE ? value * scale + bias : value * scale);
      }
    }
  }
}

INLINE void unpack_key_blocks(int kind, int bits, const packed *p, const uint32_t *words, const float *scales,
                              const float *biases, float *to) {
  for (long d = 0; d < p->dim; d += 32) {
    const long g0 = d / p->group_size * TILE, g1 = (d + 16) / p->group_size * TILE;
    const float *const s[2] = {scales + g0, scales + g1}, *const b[2] = {biases + g0, biases + g1};
    unpack_key_block(kind, bits, words + d / 32 * bits * TILE, s, b, to + d * TILE);
  }
}

typedef struct {
  const uint32_t *words;         /* [words][TILE] */
  const float *scales, *biases; /* [groups][TILE] */
} key_parts;

/* The packed keys first .. first + count, transposed, in `work`: (words + 4 * groups) * TILE numbers. Zeros for the
   keys after them. */
static key_parts load_key_parts(const packed *p, long sequence, long head, long first, long count, float *work) {
  const long groups = p->dim / p->group_size, words = p->dim * p->bits / 32;
  float *rows = work + words * TILE, *scales = rows + 2 * groups * TILE, *biases = scales + groups * TILE;
  load_scales(p, sequence, head, first, count, rows, rows + groups * TILE);
  transpose_floats(rows, groups, scales);
  transpose_floats(rows + groups * TILE, groups, biases);
  const coming_codes coming = codes_to_come(p, sequence, head, first + TILE, TILE, 1);
  transpose_words(row_of(&p->codes, sequence, head, first), p->codes.row, words, count, coming, (uint32_t *)work);
  return (key_parts){(uint32_t *)work, scales, biases};
}

/* Keys first .. first + count as [dim][TILE] in `to`; zeros for the keys after them. `work`: see load_key_parts. */
static void unpack_keys(const packed *p, long sequence, long head, long first, long count, float *work, float *to) {
  const key_parts k = load_key_parts(p, sequence, head, first, count, work);
  switch (p->kind == AFFINE ? p->bits : 100 + p->kind) {
    case 2: unpack_key_blocks(AFFINE, 2, p, k.words, k.scales, k.biases, to); break;
    case 3: unpack_key_blocks(AFFINE, 3, p, k.words, k.scales, k.biases, to); break;
    case 4: unpack_key_blocks(AFFINE, 4, p, k.words, k.scales, k.biases, to); break;
    case 5: unpack_key_blocks(AFFINE, 5, p, k.words, k.scales, k.biases, to); break;
    case 6: unpack_key_blocks(AFFINE, 6, p, k.words, k.scales, k.biases, to); break;
    case 8: unpack_key_blocks(AFFINE, 8, p, k.words, k.scales, k.biases, to); break;
    case 100 + E2M1: unpack_key_blocks(E2M1, 4, p, k.words, k.scales, k.biases, to); break;
    case 100 + E4M3: unpack_key_blocks(E4M3, 8, p, k.words, k.scales, k.biases, to); break;
  }
}

/* ---- values ---- */

INLINE uint64_t bytes_at(const uint8_t *p, int count) { /* 2, 4 or 8 */
  uint64_t x = 0;
  memcpy(&x, p, (size_t)count);
  return x;
}

/* The first or second eight of sixteen dimensions, in the low bits of the result. Reads nothing but the sixteen. */
INLINE uint64_t eight_codes(const uint8_t *sixteen, int second, int bits) {
  if (bits == 3) { /* six bytes, in two loads: put together byte by byte they would be slow to load as one */
    return (bytes_at(sixteen, 4) | bytes_at(sixteen + 4, 2) << 32) >> (second ? 24 : 0);
  }
  return second ? bytes_at(sixteen + 2 * bits - 8, 8) >> (64 - 8 * bits) : bytes_at(sixteen, 8);
}

/* Lane i holds its code in the bits from shift * (i % period) on. */
INLINE vu shifted_codes(vu words, int shift, int period, int bits) {
  vu shifts;
  UNROLL for (int i = 0; i < LANES; i++) shifts[i] = (uint32_t)(i % period * shift);
  return (words >> shifts) & ((1u << bits) - 1);
}

INLINE vu splat_word(uint32_t x) { return (vu){0} + x; }

#if LANES >= 8
/* Lane j holds in its lowest byte the codes of 4 bits of dimensions 2 * (j / 2) and the next, and more above it. */
INLINE vu spread_bytes(const uint8_t *from, int i) {
  typedef uint64_t vu64 __attribute__((vector_size(4 * LANES)));
  typedef uint8_t vu8 __attribute__((vector_size(4 * LANES)));
  const vu8 bytes = (vu8)((vu64){0} + bytes_at(from, 8));
#define LANE(n) n, n, n, n
#define TWO_LANES(n) LANE(n), LANE(n)
  (void)i;
#if LANES == 16
  return (vu)__builtin_shufflevector(bytes, bytes, TWO_LANES(0), TWO_LANES(1), TWO_LANES(18), TWO_LANES(19),
                                     TWO_LANES(36), TWO_LANES(37), TWO_LANES(54), TWO_LANES(55));
#else
  return i ? (vu)__builtin_shufflevector(bytes, bytes, TWO_LANES(4), TWO_LANES(5), TWO_LANES(22), TWO_LANES(23))
           : (vu)__builtin_shufflevector(bytes, bytes, TWO_LANES(0), TWO_LANES(1), TWO_LANES(18), TWO_LANES(19));
#endif
}

/* Of the even and the odd lanes of spread_bytes: where the code lies, and what it is to be multiplied by. */
INLINE vu nibble_masks(void) {
  vu v;
  UNROLL for (int j = 0; j < LANES; j++) v[j] = j % 2 ? 0xf0 : 0x0f;
  return v;
}

INLINE vf nibble_factors(void) {
  vf v;
  UNROLL for (int j = 0; j < LANES; j++) v[j] = j % 2 ? 1.0f / 16 : 1.0f;
  return v;
}
#endif

/* Dimensions i .. i + LANES of the sixteen whose codes start at `from`; i is a multiple of LANES. */
INLINE vu value_codes(int bits, const uint8_t *from, int i) {
  if (bits == 2) return shifted_codes(splat_word((uint32_t)bytes_at(from, 4) >> 2 * i), 2, LANES, 2);
#if LANES == 16
  typedef uint64_t vu64 __attribute__((vector_size(64)));
  if (bits == 4) {
    const vu pairs = (vu)((vu64){0} + bytes_at(from, 8));
    const vu words = __builtin_shufflevector(pairs, pairs, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return shifted_codes(words, 4, 8, 4);
  }
  uint64_t x[2];
  UNROLL for (int k = 0; k < 2; k++) {
    x[k] = eight_codes(from, k, bits);
    if (bits < 8) x[k] = (x[k] & 0xffffffffu) | x[k] >> (4 * bits) << 32; /* four codes in each half */
  }
  const vu low = (vu)((vu64){0} + x[0]), high = (vu)((vu64){0} + x[1]);
  const vu words = __builtin_shufflevector(low, high, 0, 0, 0, 0, 1, 1, 1, 1, 16, 16, 16, 16, 17, 17, 17, 17);
  return shifted_codes(words, bits, 4, bits);
#elif LANES == 8
  typedef uint64_t vu64 __attribute__((vector_size(32)));
  if (bits == 4) return shifted_codes(splat_word((uint32_t)bytes_at(from + i / 2, 4)), 4, 8, 4);
  uint64_t x = eight_codes(from, i / 8, bits);
  if (bits < 8) x = (x & 0xffffffffu) | x >> (4 * bits) << 32;
  const vu halves = (vu)((vu64){0} + x);
  return shifted_codes(__builtin_shufflevector(halves, halves, 0, 0, 0, 0, 1, 1, 1, 1), bits, 4, bits);
#else
  if (bits == 8) return shifted_codes(splat_word((uint32_t)bytes_at(from + i, 4)), 8, 4, 8);
  if (bits == 4) return shifted_codes(splat_word((uint32_t)bytes_at(from + i / 8 * 4, 4) >> i % 8 * 4), 4, 4, 4);
  return shifted_codes(splat_word((uint32_t)(eight_codes(from, i / 8, bits) >> i % 8 * bits)), bits, 4, bits);
#endif
}

/* Codes as numbers, each lane times a factor of its own that unscaled_factors takes back. */
INLINE vf unscaled_value_vector(int bits, const uint8_t *from, int i) {
#if LANES >= 8
  if (bits == 4) return to_float(spread_bytes(from, i) & nibble_masks()); /* no shift: odd ones are 16-fold */
#endif
  return to_float(value_codes(bits, from, i));
}

INLINE vf unscaled_factors(int bits) {
#if LANES >= 8
  if (bits == 4) return nibble_factors();
#endif
  (void)bits;
  return splat(1);
}

INLINE vf unpack_value_vector(int kind, int bits, const uint8_t *from, int i, vf scale, vf bias) {
  if (kind == AFFINE && bits == 4) return unscaled_value_vector(4, from, i) * (scale * unscaled_factors(4)) + bias;
  const vf value = decode(value_codes(bits, from, i), kind);
  return kind == AFFINE ? value * scale + bias : value * scale;
}

INLINE void unpack_value_rows(int kind, int bits, const packed *p, const uint8_t *codes, long count,
                              const float *scales, const float *biases, float *to) {
  const long groups = p->dim / p->group_size, sixteens = p->group_size / 16, skip = p->codes.row - p->dim / 8 * bits;
  for (long t = 0; t < count; t++, codes += skip) {
    prefetch(codes + TILE * p->codes.row, p->dim / 8 * bits);
    for (long g = 0; g < groups; g++) {
      const vf scale = splat(*scales++), bias = splat(*biases++);
      long k = sixteens;
      do { /* two at a time: one group alone has a single sixteen */
        UNROLL for (int i = 0; i < 16; i += LANES, to += LANES) {
          store(to, unpack_value_vector(kind, bits, codes, i, scale, bias));
        }
        codes += 2 * bits;
        if (k == 1) break;
        UNROLL for (int i = 0; i < 16; i += LANES, to += LANES) {
          store(to, unpack_value_vector(kind, bits, codes, i, scale, bias));
        }
        codes += 2 * bits;
        k -= 2;
      } while (k);
    }
  }
}

/* Values first .. first + count as [count][dim] in `to`. `work`: 2 * groups * TILE floats. */
static void unpack_values(const packed *p, long sequence, long head, long first, long count, float *work, float *to) {
  const uint8_t *codes = row_of(&p->codes, sequence, head, first);
  float *scales = work, *biases = work + p->dim / p->group_size * TILE;
  load_scales(p, sequence, head, first, count, scales, biases);
  switch (p->kind == AFFINE ? p->bits : 100 + p->kind) {
    case 2: unpack_value_rows(AFFINE, 2, p, codes, count, scales, biases, to); break;
    case 3: unpack_value_rows(AFFINE, 3, p, codes, count, scales, biases, to); break;
    case 4: unpack_value_rows(AFFINE, 4, p, codes, count, scales, biases, to); break;
    case 5: unpack_value_rows(AFFINE, 5, p, codes, count, scales, biases, to); break;
    case 6: unpack_value_rows(AFFINE, 6, p, codes, count, scales, biases, to); break;
    case 8: unpack_value_rows(AFFINE, 8, p, codes, count, scales, biases, to); break;
    case 100 + E2M1: unpack_value_rows(E2M1, 4, p, codes, count, scales, biases, to); break;
    case 100 + E4M3: unpack_value_rows(E4M3, 8, p, codes, count, scales, biases, to); break;
  }
}

#endif
