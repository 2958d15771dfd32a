// Sums of values, weighted by probabilities: the output of a warp's share of the dimensions, in registers.
//
// A value's scale is applied to the probability, and its bias to a running sum, in float32. With at most four rows an
// operand's odd columns hold the probabilities with the scales of another group of values, so that two groups of
// dimensions take one operand; the accumulators of a group have its rows in its columns.
#pragma once
#include "decode_work.cuh"

namespace qsdpa {

template <typename C>
class ValueSums {
  using V = typename C::V;
  static constexpr int NB = C::ROW_BLOCKS, LR = C::LANE_ROWS, TERMS = C::TERMS;
  // Of a warp's share: groups, and blocks of 32 dimensions of a group. Scaled codes are one group.
  static constexpr int GROUPS = V::SCALED_CODES ? 1 : V::groups(C::DV) / C::TEAM;
  static constexpr int GROUP_BLOCKS = C::VALUE_SHARE / GROUPS;
  static constexpr bool GROUPS_APART = C::VALUE_GROUPS_APART;
  static constexpr float UNIT = GROUPS_APART ? 64.0f : 1.0f;  // what scales are larger by in the codes (e4m3_pair())
  // Where in a stage: keys may be the values.
  static constexpr int CODES = C::SHARED_KV ? 0 : C::VALUES;
  static constexpr int SCALES = C::SHARED_KV ? C::KEY_SCALES : C::VALUE_SCALES;
  static constexpr int BIASES = C::SHARED_KV ? C::KEY_BIASES : C::VALUE_BIASES;

  const DecodeLane<C> place;
  const TileOffsets<C> offsets;
  float o[C::VALUE_SHARE][2][NB][4] = {};
  float bias_sum[V::HAS_BIAS ? GROUPS : 1][NB][LR] = {};

 public:
  // The scales of a row that a warp needs; with scaled codes it picks them from the whole row.
  using Scales = ScaleRow<V::groups(C::DV), V::SCALED_CODES ? V::groups(C::DV) : GROUPS, typename V::Scale>;

  __device__ __forceinline__ ValueSums(const DecodeLane<C>& place, const TileOffsets<C>& offsets)
      : place(place), offsets(offsets) {}

  // The scales of the keys r + 8 `eighth` of a tile.
  __device__ __forceinline__ Scales scales(u32 stage, int eighth) const {
    return Scales(stage + SCALES, offsets.row + 8 * eighth, first_group());
  }

  // The largest magnitude of a lane's scales.
  template <int N>
  __device__ __forceinline__ static float largest_scale(const Scales (&scales)[N]) {
    if constexpr (Scales::HELD) {
      u32 pair = 0;
#pragma unroll
      for (int i = 0; i < N * Scales::WORDS; ++i)
        pair = max_magnitudes<typename V::Scale>(pair, scales[i / Scales::WORDS].words[i % Scales::WORDS]);
      return fmaxf(scale_value(Scales::from_bits(pair & 0xffff)), scale_value(Scales::from_bits(pair >> 16)));
    } else {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) largest = fmaxf(largest, fabsf(scale_value(scales[i][g])));
      return largest;
    }
  }

  // o += codes(V)^T * (p * scale) over part number `part` of a tile. The scales are those of the keys r and r + 8.
  __device__ __forceinline__ void add(const typename C::Scores& p, const Scales& low_scale, const Scales& high_scale,
                                      u32 stage, int part) {
    const int key = 16 * part + offsets.row;
    const u32 codes = stage + CODES + 16 * part * C::ValueTile::PITCH;
    const int first = first_group();
    const u32 biases = stage + (V::HAS_BIAS ? BIASES : SCALES);
    const Scales low_bias(biases, key, first), high_bias(biases, key + 8, first);
    typename C::ValueWords words;
    constexpr int TOGETHER = 3 - LR;  // groups whose probabilities share an operand
    auto scale = [&](int g, int half) {
      if constexpr (V::SCALED_CODES) return 1.0f;
      return scale_value((half ? high_scale : low_scale)[g]);
    };
#pragma unroll
    for (int g = 0; g < GROUPS; g += TOGETHER) {
      if constexpr (V::HAS_BIAS) {
#pragma unroll
        for (int k = g; k < g + TOGETHER && k < GROUPS; ++k) {
          const float bias[2] = {scale_value(low_bias[k]), scale_value(high_bias[k])};
#pragma unroll
          for (int n = 0; n < NB; ++n)
#pragma unroll
            for (int x = 0; x < 2 * LR; ++x)
              bias_sum[k][n][x % LR] = fmaf(bias[x / LR], p[n][x], bias_sum[k][n][x % LR]);
        }
      }
      u32 operand[TERMS][NB][2];
#pragma unroll
      for (int h = 0; h < 2 && !GROUPS_APART; ++h) {
        const float low = scale(g, h), high = LR == 2 ? low : g + 1 < GROUPS ? scale(g + 1, h) : 0.0f;
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          float x = p[n][LR * h] * low, y = p[n][LR * h + LR - 1] * high;
#pragma unroll
          for (int term = 0; term < TERMS; ++term) {
            const u32 packed = pack_half2(x, y);
            operand[term][n][h] = transpose_matrix(packed);
            if constexpr (TERMS == 2) x -= low_half(packed), y -= high_half(packed);
          }
        }
      }
#pragma unroll
      for (int block = g * GROUP_BLOCKS; block < (g + TOGETHER) * GROUP_BLOCKS && block < C::VALUE_SHARE; ++block) {
        u32 low[4], high[4];
        load_values<V, C::ValueTile::PITCH, C::RAW_VALUES>(low, high, words, codes, offsets.values, block, place.lane);
        if constexpr (GROUPS_APART) {
          weigh_groups_apart(operand[0][0], p[0], stage + SCALES, block, part);
        } else if constexpr (V::SCALED_CODES) {
          scale_codes(low, high, stage + SCALES, block, part);
        }
#pragma unroll
        for (int term = 0; term < TERMS; ++term)
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < NB; ++n)
              mma(o[block][m][n], low[2 * m], low[2 * m + 1], high[2 * m], high[2 * m + 1], operand[term][n][0],
                  operand[term][n][1]);
      }
    }
  }

  // Multiplies what was summed up for row number j of block n.
  __device__ __forceinline__ void rescale(int n, int j, float f) {
    if constexpr (V::HAS_BIAS) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) bias_sum[g][n][j] *= f;
    }
