// What a kernel of absorbed MLA is specialized on, its shared memory, and its operands.
#pragma once
#include "operands.cuh"
#include "unpack.cuh"

namespace qsdpa {

template <typename T_, int D_, typename F_, int MASK_, typename MaskT_, int STAGES_>
struct MlaConfig {
  using T = T_;
  using F = F_;
  using MaskT = MaskT_;
  static constexpr int D = D_, MASK = MASK_, STAGES = STAGES_;
  static constexpr int ROPE = 64, ROWS = 64;
  static constexpr int GROUP = 128, CONSUMERS = 2 * GROUP, PRODUCERS = GROUP;  // threads
  // Of a thread: together no more than the launch gives out (168 each). Fewer for the left, and the compiler runs its
  // products one by one.
  static constexpr int LEFT_REGISTERS = 208, RIGHT_REGISTERS = 184, PRODUCER_REGISTERS = 112;
  static constexpr bool BF16 = IsBfloat16<T>::value;
  static constexpr int PANELS = D / PANEL_COLUMNS;

  // Shared memory, in bytes, from a multiple of 1024 on.
  static constexpr int TILE_BYTES = (PANELS + 1) * PANEL_BYTES;  // the last panel is the rope keys
  static constexpr int QUERIES = STAGES * TILE_BYTES;
  static constexpr int WEIGHTS = QUERIES + TILE_BYTES;  // P, as the left's threads hold it
  static constexpr int FACTORS = WEIGHTS + 4 * GROUP * 16;
  static constexpr int FULL = FACTORS + GROUP * 8;
  static constexpr int EMPTY = FULL + 8 * STAGES;
  static constexpr int SHARED_BYTES = EMPTY + 8 * STAGES;
};

template <typename C>
struct MlaArguments {
  using T = typename C::T;
  View<T> queries;
  View<u32> keys;
  View<typename C::F::Scale> scales, biases;
  View<typename C::MaskT> mask;
  View<T> rope_queries, rope_keys;
  const float* scale;
  T* partials;      // [row tile, split, quad of registers, thread, 4]: means over the split's keys
  float* stats;     // [row tile, split, row, 2]: running maximum and sum
};

}  // namespace qsdpa
