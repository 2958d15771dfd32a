// Results of the teams of a block and of the splits of the keys, weighted by their maxima, to the output.
//
// The teams' meet in shared memory, over the ring once it is idle. The splits' meet in device memory: each block writes
// its own and counts itself in, so that one launch does it all. The last to come merges them, or, where they are much
// to read, each block a slice of the output, for which it waits until all have come. No block relies on the others
// being under way, since a device that has other work may hold them back: one that has waited for long leaves, and the
// last to come finds that out, and merges everything.
#pragma once
#include "decode_work.cuh"

namespace qsdpa {

// A tile's counter: how many of its blocks have written their results, how many of these left without waiting for the
// rest, and how many will not look at it again. The last of them all leaves it at zero, as it was found.
constexpr int COUNT_BITS = 10;
constexpr u32 COUNT = (1u << COUNT_BITS) - 1, ARRIVED = 1, DESERTED = 1u << COUNT_BITS, GONE = 1u << (2 * COUNT_BITS);

template <typename C>
class Merger {
  using T = typename C::T;
  static constexpr int DV = C::DV, ROWS = C::ROWS;

  const DecodeArguments<C>& a;
  const DecodeWork<C> work;
  const SharedMemory memory;
  const int threads;
  float* stats;  // behind the partial results

 public:
  __device__ __forceinline__ Merger(const DecodeArguments<C>& arguments, const DecodeWork<C>& work, SharedMemory memory)
      : a(arguments),
        work(work),
        memory(memory),
        threads(32 * work.warps()),
        stats(a.partials + static_cast<i64>(work.splits) * gridDim.y * gridDim.z * (ROWS * DV)) {}

  // The teams' results to the output, or to this split's place among the partial results.
  __device__ __forceinline__ void merge_teams(i64 tile) const {
    if (C::FEW_WARPS < C::WARPS && work.few) {
      merge_teams<C::FEW_WARPS / C::TEAM>(tile);
    } else {
      merge_teams<C::TEAMS>(tile);
    }
  }

  // The splits' results to the output, by the last block of the tile, or by each a slice.
  __device__ __forceinline__ void merge_splits(i64 tile) const {
    const int splits = work.splits;
    if (splits == 1) return;
    u32* counter = a.tickets + tile;
    int slice = FOURS, first = 0, last = 0;
    if (splits * FOURS < MUCH || gridDim.x * gridDim.y * gridDim.z > a.blocks_at_once) {
      if (!is_last(counter)) return;
    } else {
      const Role role = meet(counter);
      if (threadIdx.x == threads - 1) leave(counter);  // rather idle than the first threads
      if (role == NONE) return;
      slice = (FOURS + splits - 1) / splits;
      first = role == ALL ? 0 : work.split, last = role == ALL ? splits - 1 : work.split;
    }
    for (int i = first; i <= last; ++i) {
      merge(tile * splits * ROWS, i * slice, min((i + 1) * slice, FOURS));
      __syncthreads();
    }
  }

 private:
  static constexpr int FOURS = ROWS * DV / 4;  // of dimensions, of all rows
  static constexpr int MUCH = 4096;            // of them: what one block merges as fast as it would meet the others
  static constexpr i64 PATIENCE = 1 << 16;     // cycles; far more than blocks differ that run at once

  enum Role { NONE, SLICE, ALL };  // what a block is to merge

  // Those of the first TEAMS, whose threads are all that are left.
  template <int TEAMS>
  __device__ __forceinline__ void merge_teams(i64 tile) const {
    const float2* team_stats = memory.as<float2>(C::TEAM_STATS);  // maximum and sum: [team, row]
    const i64 place = (tile * work.splits + work.split) * ROWS;
    for (int i = threadIdx.x; i < ROWS * DV / 4; i += 32 * C::TEAM * TEAMS) {
      const int row = i / (DV / 4), d = i % (DV / 4) * 4;
      float peak = LOWEST;
#pragma unroll
      for (int w = 0; w < TEAMS; ++w) peak = fmaxf(peak, team_stats[w * ROWS + row].x);
      float4 x = {};
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < TEAMS; ++w) {
        const float2 stat = team_stats[w * ROWS + row];
        const float f = exp2_fast(stat.x - peak);
        const float4 y = *reinterpret_cast<const float4*>(memory.as<float>(0) + (w * ROWS + row) * C::OUT_PITCH + d);
        total = fmaf(f, stat.y, total);
        x = {fmaf(f, y.x, x.x), fmaf(f, y.y, x.y), fmaf(f, y.z, x.z), fmaf(f, y.w, x.w)};
      }
      if (work.splits == 1) {
        add_sink(row, peak, total, x);
        store(row, d, x, total);
      } else {
        *reinterpret_cast<float4*>(a.partials + (place + row) * DV + d) = x;
        if (d == 0) *reinterpret_cast<float2*>(stats + (place + row) * 2) = {peak, total};
      }
    }
  }

  // Counts the block in, whose results are written; true in the last of the tile. The counter wraps to zero.
  __device__ __forceinline__ bool is_last(u32* counter) const {
    bool* last = memory.as<bool>(C::ROW_FACTORS);
    __syncthreads();
    if (threadIdx.x == 0) *last = count_up_to(counter, work.splits - 1) == work.splits - 1;
    __syncthreads();
    return *last;
  }