#pragma unroll
    for (int i = 0; i < 2 * C::VALUE_SHARE; ++i) {
      const int column = column_of(i / 2, j);
      o[i / 2][i % 2][n][column] *= f;
      o[i / 2][i % 2][n][column + 2] *= f;
      if constexpr (GROUPS_APART) o[i / 2][i % 2][n][1] *= f, o[i / 2][i % 2][n][3] *= f;
    }
  }

  // The row's sums in true units, times `unit`, with the biases' over the lanes that have the row.
  __device__ __forceinline__ void finish(int n, int j, float unit) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      float bias = 0.0f;
      if constexpr (V::HAS_BIAS) bias = quad_rows_sum(bias_sum[g][n][j]) * unit;
#pragma unroll
      for (int i = 0; i < 2 * GROUP_BLOCKS; ++i) {
        const int block = g * GROUP_BLOCKS + i / 2, column = column_of(block, j);
        float(&c)[4] = o[block][i % 2][n];
        if (GROUPS_APART && place.r >= 4) c[0] = c[1], c[2] = c[3];  // the lane's dimensions are of the second group
        c[column] = fmaf(c[column], UNIT * V::value_factor(i % 2 * 2, C::RAW_VALUES) * unit, bias);
        c[column + 2] = fmaf(c[column + 2], UNIT * V::value_factor(i % 2 * 2 + 1, C::RAW_VALUES) * unit, bias);
      }
    }
  }

  // To the team's place in shared memory, [row, dimension].
  __device__ __forceinline__ void store(SharedMemory memory) const {
    float* out = memory.as<float>(0) + place.team * C::ROWS * C::OUT_PITCH + place.member * (C::DV / C::TEAM);
#pragma unroll
    for (int block = 0; block < C::VALUE_SHARE; ++block)
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int j = 0; j < LR; ++j) {
          float* row = out + place.row_of(n, j) * C::OUT_PITCH;
          const int h = column_of(block, j);
          const float(&c)[4] = o[block][0][n];
          const float(&d)[4] = o[block][1][n];
          if constexpr (V::BITS == 8) {  // value_dim() of a lane: runs of two, or of four
            *reinterpret_cast<float2*>(row + value_dim<V>(block, place.r, 0, 0)) = {c[h], c[h + 2]};
            *reinterpret_cast<float2*>(row + value_dim<V>(block, place.r, 1, 0)) = {d[h], d[h + 2]};
          } else {
            *reinterpret_cast<float4*>(row + value_dim<V>(block, place.r, 0, 0)) = {c[h], c[h + 2], d[h], d[h + 2]};
          }
        }
  }

 private:
  __device__ __forceinline__ int first_group() const { return V::SCALED_CODES ? 0 : place.member * GROUPS; }

  // Where the accumulators of a block of dimensions have row number j of a lane: at this index, and two further on.
  __device__ __forceinline__ static constexpr int column_of(int block, int j) {
    return LR == 1 && !GROUPS_APART ? block / GROUP_BLOCKS % 2 : j;
  }

  // nvfp4, few rows: probabilities times the scales of both groups of a block, in even and in odd columns.
  __device__ __forceinline__ void weigh_groups_apart(u32 (&operand)[2], const float (&p)[2], u32 scales, int block,
                                                     int part) const {
    const int group = 2 * (place.member * C::VALUE_SHARE + block);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 at = scales + (16 * part + offsets.row + 8 * h) * V::groups(C::DV) + group;
      operand[h] = transpose_matrix(mul_half2(pack_half2(p[h], p[h]), e4m3_scales(load_scale<unsigned short>(at))));
    }
  }

  // nvfp4: the scales of the lane's four keys and its group (dimensions 4r to 4r + 3 of the block) on the codes.
  __device__ __forceinline__ void scale_codes(u32 (&low)[4], u32 (&high)[4], u32 scales, int block, int part) const {
    const int t = place.t, group = 2 * (place.member * C::VALUE_SHARE + block) + place.r / 4;
    auto scale = [&](int key) -> u32 { return Scales(scales, 16 * part + key, 0)[group]; };
    const u32 x = e4m3_pair(scale(2 * t), scale(2 * t + 1)), y = e4m3_pair(scale(2 * t + 8), scale(2 * t + 9));
#pragma unroll
    for (int p = 0; p < 4; ++p) low[p] = mul_half2(low[p], x), high[p] = mul_half2(high[p], y);
  }
};

}  // namespace qsdpa
