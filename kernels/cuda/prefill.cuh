// Attention of many query rows over quantized keys and values, on Hopper's tensor cores: FlashAttention (Dao et al.,
// 2022; Shah et al., 2024) over tiles that are unpacked on the way. No score leaves the multiprocessor.
//
// Work: a block serves 128 query rows (positions times the heads of one group, so that they share keys) of a sequence,
// and all tiles of 64 keys that one of them sees. Four warpgroups:
//   two producers  one of keys, one of values: fetch codes ahead into registers and unpack them, once, into a ring of
//                  tiles in shared memory (panels.cuh, rolling_panels.cuh)
//   two consumers  scores S = Q K^T [64 x 64], softmax, O += P V, of 64 rows each. Output rows of more than 256 columns
//                  are too many for the registers of one: then a block has 64 rows, and each consumer half the columns.
// A consumer's products of values of a tile run while it takes the softmax of the next, and the other consumer's fill
// the gaps.
#pragma once
#include "rolling_panels.cuh"
#include "softmax.cuh"

namespace qsdpa {

template <typename T_, int D_, int DV_, typename K_, typename V_, int MASK_, typename MaskT_, typename SinkT_,
          int KEY_STAGES_, int VALUE_STAGES_>
struct PrefillConfig {
  using T = T_;
  using K = K_;
  using V = V_;
  using MaskT = MaskT_;
  using SinkT = SinkT_;
  static constexpr int D = D_, DV = DV_, MASK = MASK_, KEY_STAGES = KEY_STAGES_, VALUE_STAGES = VALUE_STAGES_;
  static constexpr int GROUP = 128, CONSUMERS = 2 * GROUP;                 // threads
  static constexpr int PRODUCER_REGISTERS = 48, CONSUMER_REGISTERS = 208;  // of a thread; 512 of four threads in all
  static constexpr bool BF16 = IsBfloat16<T>::value;

  static constexpr int SIDES = DV > 256 ? 2 : 1;  // parts of the output's columns
  static constexpr int ROWS = 128 / SIDES;
  static constexpr int OUT_PANELS = panels((DV + SIDES - 1) / SIDES);  // of a consumer

  // Shared memory, in bytes, from a multiple of 1024 on.
  static constexpr int KEY_TILE = panels(D) * PANEL_BYTES, VALUE_TILE = SIDES * OUT_PANELS * PANEL_BYTES;
  static constexpr int VALUES = KEY_STAGES * KEY_TILE;
  static constexpr int QUERIES = VALUES + VALUE_STAGES * VALUE_TILE;
  static constexpr int BARRIERS = QUERIES + ROWS / TILE_ROWS * KEY_TILE;
  static constexpr int SHARED_BYTES = BARRIERS + 2 * 8 * (KEY_STAGES + VALUE_STAGES);
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
  T* out;  // [B, Hq, L, DV]
};

// A ring of tiles in shared memory, with two barriers for each, and a place in it.
template <int STAGES, int TILE_BYTES>
class Ring {
  const u32 tiles, barriers;
  int stage = 0;
  u32 parity = 0;

 public:
  __device__ __forceinline__ Ring(u32 tiles, u32 barriers) : tiles(tiles), barriers(barriers) {}

  __device__ __forceinline__ void make(int producers, int consumers) const {
    for (int s = 0; s < STAGES; ++s) {
      make_barrier(barriers + 8 * s, producers);
      make_barrier(barriers + 8 * (STAGES + s), consumers);
    }
  }
  __device__ __forceinline__ u32 tile() const { return tiles + stage * TILE_BYTES; }
  __device__ __forceinline__ void wait_full() const { wait_phase(full(), parity); }
  __device__ __forceinline__ void wait_empty() const { wait_phase(empty(), parity ^ 1); }
  __device__ __forceinline__ void fill() const { arrive(full()); }
  __device__ __forceinline__ void release() const {  // one arrival of a warp
    if (threadIdx.x % 32 == 0) arrive(empty());
  }
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }

 private:
  __device__ __forceinline__ u32 full() const { return barriers + 8 * stage; }
  __device__ __forceinline__ u32 empty() const { return barriers + 8 * (STAGES + stage); }
};

template <typename C>
class Prefiller {
  using T = typename C::T;
  static constexpr int D = C::D, DV = C::DV;
  using KeyUnpacker = typename ChooseUnpacker<T, typename C::K, D, panels(D)>::Class;
  using ValueUnpacker = typename ChooseUnpacker<T, typename C::V, DV, C::SIDES * C::OUT_PANELS>::Class;

