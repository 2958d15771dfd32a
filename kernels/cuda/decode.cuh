// Attention of a few query rows over quantized keys and values, split over blocks along the keys.
//
// Work: a block serves ROWS query rows (heads of one group times query positions) of one batch entry and KV head. The
// teams of warps of all its splits deal the tiles of TILE keys among themselves like cards. A team has its own ring of
// STAGES tiles in shared memory and shares nothing with the others until the end. It is one warp, or, where there are
// many rows of many dimensions, two or four that divide the dimensions and add up their scores. Queries are the narrow
// side of every product:
//   scores  S^T[16 keys x 8 rows]  = codes(K) * Q^T         one mma a 16 dimensions
//   output  O^T[16 dims x 8 rows] += codes(V)^T * P^T       one mma a 16 dimensions
// so that a code is unpacked once for all rows. Codes enter the products as exact halves. A key's scale and bias are
// applied to the sums of its groups (the bias times the sum of the group's query), a value's scale to the probability,
// and its bias to a running sum, all in float32.
//
// Range: queries are scaled by a power of two a row, and value scales by one a warp, so that halves neither overflow
// nor lose precision whatever the magnitudes are. Float32 queries and probabilities are two halves each, which keeps 22
// bits. The running maximum of a row is raised only when a score exceeds it by RISE.
//
// The splits' results meet in device memory: the block that draws the last ticket merges them (in two steps where they
// are many), so that one launch does it all.
#pragma once
#include "formats.cuh"
#include "operands.cuh"
#include "tiles.cuh"

namespace qsdpa {

constexpr int TICKET_WORDS = 32;  // counters of a tile: one for all, and one for each group of MERGED splits
constexpr int MERGED = 8;

template <typename T_, int D_, int DV_, typename K_, typename V_, int ROW_BLOCKS_, int MASK_, typename MaskT_,
          typename SinkT_, int ROPE_, bool SHARED_KV_, int WARPS_, int STAGES_, int PARTS_, int TEAM_>
struct DecodeConfig {
  using T = T_;
  using K = K_;
  using V = V_;
  using MaskT = MaskT_;
  using SinkT = SinkT_;
  static constexpr int D = D_, DV = DV_, ROW_BLOCKS = ROW_BLOCKS_, MASK = MASK_, ROPE = ROPE_, WARPS = WARPS_,
                       STAGES = STAGES_, PARTS = PARTS_, TEAM = TEAM_;
  static constexpr bool SHARED_KV = SHARED_KV_;
  static constexpr int ROWS = 8 * ROW_BLOCKS;
  static constexpr int TILE = 16 * PARTS;  // keys
  static constexpr int TEAMS = WARPS / TEAM, TEAM_THREADS = 32 * TEAM;
  static constexpr int TERMS = sizeof(T) == 4 ? 2 : 1;  // halves that a query or a probability is made of
  static constexpr bool QUERIES_IN_REGISTERS = D / TEAM * ROW_BLOCKS * TERMS <= 256;
  static constexpr bool BF16 = IsBfloat16<T>::value;

  using KeyTile = RowTile<TILE, TEAM_THREADS, K::row_bytes(D), u32>;
  using ValueTile = RowTile<TILE, TEAM_THREADS, V::row_bytes(DV), u32>;
  using KeyScaleTile = ScaleTile<TILE, TEAM_THREADS, K::groups(D), typename K::Scale>;
  using ValueScaleTile = ScaleTile<TILE, TEAM_THREADS, V::groups(DV), typename V::Scale>;
  using RopeTile = RowTile<TILE, TEAM_THREADS, ROPE * static_cast<int>(sizeof(T)), T>;

