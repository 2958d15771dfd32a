// From the scores of codes to logits in base 2: the factors of the rows, the rope term, the sum over the warps of a
// team. Not every call has all of them; DecodeConfig says which.
#pragma once
#include "decode_work.cuh"

namespace qsdpa {

template <typename C>
class Logits {
  using T = typename C::T;
  using Scores = typename C::Scores;
  using RowFloats = typename C::RowFloats;
  static constexpr int NB = C::ROW_BLOCKS, LR = C::LANE_ROWS, PARTS = C::PARTS, TEAM = C::TEAM;

  const DecodeLane<C> place;
  const SharedMemory memory;

 public:
  __device__ __forceinline__ Logits(const DecodeLane<C>& place, SharedMemory memory) : place(place), memory(memory) {}

  // Scores of products to base-2 logits.
  __device__ __forceinline__ void apply_factors(Scores& s) const {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) {
        const float factor = row_factor(n, j);
        s[n][j] *= factor, s[n][LR + j] *= factor;
      }
  }

  // The factors that are still to be applied, where they wait for the exponential.
  __device__ __forceinline__ void late_factors(RowFloats& factors) const {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) factors[n][j] = C::LATE_FACTORS ? row_factor(n, j) : 1.0f;
  }

  // Products of rope parts: of the team's share of the dimensions, where they divide evenly, else by its first warp.
  // `keys`: address of the 16 rows.
  __device__ __forceinline__ void add_rope(Scores& s, u32 keys) const {
    const T* queries = memory.as<T>(C::ROPE_QUERIES);
    constexpr bool SHARED_OUT = C::ROPE % (16 * TEAM) == 0;
    constexpr int SHARE = SHARED_OUT ? C::ROPE / TEAM : C::ROPE;
    if (!SHARED_OUT && place.member > 0) return;
    const int begin = SHARED_OUT ? place.member * SHARE : 0;
    float c[NB][4] = {};
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < SHARE; i += 16) {
        const int k = begin + i;
        u32 w[4];
        load_matrices(w, keys + (place.lane % 16) * C::RopeTile::PITCH + k * 2 + place.lane / 16 * 16);
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          const u32* row = reinterpret_cast<const u32*>(queries + place.column_row(n) * C::ROPE_PITCH + k) + place.t;
          mma<C::BF16>(c[n], w[0], w[1], w[2], w[3], row[0], row[4]);
        }
      }
    } else {
      const float* tile = static_cast<const float*>(__cvta_shared_to_generic(keys));
      for (int k = begin; k < begin + SHARE; ++k)
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int x = 0; x < 2 * LR; ++x) {
            float& y = c[n][x / LR * 2 + x % LR];
            y = fmaf(tile[(place.r + x / LR * 8) * (C::RopeTile::PITCH / 4) + k],
                     to_float(queries[place.row_of(n, x % LR) * C::ROPE_PITCH + k]), y);
          }
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 2 * LR; ++x) s[n][x] = fmaf(c[n][x / LR * 2 + x % LR], LOG2E, s[n][x]);
  }

  // The sums over the team, in the same order in each warp: all must come to the same maxima.
  __device__ __forceinline__ void add_up(Scores (&s)[PARTS]) const {
    float* shares = memory.as<float>(C::EXCHANGE) + (place.team * TEAM * PARTS * NB * 32 + place.lane) * (2 * LR);
#pragma unroll
    for (int i = 0; i < PARTS * NB; ++i)
#pragma unroll
      for (int x = 0; x < 2 * LR; x += 2)
        *reinterpret_cast<float2*>(shares + (place.member * PARTS * NB + i) * 64 * LR + x) = {s[i / NB][i % NB][x],
                                                                                              s[i / NB][i % NB][x + 1]};
    place.team_barrier();  // the next tile's barrier keeps the shares until all have read them
#pragma unroll
    for (int i = 0; i < PARTS * NB; ++i)
#pragma unroll
      for (int x = 0; x < 2 * LR; x += 2) {
        float2 total = {};
#pragma unroll
        for (int k = 0; k < TEAM; ++k) {
          const float2 y = *reinterpret_cast<const float2*>(shares + (k * PARTS * NB + i) * 64 * LR + x);
          total.x += y.x, total.y += y.y;
        }
        s[i / NB][i % NB][x] = total.x, s[i / NB][i % NB][x + 1] = total.y;
      }
  }

 private:
  __device__ __forceinline__ float row_factor(int n, int j) const {
    return memory.as<float>(C::ROW_FACTORS)[place.row_of(n, j)];
  }
};

}  // namespace qsdpa
