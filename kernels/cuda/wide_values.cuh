// Sums of values, weighted by probabilities: products of codes of values, raw and in registers, with the weights that
// are in shared memory. The dimensions are the rows of a product, 16 of each warp.
#pragma once
#include "wide_config.cuh"

namespace qsdpa {

template <typename C>
class WideValues {
  using V = typename C::V;
  static constexpr int NB = C::ROW_BLOCKS, BLOCKS = C::VALUE_BLOCKS;
  // Units of 16 bytes of eight keys, transposed, give a lane one 16-bit word of two keys. Of the dimensions of a word a
  // warp takes two, so that SHARING warps read the same units.
  static constexpr int UNIT_DIMS = 128 / V::BITS, WORD_DIMS = 16 / V::BITS, SHARING = WORD_DIMS / 2;

  const WideLane<C> place;
  const int shift;  // of words
  u32 codes;        // from the stage's on
  float o[BLOCKS][NB][4] = {};

 public:
  using Operands = u32[BLOCKS][4][4];  // of 64 dimensions and 16 keys

  __device__ __forceinline__ explicit WideValues(const WideLane<C>& place)
      : place(place),
        shift(place.warp % SHARING * 2 * V::BITS),
        codes(C::VALUES + C::ValueTile::place(place.lane, place.warp / SHARING * 16)) {
    keep(codes);
  }

  // Of the tile at this shared address.
  __device__ __forceinline__ void unpack(Operands& operands, u32 stage) const {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        constexpr int HALF_TILE = 32 * C::ValueTile::PITCH;
        const u32 at = stage + codes, of_block = b * V::row_bytes(64);
        u32 w[4];
        load_matrices<true>(w, (C::ValueTile::SWIZZLED ? at ^ of_block : at + of_block) + h * HALF_TILE);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          u32(&x)[4] = operands[b][2 * h + i / 2];
          take_two(x[i % 2 * 2], x[i % 2 * 2 + 1], w[i]);
        }
      }
  }

  // Begins to add the products with the weights at this shared address.
  __device__ __forceinline__ void begin(const Operands& operands, u32 weights) {
    begin_products();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {  // in turn: none waits for the one before it
        const int column = b * 64 / V::GROUP * C::ROWS;
        const u64 p = columns_descriptor<PANEL_BYTES>(weights + column / 64 * PANEL_BYTES + column % 64 * 2);
        multiply_left<false, true>(o[b], operands[b][k], p + k * (16 * 128 >> 4), 1);
      }
    commit_products();
  }

  __device__ __forceinline__ void finish_products() {
    wait_products<0>();
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) pin(o[b]);
  }

  // Multiplies what was summed up for row y of block n.
  __device__ __forceinline__ void rescale(int n, int y, float f) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) o[b][n][y] *= f, o[b][n][2 + y] *= f;
  }

  // To `out`, [row, dimension]: times `factor`, and with what biases make, [group, row].
  __device__ __forceinline__ void store(float* out, float factor, const float* biases) const {
    constexpr float RAW = 16777216.0f;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const int dim = 64 * b + UNIT_DIMS * (place.warp / SHARING) + WORD_DIMS * place.r + 2 * (place.warp % SHARING);
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          const int row = place.row(n, y);
          const float x = biases[b * 64 / V::GROUP * C::ROWS + row];
          *reinterpret_cast<float2*>(out + row * C::OUT_PITCH + dim) = {
              fmaf(o[b][n][y], RAW * factor, x), fmaf(o[b][n][2 + y], RAW / (1 << SECOND_BIT) * factor, x)};
        }
    }
  }

 private:
  static constexpr int SECOND_BIT = V::BITS == 8 ? 0 : V::BITS;  // where the second dimension's codes begin

  // The warp's two dimensions of a word, of two keys each.
  __device__ __forceinline__ void take_two(u32& first, u32& second, u32 w) const {
    if constexpr (V::BITS == 8) {
      first = take_bytes<V, 0, 2, true>(w), second = take_bytes<V, 1, 3, true>(w);
    } else {
      w >>= shift;
      first = take_fields<V, 0, 0, true>(w), second = take_fields<V, SECOND_BIT, SECOND_BIT, true>(w);
    }
    if constexpr (C::EARLY_VALUES) keep(first), keep(second);  // or the compiler would unpack after the barrier
  }
};

}  // namespace qsdpa