  // Shared memory, in bytes.
  static constexpr int VALUES = KeyTile::BYTES;
  static constexpr int KEY_SCALES = VALUES + (SHARED_KV ? 0 : ValueTile::BYTES);
  static constexpr int KEY_BIASES = KEY_SCALES + KeyScaleTile::BYTES;
  static constexpr int VALUE_SCALES = KEY_BIASES + (K::HAS_BIAS ? KeyScaleTile::BYTES : 0);
  static constexpr int VALUE_BIASES = VALUE_SCALES + (SHARED_KV ? 0 : ValueScaleTile::BYTES);
  static constexpr int ROPE_KEYS = VALUE_BIASES + (V::HAS_BIAS && !SHARED_KV ? ValueScaleTile::BYTES : 0);
  static constexpr int STAGE = ROPE_KEYS + (ROPE ? RopeTile::BYTES : 0);
  static constexpr int RING = TEAMS * STAGES * STAGE;
  static constexpr int OUT_PITCH = DV + 4;
  static constexpr int OUT = TEAMS * ROWS * OUT_PITCH * 4;  // over the ring, once it is idle
  static constexpr int QUERY_PITCH = D + 8;
  static constexpr int QUERIES = (RING > OUT ? RING : OUT) + 16;
  static constexpr int FRAGMENTS = QUERIES + TERMS * ROWS * QUERY_PITCH * 2;
  static constexpr int ROPE_PITCH = ROPE + 16 / static_cast<int>(sizeof(T));
  static constexpr int ROPE_QUERIES = FRAGMENTS + (QUERIES_IN_REGISTERS ? 0 : TERMS * ROWS * D * 2);
  static constexpr int QUERY_SUMS = ROPE_QUERIES + (ROPE ? ROWS * ROPE_PITCH * static_cast<int>(sizeof(T)) : 0);
  static constexpr int ROW_FACTORS = QUERY_SUMS + (K::HAS_BIAS ? K::groups(D) * ROWS * 4 : 0);
  static constexpr int TEAM_STATS = ROW_FACTORS + ROWS * 4;
  static constexpr int EXCHANGE = TEAM_STATS + TEAMS * ROWS * 8;  // scores that the warps of a team share
  static constexpr int ARGUMENTS = EXCHANGE + (TEAM > 1 ? WARPS * PARTS * ROW_BLOCKS * 32 * 16 : 0);
  static constexpr int ARGUMENT_BYTES = 640;
  static constexpr int SHARED_BYTES = ARGUMENTS + ARGUMENT_BYTES;
};

template <typename C>
struct DecodeArguments {
  using T = typename C::T;
  View<T> queries;
  View<u32> keys;
  View<typename C::K::Scale> key_scales, key_biases;
  View<u32> values;
  View<typename C::V::Scale> value_scales, value_biases;
  View<typename C::MaskT> mask;
  const typename C::SinkT* sinks;
  View<T> rope_queries, rope_keys;
  const float* scale;
  u32* tickets;
  T* out;
  float* partials;  // [tile, split, row, DV]
  float* stats;     // [tile, split, row, 2]: running maximum and sum
};

template <typename C>
class Decoder {
  using T = typename C::T;
  using K = typename C::K;
  using V = typename C::V;
  static constexpr int D = C::D, DV = C::DV, NB = C::ROW_BLOCKS, ROWS = C::ROWS, WARPS = C::WARPS;
  static constexpr int TERMS = C::TERMS, TILE = C::TILE, PARTS = C::PARTS;
  static constexpr int TEAM = C::TEAM, TEAMS = C::TEAMS;
  // Of one warp: its share of the dimensions, in groups and in blocks of 32 dimensions a group.
  static constexpr int KEY_GROUPS = K::SCALED_CODES ? 1 : K::groups(D) / TEAM;
  static constexpr int VALUE_GROUPS = V::SCALED_CODES ? 1 : V::groups(DV) / TEAM;
  static constexpr int KEY_BLOCKS = D / TEAM / 32 / KEY_GROUPS;
  static constexpr int VALUE_BLOCKS = DV / TEAM / 32 / VALUE_GROUPS;
  static_assert(D % (32 * TEAM) == 0 && DV % (32 * TEAM) == 0, "warps of a team share the dimensions evenly");
  static_assert(K::SCALED_CODES || K::groups(D) % TEAM == 0, "and the groups of keys");
  static_assert(V::SCALED_CODES || V::groups(DV) % TEAM == 0, "and the groups of values");
  static constexpr float RISE = 4.0f;           // probabilities stay below 2^RISE
  static constexpr float SCALE_TARGET = 256.0f;  // largest value scale after normalization, and how far it may grow
  static constexpr float SCALE_LIMIT = 2048.0f;

  const DecodeArguments<C>& a;
  char* const shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
  const int team = warp / TEAM, member = warp % TEAM;
  const int split = blockIdx.x, splits = gridDim.x, batch = blockIdx.z;
  int kv_head, first_row, group_size, length, rows, count;

  float sum[NB][2] = {}, top[NB][2];
  float o[DV / TEAM / 32][2][NB][4] = {};
  float bias_sum[V::HAS_BIAS ? VALUE_GROUPS : 1][NB][2] = {};
  float value_factor = 0.0f, value_limit = -1.0f;  // power of two on value scales; largest scale it serves
  u32 query[C::QUERIES_IN_REGISTERS ? TERMS : 1][C::QUERIES_IN_REGISTERS ? D / TEAM / 32 : 1][2][NB][2];

 public:
  __device__ __forceinline__ Decoder(const DecodeArguments<C>& arguments, char* memory) : a(arguments), shared(memory) {
    const int kv_heads = a.keys.shape[1];
    kv_head = blockIdx.y % kv_heads;
    first_row = blockIdx.y / kv_heads * ROWS;
    group_size = a.queries.shape[1] / kv_heads;
    length = a.queries.shape[2];
    rows = group_size * length;
    count = a.keys.shape[2];
#pragma unroll
    for (int n = 0; n < NB; ++n) top[n][0] = top[n][1] = LOWEST;
  }

  __device__ __forceinline__ void run() {
    float raw[ROWS_OF_WARP][D / 32];
    load_queries(raw);  // ahead of the first tiles, which would delay them
    const Runs runs(*this);
    if (!runs.usable) keep_arguments();
    const u32 ring = shared_address(shared) + team * C::STAGES * C::STAGE;
    auto fetch = [&](int tile, int stage) {
      const u32 at = ring + stage * C::STAGE;
      if (tile * TILE < count) {
        if (runs.usable) {
          runs.copy(at, *this, tile);
        } else {
          copy_strided(*kept_arguments(), at, batch, kv_head, tile * TILE);
        }
      }
      commit_copies();
    };

    const int stride = splits * TEAMS;
    int tile = split * TEAMS + team, stage = 0;
#pragma unroll
    for (int s = 0; s < C::STAGES - 1; ++s) fetch(tile + s * stride, s);
    prepare_queries(raw);
    for (; tile * TILE < count; tile += stride) {
      wait_copies<C::STAGES - 2>();
      team_barrier();
      fetch(tile + (C::STAGES - 1) * stride, stage == 0 ? C::STAGES - 1 : stage - 1);
      attend(ring + stage * C::STAGE, tile * TILE);
      stage = stage == C::STAGES - 1 ? 0 : stage + 1;
    }
    wait_copies<0>();
    finish_warp();
    combine_teams();
  }

 private:
  static constexpr int ROWS_OF_WARP = ROWS / WARPS;
  static_assert(ROWS % WARPS == 0, "warps share the rows of queries evenly");

  __device__ __forceinline__ void team_barrier() const {
    if constexpr (TEAM == 1) {
      __syncwarp();
    } else {
      group_barrier<C::TEAM_THREADS>(1 + team);
    }
  }

