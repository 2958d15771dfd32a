/* Sums of four products of bytes in each 32-bit lane, where the processor has one instruction for that: four times as
   many multiply-adds as in float32. */
#ifndef QSDPA_BYTE_DOTS_H
#define QSDPA_BYTE_DOTS_H

#include "vector.h"

#if LANES == 16 && defined(__AVX512VNNI__)
#define HAS_BYTE_DOTS 1
INLINE vi add_byte_dots(vi sum, vu codes, vi digits) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)digits);
}
#elif LANES == 8 && defined(__AVXVNNI__)
#define HAS_BYTE_DOTS 1
INLINE vi add_byte_dots(vi sum, vu codes, vi digits) {
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)digits);
}
#elif LANES == 4 && defined(__ARM_FEATURE_MATMUL_INT8)
#define HAS_BYTE_DOTS 1
#include <arm_neon.h>
INLINE vi add_byte_dots(vi sum, vu codes, vi digits) {
  return (vi)vusdotq_s32((int32x4_t)sum, (uint8x16_t)codes, (int8x16_t)digits);
}
#else
#ifndef HAS_BYTE_DOTS /* a test sets it, to run what only other processors would */
#define HAS_BYTE_DOTS 0
#endif
INLINE vi add_byte_dots(vi sum, vu codes, vi digits) { /* codes are unsigned */
  for (int i = 0; i < LANES; i++) {
    for (int k = 0; k < 4; k++) sum[i] += (int)(codes[i] >> 8 * k & 255) * (int8_t)(digits[i] >> 8 * k);
  }
  return sum;
}
#endif

INLINE vi splat_int(int32_t x) { return (vi){0} + x; }

/* Bytes of 4 x 4 in each 128 bits, transposed: lane k of four gets the bytes k of all. */
INLINE vu transpose_bytes(vu v) {
  typedef uint8_t vb __attribute__((vector_size(4 * LANES)));
  const vb b = (vb)v;
#define COLUMN(n) n, n + 4, n + 8, n + 12
#define QUARTER(n) COLUMN(n), COLUMN(n + 1), COLUMN(n + 2), COLUMN(n + 3)
#if LANES == 16
  return (vu)__builtin_shufflevector(b, b, QUARTER(0), QUARTER(16), QUARTER(32), QUARTER(48));
#elif LANES == 8
  return (vu)__builtin_shufflevector(b, b, QUARTER(0), QUARTER(16));
#else
  return (vu)__builtin_shufflevector(b, b, QUARTER(0));
#endif
#undef QUARTER
#undef COLUMN
}

/* Each of the first four lanes with all those that are a multiple of four after it. */
INLINE vi add_quarters(vi v) {
#if LANES >= 16
  v += SWAP_LANES_8(v);
#endif
#if LANES >= 8
  v += SWAP_LANES_4(v);
#endif
  return v;
}

/* The low bytes of four lanes, in each of the four. */
INLINE vu gather_low_bytes(vu v) {
  v = transpose_bytes(v);
#if LANES == 16
  return __builtin_shufflevector(v, v, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
#elif LANES == 8
  return __builtin_shufflevector(v, v, 0, 0, 0, 0, 4, 4, 4, 4);
#else
  return __builtin_shufflevector(v, v, 0, 0, 0, 0);
#endif
}

#endif
