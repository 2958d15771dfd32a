// Query rows to right operands of products with keys: panels of 64 dimensions in shared memory, in the order in which
// codes of keys come out of their words; and the sums of their groups, which the biases of keys are multiplied by.
#pragma once
#include "decode_queries.cuh"
#include "wide_config.cuh"

namespace qsdpa {

template <typename C>
class WideQueries {
  using K = typename C::K;
  static constexpr int GROUPS = C::KEY_GROUPS;

  const SharedMemory memory;
  const QueryRows<C> rows;

 public:
  using Raw = typename QueryRows<C>::Raw;

  __device__ __forceinline__ WideQueries(const DecodeArguments<C>& a, const DecodeWork<C>& work, SharedMemory memory)
      : memory(memory), rows(a, work, DecodeLane<C>(), memory) {}

  __device__ __forceinline__ void load(Raw& raw) const { rows.load(raw); }

  // All of it to shared memory; the block has to wait for it. A warp makes operands of what it stored itself.
  __device__ __forceinline__ void store(const Raw& raw) const {
    rows.store(raw);
    __syncwarp();
    for (int row = threadIdx.x / 32; row < C::ROWS; row += C::WARPS) {
      store_sums(row);
      begin_softmax(row);
    }
    publish_to_products();
  }

 private:
  // Sums of a row, as the products of biases have them (WideScores::bias_word()): of all groups in the biases' type,
  // and then what that rounds off.
  __device__ __forceinline__ void store_sums(int row) const {
    const int place = threadIdx.x % 32;
    if (place >= 16) return;
    const float sum = memory.as<float>(C::QUERY_SUMS)[place % GROUPS * C::ROWS + row] *
                      ((K::HAS_BIAS ? 1.0f : -static_cast<float>(K::CENTER)) / C::SCORE_UNIT);
    const u32 rounded = pack_pair<C::BF16_SCALES>(sum, 0.0f);
    const u32 rest = pack_pair<C::BF16_SCALES>(sum - unpack_pair<C::BF16_SCALES>(rounded).x, 0.0f);
    *memory.as<unsigned short>(C::QUERY_SUM_TILE + swizzled(row, place / 8) + place % 8 * 2) =
        place < GROUPS ? rounded : place < 2 * GROUPS ? rest : 0;
  }

  // What each team has of a row (WideSoftmax).
  __device__ __forceinline__ void begin_softmax(int row) const {
    const int team = threadIdx.x % 32;
    const float factor = C::MASK == ADDITIVE ? 1.0f : memory.as<float>(C::ROW_FACTORS)[row];
    if (team < C::TEAMS) memory.as<float2>(C::TEAM_ROWS)[team * C::ROWS + row] = {factor, LOWEST};
  }
};

}  // namespace qsdpa
