// Results of the splits to the output, for absorbed MLA.
#pragma once
#include "softmax.cuh"
#include "unpack.cuh"

namespace qsdpa {

// Merges the splits of a row tile. A block: eight columns of all rows; each of PARTS groups of four warps takes every
// PARTS-th split, as four warps hold them in MlaConsumers::store(), so that all loads of a thread are under way at once.
template <typename T, int D, typename F, int PARTS, typename SinkT>
class MlaMerger {
  static constexpr int ROWS = 64, GROUP = 128, THREADS = PARTS * GROUP;
  static constexpr int EACH = 18, CHUNK = PARTS * EACH;  // splits at a time: of a thread, of all
  static constexpr int SHARES = THREADS / ROWS, BATCH = CHUNK / SHARES;  // of a row's statistics
  static constexpr bool BF16 = IsBfloat16<T>::value;
  const T* const partials;
  const float* const stats;
  const SinkT* const sinks;
  const i64 sink_stride;
  T* const out;
  const int heads, length, splits;

 public:
  __device__ __forceinline__ MlaMerger(const T* partials, const float* stats, const SinkT* sinks, i64 sink_stride,
                                       T* out, int heads, int length, int splits)
      : partials(partials), stats(stats), sinks(sinks), sink_stride(sink_stride), out(out), heads(heads),
        length(length), splits(splits) {}

  __device__ __forceinline__ void run() const {
    __shared__ float weights[CHUNK * ROWS];
    __shared__ float4 sums[PARTS * GROUP];
    const int side = blockIdx.x % 2, octet = blockIdx.x / 2, part = threadIdx.x / GROUP, thread = threadIdx.x % GROUP;
    const int row = thread / 32 * 16 + thread % 32 / 4;  // and eight after it
    const i64 tile = static_cast<i64>(blockIdx.z) * gridDim.y + blockIdx.y;
    const uint2* source = reinterpret_cast<const uint2*>(partials) + tile * splits * (ROWS * D / 4) +
                          octet * 2 * GROUP + side * GROUP + thread;
    uint2 y[EACH];
    auto fetch = [&](int first) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        y[i] = {};
        const int split = first + part + i * PARTS;
        if (split < splits) y[i] = source[static_cast<i64>(split) * (ROWS * D / 4)];
      }
    };
    fetch(0);
    const float2* tile_stats = reinterpret_cast<const float2*>(stats) + tile * splits * ROWS;
    float2 own[BATCH];
    load_stats(own, tile_stats, 0);
    const float2 total = reduce_stats(own, tile_stats);

    float4 x = {};
    for (int first = 0; first < splits; first += CHUNK) {
      if (first > 0) load_stats(own, tile_stats, first);
      weigh_splits(weights, own, total);
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const float* w = weights + (part + i * PARTS) * ROWS + row;
        const float2 low = unpack_pair<BF16>(y[i].x), high = unpack_pair<BF16>(y[i].y);
        x = {fmaf(w[0], low.x, x.x), fmaf(w[0], low.y, x.y), fmaf(w[8], high.x, x.z), fmaf(w[8], high.y, x.w)};
      }
      fetch(first + CHUNK);
    }
    sums[threadIdx.x] = x;
    __syncthreads();
    if (part > 0) return;
#pragma unroll
    for (int p = 1; p < PARTS; ++p) {
      const float4 y = sums[p * GROUP + thread];
      x = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
    }
    const int column = side * (D / 2) + 8 * octet;
    store(row, column, x.x, x.y);
    store(row + 8, column, x.z, x.w);
  }

 private:
  // Of the splits from number `first` on, those of the thread: all of its row, SHARES apart. Of none: a sum of zero.
  __device__ __forceinline__ void load_stats(float2 (&own)[BATCH], const float2* tile_stats, int first) const {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int split = first + i * SHARES + static_cast<int>(threadIdx.x) / ROWS;
      own[i] = {LOWEST, 0.0f};
      if (split < splits) own[i] = tile_stats[split * ROWS + threadIdx.x % ROWS];
    }
  }

  // The maximum of several, and the sum of their sums relative to it.
  template <int N>
  __device__ __forceinline__ static float2 combined(const float2 (&each)[N]) {
    float2 total = {LOWEST, 0.0f};
#pragma unroll
    for (int i = 0; i < N; ++i) total.x = fmaxf(total.x, each[i].x);
#pragma unroll
    for (int i = 0; i < N; ++i) total.y += each[i].y * exp2_fast(each[i].x - total.x);
    return total;
  }

  // Of the thread's row, over all splits: the maximum, and one over the sum of probabilities relative to it. `own`: of
  // the first chunk.
  __device__ __forceinline__ float2 reduce_stats(const float2 (&own)[BATCH], const float2* tile_stats) const {
    __shared__ float2 shares[THREADS];
    float2 total = combined(own);
    for (int first = CHUNK; first < splits; first += CHUNK) {
      float2 more[BATCH];
      load_stats(more, tile_stats, first);
      total = combined<2>({total, combined(more)});
    }
    shares[threadIdx.x] = total;
    __syncthreads();
    const int row = threadIdx.x % ROWS, head = (blockIdx.y * ROWS + row) / length;
    float2 all[SHARES + 1];
#pragma unroll
    for (int i = 0; i < SHARES; ++i) all[i] = shares[i * ROWS + row];
    all[SHARES] = {LOWEST, 0.0f};
    if (sinks != nullptr && head < heads)  // one more logit, of a key without a value
      all[SHARES] = {to_float(sinks[head * sink_stride]) * LOG2E, 1.0f};
    total = combined(all);
    return {total.x, total.y == 0.0f ? 0.0f : 1.0f / total.y};
  }

  // What the means of a chunk's splits count, of each row.
  __device__ __forceinline__ static void weigh_splits(float (&weights)[CHUNK * ROWS], const float2 (&own)[BATCH],
                                                      float2 total) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      weights[i * THREADS + threadIdx.x] = exp2_fast(own[i].x - total.x) * own[i].y * total.y;
    __syncthreads();
  }

  // Two columns that a lane holds, of the eight from `column` on.
  __device__ __forceinline__ void store(int row, int column, float low, float high) const {
    row += blockIdx.y * ROWS;
    if (row >= heads * length) return;
    T* line = out + ((static_cast<i64>(blockIdx.z) * heads + row / length) * length + row % length) * D;
    const int block = column / 32, t = column % 32 / 8, pair = threadIdx.x % 4;
    line[key_dim<F>(block, t, pair, 0)] = T(low);
    line[key_dim<F>(block, t, pair, 1)] = T(high);
  }
};

}  // namespace qsdpa
