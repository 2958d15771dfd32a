// What a block of a decode kernel works on, and where a thread of it stands.
//
// A block serves ROWS query rows of one batch entry and KV head: rows are the heads of the group times the query
// positions, and gridDim.y counts the KV heads for each tile of such rows. The gridDim.x splits share the keys. Of few
// keys most teams of a block get no tile, and their warps leave at once.
#pragma once
#include "decode_config.cuh"

namespace qsdpa {

// x / y of numbers below 2^20, in a fraction of the instructions of a division.
__device__ __forceinline__ int quotient(int x, int y) {
  return static_cast<int>(__fdividef(static_cast<float>(x) + 0.5f, static_cast<float>(y)));
}

template <typename C>
struct DecodeWork {
  static constexpr int FEW_SPLITS = 8;
  const int split = blockIdx.x, splits = gridDim.x, batch = blockIdx.z;
  int kv_head, first_row, group_size, length, rows;  // rows: of the whole group, in all tiles
  int count;                                         // keys
  bool few;                                          // keys: only FEW_WARPS of a block have work

  __device__ __forceinline__ explicit DecodeWork(const DecodeArguments<C>& a) {
    const int kv_heads = a.keys.shape[1], row_tile = quotient(blockIdx.y, kv_heads);
    kv_head = blockIdx.y - row_tile * kv_heads;
    first_row = row_tile * C::ROWS;
    group_size = quotient(a.queries.shape[1], kv_heads);
    length = a.queries.shape[2];
    rows = group_size * length;
    count = a.keys.shape[2];
    few = C::FEW_WARPS < C::WARPS && splits * (C::FEW_WARPS / C::TEAM * C::TILE) >= count;
  }

  __device__ __forceinline__ int warps() const { return few ? C::FEW_WARPS : C::WARPS; }

  // Where a team begins with tiles: after it, every `splits * TEAMS`-th is its own. Neighbours go to a block, which is
  // kind to memory, or where there are many splits to different ones, so that a rest is not left to a few of them.
  __device__ __forceinline__ int first_tile(int team) const {
    return splits <= FEW_SPLITS && !few ? split * C::TEAMS + team : split + splits * team;
  }

  // Query head and position of one of the block's rows; rows past the end repeat the last.
  __device__ __forceinline__ int2 head_and_position(int row) const {
    const int n = min(first_row + row, rows - 1);
    const int head = quotient(n, length);
    return {kv_head * group_size + head, n - head * length};
  }

  // Where a row begins in an operand that has the shape of the queries.
  template <typename X>
  __device__ __forceinline__ const X* query_row(const View<X>& x, int row) const {
    const int2 at = head_and_position(row);
    return x.data + batch * x.strides[0] + at.x * x.strides[1] + at.y * x.strides[2];
  }
};

// A thread's place in its block; r and t are those of matrix operands: row (or column) r, and pair or four t of a row.
template <typename C>
struct DecodeLane {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
  const int team = warp / C::TEAM, member = warp % C::TEAM;

  // The row that a lane has in accumulators: number j (of LANE_ROWS) of block n.
  __device__ __forceinline__ int row_of(int n, int j) const { return 8 * n + 4 * j + t; }
  // What score number x of a block's is of.
  __device__ __forceinline__ int score_key(int x) const { return r + x / C::LANE_ROWS * 8; }
  __device__ __forceinline__ int score_row(int n, int x) const { return row_of(n, x % C::LANE_ROWS); }
  // The row of column r of block n, in operands of halves.
  __device__ __forceinline__ int column_row(int n) const { return 8 * n + (C::LANE_ROWS == 1 ? 0 : r % 2 * 4) + r / 2; }

  __device__ __forceinline__ void team_barrier() const {
    if constexpr (C::TEAM == 1) {
      __syncwarp();
    } else {
      group_barrier<C::TEAM_THREADS>(1 + team);
    }
  }
};

// Where a lane's part of 16 keys begins in a tile, in bytes of their codes, and its row r. They stay in registers.
template <typename C>
struct TileOffsets {
  u32 keys, values, row;

  __device__ __forceinline__ explicit TileOffsets(const DecodeLane<C>& place)
      : keys(C::KeyWords::place_of(place.lane, place.member * C::K::row_bytes(C::D / C::TEAM))),
        values(C::ValueWords::place_of(place.lane, place.member * C::V::row_bytes(C::DV / C::TEAM))),
        row(place.r) {
    keep(keys);
    keep(values);
    keep(row);
  }
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Over the lanes with the same t, which have the same rows.
__device__ __forceinline__ float quad_rows_sum(float x) {
#pragma unroll
  for (int d = 4; d < 32; d *= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

}  // namespace qsdpa