  const PrefillArguments<C>& a;
  const u32 shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % C::GROUP / 32, role = threadIdx.x / C::GROUP;
  const int part = C::SIDES == 1 ? role : 0, side = C::SIDES == 1 ? 0 : role;  // of a consumer: of rows, of columns
  const int kv_head = blockIdx.y, batch = blockIdx.z;
  // Blocks of the last rows see the most keys, and start first.
  const int first_row = (gridDim.x - 1 - blockIdx.x) * C::ROWS;
  int heads, length, rows, count, tiles;  // `heads`: of the group
  Ring<C::KEY_STAGES, C::KEY_TILE> keys;
  Ring<C::VALUE_STAGES, C::VALUE_TILE> values;

 public:
  __device__ __forceinline__ Prefiller(const PrefillArguments<C>& arguments, char* memory)
      : a(arguments),
        shared(shared_address(memory)),
        keys(shared, shared + C::BARRIERS),
        values(shared + C::VALUES, shared + C::BARRIERS + 2 * 8 * C::KEY_STAGES) {
    heads = a.queries.shape[1] / a.keys.shape[1];
    length = a.queries.shape[2];
    rows = heads * length;
    count = a.keys.shape[2];
    const int last_row = min(first_row + C::ROWS, rows) - 1;
    const int seen = C::MASK == CAUSAL ? count - length + last_row / heads + 1 : count;
    tiles = (seen + TILE_ROWS - 1) / TILE_ROWS;
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      keys.make(C::GROUP, C::CONSUMERS / 32);
      values.make(C::GROUP, C::CONSUMERS / 32);
    }
    __syncthreads();
    if (role < 2) {
      take_registers<C::CONSUMER_REGISTERS>();
      load_queries();
      consume();
    } else {
      give_registers<C::PRODUCER_REGISTERS>();
      const int thread = threadIdx.x % C::GROUP;
      if (role == 2) {
        produce(KeyUnpacker(a.keys.rows(batch, kv_head), a.key_scales.rows(batch, kv_head),
                            a.key_biases.rows(batch, kv_head), thread),
                keys);
      } else {
        produce(ValueUnpacker(a.values.rows(batch, kv_head), a.value_scales.rows(batch, kv_head),
                              a.value_biases.rows(batch, kv_head), thread),
                values);
      }
    }
  }

 private:
  // Query head and position of a row of this consumer's 64; rows past the end repeat the last.
  __device__ __forceinline__ int2 head_and_position(int row) const {
    const int n = min(first_row + part * TILE_ROWS + row, rows - 1);
    return {kv_head * heads + n % heads, n / heads};
  }

  // ---- the producers ----

  template <typename Unpacker, typename Tiles>
  __device__ __forceinline__ void produce(Unpacker unpacker, Tiles ring) const {
    if (unpacker.aligned()) {
      produce<true>(unpacker, ring);
    } else {
      produce<false>(unpacker, ring);
    }
  }

  template <bool ALIGNED, typename Unpacker, typename Tiles>
  __device__ __forceinline__ void produce(Unpacker& unpacker, Tiles& ring) const {
    unpacker.template fetch_first<ALIGNED>(0, count);
    for (int i = 0; i < tiles; ++i) {
      ring.wait_empty();
      unpacker.template unpack<ALIGNED>(ring.tile(), i * TILE_ROWS, count);
      publish_to_products();
      ring.fill();
      // Not before publishing, which waits for all loads.
      if (i + 1 < tiles) unpacker.template fetch_first<ALIGNED>((i + 1) * TILE_ROWS, count);
      ring.advance();
    }
  }

  // ---- the consumers ----

  __device__ __forceinline__ u32 query_tile() const { return shared + C::QUERIES + part * C::KEY_TILE; }

  // 64 rows of queries to shared memory, by the consumers that have them.
  __device__ __forceinline__ void load_queries() const {
    using K = typename C::K;
    constexpr int THREADS = C::SIDES * C::GROUP;
    const int loader = threadIdx.x % THREADS / 32;
    auto query = [&](int row) {
      const int2 at = head_and_position(row);
      return a.queries.data + batch * a.queries.strides[0] + at.x * a.queries.strides[1] + at.y * a.queries.strides[2];
    };
    if (view_aligned(a.queries)) {
      qsdpa::load_queries<K, D, TILE_ROWS, THREADS / 32, true>(query_tile(), loader, 1, query);
    } else {
      qsdpa::load_queries<K, D, TILE_ROWS, THREADS / 32, false>(query_tile(), loader, a.queries.strides[3], query);
    }
    publish_to_products();
    group_barrier<THREADS>(1 + part);
  }

  // s = queries * keys^T
  __device__ __forceinline__ void score(float (&s)[8][4], u32 queries, u32 tile) const {
    asm volatile("" : "+r"(queries), "+r"(tile));  // descriptors kept from tile to tile would fill the registers
    const u64 left = rows_descriptor(queries), right = rows_descriptor(tile);
#pragma unroll
    for (int k = 0; k < panels(D) * 4; ++k) {
      const int at = k / 4 * (PANEL_BYTES >> 4) + k % 4 * 2;
      multiply_rows<C::BF16>(s, left + at, right + at, k > 0);
    }
    commit_products();
  }

  // o += p * values, of this consumer's columns
  __device__ __forceinline__ void add_values(float (&o)[8 * C::OUT_PANELS][4], const u32 (&p)[4][4], u32 tile) const {
    tile += side * C::OUT_PANELS * PANEL_BYTES;
    asm volatile("" : "+r"(tile));
    const u64 values = columns_descriptor<PANEL_BYTES>(tile);
#pragma unroll
    for (int k = 0; k < TILE_ROWS / 16; ++k) {
      const u64 at = values + k * (16 * 128 >> 4);
      if constexpr (C::OUT_PANELS > 2) {
        constexpr int REST = 8 * (C::OUT_PANELS - 2);
        multiply_columns<C::BF16>(reinterpret_cast<float(&)[16][4]>(o[0]), p[k], at);
        multiply_columns<C::BF16>(reinterpret_cast<float(&)[REST][4]>(o[16]), p[k], at + (2 * PANEL_BYTES >> 4));
      } else {
        multiply_columns<C::BF16>(o, p[k], at);
      }
    }
    commit_products();
  }

  __device__ __forceinline__ void consume() {
    const float to_logits = *a.scale * LOG2E;
    float o[8 * C::OUT_PANELS][4] = {}, s[8][4], factor[2];
    u32 p[4][4];
    RunningSoftmax softmax;
    auto soften = [&](int i) {
      pin(s);
      keys.release();
      keys.advance();
      multiply_by(s, to_logits);
      mask(s, i * TILE_ROWS);
      softmax.apply(s, factor);
    };

    keys.wait_full();
    begin_products();
    score(s, query_tile(), keys.tile());
    wait_products<0>();
    soften(0);
    pack_weights<C::BF16>(p, s);
    for (int i = 1; i < tiles; ++i) {
      keys.wait_full();
      begin_products();
      score(s, query_tile(), keys.tile());
      values.wait_full();
      begin_products();
      add_values(o, p, values.tile());
      wait_products<1>();
      soften(i);
      wait_products<0>();
      pin(o);
      values.release();
      values.advance();
      rescale(o, factor);
      pack_weights<C::BF16>(p, s);
    }
    values.wait_full();
    begin_products();
    add_values(o, p, values.tile());
    wait_products<0>();
    pin(o);
    store(o, softmax);
  }

  // The mask, and the end of the keys.
  __device__ __forceinline__ void mask(float (&s)[8][4], int first) const {
    // The last key that every row of this consumer sees.
    const int last = C::MASK == CAUSAL ? count - length + (first_row + part * TILE_ROWS) / heads : count - 1;
    const bool ends = first + TILE_ROWS - 1 > min(last, count - 1);
    mask_scores<C::MASK>(s, a.mask, batch, first, count, length, ends,
                         [&](int h) { return head_and_position(16 * warp + lane / 4 + 8 * h); });
  }

  __device__ __forceinline__ void store(const float (&o)[8 * C::OUT_PANELS][4], const RunningSoftmax& softmax) const {
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
      if (first_row + part * TILE_ROWS + row >= rows) continue;
      T* line = a.out + ((static_cast<i64>(batch) * a.queries.shape[1] + at.x) * length + at.y) * DV;
#pragma unroll
      for (int n = 0; n < 8 * C::OUT_PANELS; ++n) {
        const int unit = side * C::OUT_PANELS * 8 + n;
        if (DV % (C::SIDES * PANEL_COLUMNS) != 0 && unit >= DV / 8) continue;
#pragma unroll
        for (int y = 0; y < 2; ++y)
          line[key_dim<typename C::V>(unit / 4, unit % 4, lane % 4, y)] = T(o[n][2 * h + y] * f);
      }
    }
  }
};

}  // namespace qsdpa
