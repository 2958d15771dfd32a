// Copies of tiles of keys and values (codes, scales, biases, rope keys) into the ring in shared memory, by the threads
// of a team of warps.
//
// Caches are mostly slices of larger arrays whose rows follow each other without gaps: then each part of a tile is one
// run of bytes, and a thread's addresses are pointers that move on by a constant. All else is copied by its strides, by
// a function of its own, out of the way of the main loop's registers.
#pragma once
#include "decode_work.cuh"

namespace qsdpa {

// The parts of a tile as runs of bytes: a thread's pointers to the first tile's.
template <typename C>
class TileRuns {
  using K = typename C::K;
  using V = typename C::V;
  static constexpr int KEY_BYTES = C::KeyScaleTile::BYTES, VALUE_BYTES = C::SHARED_KV ? 0 : C::ValueScaleTile::BYTES;
  static constexpr int KEY_BIAS = KEY_BYTES, VALUE_SCALE = KEY_BYTES * (K::HAS_BIAS ? 2 : 1),
                       VALUE_BIAS = VALUE_SCALE + VALUE_BYTES,
                       ALL = VALUE_SCALE + VALUE_BYTES * (V::HAS_BIAS ? 2 : 1);
  static constexpr int ROUND = 16 * C::TEAM_THREADS, ROUNDS = (ALL + ROUND - 1) / ROUND;

  const char *keys, *values = nullptr;
  const char* scales[ROUNDS];  // and biases
  u32 thread;
  typename C::KeyTile::Places key_places;
  typename C::ValueTile::Places value_places;

 public:
  __device__ __forceinline__ TileRuns(const DecodeArguments<C>& a, const DecodeWork<C>& work)
      : thread(threadIdx.x % C::TEAM_THREADS), key_places(thread), value_places(thread) {
    keep(thread);
    const u32 batch = work.batch, head = work.kv_head;  // without signs, which cost instructions in 64 bits
    const auto key_rows = a.keys.rows(batch, head);
    const auto key_scales = a.key_scales.rows(batch, head);
    const auto key_biases = a.key_biases.rows(batch, head);
    const auto value_rows = a.values.rows(batch, head);
    const auto value_scales = a.value_scales.rows(batch, head);
    const auto value_biases = a.value_biases.rows(batch, head);
    const auto rope_rows = a.rope_keys.rows(batch, 0);
    u64 apart = rows_apart(key_rows, C::KeyTile::ROW_BYTES / 4, C::KeyTile::CHUNK) |
                rows_apart(key_scales, C::KeyScaleTile::ROW, 16);
    if constexpr (K::HAS_BIAS) apart |= rows_apart(key_biases, C::KeyScaleTile::ROW, 16);
    keys = reinterpret_cast<const char*>(key_rows.data) + thread * C::KeyTile::CHUNK;
    if constexpr (!C::SHARED_KV) {
      apart |= rows_apart(value_rows, C::ValueTile::ROW_BYTES / 4, C::ValueTile::CHUNK) |
               rows_apart(value_scales, C::ValueScaleTile::ROW, 16);
      if constexpr (V::HAS_BIAS) apart |= rows_apart(value_biases, C::ValueScaleTile::ROW, 16);
      values = reinterpret_cast<const char*>(value_rows.data) + thread * C::ValueTile::CHUNK;
    }
    if constexpr (C::ROPE > 0) apart |= rows_aligned(rope_rows, 16) ? 0 : 1;
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int at = i * ROUND + thread * 16;
      const char* part = reinterpret_cast<const char*>(key_scales.data);
      part = at < KEY_BIAS ? part : reinterpret_cast<const char*>(key_biases.data) - KEY_BIAS;
      part = at < VALUE_SCALE ? part : reinterpret_cast<const char*>(value_scales.data) - VALUE_SCALE;
      part = at < VALUE_BIAS ? part : reinterpret_cast<const char*>(value_biases.data) - VALUE_BIAS;
      scales[i] = part + at;
      keep(scales[i]);
    }
    if (apart != 0) keys = nullptr;
    keep(keys);
    keep(values);
  }

  __device__ __forceinline__ bool usable() const { return keys != nullptr; }

  __device__ __forceinline__ void copy(u32 stage, const DecodeArguments<C>& a, const DecodeWork<C>& work,
                                       int tile) const {
    if ((tile + 1) * C::TILE <= work.count) {
      copy_part<false>(stage, tile, C::TILE);
    } else {
      copy_part<true>(stage, tile, work.count - tile * C::TILE);
    }
    if constexpr (C::ROPE > 0)
      C::RopeTile::copy_rows(stage + C::ROPE_KEYS, a.rope_keys.rows(work.batch, 0), tile * C::TILE, work.count, thread);
  }

