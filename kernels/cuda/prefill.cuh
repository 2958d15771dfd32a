// Attention of many query rows over quantized keys and values, on Hopper's tensor cores: FlashAttention (Dao et al.,
// 2022; Shah et al., 2024) over tiles that are unpacked on the way. No score leaves the multiprocessor.
//
// Work: a block serves 128 query rows (positions times the heads of one group, so that they share keys) of a sequence.
// Three warpgroups: two of consumers, with 64 rows each, and one of producers, which fetches the packed keys and values
// a tile of 64 ahead and unpacks them, once, into two rings of tiles in shared memory (unpack.cuh). A consumer's
// products of values of a tile run while it takes the softmax of the next, and the other consumer's fill the gaps.
#pragma once
#include "softmax.cuh"
#include "unpack.cuh"

namespace qsdpa {

template <typename T_, int D_, int DV_, typename K_, typename V_, int MASK_, typename MaskT_, typename SinkT_>
struct PrefillConfig {
  using T = T_;
  using K = K_;
  using V = V_;
  using MaskT = MaskT_;
  using SinkT = SinkT_;
  static constexpr int D = D_, DV = DV_, MASK = MASK_;
  static constexpr int ROWS = 128, STAGES = 2;
  static constexpr int GROUP = 128, CONSUMERS = 2 * GROUP, PRODUCERS = GROUP;  // threads
  static constexpr int PRODUCER_REGISTERS = 88, CONSUMER_REGISTERS = 208;      // of a thread
  static constexpr bool BF16 = IsBfloat16<T>::value;

  // Shared memory, in bytes, from a multiple of 1024 on.
  static constexpr int KEY_TILE = D / PANEL_COLUMNS * PANEL_BYTES, VALUE_TILE = DV / PANEL_COLUMNS * PANEL_BYTES;
  static constexpr int VALUES = STAGES * KEY_TILE;
  static constexpr int QUERIES = VALUES + STAGES * VALUE_TILE;  // of each group of consumers
  static constexpr int BARRIERS = QUERIES + 2 * KEY_TILE;
  static constexpr int SHARED_BYTES = BARRIERS + 4 * 8 * STAGES;
};

template <typename C>
struct PrefillArguments {
  using T = typename C::T;
  View<T> queries;
  View<u32> keys;
  View<typename C::K::Scale> key_scales, key_biases;
  View<u32> values;
  View<typename C::V::Scale> value_scales, value_biases;
  View<typename C::MaskT> mask;
  const typename C::SinkT* sinks;
  i64 sink_stride;
  const float* scale;
  T* out;
};

template <typename C>
class Prefiller {
  using T = typename C::T;
  static constexpr int D = C::D, DV = C::DV;
  enum Operand { KEYS = 0, VALUES = 1 };

  const PrefillArguments<C>& a;
  const u32 shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % C::GROUP / 32, group = threadIdx.x / C::GROUP;
  const int kv_head = blockIdx.y, batch = blockIdx.z;
  // Blocks of the last rows see the most keys, and start first.
  const int first_row = (gridDim.x - 1 - blockIdx.x) * C::ROWS;
  int heads, length, rows, count, tiles;  // `heads`: of the group

  // A place in the rings, and the parity of the phase it is in.
  struct Place {
    int stage = 0;
    u32 parity = 0;
    __device__ __forceinline__ void advance() {
      if (++stage == C::STAGES) stage = 0, parity ^= 1;
    }
  };

