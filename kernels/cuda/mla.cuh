// Absorbed MLA decoding on Hopper's tensor cores: many query rows against one quantized latent that is both keys and
// values, and a rope term.
//
// Work: a block serves 64 query rows (heads times positions) of one sequence; the splits of these deal the tiles of 64
// keys among themselves. Warpgroups:
//   left       scores S = Q K^T [64 x 64], softmax, P to registers and to the right; O += P V, left half of its columns
//   right      O += P V, the other half
//   producers  fetch packed keys a tile ahead, and unpack them, once, into a ring of tiles in shared memory
//              (unpack.cuh); rope keys are copied beside
// The tile is keys and values at once: its rows are the keys' rows in S, its columns the values' columns in O. While
// the left does its softmax nothing else is under way; the products of values of a tile and of scores of the next run
// back to back.
//
// Results of the splits meet in a second launch, MlaMerger: one block cannot hold them, and many can merge at once. They
// are written as means, in the queries' type: what the output is rounded to, at half the bytes of sums.
#pragma once
#include "softmax.cuh"
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

template <typename C>
class MlaDecoder {
  using T = typename C::T;
  using F = typename C::F;
  static constexpr int D = C::D, STAGES = C::STAGES;
  static constexpr int COLUMNS = D / 2;  // of a half of the output
  static constexpr int FIRST_PART = D / 4;  // of the dimensions of scores: under way until the rest is
  using Unpacker = TileUnpacker<T, F, D, C::PRODUCERS, 32>;
  enum Barrier { QUERIES_READY = 1, WEIGHTS_READY = 2, WEIGHTS_TAKEN = 3, BARRIERS_MADE = 4 };

  const MlaArguments<C>& a;
  const u32 shared;
  const int thread = threadIdx.x % C::GROUP, lane = threadIdx.x % 32, warp = thread / 32;
  const int split = blockIdx.x, splits = gridDim.x, batch = blockIdx.z;
  const int first_row = blockIdx.y * C::ROWS;
  int length, rows, count, tiles;  // `tiles`: of this block

 public:
  __device__ __forceinline__ MlaDecoder(const MlaArguments<C>& arguments, char* memory)
      : a(arguments), shared(shared_address(memory)) {
    length = a.queries.shape[2];
    rows = a.queries.shape[1] * length;
    count = a.keys.shape[2];
    tiles = ((count + TILE_ROWS - 1) / TILE_ROWS - split + splits - 1) / splits;
  }

  // What a block needs first, it asks for first, each group for itself: the first product waits for all of it.
  __device__ __forceinline__ void run() {
    if (threadIdx.x >= C::CONSUMERS) {
      give_registers<C::PRODUCER_REGISTERS>();
      produce();
    } else {
      make_barriers();
      const float scale = *a.scale;
      load_queries();
      if (threadIdx.x < C::GROUP) {
        take_registers<C::LEFT_REGISTERS>();
        left(scale);
      } else {
        take_registers<C::RIGHT_REGISTERS>();
        right();
      }
    }
  }

 private:
  __device__ __forceinline__ u32 full(int stage) const { return shared + C::FULL + 8 * stage; }
  __device__ __forceinline__ u32 empty(int stage) const { return shared + C::EMPTY + 8 * stage; }
  __device__ __forceinline__ u32 tile_of(int stage) const { return shared + stage * C::TILE_BYTES; }
  __device__ __forceinline__ int first_key(int i) const { return (split + i * splits) * TILE_ROWS; }

