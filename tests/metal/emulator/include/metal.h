// Metal Shading Language for clang's "C++ for OpenCL" mode on x86-64.
//
// Metal's device, constant, threadgroup and thread become OpenCL's address spaces, which the compiler checks as Metal's
// does and lowers to ordinary memory. This file is the part of Metal's standard library that compute kernels use;
// barriers and SIMD-group functions are in simdgroup.h.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

// ---- scalar types and keywords ----------------------------------------------------------------------------------------
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef __bf16 bfloat;

#define MLX_METAL_JIT 1
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define device __global
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline __attribute__((always_inline))
#define EMU_INLINE static inline __attribute__((always_inline))

// ---- the interface with runtime.cpp -------------------------------------------------------------------------------------
struct emu_ids {
  uint position_in_grid[3], position_in_threadgroup[3], threadgroup_position[3], threads_per_threadgroup[3],
      dispatch_threads_per_threadgroup[3], threadgroups_per_grid[3], threads_per_grid[3];
  uint lane, simdgroup, index_in_threadgroup, simdgroups;
};
extern "C" {
__local void* emu_threadgroup_variable(uint id, ulong size);
void emu_threadgroup_barrier(uint line);
void emu_simdgroup_barrier(uint line);
const __private void* emu_simd_gather(uint op, uint line, const __private void*, uint size, __private uint* active);
const __private void* emu_simd_compute(uint op, uint line, const __private void*, uint size);
uint emu_lane();
}
// `threadgroup T x;` in a kernel is rewritten to a reference to this.
#define EMU_THREADGROUP(id, ...) (*(threadgroup __VA_ARGS__*)emu_threadgroup_variable(id, sizeof(__VA_ARGS__)))

// ---- vectors: clang's own, with T4(...) constructors as macros of the same name -----------------------------------------
namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}
using metal::vec;

#define EMU_VECTORS(T)                               \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
EMU_VECTORS(char)
EMU_VECTORS(uchar)
EMU_VECTORS(short)
EMU_VECTORS(ushort)
EMU_VECTORS(int)
EMU_VECTORS(uint)
EMU_VECTORS(long)
EMU_VECTORS(ulong)
EMU_VECTORS(half)
EMU_VECTORS(float)
EMU_VECTORS(bfloat)

template <typename V>
struct emu_vector {  // of a scalar: size 0
  static constexpr constant int size = 0;
};
template <typename T, int N>
struct emu_vector<T __attribute__((ext_vector_type(N)))> {
  typedef T element;
  static constexpr constant int size = N;
};
template <typename A>
struct emu_width {
  static constexpr constant int n = emu_vector<A>::size ? emu_vector<A>::size : 1;
};
template <typename V, typename A>
EMU_INLINE void emu_put(thread V& v, thread int& i, A a) {
  typedef typename emu_vector<V>::element E;
  if constexpr (emu_vector<A>::size == 0) v[i++] = (E)a;
  else
    for (int k = 0; k < emu_vector<A>::size; k++) v[i++] = (E)a[k];
}
template <typename V>
EMU_INLINE V emu_make() {
  return V(0);
}
template <typename V, typename A>
EMU_INLINE V emu_make(A a) {
  typedef typename emu_vector<V>::element E;
  V v;
  if constexpr (emu_vector<A>::size == 0) {
    for (int i = 0; i < emu_vector<V>::size; i++) v[i] = (E)a;
  } else {
    static_assert(emu_vector<A>::size == emu_vector<V>::size, "vector size mismatch");
    for (int i = 0; i < emu_vector<V>::size; i++) v[i] = (E)a[i];
  }
  return v;
}
template <typename V, typename A, typename B, typename... R>
EMU_INLINE V emu_make(A a, B b, R... r) {
  static_assert(((emu_width<A>::n + emu_width<B>::n) + ... + emu_width<R>::n) == emu_vector<V>::size,
                "wrong number of vector components");
  V v;
  int i = 0;
  emu_put(v, i, a);
  emu_put(v, i, b);
  (emu_put(v, i, r), ...);
  return v;
}
#define char2(...) emu_make<char2>(__VA_ARGS__)
#define char4(...) emu_make<char4>(__VA_ARGS__)
#define uchar2(...) emu_make<uchar2>(__VA_ARGS__)
#define uchar4(...) emu_make<uchar4>(__VA_ARGS__)
#define short2(...) emu_make<short2>(__VA_ARGS__)
#define short4(...) emu_make<short4>(__VA_ARGS__)
#define ushort2(...) emu_make<ushort2>(__VA_ARGS__)
#define ushort4(...) emu_make<ushort4>(__VA_ARGS__)
#define int2(...) emu_make<int2>(__VA_ARGS__)
#define int3(...) emu_make<int3>(__VA_ARGS__)
#define int4(...) emu_make<int4>(__VA_ARGS__)
#define uint2(...) emu_make<uint2>(__VA_ARGS__)
#define uint3(...) emu_make<uint3>(__VA_ARGS__)
#define uint4(...) emu_make<uint4>(__VA_ARGS__)
#define ulong2(...) emu_make<ulong2>(__VA_ARGS__)
#define half2(...) emu_make<half2>(__VA_ARGS__)
#define half4(...) emu_make<half4>(__VA_ARGS__)
#define bfloat2(...) emu_make<bfloat2>(__VA_ARGS__)
#define bfloat4(...) emu_make<bfloat4>(__VA_ARGS__)
#define float2(...) emu_make<float2>(__VA_ARGS__)
#define float3(...) emu_make<float3>(__VA_ARGS__)
#define float4(...) emu_make<float4>(__VA_ARGS__)

