// How the codes of each storage format become operands of matrix products, exactly. Scales stay out of the products.
//
// As halves: affine codes as integers, floating-point codes as their value times a power of two (CODE_FACTOR undoes it,
// in float32). Unpacking puts a field of a code word into the mantissa of 1024.0 (0x6400) with one AND-OR; a fused
// multiply-add then takes the 1024 off and the position of the field within the mantissa out. Raw, a field is masked
// and no more: as a subnormal half it is the integer times a power of two. Products take it exactly, but add it up with
// the precision of the smallest normal half, some 2e-5 of the sum: enough for queries of 16 bits.
//
// As bytes (keys, where queries have 16 bits): the codes plus BYTE_CENTER, a few ANDs away from the code words.
//
// Two arrangements of a block of 32 dimensions:
//   keys   (rows of an A operand are keys): lane t of a quad holds 8 dimensions of key r, as 4 pairs of halves or as 2
//          fours of bytes; key_dim() and byte_place() say which. The contraction may run in any order as long as the
//          queries follow it.
//   values (rows of an A operand are dimensions): lane (r, t) holds 4 dimensions of the keys 2t and 2t+1, the two keys
//          in the two halves of a register.
#pragma once
#include "modes.cuh"
#include "ptx.cuh"

namespace qsdpa {

// Bits of the half that equals `v`, an integer of 1 to 2048.
__device__ constexpr u32 half_bits(int v) {
  int e = 0;
  while ((v >> e) > 1) ++e;
  return static_cast<u32>((15 + e) << 10) | static_cast<u32>(((v - (1 << e)) << 10) >> e);
}

template <int BITS_, int GROUP_, int MODE_, typename Scale_>
struct Format {
  using Scale = Scale_;
  static constexpr int BITS = BITS_;
  static constexpr int GROUP = GROUP_;
  static constexpr int MODE = MODE_;
  static constexpr bool HAS_BIAS = MODE == AFFINE;
  // nvfp4's groups of 16 are narrower than a block, so its scales go into the unpacked halves (exactly), but where a
  // kernel can tell the groups apart.
  static constexpr bool SCALED_CODES = MODE == NVFP4;
  static constexpr float CODE_FACTOR = MODE == MXFP4 ? 16384.0f : MODE == MXFP8 || MODE == NVFP4 ? 256.0f : 1.0f;
  // A 16-byte unit of 2-bit codes is two blocks: worth it where both lie in one group.
  static constexpr bool PAIRED_BLOCKS = BITS == 2 && GROUP >= 64;
  static constexpr int CENTER = MODE == SYMMETRIC ? 1 << (BITS - 1) : 0;
  // Blocks of 32 dimensions in a 16-byte unit, where units are loaded as matrices of words; 0 where they are not.
  static constexpr int UNIT_BLOCKS = PAIRED_BLOCKS ? 2 : BITS == 4 ? 1 : 0;
  static constexpr bool MATRICES = BITS == 8 || UNIT_BLOCKS > 0;

