// The running softmax of a team: scores to probabilities, and these, times the scales of values, to right operands in
// shared memory.
//
// Products sum over the keys of all four warps, so that what is taken off the logits of a row is common to the team. It
// is raised only when a probability exceeds a limit far above where they begin; all warps hear of that at the barrier
// that they wait at anyway. So do powers of two on scales, which keep weights in the range of halves: from 2^4 on for
// the largest logit and scale, to below 2^15.
#pragma once
#include "decode_work.cuh"
#include "wide_values.cuh"

namespace qsdpa {

template <typename C>
class WideSoftmax {
  using V = typename C::V;
  using Scores = typename C::Scores;
  using Weights = typename C::Weights;
  using Scales = ScaleRow<C::VALUE_GROUPS, C::VALUE_GROUPS, typename V::Scale>;
  static constexpr int NB = C::ROW_BLOCKS, GROUPS = C::VALUE_GROUPS;
  static constexpr bool BF16 = C::BF16_VALUE_SCALES;
  static constexpr int SCALE_BYTES = sizeof(typename V::Scale);
  static constexpr float FIRST_EXPONENT = 4.0f, MOST_PROBABILITY = 16384.0f;
  static constexpr int SCALE_EXPONENT = -1, BIAS_EXPONENT = 7;  // of the largest, in their units
  static constexpr float MOST_SCALE = 2.0f, MOST_BIAS = 32768.0f;
  // In a stage. Without biases, codes are off their center by a number of scales.
  static constexpr int BIASES = V::HAS_BIAS ? C::VALUE_BIASES : C::VALUE_SCALES;

  const WideLane<C> place;
  const SharedMemory memory;
  float2* const rows;        // of the team: the factor from scores to logits, and what is taken off logits
  float* const peaks;        // of the team's warps
  const u32 weights;         // shared address
  u32 stored;                // from there on
  u32 biases;                // from the stage's on: of group r, of key 2t of the warp's
  float sums[NB][2] = {};    // lanes r < GROUPS: of biases times probabilities; r == GROUPS: of probabilities
  float scale_unit = 0.0f;   // a power of two; zero as long as no key was seen
  float bias_unit = BF16 ? 0.0f : 1.0f;

 public:
  __device__ __forceinline__ WideSoftmax(const WideLane<C>& place, SharedMemory memory, u32 shared)
      : place(place),
        memory(memory),
        rows(memory.as<float2>(C::TEAM_ROWS) + place.team * C::ROWS),
        peaks(memory.as<float>(C::PEAKS) + place.team * C::TEAM * C::PEAK_SET),
        weights(shared + 2 * place.team * C::WEIGHT_TILE),
        biases(BIASES + ((16 * place.warp + 2 * place.t) * GROUPS + min(place.r, GROUPS - 1)) * SCALE_BYTES) {
    // Where a lane's row of the four matrices lies: blocks of rows, or two of them of both eights of keys.
    const int key = 16 * place.warp + place.lane % 8, matrix = place.lane / 8;
    stored = NB == 2 ? swizzled(key + matrix / 2 * 8, matrix % 2) : swizzled(key, matrix);
    keep(stored);
    keep(biases);
  }

  __device__ __forceinline__ u32 tile(int parity) const { return weights + parity * C::WEIGHT_TILE; }

  // Weights of a tile to one of the two places in shared memory. `meanwhile` is called before the warps meet, and again
  // where weights are made anew.
  template <typename Meanwhile>
  __device__ __forceinline__ void weigh(Weights& p, const Scores& s, WideValues<C>& values, u32 stage, int parity,
                                        Meanwhile meanwhile) {
    const Scales low(stage + C::VALUE_SCALES, place.key(), 0), high(stage + C::VALUE_SCALES, place.key() + 8, 0);
    bool renewed = scale_unit == 0.0f;  // at the first tile
    while (true) {
      if (renewed) renormalize(s, values, low, high, stage);
      bool exceeds = to_probabilities(p, s);
      exceeds |= store_weights(p, low, high, tile(parity));
      if constexpr (BF16) exceeds |= biases_exceed(stage);
      meanwhile();
      publish_to_products();
      if (!place.team_any(exceeds) || renewed) break;
      renewed = true;
    }
  }

  // Adds up probabilities, and their products with the biases of values.
  __device__ __forceinline__ void add_up(const Weights& p, u32 stage) {
    const u32 low = bias_pair(stage, 0), high = bias_pair(stage, 8);
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      float c[4] = {sums[n][0], sums[n][1], 0.0f, 0.0f};
      mma(c, low, 0, high, 0, transpose_matrix(p[n][0]), transpose_matrix(p[n][1]));
      sums[n][0] = c[0], sums[n][1] = c[1];
    }
  }

