// Barriers, SIMD-group functions and simdgroup_matrix for metal.h. Each call notes the source line it is at, so that the
// run time can tell lanes that have diverged.
#pragma once

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
EMU_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags((uint)a | (uint)b); }

#define EMU_LINE uint emu_line = __builtin_LINE()
EMU_INLINE void threadgroup_barrier(mem_flags, EMU_LINE) { emu_threadgroup_barrier(emu_line); }
EMU_INLINE void simdgroup_barrier(mem_flags, EMU_LINE) { emu_simdgroup_barrier(emu_line); }

enum emu_op : uint {  // Op in runtime.cpp
  emu_sum, emu_max, emu_min, emu_product, emu_shuffle, emu_xor, emu_down, emu_up, emu_broadcast, emu_ballot, emu_matrix
};

// ---- exchange between lanes ---------------------------------------------------------------------------------------------
struct emu_slot {
  uchar bytes[64];
};
template <typename T>
struct emu_lanes {
  const __private emu_slot* slots;
  uint active;
  T operator[](uint i) const { return *(const __private T*)slots[i].bytes; }
};
template <typename T>
EMU_INLINE emu_lanes<T> emu_gather(uint op, T value, uint line) {
  emu_lanes<T> all;
  all.slots = (const __private emu_slot*)emu_simd_gather(op, line, &value, sizeof(T), &all.active);
  return all;
}
template <typename T>
EMU_INLINE T emu_pick(uint op, T value, uint source, uint line) {
  auto all = emu_gather<T>(op, value, line);
  return source < 32 && (all.active >> source & 1) ? T(all[source]) : value;
}
template <typename T>
EMU_INLINE T simd_shuffle(T v, ushort lane, EMU_LINE) {
  return emu_pick<T>(emu_shuffle, v, lane, emu_line);
}
template <typename T>
EMU_INLINE T simd_broadcast(T v, ushort lane, EMU_LINE) {
  return emu_pick<T>(emu_broadcast, v, lane, emu_line);
}
template <typename T>
EMU_INLINE T simd_broadcast_first(T v, EMU_LINE) {
  auto all = emu_gather<T>(emu_broadcast, v, emu_line);
  return all[__builtin_ctz(all.active)];
}
template <typename T>
EMU_INLINE T simd_shuffle_xor(T v, ushort mask, EMU_LINE) {
  return emu_pick<T>(emu_xor, v, emu_lane() ^ mask, emu_line);
}
template <typename T>
EMU_INLINE T simd_shuffle_down(T v, ushort delta, EMU_LINE) {
  return emu_pick<T>(emu_down, v, emu_lane() + delta, emu_line);
}
template <typename T>
EMU_INLINE T simd_shuffle_up(T v, ushort delta, EMU_LINE) {
  return emu_pick<T>(emu_up, v, emu_lane() - delta, emu_line);
}
template <typename T>
EMU_INLINE T simd_shuffle_and_fill_up(T v, T fill, ushort delta, EMU_LINE) {
  T shifted = emu_pick<T>(emu_up, v, emu_lane() - delta, emu_line);
  return emu_lane() < delta ? fill : shifted;
}
template <typename T>
EMU_INLINE T simd_shuffle_and_fill_down(T v, T fill, ushort delta, EMU_LINE) {
  T shifted = emu_pick<T>(emu_down, v, emu_lane() + delta, emu_line);
  return emu_lane() + delta > 31 ? fill : shifted;
}

// ---- reductions -----------------------------------------------------------------------------------------------------------
template <typename T>
__attribute__((noinline)) T emu_reduce(uint op, T v, uint line) {
  auto all = emu_gather<T>(op, v, line);
  bool first = true;
  T r = v;
  for (uint i = 0; i < 32; i++) {
    if (!(all.active >> i & 1)) continue;
    T x = all[i];
    if (first) r = x;
    else r = op == emu_sum ? T(r + x) : op == emu_max ? (x > r ? x : r) : op == emu_min ? (x < r ? x : r) : T(r * x);
    first = false;
  }
  return r;
}
#define EMU_REDUCTION_OF(name, op, T) \
  EMU_INLINE T name(T v, EMU_LINE) { return emu_reduce<T>(op, v, emu_line); }
