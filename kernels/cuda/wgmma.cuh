// Matrix products of a warpgroup (four warps) out of shared memory, and what they need: descriptors, barriers in shared
// memory, and fences. sm_90a only.
//
// Operands in shared memory are tiles of rows of 128 bytes (64 halves), swizzled: the 16-byte unit number c of row r
// lies at unit c ^ (r % 8), and eight rows are an atom of 1024 bytes. A tile of more columns is several such (panels),
// one after another. The same tile serves as an operand whose contraction runs along its rows, and as one where it runs
// down its columns.
#pragma once
#include "ptx.cuh"

namespace qsdpa {

constexpr int PANEL_COLUMNS = 64;  // halves of a row of 128 bytes

// Byte offset of the 16-byte unit `unit` of row `row`.
__device__ __forceinline__ u32 swizzled(int row, int unit) { return row * 128 + ((unit ^ (row % 8)) << 4); }

// Of the operand whose contraction runs along the rows (Q and K): 64 rows or more, 16 columns from the address on.
__device__ __forceinline__ u64 rows_descriptor(u32 address) {
  return (1ull << 62) | (64ull << 32) | (1ull << 16) | (address >> 4);
}

// Of the operand whose contraction runs down the rows (V): 16 rows from the address on, and all columns; tiles of 64
// columns lie PANEL_BYTES apart.
template <int PANEL_BYTES>
__device__ __forceinline__ u64 columns_descriptor(u32 address) {
  return (1ull << 62) | (64ull << 32) | (static_cast<u64>(PANEL_BYTES >> 4) << 16) | (address >> 4);
}

// Before the first product after accumulators or operands in registers were written.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING of the newest groups of products are under way.
template <int PENDING>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keep the compiler from moving uses of accumulators across a wait.
template <int N>
__device__ __forceinline__ void pin(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int x = 0; x < 4; ++x) asm volatile("" : "+f"(c[n][x])::"memory");
}

// Accumulators of a warpgroup are 64 rows by 8 * N columns: c[n][x] of a lane is row 16 * (warp % 4) + lane / 4 + x / 2
// * 8 and column 8 * n + lane % 4 * 2 + x % 2. The instruction names each of them; so do these macros.
#define QSDPA_4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define QSDPA_16(n) QSDPA_4(n), QSDPA_4(n + 1), QSDPA_4(n + 2), QSDPA_4(n + 3)
#define QSDPA_64(n) QSDPA_16(n), QSDPA_16(n + 4), QSDPA_16(n + 8), QSDPA_16(n + 12)
#define QSDPA_NAMES_0_31 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
  "%27,%28,%29,%30,%31"
#define QSDPA_NAMES_32_63 \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
  "%57,%58,%59,%60,%61,%62,%63"
#define QSDPA_NAMES_64_127 \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
  "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110," \
  "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QSDPA_MULTIPLY(SHAPE, TYPE) "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {"
#define QSDPA_OF_TYPE(PRODUCT) \
  if constexpr (BF16) {        \
    PRODUCT("bf16");           \
  } else {                     \
    PRODUCT("f16");            \
  }

// c[64 x 64] = a * b^T, or += with `add`: 16 columns of both, out of shared memory.
template <bool BF16>
__device__ __forceinline__ void multiply_rows(float (&c)[8][4], u64 a, u64 b, int add) {
#define QSDPA_PRODUCT(TYPE)                                                                    \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;" QSDPA_MULTIPLY("m64n64k16", TYPE)       \
               QSDPA_NAMES_0_31 "}, %32, %33, p, 1, 1, 0, 0;}"                                 \
               : QSDPA_16(0), QSDPA_16(4)                                                      \
               : "l"(a), "l"(b), "r"(add))
  QSDPA_OF_TYPE(QSDPA_PRODUCT)
#undef QSDPA_PRODUCT
}

