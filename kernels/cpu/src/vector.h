/* Vectors of the host's widest registers, by the compiler's vector extensions (gcc and clang), and what is built of
   them. */
#ifndef QSDPA_VECTOR_H
#define QSDPA_VECTOR_H

#include <stdint.h>
#include <string.h>
#ifdef __SSE__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4 /* NEON, SSE2 */
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

INLINE vf load(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE vu load_words(const uint32_t *p) {
  vu v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE void store_words(uint32_t *p, vu v) { memcpy(p, &v, sizeof v); }

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf to_float(vu v) { return __builtin_convertvector((vi)v, vf); }

/* b where a is not a number. */
INLINE vf larger(vf a, vf b) {
#if LANES == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  const vi first = a > b;
  return (vf)(((vi)a & first) | ((vi)b & ~first));
#endif
}

/* Keeps v in a register: compilers like to read it from memory again at each use, and the loads are the bottleneck. */
INLINE vf keep(vf v) {
#if LANES == 16
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

INLINE vu keep_words(vu v) { return (vu)keep((vf)v); }

/* Lane i takes lane i ^ 1, i ^ 2, ... : every lane ends up with all. */
#if LANES == 16
#define SWAP_LANES_8(v) __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define SWAP_LANES_4(v) __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define SWAP_LANES_2(v) __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP_LANES_1(v) __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#elif LANES == 8
#define SWAP_LANES_4(v) __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)
#define SWAP_LANES_2(v) __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)
#define SWAP_LANES_1(v) __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6)
#else
#define SWAP_LANES_2(v) __builtin_shufflevector(v, v, 2, 3, 0, 1)
#define SWAP_LANES_1(v) __builtin_shufflevector(v, v, 1, 0, 3, 2)
#endif

INLINE float lanes_max(vf v) {
#if LANES >= 16
  v = larger(SWAP_LANES_8(v), v);
#endif
#if LANES >= 8
  v = larger(SWAP_LANES_4(v), v);
#endif
  v = larger(SWAP_LANES_2(v), v);
  v = larger(SWAP_LANES_1(v), v);
  return v[0];
}

INLINE float lanes_sum(vf v) {
#if LANES >= 16
  v += SWAP_LANES_8(v);
#endif
#if LANES >= 8
  v += SWAP_LANES_4(v);
#endif
  v += SWAP_LANES_2(v);
  v += SWAP_LANES_1(v);
  return v[0];
}

/* exp(x) for x <= 0, -inf included, to about one unit in the last place; 0 below -87.7. Cody and Waite's reduction by
   ln 2 in two parts, and the polynomial of Cephes' expf. */
INLINE vf exp_nonpositive(vf x) {
  const float round_to_integer = 12582912.0f; /* 1.5 * 2^23: adding it leaves the integer in the low bits */
  x = larger(x, splat(-88.0f));
  vf shifted = x * 1.44269504f + round_to_integer;
  vf n = shifted - round_to_integer;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (vf)(((vu)shifted + 127u) << 23);
}

/* Before returning to code made for SSE, as MLX's and Python's is: with anything in the upper halves of the registers
   it takes twice as long (on Zen 5), and gcc does not clear them on every path. */
INLINE void clear_upper_halves(void) {
#if defined(__AVX__)
  __builtin_ia32_vzeroupper();
#endif
}

#endif
