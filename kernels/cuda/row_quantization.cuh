// Quantization of new rows, bit for bit as MLX's own kernels do it (mlx/backend/cuda/quantized): the arithmetic, in
// float32, is theirs; so is what becomes of zeros, infinities and NaN.
//
// A thread takes eight numbers, a pack: as many bytes as a code has bits, in a row and hence in the whole output. The
// threads of a group lie next to each other in a warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include "modes.cuh"

namespace qsdpa {

constexpr int PACK = 8;

// Rows [B, heads, L, dim], with their strides in numbers.
template <typename T>
struct Side {
  const T* data;
  int heads;
  long long batch_stride, head_stride, row_stride, stride;
};

// Stored rows [B, planes, N, width], with their strides in elements.
template <typename T>
struct Planes {
  T* data;
  long long batch_stride, plane_stride, row_stride;

  __device__ __forceinline__ T* row(unsigned sequence, unsigned plane, unsigned place) const {
    return data + sequence * batch_stride + plane * plane_stride + place * row_stride;
  }
};

// Numbers `first` to `first + 8` of a row of `DIM`; beyond its end the last one, again and again.
template <int DIM, typename T>
__device__ __forceinline__ void load_pack(float (&x)[PACK], const T* row, long long stride, int first) {
  struct alignas(16) Vector {
    T numbers[16 / sizeof(T)];
  };
  constexpr int WIDTH = 16 / sizeof(T);
  const T* start = row + first;
  if (stride == 1 && first + PACK <= DIM && reinterpret_cast<unsigned long long>(start) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < PACK; i += WIDTH) {
      const Vector v = *reinterpret_cast<const Vector*>(start + i);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) x[i + j] = static_cast<float>(v.numbers[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < PACK; ++i) x[i] = static_cast<float>(row[min(first + i, DIM - 1) * stride]);
  }
}

template <int BITS>
__device__ __forceinline__ void store_pack(unsigned char* out, unsigned long long codes) {
  if constexpr (BITS == 8) {
    *reinterpret_cast<uint2*>(out) = make_uint2(static_cast<unsigned>(codes), static_cast<unsigned>(codes >> 32));
  } else if constexpr (BITS == 4) {
    *reinterpret_cast<unsigned*>(out) = static_cast<unsigned>(codes);
  } else if constexpr (BITS % 2 == 0) {
#pragma unroll
    for (int i = 0; i < BITS / 2; ++i) reinterpret_cast<unsigned short*>(out)[i] = (codes >> (16 * i)) & 0xffff;
  } else {
#pragma unroll
    for (int i = 0; i < BITS; ++i) out[i] = (codes >> (8 * i)) & 0xff;
  }
}

template <typename T>
__device__ __forceinline__ void round_to(float (&x)[PACK]) {
#pragma unroll
  for (int i = 0; i < PACK; ++i) x[i] = static_cast<float>(static_cast<T>(x[i]));
}

// The Hadamard transform of each block of `BLOCK` numbers of a row, as mx.hadamard_transform does it: it rounds to T
// after every four of its steps, and at the end. `pack` is the place of this thread's numbers in the row.
template <int BLOCK, typename T>
__device__ __forceinline__ void rotate(float (&x)[PACK], unsigned pack, float scale) {
  static_assert(BLOCK <= 32 * PACK, "a block must lie within a warp");
#pragma unroll
  for (int apart = 1; apart < BLOCK; apart *= 2) {
    if (apart < PACK) {
#pragma unroll
      for (int i = 0; i < PACK; ++i) {
        if (i & apart) continue;
        const float a = x[i], b = x[i | apart];
        x[i] = a + b;
        x[i | apart] = a - b;
      }
    } else {
      const bool second = pack & (apart / PACK);
#pragma unroll
      for (int i = 0; i < PACK; ++i) {
        const float other = __shfl_xor_sync(0xffffffff, x[i], apart / PACK);
        x[i] = second ? other - x[i] : x[i] + other;
      }
    }
    if (apart == 8 || apart == 128 || 2 * apart == BLOCK) round_to<T>(x);
  }
#pragma unroll
  for (int i = 0; i < PACK; ++i) x[i] *= scale;
  round_to<T>(x);
}

// The smallest and the largest of all numbers of a group; the latter at least 0. NaN are passed over.
template <int LANES>
__device__ __forceinline__ void range_of_group(const float (&x)[PACK], float& low, float& high) {
  low = __int_as_float(0x7f800000);
  high = 0.0f;
#pragma unroll
  for (int i = 0; i < PACK; ++i) {
    low = fminf(low, x[i]);
    high = fmaxf(high, x[i]);
  }
#pragma unroll
  for (int apart = 1; apart < LANES; apart *= 2) {
    low = fminf(low, __shfl_xor_sync(0xffffffff, low, apart));
    high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, apart));
  }
}