  static constexpr bool HAS_BYTES = MODE == AFFINE || MODE == SYMMETRIC || MODE == MXFP4;
  static constexpr bool SIGNED_BYTES = MODE == MXFP4;  // looked up: twice the value, less 64
  static constexpr int BYTE_CENTER = MODE == MXFP4 ? -64 : CENTER;  // what a byte is more than its code
  static constexpr float BYTE_FACTOR = MODE == MXFP4 ? 0.5f : 1.0f;
  // Nibble c: where code c of a lane's 8 goes in its two registers.
  static constexpr u32 CODE_PLACES = MODE == MXFP4 ? 0x76543210u
                                     : BITS == 3   ? 0x32751640u
                                     : BITS == 5   ? 0x67325140u
                                     : BITS == 6   ? 0x16732540u
                                                   : 0x73625140u;
  // Nibble c: the bit of its byte at which code c begins. Its query is that much smaller.
  static constexpr u32 CODE_SHIFT = BITS == 3 ? 0x02111000u : BITS == 5 ? 0x01102200u : BITS == 6 ? 0x20202020u : 0;
  // Whether fields of values may stay where they lie, as halves that are subnormal.
  static constexpr bool HAS_RAW_VALUES = MODE == AFFINE;
  // Whether load_raw_keys() takes them.
  static constexpr bool HAS_RAW_KEYS = MATRICES && (MODE == AFFINE || MODE == SYMMETRIC);
  // The factor that register j of load_values() wants: by the bit at which its field begins, if it is raw.
  __device__ static constexpr float value_factor(int j, bool raw) {
    const int bit = BITS == 8   ? 0
                    : BITS == 5 ? j % 2 * 5
                    : BITS == 3 ? (j < 3 ? 3 * j : 6)
                    : BITS == 2 ? 2 * j
                                : j % 2 * 4;
    return raw ? static_cast<float>(1 << (24 - bit)) : CODE_FACTOR;
  }
  __device__ static constexpr int groups(int dim) { return dim / GROUP; }
  __device__ static constexpr int row_bytes(int dim) { return dim * BITS / 8; }
};

// Field at bit S0 of the low half and at bit S1 of the high half, as a pair of exact integers less CENTER. RAW: as they
// lie there, which as subnormal halves are the integers times 2^(S0 - 24) and 2^(S1 - 24).
template <typename F, int S0, int S1, bool RAW = false>
__device__ __forceinline__ u32 take_fields(u32 w) {
  static_assert(S0 + F::BITS <= 10 && S1 + F::BITS <= 10, "a field must lie within the mantissa");
  constexpr u32 field = (1u << F::BITS) - 1;
  constexpr u32 mask = (field << S0) | (field << (16 + S1));
  if constexpr (RAW) {
    return w & mask;
  } else {
    constexpr u32 step = ((15u - S0) << 10) | ((15u - S1) << 26);
    constexpr u32 base =
        0x80008000u | half_bits((1024 >> S0) + F::CENTER) | (half_bits((1024 >> S1) + F::CENTER) << 16);
    return fma_half2(and_or(w, mask, 0x64006400u), step, base);
  }
}

// The top byte of each half (sign, 4 exponent bits, 3 of mantissa) as a half, times 2^-8.
__device__ __forceinline__ u32 e4m3_halves(u32 w) { return and_or(w >> 1, 0x3f803f80u, w & 0x80008000u); }

// Nibble P of each half (sign, 2 exponent bits, 1 of mantissa) as a half, times 2^-14.
template <int P>
__device__ __forceinline__ u32 e2m1_halves(u32 w) {
  u32 sign = P == 3 ? w : w << (12 - 4 * P);
  u32 rest = P == 3 ? w >> 3 : w << (9 - 4 * P);
  return and_or(rest, 0x0e000e00u, sign & 0x80008000u);
}

// Nibble P (0 to 3) of each half.
template <typename F, int P, bool RAW = false>
__device__ __forceinline__ u32 take_nibbles(u32 w) {
  if constexpr (F::MODE == MXFP4 || F::MODE == NVFP4) {
    return e2m1_halves<P>(w);
  } else if constexpr (P < 2) {
    return take_fields<F, 4 * P, 4 * P, RAW>(w);
  } else {
    return take_fields<F, 4 * P - 8, 4 * P - 8, RAW>(w >> 8);
  }
}

// The four 2-bit fields of the low byte of each half.
template <typename F, bool RAW = false>
__device__ __forceinline__ void take_quarters(u32 (&d)[4], u32 w) {
  d[0] = take_fields<F, 0, 0, RAW>(w), d[1] = take_fields<F, 2, 2, RAW>(w);
  d[2] = take_fields<F, 4, 4, RAW>(w), d[3] = take_fields<F, 6, 6, RAW>(w);
}

// The block's 4 codes of each half of a word, of formats loaded as units of 16 bytes.
template <typename F, bool RAW = false>
__device__ __forceinline__ void take_unit(u32 (&d)[4], u32 w, int block) {
  if constexpr (F::BITS == 2) {
    take_quarters<F, RAW>(d, block % 2 ? w >> 8 : w);
  } else {
    d[0] = take_nibbles<F, 0, RAW>(w), d[1] = take_nibbles<F, 1, RAW>(w);
    d[2] = take_nibbles<F, 2, RAW>(w), d[3] = take_nibbles<F, 3, RAW>(w);
  }
}

// Bytes I and J of w.
template <typename F, int I, int J, bool RAW = false>
__device__ __forceinline__ u32 take_bytes(u32 w) {
  if constexpr (F::MODE == MXFP8) {
    return e4m3_halves(__byte_perm(w, 0, I << 4 | J << 12 | 0x0404));
  } else if constexpr (RAW) {
    return __byte_perm(w, 0, I | J << 8 | 0x4040);
  } else {
    return fma_half2(__byte_perm(w, 0x64646464u, I | J << 8 | 0x4040), 0x3c003c00u,
                     0x80008000u | half_bits(1024 + F::CENTER) * 0x10001u);
  }
}

// The eight 3-, 5- or 6-bit codes from the bottom of a on (b follows it), as the pairs of key_dim().
template <typename F>
__device__ __forceinline__ void take_eight(u32 (&d)[4], u32 a, u32 b) {
  if constexpr (F::BITS == 3) {
    const u32 c = __funnelshift_r(a, b, 2);
    d[0] = take_fields<F, 4, 0>(a << 4), d[1] = take_fields<F, 7, 3>(a << 4);
    d[2] = take_fields<F, 4, 0>(c), d[3] = take_fields<F, 7, 3>(c);
  } else if constexpr (F::BITS == 5) {
    d[0] = take_fields<F, 0, 4>(a), d[1] = take_fields<F, 0, 4>(a >> 5);
    d[2] = take_fields<F, 0, 4>(__funnelshift_r(a, b, 10));
    d[3] = take_fields<F, 0, 4>(__funnelshift_r(a, b, 15));
  } else {
    d[0] = take_fields<F, 4, 0>(a << 4), d[1] = take_fields<F, 4, 0>(a >> 2);
    d[2] = take_fields<F, 4, 0>(__funnelshift_r(a, b, 20));
    d[3] = take_fields<F, 4, 0>(__funnelshift_r(a, b, 26));
  }
}

// The dimension of half `half` of pair `p` of block `block` in lane t. See the top of this file.
template <typename F>
__device__ constexpr int key_dim(int block, int t, int p, int half) {
  if (F::PAIRED_BLOCKS) return block / 2 * 64 + 16 * t + block % 2 * 4 + p + 8 * half;
  if (F::BITS == 8) return 32 * block + (p / 2) * 16 + 4 * t + (p % 2) * 2 + half;
  if (F::BITS == 6) return 32 * block + 8 * t + (p / 2) * 4 + p % 2 + 2 * half;
  return 32 * block + 8 * t + p + 4 * half;
}

// The dimension of row r (half 0) or r + 8 (half 1) of the A operand m (0 or 1) of values of block `block`.
template <typename F>
__device__ constexpr int value_dim(int block, int r, int m, int half) {
  if (F::PAIRED_BLOCKS) return block / 2 * 64 + 8 * r + block % 2 * 4 + 2 * m + half;
  if (F::BITS == 8) return 32 * block + 16 * m + 2 * r + half;
  return 32 * block + 4 * r + 2 * m + half;
}

// Where a dimension goes among bytes: 32 of each block, 8 of each lane of a quad, 4 of each register.
template <typename F>
__device__ constexpr int byte_place(int dim) {
  if (F::PAIRED_BLOCKS)
    return (dim / 64 * 2 + dim % 4 / 2) * 32 + dim % 64 / 16 * 8 + dim % 2 * 4 + dim % 16 / 4;
  if (F::BITS == 8) return dim / 32 * 32 + dim % 16 / 4 * 8 + dim % 32 / 16 * 4 + dim % 4;
  return dim / 8 * 8 + static_cast<int>(F::CODE_PLACES >> (dim % 8 * 4) & 15);
}

// Code words of 16 rows (keys) as 8 x 8 matrices of 16-bit units, two 16-byte units a row at a time: a lane gets two
// units of row r (TRANSPOSED: unit r of two rows). Blocks are asked for in order; a few come with one load.
template <typename F, typename Tile, int BLOCKS, bool TRANSPOSED>
struct CodeWords {
  u32 w[4];

