/* Vectors of the host's widest registers, by the compiler's vector extensions (gcc and clang), and what is built of them. */
#ifndef QSDPA_VECTOR_H
#define QSDPA_VECTOR_H

#include <stdint.h>
#include <string.h>

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

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf to_float(vu v) { return __builtin_convertvector((vi)v, vf); }

INLINE vf blend(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

INLINE vf larger(vf a, vf b) { return blend(a > b, a, b); }

INLINE float lanes_max(vf v) {
  float m = v[0];
  UNROLL for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
  return m;
}

INLINE float lanes_sum(vf v) {
  float lanes[LANES];
  memcpy(lanes, &v, sizeof v);
  UNROLL for (int half = LANES / 2; half; half /= 2) {
    UNROLL for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  }
  return lanes[0];
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

#endif
