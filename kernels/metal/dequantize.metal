// Packed codes to floats.
//
// A row is a little-endian stream of codes over 32-bit words. Eight consecutive codes are a pack: as many bytes as a
// code has bits, so that a pack starts at a whole byte at every width, and never crosses a group.

enum Mode { AFFINE, SYMMETRIC, MXFP4, MXFP8, NVFP4 };

// A pointer to another type in the same address space: MLX passes inputs of fewer than 8 elements as constants.
template <typename U, typename T>
inline const device U* retype(const device T* p) {
  return (const device U*)p;
}
template <typename U, typename T>
inline const constant U* retype(const constant T* p) {
  return (const constant U*)p;
}

// The bits of a pack, from bit 0 of `x` to bit 31 of `y`.
template <int BITS, typename Codes>
inline uint2 load_pack(Codes row, int pack) {
  if (BITS == 4) {
    return uint2(row[pack], 0);
  }
  if (BITS == 8) {
    return uint2(row[2 * pack], row[2 * pack + 1]);
  }
  if (BITS == 2) {
    return uint2(retype<ushort>(row)[pack], 0);
  }
  if (BITS == 6) {
    auto h = retype<ushort>(row) + 3 * pack;
    return uint2(uint(h[0]) | uint(h[1]) << 16, h[2]);
  }
  auto b = retype<uchar>(row) + BITS * pack;
  uint low = uint(b[0]) | uint(b[1]) << 8 | uint(b[2]) << 16;
  if (BITS == 3) {
    return uint2(low, 0);
  }
  return uint2(low | uint(b[3]) << 24, b[4]);
}

// Code `i` of a pack; `i` is known at compile time once loops are unrolled.
template <int BITS>
inline uint code_of(uint2 pack, int i) {
  const uint mask = (1u << BITS) - 1;
  const int first = i * BITS;
  if (first + BITS <= 32) {
    return (pack.x >> first) & mask;
  }
  if (first >= 32) {
    return (pack.y >> (first - 32)) & mask;
  }
  return (pack.x >> first | pack.y << (32 - first)) & mask;
}

// e2m1: its exponent and mantissa are those of a half whose exponent is 14 lower.
inline float decode_fp4(uint code) {
  half magnitude = as_type<half>(ushort((code & 7) << 9)) * 16384.0h;
  return float(code & 8 ? -magnitude : magnitude);
}

// e4m3, likewise 8 lower. Quantizing never makes its two NaNs.
inline float decode_fp8(uint code) {
  half magnitude = as_type<half>(ushort((code & 127) << 7)) * 256.0h;
  return float(code & 128 ? -magnitude : magnitude);
}

template <int MODE, typename Scales>
inline float decode_scale(Scales scales, int group) {
  if (MODE == MXFP4 || MODE == MXFP8) {
    uint exponent = uint(scales[group]);
    return as_type<float>(exponent == 0 ? 0x400000u : exponent << 23);  // e8m0
  }
  if (MODE == NVFP4) {
    return decode_fp8(uint(scales[group]));
  }
  return float(scales[group]);
}

// The eight numbers of `pack` of a row. Without stored biases, `biases` is not read.
template <int MODE, int BITS, int GROUP, typename Codes, typename Scales>
inline void dequantize_pack(Codes codes, Scales scales, Scales biases, int pack, thread float* values) {
  const uint2 bits = load_pack<BITS>(codes, pack);
  const int group = pack * 8 / GROUP;
  const float scale = decode_scale<MODE>(scales, group);
  const float bias = MODE == AFFINE ? float(biases[group]) : -scale * float(1 << (BITS - 1));
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 8; i++) {
    const uint code = code_of<BITS>(bits, i);
    if (MODE == AFFINE || MODE == SYMMETRIC) {
      values[i] = metal::fma(float(code), scale, bias);
    } else {
      values[i] = scale * (BITS == 4 ? decode_fp4(code) : decode_fp8(code));
    }
  }
}