  // By consumers, which meet when queries are ready; the producers wait for them.
  __device__ __forceinline__ void make_barriers() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < STAGES; ++s) {
        make_barrier(full(s), C::PRODUCERS);
        make_barrier(empty(s), C::CONSUMERS / 32);
      }
    }
    group_arrive<C::CONSUMERS + C::PRODUCERS>(BARRIERS_MADE);
  }

  // Query head and position of a row; rows past the end repeat the last.
  __device__ __forceinline__ int2 head_and_position(int row) const {
    const int n = min(first_row + row, rows - 1);
    return {n / length, n % length};
  }

  // ---- the producers ----

  __device__ __forceinline__ void produce() const {
    Unpacker unpacker(a.keys.rows(batch, 0), a.scales.rows(batch, 0), a.biases.rows(batch, 0),
                      threadIdx.x - C::CONSUMERS);
    const auto rope = a.rope_keys.rows(batch, 0);
    if (unpacker.aligned() && rows_aligned(rope, 16)) {
      produce<true>(unpacker, rope);
    } else {
      produce<false>(unpacker, rope);
    }
  }

  template <bool ALIGNED>
  __device__ __forceinline__ void produce(Unpacker& unpacker, const Rows<T>& rope) const {
    int stage = 0, phase = 1;
    if (tiles > 0) unpacker.template fetch<ALIGNED>(first_key(0), count);
    group_barrier<C::CONSUMERS + C::PRODUCERS>(BARRIERS_MADE);
    for (int i = 0; i < tiles; ++i) {
      wait_phase(empty(stage), phase);
      copy_rope<ALIGNED>(tile_of(stage) + C::PANELS * PANEL_BYTES, rope, first_key(i));
      unpacker.template unpack<ALIGNED>(tile_of(stage), first_key(i), count);
      wait_copies<0>();
      publish_to_products();
      arrive(full(stage));
      // Not before publishing, which waits for all loads.
      if (i + 1 < tiles) unpacker.template fetch<ALIGNED>(first_key(i + 1), count);
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }

  // Rope keys of a tile to a panel; keys past the end repeat the last.
  template <bool ALIGNED>
  __device__ __forceinline__ void copy_rope(u32 panel, const Rows<T>& rope, int first) const {
    const int thread = threadIdx.x - C::CONSUMERS;
#pragma unroll
    for (int i = 0; i < TILE_ROWS * 8 / C::PRODUCERS; ++i) {
      const int key = i * (C::PRODUCERS / 8) + thread / 8, unit = thread % 8;
      const T* source = rope.data + min(first + key, count - 1) * rope.row_stride + unit * 8 * rope.element_stride;
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

  // ---- the consumers ----

  // All rows of queries to shared memory. By both groups of consumers.
  __device__ __forceinline__ void load_queries() const {
    constexpr int WARPS = C::CONSUMERS / 32, ROPE_UNITS = C::ROWS * C::ROPE / 8 / C::CONSUMERS;
    const int consumer = threadIdx.x / 32, unit = threadIdx.x % 8;
    const i64 stride = a.rope_queries.strides[3];
    const bool rope_aligned = view_aligned(a.rope_queries);
    auto rope_row = [&](int i) { return i * (C::CONSUMERS / 8) + static_cast<int>(threadIdx.x) / 8; };
    u32 rope[ROPE_UNITS][4];
#pragma unroll
    for (int i = 0; i < ROPE_UNITS; ++i)
      load_unit(rope[i], row_of(a.rope_queries, head_and_position(rope_row(i))) + unit * 8 * stride, stride,
                rope_aligned);
    auto query = [&](int row) { return row_of(a.queries, head_and_position(row)); };
    if (view_aligned(a.queries)) {
      load_queries_at_once<F, D, C::ROWS, WARPS>(shared + C::QUERIES, consumer, query);
    } else {
      qsdpa::load_queries<F, D, C::ROWS, WARPS, false>(shared + C::QUERIES, consumer, a.queries.strides[3], query);
    }
#pragma unroll
    for (int i = 0; i < ROPE_UNITS; ++i)
      store_unit(shared + C::QUERIES + C::PANELS * PANEL_BYTES + swizzled(rope_row(i), unit), rope[i]);
    publish_to_products();
    group_barrier<C::CONSUMERS>(QUERIES_READY);
  }

  __device__ __forceinline__ const T* row_of(const View<T>& x, int2 at) const {
    return x.data + batch * x.strides[0] + at.x * x.strides[1] + at.y * x.strides[2];
  }

  // s = (rope queries) * (rope keys)^T
  __device__ __forceinline__ void score_rope(float (&s)[8][4], u32 tile) const {
    const u64 queries = rows_descriptor(shared + C::QUERIES + C::PANELS * PANEL_BYTES);
    const u64 keys = rows_descriptor(tile + C::PANELS * PANEL_BYTES);
#pragma unroll
    for (int k = 0; k < C::ROPE / 16; ++k) multiply_rows<C::BF16>(s, queries + 2 * k, keys + 2 * k, k > 0);
  }

  // s += queries * keys^T, of the dimensions from FIRST to END
  template <int FIRST, int END>
  __device__ __forceinline__ void add_scores(float (&s)[8][4], u32 tile) const {
    const u64 queries = rows_descriptor(shared + C::QUERIES), keys = rows_descriptor(tile);
#pragma unroll
    for (int k = FIRST / 16; k < END / 16; ++k) {
      const int at = k / 4 * (PANEL_BYTES >> 4) + k % 4 * 2;
      multiply_rows<C::BF16>(s, queries + at, keys + at, true);
    }
    commit_products();
  }

  // o += p * values, of the half `side` of the columns
  __device__ __forceinline__ void add_values(float (&o)[COLUMNS / 8][4], const u32 (&p)[4][4], u32 tile,
                                             int side) const {
    const u64 values = columns_descriptor<PANEL_BYTES>(tile + side * (COLUMNS / PANEL_COLUMNS) * PANEL_BYTES);
#pragma unroll
    for (int k = 0; k < TILE_ROWS / 16; ++k) multiply_columns<C::BF16>(o, p[k], values + k * (16 * 128 >> 4));
  }

  __device__ __forceinline__ void release(int stage) const {
    if (lane == 0) arrive(empty(stage));
  }

  __device__ __forceinline__ void left(float scale) const {
    // Scores are summed in units of the latent's products, so that the rope term is divided by the scale.
    const float unit = fabsf(scale) < 1e-30f ? 1e-30f : scale;
    const float to_logits = unit * LOG2E, rope_factor = 1.0f / unit;
    float o[COLUMNS / 8][4] = {}, s[8][4];
    RunningSoftmax softmax;
    u32 p[4][4];
    auto scale_rope = [&] {
      pin(s);
      multiply_by(s, rope_factor);
    };

    if (tiles > 0) {
      wait_phase(full(0), 0);
      begin_products();
      score_rope(s, tile_of(0));
      commit_products();
      wait_products<0>();
      scale_rope();
      begin_products();
      add_scores<0, D>(s, tile_of(0));
    }
    int stage = 0, phase = 0;
    for (int i = 0; i < tiles; ++i) {
      wait_products<0>();
      pin(s);
      float factor[2];
      multiply_by(s, to_logits);
      mask(s, first_key(i));
      softmax.apply(s, factor);
      pack_weights<C::BF16>(p, s);
      if (i > 0) group_barrier<C::CONSUMERS>(WEIGHTS_TAKEN);
      give_weights(p);
      give_factors(factor);
      group_arrive<C::CONSUMERS>(WEIGHTS_READY);
      rescale(o, factor);
      const u32 tile = tile_of(stage), used = stage;
      if (++stage == STAGES) stage = 0, phase ^= 1;
      if (i + 1 < tiles) {
        wait_phase(full(stage), phase);
        begin_products();
        score_rope(s, tile_of(stage));
        commit_products();
        add_values(o, p, tile, 0);
        commit_products();
        wait_products<1>();
        scale_rope();
        begin_products();
        add_scores<0, FIRST_PART>(s, tile_of(stage));
        wait_products<1>();  // for the values, which the producers wait to be rid of
        release(used);
        add_scores<FIRST_PART, D>(s, tile_of(stage));
      } else {
        begin_products();
        add_values(o, p, tile, 0);
        commit_products();
        wait_products<0>();
      }
      pin(o);
    }
    float to_mean[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = softmax.total(h);
      const int row = 16 * warp + lane / 4 + 8 * h;
      if (lane % 4 == 0)
        *reinterpret_cast<float2*>(a.stats + (place() * C::ROWS + row) * 2) = {softmax.top[h], total};
      to_mean[h] = total == 0.0f ? 0.0f : 1.0f / total;
    }
    if (tiles > 0) group_barrier<C::CONSUMERS>(WEIGHTS_TAKEN);
    give_factors(to_mean);
    group_arrive<C::CONSUMERS>(WEIGHTS_READY);
    store(o, to_mean, 0);
  }

  __device__ __forceinline__ void right() const {
    float o[COLUMNS / 8][4] = {};
    u32 p[4][4];
    int stage = 0, phase = 0;
    for (int i = 0; i < tiles; ++i) {
      float factor[2];
      group_barrier<C::CONSUMERS>(WEIGHTS_READY);
      take_weights(p);
      take_factors(factor);
      group_arrive<C::CONSUMERS>(WEIGHTS_TAKEN);
      rescale(o, factor);
      wait_phase(full(stage), phase);
      begin_products();
      add_values(o, p, tile_of(stage), 1);
      commit_products();
      wait_products<0>();
      pin(o);
      release(stage);
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    float to_mean[2];
    group_barrier<C::CONSUMERS>(WEIGHTS_READY);
    take_factors(to_mean);
    store(o, to_mean, 1);
  }

  // The mask, and the end of the keys.
  __device__ __forceinline__ void mask(float (&s)[8][4], int first) const {
    const int last = C::MASK == CAUSAL ? count - length : count - 1;  // the last key that every row sees
    const bool ends = first + TILE_ROWS - 1 > last;
    mask_scores<C::MASK>(s, a.mask, batch, first, count, length, ends,
                         [&](int h) { return head_and_position(16 * warp + lane / 4 + 8 * h); });
  }

  // Probabilities, and factors on rows, from the left's threads to the right's, of the same number.
  __device__ __forceinline__ void give_weights(const u32 (&p)[4][4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) store_unit(weights(k), p[k]);
  }
  __device__ __forceinline__ void give_factors(const float (&factor)[2]) const {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(shared + C::FACTORS + 8 * thread), "f"(factor[0]),
                 "f"(factor[1])
                 : "memory");
  }
  __device__ __forceinline__ void take_weights(u32 (&p)[4][4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(p[k][0]), "=r"(p[k][1]), "=r"(p[k][2]), "=r"(p[k][3])
                   : "r"(weights(k))
                   : "memory");
  }
  __device__ __forceinline__ void take_factors(float (&factor)[2]) const {
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];"
                 : "=f"(factor[0]), "=f"(factor[1])
                 : "r"(shared + C::FACTORS + 8 * thread)
                 : "memory");
  }
  __device__ __forceinline__ u32 weights(int k) const {
    return shared + C::WEIGHTS + (k * C::GROUP + thread) * 16;
  }

  // This split's place among the partial results.
  __device__ __forceinline__ i64 place() const {
    return (static_cast<i64>(batch) * gridDim.y + blockIdx.y) * splits + split;
  }

  __device__ __forceinline__ void store(const float (&o)[COLUMNS / 8][4], const float (&factor)[2], int side) const {
    uint2* target = reinterpret_cast<uint2*>(a.partials) + place() * (C::ROWS * D / 4) + side * C::GROUP + thread;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
      target[n * C::CONSUMERS] = {pack_pair<C::BF16>(o[n][0] * factor[0], o[n][1] * factor[0]),
                                  pack_pair<C::BF16>(o[n][2] * factor[1], o[n][3] * factor[1])};
  }
};

// Merges the splits of a row tile. A block: eight columns of all rows; each of PARTS groups of four warps takes every
// PARTS-th split, as four warps hold them in MlaDecoder::store(), so that all loads of a thread are under way at once.
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
