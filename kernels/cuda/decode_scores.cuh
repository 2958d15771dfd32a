// Products of codes of keys with queries: the scores of 16 keys, or the part of them that a warp's dimensions make.
//
// A key's scale is applied to the sums of its groups, in float32. A key's bias is to be multiplied by the sum of its
// group's query: by a product of its own where operands for that are held, which the scores then begin with.
#pragma once
#include "decode_query_operands.cuh"

namespace qsdpa {

template <typename C>
class ScoreProducts {
  using K = typename C::K;
  using Scores = typename C::Scores;
  static constexpr int NB = C::ROW_BLOCKS, LR = C::LANE_ROWS;
  // Of a warp's share: groups, and blocks of 32 dimensions of a group. Scaled codes are one group.
  static constexpr int GROUPS = K::SCALED_CODES ? 1 : K::groups(C::D) / C::TEAM;
  static constexpr int GROUP_BLOCKS = C::KEY_SHARE / GROUPS;
  using Words = typename C::KeyWords;
  // The scales of a row that a warp needs; with scaled codes it picks them from the whole row.
  using Scales = ScaleRow<K::groups(C::D), K::SCALED_CODES ? K::groups(C::D) : GROUPS, typename K::Scale>;

  const DecodeLane<C> place;
  const SharedMemory memory;
  const TileOffsets<C> offsets;

 public:
  __device__ __forceinline__ ScoreProducts(const DecodeLane<C>& place, const TileOffsets<C>& offsets,
                                           SharedMemory memory)
      : place(place), memory(memory), offsets(offsets) {}

