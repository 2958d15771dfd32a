// The running softmax over accumulators of a warpgroup (wgmma.cuh): a lane holds two rows, and shares each with the
// three other lanes of its quad.
#pragma once
#include "operands.cuh"
#include "unpack.cuh"

namespace qsdpa {

class RunningSoftmax {
  static constexpr float RISE = 4.0f;  // probabilities stay below 2^RISE

 public:
  float top[2] = {LOWEST, LOWEST}, sum[2] = {};  // maximum (may lag behind by RISE), and sum of this lane's columns

  // Base-2 logits to probabilities. `factor`: by which what was summed up so far changes.
  template <int N>
  __device__ __forceinline__ void apply(float (&s)[N][4], float (&factor)[2]) {
    float peak[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int x = 0; x < 4; ++x) peak[x / 2] = fmaxf(peak[x / 2], s[n][x]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 1));
      peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 2));
      const float higher = peak[h] > top[h] + RISE ? peak[h] : top[h];
      factor[h] = exp2_fast(top[h] - higher);
      top[h] = higher;
      sum[h] *= factor[h];
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        s[n][x] = exp2_fast(s[n][x] - top[x / 2]);
        sum[x / 2] += s[n][x];
      }
  }

  // The sum of row `h` over the quad.
  __device__ __forceinline__ float total(int h) const {
    const float x = sum[h] + __shfl_xor_sync(~0u, sum[h], 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
};

// Probabilities of 64 columns as left operands of four products.
template <bool BF16>
__device__ __forceinline__ void pack_weights(u32 (&p)[4][4], const float (&s)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    p[n / 2][n % 2 * 2] = pack_pair<BF16>(s[n][0], s[n][1]);
    p[n / 2][n % 2 * 2 + 1] = pack_pair<BF16>(s[n][2], s[n][3]);
  }
}

template <int N>
__device__ __forceinline__ void rescale(float (&o)[N][4], const float (&factor)[2]) {
  if (!__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int x = 0; x < 4; ++x) o[n][x] *= factor[x / 2];
}

template <int N>
__device__ __forceinline__ void multiply_by(float (&s)[N][4], float factor) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int x = 0; x < 4; ++x) s[n][x] *= factor;
}

// Applies the mask's line of a row (h of the lane's two) to its scores of 64 keys from `first` on, of `count`.
template <int MASK, typename T>
__device__ __forceinline__ void apply_mask(float (&s)[8][4], int h, const T* line, i64 stride, int first, int count) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      float& score = s[n][2 * h + y];
      const auto m = line[min(first + 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + y, count - 1) * stride];
      if constexpr (MASK == BOOLEAN) {
        if (!m) score = minus_infinity();
      } else {
        score = masked_logit(score, to_float(m));
      }
    }
}

// Excludes the keys after number `last`, likewise.
__device__ __forceinline__ void exclude_after(float (&s)[8][4], int h, int last, int first) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int y = 0; y < 2; ++y)
      if (first + 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + y > last) s[n][2 * h + y] = minus_infinity();
}

// The mask and the end of `count` keys, on scores of the 64 keys from `first` on. ends: some row does not see them all.
// length: query positions. at(h): query head and position of the lane's row h.
template <int MASK, typename MaskT, typename At>
__device__ __forceinline__ void mask_scores(float (&s)[8][4], const View<MaskT>& mask, int batch, int first, int count,
                                            int length, bool ends, At at) {
  if (MASK != BOOLEAN && MASK != ADDITIVE && !ends) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int2 row = at(h);
    if constexpr (MASK == BOOLEAN || MASK == ADDITIVE)
      apply_mask<MASK>(s, h, mask.data + mask.offset(batch, row.x, row.y), mask.shape[3] > 1 ? mask.strides[3] : 0,
                       first, count);
    if (ends) exclude_after(s, h, MASK == CAUSAL ? count - length + row.y : count - 1, first);
  }
}

}  // namespace qsdpa
