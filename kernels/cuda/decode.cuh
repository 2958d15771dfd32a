// Attention of a few query rows over quantized keys and values, split over blocks along the keys.
//
// Work: a block serves ROWS query rows (heads of one group times query positions) of one batch entry and KV head. The
// teams of warps of all its splits deal the tiles of TILE keys among themselves like cards. A team has its own ring of
// STAGES tiles in shared memory and shares nothing with the others until the end. It is one warp, or, where there are
// many rows of many dimensions, two or four that divide the dimensions and add up their scores. Queries are the narrow
// side of every product:
//   scores  S^T[16 keys x 8 columns]  = codes(K) * Q^T      one mma a 16 dimensions, or 32 as bytes
//   output  O^T[16 dims x 8 columns] += codes(V)^T * P^T    one mma a 16 dimensions
// so that a code is unpacked once for all rows. Codes enter the products exactly. A key's scale is applied to the sums
// of its groups, a value's scale to the probability, and its bias to a running sum, all in float32. A key's bias is to
// be multiplied by the sum of its group's query: by the same products where there are eight rows or more.
//
// Keys as bytes: queries of 16 bits become integers of 16 bits (a factor a row), whose high and low bytes are columns
// of their own; the products are exact, and take a quarter of the instructions of halves. Else queries are halves.
//
// Columns: 2t + j of a block of eight is row 4j + t. With at most four rows, j is 0, and the odd columns serve
// otherwise: for the low bytes of the queries, and for the probabilities with the scales of another group of values.
//
// Range: queries are scaled a row, and value scales by a power of two a warp, so that halves neither overflow nor lose
// precision whatever the magnitudes are. Float32 queries and probabilities are two halves each, which keeps 22 bits.
// The running maximum of a row is raised only when a score exceeds it by RISE.
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

// Number `index` of `count` operands that are stacked along the heads.
template <typename T>
__device__ __forceinline__ View<T> stacked(View<T> all, int index, int count) {
  all.shape[1] /= count;
  all.data += index * all.shape[1] * all.strides[1];
  return all;
}

template <typename T_, int D_, int DV_, typename K_, typename V_, int ROWS_, int MASK_, typename MaskT_,
          typename SinkT_, int ROPE_, bool SHARED_KV_, int WARPS_, int STAGES_, int PARTS_, int TEAM_>
struct DecodeConfig {
  using T = T_;
  using K = K_;
  using V = V_;
  using MaskT = MaskT_;
  using SinkT = SinkT_;
  static constexpr int D = D_, DV = DV_, ROWS = ROWS_, MASK = MASK_, ROPE = ROPE_, WARPS = WARPS_,
                       STAGES = STAGES_, PARTS = PARTS_, TEAM = TEAM_;
  static constexpr bool SHARED_KV = SHARED_KV_;
  static constexpr int ROW_BLOCKS = ROWS / 8 + (ROWS == 4), LANE_ROWS = ROWS == 4 ? 1 : 2;
  static_assert(ROWS == 4 || ROWS % 8 == 0, "a block of columns is one half or two halves of four rows");
  static constexpr int TILE = 16 * PARTS;  // keys
  static constexpr int TEAMS = WARPS / TEAM, TEAM_THREADS = 32 * TEAM;
  static constexpr int TERMS = sizeof(T) == 4 ? 2 : 1;  // halves that a query or a probability is made of
  static constexpr bool KEY_BYTES = TERMS == 1 && K::HAS_BYTES, RAW_VALUES = TERMS == 1 && V::HAS_RAW_VALUES;
  static constexpr bool QUERIES_IN_REGISTERS = D / TEAM * ROW_BLOCKS * TERMS <= 256;
  static constexpr bool BF16 = IsBfloat16<T>::value;
  // Where logits are the scores times a factor and nothing else, the factor waits for the exponential.
  static constexpr bool LATE_FACTORS = ROPE == 0 && TEAM == 1 && (MASK == NO_MASK || MASK == CAUSAL);
  // Biases of keys as an operand: pairs of groups are words, and 16 columns hold up to 8 groups twice, since the sums
  // of queries that they are multiplied by are two halves each.
  static constexpr int BIAS_WORDS = K::groups(D) / 2;
  static constexpr bool BIAS_OPERANDS = K::HAS_BIAS && sizeof(typename K::Scale) == 2 && LANE_ROWS == 2 && ROPE == 0 &&
                                        TEAM == 1 && (K::groups(D) == 2 || K::groups(D) == 4 || K::groups(D) == 8);

  using KeyTile = RowTile<TILE, TEAM_THREADS, K::row_bytes(D), u32, K::MATRICES>;
  using ValueTile = RowTile<TILE, TEAM_THREADS, V::row_bytes(DV), u32, V::MATRICES>;
  using KeyScaleTile = ScaleTile<TILE, TEAM_THREADS, K::groups(D), typename K::Scale>;
  using ValueScaleTile = ScaleTile<TILE, TEAM_THREADS, V::groups(DV), typename V::Scale>;
  using RopeTile = RowTile<TILE, TEAM_THREADS, ROPE * static_cast<int>(sizeof(T)), T, false>;

