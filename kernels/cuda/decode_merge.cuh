// Results of the teams of a block and of the splits of the keys, weighted by their maxima, to the output.
//
// The teams' meet in shared memory, over the ring once it is idle. The splits' meet in device memory: each block writes
// its own and draws a ticket, and the block that draws the last one merges them, so that one launch does it all. Where
// they are many, groups of MERGED splits are merged first, each by the last of its blocks.
#pragma once
#include "decode_work.cuh"

namespace qsdpa {

constexpr int MERGED = 8;
constexpr int TICKET_WORDS = 32;  // counters of a tile whose splits are merged in two steps: for all, and each group

template <typename C>
class Merger {
  using T = typename C::T;
  static constexpr int DV = C::DV, ROWS = C::ROWS, TEAMS = C::TEAMS, THREADS = 32 * C::WARPS;

  const DecodeArguments<C>& a;
  const DecodeWork<C> work;
  const SharedMemory memory;
  float* stats;  // behind the partial results

 public:
  __device__ __forceinline__ Merger(const DecodeArguments<C>& arguments, const DecodeWork<C>& work, SharedMemory memory)
      : a(arguments),
        work(work),
        memory(memory),
        stats(a.partials + static_cast<i64>(work.splits) * gridDim.y * gridDim.z * (ROWS * DV)) {}

  // The teams' results to the output, or to this split's place among the partial results.
  __device__ __forceinline__ void merge_teams(i64 tile) const {
    const float2* team_stats = memory.as<float2>(C::TEAM_STATS);  // maximum and sum: [team, row]
    const i64 place = (tile * work.splits + work.split) * ROWS;
    for (int i = threadIdx.x; i < ROWS * DV / 4; i += THREADS) {
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

  // The splits' results to the output, by the last blocks to come here.
  __device__ __forceinline__ void merge_splits(i64 tile) const {
    const int splits = work.splits;
    if (splits == 1) return;
    u32* tickets = a.tickets + tile * (splits <= 2 * MERGED ? 1 : TICKET_WORDS);
    if (splits <= 2 * MERGED) {
      if (is_last(tickets, splits)) merge(tile * splits, splits, 1, true);
    } else {  // in two steps, the first in many blocks at once
      const int group = work.split / MERGED, groups = (splits + MERGED - 1) / MERGED;
      const int members = min(MERGED, splits - group * MERGED);
      if (!is_last(tickets + 1 + group, members)) return;
      merge(tile * splits + group * MERGED, members, 1, false);
      if (is_last(tickets, groups)) merge(tile * splits, groups, MERGED, true);
    }
  }

 private:
  // Counts this block as done; true in the last of `blocks`. The counter wraps to zero, ready for reuse.
  __device__ __forceinline__ bool is_last(u32* counter, int blocks) const {
    bool* last = memory.as<bool>(C::ROW_FACTORS);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      *last = atomicInc(counter, blocks - 1) == blocks - 1;
      __threadfence();
    }
    __syncthreads();
    return *last;
  }

  // What one thread merges at once: fours of dimensions of ITEMS rows, of BATCH splits, so that all of their loads are
  // under way together. Registers are the limit.
  static constexpr int FOURS = ROWS * DV / 4, EACH = (FOURS + THREADS - 1) / THREADS;
  static constexpr int LOADS = 8192 / THREADS, ITEMS = EACH < LOADS / MERGED ? EACH : LOADS / MERGED;
  static constexpr int BATCH = ITEMS > 1 && LOADS / ITEMS < 2 * MERGED ? MERGED : 2 * MERGED;

  // Merge the results of `n` splits, `step` apart from `place` on: to the output, or into the first of them.
  __device__ __forceinline__ void merge(i64 place, int n, int step, bool final) const {
    float2* merged = memory.as<float2>(C::TEAM_STATS);
    for (int begin = threadIdx.x; begin < FOURS; begin += ITEMS * THREADS) {
      float4 x[ITEMS] = {};
      float peak[ITEMS], total[ITEMS] = {};
#pragma unroll
      for (int j = 0; j < ITEMS; ++j) peak[j] = LOWEST;
      for (int first = 0; first < n; first += BATCH) {
        float2 stat[ITEMS][BATCH];
        float4 y[ITEMS][BATCH];
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) load_splits(stat[j], y[j], place, begin + j * THREADS, first, n, step);
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) add_splits(x[j], peak[j], total[j], stat[j], y[j]);
      }
#pragma unroll
      for (int j = 0; j < ITEMS; ++j) {
        const int i = begin + j * THREADS, row = i / (DV / 4), d = i % (DV / 4) * 4;
        if (i >= FOURS) break;
        if (final) {
          add_sink(row, peak[j], total[j], x[j]);
          store(row, d, x[j], total[j]);
        } else {
          *reinterpret_cast<float4*>(a.partials + (place * ROWS + row) * DV + d) = x[j];
          if (d == 0) merged[row] = {peak[j], total[j]};
        }
      }
    }
    if (final) return;
    __syncthreads();  // all have read the first split's
    if (threadIdx.x < ROWS) *reinterpret_cast<float2*>(stats + (place * ROWS + threadIdx.x) * 2) = merged[threadIdx.x];
  }

  // Four dimensions (number i of all) of the splits from number `first` on, with the maxima and sums of their row.
  __device__ __forceinline__ void load_splits(float2 (&stat)[BATCH], float4 (&y)[BATCH], i64 place, int i, int first,
                                              int n, int step) const {
    const int row = i / (DV / 4), d = i % (DV / 4) * 4;
    const float* source = a.partials + (place * ROWS + row) * DV + d;
    const float* source_stats = stats + (place * ROWS + row) * 2;
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      stat[k] = {LOWEST, 0.0f}, y[k] = {};
      if (first + k < n && i < FOURS) {
        stat[k] = load_fresh2(source_stats + (first + k) * step * (ROWS * 2));
        y[k] = load_fresh4(source + (first + k) * step * (ROWS * DV));
      }
    }
  }

  __device__ __forceinline__ void add_splits(float4& x, float& peak, float& total, const float2 (&stat)[BATCH],
                                             const float4 (&y)[BATCH]) const {
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
