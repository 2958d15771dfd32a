// Queries as right operands of products with keys: panels of 64 dimensions in shared memory, in the order in which codes
// of keys come out of their words; and the sums of their groups, which the biases of keys are multiplied by.
#pragma once
#include "wide_config.cuh"

namespace qsdpa {

template <typename C>
class WideQueries {
  using K = typename C::K;
  static constexpr int THREADS = 32 * C::WARPS, UNITS = C::D / 8;

  const u32 shared;
  const SharedMemory memory;

 public:
  __device__ __forceinline__ WideQueries(u32 shared, SharedMemory memory) : shared(shared), memory(memory) {}

  // From the rows that QueryRows stored. By all threads of the block, which has to wait before and after.
  __device__ __forceinline__ void arrange() const {
    for (int i = threadIdx.x; i < C::ROWS * UNITS; i += THREADS) arrange_unit(i / UNITS, i % UNITS);
    for (int i = threadIdx.x; i < C::ROWS * 2; i += THREADS) arrange_sums(i / 2, i % 2);
    publish_to_products();
  }

 private:
  // Eight dimensions of a row: one pair of each lane of a quad, less by the bit at which its codes begin.
  __device__ __forceinline__ void arrange_unit(int row, int unit) const {
    const int pair = unit % 4;
    const __half gain = __float2half(C::QUERY_GAIN / static_cast<float>(1 << raw_key_bit<K>(pair)));
    const __half* source = memory.as<const __half>(C::QUERIES) + row * C::QUERY_PITCH;
    u32 x[4];
#pragma unroll
    for (int t = 0; t < 4; ++t)
      x[t] = raw_bits(source[key_dim<K>(unit / 4, t, pair, 0)] * gain) |
             raw_bits(source[key_dim<K>(unit / 4, t, pair, 1)] * gain) << 16;
    store_unit(shared + C::QUERY_TILE + unit / 8 * C::QUERY_PANEL + swizzled(row, unit % 8), x);
  }

  // Sums of a row, as the products of biases have them (WideScores::bias_word()): all in the biases' type, and then
  // what that rounds off.
  __device__ __forceinline__ void arrange_sums(int row, int unit) const {
    constexpr int GROUPS = C::KEY_GROUPS;
    u32 words[4] = {};
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const int place = 8 * unit + 2 * t + y, group = place % GROUPS;
        const float sum = memory.as<float>(C::QUERY_SUMS)[group * C::ROWS + row] *
                          ((K::HAS_BIAS ? 1.0f : -static_cast<float>(K::CENTER)) / C::SCORE_UNIT);
        const float rest = sum - rounded(sum);
        const u32 bits = pack_pair<C::BF16_SCALES>(place < GROUPS ? sum : rest, 0.0f) & 0xffff;
        if (place < 2 * GROUPS) words[t] |= bits << (16 * y);
      }
    store_unit(shared + C::QUERY_SUM_TILE + swizzled(row, unit), words);
  }

  __device__ __forceinline__ static float rounded(float x) {
    const u32 bits = pack_pair<C::BF16_SCALES>(x, 0.0f);
    return unpack_pair<C::BF16_SCALES>(bits).x;
  }
};

}  // namespace qsdpa