  // Shared memory, in bytes.
  static constexpr int VALUES = KeyTile::BYTES;
  static constexpr int KEY_SCALES = VALUES + (SHARED_KV ? 0 : ValueTile::BYTES);
  static constexpr int KEY_BIASES = KEY_SCALES + KeyScaleTile::BYTES;
  static constexpr int VALUE_SCALES = KEY_BIASES + (K::HAS_BIAS ? KeyScaleTile::BYTES : 0);
  static constexpr int VALUE_BIASES = VALUE_SCALES + (SHARED_KV ? 0 : ValueScaleTile::BYTES);
  static constexpr int ROPE_KEYS = VALUE_BIASES + (V::HAS_BIAS && !SHARED_KV ? ValueScaleTile::BYTES : 0);
  static constexpr int STAGE = (ROPE_KEYS + (ROPE ? RopeTile::BYTES : 0) + 127) / 128 * 128;
  static constexpr int RING = TEAMS * STAGES * STAGE;
  static constexpr int OUT_PITCH = DV + 4;
  static constexpr int OUT = TEAMS * ROWS * OUT_PITCH * 4;  // over the ring, once it is idle
  static constexpr int QUERY_PITCH = D + 32;  // in halves; of bytes, the high and the low ones of a row
  static constexpr int QUERIES = (RING > OUT ? RING : OUT) + 16;
  static constexpr int FRAGMENTS = QUERIES + TERMS * ROWS * QUERY_PITCH * 2;
  static constexpr int ROPE_PITCH = ROPE + 16 / static_cast<int>(sizeof(T));
  static constexpr int ROPE_QUERIES =
      FRAGMENTS + (QUERIES_IN_REGISTERS || KEY_BYTES ? 0 : TERMS * ROW_BLOCKS * 8 * D * 2);
  static constexpr int QUERY_SUMS = ROPE_QUERIES + (ROPE ? ROWS * ROPE_PITCH * static_cast<int>(sizeof(T)) : 0);
  static constexpr bool HAS_SUMS = K::HAS_BIAS || (KEY_BYTES && K::BYTE_CENTER != 0);
  static constexpr int ROW_FACTORS = QUERY_SUMS + (HAS_SUMS ? K::groups(D) * ROWS * 4 : 0);
  static constexpr int TEAM_STATS = ROW_FACTORS + ROWS * 4;
  static constexpr int EXCHANGE = TEAM_STATS + TEAMS * ROWS * 8;  // scores that the warps of a team share
  static constexpr int ARGUMENTS = EXCHANGE + (TEAM > 1 ? WARPS * PARTS * ROWS * 64 : 0);
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
  float* partials;  // [tile, split, row, DV], and after them the running maximum and sum: [tile, split, row, 2]
};

template <typename C>
class Decoder {
  using T = typename C::T;
  using K = typename C::K;
  using V = typename C::V;
  static constexpr int D = C::D, DV = C::DV, NB = C::ROW_BLOCKS, ROWS = C::ROWS, WARPS = C::WARPS;
  static constexpr int LR = C::LANE_ROWS;  // rows of a block of columns in a lane
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
  using KeyWords = CodeWords<K, typename C::KeyTile, D / TEAM / 32, false>;
  using ValueWords = CodeWords<V, typename C::ValueTile, DV / TEAM / 32, true>;
  static constexpr int VALUES_AT = C::SHARED_KV ? 0 : C::VALUES;
  static constexpr int VALUE_SCALES_AT = C::SHARED_KV ? C::KEY_SCALES : C::VALUE_SCALES;
  static constexpr int VALUE_BIASES_AT = C::SHARED_KV ? C::KEY_BIASES : C::VALUE_BIASES;
  static constexpr bool BF16_SCALES = IsBfloat16<typename K::Scale>::value;
  static constexpr float SCORE_UNIT = C::BIAS_OPERANDS ? K::GROUP : 1.0f;  // keeps sums of queries in range
  static constexpr float RISE = 4.0f;           // probabilities stay below 2^RISE
  // Probabilities carry a power of two that takes the largest value scale to [256, 512), until one exceeds 2048.
  static constexpr int SCALE_EXPONENT = 8, LIMIT_EXPONENT = 11;

  const DecodeArguments<C>& a;
  char* const shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
  const int team = warp / TEAM, member = warp % TEAM;
  const int split = blockIdx.x, splits = gridDim.x, batch = blockIdx.z;
  int kv_head, first_row, group_size, length, rows, count;
  float* stats;
  u32 key_place, value_place, scale_row;  // of the lane: in a tile's codes, and its r