 private:
  // The first `valid` keys; zeros for the rest.
  template <bool PARTIAL>
  __device__ __forceinline__ void copy_part(u32 stage, u32 tile, int valid) const {
    C::KeyTile::template copy_run<PARTIAL>(stage, key_places,
                                           keys + static_cast<u64>(tile) * C::KeyTile::SOURCE_BYTES, thread,
                                           valid * C::KeyTile::ROW_BYTES);
    if constexpr (!C::SHARED_KV)
      C::ValueTile::template copy_run<PARTIAL>(stage + C::VALUES, value_places,
                                               values + static_cast<u64>(tile) * C::ValueTile::SOURCE_BYTES, thread,
                                               valid * C::ValueTile::ROW_BYTES);
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int at = i * ROUND + thread * 16;
      const int run = at < VALUE_SCALE ? KEY_BYTES : VALUE_BYTES;
      const char* source = scales[i] + static_cast<u64>(tile) * static_cast<u32>(run);
      int bytes = 16;
      if constexpr (PARTIAL) {
        const int begin = at < KEY_BIAS      ? at
                          : at < VALUE_SCALE ? at - KEY_BIAS
                          : at < VALUE_BIAS  ? at - VALUE_SCALE
                                             : at - VALUE_BIAS;
        const int end = valid * run / C::TILE;
        bytes = max(0, min(16, end - begin));
        if (bytes == 0) source -= begin;
      }
      if ((i + 1) * ROUND <= ALL || at < ALL) copy_async<16>(stage + C::KEY_SCALES + at, source, bytes);
    }
  }
};

// A tile of any strides.
template <typename C>
__device__ __noinline__ void copy_strided(const DecodeArguments<C>& a, u32 stage, int batch, int kv_head, int first) {
  const int thread = threadIdx.x % C::TEAM_THREADS, count = a.keys.shape[2];
  C::KeyTile::copy_rows(stage, a.keys.rows(batch, kv_head), first, count, thread);
  C::KeyScaleTile::copy_rows(stage + C::KEY_SCALES, a.key_scales.rows(batch, kv_head), first, count, thread);
  if constexpr (C::K::HAS_BIAS)
    C::KeyScaleTile::copy_rows(stage + C::KEY_BIASES, a.key_biases.rows(batch, kv_head), first, count, thread);
  if constexpr (!C::SHARED_KV) {
    C::ValueTile::copy_rows(stage + C::VALUES, a.values.rows(batch, kv_head), first, count, thread);
    C::ValueScaleTile::copy_rows(stage + C::VALUE_SCALES, a.value_scales.rows(batch, kv_head), first, count, thread);
    if constexpr (C::V::HAS_BIAS)
      C::ValueScaleTile::copy_rows(stage + C::VALUE_BIASES, a.value_biases.rows(batch, kv_head), first, count, thread);
  }
  if constexpr (C::ROPE > 0)
    C::RopeTile::copy_rows(stage + C::ROPE_KEYS, a.rope_keys.rows(batch, 0), first, count, thread);
}

// Copies of whole tiles, the one way or the other.
template <typename C>
class TileCopier {
  const DecodeArguments<C>& a;
  const DecodeWork<C> work;
  const SharedMemory memory;
  const TileRuns<C> runs;

 public:
  __device__ __forceinline__ TileCopier(const DecodeArguments<C>& arguments, const DecodeWork<C>& work,
                                        SharedMemory memory)
      : a(arguments), work(work), memory(memory), runs(a, work) {
    if (!runs.usable()) keep_arguments();
  }

  // Begins to copy tile number `tile`, if there is one, to this shared address: always one group of copies.
  __device__ __forceinline__ void fetch(int tile, u32 stage) const {
    if (tile * C::TILE < work.count) {
      if (runs.usable()) {
        runs.copy(stage, a, work, tile);
      } else {
        copy_strided<C>(*kept_arguments(), stage, work.batch, work.kv_head, tile * C::TILE);
      }
    }
    commit_copies();
  }

 private:
  // copy_strided() reads them from shared memory; it is rare, and registers are dear.
  __device__ __forceinline__ void keep_arguments() const {
    static_assert(sizeof(a) <= C::ARGUMENT_BYTES, "the arguments outgrew their place");
    if (threadIdx.x == 0) *kept_arguments() = a;
    __syncthreads();
  }
  __device__ __forceinline__ DecodeArguments<C>* kept_arguments() const {
    return memory.as<DecodeArguments<C>>(C::ARGUMENTS);
  }
};

}  // namespace qsdpa