  // Counts the block in, and waits for the others.
  __device__ __forceinline__ Role meet(u32* counter) const {
    Role* role = memory.as<Role>(C::ROW_FACTORS);
    __syncthreads();
    if (threadIdx.x == 0) {
      const u32 all = work.splits;
      u32 seen = count(counter, ARRIVED) + ARRIVED;
      *role = (seen & COUNT) == all && (seen / DESERTED & COUNT) > 0 ? ALL : SLICE;
      for (const i64 begin = clock64(); (seen & COUNT) != all && clock64() - begin < PATIENCE;)
        seen = load_acquire(counter);
      if ((seen & COUNT) != all && (count(counter, DESERTED) & COUNT) != all) *role = NONE;
    }
    __syncthreads();
    return *role;
  }

  __device__ __forceinline__ void leave(u32* counter) const {
    if (count(counter, GONE) / GONE == work.splits - 1) *counter = 0;
  }

  // Merges fours of dimensions, numbers `begin` to `end`, of the splits' results that begin at row `place` of all. Where
  // threads are left over, several share a four, and add up what they have in shared memory.
  __device__ __forceinline__ void merge(i64 place, int begin, int end) const {
    // Of the fours that the block does at once.
    const int log = min(31 - __clz(threads), 32 - __clz(max(end - begin - 1, 0)));
    const int shares = min(threads >> log, (work.splits + BATCH - 1) / BATCH), share = threadIdx.x >> log;
    float4* const sums = memory.as<float4>(0);
    float2* const sum_stats = memory.as<float2>(threads * 16);
    static_assert(32 * C::WARPS * 24 <= C::ROW_FACTORS, "shared memory for what threads have of a four");
    for (int first = begin; first < end; first += 1 << log) {
      const int i = first + (threadIdx.x & ((1 << log) - 1)), row = i / (DV / 4), d = i % (DV / 4) * 4;
      float4 x = {};
      float peak = LOWEST, total = 0.0f;
      float2 stat[BATCH];
      float4 y[BATCH];
      if (i < end && share < shares) {
        const float *of_row = a.partials + (place + row) * DV + d, *stats_of_row = stats + (place + row) * 2;
        keep(of_row);  // what is added to it takes one instruction
        keep(stats_of_row);
        for (int split = share; split < work.splits; split += BATCH * shares) {
          load_splits(stat, y, stats_of_row, of_row, split, shares);
          add(x, peak, total, stat, y);
        }
      }
      if (shares > 1) {  // so that this is the only pass
        sums[threadIdx.x] = x, sum_stats[threadIdx.x] = {peak, total};
        __syncthreads();
      }
      if (share > 0) return;
      for (int k = 1; k < shares; k += BATCH) {
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
          const int at = ((k + j) << log) + threadIdx.x;
          stat[j] = {LOWEST, 0.0f}, y[j] = {};
          if (k + j < shares) stat[j] = sum_stats[at], y[j] = sums[at];
        }
        add(x, peak, total, stat, y);
      }
      if (i < end) {
        add_sink(row, peak, total, x);
        store(row, d, x, total);
      }
    }
  }

  static constexpr int BATCH = 8;  // results that a thread reads before it adds them up

  // Of every `step`-th split from `first` on: the maximum and sum of a row, and four of its dimensions. Those of split 0
  // are at these places.
  __device__ __forceinline__ void load_splits(float2 (&stat)[BATCH], float4 (&y)[BATCH], const float* stats_of_row,
                                              const float* of_row, int first, int step) const {
    const u32 most = work.splits - 1;
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      const u32 split = first + k * step, at = min(split, most) * ROWS;
      stat[k] = load_fresh2(stats_of_row + at * 2), y[k] = load_fresh4(of_row + at * DV);
      if (split > most) stat[k] = {LOWEST, 0.0f}, y[k] = {};
    }
  }

  __device__ __forceinline__ static void add(float4& x, float& peak, float& total, const float2 (&stat)[BATCH],
                                             const float4 (&y)[BATCH]) {
    const float before = peak;
#pragma unroll
    for (int k = 0; k < BATCH; ++k) peak = fmaxf(peak, stat[k].x);
    const float f = exp2_fast(before - peak);
    total *= f;
    x = {x.x * f, x.y * f, x.z * f, x.w * f};
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      const float w = exp2_fast(stat[k].x - peak);
      total = fmaf(w, stat[k].y, total);
      x = {fmaf(w, y[k].x, x.x), fmaf(w, y[k].y, x.y), fmaf(w, y[k].z, x.z), fmaf(w, y[k].w, x.w)};
    }
  }

  // A sink is one more logit, of a key without a value.
  __device__ __forceinline__ void add_sink(int row, float peak, float& total, float4& x) const {
    if (a.sinks == nullptr) return;
    const float sink = to_float(a.sinks[work.head_and_position(row).x * a.sink_stride]) * LOG2E;
    const float higher = fmaxf(peak, sink), f = exp2_fast(peak - higher);
    total = total * f + exp2_fast(sink - higher);
    x = {x.x * f, x.y * f, x.z * f, x.w * f};
  }

  // Four dimensions of a row, from `d` on, divided by the sum of its probabilities.
  __device__ __forceinline__ void store(int row, int d, const float4& x, float total) const {
    if (work.first_row + row >= work.rows) return;
    const int2 at = work.head_and_position(row);
    const i64 line = (static_cast<i64>(work.batch) * a.queries.shape[1] + at.x) * work.length + at.y;
    const float f = total > 0.0f ? 1.0f / total : 0.0f;
    T* out = a.out + line * DV + d;
    out[0] = T(x.x * f), out[1] = T(x.y * f), out[2] = T(x.z * f), out[3] = T(x.w * f);
  }
};

}  // namespace qsdpa