  float sum[NB][LR] = {}, top[NB][LR];
  float o[DV / TEAM / 32][2][NB][4] = {};
  float bias_sum[V::HAS_BIAS ? VALUE_GROUPS : 1][NB][LR] = {};
  float base[NB][LR];  // what is taken off logits: the running maximum, less the exponent on value scales
  float value_exponent = 0.0f, value_limit = -1.0f;  // of that power of two, and the largest scale that it serves
  // B operands of a block of 32 dimensions: one for each j for bytes, one for each 16 dimensions for halves.
  static constexpr int OPERANDS = C::KEY_BYTES ? LR : 2;
  u32 query_sums[C::BIAS_OPERANDS ? NB : 1][2];  // B operands that go with the biases of keys
  u32 query[C::QUERIES_IN_REGISTERS ? TERMS : 1][C::QUERIES_IN_REGISTERS ? D / TEAM / 32 : 1][OPERANDS][NB][2];

 public:
  __device__ __forceinline__ Decoder(const DecodeArguments<C>& arguments, char* memory) : a(arguments), shared(memory) {
    const int kv_heads = a.keys.shape[1];
    kv_head = blockIdx.y % kv_heads;
    first_row = blockIdx.y / kv_heads * ROWS;
    group_size = a.queries.shape[1] / kv_heads;
    length = a.queries.shape[2];
    rows = group_size * length;
    count = a.keys.shape[2];
    stats = a.partials + static_cast<i64>(splits) * gridDim.y * gridDim.z * (ROWS * DV);
    key_place = KeyWords::place_of(lane, member * K::row_bytes(D / TEAM));
    value_place = ValueWords::place_of(lane, member * V::row_bytes(DV / TEAM));
    scale_row = r;
    keep(key_place);
    keep(value_place);
    keep(scale_row);
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) top[n][j] = base[n][j] = LOWEST;
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
  static constexpr int ROWS_OF_WARP = (ROWS + WARPS - 1) / WARPS;

  // The row of a lane: number j (of LR) of block n.
  __device__ __forceinline__ int row_of(int n, int j) const { return 8 * n + 4 * j + t; }
  // The row of column r of block n; for halves.
  __device__ __forceinline__ int column_row(int n) const { return 8 * n + (LR == 1 ? 0 : r % 2 * 4) + r / 2; }

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
    u32 thread;
    typename C::KeyTile::Places key_places;
    typename C::ValueTile::Places value_places;

    __device__ __forceinline__ explicit Runs(const Decoder& d)
        : thread(threadIdx.x % C::TEAM_THREADS), key_places(thread), value_places(thread) {
      keep(thread);
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
        keep(scales[i]);
      }
      keep(keys);
      keep(values);
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

  // Rows of queries to shared memory, as halves of a largest magnitude in [512, 1024) or as integers of up to 32512;
  // their sums over the keys' groups; the factor of each row that takes scores to base-2 logits.
  __device__ __forceinline__ void prepare_queries(float (&raw)[ROWS_OF_WARP][D / 32]) {
    // The sign goes to the queries, so that the largest score is the largest logit.
    const float sign = *a.scale < 0.0f ? -1.0f : 1.0f;
    const float scale = fabsf(*a.scale) * LOG2E * (K::SCALED_CODES ? K::CODE_FACTOR : 1.0f) * SCORE_UNIT;
#pragma unroll
    for (int k = 0; k < ROWS_OF_WARP; ++k) {
      const int row = warp + k * WARPS;
      if (row >= ROWS) break;
      float(&x)[D / 32] = raw[k];
      float peak = 0.0f;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) x[i] *= sign, peak = fmaxf(peak, fabsf(x[i]));
      peak = warp_max(peak);
      const float factor = C::KEY_BYTES ? integer_queries(x, row, peak) : half_queries(x, row, peak);
      if constexpr (C::HAS_SUMS) {
#pragma unroll
        for (int g = 0; g < K::groups(D); ++g) {
          float s = 0.0f;
#pragma unroll
          for (int i = 0; i < K::GROUP / 32; ++i) s += x[g * (K::GROUP / 32) + i];
          s = warp_sum(s);
          if (lane == 0) floats(C::QUERY_SUMS)[g * ROWS + row] = s;
        }
      }
      if (lane == 0) floats(C::ROW_FACTORS)[row] = fmaxf(scale / factor, 1e-36f);  // times a masked score: no NaN
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
    if constexpr (C::BIAS_OPERANDS) arrange_query_sums();
  }

