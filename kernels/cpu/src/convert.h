/* Rows of float16, bfloat16 and float32 numbers, and of the 8-bit scales of floating-point formats, to and from float.

   float16 by bit operations, so that no compiler support for it is needed; the loops vectorize. No step makes a
   denormal float32, so a process that flushes those to zero gets the same results. */
#ifndef QSDPA_CONVERT_H
#define QSDPA_CONVERT_H

#include "vector.h"

enum { FLOAT32, FLOAT16, BFLOAT16, SCALE_E8M0, SCALE_E4M3 };

INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

INLINE float half_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13, exponent = bits & 0x0f800000u;
  uint32_t offset = exponent == 0x0f800000u ? 224u << 23 : exponent == 0 ? 113u << 23 : 112u << 23;
  float subnormal = exponent == 0 ? as_float(113u << 23) : 0.0f;
  float magnitude = as_float(bits + offset) - subnormal;
  return as_float(as_bits(magnitude) | (uint32_t)(h & 0x8000) << 16);
}

/* Rounds to nearest even. */
INLINE uint16_t float_to_half(float x) {
  uint32_t bits = as_bits(x), sign = bits & 0x80000000u;
  bits ^= sign;
  uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1)) >> 13;
  uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - (126u << 23); /* the adder rounds at 2^-24 */
  uint32_t h = bits < 113u << 23 ? subnormal : normal;
  h = bits >= 143u << 23 ? (bits > 255u << 23 ? 0x7e00u : 0x7c00u) : h;
  return (uint16_t)(h | sign >> 16);
}

INLINE uint16_t float_to_bfloat(float x) {
  uint32_t bits = as_bits(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 255u << 23 ? bits >> 16 | 0x40u : rounded);
}

INLINE float e8m0_to_float(uint8_t e) { return as_float(e ? (uint32_t)e << 23 : 0x400000u); }

INLINE float e4m3_to_float(uint8_t x) {
  uint32_t bits = (uint32_t)(x & 0x7f) << 20;
  int subnormal = (x & 0x78) == 0;
  float magnitude = as_float(bits + (subnormal ? 121u << 23 : 120u << 23)) - (subnormal ? 0.015625f : 0.0f);
  return as_float(as_bits(magnitude) | (uint32_t)(x & 0x80) << 24);
}

static int type_size(int type) { return type == FLOAT32 ? 4 : type == FLOAT16 || type == BFLOAT16 ? 2 : 1; }

static void halves_to_floats(const uint16_t *from, long n, float *restrict to) {
  long i = 0;
#if LANES == 16 /* one instruction for as many */
  for (; i + 16 <= n; i += 16) store(to + i, (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
#endif
#ifdef __F16C__
  typedef short halves __attribute__((vector_size(16)));
  typedef float floats __attribute__((vector_size(32)));
  for (; i + 8 <= n; i += 8) {
    halves h;
    memcpy(&h, from + i, sizeof h);
    const floats f = __builtin_ia32_vcvtph2ps256(h);
    memcpy(to + i, &f, sizeof f);
  }
#endif
  for (; i < n; i++) to[i] = half_to_float(from[i]);
}

static void to_floats(const uint8_t *from, int type, long n, float *restrict to) {
  const uint16_t *half = (const uint16_t *)from;
  switch (type) {
    case FLOAT32: memcpy(to, from, (size_t)n * 4); break;
    case FLOAT16: halves_to_floats(half, n, to); break;
    case BFLOAT16:
      for (long i = 0; i < n; i++) to[i] = as_float((uint32_t)half[i] << 16);
      break;
    case SCALE_E8M0:
      for (long i = 0; i < n; i++) to[i] = e8m0_to_float(from[i]);
      break;
    case SCALE_E4M3:
      for (long i = 0; i < n; i++) to[i] = e4m3_to_float(from[i]);
      break;
  }
}

static void from_floats(const float *restrict from, int type, long n, uint8_t *to) {
  uint16_t *half = (uint16_t *)to;
  switch (type) {
    case FLOAT32: memcpy(to, from, (size_t)n * 4); break;
    case FLOAT16:
      for (long i = 0; i < n; i++) half[i] = float_to_half(from[i]);
      break;
    case BFLOAT16:
      for (long i = 0; i < n; i++) half[i] = float_to_bfloat(from[i]);
      break;
  }
}

#endif