 public:
  __device__ __forceinline__ Prefiller(const PrefillArguments<C>& arguments, char* memory)
      : a(arguments), shared(shared_address(memory)) {
    heads = a.queries.shape[1] / a.keys.shape[1];
    length = a.queries.shape[2];
    rows = heads * length;
    count = a.keys.shape[2];
    const int last_position = min(first_row + C::ROWS, rows) - 1;
    const int keys = C::MASK == CAUSAL ? count - length + last_position / heads + 1 : count;
    tiles = (keys + TILE_ROWS - 1) / TILE_ROWS;
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < C::STAGES; ++s)
        for (int operand : {KEYS, VALUES}) {
          make_barrier(full(operand, s), C::PRODUCERS);
          make_barrier(empty(operand, s), C::CONSUMERS / 32);
        }
    }
    __syncthreads();
    if (threadIdx.x >= C::CONSUMERS) {
      give_registers<C::PRODUCER_REGISTERS>();
      produce();
    } else {
      take_registers<C::CONSUMER_REGISTERS>();
      load_queries();
      consume();
    }
  }

 private:
  __device__ __forceinline__ u32 full(int operand, int stage) const {
    return shared + C::BARRIERS + 8 * (operand * C::STAGES + stage);
  }
  __device__ __forceinline__ u32 empty(int operand, int stage) const {
    return full(operand, stage) + 8 * 2 * C::STAGES;
  }
  __device__ __forceinline__ u32 key_tile(int stage) const { return shared + stage * C::KEY_TILE; }
  __device__ __forceinline__ u32 value_tile(int stage) const { return shared + C::VALUES + stage * C::VALUE_TILE; }
  __device__ __forceinline__ u32 query_tile() const { return shared + C::QUERIES + group * C::KEY_TILE; }

  // Query head and position of a row of this group of consumers; rows past the end repeat the last.
  __device__ __forceinline__ int2 head_and_position(int row) const {
    const int n = min(first_row + group * 64 + row, rows - 1);
    return {kv_head * heads + n % heads, n / heads};
  }

  // ---- the producers ----

  using KeyUnpacker = TileUnpacker<T, typename C::K, D, C::PRODUCERS, 16>;
  using ValueUnpacker = TileUnpacker<T, typename C::V, DV, C::PRODUCERS, 16>;

  __device__ __forceinline__ void produce() const {
    const int thread = threadIdx.x - C::CONSUMERS;
    KeyUnpacker keys(a.keys.rows(batch, kv_head), a.key_scales.rows(batch, kv_head), a.key_biases.rows(batch, kv_head),
                     thread);
    ValueUnpacker values(a.values.rows(batch, kv_head), a.value_scales.rows(batch, kv_head),
                         a.value_biases.rows(batch, kv_head), thread);
    if (keys.aligned() && values.aligned()) {
      produce<true>(keys, values);
    } else {
      produce<false>(keys, values);
    }
  }

  template <bool ALIGNED>
  __device__ __forceinline__ void produce(KeyUnpacker& keys, ValueUnpacker& values) const {
    Place at;
    keys.template fetch<ALIGNED>(0, count);
    values.template fetch<ALIGNED>(0, count);
    for (int i = 0; i < tiles; ++i) {
      const int next = min(i + 1, tiles - 1) * TILE_ROWS;
      wait_phase(empty(KEYS, at.stage), at.parity ^ 1);
      keys.template unpack<ALIGNED>(key_tile(at.stage), i * TILE_ROWS, count);
      publish_to_products();
      arrive(full(KEYS, at.stage));
      keys.template fetch<ALIGNED>(next, count);
      wait_phase(empty(VALUES, at.stage), at.parity ^ 1);
      values.template unpack<ALIGNED>(value_tile(at.stage), i * TILE_ROWS, count);
      publish_to_products();
      arrive(full(VALUES, at.stage));
      values.template fetch<ALIGNED>(next, count);
      at.advance();
    }
  }

  // ---- the consumers ----

  // 64 rows of queries to shared memory.
  __device__ __forceinline__ void load_queries() const {
    using K = typename C::K;
    auto query = [&](int row) {
      const int2 at = head_and_position(row);
      return a.queries.data + batch * a.queries.strides[0] + at.x * a.queries.strides[1] + at.y * a.queries.strides[2];
    };
    if (view_aligned(a.queries)) {
      qsdpa::load_queries<K, D, 64, C::GROUP / 32, true>(query_tile(), warp, 1, query);
    } else {
      qsdpa::load_queries<K, D, 64, C::GROUP / 32, false>(query_tile(), warp, a.queries.strides[3], query);
    }
    publish_to_products();
    group_barrier<C::GROUP>(1 + group);
  }

  __device__ __forceinline__ void score(float (&s)[8][4], u32 tile) const {
    const u64 queries = rows_descriptor(query_tile()), keys = rows_descriptor(tile);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const int at = k / 4 * (PANEL_BYTES >> 4) + k % 4 * 2;
      multiply_rows<C::BF16>(s, queries + at, keys + at, k > 0);
    }
  }

  __device__ __forceinline__ void add_values(float (&o)[DV / 8][4], const u32 (&p)[4][4], u32 tile) const {
    const u64 values = columns_descriptor<PANEL_BYTES>(tile);
#pragma unroll
    for (int k = 0; k < TILE_ROWS / 16; ++k) multiply_columns<C::BF16>(o, p[k], values + k * (16 * 128 >> 4));
  }

  __device__ __forceinline__ void release(int operand, int stage) const {
    if (lane == 0) arrive(empty(operand, stage));
  }

  __device__ __forceinline__ void consume() const {
    const float to_logits = *a.scale * LOG2E;
    float o[DV / 8][4] = {}, s[8][4], factor[2];
    u32 p[4][4];
    RunningSoftmax softmax;
    Place keys, values;

    wait_phase(full(KEYS, 0), 0);
    begin_products();
    score(s, key_tile(0));
    commit_products();
    wait_products<0>();
    pin(s);
    release(KEYS, 0);
    keys.advance();
    multiply_by(s, to_logits);
    mask(s, 0);
    softmax.apply(s, factor);
    pack_weights<C::BF16>(p, s);
    for (int i = 1; i < tiles; ++i) {
      wait_phase(full(KEYS, keys.stage), keys.parity);
      begin_products();
      score(s, key_tile(keys.stage));
      commit_products();
      wait_phase(full(VALUES, values.stage), values.parity);
      add_values(o, p, value_tile(values.stage));
      commit_products();
      wait_products<1>();
      pin(s);
      release(KEYS, keys.stage);
      keys.advance();
      multiply_by(s, to_logits);
      mask(s, i * TILE_ROWS);
      softmax.apply(s, factor);
      wait_products<0>();
      pin(o);
      release(VALUES, values.stage);
      values.advance();
      pack_weights<C::BF16>(p, s);
      rescale(o, factor);
    }
    wait_phase(full(VALUES, values.stage), values.parity);
    begin_products();
    add_values(o, p, value_tile(values.stage));
    commit_products();
    wait_products<0>();
    pin(o);
    store(o, softmax);
  }

  // The mask, and the end of the keys.
  __device__ __forceinline__ void mask(float (&s)[8][4], int first) const {
    // The last key that every row of this group sees.
    const int last = C::MASK == CAUSAL ? count - length + (first_row + group * 64) / heads : count - 1;
    const bool ends = first + TILE_ROWS - 1 > min(last, count - 1);
    if (C::MASK != BOOLEAN && C::MASK != ADDITIVE && !ends) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int2 at = head_and_position(16 * warp + lane / 4 + 8 * h);
      if constexpr (C::MASK == BOOLEAN || C::MASK == ADDITIVE)
        apply_mask<C::MASK>(s, h, a.mask.data + a.mask.offset(batch, at.x, at.y),
                            a.mask.shape[3] > 1 ? a.mask.strides[3] : 0, first, count);
      if (ends) exclude_after(s, h, C::MASK == CAUSAL ? count - length + at.y : count - 1, first);
    }
  }

  __device__ __forceinline__ void store(const float (&o)[DV / 8][4], const RunningSoftmax& softmax) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * warp + lane / 4 + 8 * h;
      const int2 at = head_and_position(row);
      float sum = softmax.total(h), f = 1.0f;
      if (a.sinks != nullptr) {  // a sink is one more logit, of a key without a value
        const float sink = to_float(a.sinks[at.x * a.sink_stride]) * LOG2E, higher = fmaxf(softmax.top[h], sink);
        f = exp2_fast(softmax.top[h] - higher);
        sum = sum * f + exp2_fast(sink - higher);
      }
      f = sum > 0.0f ? f / sum : 0.0f;
      if (first_row + group * 64 + row >= rows) continue;
      T* line = a.out + ((static_cast<i64>(batch) * a.queries.shape[1] + at.x) * length + at.y) * DV;
#pragma unroll
      for (int n = 0; n < DV / 8; ++n)
#pragma unroll
        for (int y = 0; y < 2; ++y)
          line[key_dim<typename C::V>(n / 4, n % 4, lane % 4, y)] = T(o[n][2 * h + y] * f);
    }
  }
};

}  // namespace qsdpa
