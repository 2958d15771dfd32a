// What a kernel of wide.cuh is specialized on, and where its shared memory holds what. It serves the parts shared with
// decode.cuh (decode_work.cuh, decode_copies.cuh, decode_queries.cuh, decode_merge.cuh) in the place of DecodeConfig.
//
// The launch plan (wide_plan.py) makes the same sum of shared memory, and the text of a kernel checks one against the
// other.
#pragma once
#include "decode_config.cuh"
#include "unpack.cuh"

namespace qsdpa {

template <typename T_, int D_, int DV_, typename K_, typename V_, int ROWS_, int MASK_, typename MaskT_,
          typename SinkT_, int TEAMS_, int STAGES_>
struct WideConfig {
  using T = T_;
  using K = K_;
  using V = V_;
  using MaskT = MaskT_;
  using SinkT = SinkT_;
  static constexpr int D = D_, DV = DV_, ROWS = ROWS_, MASK = MASK_, TEAMS = TEAMS_, STAGES = STAGES_;
  static constexpr int ROW_BLOCKS = ROWS / 8;
  static constexpr int TILE = TILE_ROWS;  // keys
  static constexpr int TEAM = 4, TEAM_THREADS = 128, WARPS = TEAM * TEAMS, FEW_WARPS = WARPS;
  static constexpr int KEY_GROUPS = K::groups(D), VALUE_GROUPS = V::groups(DV);
  static constexpr int VALUE_BLOCKS = DV / 64;  // a product has 64 dimensions of values
  static_assert(ROWS == 16 || ROWS == 32, "right operands of these widths");
  static_assert(STAGES >= 3, "a tile is used, one arrives, and one is fetched");
  static_assert(K::HAS_RAW_KEYS && V::HAS_RAW_KEYS, "codes that are integers within words");
  static_assert(KEY_GROUPS == 1 || KEY_GROUPS == 2 || KEY_GROUPS == 4, "biases of keys are one operand");
  static_assert(DV % 64 == 0 && V::GROUP % 64 == 0, "the dimensions of a product are of one group");
  static_assert(VALUE_GROUPS < 8, "a row of the operand of biases is left for ones");

  // What the shared parts ask for.
  static constexpr int TERMS = 1, ROPE = 0;
  static constexpr bool SHARED_KV = false, KEY_BYTES = false, HAS_SUMS = true;
  // Queries as operands are this larger than their halves, which are below 2^10. Raw codes are integers times 2^-24:
  // in this unit, scores are sums of products times the scales of keys, with nothing left to be applied.
  static constexpr float QUERY_GAIN = 32.0f * (1 << raw_key_bit<K>(0)), SCORE_UNIT = 16777216.0f / QUERY_GAIN;
  static constexpr bool BF16_SCALES = IsBfloat16<typename K::Scale>::value;
  static constexpr bool BF16_VALUE_SCALES = IsBfloat16<typename V::Scale>::value;
  // Operands of values are unpacked before the barrier that the products wait for, where registers hold them so long.
  static constexpr bool EARLY_VALUES = TEAMS < 4 || ROWS == 16;
  static constexpr bool TWO_KEY_GROUPS = TEAMS < 4;  // products of two groups of keys at once, likewise

  using KeyTile = RowTile<TILE, TEAM_THREADS, K::row_bytes(D), u32, K::MATRICES>;
  using ValueTile = RowTile<TILE, TEAM_THREADS, V::row_bytes(DV), u32, V::MATRICES>;
  using KeyScaleTile = ScaleTile<TILE, TEAM_THREADS, K::groups(D), typename K::Scale>;
  using ValueScaleTile = ScaleTile<TILE, TEAM_THREADS, V::groups(DV), typename V::Scale>;
  using RopeTile = RowTile<TILE, TEAM_THREADS, 0, T, false>;

  // What a lane holds of the scores of 64 keys: [n][x] is of key WideLane::score_key(x) and of row score_row(n, x).
  using Scores = float[ROW_BLOCKS][4];
  using RowFloats = float[ROW_BLOCKS][2];  // a number for each of its rows
  using Weights = u32[ROW_BLOCKS][2];      // probabilities, as halves: of both rows of a block, for each of its keys

