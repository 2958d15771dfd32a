// What a decode kernel is specialized on, where its shared memory holds what, and the operands of a call.
//
// What follows from the template arguments is computed here once, so that the parts of the kernel agree on it. The
// launch plan (plan.py) makes the same sum of shared memory, and the text of a kernel checks one against the other.
#pragma once
#include "formats.cuh"
#include "operands.cuh"
#include "tiles.cuh"

namespace qsdpa {

template <typename T_, int D_, int DV_, typename K_, typename V_, int ROWS_, int MASK_, typename MaskT_,
          typename SinkT_, int ROPE_, bool SHARED_KV_, int WARPS_, int STAGES_, int PARTS_, int TEAM_>
struct DecodeConfig {
  using T = T_;
  using K = K_;
  using V = V_;
  using MaskT = MaskT_;
  using SinkT = SinkT_;
  static constexpr int D = D_, DV = DV_, ROWS = ROWS_, MASK = MASK_, ROPE = ROPE_, WARPS = WARPS_, STAGES = STAGES_,
                       PARTS = PARTS_, TEAM = TEAM_;
  static constexpr bool SHARED_KV = SHARED_KV_;
  static constexpr int ROW_BLOCKS = ROWS / 8 + (ROWS == 4), LANE_ROWS = ROWS == 4 ? 1 : 2;
  static_assert(ROWS == 4 || ROWS % 8 == 0, "a block of columns is one half or two halves of four rows");
  static constexpr int TILE = 16 * PARTS;  // keys
  static constexpr int TEAMS = WARPS / TEAM, TEAM_THREADS = 32 * TEAM;
  static constexpr int KEY_SHARE = D / TEAM / 32, VALUE_SHARE = DV / TEAM / 32;  // of a warp: blocks of 32 dimensions
  static_assert(D % (32 * TEAM) == 0 && DV % (32 * TEAM) == 0, "warps of a team share the dimensions evenly");
  static_assert(K::SCALED_CODES || K::groups(D) % TEAM == 0, "and the groups of keys");
  static_assert(V::SCALED_CODES || V::groups(DV) % TEAM == 0, "and the groups of values");
  static constexpr int TERMS = sizeof(T) == 4 ? 2 : 1;  // halves that a query or a probability is made of
  static constexpr bool KEY_BYTES = TERMS == 1 && K::HAS_BYTES, RAW_VALUES = TERMS == 1 && V::HAS_RAW_VALUES;
  // nvfp4's groups are half a block of dimensions. With at most four rows, odd columns are idle: they take a block's
  // second group, and its scales stay out of the codes.
  static constexpr bool KEY_GROUPS_APART = K::SCALED_CODES && LANE_ROWS == 1 && TERMS == 1;
  static constexpr bool VALUE_GROUPS_APART = V::SCALED_CODES && LANE_ROWS == 1 && TERMS == 1;
  static constexpr bool QUERIES_IN_REGISTERS = D / TEAM * ROW_BLOCKS * TERMS <= 256;
  // Warps that stay where keys are few. They have the query rows, and make operands of queries for nobody else.
  static constexpr int FEW_WARPS = !QUERIES_IN_REGISTERS && !KEY_BYTES ? WARPS
                                   : ROWS >= WARPS                     ? WARPS
                                   : ROWS >= WARPS / 4                 ? ROWS
                                                                       : WARPS / 4;
  static constexpr bool BF16 = IsBfloat16<T>::value;
  // Where logits are the scores times a factor and nothing else, the factor waits for the exponential.
  static constexpr bool LATE_FACTORS = ROPE == 0 && TEAM == 1 && (MASK == NO_MASK || MASK == CAUSAL);
  // Biases of keys as an operand: pairs of groups are words, and 16 columns hold up to 8 groups twice, since the sums
  // of queries that they are multiplied by are two halves each.
  static constexpr int BIAS_WORDS = K::groups(D) / 2;
  static constexpr bool BIAS_OPERANDS = K::HAS_BIAS && sizeof(typename K::Scale) == 2 && LANE_ROWS == 2 && ROPE == 0 &&
                                        TEAM == 1 && (K::groups(D) == 2 || K::groups(D) == 4 || K::groups(D) == 8);
  // Of scores: keeps sums of queries in range, or is what nvfp4's scales are larger by in the codes (e4m3_pair()).
  static constexpr float SCORE_UNIT = BIAS_OPERANDS ? K::GROUP : KEY_GROUPS_APART ? 64.0f : 1.0f;

  using KeyTile = RowTile<TILE, TEAM_THREADS, K::row_bytes(D), u32, K::MATRICES>;
  using ValueTile = RowTile<TILE, TEAM_THREADS, V::row_bytes(DV), u32, V::MATRICES>;
  using KeyScaleTile = ScaleTile<TILE, TEAM_THREADS, K::groups(D), typename K::Scale>;
  using ValueScaleTile = ScaleTile<TILE, TEAM_THREADS, V::groups(DV), typename V::Scale>;
  using RopeTile = RowTile<TILE, TEAM_THREADS, ROPE * static_cast<int>(sizeof(T)), T, false>;
  using KeyWords = CodeWords<K, KeyTile, KEY_SHARE, false>;
  using ValueWords = CodeWords<V, ValueTile, VALUE_SHARE, true>;

  // What a lane holds of the scores of 16 keys: [n][x] is of key DecodeLane::score_key(x) and of row score_row(n, x).
  using Scores = float[ROW_BLOCKS][2 * LANE_ROWS];
  using RowFloats = float[ROW_BLOCKS][LANE_ROWS];  // a number for each of its rows

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

  // Where a half of a query row goes, and by what it is multiplied.
  __device__ __forceinline__ static int query_place(int row, int dim) {
    return QUERIES + (row * QUERY_PITCH + dim) * 2;
  }
  __device__ __forceinline__ static float query_gain(int) { return 1.0f; }
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
  i64 sink_stride;
  View<T> rope_queries, rope_keys;
  const float* scale;
  u32* tickets;
  T* out;
  float* partials;  // [tile, split, row, DV], and after them the running maximum and sum: [tile, split, row, 2]
  u32 blocks_at_once;  // that the device has room for
};

// The shared memory of a block, by the offsets of DecodeConfig.
struct SharedMemory {
  char* begin;

  template <typename X>
  __device__ __forceinline__ X* as(int offset) const {
    return reinterpret_cast<X*>(begin + offset);
  }
};

}  // namespace qsdpa