  // Where a lane's part of 16 rows begins, from byte `first` of a row on: `place` of load().
  __device__ __forceinline__ static u32 place_of(int lane, int first) {
    if constexpr (F::MATRICES) return Tile::place(lane % 16, first + lane / 16 * 16);
    const int r = lane / 4, t = lane % 4;
    return first + (TRANSPOSED ? 2 * t * Tile::PITCH + 4 * F::BITS * r / 32 * 4
                               : r * Tile::PITCH + 8 * F::BITS * t / 32 * 4);
  }

  // `rows` is the shared address of the 16 rows.
  __device__ __forceinline__ void load(u32 rows, u32 place, int block) {
    if constexpr (F::BITS == 8) {
      load_matrices<TRANSPOSED>(w, at(rows, place, block * 32));
    } else if constexpr (F::UNIT_BLOCKS > 0) {
      if (block % (2 * F::UNIT_BLOCKS) != 0) return;
      const int unit = block / F::UNIT_BLOCKS;
      if ((unit + 1) * F::UNIT_BLOCKS < BLOCKS) {
        load_matrices<TRANSPOSED>(w, at(rows, place, unit * 16));
      } else {
        load_two_matrices<TRANSPOSED>(w[0], w[1], at(rows, place, unit * 16));
      }
    }
  }
  __device__ __forceinline__ static u32 at(u32 rows, u32 place, int bytes) {
    return Tile::SWIZZLED ? rows + (place ^ bytes) : rows + place + bytes;
  }
  // Of the first eight rows (half 0) or the last (half 1).
  __device__ __forceinline__ u32 of(int block, int half) const { return w[block / F::UNIT_BLOCKS % 2 * 2 + half]; }
};

// A lane's 8 codes of a key where codes do not fill words: the first 32 bits and the rest.
template <int BITS>
__device__ __forceinline__ uint2 code_window(u32 place, int t) {
  const u32 w0 = load_word(place), w1 = load_word(place + 4);
  return {__funnelshift_r(w0, w1, 8 * BITS * t % 32), w1 >> (8 * BITS * t % 32)};
}

// Eight fp4 codes, each as twice its value less 64. A selector of 8 to 15 replicates the sign of what it points at: of
// the two tables, all negative, the wrong one for a code's sign gives 0xff.
__device__ __forceinline__ void look_up_fp4(u32& first, u32& last, u32 w) {
  constexpr u32 PLUS_LOW = 0xc3c2c1c0u, PLUS_HIGH = 0xccc8c6c4u, MINUS_LOW = 0xbdbebfc0u, MINUS_HIGH = 0xb4b8babcu;
  const u32 flipped = w ^ 0x88888888u;
  first = permute_bytes(PLUS_LOW, PLUS_HIGH, w) & permute_bytes(MINUS_LOW, MINUS_HIGH, flipped);
  last = permute_bytes(PLUS_LOW, PLUS_HIGH, w >> 16) & permute_bytes(MINUS_LOW, MINUS_HIGH, flipped >> 16);
}

// Keys r (a[0], a[2]) and r + 8 (a[1], a[3]), block of 32 dimensions number `block`, as bytes.
template <typename F, int PITCH, typename Words>
__device__ __forceinline__ void load_key_bytes(u32 (&a)[4], Words& words, u32 rows, u32 place, int block, int lane) {
  words.load(rows, place, block);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 &first = a[half], &last = a[half + 2];
    if constexpr (F::BITS == 8) {
      first = words.w[half], last = words.w[half + 2];
    } else if constexpr (F::MODE == MXFP4) {
      look_up_fp4(first, last, words.of(block, half));
    } else if constexpr (F::BITS == 4) {
      const u32 w = words.of(block, half);
      first = w & 0x0f0f0f0fu, last = w >> 4 & 0x0f0f0f0fu;
    } else if constexpr (F::PAIRED_BLOCKS) {
      const u32 w = words.of(block, half) >> (block % 2 * 4);
      first = w & 0x03030303u, last = w >> 2 & 0x03030303u;
    } else {
      const int t = lane % 4;
      const u32 row = rows + place + 8 * half * PITCH + block * 4 * F::BITS;
      if constexpr (F::BITS == 2) {
        const u32 x = __byte_perm(load_word(row), 0, t % 2 ? 0x4342 : 0x4140);
        first = and_or(x << 4, 0x03000300u, x & 0x00030003u);
        last = and_or(x << 2, 0x03000300u, x >> 2 & 0x00030003u);
      } else {
        const uint2 w = code_window<F::BITS>(row, t);
        if constexpr (F::BITS == 3) {
          first = and_or(w.x << 3, 0x07000000u, w.x & 0x001c0e07u);
          last = and_or(w.x << 10, 0x0e070000u, w.x >> 3 & 0x00000e07u);
        } else if constexpr (F::BITS == 5) {
          first = and_or(w.x >> 4, 0x001f0000u, w.x & 0x3e007c1fu);
          last = and_or(w.y << 13, 0x001f0000u, __funnelshift_r(w.x, w.y, 5) & 0x3e007c1fu);
        } else {
          first = and_or(w.y, 0x0000fc00u, w.x & 0x3ffc003fu);
          last = and_or(w.y << 12, 0x003f0000u, __funnelshift_r(w.x, w.y, 4) & 0xfc003ffcu);
        }
      }
    }
  }
}

