// What a block of the kernel for absorbed MLA works on, and where its warpgroups meet.
#pragma once
#include "mla_config.cuh"

namespace qsdpa {

enum MlaBarrier { QUERIES_READY = 1, WEIGHTS_READY = 2, WEIGHTS_TAKEN = 3, BARRIERS_MADE = 4 };

template <typename C>
struct MlaBlock {
  using T = typename C::T;
  const MlaArguments<C>& a;
  const u32 shared;
  const int thread = threadIdx.x % C::GROUP, lane = threadIdx.x % 32, warp = thread / 32;  // of a warpgroup
  const int split = blockIdx.x, splits = gridDim.x, batch = blockIdx.z;
  const int first_row = blockIdx.y * C::ROWS;
  int length, rows, count, tiles;  // `tiles`: of this block

  __device__ __forceinline__ MlaBlock(const MlaArguments<C>& arguments, char* memory)
      : a(arguments), shared(shared_address(memory)) {
    length = a.queries.shape[2];
    rows = a.queries.shape[1] * length;
    count = a.keys.shape[2];
    tiles = ((count + TILE_ROWS - 1) / TILE_ROWS - split + splits - 1) / splits;
  }

  // The ring of tiles: where a stage is, and the barriers that say that it is full, or empty.
  __device__ __forceinline__ u32 tile_of(int stage) const { return shared + stage * C::TILE_BYTES; }
  __device__ __forceinline__ u32 full(int stage) const { return shared + C::FULL + 8 * stage; }
  __device__ __forceinline__ u32 empty(int stage) const { return shared + C::EMPTY + 8 * stage; }

  // By consumers, which meet when queries are ready; the producers wait for them.
  __device__ __forceinline__ void make_barriers() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < C::STAGES; ++s) {
        make_barrier(full(s), C::PRODUCERS);
        make_barrier(empty(s), C::CONSUMERS / 32);
      }
    }
    group_arrive<C::CONSUMERS + C::PRODUCERS>(BARRIERS_MADE);
  }

  // Of the block's tile number i.
  __device__ __forceinline__ int first_key(int i) const { return (split + i * splits) * TILE_ROWS; }

  // Query head and position of a row; rows past the end repeat the last.
  __device__ __forceinline__ int2 head_and_position(int row) const {
    const int n = min(first_row + row, rows - 1);
    return {n / length, n % length};
  }

  // Where a row begins in an operand that has the shape of the queries.
  __device__ __forceinline__ const T* query_row(const View<T>& x, int row) const {
    const int2 at = head_and_position(row);
    return x.data + batch * x.strides[0] + at.x * x.strides[1] + at.y * x.strides[2];
  }

  // This split's place among the partial results.
  __device__ __forceinline__ i64 place() const {
    return (static_cast<i64>(batch) * gridDim.y + blockIdx.y) * splits + split;
  }
};

}  // namespace qsdpa
