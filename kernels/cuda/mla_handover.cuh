// Probabilities, and factors on rows, from the threads of the left warpgroup to those of the right, of the same number.
#pragma once
#include "mla_config.cuh"

namespace qsdpa {

template <typename C>
struct MlaHandover {
  const u32 shared;
  const int thread;

  __device__ __forceinline__ void give_weights(const u32 (&p)[4][4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) store_unit(weights(k), p[k]);
  }
  __device__ __forceinline__ void give_factors(const float (&factor)[2]) const {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(factors()), "f"(factor[0]), "f"(factor[1]) : "memory");
  }
  __device__ __forceinline__ void take_weights(u32 (&p)[4][4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(p[k][0]), "=r"(p[k][1]), "=r"(p[k][2]), "=r"(p[k][3])
                   : "r"(weights(k))
                   : "memory");
  }
  __device__ __forceinline__ void take_factors(float (&factor)[2]) const {
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(factor[0]), "=f"(factor[1]) : "r"(factors()) : "memory");
  }

 private:
  __device__ __forceinline__ u32 weights(int k) const { return shared + C::WEIGHTS + (k * C::GROUP + thread) * 16; }
  __device__ __forceinline__ u32 factors() const { return shared + C::FACTORS + 8 * thread; }
};

}  // namespace qsdpa
