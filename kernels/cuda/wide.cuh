// Attention of 16 or 32 query rows over quantized keys and values, on Hopper's tensor cores: decode.cuh with products
// of warpgroups (wgmma.cuh). Splits, copies and merging are the same; a team is a warpgroup, with tiles of 64 keys.
//
// Keys and values are the wide side, and come out of their words into registers, raw; queries and probabilities are
// narrow, and come from shared memory:
//   scores  S^T[64 keys x ROWS]  = codes(K) * Q^T     16 keys of each warp
//   output  O^T[64 dims x ROWS] += codes(V)^T * P^T   16 dimensions of each warp
// So a code is unpacked once for all rows, there are a quarter of the accumulators that decode.cuh needs, where each
// warp has all rows and dimensions to itself, and products wait for no instruction of the warp.
//
// The way of a call, and the files of its parts beside those of decode.cuh:
//   wide_config.cuh   what a kernel is specialized on, its shared memory, and where a thread stands
//   wide_queries.cuh  query rows to operands in shared memory
//   wide_scores.cuh   products of a tile's keys with the queries
//   wide_softmax.cuh  scores to probabilities, and these to operands in shared memory
//   wide_values.cuh   products of a tile's values with the probabilities
#pragma once
#include "decode_copies.cuh"
#include "decode_mask.cuh"
#include "decode_merge.cuh"
#include "new_rows.cuh"
#include "wide_queries.cuh"
#include "wide_scores.cuh"
#include "wide_softmax.cuh"

namespace qsdpa {

template <typename C>
class WideDecoder {
  static constexpr int STAGES = C::STAGES;

  const DecodeArguments<C>& a;
  const SharedMemory memory;
  const u32 shared;
  const WideLane<C> place;
  const DecodeWork<C> work;

 public:
  __device__ __forceinline__ WideDecoder(const DecodeArguments<C>& arguments, char* begin)
      : a(arguments), memory{begin}, shared(shared_address(begin)), work(a) {}

  template <typename New>
  __device__ __forceinline__ void run(const New& new_rows) {
    new_rows.store(a, work, place);
    const WideQueries<C> queries(a, work, memory);
    typename WideQueries<C>::Raw raw;
    queries.load(raw);  // ahead of the first tiles, which would delay them
    const TileCopier<C> copier(a, work, memory);
    const u32 ring = shared + C::RINGS + place.team * STAGES * C::STAGE;
    auto fetch = [&](int tile, int stage) { copier.fetch(tile, ring + stage * C::STAGE); };

    const int stride = work.splits * C::TEAMS;
    int tile = work.first_tile(place.team), stage = 0, parity = 0;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) fetch(tile + s * stride, s);
    queries.store(raw);
    __syncthreads();
    wait_copies<STAGES - 2>();  // a team begins when it has its own first tile
    place.team_barrier();

    const WideScores<C> scores(place, shared);
    const ScoreMask<C, WideLane<C>> mask(a, work, place);
    const float* factors = memory.as<float>(C::ROW_FACTORS);
    WideSoftmax<C> softmax(place, memory, shared);
    WideValues<C> values(place);
    for (; tile * C::TILE < work.count; tile += stride) {
      const u32 at = ring + stage * C::STAGE;
      typename C::Scores s;
      typename C::Weights p;
      typename WideValues<C>::Operands operands;
      scores.multiply(s, at);
      mask.template apply<C::TILE>(s, tile * C::TILE, [&](float score, int row) { return score * factors[row]; });
      // The barrier within lets all see the next tile, and tells that the stage of the one before is free.
      softmax.weigh(p, s, values, at, parity, [&] {
        if constexpr (C::EARLY_VALUES) values.unpack(operands, at);
        wait_copies<STAGES - 3>();
      });
      if constexpr (!C::EARLY_VALUES) values.unpack(operands, at);
      values.begin(operands, softmax.tile(parity));
      fetch(tile + (STAGES - 1) * stride, stage == 0 ? STAGES - 1 : stage - 1);
      softmax.add_up(p, at);
      values.finish_products();
      stage = stage == STAGES - 1 ? 0 : stage + 1;
      parity ^= 1;
    }
    wait_copies<0>();
    __syncthreads();
    softmax.store(values);
    __syncthreads();
    const Merger<C> merger(a, work, memory);
    const i64 of = static_cast<i64>(work.batch) * gridDim.y + blockIdx.y;
    merger.merge_teams(of);
    merger.merge_splits(of);
  }
};

}  // namespace qsdpa
