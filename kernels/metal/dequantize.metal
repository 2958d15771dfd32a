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

// Where a row lies, and how far rows lie apart: in elements of its head's codes, scales and biases. 32 bits, since
// Apple GPUs multiply 64-bit integers in 16 cycles; a threadgroup's pointers begin at its first key.
struct RowOffsets {
  uint codes, scales, biases;
};
inline RowOffsets offsets_of_key(uint key, RowOffsets strides) {
  return RowOffsets{key * strides.codes, key * strides.scales, key * strides.biases};
}
// Of the key `keys` after the one at `row`, or of the last.
inline RowOffsets offsets_ahead(RowOffsets row, uint keys, RowOffsets strides, RowOffsets last) {
  return RowOffsets{
      metal::min(row.codes + keys * strides.codes, last.codes),
      metal::min(row.scales + keys * strides.scales, last.scales),
      metal::min(row.biases + keys * strides.biases, last.biases)};
}

// Codes become numbers by masks, and few shifts and no conversions, which take 4 cycles on Apple GPUs where a mask or a
// float operation takes 1: or'ed into the mantissa of 2^10 (a half) or 2^23 (a float), a code that begins at bit b is
// 2^b code more than it. The fma that takes this off again is exact.
constant uint HALF_1024 = 0x6400;
constant uint FLOAT_2_23 = 0x4b000000;

// Two codes, at bit FIRST_BIT of either half of a word.
template <int BITS, int FIRST_BIT>
inline half2 codes_of_halves(uint word) {
  const uint mask = ((1u << BITS) - 1) << FIRST_BIT;
  const half2 x = as_type<half2>((word & (mask | mask << 16)) | (HALF_1024 | HALF_1024 << 16));
  constexpr half unit = half(1.0f / (1 << FIRST_BIT));
  return half2(metal::fma(x.x, unit, -1024.0h * unit), metal::fma(x.y, unit, -1024.0h * unit));
}

// A row's pack as up to three words, which begin at its bits 0, 16 and 32. Of codes of 8 bits: its first and second
// word.
template <int BITS, typename Codes>
inline uint3 load_pack(Codes codes, uint row, uint pack) {
  if (BITS == 4) {
    return uint3(codes[row + pack], 0, 0);
  }
  if (BITS == 8) {
    const auto words = codes + (row + 2 * pack);
    return uint3(words[0], words[1], 0);
  }
  if (BITS == 2) {
    return uint3(retype<ushort>(codes)[2 * row + pack], 0, 0);
  }
  if (BITS == 6) {
    auto h = retype<ushort>(codes) + (2 * row + 3 * pack);
    const uint middle = h[1], last = h[2];
    return uint3(uint(h[0]) | middle << 16, middle | last << 16, last);
  }
  auto b = retype<uchar>(codes) + (4 * row + BITS * pack);
  const uint third = b[2];
  const uint first = uint(b[0]) | uint(b[1]) << 8 | third << 16;
  if (BITS == 3) {
    return uint3(first, third, 0);
  }
  const uint last = b[4];
  return uint3(first, third | uint(b[3]) << 8 | last << 16, last);
}

// The eight codes of a pack.
template <int BITS>
inline void unpack(uint3 words, thread float* codes) {
  if (BITS == 4) {
    const uint upper = words.x >> 8;
    const half2 pairs[4] = {
        codes_of_halves<4, 0>(words.x), codes_of_halves<4, 4>(words.x), codes_of_halves<4, 0>(upper),
        codes_of_halves<4, 4>(upper)};
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < 4; i++) {
      codes[i] = float(pairs[i].x);
      codes[4 + i] = float(pairs[i].y);
    }
  } else if (BITS == 8) {
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < 2; i++) {
      const half2 even = codes_of_halves<8, 0>(words[i]);
      const half2 odd = codes_of_halves<8, 0>(words[i] >> 8);
      codes[4 * i] = float(even.x);
      codes[4 * i + 1] = float(odd.x);
      codes[4 * i + 2] = float(even.y);
      codes[4 * i + 3] = float(odd.y);
    }
  } else {
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < 8; i++) {
      const int first = i * BITS;
      const int word = first + BITS <= 23 ? 0 : first + BITS <= 23 + 16 ? 1 : 2;  // the first with all of the code
      const uint unit = 1u << (first - 16 * word);
      const float x = as_type<float>((words[word] & (((1u << BITS) - 1) * unit)) | FLOAT_2_23);
      codes[i] = metal::fma(x, 1.0f / float(unit), -8388608.0f / float(unit));
    }
  }
}

