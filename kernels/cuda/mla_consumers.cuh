// The two warpgroups that attend, for absorbed MLA. The left makes scores and probabilities of a tile, which both
// multiply with its values, each for its half of the output's columns.
#pragma once
#include "mla_block.cuh"
#include "mla_handover.cuh"
#include "mla_products.cuh"
#include "softmax.cuh"

namespace qsdpa {

template <typename C>
class MlaConsumers {
  using Products = MlaProducts<C>;
  using Scores = typename Products::Scores;
  using Weights = typename Products::Weights;
  using Output = typename Products::Output;
  static constexpr int D = C::D;
  static constexpr int FIRST_PART = D / 4;  // of the dimensions of scores: under way until the rest is

  const MlaBlock<C>& block;
  const Products products;
  const MlaHandover<C> handover;

 public:
  __device__ __forceinline__ explicit MlaConsumers(const MlaBlock<C>& block)
      : block(block), products{block.shared + C::QUERIES}, handover{block.shared, block.thread} {}

  __device__ __forceinline__ void left(float scale) const {
    // Scores are summed in units of the latent's products, so that the rope term is divided by the scale.
    const float unit = fabsf(scale) < 1e-30f ? 1e-30f : scale;
    const float to_logits = unit * LOG2E, rope_factor = 1.0f / unit;
    Output o = {};
    Scores s;
    Weights p;
    RunningSoftmax softmax;
    auto scale_rope = [&] {
      pin(s);
      multiply_by(s, rope_factor);
    };

    if (block.tiles > 0) {
      wait_phase(block.full(0), 0);
      begin_products();
      products.score_rope(s, block.tile_of(0));
      wait_products<0>();
      scale_rope();
      begin_products();
      products.template add_scores<0, D>(s, block.tile_of(0));
    }
    int stage = 0, phase = 0;
    for (int i = 0; i < block.tiles; ++i) {
      wait_products<0>();
      pin(s);
      float factor[2];
      multiply_by(s, to_logits);
      mask(s, block.first_key(i));
      softmax.apply(s, factor);
      pack_weights<C::BF16>(p, s);
      if (i > 0) group_barrier<C::CONSUMERS>(WEIGHTS_TAKEN);
      handover.give_weights(p);
      handover.give_factors(factor);
      group_arrive<C::CONSUMERS>(WEIGHTS_READY);
      rescale(o, factor);
      const u32 tile = block.tile_of(stage), used = stage;
      if (++stage == C::STAGES) stage = 0, phase ^= 1;
      if (i + 1 < block.tiles) {
        const u32 next = block.tile_of(stage);
        wait_phase(block.full(stage), phase);
        begin_products();
        products.score_rope(s, next);
        products.add_values(o, p, tile, 0);
        wait_products<1>();
        scale_rope();
        begin_products();
        products.template add_scores<0, FIRST_PART>(s, next);
        wait_products<1>();  // for the values, which the producers wait to be rid of
        release(used);
        products.template add_scores<FIRST_PART, D>(s, next);
      } else {
        begin_products();
        products.add_values(o, p, tile, 0);
        wait_products<0>();
      }
      pin(o);
    }
    float to_mean[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = softmax.total(h);
      if (block.lane % 4 == 0)
        *reinterpret_cast<float2*>(block.a.stats + (block.place() * C::ROWS + row(h)) * 2) = {softmax.top[h], total};
      to_mean[h] = total == 0.0f ? 0.0f : 1.0f / total;
    }
    if (block.tiles > 0) group_barrier<C::CONSUMERS>(WEIGHTS_TAKEN);
    handover.give_factors(to_mean);
    group_arrive<C::CONSUMERS>(WEIGHTS_READY);
    store(o, to_mean, 0);
  }

  __device__ __forceinline__ void right() const {
    Output o = {};
    Weights p;
    int stage = 0, phase = 0;
    for (int i = 0; i < block.tiles; ++i) {
      float factor[2];
      group_barrier<C::CONSUMERS>(WEIGHTS_READY);
      handover.take_weights(p);
      handover.take_factors(factor);
      group_arrive<C::CONSUMERS>(WEIGHTS_TAKEN);
      rescale(o, factor);
      wait_phase(block.full(stage), phase);
      begin_products();
      products.add_values(o, p, block.tile_of(stage), 1);
      wait_products<0>();
      pin(o);
      release(stage);
      if (++stage == C::STAGES) stage = 0, phase ^= 1;
    }
    float to_mean[2];
    group_barrier<C::CONSUMERS>(WEIGHTS_READY);
    handover.take_factors(to_mean);
    store(o, to_mean, 1);
  }

 private:
  // Of the two rows whose numbers a thread holds.
  __device__ __forceinline__ int row(int h) const { return 16 * block.warp + block.lane / 4 + 8 * h; }

  // The mask, and the end of the keys.
  __device__ __forceinline__ void mask(Scores& s, int first) const {
    const int count = block.count, length = block.length;
    const int last = C::MASK == CAUSAL ? count - length : count - 1;  // the last key that every row sees
    const bool ends = first + TILE_ROWS - 1 > last;
    mask_scores<C::MASK>(s, block.a.mask, block.batch, first, count, length, ends,
                         [&](int h) { return block.head_and_position(row(h)); });
  }

  __device__ __forceinline__ void release(int stage) const {
    if (block.lane == 0) arrive(block.empty(stage));
  }

  // The half `side` of the output, times factors on its rows.
  __device__ __forceinline__ void store(const Output& o, const float (&factor)[2], int side) const {
    uint2* target = reinterpret_cast<uint2*>(block.a.partials) + block.place() * (C::ROWS * D / 4) + side * C::GROUP +
                    block.thread;
#pragma unroll
    for (int n = 0; n < Products::COLUMNS / 8; ++n)
      target[n * C::CONSUMERS] = {pack_pair<C::BF16>(o[n][0] * factor[0], o[n][1] * factor[0]),
                                  pack_pair<C::BF16>(o[n][2] * factor[1], o[n][3] * factor[1])};
  }
};

}  // namespace qsdpa