// c[64 x 256] += a * b: 16 columns of a in registers, 16 rows of b in shared memory.
template <bool BF16>
__device__ __forceinline__ void multiply_columns(float (&c)[32][4], const u32 (&a)[4], u64 b) {
#define QSDPA_PRODUCT(TYPE)                                                                    \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0;" QSDPA_MULTIPLY("m64n256k16", TYPE)        \
               QSDPA_NAMES_0_31 "," QSDPA_NAMES_32_63 "," QSDPA_NAMES_64_127                           \
               "}, {%128,%129,%130,%131}, %132, p, 1, 1, 1;}"                                  \
               : QSDPA_64(0), QSDPA_64(16)                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  QSDPA_OF_TYPE(QSDPA_PRODUCT)
#undef QSDPA_PRODUCT
}

// c[64 x 128] += a * b, likewise.
template <bool BF16>
__device__ __forceinline__ void multiply_columns(float (&c)[16][4], const u32 (&a)[4], u64 b) {
#define QSDPA_PRODUCT(TYPE)                                                                    \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0;" QSDPA_MULTIPLY("m64n128k16", TYPE)        \
               QSDPA_NAMES_0_31 "," QSDPA_NAMES_32_63 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;}"    \
               : QSDPA_64(0)                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  QSDPA_OF_TYPE(QSDPA_PRODUCT)
#undef QSDPA_PRODUCT
}

// c[64 x 64] += a * b, likewise.
template <bool BF16>
__device__ __forceinline__ void multiply_columns(float (&c)[8][4], const u32 (&a)[4], u64 b) {
#define QSDPA_PRODUCT(TYPE)                                                              \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0;" QSDPA_MULTIPLY("m64n64k16", TYPE)   \
               QSDPA_NAMES_0_31 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"                \
               : QSDPA_16(0), QSDPA_16(4)                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  QSDPA_OF_TYPE(QSDPA_PRODUCT)
#undef QSDPA_PRODUCT
}

// c[64 x 16] = a * b, or += with `add`: 16 columns of a in registers, b in shared memory, its contraction along the
// rows or (DOWN) down them.
template <bool BF16, bool DOWN>
__device__ __forceinline__ void multiply_left(float (&c)[2][4], const u32 (&a)[4], u64 b, int add) {
#define QSDPA_PRODUCT(TYPE)                                                                                   \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %13, 0;" QSDPA_MULTIPLY("m64n16k16", TYPE)                       \
               "%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, %14;}"                               \
               : QSDPA_4(0), QSDPA_4(1)                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(DOWN ? 1 : 0))
  QSDPA_OF_TYPE(QSDPA_PRODUCT)
#undef QSDPA_PRODUCT
}

// c[64 x 32], likewise.
template <bool BF16, bool DOWN>
__device__ __forceinline__ void multiply_left(float (&c)[4][4], const u32 (&a)[4], u64 b, int add) {
#define QSDPA_PRODUCT(TYPE)                                                                                   \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0;" QSDPA_MULTIPLY("m64n32k16", TYPE)                       \
               "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, %22;}" \
               : QSDPA_16(0)                                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(DOWN ? 1 : 0))
  QSDPA_OF_TYPE(QSDPA_PRODUCT)
#undef QSDPA_PRODUCT
}

#undef QSDPA_4
#undef QSDPA_16
#undef QSDPA_64
#undef QSDPA_NAMES_0_31
#undef QSDPA_NAMES_32_63
#undef QSDPA_NAMES_64_127
#undef QSDPA_MULTIPLY
#undef QSDPA_OF_TYPE

// Make what this thread wrote to shared memory visible to matrix products.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers in shared memory, of 8 bytes. A phase ends when all arrivals are in; waits name its parity.
__device__ __forceinline__ void make_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_phase(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
      "@done bra DONE; bra AGAIN; DONE:}"
      ::"r"(barrier), "r"(parity)
      : "memory");
}

// Arrive at a barrier that another group of threads waits at (group_barrier()); THREADS counts both.
template <int THREADS>
__device__ __forceinline__ void group_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

// Move registers between warpgroups: each thread of this one has COUNT from here on.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace qsdpa