  // Sums of queries as the B operand that goes with the biases: all pairs of groups in the biases' type, and after them
  // what that rounds off.
  __device__ __forceinline__ void arrange_query_sums() {
    constexpr int W = C::BIAS_WORDS;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pair = t + 4 * i, word = pair % W;
        u32 x = 0;
        if (pair < 2 * W) {
          const float* sums = floats(C::QUERY_SUMS) + 2 * word * ROWS + column_row(n);
          float low = sums[0] / SCORE_UNIT, high = sums[ROWS] / SCORE_UNIT;
          x = pack_pair<BF16_SCALES>(low, high);
          if (pair >= W) {
            if constexpr (BF16_SCALES) {
              low -= __uint_as_float(x << 16), high -= __uint_as_float(x & 0xffff0000u);
            } else {
              low -= low_half(x), high -= high_half(x);
            }
            x = pack_pair<BF16_SCALES>(low, high);
          }
        }
        query_sums[n][i] = x;
      }
  }

  // A row as halves. Returns the factor on it, and in x what the halves are.
  __device__ __forceinline__ float half_queries(float (&x)[D / 32], int row, float peak) {
    __half* halves = reinterpret_cast<__half*>(shared + C::QUERIES);
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
    return factor;
  }

  // A row as integers, smaller where the codes of keys do not begin at the lowest bit of their byte.
  __device__ __forceinline__ float integer_queries(float (&x)[D / 32], int row, float peak) {
    char* bytes = shared + C::QUERIES + row * (2 * C::QUERY_PITCH);
    const float factor = peak > 1e-30f ? 32512.0f / peak : 1.0f;
    const u32 bit = K::CODE_SHIFT >> (4 * (lane % 8)) & 15;
    const float whole = static_cast<float>(1u << bit), part = 1.0f / whole;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const int n = __float2int_rn(x[i] * factor * part);
      const int place = byte_place<K>(32 * i + lane), low = static_cast<signed char>(n);
      bytes[place] = static_cast<char>((n - low) >> 8);
      bytes[C::QUERY_PITCH + place] = static_cast<char>(low);
      x[i] = static_cast<float>(n) * whole;
    }
    return factor / K::BYTE_FACTOR;
  }

  // Queries as B operands, in the order of the dimensions of load_keys() or load_key_bytes().
  __device__ __forceinline__ void arrange_queries() {
    if constexpr (C::QUERIES_IN_REGISTERS) {
#pragma unroll
      for (int term = 0; term < TERMS; ++term)
#pragma unroll
        for (int block = 0; block < D / TEAM / 32; ++block)
#pragma unroll
          for (int m = 0; m < OPERANDS; ++m)
#pragma unroll
            for (int n = 0; n < NB; ++n) {
              const int at = member * (D / TEAM / 32) + block;
              const uint2 x = C::KEY_BYTES ? query_bytes(at, m, n) : query_halves(term, at, m, n);
              query[term][block][m][n][0] = x.x, query[term][block][m][n][1] = x.y;
            }
    } else if constexpr (!C::KEY_BYTES) {
      uint2* fragments = reinterpret_cast<uint2*>(shared + C::FRAGMENTS);
      for (int i = warp; i < TERMS * (D / 32) * 2 * NB; i += WARPS) {  // i = ((term, block), m, n)
        const int n = i % NB, m = i / NB % 2, block = i / (2 * NB);
        fragments[i * 32 + lane] = query_halves(block / (D / 32), block % (D / 32), m, n);
      }
      __syncthreads();
    }
  }

  // Column r of operand m: the high (r even) or low bytes of row 4m + r / 2.
  __device__ __forceinline__ uint2 query_bytes(int block, int m, int n) const {
    const char* row = shared + C::QUERIES + ((8 * n + 4 * m + r / 2) * 2 + r % 2) * C::QUERY_PITCH;
    return *reinterpret_cast<const uint2*>(row + 32 * block + 8 * t);
  }

  __device__ __forceinline__ uint2 query_halves(int term, int block, int m, int n) const {
    const unsigned short* row =
        reinterpret_cast<const unsigned short*>(shared + C::QUERIES) + (term * ROWS + column_row(n)) * C::QUERY_PITCH;
    auto pair = [&](int p) {
      return row[key_dim<K>(block, t, p, 0)] | static_cast<u32>(row[key_dim<K>(block, t, p, 1)]) << 16;
    };
    return {pair(2 * m), pair(2 * m + 1)};
  }

  // `block` counts within the warp's share.
  __device__ __forceinline__ uint2 query_operand(int term, int block, int m, int n) const {
    if constexpr (C::QUERIES_IN_REGISTERS) {
      return {query[term][block][m][n][0], query[term][block][m][n][1]};
    } else if constexpr (C::KEY_BYTES) {
      return query_bytes(member * (D / TEAM / 32) + block, m, n);
    } else {
      const uint2* fragments = reinterpret_cast<const uint2*>(shared + C::FRAGMENTS);
      return fragments[(((term * (D / 32) + member * (D / TEAM / 32) + block) * 2 + m) * NB + n) * 32 + lane];
    }
  }

  // A tile: its parts of 16 keys share one look at the running maxima.
  __device__ __forceinline__ void attend(u32 stage, int first) {
    float s[PARTS][NB][2 * LR];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      score(s[i], stage, i);
      if constexpr (!C::LATE_FACTORS) to_logits(s[i]);
      if constexpr (C::ROPE > 0) add_rope(s[i], stage + C::ROPE_KEYS + 16 * i * C::RopeTile::PITCH);
    }
    if constexpr (TEAM > 1) add_up(s);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) mask(s[i], first + 16 * i);
    ValueScales scales[2 * PARTS];  // of the keys r + 8i
