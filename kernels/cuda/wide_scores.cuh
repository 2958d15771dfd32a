// Scores of 64 keys: products of the codes of keys, raw and in registers, with the queries. The sums of each group of
// dimensions are multiplied by the key's scale; the biases of keys are an operand of their own, which the scores begin
// with.
#pragma once
#include "wide_config.cuh"

namespace qsdpa {

template <typename C>
class WideScores {
  using K = typename C::K;
  using Scores = typename C::Scores;
  static constexpr int NB = C::ROW_BLOCKS, GROUPS = C::KEY_GROUPS;
  static constexpr int STEPS = C::D / GROUPS / 16;  // products of a group
  using Words = CodeWords<K, typename C::KeyTile, C::D / 32, false>;
  using Scales = ScaleRow<GROUPS, GROUPS, typename K::Scale>;
  using Operands = u32[STEPS][4];

  const WideLane<C> place;
  const u32 queries, sums;  // shared addresses
  u32 codes;                // from the stage's on

 public:
  __device__ __forceinline__ WideScores(const WideLane<C>& place, u32 shared)
      : place(place),
        queries(shared + C::QUERY_TILE),
        sums(shared + C::QUERY_SUM_TILE),
        codes(16 * place.warp * C::KeyTile::PITCH + Words::place_of(place.lane, 0)) {
    keep(codes);
  }

  // Of the tile at this shared address. Groups follow each other, as many at once as registers hold.
  __device__ __forceinline__ void multiply(Scores& s, u32 stage) const {
    constexpr int AT_ONCE = C::TWO_KEY_GROUPS && GROUPS > 1 ? 2 : 1;
    Words words;
    Operands operands[2];
    float c[AT_ONCE][NB][4];
    unpack(operands[0], words, stage, 0);
    begin_products();
    multiply_biases(s, stage);
    multiply_group(c[0], operands[0], 0);
    const Scales low(stage + C::KEY_SCALES, place.key(), 0), high(stage + C::KEY_SCALES, place.key() + 8, 0);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      Operands& next = operands[(g + 1) % 2];
      auto begin_next = [&] {
        begin_products();
        multiply_group(c[(g + 1) % AT_ONCE], next, g + 1);
      };
      if (g + 1 < GROUPS) unpack(next, words, stage, g + 1);
      if (AT_ONCE == 2 && g + 1 < GROUPS) {
        begin_next();
        wait_products<1>();
      } else {
        wait_products<0>();
      }
      float(&sums)[NB][4] = c[g % AT_ONCE];
      pin(sums);
      if (g == 0) pin(s);
      add_scaled(s, sums, scale_value(low[g]), scale_value(high[g]));
      if (AT_ONCE == 1 && g + 1 < GROUPS) begin_next();
    }
  }

 private:
  __device__ __forceinline__ void unpack(Operands& operands, Words& words, u32 stage, int group) const {
#pragma unroll
    for (int i = 0; i < STEPS / 2; ++i) {
      u32 low[4], high[4];
      load_raw_keys<K>(low, high, words, stage, codes, group * (STEPS / 2) + i);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        u32(&x)[4] = operands[2 * i + m];
        x[0] = low[2 * m], x[1] = high[2 * m], x[2] = low[2 * m + 1], x[3] = high[2 * m + 1];
      }
    }
  }

  __device__ __forceinline__ void multiply_group(float (&c)[NB][4], const Operands& operands, int group) const {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int k = group * STEPS + i;
      const u64 q = rows_descriptor(queries + k / 4 * C::QUERY_PANEL) + k % 4 * 2;
      multiply_left<false, false>(c, operands[i], q, i > 0);
    }
    commit_products();
  }

  // Biases times sums of queries: twice, since sums are two numbers each. Without biases codes are off their center, by
  // a number of scales.
  __device__ __forceinline__ void multiply_biases(Scores& s, u32 stage) const {
    const u32 biases = stage + (K::HAS_BIAS ? C::KEY_BIASES : C::KEY_SCALES);
    const u32 operand[4] = {bias_word(biases, place.key()), bias_word(biases, place.key() + 8), 0, 0};
    multiply_left<C::BF16_SCALES, false>(s, operand, rows_descriptor(sums), 0);
  }

  // Places 2t and 2t + 1 of a key's row of the operand: its biases in turn.
  __device__ __forceinline__ u32 bias_word(u32 biases, int key) const {
    if constexpr (GROUPS == 1) {
      return raw_bits(Scales(biases, key, 0)[0]) * 0x10001u;
    } else {
      return load_word(biases + (key * (GROUPS / 2) + place.t % (GROUPS / 2)) * 4);
    }
  }

  __device__ __forceinline__ static void add_scaled(Scores& s, const float (&c)[NB][4], float low, float high) {
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int x = 0; x < 4; ++x) s[n][x] = fmaf(x < 2 ? low : high, c[n][x], s[n][x]);
  }
};

}  // namespace qsdpa