// Keys r and r + 8, block of 32 dimensions number `block`, as halves: 4 pairs each.
template <typename F, int PITCH, typename Words>
__device__ __forceinline__ void load_keys(u32 (&low)[4], u32 (&high)[4], Words& words, u32 rows, u32 place,
                                          int block, int lane) {
  words.load(rows, place, block);
  if constexpr (F::BITS == 8) {
    const u32(&w)[4] = words.w;
    low[0] = take_bytes<F, 0, 1>(w[0]), low[1] = take_bytes<F, 2, 3>(w[0]);
    high[0] = take_bytes<F, 0, 1>(w[1]), high[1] = take_bytes<F, 2, 3>(w[1]);
    low[2] = take_bytes<F, 0, 1>(w[2]), low[3] = take_bytes<F, 2, 3>(w[2]);
    high[2] = take_bytes<F, 0, 1>(w[3]), high[3] = take_bytes<F, 2, 3>(w[3]);
  } else if constexpr (F::UNIT_BLOCKS > 0) {
    take_unit<F>(low, words.of(block, 0), block);
    take_unit<F>(high, words.of(block, 1), block);
  } else {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      u32(&d)[4] = x ? high : low;
      const int t = lane % 4;
      const u32 row = rows + place + 8 * x * PITCH + block * 4 * F::BITS;
      if constexpr (F::BITS == 2) {
        take_quarters<F>(d, __byte_perm(load_word(row), 0, t % 2 ? 0x4342 : 0x4140));
      } else {
        const uint2 w = code_window<F::BITS>(row, t);
        take_eight<F>(d, w.x, w.y);
      }
    }
  }
}

