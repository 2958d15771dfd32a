/* The two products of attention on codes themselves, for affine formats where the processor adds products of bytes.

   Queries, and weights times the values' scales, are made integers times a step for each group, and these are written
   with signed bytes as digits: two for queries of 16 bits, three for float32 ones. Sums over a group are exact; scales,
   steps and biases are applied to them. Three digits stand for float32 numbers, so there is to be no loss in what
   follows either: there codes are taken relative to the one that stands for 0, since a group's bias may be much larger
   than most of its values. */
#ifndef QSDPA_CODE_PRODUCTS_H
#define QSDPA_CODE_PRODUCTS_H

#include "code_tiles.h"

#define CODE_ROWS 4 /* in a block */

/* Queries as digits [rows][dim / 4][4], the last 4 being digits. In each group of a row: what 1 stands for, and the sum
   of its numbers; with three digits, the sum of each digit. */
typedef struct {
  int32_t *digits;
  float *steps, *sums; /* [rows][groups] */
  float *digit_sums;   /* [rows][groups][4] */
} code_queries;

/* Scales of a tile, and what they are relative to: biases, or with three digits the values of the codes next to 0,
   and these codes. All [groups][TILE]. */
typedef struct {
  const float *scales, *biases, *zeros;
} code_scales;

static int can_use_codes(const packed *p) { return HAS_BYTE_DOTS && p->kind == AFFINE && p->group_size >= 32; }

/* ---- digits ---- */

INLINE vf magnitude(vf x) { return (vf)((vu)x & 0x7fffffffu); }

/* The largest integer that fits digits from -127 or -128 to 127. */
INLINE float largest_integer(int digits) { return digits == 2 ? 127.0f * 256 : 127.0f * 65536; }

/* What to multiply numbers by, to have integers; 0 if they are too small. */
INLINE float integers_per_unit(int digits, float largest) {
  return largest > 1e-30f ? largest_integer(digits) / largest : 0;
}

/* Four numbers x, times a factor, as digits: lane k of four has digit k of all, from the lowest on. */
INLINE vi to_digits(int digits, vf x, float factor) {
  if (digits == 2) { /* 1.5 * 2^23 leaves the integer in the low bits */
    return (vi)transpose_bytes((((vu)(x * factor + 12582912.0f)) + 0x80u) ^ 0x80u);
  }
  x *= factor;
  x += (vf)(((vu)x & 0x80000000u) | 0x3f000000u); /* a half, with its sign */
  return (vi)transpose_bytes(((vu)__builtin_convertvector(x, vi) + 0x8080u) ^ 0x8080u);
}

INLINE float largest_of(const float *x, long n) {
  vf largest = {0};
  for (long i = 0; i < n; i += LANES) largest = larger(magnitude(load(x + i)), largest);
  return lanes_max(largest);
}

/* `row`: dim numbers to work with. */
static void prepare_code_queries(int digits, const packed *p, const float *q, long q_row, long rows, float *row,
                                 const code_queries *to) {
  const long groups = p->dim / p->group_size;
  int32_t *out = to->digits;
  for (long r = 0; r < rows; r++, q += q_row) {
    order_queries(p->bits, p->dim, q, row);
    for (long g = 0; g < groups; g++) {
      const float largest = largest_of(row + g * p->group_size, p->group_size);
      const float factor = integers_per_unit(digits, largest);
      vi lane_sums = {0};
      for (long i = 0; i < p->group_size; i += LANES, out += LANES) {
        const vi numbers = digits == 2 ? to_digits(2, load(row + g * p->group_size + i), factor)
                                       : to_digits(3, load(row + g * p->group_size + i), factor);
        memcpy(out, &numbers, sizeof numbers);
        lane_sums = add_byte_dots(lane_sums, splat_word(0x01010101u), numbers);
      }
      const vi sums = add_quarters(lane_sums);
      const double step = largest / (double)largest_integer(digits);
      const double sum = digits == 2 ? sums[0] + 256.0 * sums[1] : sums[0] + 256.0 * sums[1] + 65536.0 * sums[2];
      to->steps[r * groups + g] = (float)step;
      to->sums[r * groups + g] = (float)(sum * step);
      if (digits == 3) {
        for (int k = 0; k < 4; k++) to->digit_sums[(r * groups + g) * 4 + k] = (float)sums[k];
      }
    }
  }
}

