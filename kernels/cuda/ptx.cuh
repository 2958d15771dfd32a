// The few PTX instructions that CUDA C++ has no plain form for. sm_80 and later.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qsdpa {

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

template <typename T>
struct IsBfloat16 {
  static constexpr bool value = false;
};
template <>
struct IsBfloat16<__nv_bfloat16> {
  static constexpr bool value = true;
};

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }
constexpr float LOWEST = -3.402823466e38f;  // finite stand-in for "no key yet": a difference with it is never NaN
constexpr float LOG2E = 1.4426950408889634f;

// A base-2 logit and what a mask adds to it: nothing but -inf hides a key, and NaN stays NaN.
__device__ __forceinline__ float masked_logit(float logit, float added) {
  const float sum = logit + added * LOG2E;
  return added == minus_infinity() ? minus_infinity() : sum < LOWEST ? LOWEST : sum;
}

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Keep x in a register: the compiler computes cheap functions of the thread's number anew wherever they are used.
__device__ __forceinline__ void keep(u32& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(int& x) { asm volatile("" : "+r"(x)); }
template <typename T>
__device__ __forceinline__ void keep(const T*& x) {
  asm volatile("" : "+l"(x));
}

// (a & b) | c
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ u32 fma_half2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ u32 mul_half2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Of pairs of bfloat16.
__device__ __forceinline__ u32 fma_bfloat162(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Four bytes of {b, a} by the nibbles of `selector`; bit 3 of a nibble replicates the sign of the byte that it selects,
// which __byte_perm() does not.
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Two floats as a pair of halves, `low` in the low one.
__device__ __forceinline__ u32 pack_half2(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

template <bool BF16>
__device__ __forceinline__ u32 pack_pair(float low, float high) {
  if constexpr (BF16) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  } else {
    return pack_half2(low, high);
  }
}

// Per half, the larger magnitude; halves of type T.
template <typename T>
__device__ __forceinline__ u32 max_magnitudes(u32 a, u32 b) {
  u32 d;
  a &= 0x7fff7fffu, b &= 0x7fff7fffu;
  if constexpr (IsBfloat16<T>::value) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  }
  return d;
}

__device__ __forceinline__ float low_half(u32 x) { return __half2float(__ushort_as_half(x & 0xffff)); }
__device__ __forceinline__ float high_half(u32 x) { return __half2float(__ushort_as_half(x >> 16)); }

// What pack_pair packed.
template <bool BF16>
__device__ __forceinline__ float2 unpack_pair(u32 x) {
  if constexpr (BF16) return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
  return {low_half(x), high_half(x)};
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c[16 x 8] += a[16 x 16] * b[16 x 8]; 16-bit operands, float32 accumulators.
template <bool BF16 = false>
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (BF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// c[16 x 8] += a[16 x 32] * b[32 x 8]; bytes (signed in b, and SIGNED or not in a), integer accumulators.
template <bool SIGNED>
__device__ __forceinline__ void mma_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (SIGNED) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 matrices of 16-bit units, maybe transposed; lane i gives the address of row i % 8 of matrix i / 8.
template <bool TRANSPOSED = false>
__device__ __forceinline__ void load_matrices(u32 (&d)[4], u32 address) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  }
}

// The same for two matrices; lanes 0 to 15 give the addresses.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_two_matrices(u32& d0, u32& d1, u32 address) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(d0), "=r"(d1)
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(d0), "=r"(d1)
                 : "r"(address)
                 : "memory");
  }
}

// Four such matrices from registers; lane i gives the address of row i % 8 of matrix i / 8. sm_90 and later.
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ __forceinline__ u32 load_word(u32 address) {
  u32 d;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(d) : "r"(address) : "memory");
  return d;
}

// Device memory that other blocks of this launch wrote: past the first-level cache.
__device__ __forceinline__ float2 load_fresh2(const float* p) {
  float2 x;
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(p));
  return x;
}

__device__ __forceinline__ float4 load_fresh4(const float* p) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p));
  return x;
}

// Counters in device memory, by which blocks of a launch meet: what a block wrote before it counts, barriers of the block
// included, others find that have read or counted after it. Give the number before.
__device__ __forceinline__ u32 count(u32* counter, u32 by) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(by) : "memory");
  return before;
}
// By one, and after `most` to zero.
__device__ __forceinline__ u32 count_up_to(u32* counter, u32 most) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(most) : "memory");
  return before;
}
__device__ __forceinline__ u32 load_acquire(const u32* counter) {
  u32 x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(counter) : "memory");
  return x;
}

// Transpose an 8 x 8 matrix of 16-bit units held across the warp.
__device__ __forceinline__ u32 transpose_matrix(u32 a) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// Bring the line of this address of device memory into the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Copy BYTES (4, 8 or 16) from device to shared memory; the part past `valid` bytes is filled with zeros.
template <int BYTES>
__device__ __forceinline__ void copy_async(u32 shared, const void* device, int valid = BYTES) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(device), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(device), "n"(BYTES), "r"(valid)
                 : "memory");
  }
}

// Wait for the other threads of a group; `id` (1 to 15) tells groups apart.
template <int THREADS>
__device__ __forceinline__ void group_barrier(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

// The same; whether `x` holds for any of them.
template <int THREADS>
__device__ __forceinline__ bool group_any(int id, bool x) {
  u32 any;
  asm volatile("{.reg .pred p, q; setp.ne.u32 p, %1, 0; bar.red.or.pred q, %2, %3, p; selp.u32 %0, 1, 0, q;}"
               : "=r"(any)
               : "r"(static_cast<u32>(x)), "r"(id), "n"(THREADS)
               : "memory");
  return any != 0;
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most PENDING of the newest groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

}  // namespace qsdpa
