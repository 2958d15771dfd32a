// Quantization of new rows, bit for bit as MLX's own kernels do it (quantized.h and fp_quantized.h): the arithmetic, in
// float, is theirs.
//
// A thread takes eight numbers, a pack: as many bytes as a code has bits, in a row and hence in the whole output. The
// threads of a group lie next to each other in a SIMD-group.

enum Mode { AFFINE, SYMMETRIC, MXFP4, MXFP8, NVFP4 };

// Rows [B, heads, L, dim], with their strides in numbers.
template <typename T>
struct Side {
  const device T* data;
  int heads;
  int64_t batch_stride, head_stride, row_stride, stride;
};

template <int BITS>
inline void store_pack(device uchar* out, ulong codes) {
  if (BITS == 4) {
    *(device uint*)out = uint(codes);
  } else if (BITS == 8) {
    ((device uint*)out)[0] = uint(codes);
    ((device uint*)out)[1] = uint(codes >> 32);
  } else if (BITS % 2 == 0) {
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < BITS / 2; i++) {
      ((device ushort*)out)[i] = ushort(codes >> (16 * i));
    }
  } else {
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < BITS; i++) {
      out[i] = uchar(codes >> (8 * i));
    }
  }
}

template <typename T>
inline void round_to(thread float* x) {
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 8; i++) {
    x[i] = float(static_cast<T>(x[i]));
  }
}

// The Hadamard transform of each block of `BLOCK` numbers of a row, as mx.hadamard_transform does it: it rounds to T
// after every four of its steps, and at the end. `pack` is the place of this thread's numbers in the row.
template <int BLOCK, typename T>
inline void rotate_block(thread float* x, uint pack, float scale) {
  MLX_MTL_PRAGMA_UNROLL
  for (int apart = 1; apart < BLOCK; apart *= 2) {
    if (apart < 8) {
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < 8; i++) {
        if ((i & apart) == 0) {
          const float a = x[i], b = x[i | apart];
          x[i] = a + b;
          x[i | apart] = a - b;
        }
      }
    } else {
      const bool second = (pack & uint(apart / 8)) != 0;
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < 8; i++) {
        const float other = simd_shuffle_xor(x[i], ushort(apart / 8));
        x[i] = second ? other - x[i] : x[i] + other;
      }
    }
    if (apart == 8 || apart == 128 || 2 * apart == BLOCK) {
      round_to<T>(x);
    }
  }
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 8; i++) {
    x[i] *= scale;
  }
  round_to<T>(x);
}

template <int LANES>
inline float least_of_group(float x) {
  MLX_MTL_PRAGMA_UNROLL
  for (int apart = 1; apart < LANES; apart *= 2) {
    x = metal::min(x, simd_shuffle_xor(x, ushort(apart)));
  }
  return x;
}

template <int LANES>
inline float largest_of_group(float x) {
  MLX_MTL_PRAGMA_UNROLL
  for (int apart = 1; apart < LANES; apart *= 2) {
    x = metal::max(x, simd_shuffle_xor(x, ushort(apart)));
  }
  return x;
}

// The end of the range that is further from zero gets a code of its own, and zero one where it can: the scale is such
// that a whole number of steps lies between them.
template <int BITS>
inline ulong affine_codes(thread const float* x, float low, float high, thread float& scale, thread float& bias) {
  const float last = (1 << BITS) - 1;
  const bool negative = metal::abs(low) > metal::abs(high);
  const float edge = negative ? low : high;
  scale = metal::max((high - low) / last, 1e-7f);
  scale = negative ? scale : -scale;
  const float steps = metal::round(edge / scale);
  const bool zero = steps == 0.0f;
  scale = zero ? scale : edge / steps;
  bias = zero ? 0.0f : edge;
  ulong codes = 0;
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 8; i++) {
    const uchar code = uchar(metal::min(metal::round((x[i] - bias) / scale), last));
    codes |= ulong(code) << (BITS * i);
  }
  return codes;
}

inline float e8m0_value(uint code) {
  return as_type<float>(code == 0 ? 0x400000u : code << 23);
}

// The least power of two not below `x`, as its exponent (e8m0).
inline uint e8m0_above(float x) {
  const uint code = (as_type<uint>(x) >> 23) & 0xff;
  return code + uint(code < 0xfe && e8m0_value(code) < x);
}

// To the nearest e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6), of two that are as near to the even code; NaN to the largest.
inline uint e2m1_code(float x) {
  const float a = metal::abs(x);
  const uint sign = metal::isnan(x) ? 0 : as_type<uint>(x) >> 31 << 3;
  return sign | (uint(!(a <= 0.25f)) + uint(!(a < 0.75f)) + uint(!(a <= 1.25f)) + uint(!(a < 1.75f)) +
                 uint(!(a <= 2.5f)) + uint(!(a < 3.5f)) + uint(!(a <= 5.0f)));
}