  // Shared memory, in bytes, from a multiple of 1024 on.
  static constexpr int WEIGHT_TILE = panels(VALUE_GROUPS * ROWS) * PANEL_BYTES;
  static constexpr int QUERY_PANEL = ROWS * 128;
  static constexpr int QUERY_TILE = 2 * TEAMS * WEIGHT_TILE;
  static constexpr int QUERY_SUM_TILE = QUERY_TILE + panels(D) * QUERY_PANEL;
  static constexpr int RINGS = QUERY_SUM_TILE + QUERY_PANEL;

  static constexpr int VALUES = KeyTile::BYTES;  // of a stage
  static constexpr int KEY_SCALES = VALUES + ValueTile::BYTES;
  static constexpr int KEY_BIASES = KEY_SCALES + KeyScaleTile::BYTES;
  static constexpr int VALUE_SCALES = KEY_BIASES + (K::HAS_BIAS ? KeyScaleTile::BYTES : 0);
  static constexpr int VALUE_BIASES = VALUE_SCALES + ValueScaleTile::BYTES;
  static constexpr int ROPE_KEYS = VALUE_BIASES + (V::HAS_BIAS ? ValueScaleTile::BYTES : 0);
  static constexpr int STAGE = (ROPE_KEYS + 127) / 128 * 128;
  static constexpr int RINGS_END = RINGS + TEAMS * STAGES * STAGE;

  static constexpr int OUT_PITCH = DV + 4;
  static constexpr int TOTALS = TEAMS * ROWS * OUT_PITCH * 4;  // after the output, over everything once it is idle
  static constexpr int TOTAL_SETS = VALUE_GROUPS + 1;          // biases times probabilities, and probabilities
  static constexpr int TOTALS_END = TOTALS + WARPS * TOTAL_SETS * ROWS * 4;

  static constexpr int QUERY_SUMS = RINGS_END > TOTALS_END ? RINGS_END : TOTALS_END;
  static constexpr int ROW_FACTORS = QUERY_SUMS + KEY_GROUPS * ROWS * 4;
  static constexpr int TEAM_STATS = ROW_FACTORS + ROWS * 4;
  static constexpr int TEAM_ROWS = TEAM_STATS + TEAMS * ROWS * 8;
  static constexpr int PEAK_SET = ROWS + 4;  // of logits of a row, of scales and of biases of values
  static constexpr int PEAKS = TEAM_ROWS + TEAMS * ROWS * 8;
  static constexpr int ARGUMENTS = PEAKS + WARPS * PEAK_SET * 4;
  static constexpr int ARGUMENT_BYTES = 640;
  static constexpr int SHARED_BYTES = ARGUMENTS + ARGUMENT_BYTES;

  // Where a half of a query row goes, and by what it is multiplied: less by the bit at which its codes begin.
  __device__ __forceinline__ static int query_place(int row, int dim) {
    const int at = raw_key_place<K>(dim);
    return QUERY_TILE + at / 64 * QUERY_PANEL + swizzled(row, at % 64 / 8) + at % 8 * 2;
  }
  __device__ __forceinline__ static float query_gain(int dim) {
    return QUERY_GAIN / static_cast<float>(1 << raw_key_bit<K>(raw_key_pair<K>(dim)));
  }
};

// A thread's place in its block. A team is a warpgroup; that all lanes have the same lets addresses be uniform.
template <typename C>
struct WideLane {
  const int lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
  const int team = __shfl_sync(~0u, threadIdx.x / C::TEAM_THREADS, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x % C::TEAM_THREADS / 32, 0);  // of the team

  __device__ __forceinline__ int key() const { return 16 * warp + r; }
  __device__ __forceinline__ int row(int n, int y) const { return 8 * n + 2 * t + y; }
  // What score number x of a block's is of.
  __device__ __forceinline__ int score_key(int x) const { return key() + x / 2 * 8; }
  __device__ __forceinline__ int score_row(int n, int x) const { return row(n, x % 2); }
  __device__ __forceinline__ void team_barrier() const { group_barrier<C::TEAM_THREADS>(1 + team); }
  // Whether x holds for any thread of the team; they wait for each other.
  __device__ __forceinline__ bool team_any(bool x) const { return group_any<C::TEAM_THREADS>(1 + team, x); }
};

}  // namespace qsdpa