/* ---- scales ---- */

/* Rows of two or four 16-bit numbers to [columns][TILE]: a row is a word, which is shifted and cut. */
INLINE void transpose_pairs(const uint8_t *from, uint16_t *to) {
  typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
  for (long t = 0; t < TILE; t += LANES) {
    const vu rows = load_words((const uint32_t *)from + t);
    UNROLL for (int c = 0; c < 2; c++) {
      const halves column = __builtin_convertvector(rows >> 16 * c, halves);
      memcpy(to + c * TILE + t, &column, sizeof column);
    }
  }
}

INLINE void transpose_fours(const uint8_t *from, uint16_t *to) {
  typedef uint64_t words __attribute__((vector_size(4 * LANES)));
  typedef uint16_t halves __attribute__((vector_size(LANES)));
  for (long t = 0; t < TILE; t += LANES / 2) {
    words rows;
    memcpy(&rows, from + t * 8, sizeof rows);
    UNROLL for (int c = 0; c < 4; c++) {
      const halves column = __builtin_convertvector(rows >> 16 * c, halves);
      memcpy(to + c * TILE + t, &column, sizeof column);
    }
  }
}

/* Whole tile of the usual 16-bit numbers in rows without gaps, as floats [columns][TILE]. False for any other. */
static int transpose_halves(const uint8_t *from, long row, int type, long columns, float *to) {
  uint16_t halves[4 * TILE];
  if (type_size(type) != 2 || row != 2 * columns) return 0;
  switch (columns) {
    case 1: to_floats(from, type, TILE, to); return 1;
    case 2: transpose_pairs(from, halves); break;
    case 4: transpose_fours(from, halves); break;
    default: return 0;
  }
  to_floats((const uint8_t *)halves, type, columns * TILE, to);
  return 1;
}

/* `work`: 5 * groups * TILE numbers. */
static code_scales load_code_scales(int digits, const packed *p, long sequence, long head, long first, long count,
                                    float *work) {
  const long groups = p->dim / p->group_size, size = groups * TILE;
  const int type = (int)p->scale_type;
  float *rows = work, *scales = work + 2 * size, *biases = scales + size, *zeros = biases + size;
  prefetch(row_of(&p->scales, sequence, head, first + TILE), size * type_size(type));
  if (p->biases.data) prefetch(row_of(&p->biases, sequence, head, first + TILE), size * type_size(type));
  if (count < TILE || !p->biases.data ||
      !transpose_halves(row_of(&p->scales, sequence, head, first), p->scales.row, type, groups, scales) ||
      !transpose_halves(row_of(&p->biases, sequence, head, first), p->biases.row, type, groups, biases)) {
    load_scales(p, sequence, head, first, count, rows, rows + size);
    transpose_floats(rows, groups, scales);
    transpose_floats(rows + size, groups, biases);
  }
  if (digits == 3) {
    const vf round_to_integer = splat(12582912.0f), highest = splat((float)((1 << p->bits) - 1));
    for (long i = 0; i < size; i += LANES) {
      const vf scale = load(scales + i), bias = load(biases + i);
      vf zero = larger(-bias / scale, (vf){0});
      zero = -larger(-zero, -highest);
      zero = keep(zero + round_to_integer) - round_to_integer;
      store(zeros + i, zero);
      store(biases + i, zero * scale + bias);
    }
  }
  return (code_scales){scales, biases, zeros};
}

/* ---- codes to come ---- */

/* The second half of a tile's rows, in as many rounds as there are vectors of codes in the products with `rows` rows:
   one prefetch to a round at most does not slow them. */