// Eight numbers of e2m1: its exponent and mantissa are those of a half whose exponent is 14 lower.
inline void unpack_fp4(uint word, thread float* numbers) {
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 4; i++) {
    const uint top = word << (12 - 4 * i);  // a number in the top bits of either half
    const half2 pair = as_type<half2>((top & 0x80008000u) | ((top >> 3) & 0x0e000e00u));
    numbers[i] = float(pair.x * 16384.0h);
    numbers[4 + i] = float(pair.y * 16384.0h);
  }
}

// Eight numbers of e4m3, likewise 8 lower. Quantizing never makes its two NaNs.
inline void unpack_fp8(uint3 words, thread float* numbers) {
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 4; i++) {
    const uint top = i % 2 ? words[i / 2] : words[i / 2] << 8;
    const half2 pair = as_type<half2>((top & 0x80008000u) | ((top >> 1) & 0x3f803f80u));
    numbers[4 * (i / 2) + i % 2] = float(pair.x * 256.0h);
    numbers[4 * (i / 2) + i % 2 + 2] = float(pair.y * 256.0h);
  }
}

template <int MODE, typename Scales>
inline float decode_scale(Scales scales, uint index) {
  if (MODE == MXFP4 || MODE == MXFP8) {
    const uint exponent = uint(scales[index]);
    return as_type<float>(exponent == 0 ? 0x400000u : exponent << 23);  // e8m0
  }
  if (MODE == NVFP4) {
    return float(as_type<half>(ushort(uint(scales[index]) << 7)) * 256.0h);  // e4m3, never negative
  }
  return float(scales[index]);
}

// PACKS packs of one row and group as they are stored, so that they can be read long before they are used.
template <int PACKS>
struct PackedRun {
  uint3 words[PACKS];
  float scale, bias;
};

// The packs from `pack` on. Without stored biases, `biases` is not read.
template <int MODE, int BITS, int GROUP, int PACKS, typename Codes, typename Scales>
inline PackedRun<PACKS> load_run(Codes codes, Scales scales, Scales biases, RowOffsets row, uint pack) {
  PackedRun<PACKS> run;
  const uint group = pack / (GROUP / 8);
  run.scale = decode_scale<MODE>(scales, row.scales + group);
  run.bias = MODE == AFFINE ? float(biases[row.biases + group]) : -run.scale * float(1 << (BITS - 1));
  MLX_MTL_PRAGMA_UNROLL
  for (int p = 0; p < PACKS; p++) {
    run.words[p] = load_pack<BITS>(codes, row.codes, pack + p);
  }
  return run;
}

// Its 8 PACKS numbers.
template <int MODE, int BITS, int PACKS>
inline void dequantize(PackedRun<PACKS> run, thread float* numbers) {
  MLX_MTL_PRAGMA_UNROLL
  for (int p = 0; p < PACKS; p++) {
    thread float* const eight = numbers + 8 * p;
    if (MODE == AFFINE || MODE == SYMMETRIC) {
      unpack<BITS>(run.words[p], eight);
    } else if (BITS == 4) {
      unpack_fp4(run.words[p].x, eight);
    } else {
      unpack_fp8(run.words[p], eight);
    }
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < 8; i++) {
      eight[i] = MODE == AFFINE || MODE == SYMMETRIC ? metal::fma(eight[i], run.scale, run.bias) : run.scale * eight[i];
    }
  }
}

template <int MODE, int BITS, int GROUP, int PACKS, typename Codes, typename Scales>
inline void dequantize(Codes codes, Scales scales, Scales biases, RowOffsets row, uint pack, thread float* numbers) {
  dequantize<MODE, BITS>(load_run<MODE, BITS, GROUP, PACKS>(codes, scales, biases, row, pack), numbers);
}