// The bit of the half at which codes of pair p of load_raw_keys() begin: not the lowest, see the top of this file.
template <typename F>
__device__ constexpr int raw_key_bit(int p) {
  return F::BITS == 8 ? 0 : F::BITS == 4 ? 2 + p % 2 * 4 : 2 + 2 * p;
}

// The pair of a lane that has a dimension, and where that goes in the contraction of products of 16: that of a lane's
// first pair is 2t and 2t + 1, and that of its second one eight further on.
template <typename F>
__device__ constexpr int raw_key_pair(int dim) {
  return F::BITS == 8 ? dim % 32 / 16 * 2 + dim % 4 / 2 : dim % 4;
}
template <typename F>
__device__ constexpr int raw_key_place(int dim) {
  const int block = F::PAIRED_BLOCKS ? dim / 64 * 2 + dim % 8 / 4 : dim / 32;
  const int t = F::PAIRED_BLOCKS ? dim % 64 / 16 : F::BITS == 8 ? dim % 16 / 4 : dim % 32 / 8;
  const int half = F::PAIRED_BLOCKS ? dim % 16 / 8 : F::BITS == 8 ? dim % 2 : dim % 8 / 4;
  return 32 * block + 8 * raw_key_pair<F>(dim) + 2 * t + half;
}

