// The running softmax of a warp, and the sums of values that it weighs: logits to probabilities, with a maximum that is
// raised only when a logit exceeds it by RISE, which is when all that was summed up is multiplied anew.
//
// Probabilities carry a power of two for the sake of the value scales, so that their product, a half, neither overflows
// nor loses precision whatever the scales are: one that takes the largest scale seen to [256, 512), until one exceeds
// 2048.
#pragma once
#include "decode_values.cuh"

namespace qsdpa {

template <typename C>
class RunningAttention {
  using V = typename C::V;
  using Scores = typename C::Scores;
  using RowFloats = typename C::RowFloats;
  static constexpr int NB = C::ROW_BLOCKS, LR = C::LANE_ROWS, PARTS = C::PARTS, TEAM = C::TEAM;
  static constexpr float RISE = 4.0f;  // probabilities stay below 2^RISE
  static constexpr int SCALE_EXPONENT = 8, LIMIT_EXPONENT = 11;
  // In the place of scales that are not looked at: products of probabilities with any of nvfp4's stay below 2^16.
  static constexpr float SCALED_LIMIT = C::VALUE_GROUPS_APART ? 32.0f : 1.0f;

  RowFloats sum = {}, top;  // of probabilities; of logits
  ValueSums<C> values;
  RowFloats base;  // what is taken off logits: the running maximum, less the exponent on value scales
  float value_exponent = 0.0f, value_limit = -1.0f;  // of that power of two, and the largest scale that it serves

 public:
  using ValueScales = typename ValueSums<C>::Scales[2 * PARTS];  // of a tile: of its keys r + 8i

  __device__ __forceinline__ RunningAttention(const DecodeLane<C>& place, const TileOffsets<C>& offsets)
      : values(place, offsets) {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) top[n][j] = base[n][j] = LOWEST;
  }

  __device__ __forceinline__ void load_scales(ValueScales& scales, u32 stage) const {
#pragma unroll
    for (int i = 0; i < 2 * PARTS; ++i) scales[i] = values.scales(stage, i);
  }

  // Takes in a tile, of which s * factors are the logits. Its parts of 16 keys share one look at the running maxima.
  __device__ __forceinline__ void add(Scores (&s)[PARTS], const RowFloats& factors, const ValueScales& scales,
                                      u32 stage) {
    renormalize(s, factors, scales);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      to_probabilities(s[i], factors);
      values.add(s[i], scales[2 * i], scales[2 * i + 1], stage, i);
    }
  }

  // Sums over the lanes, and the accumulators in true units.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) {
        // Warps of a team go by their own value scales.
        const float unit = TEAM > 1 ? exp2_fast(base[n][j] - top[n][j]) : 1.0f;
        if (TEAM > 1) base[n][j] = top[n][j];
        sum[n][j] = quad_rows_sum(sum[n][j]) * unit;
        values.finish(n, j, unit);
      }
  }

  // The finished results to the team's places in shared memory. Its rows' maxima and sums come from one lane each.
  __device__ __forceinline__ void store(const DecodeLane<C>& place, SharedMemory memory) const {
    if (place.r == 0 && place.member == 0) {
      float2* stats = memory.as<float2>(C::TEAM_STATS) + place.team * C::ROWS;
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int j = 0; j < LR; ++j) stats[place.row_of(n, j)] = {base[n][j], sum[n][j]};
    }
    __syncthreads();  // every ring is idle from here on
    values.store(memory);
  }

 private:
  // Raise the running maxima, or lower the factor on value scales, where a tile asks for it.
  __device__ __forceinline__ void renormalize(const Scores (&s)[PARTS], const RowFloats& factors,
                                              const ValueScales& scales) {
    RowFloats peak;
    bool rise = false;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) {
        peak[n][j] = fmaxf(s[0][n][j], s[0][n][LR + j]);
#pragma unroll
        for (int i = 1; i < PARTS; ++i) peak[n][j] = fmaxf(peak[n][j], fmaxf(s[i][n][j], s[i][n][LR + j]));
        peak[n][j] *= factors[n][j];
        rise |= peak[n][j] > top[n][j] + RISE;
      }
    float largest = V::SCALED_CODES ? SCALED_LIMIT : ValueSums<C>::largest_scale(scales);
    if (!__any_sync(~0u, rise || largest > value_limit)) return;

    const bool raise = __any_sync(~0u, rise);  // alike in all warps of a team, as scales are not
    largest = warp_max(largest);
    if (largest > value_limit) serve_scales_up_to(largest);
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) peak[n][j] = fmaxf(peak[n][j], __shfl_xor_sync(~0u, peak[n][j], d));
        if (raise) top[n][j] = fmaxf(peak[n][j], top[n][j]);
        const float lower = top[n][j] - value_exponent, f = exp2_fast(base[n][j] - lower);
        base[n][j] = lower;
        sum[n][j] *= f;
        values.rescale(n, j, f);
      }
  }

  // Scores to probabilities; adds them up.
  __device__ __forceinline__ void to_probabilities(Scores& s, const RowFloats& factors) {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 2 * LR; ++x) {
        s[n][x] = exp2_fast(fmaf(s[n][x], factors[n][x % LR], -base[n][x % LR]));
        sum[n][x % LR] += s[n][x];
      }
  }

  __device__ __forceinline__ void serve_scales_up_to(float largest) {
    const int exponent = min(max(127 + SCALE_EXPONENT - static_cast<int>(__float_as_uint(largest) >> 23), -100), 100);
    value_exponent = static_cast<float>(exponent);
    const float limit = __uint_as_float(static_cast<u32>(127 + LIMIT_EXPONENT - exponent) << 23);
    value_limit = V::SCALED_CODES ? SCALED_LIMIT : limit;
  }
};

}  // namespace qsdpa