  // copy_strided() reads them from shared memory; it is rare, and registers are dear.
  __device__ __forceinline__ void keep_arguments() {
    static_assert(sizeof(a) <= C::ARGUMENT_BYTES, "the arguments outgrew their place");
    if (threadIdx.x == 0) *reinterpret_cast<DecodeArguments<C>*>(shared + C::ARGUMENTS) = a;
    __syncthreads();
  }
  __device__ __forceinline__ const DecodeArguments<C>* kept_arguments() const {
    return reinterpret_cast<const DecodeArguments<C>*>(shared + C::ARGUMENTS);
  }

  __device__ __forceinline__ float* floats(int at) const { return reinterpret_cast<float*>(shared + at); }

  // The parts of a tile as runs of bytes, where rows follow each other without gaps: a thread's pointers to the first.
  struct Runs {
    static constexpr int KEY_BYTES = C::KeyScaleTile::BYTES, VALUE_BYTES = C::SHARED_KV ? 0 : C::ValueScaleTile::BYTES;
    static constexpr int KEY_BIAS = KEY_BYTES, VALUE_SCALE = KEY_BYTES * (K::HAS_BIAS ? 2 : 1),
                         VALUE_BIAS = VALUE_SCALE + VALUE_BYTES,
                         ALL = VALUE_SCALE + VALUE_BYTES * (V::HAS_BIAS ? 2 : 1);
    static constexpr int ROUND = 16 * C::TEAM_THREADS, ROUNDS = (ALL + ROUND - 1) / ROUND;

    bool usable;
    const char *keys, *values = nullptr;
    const char* scales[ROUNDS];
    int thread;

    __device__ __forceinline__ explicit Runs(const Decoder& d) : thread(threadIdx.x % C::TEAM_THREADS) {
      const auto key_rows = d.a.keys.rows(d.batch, d.kv_head);
      const auto key_scales = d.a.key_scales.rows(d.batch, d.kv_head);
      const auto key_biases = d.a.key_biases.rows(d.batch, d.kv_head);
      const auto value_rows = d.a.values.rows(d.batch, d.kv_head);
      const auto value_scales = d.a.value_scales.rows(d.batch, d.kv_head);
      const auto value_biases = d.a.value_biases.rows(d.batch, d.kv_head);
      const auto rope_rows = d.a.rope_keys.rows(d.batch, 0);
      usable = rows_contiguous(key_rows, C::KeyTile::ROW_BYTES / 4, C::KeyTile::CHUNK) &&
               rows_contiguous(key_scales, C::KeyScaleTile::ROW, 16) &&
               (!K::HAS_BIAS || rows_contiguous(key_biases, C::KeyScaleTile::ROW, 16));
      keys = reinterpret_cast<const char*>(key_rows.data) + thread * C::KeyTile::CHUNK;
      if constexpr (!C::SHARED_KV) {
        usable = usable && rows_contiguous(value_rows, C::ValueTile::ROW_BYTES / 4, C::ValueTile::CHUNK) &&
                 rows_contiguous(value_scales, C::ValueScaleTile::ROW, 16) &&
                 (!V::HAS_BIAS || rows_contiguous(value_biases, C::ValueScaleTile::ROW, 16));
        values = reinterpret_cast<const char*>(value_rows.data) + thread * C::ValueTile::CHUNK;
      }
      if constexpr (C::ROPE > 0) usable = usable && rows_aligned(rope_rows, 16);
#pragma unroll
      for (int i = 0; i < ROUNDS; ++i) {
        const int at = i * ROUND + thread * 16;
        scales[i] = at < KEY_BIAS      ? reinterpret_cast<const char*>(key_scales.data) + at
                    : at < VALUE_SCALE ? reinterpret_cast<const char*>(key_biases.data) + at - KEY_BIAS
                    : at < VALUE_BIAS  ? reinterpret_cast<const char*>(value_scales.data) + at - VALUE_SCALE
                                       : reinterpret_cast<const char*>(value_biases.data) + at - VALUE_BIAS;
      }
    }

    __device__ __forceinline__ void copy(u32 stage, const Decoder& d, int tile) const {
      if ((tile + 1) * TILE <= d.count) {
        copy_part<false>(stage, tile, TILE);
      } else {
        copy_part<true>(stage, tile, d.count - tile * TILE);
      }
      if constexpr (C::ROPE > 0)
        C::RopeTile::copy_rows(stage + C::ROPE_KEYS, d.a.rope_keys.rows(d.batch, 0), tile * TILE, d.count, thread);
    }

   private:
    // The first `valid` keys; zeros for the rest.
    template <bool PARTIAL>
    __device__ __forceinline__ void copy_part(u32 stage, u32 tile, int valid) const {
      C::KeyTile::template copy_run<PARTIAL>(stage, keys + static_cast<u64>(tile) * C::KeyTile::SOURCE_BYTES, thread,
                                             valid * C::KeyTile::ROW_BYTES);
      if constexpr (!C::SHARED_KV)
        C::ValueTile::template copy_run<PARTIAL>(stage + C::VALUES,
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
          const int end = valid * run / TILE;
          bytes = max(0, min(16, end - begin));
          if (bytes == 0) source -= begin;
        }
        if ((i + 1) * ROUND <= ALL || at < ALL) copy_async<16>(stage + C::KEY_SCALES + at, source, bytes);
      }
    }
  };