// As load_keys(), with fields raw, times 2^(raw_key_bit() - 24).
template <typename F, typename Words>
__device__ __forceinline__ void load_raw_keys(u32 (&low)[4], u32 (&high)[4], Words& words, u32 rows, u32 place,
                                              int block) {
  words.load(rows, place, block);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32(&d)[4] = half ? high : low;
    if constexpr (F::BITS == 8) {
      d[0] = take_bytes<F, 0, 1, true>(words.w[half]), d[1] = take_bytes<F, 2, 3, true>(words.w[half]);
      d[2] = take_bytes<F, 0, 1, true>(words.w[half + 2]), d[3] = take_bytes<F, 2, 3, true>(words.w[half + 2]);
    } else if constexpr (F::BITS == 4) {
      const u32 w = words.of(block, half), first = w << 2, last = w >> 6;
      d[0] = take_fields<F, 2, 2, true>(first), d[1] = take_fields<F, 6, 6, true>(first);
      d[2] = take_fields<F, 2, 2, true>(last), d[3] = take_fields<F, 6, 6, true>(last);
    } else {
      const u32 w = words.of(block, half), x = block % 2 ? w >> 6 : w << 2;
      d[0] = take_fields<F, 2, 2, true>(x), d[1] = take_fields<F, 4, 4, true>(x);
      d[2] = take_fields<F, 6, 6, true>(x), d[3] = take_fields<F, 8, 8, true>(x);
    }
  }
}

// What load_keys() gives lane t for block number `block` of a row of codes that a thread holds in registers. The row
// may be a part of one, from a multiple of 64 dimensions on; indices must be known at compile time.
template <typename F, int WORDS>
__device__ __forceinline__ void unpack_keys(u32 (&d)[4], const u32 (&row)[WORDS], int block, int t) {
  if constexpr (F::PAIRED_BLOCKS) {
    const u32 w = row[block / 2 * 4 + t];
    take_quarters<F>(d, block % 2 ? w >> 8 : w);
  } else if constexpr (F::BITS == 2) {
    take_quarters<F>(d, __byte_perm(row[block * 2 + t / 2], 0, t % 2 ? 0x4342 : 0x4140));
  } else if constexpr (F::BITS == 4) {
    const u32 w = row[block * 4 + t];
    d[0] = take_nibbles<F, 0>(w), d[1] = take_nibbles<F, 1>(w);
    d[2] = take_nibbles<F, 2>(w), d[3] = take_nibbles<F, 3>(w);
  } else if constexpr (F::BITS == 8) {
    const u32 w = row[block * 8 + t], x = row[block * 8 + 4 + t];
    d[0] = take_bytes<F, 0, 1>(w), d[1] = take_bytes<F, 2, 3>(w);
    d[2] = take_bytes<F, 0, 1>(x), d[3] = take_bytes<F, 2, 3>(x);
  } else {
    const int bit = 8 * F::BITS * t, word = block * F::BITS + bit / 32;
    const u32 next = word + 1 < WORDS ? row[word + 1] : 0;
    take_eight<F>(d, __funnelshift_r(row[word], next, bit % 32), next >> (bit % 32));
  }
}