  // Scores of part number `part` of a tile, in units of the scaled queries.
  __device__ __forceinline__ void multiply(Scores& s, const QueryOperands<C>& queries, u32 stage, int part) const {
    const int key = 16 * part + offsets.row;
    const int first = K::SCALED_CODES ? 0 : place.member * GROUPS;
    const u32 scales = stage + C::KEY_SCALES;
    const Scales low_scale(scales, key, first), high_scale(scales, key + 8, first);
    const u32 biases = stage + (K::HAS_BIAS ? C::KEY_BIASES : C::KEY_SCALES);
    const Scales low_bias(biases, key, first), high_bias(biases, key + 8, first);
    if constexpr (C::BIAS_OPERANDS) multiply_biases(s, queries, biases, key);
    const u32 codes = stage + 16 * part * C::KeyTile::PITCH;
    Words words;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      Scores c;
      if constexpr (C::KEY_BYTES) {
        multiply_bytes(c, queries, words, codes, g);
      } else if constexpr (C::KEY_GROUPS_APART) {
        multiply_groups_apart(c, queries, words, codes, scales + key * K::groups(C::D));
      } else {
        multiply_halves(c, queries, words, codes, g, low_scale, high_scale);
      }
      float scale[2] = {1.0f, 1.0f}, bias[2] = {};
      if constexpr (!K::SCALED_CODES) {
        constexpr float factor = (C::KEY_BYTES ? 1.0f : K::CODE_FACTOR) / C::SCORE_UNIT;
        scale[0] = scale_value(low_scale[g]) * factor;
        scale[1] = scale_value(high_scale[g]) * factor;
      }
      if constexpr (K::HAS_BIAS) bias[0] = scale_value(low_bias[g]), bias[1] = scale_value(high_bias[g]);
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int x = 0; x < 2 * LR; ++x) {
          float y = g == 0 && !C::BIAS_OPERANDS ? 0.0f : s[n][x];
          if constexpr (K::HAS_BIAS && !C::BIAS_OPERANDS) {
            y = fmaf(bias[x / LR], query_sum(first + g, n, x % LR), y);
          } else if constexpr (C::HAS_SUMS && !K::HAS_BIAS) {
            c[n][x] = fmaf(static_cast<float>(-K::BYTE_CENTER), query_sum(first + g, n, x % LR), c[n][x]);
          }
          s[n][x] = fmaf(scale[x / LR], c[n][x], y);
        }
    }
  }

 private:
  // What the biases of the keys `key` and key + 8 add to the scores.
  __device__ __forceinline__ void multiply_biases(Scores& s, const QueryOperands<C>& queries, u32 biases,
                                                  int key) const {
    constexpr bool BF16_SCALES = IsBfloat16<typename K::Scale>::value;
    constexpr int W = C::BIAS_WORDS;
    const u32 at = biases + (key * W + place.t % W) * 4;
    const u32 low = load_word(at), high = load_word(at + 8 * W * 4);
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      float c[4] = {};
      const uint2 q = queries.sums_operand(n);
      mma<BF16_SCALES>(c, low, high, W == 4 ? low : 0, W == 4 ? high : 0, q.x, q.y);
#pragma unroll
      for (int x = 0; x < 4; ++x) s[n][x] = c[x];
    }
  }

  __device__ __forceinline__ float query_sum(int group, int n, int j) const {
    return memory.as<float>(C::QUERY_SUMS)[group * C::ROWS + place.row_of(n, j)];
  }

  // Products of a group's codes of 16 keys, as bytes, with the queries' high and low ones.
  __device__ __forceinline__ void multiply_bytes(Scores& s, const QueryOperands<C>& queries, Words& words, u32 codes,
                                                 int group) const {
    int c[NB][LR][4] = {};
#pragma unroll
    for (int i = 0; i < GROUP_BLOCKS; ++i) {
      const int block = group * GROUP_BLOCKS + i;
      u32 bytes[4];
      load_key_bytes<K, C::KeyTile::PITCH>(bytes, words, codes, offsets.keys, block, place.lane);
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int j = 0; j < LR; ++j) {
          const uint2 q = queries.operand(0, block, j, n);
          mma_bytes<K::SIGNED_BYTES>(c[n][j], bytes, q.x, q.y);
        }
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 2 * LR; ++x) {
        const int(&y)[4] = c[n][x % LR];
        s[n][x] = static_cast<float>(y[x / LR * 2] * 256 + y[x / LR * 2 + 1]);
      }
  }

  // nvfp4, few rows: columns 2t of a block's products are of its first group, columns 2t + 1 of the second. `scales`: the
  // address of the first key's.
  __device__ __forceinline__ void multiply_groups_apart(Scores& s, const QueryOperands<C>& queries, Words& words,
                                                        u32 codes, u32 scales) const {
    s[0][0] = s[0][1] = 0.0f;
#pragma unroll
    for (int block = 0; block < C::KEY_SHARE; ++block) {
      u32 low[4], high[4];
      float c[4] = {};
      load_keys<K, C::KeyTile::PITCH>(low, high, words, codes, offsets.keys, block, place.lane);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint2 q = queries.operand(0, block, m, 0);
        mma(c, low[2 * m], high[2 * m], low[2 * m + 1], high[2 * m + 1], q.x, q.y);
      }
      const u32 at = scales + 2 * (place.member * C::KEY_SHARE + block);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 scale = e4m3_scales(load_scale<unsigned short>(at + 8 * h * K::groups(C::D)));
        s[0][h] = fmaf(low_half(scale), c[2 * h], fmaf(high_half(scale), c[2 * h + 1], s[0][h]));
      }
    }
  }

  // The same with codes as halves; nvfp4's scales go into them.
  __device__ __forceinline__ void multiply_halves(Scores& s, const QueryOperands<C>& queries, Words& words, u32 codes,
                                                  int group, const Scales& low_scale, const Scales& high_scale) const {
    float c[NB][4] = {};
#pragma unroll
    for (int i = 0; i < GROUP_BLOCKS; ++i) {
      const int block = group * GROUP_BLOCKS + i;
      u32 low[4], high[4];
      load_keys<K, C::KeyTile::PITCH>(low, high, words, codes, offsets.keys, block, place.lane);
      if constexpr (K::SCALED_CODES) {
        const int scale = 2 * (place.member * C::KEY_SHARE + block) + place.t / 2;
        const u32 x = e4m3_pair(low_scale[scale], low_scale[scale]);
        const u32 y = e4m3_pair(high_scale[scale], high_scale[scale]);
#pragma unroll
        for (int p = 0; p < 4; ++p) low[p] = mul_half2(low[p], x), high[p] = mul_half2(high[p], y);
      }
#pragma unroll
      for (int term = 0; term < C::TERMS; ++term)
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < NB; ++n) {
            const uint2 q = queries.operand(term, block, m, n);
            mma(c[n], low[2 * m], high[2 * m], low[2 * m + 1], high[2 * m + 1], q.x, q.y);
          }
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 2 * LR; ++x) s[n][x] = c[n][x / LR * 2 + x % LR];
  }
};

}  // namespace qsdpa
