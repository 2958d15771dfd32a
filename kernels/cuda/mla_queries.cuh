// Query rows of absorbed MLA to shared memory.
#pragma once
#include "mla_block.cuh"

namespace qsdpa {

// All rows of a block, and of the rope term's queries, which are the last panel. By both groups of consumers.
template <typename C>
__device__ __forceinline__ void load_mla_queries(const MlaBlock<C>& block) {
  using T = typename C::T;
  using F = typename C::F;
  constexpr int WARPS = C::CONSUMERS / 32, ROPE_UNITS = C::ROWS * C::ROPE / 8 / C::CONSUMERS;
  const u32 queries = block.shared + C::QUERIES, rope_panel = queries + C::PANELS * PANEL_BYTES;
  const View<T>&nope = block.a.queries, &rope = block.a.rope_queries;
  const int warp = threadIdx.x / 32, unit = threadIdx.x % 8;
  const i64 stride = rope.strides[3];
  const bool rope_aligned = view_aligned(rope);
  auto rope_row = [&](int i) { return i * (C::CONSUMERS / 8) + static_cast<int>(threadIdx.x) / 8; };
  u32 x[ROPE_UNITS][4];
#pragma unroll
  for (int i = 0; i < ROPE_UNITS; ++i)
    load_unit(x[i], block.query_row(rope, rope_row(i)) + unit * 8 * stride, stride, rope_aligned);
  auto row_of = [&](int row) { return block.query_row(nope, row); };
  if (view_aligned(nope)) {
    load_queries_at_once<F, C::D, C::ROWS, WARPS>(queries, warp, nope.data,
                                                  [&](int row) { return row_of(row) - nope.data; });
  } else {
    load_queries<F, C::D, C::ROWS, WARPS, false>(queries, warp, nope.strides[3], row_of);
  }
#pragma unroll
  for (int i = 0; i < ROPE_UNITS; ++i) store_unit(rope_panel + swizzled(rope_row(i), unit), x[i]);
  publish_to_products();
  group_barrier<C::CONSUMERS>(QUERIES_READY);
}

}  // namespace qsdpa