#define EMU_REDUCTION(name, op)                                                      \
  EMU_INLINE float name(float v, EMU_LINE) {                                         \
    return *(const __private float*)emu_simd_compute(op, emu_line, &v, sizeof v);    \
  }                                                                                  \
  EMU_REDUCTION_OF(name, op, int)                                                    \
  EMU_REDUCTION_OF(name, op, uint)                                                   \
  EMU_REDUCTION_OF(name, op, short)                                                  \
  EMU_REDUCTION_OF(name, op, ushort)                                                 \
  EMU_REDUCTION_OF(name, op, half)                                                   \
  EMU_REDUCTION_OF(name, op, bfloat)                                                 \
  template <typename T, int N>                                                       \
  EMU_INLINE vec<T, N> name(vec<T, N> v, EMU_LINE) {                                 \
    for (int i = 0; i < N; i++) v[i] = name(v[i], emu_line);                         \
    return v;                                                                        \
  }
EMU_REDUCTION(simd_sum, emu_sum)
EMU_REDUCTION(simd_max, emu_max)
EMU_REDUCTION(simd_min, emu_min)
EMU_REDUCTION(simd_product, emu_product)
template <typename T>
EMU_INLINE T simd_prefix_exclusive_sum(T v, EMU_LINE) {
  auto all = emu_gather<T>(emu_sum, v, emu_line);
  T sum = 0;
  for (uint i = 0; i < emu_lane(); i++) sum += all[i];
  return sum;
}
template <typename T>
EMU_INLINE T simd_prefix_inclusive_sum(T v, EMU_LINE) {
  return simd_prefix_exclusive_sum(v, emu_line) + v;
}
EMU_INLINE bool simd_any(bool v, EMU_LINE) { return emu_reduce<int>(emu_max, (int)v, emu_line); }
EMU_INLINE bool simd_all(bool v, EMU_LINE) { return emu_reduce<int>(emu_min, (int)v, emu_line); }

// ---- 8x8 matrices: lanes hold two neighbours of a row, placed as in MLX's steel/attn/mma.h (get_coord) ------------------------
template <typename T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "8x8 only");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    uint2 c = emu_coordinates();
    elements[0] = c.x == c.y ? diagonal : T(0);
    elements[1] = c.x + 1 == c.y ? diagonal : T(0);
  }
  static uint2 emu_coordinates() {  // x: column of the first element, y: row
    uint lane = emu_lane(), quad = lane / 4;
    uint2 c;
    c.y = (quad & 4) + ((lane / 2) % 4);
    c.x = (quad & 2) * 2 + (lane % 2) * 2;
    return c;
  }
  thread vec<T, 2>& thread_elements() thread { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int R, int C>
EMU_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.elements = v;
  return m;
}
#define EMU_LOAD_STORE(SPACE)                                                                                          \
  template <typename T>                                                                                                \
  EMU_INLINE void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const SPACE T* p, ulong stride = 8,              \
                                 ulong2 origin = ulong2(0), bool transpose = false) {                                  \
    uint2 c = m.emu_coordinates();                                                                                     \
    for (uint i = 0; i < 2; i++) {                                                                                     \
      ulong x = c.x + i, y = c.y;                                                                                      \
      m.elements[i] = transpose ? p[(origin.y + x) * stride + origin.x + y] : p[(origin.y + y) * stride + origin.x + x]; \
    }                                                                                                                  \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  EMU_INLINE void simdgroup_store(simdgroup_matrix<T, 8, 8> m, SPACE T* p, ulong stride = 8,                           \
                                  ulong2 origin = ulong2(0), bool transpose = false) {                                 \
    uint2 c = m.emu_coordinates();                                                                                     \
    for (uint i = 0; i < 2; i++) {                                                                                     \
      ulong x = c.x + i, y = c.y;                                                                                      \
      if (transpose) p[(origin.y + x) * stride + origin.x + y] = m.elements[i];                                        \
      else p[(origin.y + y) * stride + origin.x + x] = m.elements[i];                                                  \
    }                                                                                                                  \
  }
EMU_LOAD_STORE(device)
EMU_LOAD_STORE(threadgroup)

template <typename D, typename A, typename B, typename C>
EMU_INLINE void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
                                              thread simdgroup_matrix<B, 8, 8>& b, thread simdgroup_matrix<C, 8, 8>& c,
                                              EMU_LINE) {
  float v[6] = {(float)a.elements[0], (float)a.elements[1], (float)b.elements[0],
                (float)b.elements[1], (float)c.elements[0], (float)c.elements[1]};
  const __private float* r = (const __private float*)emu_simd_compute(emu_matrix, emu_line, v, sizeof v);
  d.elements[0] = (D)r[0];
  d.elements[1] = (D)r[1];
}
template <typename D, typename A, typename B>
EMU_INLINE void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
                                   thread simdgroup_matrix<B, 8, 8>& b, EMU_LINE) {
  simdgroup_matrix<D, 8, 8> zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero, emu_line);
}
}  // namespace metal