// Four dimensions of two keys from their code windows (the lane's 4 codes at the bottom of each), as 4 registers.
template <typename F, bool RAW>
__device__ __forceinline__ void unpack_values(u32 (&d)[4], u32 a, u32 b) {
  const u32 x = __byte_perm(a, b, 0x5410);
  if constexpr (F::BITS == 2) {
    take_quarters<F, RAW>(d, x);
  } else if constexpr (F::BITS == 3) {
    d[0] = take_fields<F, 0, 0, RAW>(x), d[1] = take_fields<F, 3, 3, RAW>(x);
    d[2] = take_fields<F, 6, 6, RAW>(x), d[3] = take_fields<F, 6, 6, RAW>(x >> 3);
  } else if constexpr (F::BITS == 5) {
    const u32 y = __byte_perm(a >> 10, b >> 10, 0x5410);
    d[0] = take_fields<F, 0, 0, RAW>(x), d[1] = take_fields<F, 5, 5, RAW>(x);
    d[2] = take_fields<F, 0, 0, RAW>(y), d[3] = take_fields<F, 5, 5, RAW>(y);
  } else {
    const u32 y = __byte_perm(a >> 12, b >> 12, 0x5410);
    d[0] = take_fields<F, 0, 0, RAW>(x), d[1] = take_fields<F, 4, 4, RAW>(x >> 2);
    d[2] = take_fields<F, 0, 0, RAW>(y), d[3] = take_fields<F, 4, 4, RAW>(y >> 2);
  }
}

// Values of a block of 32 dimensions: low[j] holds the keys 2t, 2t + 1 and high[j] the keys 2t + 8, 2t + 9 of the
// lane's dimension value_dim(r, j / 2, j % 2), by 1 / value_factor(j, RAW).
template <typename F, int PITCH, bool RAW, typename Words>
__device__ __forceinline__ void load_values(u32 (&low)[4], u32 (&high)[4], Words& words, u32 rows, u32 place,
                                            int block, int lane) {
  words.load(rows, place, block);
  if constexpr (F::BITS == 8) {
    const u32(&w)[4] = words.w;
    low[0] = take_bytes<F, 0, 2, RAW>(w[0]), low[1] = take_bytes<F, 1, 3, RAW>(w[0]);
    high[0] = take_bytes<F, 0, 2, RAW>(w[1]), high[1] = take_bytes<F, 1, 3, RAW>(w[1]);
    low[2] = take_bytes<F, 0, 2, RAW>(w[2]), low[3] = take_bytes<F, 1, 3, RAW>(w[2]);
    high[2] = take_bytes<F, 0, 2, RAW>(w[3]), high[3] = take_bytes<F, 1, 3, RAW>(w[3]);
  } else if constexpr (F::UNIT_BLOCKS > 0) {
    take_unit<F, RAW>(low, words.of(block, 0), block);
    take_unit<F, RAW>(high, words.of(block, 1), block);
  } else {
    u32 window[4];
    const int bit = 4 * F::BITS * (lane / 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const u32 row = rows + place + (k % 2 + k / 2 * 8) * PITCH + block * 4 * F::BITS;
      const u32 next = F::BITS == 2 ? 0 : load_word(row + 4);
      window[k] = __funnelshift_r(load_word(row), next, bit % 32);
    }
    unpack_values<F, RAW>(low, window[0], window[1]);
    unpack_values<F, RAW>(high, window[2], window[3]);
  }
}

__device__ __forceinline__ float scale_value(float x) { return x; }
__device__ __forceinline__ float scale_value(__half x) { return __half2float(x); }
__device__ __forceinline__ float scale_value(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float scale_value(unsigned char x) {  // e8m0: 2^(x - 127)
  return __uint_as_float(max(static_cast<u32>(x) << 23, 0x00400000u));
}

// The two e4m3 scales in the low bytes of `w`, as halves.
__device__ __forceinline__ u32 e4m3_scales(u32 w) {
#if __CUDA_ARCH__ >= 890
  u32 x;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(x) : "h"(static_cast<unsigned short>(w)));
  return x;
#else
  return mul_half2(e4m3_halves(__byte_perm(w, 0, 0x1404)), 0x5c005c00u);
#endif
}

// nvfp4's e4m3 scales of two rows as a pair of halves, times 2^6: their products with codes (times 2^-14) are exact.
__device__ __forceinline__ u32 e4m3_pair(u32 low, u32 high) {
  return mul_half2(e4m3_halves(low << 8 | high << 24), 0x74007400u);
}

}  // namespace qsdpa