  // The team's results to its places in shared memory. By all threads of the block, once every ring is idle.
  __device__ __forceinline__ void store(const WideValues<C>& values) const {
    constexpr int ALL = C::TOTAL_SETS * C::ROWS;
    float* totals = memory.as<float>(C::TOTALS) + place.team * (C::TEAM * ALL);
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int y = 0; y < 2; ++y)
        if (place.r <= GROUPS) totals[place.warp * ALL + place.r * C::ROWS + place.row(n, y)] = sums[n][y];
    place.team_barrier();
    const int thread = threadIdx.x % C::TEAM_THREADS;
    const float bias_factor = inverse(bias_unit) * (V::HAS_BIAS ? 1.0f : -static_cast<float>(V::CENTER));
    for (int i = thread; i < ALL; i += C::TEAM_THREADS) {
      const float total = totals[i] + totals[ALL + i] + totals[2 * ALL + i] + totals[3 * ALL + i];
      totals[i] = i < GROUPS * C::ROWS ? total * bias_factor : total;
    }
    place.team_barrier();
    if (thread < C::ROWS)
      memory.as<float2>(C::TEAM_STATS)[place.team * C::ROWS + thread] = {rows[thread].y,
                                                                        totals[GROUPS * C::ROWS + thread]};
    values.store(memory.as<float>(0) + place.team * C::ROWS * C::OUT_PITCH, inverse(scale_unit), totals);
  }

 private:
  __device__ __forceinline__ static float inverse(float unit) { return unit > 0.0f ? 1.0f / unit : 0.0f; }

  // True if one exceeds the limit.
  __device__ __forceinline__ bool to_probabilities(Weights& p, const Scores& s) const {
    __half2 most = __float2half2_rn(0.0f);
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      const float4 of_rows = *reinterpret_cast<const float4*>(rows + place.row(n, 0));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        p[n][h] = pack_half2(exp2_fast(fmaf(s[n][2 * h], of_rows.x, -of_rows.y)),
                             exp2_fast(fmaf(s[n][2 * h + 1], of_rows.z, -of_rows.w)));
        most = __hmax2(most, reinterpret_cast<const __half2&>(p[n][h]));
      }
    }
    return fmaxf(__low2float(most), __high2float(most)) > MOST_PROBABILITY;
  }

  // Once for each group of values, times its scales. True if one of these exceeds the limit.
  __device__ __forceinline__ bool store_weights(const Weights& p, const Scales& low, const Scales& high, u32 to) const {
    if constexpr (Scales::HELD && !BF16) {  // pairs of scales as they are
      const u32 unit = pack_half2(scale_unit, scale_unit);
      u32 largest = 0;
#pragma unroll
      for (int i = 0; i < GROUPS / 2; ++i) {
        const u32 x = mul_half2(low.words[i], unit), y = mul_half2(high.words[i], unit);
        largest = max_magnitudes<__half>(max_magnitudes<__half>(largest, x), y);
        store_group(p, __byte_perm(x, 0, 0x1010), __byte_perm(y, 0, 0x1010), to, 2 * i);
        store_group(p, __byte_perm(x, 0, 0x3232), __byte_perm(y, 0, 0x3232), to, 2 * i + 1);
      }
      return fmaxf(low_half(largest), high_half(largest)) > MOST_SCALE;
    } else {
      float largest = 0.0f;
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        const float x = scale_value(low[g]) * scale_unit, y = scale_value(high[g]) * scale_unit;
        largest = fmaxf(largest, fmaxf(fabsf(x), fabsf(y)));
        store_group(p, pack_half2(x, x), pack_half2(y, y), to, g);
      }
      return largest > MOST_SCALE;
    }
  }

  __device__ __forceinline__ void store_group(const Weights& p, u32 low, u32 high, u32 to, int group) const {
    const int column = group * C::ROWS;
    const u32 at = (to + column / 64 * PANEL_BYTES + stored) ^ (column % 64 * 2);
    if constexpr (NB == 2) {
      store_matrices(at, mul_half2(p[0][0], low), mul_half2(p[1][0], low), mul_half2(p[0][1], high),
                     mul_half2(p[1][1], high));
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 scale = h ? high : low;
        store_matrices(at + h * 8 * 128, mul_half2(p[0][h], scale), mul_half2(p[1][h], scale),
                       mul_half2(p[2][h], scale), mul_half2(p[3][h], scale));
      }
    }
  }

  // A lane's bias number i of the eight keys from `first` on of the warp's: of key 2t + i, in group r.
  __device__ __forceinline__ typename V::Scale bias(u32 stage, int first, int i) const {
    return load_scale<typename V::Scale>(stage + biases + (first + i) * GROUPS * SCALE_BYTES);
  }

  // As halves: a row of an operand. Row number GROUPS is ones.
  __device__ __forceinline__ u32 bias_pair(u32 stage, int first) const {
    u32 x;
    if constexpr (BF16) {
      x = pack_half2(scale_value(bias(stage, first, 0)) * bias_unit, scale_value(bias(stage, first, 1)) * bias_unit);
    } else {
      x = raw_bits(bias(stage, first, 0)) | raw_bits(bias(stage, first, 1)) << 16;
    }
    return place.r < GROUPS ? x : place.r == GROUPS ? 0x3c003c00u : 0;
  }

  __device__ __forceinline__ bool biases_exceed(u32 stage) const {
    const u32 x = max_magnitudes<__half>(bias_pair(stage, 0), bias_pair(stage, 8));
    return fmaxf(low_half(x), high_half(x)) > MOST_BIAS;
  }

  // Raises what is taken off logits to the maxima of this tile, and lowers the units of scales and biases where they
  // are too large; all that was summed up follows. By the whole team.
  __device__ __forceinline__ void renormalize(const Scores& s, WideValues<C>& values, const Scales& low,
                                              const Scales& high, u32 stage) {
    share_peaks(s, low, high, stage);
    place.team_barrier();
    auto peak = [&](int i) {
      float x = peaks[i];
#pragma unroll
      for (int w = 1; w < C::TEAM; ++w) x = fmaxf(x, peaks[w * C::PEAK_SET + i]);
      return x;
    };
    // A unit is one of halves where scales are multiplied as such.
    const float change = serve(scale_unit, peak(C::ROWS), SCALE_EXPONENT, MOST_SCALE, BF16 ? 100 : 15);
    float bias_change = 1.0f;
    if constexpr (BF16)
      bias_change = serve(bias_unit, peak(C::ROWS + 1), BIAS_EXPONENT, MOST_BIAS, 100);
    if (place.r >= GROUPS) bias_change = 1.0f;
    typename C::RowFloats bases;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const float before = rows[place.row(n, y)].y;
        bases[n][y] = fmaxf(peak(place.row(n, y)) - FIRST_EXPONENT, before);
        const float f = exp2_fast(before - bases[n][y]);
        sums[n][y] *= f * bias_change;
        values.rescale(n, y, f * change);
      }
    place.team_barrier();  // all have read
    if (place.warp == 0 && place.r == 0) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int y = 0; y < 2; ++y) rows[place.row(n, y)].y = bases[n][y];
    }
    place.team_barrier();
  }

  // The warp's largest logits, scales and biases to shared memory.
  __device__ __forceinline__ void share_peaks(const Scores& s, const Scales& low, const Scales& high,
                                              u32 stage) const {
    float* mine = peaks + place.warp * C::PEAK_SET;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float x = fmaxf(s[n][y], s[n][2 + y]) * rows[place.row(n, y)].x;
#pragma unroll
        for (int d = 4; d < 32; d *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
        if (place.r == 0) mine[place.row(n, y)] = x;
      }
    float scale = 0.0f, largest_bias = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
      scale = fmaxf(scale, fmaxf(fabsf(scale_value(low[g])), fabsf(scale_value(high[g]))));
    scale = warp_max(scale);
    if constexpr (BF16) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        largest_bias = fmaxf(largest_bias, fabsf(scale_value(bias(stage, i / 2 * 8, i % 2))));
      largest_bias = warp_max(largest_bias);
    }
    if (place.lane == 0) mine[C::ROWS] = scale, mine[C::ROWS + 1] = largest_bias;
  }

  // Takes `unit` to where the largest is of this exponent, if it is more than `most` now. Returns the change.
  __device__ __forceinline__ static float serve(float& unit, float largest, int exponent, float most, int limit) {
    if (unit > 0.0f && largest * unit <= most) return 1.0f;
    const int power = 127 + exponent - static_cast<int>(__float_as_uint(largest) >> 23);
    const float lower = __uint_as_float(static_cast<u32>(127 + min(max(power, -100), limit)) << 23);
    const float change = unit > 0.0f ? lower / unit : 1.0f;
    unit = lower;
    return change;
  }
};

}  // namespace qsdpa