INLINE coming_codes half_tile_to_come(const packed *p, long sequence, long head, long first, long rows) {
  const long rounds = (rows + CODE_ROWS - 1) / CODE_ROWS * (p->dim / 4) * (TILE / LANES);
  return codes_to_come(p, sequence, head, first + TILE / 2, TILE / 2, rounds);
}

INLINE const uint8_t *fetch_vectors(int vectors, const uint8_t *next, long step) {
  UNROLL for (int v = 0; v < vectors; v += 2) __builtin_prefetch(next + v * step);
  return next + vectors * step;
}

/* ---- scores ---- */

/* Adds to scores [rows][TILE], for `vectors` vectors of keys from t on. */
INLINE void code_score_block(int digits, int nibbles, int rows, int vectors, const packed *p, const uint32_t *codes,
                             const code_scales *k, const code_queries *q, long t, coming_codes *coming,
                             float *scores) {
  const long groups = p->dim / p->group_size, words = p->group_size / (nibbles ? 8 : 4);
  const int32_t *numbers = q->digits;
  const uint8_t *next = coming->next;
  const long step = coming->step;
  codes += t;
  for (long g = 0; g < groups; g++) {
    vi sum[CODE_ROWS][3][4];
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int i = 0; i < digits; i++) {
        UNROLL for (int v = 0; v < vectors; v++) sum[r][i][v] = (vi){0};
      }
    }
    for (long word = 0; word < words; word++, codes += TILE) {
      UNROLL for (int part = 0; part < 1 + nibbles; part++, numbers += 4) {
        next = fetch_vectors(vectors, next, step);
        vu code[4];
        UNROLL for (int v = 0; v < vectors; v++) {
          code[v] = keep_words(code_vector(nibbles, codes + v * LANES, part));
        }
        UNROLL for (int r = 0; r < rows; r++) {
          UNROLL for (int i = 0; i < digits; i++) {
            const vi number = splat_int(numbers[r * p->dim + i]);
            UNROLL for (int v = 0; v < vectors; v++) sum[r][i][v] = add_byte_dots(sum[r][i][v], code[v], number);
          }
        }
      }
    }
    UNROLL for (int v = 0; v < vectors; v++) {
      const long at = g * TILE + t + v * LANES;
      const vf scale = load(k->scales + at), bias = load(k->biases + at);
      UNROLL for (int r = 0; r < rows; r++) {
        float *to = scores + r * TILE + t + v * LANES;
        const long group = r * groups + g;
        vf total;
        if (digits == 2) {
          total = __builtin_convertvector((sum[r][1][v] << 8) + sum[r][0][v], vf);
        } else {
          const vf zero = load(k->zeros + at);
          const float *of = q->digit_sums + group * 4;
          vf digit[3];
          UNROLL for (int i = 0; i < 3; i++) digit[i] = __builtin_convertvector(sum[r][i][v], vf) - zero * of[i];
          total = digit[2] * 65536.0f + (digit[1] * 256.0f + digit[0]);
        }
        store(to, load(to) + bias * q->sums[group] + total * (scale * q->steps[group]));
      }
    }
  }
  coming->next = next;
}

INLINE void code_score_rows(int digits, int nibbles, int rows, int vectors, const packed *p, const uint32_t *codes,
                            const code_scales *k, const code_queries *q, coming_codes *coming, float *scores) {
  for (long t = 0; t < TILE; t += vectors * LANES) {
    code_score_block(digits, nibbles, rows, vectors, p, codes, k, q, t, coming, scores);
  }
}

/* Vectors of a block: as many as leave registers for the codes. */
#if LANES == 8
#define CODE_VECTORS(digits, rows) ((rows) == 1 ? 4 : (rows) == 2 ? 2 : 1)
#else
#define CODE_VECTORS(digits, rows) ((rows) == 1 ? 4 : 2)
#endif