  // A tile of any strides. Rare: kept out of the way of the main loop's registers.
  __device__ __noinline__ static void copy_strided(const DecodeArguments<C>& a, u32 stage, int batch, int kv_head,
                                                   int first) {
    const int thread = threadIdx.x % C::TEAM_THREADS, count = a.keys.shape[2];
    C::KeyTile::copy_rows(stage, a.keys.rows(batch, kv_head), first, count, thread);
    C::KeyScaleTile::copy_rows(stage + C::KEY_SCALES, a.key_scales.rows(batch, kv_head), first, count, thread);
    if constexpr (K::HAS_BIAS)
      C::KeyScaleTile::copy_rows(stage + C::KEY_BIASES, a.key_biases.rows(batch, kv_head), first, count, thread);
    if constexpr (!C::SHARED_KV) {
      C::ValueTile::copy_rows(stage + C::VALUES, a.values.rows(batch, kv_head), first, count, thread);
      C::ValueScaleTile::copy_rows(stage + C::VALUE_SCALES, a.value_scales.rows(batch, kv_head), first, count, thread);
      if constexpr (V::HAS_BIAS)
        C::ValueScaleTile::copy_rows(stage + C::VALUE_BIASES, a.value_biases.rows(batch, kv_head), first, count,
                                     thread);
    }
    if constexpr (C::ROPE > 0)
      C::RopeTile::copy_rows(stage + C::ROPE_KEYS, a.rope_keys.rows(batch, 0), first, count, thread);
  }

  // Query head and position of a row of the whole group; rows past the end repeat the last.
  __device__ __forceinline__ int2 head_and_position(int row) const {
    const int n = min(first_row + row, rows - 1);
    return {kv_head * group_size + n / length, n % length};
  }

  __device__ __forceinline__ void load_queries(float (&raw)[ROWS_OF_WARP][D / 32]) const {
#pragma unroll
    for (int k = 0; k < ROWS_OF_WARP; ++k) {
      const int2 at = head_and_position(warp + k * WARPS);
      const T* source = a.queries.data + batch * a.queries.strides[0] + at.x * a.queries.strides[1] +
                        at.y * a.queries.strides[2];
#pragma unroll
      for (int i = 0; i < D / 32; ++i) raw[k][i] = to_float(source[(32 * i + lane) * a.queries.strides[3]]);
    }
  }