template <typename To, typename From>
EMU_INLINE To as_type(From f) {
  static_assert(sizeof(To) == sizeof(From), "as_type size mismatch");
  return __builtin_bit_cast(To, f);
}

namespace metal {
// ---- limits and type traits ---------------------------------------------------------------------------------------------
template <typename T>
struct numeric_limits;
#define EMU_INTEGER_LIMITS(T, MAX, MIN)         \
  template <>                                   \
  struct numeric_limits<T> {                    \
    static constexpr T max() { return MAX; }    \
    static constexpr T min() { return MIN; }    \
    static constexpr T lowest() { return MIN; } \
  };
EMU_INTEGER_LIMITS(char, 127, -128)
EMU_INTEGER_LIMITS(signed char, 127, -128)
EMU_INTEGER_LIMITS(uchar, 255, 0)
EMU_INTEGER_LIMITS(short, 32767, -32768)
EMU_INTEGER_LIMITS(ushort, 65535, 0)
EMU_INTEGER_LIMITS(int, 2147483647, -2147483647 - 1)
EMU_INTEGER_LIMITS(uint, ~0u, 0)
EMU_INTEGER_LIMITS(long, 9223372036854775807l, -9223372036854775807l - 1)
EMU_INTEGER_LIMITS(ulong, ~0ul, 0)
#define EMU_FLOAT_LIMITS(T, MAX, MIN, EPSILON)                      \
  template <>                                                       \
  struct numeric_limits<T> {                                        \
    static constexpr T max() { return (T)MAX; }                     \
    static constexpr T lowest() { return (T) - MAX; }               \
    static constexpr T min() { return (T)MIN; }                     \
    static constexpr T epsilon() { return (T)EPSILON; }             \
    static constexpr T infinity() { return (T)__builtin_inff(); }   \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
  };
EMU_FLOAT_LIMITS(float, 0x1.fffffep127f, 0x1p-126f, 0x1p-23f)
EMU_FLOAT_LIMITS(half, 65504.f, 0x1p-14f, 0x1p-10f)
EMU_FLOAT_LIMITS(bfloat, 0x1.fep127f, 0x1p-126f, 0x1p-7f)

template <typename A, typename B>
constexpr constant bool is_same_v = false;
template <typename A>
constexpr constant bool is_same_v<A, A> = true;
template <typename A, typename B>
struct is_same {
  static constexpr constant bool value = is_same_v<A, B>;
};
template <bool C, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool C, typename T = void>
using enable_if_t = typename enable_if<C, T>::type;
template <bool C, typename A, typename B>
struct conditional {
  typedef A type;
};
template <typename A, typename B>
struct conditional<false, A, B> {
  typedef B type;
};
template <bool C, typename A, typename B>
using conditional_t = typename conditional<C, A, B>::type;
template <typename A, typename B>
constexpr constant bool is_convertible_v = __is_convertible_to(A, B);
template <typename T>
constexpr constant bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
constexpr constant bool is_integral_v = __is_integral(T);

// ---- mathematics: overload sets, not templates, as Metal's, so that mixed arguments are ambiguous here too ----------------
#define EMU_INTEGER_FUNCTIONS(T)                                    \
  EMU_INLINE T max(T a, T b) { return a > b ? a : b; }              \
  EMU_INLINE T min(T a, T b) { return a < b ? a : b; }              \
  EMU_INLINE T clamp(T x, T l, T h) { return min(max(x, l), h); }   \
  EMU_INLINE T select(T a, T b, bool c) { return c ? b : a; }
EMU_INTEGER_FUNCTIONS(char)
EMU_INTEGER_FUNCTIONS(uchar)
EMU_INTEGER_FUNCTIONS(short)
EMU_INTEGER_FUNCTIONS(ushort)
EMU_INTEGER_FUNCTIONS(int)
EMU_INTEGER_FUNCTIONS(uint)
EMU_INTEGER_FUNCTIONS(long)
EMU_INTEGER_FUNCTIONS(ulong)
#define EMU_FLOAT_FUNCTIONS(T)                                                                      \
  EMU_INLINE T max(T a, T b) { return (T)__builtin_fmaxf((float)a, (float)b); }                     \
  EMU_INLINE T min(T a, T b) { return (T)__builtin_fminf((float)a, (float)b); }                     \
  EMU_INLINE T clamp(T x, T l, T h) { return min(max(x, l), h); }                                   \
  EMU_INLINE T select(T a, T b, bool c) { return c ? b : a; }                                       \
  EMU_INLINE T abs(T x) { return (T)__builtin_fabsf((float)x); }                                    \
  EMU_INLINE T fma(T a, T b, T c) { return __builtin_elementwise_fma(a, b, c); }                    \
  EMU_INLINE bool isnan(T x) { return x != x; }                                                     \
  EMU_INLINE bool isinf(T x) { return __builtin_isinf((float)x); }                                  \
  EMU_INLINE bool isfinite(T x) { return __builtin_isfinite((float)x); }                            \
  EMU_INLINE bool signbit(T x) { return __builtin_signbit((float)x); }
EMU_FLOAT_FUNCTIONS(float)
EMU_FLOAT_FUNCTIONS(half)
EMU_FLOAT_FUNCTIONS(bfloat)
EMU_INLINE int abs(int x) { return x < 0 ? -x : x; }
template <int N>
EMU_INLINE vec<float, N> max(vec<float, N> a, vec<float, N> b) {
  for (int i = 0; i < N; i++) a[i] = max(a[i], b[i]);
  return a;
}
template <int N>
EMU_INLINE vec<float, N> min(vec<float, N> a, vec<float, N> b) {
  for (int i = 0; i < N; i++) a[i] = min(a[i], b[i]);
  return a;
}
template <typename T, int N>
EMU_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T s = 0;
  for (int i = 0; i < N; i++) s += a[i] * b[i];
  return s;
}
EMU_INLINE float emu_rsqrt(float x) { return 1.f / __builtin_sqrtf(x); }
#define EMU_UNARY(name, builtin)                                      \
  EMU_INLINE float name(float x) { return builtin(x); }               \
  EMU_INLINE half name(half x) { return (half)builtin((float)x); }    \
  EMU_INLINE bfloat name(bfloat x) { return (bfloat)builtin((float)x); } \
  template <int N>                                                    \
  EMU_INLINE vec<float, N> name(vec<float, N> x) {                    \
    for (int i = 0; i < N; i++) x[i] = builtin(x[i]);                 \
    return x;                                                         \
  }