/* Dispatch to code made for the very digits, codes and rows. */
#define CODE_CASE(digits, nibbles, rows) (((digits) * 2 + (nibbles)) * 8 + (rows))
#define CODE_CASES(CASE, digits, nibbles) \
  CASE(digits, nibbles, 1) CASE(digits, nibbles, 2) CASE(digits, nibbles, 3) CASE(digits, nibbles, 4)
#define ALL_CODE_CASES(CASE) CODE_CASES(CASE, 2, 0) CODE_CASES(CASE, 2, 1) CODE_CASES(CASE, 3, 0) CODE_CASES(CASE, 3, 1)

/* scores [rows][TILE] += q times a tile of keys. */
static void code_score_tile(int digits, long rows, const packed *p, const uint32_t *codes, const code_scales *k,
                            code_queries q, coming_codes coming, float *scores) {
  const long groups = p->dim / p->group_size;
#define CASE(digits, nibbles, rows)                                                                       \
  case CODE_CASE(digits, nibbles, rows):                                                                  \
    code_score_rows(digits, nibbles, rows, CODE_VECTORS(digits, rows), p, codes, k, &q, &coming, scores); \
    break;
  for (; rows > 0; rows -= CODE_ROWS) {
    switch (CODE_CASE(digits, p->bits == 4, rows < CODE_ROWS ? rows : CODE_ROWS)) { ALL_CODE_CASES(CASE) }
    q.digits += CODE_ROWS * p->dim, q.steps += CODE_ROWS * groups, q.sums += CODE_ROWS * groups;
    q.digit_sums += CODE_ROWS * groups * 4, scores += CODE_ROWS * TILE;
  }
#undef CASE
}

/* ---- outputs ---- */

/* Weights of a tile times the scales of a group, as digits [rows][TILE / 4][4]; for each row what 1 stands for, what
   the biases come to, and with three digits, those of the codes next to 0. */
typedef struct {
  int32_t *digits;
  float *steps, *sums, *zeros; /* [rows], [rows], [rows][4] */
} code_weights;

INLINE void prepare_code_weights(int digits, long rows, const float *weights, const float *scales,
                                 const float *biases, const float *zeros, const code_weights *to) {
  int32_t *out = to->digits;
  vu zero_codes[TILE / LANES];
  if (digits == 3) {
    for (int v = 0; v < TILE / LANES; v++) {
      zero_codes[v] = gather_low_bytes((vu)__builtin_convertvector(load(zeros + v * LANES), vi));
    }
  }
  for (long r = 0; r < rows; r++, weights += TILE, out += TILE) {
    vf scaled[TILE / LANES], largest = {0}, sum = {0};
    UNROLL for (int v = 0; v < TILE / LANES; v++) {
      const vf weight = load(weights + v * LANES);
      scaled[v] = weight * load(scales + v * LANES);
      sum += weight * load(biases + v * LANES);
      largest = larger(magnitude(scaled[v]), largest);
    }
    const float high = lanes_max(largest), factor = integers_per_unit(digits, high);
    to->steps[r] = high / largest_integer(digits);
    to->sums[r] = lanes_sum(sum);
    vi of_zeros = {0};
    UNROLL for (int v = 0; v < TILE / LANES; v++) {
      const vi numbers = to_digits(digits, scaled[v], factor);
      memcpy(out + v * LANES, &numbers, sizeof numbers);
      if (digits == 3) of_zeros = add_byte_dots(of_zeros, zero_codes[v], numbers);
    }
    if (digits == 3) {
      float *zero = to->zeros + 4 * r;
      for (int i = 0; i < 4; i++) zero[i] = 0;
      for (int i = 0; i < LANES; i++) zero[i % 4] += (float)of_zeros[i];
    }
  }
}