  // Rows of queries to shared memory as halves, scaled to a largest magnitude in [512, 1024); their sums over the keys'
  // groups; the factor of each row that takes scores to base-2 logits.
  __device__ __forceinline__ void prepare_queries(float (&raw)[ROWS_OF_WARP][D / 32]) {
    __half* halves = reinterpret_cast<__half*>(shared + C::QUERIES);
    const float scale = *a.scale * LOG2E * (K::SCALED_CODES ? K::CODE_FACTOR : 1.0f);
#pragma unroll
    for (int k = 0; k < ROWS_OF_WARP; ++k) {
      const int row = warp + k * WARPS;
      float(&x)[D / 32] = raw[k];
      float peak = 0.0f;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) peak = fmaxf(peak, fabsf(x[i]));
      peak = warp_max(peak);
      const int exponent = __float_as_uint(peak) >> 23;
      const float factor = __uint_as_float(static_cast<u32>(min(max(263 - exponent, 1), 253)) << 23);
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const float scaled = x[i] * factor;
        const __half high = __float2half_rn(scaled);
        halves[row * C::QUERY_PITCH + 32 * i + lane] = high;
        x[i] = __half2float(high);
        if constexpr (TERMS == 2) {
          const __half low = __float2half_rn(scaled - x[i]);
          halves[(ROWS + row) * C::QUERY_PITCH + 32 * i + lane] = low;
          x[i] += __half2float(low);
        }
      }
      if constexpr (K::HAS_BIAS) {
#pragma unroll
        for (int g = 0; g < K::groups(D); ++g) {
          float s = 0.0f;
#pragma unroll
          for (int i = 0; i < K::GROUP / 32; ++i) s += x[g * (K::GROUP / 32) + i];
          s = warp_sum(s);
          if (lane == 0) floats(C::QUERY_SUMS)[g * ROWS + row] = s;
        }
      }
      if (lane == 0) floats(C::ROW_FACTORS)[row] = scale / factor;
      if constexpr (C::ROPE > 0) {
        const int2 at = head_and_position(row);
        const T* rope = a.rope_queries.data + batch * a.rope_queries.strides[0] + at.x * a.rope_queries.strides[1] +
                        at.y * a.rope_queries.strides[2];
        T* target = reinterpret_cast<T*>(shared + C::ROPE_QUERIES) + row * C::ROPE_PITCH;
        for (int i = lane; i < C::ROPE; i += 32) target[i] = rope[i * a.rope_queries.strides[3]];
      }
    }
    __syncthreads();
    arrange_queries();
  }

  // Queries as B operands, in the order of the dimensions of load_keys().
  __device__ __forceinline__ void arrange_queries() {
    const unsigned short* halves = reinterpret_cast<const unsigned short*>(shared + C::QUERIES);
    auto pair = [&](int term, int block, int p, int n) -> u32 {
      const unsigned short* row = halves + (term * ROWS + 8 * n + r) * C::QUERY_PITCH;
      return row[key_dim<K>(block, t, p, 0)] | static_cast<u32>(row[key_dim<K>(block, t, p, 1)]) << 16;
    };
    if constexpr (C::QUERIES_IN_REGISTERS) {
#pragma unroll
      for (int term = 0; term < TERMS; ++term)
#pragma unroll
        for (int block = 0; block < D / TEAM / 32; ++block)
#pragma unroll
          for (int p = 0; p < 4; ++p)
#pragma unroll
            for (int n = 0; n < NB; ++n)
              query[term][block][p / 2][n][p % 2] = pair(term, member * (D / TEAM / 32) + block, p, n);
    } else {
      u32* fragments = reinterpret_cast<u32*>(shared + C::FRAGMENTS);
      for (int i = warp; i < TERMS * (D / 32) * 4 * NB; i += WARPS) {  // i = ((term, block), m, n, half)
        const int p = i / (2 * NB) % 2 * 2 + i % 2, n = i / 2 % NB, block = i / (4 * NB);
        fragments[(i / 2 * 32 + lane) * 2 + i % 2] = pair(block / (D / 32), block % (D / 32), p, n);
      }
      __syncthreads();
    }
  }

  // `block` counts within the warp's share.
  __device__ __forceinline__ uint2 query_operand(int term, int block, int m, int n) const {
    if constexpr (C::QUERIES_IN_REGISTERS) {
      return {query[term][block][m][n][0], query[term][block][m][n][1]};
    } else {
      const uint2* fragments = reinterpret_cast<const uint2*>(shared + C::FRAGMENTS);
      return fragments[(((term * (D / 32) + member * (D / TEAM / 32) + block) * 2 + m) * NB + n) * 32 + lane];
    }
  }

  // A tile: its parts of 16 keys share one look at the running maxima.
  __device__ __forceinline__ void attend(u32 stage, int first) {
    float s[PARTS][NB][4];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      score(s[i], stage, i);
      to_logits(s[i]);
      if constexpr (C::ROPE > 0) add_rope(s[i], stage + C::ROPE_KEYS + 16 * i * C::RopeTile::PITCH);
    }
    if constexpr (TEAM > 1) add_up(s);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) mask(s[i], first + 16 * i);
    renormalize(s, stage);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          s[i][n][x] = exp2_fast(s[i][n][x] - top[n][x % 2]);
          sum[n][x % 2] += s[i][n][x];
        }
      add_values(s[i], stage, i);
    }
  }

  // The scales of a row that a warp needs; with scaled codes it picks them from the whole row.
  using KeyScales = ScaleRow<K::groups(D), K::SCALED_CODES ? K::groups(D) : KEY_GROUPS, typename K::Scale>;
  using ValueScales = ScaleRow<V::groups(DV), V::SCALED_CODES ? V::groups(DV) : VALUE_GROUPS, typename V::Scale>;
  __device__ __forceinline__ int first_key_group() const { return K::SCALED_CODES ? 0 : member * KEY_GROUPS; }
  __device__ __forceinline__ int first_value_group() const { return V::SCALED_CODES ? 0 : member * VALUE_GROUPS; }
  static constexpr int VALUES_AT = C::SHARED_KV ? 0 : C::VALUES;
  static constexpr int VALUE_SCALES_AT = C::SHARED_KV ? C::KEY_SCALES : C::VALUE_SCALES;
  static constexpr int VALUE_BIASES_AT = C::SHARED_KV ? C::KEY_BIASES : C::VALUE_BIASES;

  // Scores of 16 keys (the part that the warp's dimensions make) in units of the scaled queries: s[n][x] is that of
  // key r + x / 2 * 8 and row 8n + 2t + x % 2.
  __device__ __forceinline__ void score(float (&s)[NB][4], u32 stage, int part) const {
    const int key = 16 * part + r;
    const int first = first_key_group();
    const u32 scales = stage + C::KEY_SCALES;
    const KeyScales low_scale(scales, key, first), high_scale(scales, key + 8, first);
    const u32 biases = stage + (K::HAS_BIAS ? C::KEY_BIASES : C::KEY_SCALES);
    const KeyScales low_bias(biases, key, first), high_bias(biases, key + 8, first);
    const u32 codes = stage + 16 * part * C::KeyTile::PITCH + member * K::row_bytes(D / TEAM);
#pragma unroll
    for (int g = 0; g < KEY_GROUPS; ++g) {
      float c[NB][4] = {};
#pragma unroll
      for (int i = 0; i < KEY_BLOCKS; ++i) {
        const int block = g * KEY_BLOCKS + i;
        u32 low[4], high[4];
        load_keys<K, C::KeyTile::PITCH>(low, high, codes, block, lane);
        if constexpr (K::SCALED_CODES) {
          const int group = 2 * (member * (D / TEAM / 32) + block) + t / 2;
          const u32 x = e4m3_pair(low_scale[group], low_scale[group]);
          const u32 y = e4m3_pair(high_scale[group], high_scale[group]);
#pragma unroll
          for (int p = 0; p < 4; ++p) low[p] = mul_half2(low[p], x), high[p] = mul_half2(high[p], y);
        }
#pragma unroll
        for (int term = 0; term < TERMS; ++term)
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < NB; ++n) {
              const uint2 q = query_operand(term, block, m, n);
              mma(c[n], low[2 * m], high[2 * m], low[2 * m + 1], high[2 * m + 1], q.x, q.y);
            }
      }
      float scale[2] = {1.0f, 1.0f}, bias[2] = {};
      if constexpr (!K::SCALED_CODES) {
        scale[0] = scale_value(low_scale[g]) * K::CODE_FACTOR;
        scale[1] = scale_value(high_scale[g]) * K::CODE_FACTOR;
      }
      if constexpr (K::HAS_BIAS) bias[0] = scale_value(low_bias[g]), bias[1] = scale_value(high_bias[g]);
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        float2 sums = {};
        if constexpr (K::HAS_BIAS)
          sums = *reinterpret_cast<const float2*>(floats(C::QUERY_SUMS) + (first + g) * ROWS + 8 * n + 2 * t);
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          float y = g == 0 ? 0.0f : s[n][x];
          if constexpr (K::HAS_BIAS) y = fmaf(bias[x / 2], x % 2 ? sums.y : sums.x, y);
          s[n][x] = fmaf(scale[x / 2], c[n][x], y);
        }
      }
    }
  }

  // To base-2 logits, by the rows' factors.
  __device__ __forceinline__ void to_logits(float (&s)[NB][4]) const {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      const float2 factor = *reinterpret_cast<const float2*>(floats(C::ROW_FACTORS) + 8 * n + 2 * t);
#pragma unroll
      for (int x = 0; x < 4; ++x) s[n][x] *= x % 2 ? factor.y : factor.x;
    }
  }

  // The sums over the team, in the same order in each warp: all must come to the same maxima.
  __device__ __forceinline__ void add_up(float (&s)[PARTS][NB][4]) const {
    float4* shares = reinterpret_cast<float4*>(shared + C::EXCHANGE) + team * TEAM * PARTS * NB * 32 + lane;
#pragma unroll
    for (int i = 0; i < PARTS * NB; ++i) {
      const float(&x)[4] = s[i / NB][i % NB];
      shares[(member * PARTS * NB + i) * 32] = {x[0], x[1], x[2], x[3]};
    }
    team_barrier();  // the next tile's barrier keeps the shares until all have read them
#pragma unroll
    for (int i = 0; i < PARTS * NB; ++i) {
      float(&x)[4] = s[i / NB][i % NB];
      x[0] = x[1] = x[2] = x[3] = 0.0f;
#pragma unroll
      for (int k = 0; k < TEAM; ++k) {
        const float4 y = shares[(k * PARTS * NB + i) * 32];
        x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
      }
    }
  }

  // The mask, and the end of the keys.
  __device__ __forceinline__ void mask(float (&s)[NB][4], int first) const {
    if constexpr (C::MASK == BOOLEAN || C::MASK == ADDITIVE) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int2 at = head_and_position(8 * n + 2 * t + x % 2);
          const int key = min(first + r + x / 2 * 8, count - 1);
          const i64 column = a.mask.shape[3] > 1 ? key * a.mask.strides[3] : 0;
          const auto m = a.mask.data[a.mask.offset(batch, at.x, at.y) + column];
          if constexpr (C::MASK == BOOLEAN) {
            if (!m) s[n][x] = minus_infinity();
          } else {
            const float y = to_float(m);
            s[n][x] = y == minus_infinity() ? minus_infinity() : fmaxf(s[n][x] + y * LOG2E, LOWEST);
          }
        }
    }
    const int last = C::MASK == CAUSAL ? count - length : count - 1;  // the last key that every row sees
    if (first + 15 > last) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int seen = C::MASK == CAUSAL ? last + head_and_position(8 * n + 2 * t + x % 2).y : last;
          if (first + r + x / 2 * 8 > seen) s[n][x] = minus_infinity();
        }
    }
  }

  __device__ __forceinline__ void add_rope(float (&s)[NB][4], u32 keys) const {
    const T* queries = reinterpret_cast<const T*>(shared + C::ROPE_QUERIES);
    constexpr bool SHARED_OUT = C::ROPE % (16 * TEAM) == 0;  // among the team; else its first warp does it all
    constexpr int SHARE = SHARED_OUT ? C::ROPE / TEAM : C::ROPE;
    if (!SHARED_OUT && member > 0) return;
    const int begin = SHARED_OUT ? member * SHARE : 0;
    float c[NB][4] = {};
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < SHARE; i += 16) {
        const int k = begin + i;
        u32 w[4];
        load_matrices(w, keys + (lane % 16) * C::RopeTile::PITCH + k * 2 + lane / 16 * 16);
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          const u32* row = reinterpret_cast<const u32*>(queries + (8 * n + r) * C::ROPE_PITCH + k) + t;
          mma<C::BF16>(c[n], w[0], w[1], w[2], w[3], row[0], row[4]);
        }
      }
    } else {
      const float* tile = static_cast<const float*>(__cvta_shared_to_generic(keys));
      for (int k = begin; k < begin + SHARE; ++k)
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int x = 0; x < 4; ++x)
            c[n][x] = fmaf(tile[(r + x / 2 * 8) * (C::RopeTile::PITCH / 4) + k],
                           to_float(queries[(8 * n + 2 * t + x % 2) * C::ROPE_PITCH + k]), c[n][x]);
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 4; ++x) s[n][x] = fmaf(c[n][x], LOG2E, s[n][x]);
  }

  // Raise the running maxima, or lower the factor on value scales, where this tile asks for it.
  __device__ __forceinline__ void renormalize(const float (&s)[PARTS][NB][4], u32 stage) {
    float peak[NB][2], largest = 0.0f;
    bool rise = false;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        peak[n][h] = fmaxf(s[0][n][h], s[0][n][h + 2]);
#pragma unroll
        for (int i = 1; i < PARTS; ++i) peak[n][h] = fmaxf(peak[n][h], fmaxf(s[i][n][h], s[i][n][h + 2]));
        rise |= peak[n][h] > top[n][h] + RISE;
      }
    if constexpr (!V::SCALED_CODES) {
#pragma unroll
      for (int i = 0; i < 2 * PARTS; ++i) {
        const ValueScales scales(stage + VALUE_SCALES_AT, r + 8 * i, first_value_group());
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS; ++g) largest = fmaxf(largest, fabsf(scale_value(scales[g])));
      }
    }
    if (!__any_sync(~0u, rise || largest > value_limit)) return;

    const bool raise = __any_sync(~0u, rise);  // alike in all warps of a team, as scales are not
    float adjust = 1.0f;  // on the accumulators, for a new factor on value scales
    largest = warp_max(largest);
    if (V::SCALED_CODES || largest > value_limit) {
      const int exponent = V::SCALED_CODES ? 127 : __float_as_uint(largest) >> 23;
      const float factor = __uint_as_float(static_cast<u32>(min(max(254 - exponent, 1), 240)) << 23) * SCALE_TARGET;
      adjust = value_factor == 0.0f ? 1.0f : factor / value_factor;
      value_factor = factor;
      value_limit = V::SCALED_CODES ? 1.0f : SCALE_LIMIT / factor;
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) peak[n][h] = fmaxf(peak[n][h], __shfl_xor_sync(~0u, peak[n][h], d));
        const float higher = raise ? fmaxf(peak[n][h], top[n][h]) : top[n][h];
        const float f = exp2_fast(top[n][h] - higher);
        top[n][h] = higher;
        sum[n][h] *= f;
        if constexpr (V::HAS_BIAS) {
#pragma unroll
          for (int g = 0; g < VALUE_GROUPS; ++g) bias_sum[g][n][h] *= f;
        }
