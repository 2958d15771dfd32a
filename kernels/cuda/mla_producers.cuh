// The warpgroup that makes tiles for absorbed MLA: packed keys, fetched a tile ahead, unpacked into the ring in shared
// memory, and rope keys beside them.
#pragma once
#include "mla_block.cuh"

namespace qsdpa {

template <typename C>
class MlaProducers {
  using T = typename C::T;
  using Unpacker = TileUnpacker<T, typename C::F, C::D, C::PRODUCERS, 32>;
  const MlaBlock<C>& block;

 public:
  __device__ __forceinline__ explicit MlaProducers(const MlaBlock<C>& block) : block(block) {}

  __device__ __forceinline__ void run() const {
    const MlaArguments<C>& a = block.a;
    const int batch = block.batch;
    Unpacker unpacker(a.keys.rows(batch, 0), a.scales.rows(batch, 0), a.biases.rows(batch, 0),
                      threadIdx.x - C::CONSUMERS);
    const auto rope = a.rope_keys.rows(batch, 0);
    if (unpacker.aligned() && rows_aligned(rope, 16)) {
      produce<true>(unpacker, rope);
    } else {
      produce<false>(unpacker, rope);
    }
  }

 private:
  template <bool ALIGNED>
  __device__ __forceinline__ void produce(Unpacker& unpacker, const Rows<T>& rope) const {
    int stage = 0, phase = 1;
    if (block.tiles > 0) unpacker.template fetch<ALIGNED>(block.first_key(0), block.count);
    group_barrier<C::CONSUMERS + C::PRODUCERS>(BARRIERS_MADE);
    for (int i = 0; i < block.tiles; ++i) {
      wait_phase(block.empty(stage), phase);
      copy_rope<ALIGNED>(block.tile_of(stage) + C::PANELS * PANEL_BYTES, rope, block.first_key(i));
      unpacker.template unpack<ALIGNED>(block.tile_of(stage), block.first_key(i), block.count);
      wait_copies<0>();
      publish_to_products();
      arrive(block.full(stage));
      // Not before publishing, which waits for all loads.
      if (i + 1 < block.tiles) unpacker.template fetch<ALIGNED>(block.first_key(i + 1), block.count);
      if (++stage == C::STAGES) stage = 0, phase ^= 1;
    }
  }

  // Rope keys of a tile to a panel; keys past the end repeat the last.
  template <bool ALIGNED>
  __device__ __forceinline__ void copy_rope(u32 panel, const Rows<T>& rope, int first) const {
    const int thread = threadIdx.x - C::CONSUMERS, last = block.count - 1;
#pragma unroll
    for (int i = 0; i < TILE_ROWS * 8 / C::PRODUCERS; ++i) {
      const int key = i * (C::PRODUCERS / 8) + thread / 8, unit = thread % 8;
      const T* source = rope.data + min(first + key, last) * rope.row_stride + unit * 8 * rope.element_stride;
      if constexpr (ALIGNED) {
        copy_async<16>(panel + swizzled(key, unit), source);
      } else {
        u32 x[4];
        load_unit(x, source, rope.element_stride, false);
        store_unit(panel + swizzled(key, unit), x);
      }
    }
    commit_copies();
  }
};

}  // namespace qsdpa