// To the nearest e4m3, of two that are as near to the even code; beyond 448 to that. Below 2^-6 it has steps of 2^-9,
// as float has at 2^14.
inline uint e4m3_code(float x) {
  const uint bits = as_type<uint>(x);
  const uint a = bits & 0x7fffffff;
  uint code;
  if (a >= as_type<uint>(448.0f)) {
    code = 0x7e;
  } else if (a < as_type<uint>(0.015625f)) {
    code = as_type<uint>(as_type<float>(a) + 16384.0f) - as_type<uint>(16384.0f);
  } else {
    code = (a + 0x7ffff + ((a >> 20) & 1) - (120u << 23)) >> 20;
  }
  return code | (bits >> 31 << 7);
}

inline float e4m3_value(uint code) {
  return float(as_type<half>(ushort(code << 7)) * 256.0h);
}

template <int MODE>
inline ulong float_codes(thread const float* x, float largest, thread uint& scale) {
  float value;
  if (MODE == NVFP4) {
    scale = e4m3_code(largest / 6.0f);
    value = e4m3_value(scale);
  } else {
    scale = e8m0_above(largest / (MODE == MXFP8 ? 448.0f : 6.0f));
    value = e8m0_value(scale);
  }
  const float inverse = value == 0 ? 0.0f : 1.0f / value;
  ulong codes = 0;
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 8; i++) {
    const float y = x[i] * inverse;
    codes |= ulong(MODE == MXFP8 ? e4m3_code(y) : e2m1_code(y)) << ((MODE == MXFP8 ? 8 : 4) * i);
  }
  return codes;
}

// Rows of `DIM` numbers, stored as `PADDED` (the last number again and again), and rotated first in blocks of `BLOCK`
// unless that is 0; `second` has no heads where there is one side. There are as many threads as packs, rounded up to
// whole SIMD-groups.
//
// codes: [batch, first.heads + second.heads, count, PADDED * BITS / 8] bytes. scales: [batch, planes, count, PADDED /
// GROUP], where planes are the heads, and where there are biases as many again for them.
template <int BITS, int GROUP, int MODE, int DIM, int PADDED, int BLOCK, typename T, typename Scale>
inline void quantize_rows(
    Side<T> first,
    Side<T> second,
    uint batch,
    uint count,
    float rotation_scale,
    device uint* codes,
    device Scale* scales,
    uint thread_index) {
  const uint packs = PADDED / 8, lanes = GROUP / 8, groups = PADDED / GROUP;
  const uint first_heads = first.heads, heads = first_heads + second.heads;
  const bool inside = thread_index < batch * heads * count * packs;  // all threads take part in exchanges
  const uint row = inside ? thread_index / packs : 0, pack = thread_index % packs;
  const uint place = row % count, plane = row / count, head = plane % heads, sequence = plane / heads;
  const bool is_first = head < first_heads;
  const Side<T> side = is_first ? first : second;
  const device T* numbers = side.data + sequence * side.batch_stride + place * side.row_stride +
                            (is_first ? head : head - first_heads) * side.head_stride;
  float x[8];
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 8; i++) {
    x[i] = float(numbers[metal::min(int(pack) * 8 + i, DIM - 1) * side.stride]);
  }
  if (BLOCK != 0) {
    rotate_block<BLOCK, T>(x, pack, rotation_scale);
  }

  ulong packed;
  const bool leads = inside && pack % lanes == 0;  // of the threads of a group, the one that stores its scale
  if (MODE == AFFINE) {
    float low = Limits<float>::max, high = 0.0f, scale, bias;
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < 8; i++) {
      low = metal::min(low, x[i]);
      high = metal::max(high, x[i]);
    }
    low = least_of_group<GROUP / 8>(low);
    high = largest_of_group<GROUP / 8>(high);
    packed = affine_codes<BITS>(x, low, high, scale, bias);
    if (leads) {
      device Scale* out = scales + ((sequence * 2ul * heads + head) * count + place) * groups + pack / lanes;
      out[0] = static_cast<Scale>(scale);
      out[ulong(heads) * count * groups] = static_cast<Scale>(bias);
    }
  } else {
    float largest = 0.0f;
    uint scale;
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < 8; i++) {
      largest = metal::max(largest, metal::abs(x[i]));
    }
    packed = float_codes<MODE>(x, largest_of_group<GROUP / 8>(largest), scale);
    if (leads) {
      scales[thread_index / lanes] = static_cast<Scale>(scale);
    }
  }
  if (inside) {
    store_pack<BITS>((device uchar*)codes + ulong(thread_index) * BITS, packed);
  }
}
