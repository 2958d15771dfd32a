// The products of absorbed MLA: a tile of the latent is keys, by rows, and values, by columns.
#pragma once
#include "mla_config.cuh"

namespace qsdpa {

template <typename C>
struct MlaProducts {
  static constexpr int COLUMNS = C::D / 2;  // of a half of the output
  using Scores = float[8][4];
  using Weights = u32[4][4];
  using Output = float[COLUMNS / 8][4];
  const u32 queries;  // in shared memory

  // s = (rope queries) * (rope keys)^T
  __device__ __forceinline__ void score_rope(Scores& s, u32 tile) const {
    const u64 rows = rows_descriptor(queries + C::PANELS * PANEL_BYTES);
    const u64 keys = rows_descriptor(tile + C::PANELS * PANEL_BYTES);
#pragma unroll
    for (int k = 0; k < C::ROPE / 16; ++k) multiply_rows<C::BF16>(s, rows + 2 * k, keys + 2 * k, k > 0);
    commit_products();
  }

  // s += queries * keys^T, of the dimensions from FIRST to END
  template <int FIRST, int END>
  __device__ __forceinline__ void add_scores(Scores& s, u32 tile) const {
    const u64 rows = rows_descriptor(queries), keys = rows_descriptor(tile);
#pragma unroll
    for (int k = FIRST / 16; k < END / 16; ++k) {
      const int at = k / 4 * (PANEL_BYTES >> 4) + k % 4 * 2;
      multiply_rows<C::BF16>(s, rows + at, keys + at, true);
    }
    commit_products();
  }

  // o += p * values, of the half `side` of the columns
  __device__ __forceinline__ void add_values(Output& o, const Weights& p, u32 tile, int side) const {
    const u64 values = columns_descriptor<PANEL_BYTES>(tile + side * (COLUMNS / PANEL_COLUMNS) * PANEL_BYTES);
#pragma unroll
    for (int k = 0; k < TILE_ROWS / 16; ++k) multiply_columns<C::BF16>(o, p[k], values + k * (16 * 128 >> 4));
    commit_products();
  }
};

}  // namespace qsdpa