template <int LANES>
__device__ __forceinline__ float largest_of_group(const float (&x)[PACK]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < PACK; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
  for (int apart = 1; apart < LANES; apart *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, apart));
  }
  return largest;
}

// The end of the range that is further from zero gets a code of its own, and zero one where it can: the scale is such
// that a whole number of steps lies between them.
template <int BITS>
__device__ __forceinline__ unsigned long long affine_codes(
    const float (&x)[PACK], float low, float high, float& scale, float& bias) {
  constexpr float LAST = (1 << BITS) - 1;
  const bool negative = fabsf(low) > fabsf(high);
  const float edge = negative ? low : high;
  scale = fmaxf((high - low) / LAST, 1e-7f);
  scale = negative ? scale : -scale;
  const float steps = roundf(edge / scale);
  const bool zero = steps == 0.0f;
  scale = zero ? scale : edge / steps;
  bias = zero ? 0.0f : edge;
  unsigned long long codes = 0;
#pragma unroll
  for (int i = 0; i < PACK; ++i) {
    const unsigned code = static_cast<unsigned char>(fminf(roundf((x[i] - bias) / scale), LAST));
    codes |= static_cast<unsigned long long>(code) << (BITS * i);
  }
  return codes;
}

// The least power of two not below `x`, as its exponent (e8m0).
__device__ __forceinline__ unsigned char e8m0_above(float x) {
  const unsigned bits = __float_as_uint(x);
  const unsigned exponent = (bits >> 23) & 0xff, mantissa = bits & 0x7fffff;
  if (exponent == 0xff) return 0xff;
  if (exponent == 0) return mantissa > 0x400000;
  return exponent + (mantissa > 0 && exponent != 0xfe);
}

__device__ __forceinline__ float e8m0_value(unsigned char code) {
  return __uint_as_float(code == 0xff ? 0x7fffffffu : code == 0 ? 0x400000u : static_cast<unsigned>(code) << 23);
}

// To the nearest e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6), of two that are as near to the even code; NaN to the largest.
__device__ __forceinline__ unsigned e2m1_code(float x) {
  const float a = fabsf(x);
  const unsigned sign = isnan(x) ? 0 : __float_as_uint(x) >> 31 << 3;
  return sign | (!(a <= 0.25f) + !(a < 0.75f) + !(a <= 1.25f) + !(a < 1.75f) + !(a <= 2.5f) + !(a < 3.5f) +
                 !(a <= 5.0f));
}