#pragma unroll
    for (int i = 0; i < 2 * PARTS; ++i)
      scales[i] = ValueScales(stage + VALUE_SCALES_AT, scale_row + 8 * i, first_value_group());
    float factors[NB][LR];
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j)
        factors[n][j] = C::LATE_FACTORS ? floats(C::ROW_FACTORS)[row_of(n, j)] : 1.0f;
    renormalize(s, factors, scales);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int x = 0; x < 2 * LR; ++x) {
          s[i][n][x] = exp2_fast(fmaf(s[i][n][x], factors[n][x % LR], -base[n][x % LR]));
          sum[n][x % LR] += s[i][n][x];
        }
      add_values(s[i], scales[2 * i], scales[2 * i + 1], stage, i);
    }
  }

  // The scales of a row that a warp needs; with scaled codes it picks them from the whole row.
  using KeyScales = ScaleRow<K::groups(D), K::SCALED_CODES ? K::groups(D) : KEY_GROUPS, typename K::Scale>;
  using ValueScales = ScaleRow<V::groups(DV), V::SCALED_CODES ? V::groups(DV) : VALUE_GROUPS, typename V::Scale>;
  __device__ __forceinline__ int first_key_group() const { return K::SCALED_CODES ? 0 : member * KEY_GROUPS; }
  __device__ __forceinline__ int first_value_group() const { return V::SCALED_CODES ? 0 : member * VALUE_GROUPS; }

  // Scores of 16 keys (the part that the warp's dimensions make) in units of the scaled queries: s[n][x] is that of
  // key r + x / LR * 8 and row_of(n, x % LR).
  __device__ __forceinline__ void score(float (&s)[NB][2 * LR], u32 stage, int part) const {
    const int key = 16 * part + scale_row;
    const int first = first_key_group();
    const u32 scales = stage + C::KEY_SCALES;
    const KeyScales low_scale(scales, key, first), high_scale(scales, key + 8, first);
    const u32 biases = stage + (K::HAS_BIAS ? C::KEY_BIASES : C::KEY_SCALES);
    const KeyScales low_bias(biases, key, first), high_bias(biases, key + 8, first);
    if constexpr (C::BIAS_OPERANDS) multiply_biases(s, biases, key);
    const u32 codes = stage + 16 * part * C::KeyTile::PITCH;
    KeyWords words;
#pragma unroll
    for (int g = 0; g < KEY_GROUPS; ++g) {
      float c[NB][2 * LR];
      if constexpr (C::KEY_BYTES) {
        multiply_bytes(c, words, codes, g);
      } else {
        multiply_halves(c, words, codes, g, low_scale, high_scale);
      }
      float scale[2] = {1.0f, 1.0f}, bias[2] = {};
      if constexpr (!K::SCALED_CODES) {
        constexpr float factor = (C::KEY_BYTES ? 1.0f : K::CODE_FACTOR) / SCORE_UNIT;
        scale[0] = scale_value(low_scale[g]) * factor;
        scale[1] = scale_value(high_scale[g]) * factor;
      }
      if constexpr (K::HAS_BIAS) bias[0] = scale_value(low_bias[g]), bias[1] = scale_value(high_bias[g]);
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int x = 0; x < 2 * LR; ++x) {
          float y = g == 0 && !C::BIAS_OPERANDS ? 0.0f : s[n][x];
          if constexpr (K::HAS_BIAS && !C::BIAS_OPERANDS) {
            y = fmaf(bias[x / LR], query_sum(first + g, n, x % LR), y);
          } else if constexpr (C::HAS_SUMS && !K::HAS_BIAS) {
            c[n][x] = fmaf(static_cast<float>(-K::BYTE_CENTER), query_sum(first + g, n, x % LR), c[n][x]);
          }
          s[n][x] = fmaf(scale[x / LR], c[n][x], y);
        }
    }
  }

  // Scores begin with what the biases of the keys `key` and key + 8 add to them.
  __device__ __forceinline__ void multiply_biases(float (&s)[NB][2 * LR], u32 biases, int key) const {
    constexpr int W = C::BIAS_WORDS;
    const u32 place = biases + (key * W + t % W) * 4;
    const u32 low = load_word(place), high = load_word(place + 8 * W * 4);
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      float c[4] = {};
      mma<BF16_SCALES>(c, low, high, W == 4 ? low : 0, W == 4 ? high : 0, query_sums[n][0], query_sums[n][1]);
#pragma unroll
      for (int x = 0; x < 4; ++x) s[n][x] = c[x];
    }
  }

  __device__ __forceinline__ float query_sum(int group, int n, int j) const {
    return floats(C::QUERY_SUMS)[group * ROWS + row_of(n, j)];
  }

  // Products of a group's codes of 16 keys, as bytes, with the queries.
  template <typename Words>
  __device__ __forceinline__ void multiply_bytes(float (&s)[NB][2 * LR], Words& words, u32 codes, int group) const {
    int c[NB][LR][4] = {};
#pragma unroll
    for (int i = 0; i < KEY_BLOCKS; ++i) {
      const int block = group * KEY_BLOCKS + i;
      u32 bytes[4];
      load_key_bytes<K, C::KeyTile::PITCH>(bytes, words, codes, key_place, block, lane);
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int j = 0; j < LR; ++j) {
          const uint2 q = query_operand(0, block, j, n);
          mma_bytes<K::SIGNED_BYTES>(c[n][j], bytes, q.x, q.y);
        }
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 2 * LR; ++x) {
        const int(&y)[4] = c[n][x % LR];
        s[n][x] = static_cast<float>(y[x / LR * 2] * 256 + y[x / LR * 2 + 1]);
      }
  }

  // The same with codes as halves.
  template <typename Words>
  __device__ __forceinline__ void multiply_halves(float (&s)[NB][2 * LR], Words& words, u32 codes, int group,
                                                  const KeyScales& low_scale, const KeyScales& high_scale) const {
    float c[NB][4] = {};
#pragma unroll
    for (int i = 0; i < KEY_BLOCKS; ++i) {
      const int block = group * KEY_BLOCKS + i;
      u32 low[4], high[4];
      load_keys<K, C::KeyTile::PITCH>(low, high, words, codes, key_place, block, lane);
      if constexpr (K::SCALED_CODES) {
        const int scale = 2 * (member * (D / TEAM / 32) + block) + t / 2;
        const u32 x = e4m3_pair(low_scale[scale], low_scale[scale]);
        const u32 y = e4m3_pair(high_scale[scale], high_scale[scale]);
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
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 2 * LR; ++x) s[n][x] = c[n][x / LR * 2 + x % LR];
  }

  // To base-2 logits, by the rows' factors.
  __device__ __forceinline__ void to_logits(float (&s)[NB][2 * LR]) const {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) {
        const float factor = floats(C::ROW_FACTORS)[row_of(n, j)];
        s[n][j] *= factor, s[n][LR + j] *= factor;
      }
  }

  // The sums over the team, in the same order in each warp: all must come to the same maxima.
  __device__ __forceinline__ void add_up(float (&s)[PARTS][NB][2 * LR]) const {
    float* shares = floats(C::EXCHANGE) + (team * TEAM * PARTS * NB * 32 + lane) * (2 * LR);
#pragma unroll
    for (int i = 0; i < PARTS * NB; ++i)
#pragma unroll
      for (int x = 0; x < 2 * LR; x += 2)
        *reinterpret_cast<float2*>(shares + (member * PARTS * NB + i) * 64 * LR + x) = {s[i / NB][i % NB][x],
                                                                                       s[i / NB][i % NB][x + 1]};
    team_barrier();  // the next tile's barrier keeps the shares until all have read them
#pragma unroll
    for (int i = 0; i < PARTS * NB; ++i)
#pragma unroll
      for (int x = 0; x < 2 * LR; x += 2) {
        float2 total = {};
#pragma unroll
        for (int k = 0; k < TEAM; ++k) {
          const float2 y = *reinterpret_cast<const float2*>(shares + (k * PARTS * NB + i) * 64 * LR + x);
          total.x += y.x, total.y += y.y;
        }
        s[i / NB][i % NB][x] = total.x, s[i / NB][i % NB][x + 1] = total.y;
      }
  }

  // The mask, and the end of the keys.
  __device__ __forceinline__ void mask(float (&s)[NB][2 * LR], int first) const {
    if constexpr (C::MASK == BOOLEAN || C::MASK == ADDITIVE) {
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int x = 0; x < 2 * LR; ++x) {
          const int2 at = head_and_position(row_of(n, x % LR));
          const int key = min(first + r + x / LR * 8, count - 1);
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
        for (int x = 0; x < 2 * LR; ++x) {
          const int seen = C::MASK == CAUSAL ? last + head_and_position(row_of(n, x % LR)).y : last;
          if (first + r + x / LR * 8 > seen) s[n][x] = minus_infinity();
        }
    }
  }

  __device__ __forceinline__ void add_rope(float (&s)[NB][2 * LR], u32 keys) const {
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
          const u32* row = reinterpret_cast<const u32*>(queries + column_row(n) * C::ROPE_PITCH + k) + t;
          mma<C::BF16>(c[n], w[0], w[1], w[2], w[3], row[0], row[4]);
        }
      }
    } else {
      const float* tile = static_cast<const float*>(__cvta_shared_to_generic(keys));
      for (int k = begin; k < begin + SHARE; ++k)
#pragma unroll
        for (int n = 0; n < NB; ++n)
#pragma unroll
          for (int x = 0; x < 2 * LR; ++x) {
            float& y = c[n][x / LR * 2 + x % LR];
            y = fmaf(tile[(r + x / LR * 8) * (C::RopeTile::PITCH / 4) + k],
                     to_float(queries[row_of(n, x % LR) * C::ROPE_PITCH + k]), y);
          }
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 2 * LR; ++x) s[n][x] = fmaf(c[n][x / LR * 2 + x % LR], LOG2E, s[n][x]);
  }

  // Raise the running maxima, or lower the factor on value scales, where this tile asks for it.
  __device__ __forceinline__ void renormalize(const float (&s)[PARTS][NB][2 * LR], const float (&factors)[NB][LR],
                                              const ValueScales (&scales)[2 * PARTS]) {
    float peak[NB][LR];
    bool rise = false;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) {
        peak[n][j] = fmaxf(s[0][n][j], s[0][n][LR + j]);
#pragma unroll
        for (int i = 1; i < PARTS; ++i) peak[n][j] = fmaxf(peak[n][j], fmaxf(s[i][n][j], s[i][n][LR + j]));
        peak[n][j] *= factors[n][j];
        rise |= peak[n][j] > top[n][j] + RISE;
      }
    float largest = V::SCALED_CODES ? 1.0f : largest_scale(scales);
    if (!__any_sync(~0u, rise || largest > value_limit)) return;

    const bool raise = __any_sync(~0u, rise);  // alike in all warps of a team, as scales are not
    largest = warp_max(largest);
    if (largest > value_limit) {
      const int exponent = min(max(127 + SCALE_EXPONENT - static_cast<int>(__float_as_uint(largest) >> 23), -100), 100);
      value_exponent = static_cast<float>(exponent);
      value_limit = V::SCALED_CODES ? 1.0f : __uint_as_float(static_cast<u32>(127 + LIMIT_EXPONENT - exponent) << 23);
    }
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) peak[n][j] = fmaxf(peak[n][j], __shfl_xor_sync(~0u, peak[n][j], d));
        if (raise) top[n][j] = fmaxf(peak[n][j], top[n][j]);
        const float lower = top[n][j] - value_exponent, f = exp2_fast(base[n][j] - lower);
        base[n][j] = lower;
        sum[n][j] *= f;
        if constexpr (V::HAS_BIAS) {
#pragma unroll
          for (int g = 0; g < VALUE_GROUPS; ++g) bias_sum[g][n][j] *= f;
        }
