// Rows that are new in a cache, quantized into its buffers by the very kernel that attends to them: to the bits of
// row_quantization.cuh, and to memory, where the teams whose tiles they are in then read them like all others.
#pragma once
#include "decode_work.cuh"
#include "row_quantization.cuh"

namespace qsdpa {

// Keys and values [B, heads, L, D] that are the last rows of the cache; none where all are stored already. The codes of
// keys and values are in one buffer, their scales and biases in another (PackedStack).
template <typename C>
struct NewRows {
  using T = typename C::T;
  View<T> keys, values;

  template <typename Lane>
  __device__ __forceinline__ void store(const DecodeArguments<C>& a, const DecodeWork<C>& work,
                                        const Lane& place) const {
    const int count = keys.shape[2];
    if (count == 0 || !has_part(work, place.team, work.count - count)) return;
    quantize(*this, a, work.batch, work.kv_head);
    __threadfence_block();
    place.team_barrier();
  }

 private:
  // Whether tiles from that of row `first` on are the team's.
  __device__ __forceinline__ static bool has_part(const DecodeWork<C>& work, int team, int first) {
    const int stride = work.splits * C::TEAMS, own = work.first_tile(team);
    bool has = false;
    for (int tile = first / C::TILE; tile * C::TILE < work.count; ++tile)
      has |= tile >= own && (tile - own) % stride == 0;
    return has;
  }

  // All rows of a head, by each team that has some: they write the same.
  __device__ __forceinline__ static void quantize(const NewRows& rows, const DecodeArguments<C>& a, int batch,
                                                  int head) {
    using F = typename C::K;
    using Scale = typename F::Scale;
    const int count = rows.keys.shape[2];
    const i64 first = a.keys.shape[2] - count;
    auto side = [&](const View<T>& x) {
      const Rows<T> own = x.rows(batch, head);
      return Side<T>{own.data, 1, 0, 0, own.row_stride, own.element_stride};
    };
    auto stored = [&](const auto& x) { return x.rows(batch, head).data + first * x.strides[2]; };
    const Planes<u32> codes{const_cast<u32*>(stored(a.keys)), 0, a.values.data - a.keys.data, a.keys.strides[2]};
    const Planes<Scale> scales{
        const_cast<Scale*>(stored(a.key_scales)), 0, a.value_scales.data - a.key_scales.data, a.key_scales.strides[2]};
    const unsigned packs = 2 * count * (C::D / PACK);
    for (unsigned i = threadIdx.x % C::TEAM_THREADS; i < (packs + 31) / 32 * 32; i += C::TEAM_THREADS)
      quantize_rows<F::BITS, F::GROUP, F::MODE, C::D, C::D, 0>(
          side(rows.keys), side(rows.values), 1, count, 1.0f, codes, scales, i);
  }
};

// In the place of them, where keys and values come otherwise.
struct NoNewRows {
  template <typename C, typename Lane>
  __device__ __forceinline__ void store(const DecodeArguments<C>&, const DecodeWork<C>&, const Lane&) const {}
};

}  // namespace qsdpa