__device__ __forceinline__ unsigned char e4m3_code(float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

template <int MODE>
__device__ __forceinline__ unsigned long long float_codes(const float (&x)[PACK], float largest, unsigned char& scale) {
  float value;
  if constexpr (MODE == NVFP4) {
    scale = e4m3_code(largest / 6.0f);
    value = __half2float(__half(__nv_cvt_fp8_to_halfraw(scale, __NV_E4M3)));
  } else {
    scale = e8m0_above(largest / (MODE == MXFP8 ? 448.0f : 6.0f));
    value = e8m0_value(scale);
  }
  const float inverse = 1.0f / value;
  unsigned long long codes = 0;
#pragma unroll
  for (int i = 0; i < PACK; ++i) {
    const float y = x[i] * inverse;
    const unsigned long long code = MODE == MXFP8 ? e4m3_code(y) : e2m1_code(y);
    codes |= code << ((MODE == MXFP8 ? 8 : 4) * i);
  }
  return codes;
}

// Rows of `DIM` numbers, stored as `PADDED`, and rotated first in blocks of `BLOCK` unless that is 0; `second` has no
// heads where there is one side. There are as many threads as packs, rounded up to whole warps.
//
// codes: [batch, first.heads + second.heads, count, PADDED * BITS / 32] words. scales: [batch, planes, count, PADDED /
// GROUP], where planes are the heads, and where there are biases as many again for them.
template <int BITS, int GROUP, int MODE, int DIM, int PADDED, int BLOCK, typename T, typename Scale>
__device__ __forceinline__ void quantize_rows(
    Side<T> first, Side<T> second, unsigned batch, unsigned count, float rotation_scale, Planes<unsigned> codes,
    Planes<Scale> scales, unsigned thread) {
  constexpr unsigned PACKS = PADDED / PACK, LANES = GROUP / PACK;
  const unsigned first_heads = first.heads, heads = first_heads + second.heads;
  const bool inside = thread < batch * heads * count * PACKS;  // all threads of a warp take part in exchanges
  const unsigned row = inside ? thread / PACKS : 0, pack = thread % PACKS;
  const unsigned place = row % count, plane = row / count, head = plane % heads, sequence = plane / heads;
  const Side<T> side = head < first_heads ? first : second;
  const T* numbers = side.data + sequence * side.batch_stride + place * side.row_stride +
                     (head < first_heads ? head : head - first_heads) * side.head_stride;
  float x[PACK];
  load_pack<DIM>(x, numbers, side.stride, pack * PACK);
  if constexpr (BLOCK != 0) rotate<BLOCK, T>(x, pack, rotation_scale);

  unsigned long long packed;
  const bool leads = inside && pack % LANES == 0;  // of the threads of a group, the one that stores its scale
  if constexpr (MODE == AFFINE) {
    float low, high, scale, bias;
    range_of_group<LANES>(x, low, high);
    packed = affine_codes<BITS>(x, low, high, scale, bias);
    if (leads) {
      scales.row(sequence, head, place)[pack / LANES] = static_cast<Scale>(scale);
      scales.row(sequence, heads + head, place)[pack / LANES] = static_cast<Scale>(bias);
    }
  } else {
    unsigned char scale;
    packed = float_codes<MODE>(x, largest_of_group<LANES>(x), scale);
    if (leads) scales.row(sequence, head, place)[pack / LANES] = scale;
  }
  if (inside) store_pack<BITS>(reinterpret_cast<unsigned char*>(codes.row(sequence, head, place)) + pack * BITS, packed);
}

// The same, into arrays that hold nothing else.
template <int BITS, int GROUP, int MODE, int DIM, int PADDED, int BLOCK, typename T, typename Scale>
__device__ __forceinline__ void quantize_rows(
    Side<T> first, Side<T> second, unsigned batch, unsigned count, float rotation_scale, unsigned* codes, Scale* scales,
    unsigned thread) {
  constexpr long long WORDS = PADDED * BITS / 32, GROUPS = PADDED / GROUP;
  const long long heads = first.heads + second.heads, planes = MODE == AFFINE ? 2 * heads : heads;
  const Planes<unsigned> code_rows{codes, heads * count * WORDS, count * WORDS, WORDS};
  const Planes<Scale> scale_rows{scales, planes * count * GROUPS, count * GROUPS, GROUPS};
  quantize_rows<BITS, GROUP, MODE, DIM, PADDED, BLOCK>(
      first, second, batch, count, rotation_scale, code_rows, scale_rows, thread);
}

}  // namespace qsdpa