#define EMU_UNARY_FUNCTIONS         \
  EMU_UNARY(exp, __builtin_expf)    \
  EMU_UNARY(exp2, __builtin_exp2f)  \
  EMU_UNARY(log, __builtin_logf)    \
  EMU_UNARY(log2, __builtin_log2f)  \
  EMU_UNARY(sqrt, __builtin_sqrtf)  \
  EMU_UNARY(rsqrt, emu_rsqrt)       \
  EMU_UNARY(tanh, __builtin_tanhf)  \
  EMU_UNARY(sin, __builtin_sinf)    \
  EMU_UNARY(cos, __builtin_cosf)    \
  EMU_UNARY(floor, __builtin_floorf) \
  EMU_UNARY(ceil, __builtin_ceilf)  \
  EMU_UNARY(round, __builtin_roundf) \
  EMU_UNARY(rint, __builtin_rintf)  \
  EMU_UNARY(trunc, __builtin_truncf) \
  EMU_UNARY(fabs, __builtin_fabsf)
EMU_UNARY_FUNCTIONS
EMU_INLINE float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
EMU_INLINE float fmin(float a, float b) { return __builtin_fminf(a, b); }
EMU_INLINE float pow(float a, float b) { return __builtin_powf(a, b); }
EMU_INLINE float atan2(float a, float b) { return __builtin_atan2f(a, b); }
namespace fast {
EMU_UNARY_FUNCTIONS
}
namespace precise {
EMU_UNARY_FUNCTIONS
}
EMU_INLINE uint popcount(uint x) { return __builtin_popcount(x); }
EMU_INLINE uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
EMU_INLINE uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
EMU_INLINE uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0u : bits >= 32 ? x >> offset : (x >> offset) & ((1u << bits) - 1);
}

// ---- atomics: fibers do not preempt one another ---------------------------------------------------------------------------
enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  T value;
};
#define EMU_ATOMICS(SPACE)                                                               \
  template <typename T>                                                                  \
  EMU_INLINE T atomic_load_explicit(const SPACE atomic<T>* p, memory_order) {            \
    return p->value;                                                                     \
  }                                                                                      \
  template <typename T, typename U>                                                      \
  EMU_INLINE void atomic_store_explicit(SPACE atomic<T>* p, U x, memory_order) {         \
    p->value = (T)x;                                                                     \
  }                                                                                      \
  template <typename T, typename U>                                                      \
  EMU_INLINE T atomic_fetch_add_explicit(SPACE atomic<T>* p, U x, memory_order) {        \
    T old = p->value;                                                                    \
    p->value = old + (T)x;                                                               \
    return old;                                                                          \
  }                                                                                      \
  template <typename T, typename U>                                                      \
  EMU_INLINE T atomic_fetch_max_explicit(SPACE atomic<T>* p, U x, memory_order) {        \
    T old = p->value;                                                                    \
    if ((T)x > old) p->value = (T)x;                                                     \
    return old;                                                                          \
  }
EMU_ATOMICS(device)
EMU_ATOMICS(threadgroup)
}  // namespace metal
#define atomic_int metal::atomic<int>
#define atomic_uint metal::atomic<uint>
#define atomic_float metal::atomic<float>

#include "simdgroup.h"
using namespace metal;