/* `vectors` vectors, from dimension d on, of `rows` output rows: out = out * decay + weights * values. */
INLINE void code_output_block(int digits, int nibbles, int rows, int vectors, const uint32_t *codes, long dim, long d,
                              const code_weights *w, const float *decay, coming_codes *coming, float *out) {
  const long first = nibbles && vectors % 2 ? d / LANES % 2 : 0; /* whether it starts with the high halves of bytes */
  vi sum[CODE_ROWS][3][4];
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int i = 0; i < digits; i++) {
      UNROLL for (int v = 0; v < vectors; v++) sum[r][i][v] = (vi){0};
    }
  }
  codes += nibbles ? (d / LANES - first) / 2 * LANES : d;
  out += d;
  const int32_t *numbers = w->digits;
  const uint8_t *next = coming->next;
  const long step = coming->step;
  for (long quad = 0; quad < TILE / 4; quad++, codes += dim / (1 + nibbles), numbers += 4) {
    next = fetch_vectors(vectors, next, step);
    vu code[4];
    UNROLL for (int v = 0; v < vectors; v++) code[v] = keep_words(code_vector(nibbles, codes, first + v));
    UNROLL for (int r = 0; r < rows; r++) {
      UNROLL for (int i = 0; i < digits; i++) {
        const vi number = splat_int(numbers[r * TILE + i]);
        UNROLL for (int v = 0; v < vectors; v++) sum[r][i][v] = add_byte_dots(sum[r][i][v], code[v], number);
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    UNROLL for (int v = 0; v < vectors; v++) {
      float *to = out + r * dim + v * LANES;
      vf total;
      if (digits == 2) {
        total = __builtin_convertvector((sum[r][1][v] << 8) + sum[r][0][v], vf);
      } else {
        vf digit[3];
        UNROLL for (int i = 0; i < 3; i++) digit[i] = __builtin_convertvector(sum[r][i][v], vf) - w->zeros[4 * r + i];
        total = digit[2] * 65536.0f + (digit[1] * 256.0f + digit[0]);
      }
      store(to, load(to) * decay[r] + (total * w->steps[r] + w->sums[r]));
    }
  }
  coming->next = next;
}

/* The dimensions of a group from d on. */
INLINE void code_output_rows(int digits, int nibbles, int rows, int vectors, const uint32_t *codes, const packed *p,
                             long d, const code_weights *w, const float *decay, coming_codes *coming, float *out) {
  const long end = d + p->group_size;
  for (; d + vectors * LANES <= end; d += vectors * LANES) {
    code_output_block(digits, nibbles, rows, vectors, codes, p->dim, d, w, decay, coming, out);
  }
  if (vectors > 2 && d < end) code_output_block(digits, nibbles, rows, 2, codes, p->dim, d, w, decay, coming, out);
}

/* out [rows][dim] = out * decay [rows] + weights [rows][TILE] times a tile of values; dimensions in a
   tile's order. */
static void code_output_tile(int digits, long rows, const packed *p, const uint32_t *codes, const code_scales *k,
                             const float *weights, const float *decay, const code_weights *memory, coming_codes coming,
                             float *out) {
#define CASE(digits, nibbles, rows)                                                                          \
  case CODE_CASE(digits, nibbles, rows):                                                                     \
    code_output_rows(digits, nibbles, rows, CODE_VECTORS(digits, rows), codes, p, d, &w, decay + r, &coming, \
                     out + r * p->dim);                                                                      \
    break;
  for (long d = 0, g = 0; d < p->dim; d += p->group_size, g++) {
    const long at = g * TILE;
    if (digits == 2) {
      prepare_code_weights(2, rows, weights, k->scales + at, k->biases + at, NULL, memory);
    } else {
      prepare_code_weights(3, rows, weights, k->scales + at, k->biases + at, k->zeros + at, memory);
    }
    code_weights w = *memory;
    for (long r = 0; r < rows; r += CODE_ROWS) {
      switch (CODE_CASE(digits, p->bits == 4, rows - r < CODE_ROWS ? rows - r : CODE_ROWS)) { ALL_CODE_CASES(CASE) }
      w.digits += CODE_ROWS * TILE, w.steps += CODE_ROWS, w.sums += CODE_ROWS, w.zeros += 4 * CODE_ROWS;
    }
  }
#undef CASE
}

#endif
