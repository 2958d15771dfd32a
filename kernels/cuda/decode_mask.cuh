// The mask, and the end of the keys, on a lane's scores of some keys and all rows of its block.
//
// A thread's place (DecodeLane, WideLane) says which: score [n][x] is of key score_key(x), counted from the first of
// them, and of the block's row score_row(n, x).
#pragma once
#include "decode_work.cuh"

namespace qsdpa {

template <typename C, typename Place>
class ScoreMask {
  using Scores = typename C::Scores;
  static constexpr int NB = C::ROW_BLOCKS, LANE_SCORES = sizeof(Scores) / NB / 4;

  const DecodeArguments<C>& a;
  const DecodeWork<C> work;
  const Place place;

 public:
  __device__ __forceinline__ ScoreMask(const DecodeArguments<C>& arguments, const DecodeWork<C>& work,
                                       const Place& place)
      : a(arguments), work(work), place(place) {}

  // To the scores of the KEYS keys from `first` on. logit(score, row): the base-2 logit that an additive mask is for;
  // with such a mask all scores become logits.
  template <int KEYS, typename LogitOf>
  __device__ __forceinline__ void apply(Scores& s, int first, LogitOf logit) const {
    if constexpr (C::MASK == BOOLEAN || C::MASK == ADDITIVE) apply_operand(s, first, logit);
    const int last = C::MASK == CAUSAL ? work.count - work.length : work.count - 1;  // that every row sees
    if (first + KEYS - 1 > last) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int x = 0; x < LANE_SCORES; ++x) {
          const int seen = C::MASK == CAUSAL ? last + work.head_and_position(place.score_row(n, x)).y : last;
          if (first + place.score_key(x) > seen) s[n][x] = minus_infinity();
        }
    }
  }

 private:
  template <typename LogitOf>
  __device__ __forceinline__ void apply_operand(Scores& s, int first, LogitOf logit) const {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < LANE_SCORES; ++x) {
        const int row = place.score_row(n, x);
        const int2 at = work.head_and_position(row);
        const int key = min(first + place.score_key(x), work.count - 1);
        const i64 column = a.mask.shape[3] > 1 ? key * a.mask.strides[3] : 0;
        const auto m = a.mask.data[a.mask.offset(work.batch, at.x, at.y) + column];
        if constexpr (C::MASK == BOOLEAN) {
          if (!m) s[n][x] = minus_infinity();
        } else {
          s[n][x] = masked_logit(logit(s[n][x], row), to_float(m));
        }
      }
  }
};

}  // namespace qsdpa
