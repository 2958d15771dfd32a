// Absorbed MLA decoding on Hopper's tensor cores: many query rows against one quantized latent that is both keys and
// values, and a rope term.
//
// Work: a block serves 64 query rows (heads times positions) of one sequence; the splits of these deal the tiles of 64
// keys among themselves. Warpgroups:
//   left       scores S = Q K^T [64 x 64], softmax, P to registers and to the right; O += P V, left half of its columns
//   right      O += P V, the other half
//   producers  fetch packed keys a tile ahead, and unpack them, once, into a ring of tiles in shared memory; rope keys
//              are copied beside
// The tile is keys and values at once: its rows are the keys' rows in S, its columns the values' columns in O. While
// the left does its softmax nothing else is under way; the products of values of a tile and of scores of the next run
// back to back.
//
// Results of the splits meet in a second launch, MlaMerger: one block cannot hold them, and many can merge at once. They
// are written as means, in the queries' type: what the output is rounded to, at half the bytes of sums.
//
// The files of its parts:
//   mla_config.cuh     what a kernel is specialized on, its shared memory, its operands
//   mla_block.cuh      which rows and keys a block serves, and where its warpgroups meet
//   mla_queries.cuh    query rows to shared memory
//   mla_producers.cuh  tiles into the ring (unpack.cuh)
//   mla_consumers.cuh  scores, probabilities and output; their products in mla_products.cuh
//   mla_handover.cuh   probabilities from the left to the right
//   mla_merge.cuh      results of the splits to the output
#pragma once
#include "mla_consumers.cuh"
#include "mla_merge.cuh"
#include "mla_producers.cuh"
#include "mla_queries.cuh"

namespace qsdpa {

template <typename C>
class MlaDecoder {
  const MlaBlock<C> block;

 public:
  __device__ __forceinline__ MlaDecoder(const MlaArguments<C>& arguments, char* memory) : block(arguments, memory) {}

  // What a block needs first, it asks for first, each group for itself: the first product waits for all of it.
  __device__ __forceinline__ void run() const {
    if (threadIdx.x >= C::CONSUMERS) {
      give_registers<C::PRODUCER_REGISTERS>();
      MlaProducers<C>(block).run();
    } else {
      block.make_barriers();
      const float scale = *block.a.scale;
      load_mla_queries(block);
      const MlaConsumers<C> consumers(block);
      if (threadIdx.x < C::GROUP) {
        take_registers<C::LEFT_REGISTERS>();
        consumers.left(scale);
      } else {
        take_registers<C::RIGHT_REGISTERS>();
        consumers.right();
      }
    }
  }
};

}  // namespace qsdpa
