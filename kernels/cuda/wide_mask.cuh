// The mask, and the end of the keys, on a lane's scores.
#pragma once
#include "decode_work.cuh"
#include "wide_config.cuh"

namespace qsdpa {

template <typename C>
class WideMask {
  using Scores = typename C::Scores;
  static constexpr int NB = C::ROW_BLOCKS;

  const DecodeArguments<C>& a;
  const DecodeWork<C> work;
  const WideLane<C> place;
  const SharedMemory memory;

 public:
  __device__ __forceinline__ WideMask(const DecodeArguments<C>& arguments, const DecodeWork<C>& work,
                                      const WideLane<C>& place, SharedMemory memory)
      : a(arguments), work(work), place(place), memory(memory) {}

  // To the scores of the tile from key `first` on. With an additive mask they become logits.
  __device__ __forceinline__ void apply(Scores& s, int first) const {
    if constexpr (C::MASK == BOOLEAN || C::MASK == ADDITIVE) apply_operand(s, first);
    const int last = C::MASK == CAUSAL ? work.count - work.length : work.count - 1;  // that every row sees
    if (first + C::TILE - 1 > last) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int seen = C::MASK == CAUSAL ? last + work.head_and_position(place.row(n, x % 2)).y : last;
          if (key(first, x) > seen) s[n][x] = minus_infinity();
        }
    }
  }

 private:
  __device__ __forceinline__ int key(int first, int x) const { return first + place.key() + x / 2 * 8; }

  __device__ __forceinline__ void apply_operand(Scores& s, int first) const {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int row = place.row(n, x % 2);
        const int2 at = work.head_and_position(row);
        const i64 column = a.mask.shape[3] > 1 ? min(key(first, x), work.count - 1) * a.mask.strides[3] : 0;
        const auto m = a.mask.data[a.mask.offset(work.batch, at.x, at.y) + column];
        if constexpr (C::MASK == BOOLEAN) {
          if (!m) s[n][x] = minus_infinity();
        } else {
          s[n][x] = masked_logit(s[n][x] * memory.as<float>(C::ROW_FACTORS)[row], to_float(m));
        }
      }
  }
};

}  // namespace qsdpa