#pragma unroll
        for (int i = 0; i < DV / TEAM / 16; ++i) {
          const int column = value_column(i / 2, j);
          o[i / 2][i % 2][n][column] *= f;
          o[i / 2][i % 2][n][column + 2] *= f;
        }
      }
  }

  // The largest magnitude of a lane's value scales.
  __device__ __forceinline__ static float largest_scale(const ValueScales (&scales)[2 * PARTS]) {
    if constexpr (ValueScales::HELD) {
      u32 pair = 0;
#pragma unroll
      for (int i = 0; i < 2 * PARTS * ValueScales::WORDS; ++i)
        pair = max_magnitudes<typename V::Scale>(pair, scales[i / ValueScales::WORDS].words[i % ValueScales::WORDS]);
      return fmaxf(scale_value(ValueScales::from_bits(pair & 0xffff)), scale_value(ValueScales::from_bits(pair >> 16)));
    } else {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * PARTS; ++i)
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS; ++g) largest = fmaxf(largest, fabsf(scale_value(scales[i][g])));
      return largest;
    }
  }

  // Where the accumulators of a block of dimensions have row number j of a lane: at this index, and two further on.
  __device__ __forceinline__ static constexpr int value_column(int block, int j) {
    return LR == 1 ? block / VALUE_BLOCKS % 2 : j;
  }

  // o += codes(V)^T * (p * scale); p[n][x] as in score(). The scales are those of the keys r and r + 8.
  __device__ __forceinline__ void add_values(const float (&p)[NB][2 * LR], const ValueScales& low_scale,
                                             const ValueScales& high_scale, u32 stage, int part) {
    const int key = 16 * part + scale_row;
    const u32 codes = stage + VALUES_AT + 16 * part * C::ValueTile::PITCH;
    const int first = first_value_group();
    const u32 biases = stage + (V::HAS_BIAS ? VALUE_BIASES_AT : VALUE_SCALES_AT);
    const ValueScales low_bias(biases, key, first), high_bias(biases, key + 8, first);
    ValueWords words;
    constexpr int TOGETHER = 3 - LR;  // groups whose probabilities share an operand
    auto scale = [&](int g, int half) {
      if constexpr (V::SCALED_CODES) return 1.0f;
      return scale_value((half ? high_scale : low_scale)[g]);
    };
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; g += TOGETHER) {
      if constexpr (V::HAS_BIAS) {
#pragma unroll
        for (int k = g; k < g + TOGETHER && k < VALUE_GROUPS; ++k) {
          const float bias[2] = {scale_value(low_bias[k]), scale_value(high_bias[k])};
#pragma unroll
          for (int n = 0; n < NB; ++n)
#pragma unroll
            for (int x = 0; x < 2 * LR; ++x)
              bias_sum[k][n][x % LR] = fmaf(bias[x / LR], p[n][x], bias_sum[k][n][x % LR]);
        }
      }
      u32 operand[TERMS][NB][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float low = scale(g, h), high = LR == 2 ? low : g + 1 < VALUE_GROUPS ? scale(g + 1, h) : 0.0f;
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          float x = p[n][LR * h] * low, y = p[n][LR * h + LR - 1] * high;
#pragma unroll
          for (int term = 0; term < TERMS; ++term) {
            const u32 packed = pack_half2(x, y);
            operand[term][n][h] = transpose_matrix(packed);
            if constexpr (TERMS == 2) x -= low_half(packed), y -= high_half(packed);
          }
        }
      }