#pragma unroll
        for (int i = 0; i < DV / TEAM / 16; ++i) {
          o[i / 2][i % 2][n][h] *= f * adjust;
          o[i / 2][i % 2][n][h + 2] *= f * adjust;
        }
      }
  }

  // o += codes(V)^T * (p * scale); p[n][x] as in score().
  __device__ __forceinline__ void add_values(const float (&p)[NB][4], u32 stage, int part) {
    const int key = 16 * part + r;
    const u32 codes = stage + VALUES_AT + 16 * part * C::ValueTile::PITCH + member * V::row_bytes(DV / TEAM);
    const int first = first_value_group();
    const u32 scales = stage + VALUE_SCALES_AT, biases = stage + (V::HAS_BIAS ? VALUE_BIASES_AT : VALUE_SCALES_AT);
    const ValueScales low_scale(scales, key, first), high_scale(scales, key + 8, first);
    const ValueScales low_bias(biases, key, first), high_bias(biases, key + 8, first);
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; ++g) {
      float scale[2] = {value_factor, value_factor};
      if constexpr (!V::SCALED_CODES) {
        scale[0] *= scale_value(low_scale[g]);
        scale[1] *= scale_value(high_scale[g]);
      }
      u32 operand[TERMS][NB][2];
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        if constexpr (V::HAS_BIAS) {
          const float bias[2] = {scale_value(low_bias[g]), scale_value(high_bias[g])};
#pragma unroll
          for (int x = 0; x < 4; ++x) bias_sum[g][n][x % 2] = fmaf(bias[x / 2], p[n][x], bias_sum[g][n][x % 2]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x = p[n][2 * h] * scale[h], y = p[n][2 * h + 1] * scale[h];
#pragma unroll
          for (int term = 0; term < TERMS; ++term) {
            const u32 packed = pack_half2(x, y);
            operand[term][n][h] = transpose_matrix(packed);
            if constexpr (TERMS == 2) x -= low_half(packed), y -= high_half(packed);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < VALUE_BLOCKS; ++i) {
        const int block = g * VALUE_BLOCKS + i;
        u32 low[4], high[4];
        load_values<V, C::ValueTile::PITCH>(low, high, codes, block, lane);
        if constexpr (V::SCALED_CODES) scale_values(low, high, scales, block, part);
#pragma unroll
        for (int term = 0; term < TERMS; ++term)
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < NB; ++n)
              mma(o[block][m][n], low[2 * m], low[2 * m + 1], high[2 * m], high[2 * m + 1], operand[term][n][0],
                  operand[term][n][1]);
      }
    }
  }

  // nvfp4: the scales of the lane's four keys and its group (dimensions 4r to 4r + 3 of the block) on the codes.
  __device__ __forceinline__ void scale_values(u32 (&low)[4], u32 (&high)[4], u32 scales, int block,
                                               int part) const {
    const int group = 2 * (member * (DV / TEAM / 32) + block) + r / 4;
    auto scale = [&](int key) -> u32 { return ValueScales(scales, 16 * part + key, 0)[group]; };
    const u32 x = e4m3_pair(scale(2 * t), scale(2 * t + 1)), y = e4m3_pair(scale(2 * t + 8), scale(2 * t + 9));
#pragma unroll
    for (int p = 0; p < 4; ++p) low[p] = mul_half2(low[p], x), high[p] = mul_half2(high[p], y);
  }

  // Sums over the lanes, and the accumulators in true units.
  __device__ __forceinline__ void finish_warp() {
    const float unit = value_factor == 0.0f ? 0.0f : V::CODE_FACTOR / value_factor;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[n][h] = quad_rows_sum(sum[n][h]);
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS; ++g) {
          float bias = 0.0f;
          if constexpr (V::HAS_BIAS) bias = quad_rows_sum(bias_sum[g][n][h]);
#pragma unroll
          for (int i = 0; i < 2 * VALUE_BLOCKS; ++i) {
            float(&c)[4] = o[g * VALUE_BLOCKS + i / 2][i % 2][n];
            c[h] = fmaf(c[h], unit, bias);
            c[h + 2] = fmaf(c[h + 2], unit, bias);
          }
        }
      }
  }

  // The teams' results, weighted, to the output or to this split's place among the partial results.
  __device__ __forceinline__ void combine_teams() {
    float2* team_stats = reinterpret_cast<float2*>(shared + C::TEAM_STATS);  // [team, row]
    if (r == 0 && member == 0) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) team_stats[team * ROWS + 8 * n + 2 * t + h] = {top[n][h], sum[n][h]};
    }
    __syncthreads();  // every ring is idle from here on
    float* out = floats(0) + team * ROWS * C::OUT_PITCH + member * (DV / TEAM);
