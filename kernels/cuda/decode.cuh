// Attention of a few query rows over quantized keys and values, split over blocks along the keys.
//
// Work: a block serves ROWS query rows (heads of one group times query positions) of one batch entry and KV head. The
// teams of warps of all its splits deal the tiles of TILE keys among themselves like cards. A team has its own ring of
// STAGES tiles in shared memory and shares nothing with the others until the end. It is one warp, or, where there are
// many rows of many dimensions, two or four that divide the dimensions and add up their scores. Queries are the narrow
// side of every product:
//   scores  S^T[16 keys x 8 columns]  = codes(K) * Q^T      one mma a 16 dimensions, or 32 as bytes
//   output  O^T[16 dims x 8 columns] += codes(V)^T * P^T    one mma a 16 dimensions
// so that a code is unpacked once for all rows. Codes enter the products exactly (formats.cuh says how).
//
// Keys as bytes: queries of 16 bits become integers of 16 bits (a factor a row), whose high and low bytes are columns
// of their own; the products are exact, and take a quarter of the instructions of halves. Else queries are halves.
// Float32 queries and probabilities are two halves each, which keeps 22 bits.
//
// The way of a call, and the files of its parts:
//   decode_config.cuh          what a kernel is specialized on, and its shared memory
//   decode_work.cuh            which rows a block serves, and where a thread stands
//   decode_queries.cuh         query rows to shared memory, as halves or integers
//   decode_query_operands.cuh  and from there to operands of products
//   new_rows.cuh               rows that are new in the cache to its buffers
//   decode_copies.cuh          tiles from device memory into the ring
//   decode_scores.cuh          products of a tile's keys with the queries
//   decode_logits.cuh          rope, and all else between scores and logits but the mask
//   decode_mask.cuh            the mask, and the end of the keys
//   decode_softmax.cuh         running maxima, and logits to probabilities
//   decode_values.cuh          products of a tile's values with the probabilities
//   decode_merge.cuh           results of teams and splits to the output
#pragma once
#include "decode_copies.cuh"
#include "decode_logits.cuh"
#include "decode_mask.cuh"
#include "decode_merge.cuh"
#include "decode_queries.cuh"
#include "decode_scores.cuh"
#include "decode_softmax.cuh"
#include "new_rows.cuh"

namespace qsdpa {

// A block. Its parts copy what they need of each other: references from part to part would keep the compiler from
// seeing early that all of it can live in registers.
template <typename C>
class Decoder {
  const DecodeArguments<C>& a;
  const SharedMemory memory;
  const DecodeLane<C> place;
  const DecodeWork<C> work;
  const Merger<C> merger;
  const TileOffsets<C> offsets;
  const ScoreProducts<C> scores;
  const QueryRows<C> query_rows;
  const Logits<C> logits;
  const ScoreMask<C, DecodeLane<C>> mask;
  RunningAttention<C> attention;
  QueryOperands<C> queries;

 public:
  __device__ __forceinline__ Decoder(const DecodeArguments<C>& arguments, char* shared)
      : a(arguments),
        memory{shared},
        work(a),
        merger(a, work, memory),
        offsets(place),
        scores(place, offsets, memory),
        query_rows(a, work, place, memory),
        logits(place, memory),
        mask(a, work, place),
        attention(place, offsets),
        queries(place, memory) {}

  template <typename New>
  __device__ __forceinline__ void run(const New& new_rows) {
    if (place.warp >= work.warps()) return;
    typename QueryRows<C>::Raw raw;
    query_rows.load(raw);  // ahead of the first tiles, which would delay them
    new_rows.store(a, work, place);
    const TileCopier<C> copier(a, work, memory);
    const u32 ring = shared_address(memory.begin) + place.team * C::STAGES * C::STAGE;
    auto fetch = [&](int tile, int stage) { copier.fetch(tile, ring + stage * C::STAGE); };

    const int stride = work.splits * C::TEAMS;
    int tile = work.first_tile(place.team), stage = 0;
#pragma unroll
    for (int s = 0; s < C::STAGES - 1; ++s) fetch(tile + s * stride, s);
    query_rows.store(raw);
    __syncthreads();
    queries.arrange();
    for (; tile * C::TILE < work.count; tile += stride) {
      wait_copies<C::STAGES - 2>();
      place.team_barrier();
      fetch(tile + (C::STAGES - 1) * stride, stage == 0 ? C::STAGES - 1 : stage - 1);
      attend(ring + stage * C::STAGE, tile * C::TILE);
      stage = stage == C::STAGES - 1 ? 0 : stage + 1;
    }
    wait_copies<0>();
    finish();
  }

 private:
  // A tile at this shared address, of the keys from `first` on.
  __device__ __forceinline__ void attend(u32 stage, int first) {
    constexpr int PARTS = C::PARTS;
    typename C::Scores s[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      scores.multiply(s[i], queries, stage, i);
      if constexpr (!C::LATE_FACTORS) logits.apply_factors(s[i]);
      if constexpr (C::ROPE > 0) logits.add_rope(s[i], stage + C::ROPE_KEYS + 16 * i * C::RopeTile::PITCH);
    }
    if constexpr (C::TEAM > 1) logits.add_up(s);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) mask.template apply<16>(s[i], first + 16 * i, [](float logit, int) { return logit; });
    typename RunningAttention<C>::ValueScales scales;
    attention.load_scales(scales, stage);
    typename C::RowFloats factors;
    logits.late_factors(factors);
    attention.add(s, factors, scales, stage);
  }

  // The results of the warps to those of the teams, the block and all splits.
  __device__ __forceinline__ void finish() {
    attention.finish();
    attention.store(place, memory);
    __syncthreads();
    const i64 tile = static_cast<i64>(work.batch) * gridDim.y + blockIdx.y;
    merger.merge_teams(tile);
    merger.merge_splits(tile);
  }
};

}  // namespace qsdpa
