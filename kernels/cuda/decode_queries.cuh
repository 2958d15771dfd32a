// Query rows from device memory to shared memory, scaled so that halves neither overflow nor lose precision, or as
// integers; with them what scores need of a row beside: the sums of its groups, the factor that takes scores to base-2
// logits, and its rope part.
//
// Rows are dealt to the warps of a block. They are read before the copies of the first tiles, which would delay them,
// and stored after those have begun.
#pragma once
#include "decode_work.cuh"

namespace qsdpa {

template <typename C>
class QueryRows {
  using T = typename C::T;
  using K = typename C::K;
  static constexpr int D = C::D, ROWS = C::ROWS, ROWS_OF_WARP = (ROWS + C::WARPS - 1) / C::WARPS;

  const DecodeArguments<C>& a;
  const DecodeWork<C> work;
  const SharedMemory memory;
  const int lane, warp;

 public:
  struct Raw {
    T rows[ROWS_OF_WARP][D / 32];  // a warp's: every 32nd number from the lane's on; not yet used, so not yet waited for
    float scale;
  };

  __device__ __forceinline__ QueryRows(const DecodeArguments<C>& arguments, const DecodeWork<C>& work,
                                       const DecodeLane<C>& place, SharedMemory memory)
      : a(arguments), work(work), memory(memory), lane(place.lane), warp(place.warp) {}

  __device__ __forceinline__ void load(Raw& raw) const {
    raw.scale = *a.scale;
#pragma unroll
    for (int k = 0; k < ROWS_OF_WARP; ++k) {
      const T* source = work.query_row(a.queries, warp + k * C::WARPS);
#pragma unroll
      for (int i = 0; i < D / 32; ++i) raw.rows[k][i] = source[(32 * i + lane) * a.queries.strides[3]];
    }
  }

  // All of it to shared memory; the block has to wait for it.
  __device__ __forceinline__ void store(const Raw& raw) const {
    // The sign goes to the queries, so that the largest score is the largest logit.
    const float sign = raw.scale < 0.0f ? -1.0f : 1.0f;
    const float scale = fabsf(raw.scale) * LOG2E * (K::SCALED_CODES ? K::CODE_FACTOR : 1.0f) * C::SCORE_UNIT;
#pragma unroll
    for (int k = 0; k < ROWS_OF_WARP; ++k) {
      const int row = warp + k * C::WARPS;
      if (row >= ROWS) break;
      float x[D / 32], peak = 0.0f;
      bool finite = true;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        x[i] = to_float(raw.rows[k][i]) * sign, peak = fmaxf(peak, fabsf(x[i]));
        finite &= isfinite(x[i]);
      }
      peak = warp_max(peak);
      finite = __all_sync(~0u, finite);
      float factor;
      if constexpr (C::KEY_BYTES) {
        factor = store_integers(x, row, peak);
      } else {
        factor = store_halves(x, row, peak);
      }
      if constexpr (C::HAS_SUMS) store_sums(x, row);
      // At least so much that a masked score times it is no NaN; integers cannot tell that a number was not finite.
      if (lane == 0) memory.as<float>(C::ROW_FACTORS)[row] = finite ? fmaxf(scale / factor, 1e-36f) : not_a_number();
      if constexpr (C::ROPE > 0) store_rope(row);
    }
  }

 private:
  // A row as halves of a largest magnitude in [512, 1024), one or two each. Returns the factor on it, and in x what the
  // halves are.
  __device__ __forceinline__ float store_halves(float (&x)[D / 32], int row, float peak) const {
    const int exponent = __float_as_uint(peak) >> 23;
    const float factor = __uint_as_float(static_cast<u32>(min(max(263 - exponent, 1), 253)) << 23);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const int dim = 32 * i + lane;
      const float scaled = x[i] * factor;
      __half* half = memory.as<__half>(C::query_place(row, dim));
      *half = __float2half_rn(scaled * C::query_gain(dim));
      x[i] = __half2float(__float2half_rn(scaled));
      if constexpr (C::TERMS == 2) {
        const __half low = __float2half_rn(scaled - x[i]);
        half[ROWS * C::QUERY_PITCH] = low;
        x[i] += __half2float(low);
      }
    }
    return factor;
  }

  // A row as integers of up to 32512, smaller where the codes of keys do not begin at the lowest bit of their byte.
  // Returns the factor on it, and in x the integers.
  __device__ __forceinline__ float store_integers(float (&x)[D / 32], int row, float peak) const {
    char* bytes = memory.as<char>(C::QUERIES) + row * (2 * C::QUERY_PITCH);
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

  // Sums over the keys' groups.
  __device__ __forceinline__ void store_sums(const float (&x)[D / 32], int row) const {
#pragma unroll
    for (int g = 0; g < K::groups(D); ++g) {
      float s = 0.0f;
#pragma unroll
      for (int i = 0; i < K::GROUP / 32; ++i) s += x[g * (K::GROUP / 32) + i];
      s = warp_sum(s);
      if (lane == 0) memory.as<float>(C::QUERY_SUMS)[g * ROWS + row] = s;
    }
  }

  __device__ __forceinline__ void store_rope(int row) const {
    const T* source = work.query_row(a.rope_queries, row);
    T* target = memory.as<T>(C::ROPE_QUERIES) + row * C::ROPE_PITCH;
    for (int i = lane; i < C::ROPE; i += 32) target[i] = source[i * a.rope_queries.strides[3]];
  }
};

}  // namespace qsdpa