#pragma unroll
      for (int block = g * VALUE_BLOCKS; block < (g + TOGETHER) * VALUE_BLOCKS && block < DV / TEAM / 32; ++block) {
        u32 low[4], high[4];
        load_values<V, C::ValueTile::PITCH, C::RAW_VALUES>(low, high, words, codes, value_place, block, lane);
        if constexpr (V::SCALED_CODES) scale_values(low, high, stage + VALUE_SCALES_AT, block, part);
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
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int j = 0; j < LR; ++j) {
        // Warps of a team go by their own value scales.
        const float unit = TEAM > 1 ? exp2_fast(base[n][j] - top[n][j]) : 1.0f;
        if (TEAM > 1) base[n][j] = top[n][j];
        sum[n][j] = quad_rows_sum(sum[n][j]) * unit;
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS; ++g) {
          float bias = 0.0f;
          if constexpr (V::HAS_BIAS) bias = quad_rows_sum(bias_sum[g][n][j]) * unit;
#pragma unroll
          for (int i = 0; i < 2 * VALUE_BLOCKS; ++i) {
            const int block = g * VALUE_BLOCKS + i / 2, column = value_column(block, j);
            float(&c)[4] = o[block][i % 2][n];
            c[column] = fmaf(c[column], V::value_factor(i % 2 * 2, C::RAW_VALUES) * unit, bias);
            c[column + 2] = fmaf(c[column + 2], V::value_factor(i % 2 * 2 + 1, C::RAW_VALUES) * unit, bias);
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
        for (int j = 0; j < LR; ++j) team_stats[team * ROWS + row_of(n, j)] = {base[n][j], sum[n][j]};
    }
    __syncthreads();  // every ring is idle from here on
    float* out = floats(0) + team * ROWS * C::OUT_PITCH + member * (DV / TEAM);
#pragma unroll
    for (int block = 0; block < DV / TEAM / 32; ++block)
#pragma unroll
      for (int n = 0; n < NB; ++n)
#pragma unroll
        for (int j = 0; j < LR; ++j) {
          float* row = out + row_of(n, j) * C::OUT_PITCH;
          const int h = value_column(block, j);
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
        if (d == 0) *reinterpret_cast<float2*>(stats + (place + row) * 2) = {peak, total};
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
    constexpr int BATCH = 2 * MERGED;  // loads under way at once
    float2* merged = reinterpret_cast<float2*>(shared + C::TEAM_STATS);
    for (int i = threadIdx.x; i < ROWS * DV / 4; i += WARPS * 32) {
      const int row = i / (DV / 4), d = i % (DV / 4) * 4;
      float* source = a.partials + (place * ROWS + row) * DV + d;
      float* source_stats = stats + (place * ROWS + row) * 2;
      float peak = LOWEST, total = 0.0f;
      float4 x = {};
      for (int first = 0; first < n; first += BATCH) {
        float2 stat[BATCH];
        float4 y[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
          stat[k] = {LOWEST, 0.0f};
          if (first + k < n) stat[k] = load_fresh2(source_stats + (first + k) * step * (ROWS * 2));
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
          y[k] = {};
          if (first + k < n) y[k] = load_fresh4(source + (first + k) * step * (ROWS * DV));
        }
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
      if (final) {
        add_sink(row, peak, total, x);
        store(row, d, x, total);
      } else {
        *reinterpret_cast<float4*>(source) = x;
        if (d == 0) merged[row] = {peak, total};
      }
    }
    if (final) return;
    __syncthreads();  // all have read the first split's
    if (threadIdx.x < ROWS) *reinterpret_cast<float2*>(stats + (place * ROWS + threadIdx.x) * 2) = merged[threadIdx.x];
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
