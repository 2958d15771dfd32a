// Queries as B operands of the products with keys: in registers for the whole call where they fit, else in shared
// memory, already in the order in which lanes read them (halves) or as they are (bytes).
//
// Halves: column 2t + j of a block of eight is row 4j + t. With at most four rows, j is 0, and odd columns are idle.
// Bytes: column 2t has the high bytes of row t of four, and column 2t + 1 the low ones; so the two operands of a block
// of eight rows give a lane the same rows as one of halves.
#pragma once
#include "decode_work.cuh"

namespace qsdpa {

template <typename C>
class QueryOperands {
  using K = typename C::K;
  static constexpr int D = C::D, NB = C::ROW_BLOCKS, TERMS = C::TERMS;
  static constexpr bool BF16_SCALES = IsBfloat16<typename K::Scale>::value;
  // Of a block of 32 dimensions: one for each j for bytes, one for each 16 dimensions for halves.
  static constexpr int OPERANDS = C::KEY_BYTES ? C::LANE_ROWS : 2;

  const DecodeLane<C> place;
  const SharedMemory memory;
  u32 sums[C::BIAS_OPERANDS ? NB : 1][2];
  u32 held[C::QUERIES_IN_REGISTERS ? TERMS : 1][C::QUERIES_IN_REGISTERS ? C::KEY_SHARE : 1][OPERANDS][NB][2];

 public:
  __device__ __forceinline__ QueryOperands(const DecodeLane<C>& place, SharedMemory memory)
      : place(place), memory(memory) {}

  // From what QueryRows stored.
  __device__ __forceinline__ void arrange() {
    if constexpr (C::QUERIES_IN_REGISTERS) {
#pragma unroll
      for (int term = 0; term < TERMS; ++term)
#pragma unroll
        for (int block = 0; block < C::KEY_SHARE; ++block)
#pragma unroll
          for (int m = 0; m < OPERANDS; ++m)
#pragma unroll
            for (int n = 0; n < NB; ++n) {
              const int at = place.member * C::KEY_SHARE + block;
              const uint2 x = C::KEY_BYTES ? bytes(at, m, n) : halves(term, at, m, n);
              held[term][block][m][n][0] = x.x, held[term][block][m][n][1] = x.y;
            }
    } else if constexpr (!C::KEY_BYTES) {
      uint2* fragments = memory.as<uint2>(C::FRAGMENTS);
      for (int i = place.warp; i < TERMS * (D / 32) * 2 * NB; i += C::WARPS) {  // i = ((term, block), m, n)
        const int n = i % NB, m = i / NB % 2, block = i / (2 * NB);
        fragments[i * 32 + place.lane] = halves(block / (D / 32), block % (D / 32), m, n);
      }
      __syncthreads();
    }
    if constexpr (C::BIAS_OPERANDS) arrange_sums();
  }

  // Operand m of block `block` of the warp's share, columns of block n of the rows.
  __device__ __forceinline__ uint2 operand(int term, int block, int m, int n) const {
    if constexpr (C::QUERIES_IN_REGISTERS) {
      return {held[term][block][m][n][0], held[term][block][m][n][1]};
    } else if constexpr (C::KEY_BYTES) {
      return bytes(place.member * C::KEY_SHARE + block, m, n);
    } else {
      const uint2* fragments = memory.as<const uint2>(C::FRAGMENTS);
      const int at = ((term * (D / 32) + place.member * C::KEY_SHARE + block) * 2 + m) * NB + n;
      return fragments[at * 32 + place.lane];
    }
  }

  // The operand that goes with the biases of keys.
  __device__ __forceinline__ uint2 sums_operand(int n) const { return {sums[n][0], sums[n][1]}; }

 private:
  // Column r of operand m: the high (r even) or low bytes of row 4m + r / 2.
  __device__ __forceinline__ uint2 bytes(int block, int m, int n) const {
    const int r = place.r;
    const char* row = memory.as<char>(C::QUERIES) + ((8 * n + 4 * m + r / 2) * 2 + r % 2) * C::QUERY_PITCH;
    return *reinterpret_cast<const uint2*>(row + 32 * block + 8 * place.t);
  }

  // In the order of the dimensions of load_keys().
  __device__ __forceinline__ uint2 halves(int term, int block, int m, int n) const {
    if (C::KEY_GROUPS_APART && place.t / 2 != place.r % 2) return {0, 0};  // the other group's column
    const unsigned short* row =
        memory.as<unsigned short>(C::QUERIES) + (term * C::ROWS + place.column_row(n)) * C::QUERY_PITCH;
    auto pair = [&](int p) {
      return row[key_dim<K>(block, place.t, p, 0)] | static_cast<u32>(row[key_dim<K>(block, place.t, p, 1)]) << 16;
    };
    return {pair(2 * m), pair(2 * m + 1)};
  }

  // Sums of queries: all pairs of groups in the biases' type, and after them what that rounds off.
  __device__ __forceinline__ void arrange_sums() {
    constexpr int W = C::BIAS_WORDS;
#pragma unroll
    for (int n = 0; n < NB; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pair = place.t + 4 * i, word = pair % W;
        u32 x = 0;
        if (pair < 2 * W) {
          const float* of_row = memory.as<float>(C::QUERY_SUMS) + 2 * word * C::ROWS + place.column_row(n);
          const float low = of_row[0] / C::SCORE_UNIT, high = of_row[C::ROWS] / C::SCORE_UNIT;
          x = pack_pair<BF16_SCALES>(low, high);
          if (pair >= W) {
            const float2 rounded = unpack_pair<BF16_SCALES>(x);
            x = pack_pair<BF16_SCALES>(low - rounded.x, high - rounded.y);
          }
        }
        sums[n][i] = x;
      }
  }
};

}  // namespace qsdpa