#pragma unroll
    for (int block = 0; block < DV / TEAM / 32; ++block)
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* row = out + (8 * n + 2 * t + h) * C::OUT_PITCH;
          const float(&c)[4] = o[block][0][n];
          const float(&d)[4] = o[block][1][n];
          if constexpr (V::BITS == 8) {  // value_dim() of a lane: runs of two, or of four
            *reinterpret_cast<float2*>(row + value_dim<V>(block, r, 0, 0)) = {c[h], c[h + 2]};
            *reinterpret_cast<float2*>(row + value_dim<V>(block, r, 1, 0)) = {d[h], d[h + 2]};
          } else {
            *reinterpret_cast<float4*>(row + value_dim<V>(block, r, 0, 0)) = {c[h], c[h + 2], d[h], d[h + 2]};
          }
        }
    __syncthreads();

    const i64 tile = static_cast<i64>(batch) * gridDim.y + blockIdx.y;
    const i64 place = (tile * splits + split) * ROWS;
    for (int i = threadIdx.x; i < ROWS * DV / 4; i += WARPS * 32) {
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
        const float4 y = *reinterpret_cast<const float4*>(floats(0) + (w * ROWS + row) * C::OUT_PITCH + d);
        total = fmaf(f, stat.y, total);
        x = {fmaf(f, y.x, x.x), fmaf(f, y.y, x.y), fmaf(f, y.z, x.z), fmaf(f, y.w, x.w)};
      }
      if (splits == 1) {
        add_sink(row, peak, total, x);
        store(row, d, x, total);
      } else {
        *reinterpret_cast<float4*>(a.partials + (place + row) * DV + d) = x;
        if (d == 0) *reinterpret_cast<float2*>(a.stats + (place + row) * 2) = {peak, total};
      }
    }
    if (splits == 1) return;
    u32* tickets = a.tickets + tile * TICKET_WORDS;
    if (splits <= 2 * MERGED) {
      if (is_last(tickets, splits)) merge(tile * splits, splits, 1, true);
    } else {  // in two steps, the first in many blocks at once
      const int group = split / MERGED, groups = (splits + MERGED - 1) / MERGED;
      const int members = min(MERGED, splits - group * MERGED);
      if (!is_last(tickets + 1 + group, members)) return;
      merge(tile * splits + group * MERGED, members, 1, false);
      if (is_last(tickets, groups)) merge(tile * splits, groups, MERGED, true);
    }
  }

  // Counts this block as done; true in the last of `blocks`. The counter wraps to zero, ready for reuse.
  __device__ __forceinline__ bool is_last(u32* counter, int blocks) {
    bool* last = reinterpret_cast<bool*>(shared + C::ROW_FACTORS);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      *last = atomicInc(counter, blocks - 1) == blocks - 1;
      __threadfence();
    }
    __syncthreads();
    return *last;
  }

  // Merge the results of `n` splits, `step` apart from `place` on: to the output, or into the first of them.
  __device__ __forceinline__ void merge(i64 place, int n, int step, bool final) {
    constexpr int BATCH = 8;  // loads under way at once
    float2* row_stats = reinterpret_cast<float2*>(shared + C::TEAM_STATS);
    float2* weights = reinterpret_cast<float2*>(shared);  // [split, row]: maximum and sum, then the weight
    float* stats = a.stats + place * ROWS * 2;
    for (int i = threadIdx.x; i < n * ROWS; i += WARPS * 32)
      weights[i] = load_fresh2(stats + (i / ROWS * step * ROWS + i % ROWS) * 2);
    __syncthreads();
    for (int row = warp; row < ROWS; row += WARPS) {
      float peak = LOWEST, total = 0.0f;
      for (int s = lane; s < n; s += 32) peak = fmaxf(peak, weights[s * ROWS + row].x);
      peak = warp_max(peak);
      for (int s = lane; s < n; s += 32) {
        float2& w = weights[s * ROWS + row];
        w.x = exp2_fast(w.x - peak);
        total = fmaf(w.x, w.y, total);
      }
      total = warp_sum(total);
      if (lane == 0) row_stats[row] = {peak, total};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * DV / 4; i += WARPS * 32) {
      const int row = i / (DV / 4), d = i % (DV / 4) * 4;
      float* source = a.partials + (place * ROWS + row) * DV + d;
      float4 x = {};
      for (int first = 0; first < n; first += BATCH) {
        float4 y[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
          y[j] = {};
          if (first + j < n) y[j] = load_fresh4(source + (first + j) * step * (ROWS * DV));
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
          const float f = first + j < n ? weights[(first + j) * ROWS + row].x : 0.0f;
          x = {fmaf(f, y[j].x, x.x), fmaf(f, y[j].y, x.y), fmaf(f, y[j].z, x.z), fmaf(f, y[j].w, x.w)};
        }
      }
      float total = row_stats[row].y;
      if (final) {
        add_sink(row, row_stats[row].x, total, x);
        store(row, d, x, total);
      } else {
        *reinterpret_cast<float4*>(source) = x;
        if (d == 0) *reinterpret_cast<float2*>(stats + row * 2) = row_stats[row];
      }
    }
  }

  // A sink is one more logit, of a key without a value.
  __device__ __forceinline__ void add_sink(int row, float peak, float& total, float4& x) const {
    if (a.sinks == nullptr) return;
    const float sink = to_float(a.sinks[head_and_position(row).x]) * LOG2E;
    const float higher = fmaxf(peak, sink), f = exp2_fast(peak - higher);
    total = total * f + exp2_fast(sink - higher);
    x = {x.x * f, x.y * f, x.z * f, x.w * f};
  }

  __device__ __forceinline__ void store(int row, int d, const float4& x, float total) const {
    if (first_row + row >= rows) return;
    const int2 at = head_and_position(row);
    const i64 line = (static_cast<i64>(batch) * a.queries.shape[1] + at.x) * length + at.y;
    const float f = total > 0.0f ? 1.0f / total : 0.0f;
    T* out = a.out + line * DV + d;
    out[0] = T(x.x * f), out[1] = T(x.y * f), out[2] = T(x.z * f), out[3] = T(x.w * f);
  }

  __device__ __forceinline__ static float warp_max(float x) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
    return x;
  }
  __device__ __forceinline__ static float warp_sum(float x) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
  }
  // Over the lanes with the same t.
  __device__ __forceinline__ static float quad_rows_sum(float x) {
#pragma unroll
    for (int d = 4; d < 32; d *= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
  }
};

}  // namespace qsdpa
