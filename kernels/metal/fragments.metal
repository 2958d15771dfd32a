// 8x8 matrices held as fragments: two neighbours of a row in each lane, placed as MLX's own matrix kernels place them.

#include <metal_simdgroup_matrix>

struct FragmentPosition {
  int row;
  int column;  // and the next
};

inline FragmentPosition fragment_position(uint lane) {
  const int quad = int(lane) / 4;
  FragmentPosition p;
  p.row = (quad & 4) + (int(lane) / 2) % 4;
  p.column = (quad & 2) * 2 + (int(lane) % 2) * 2;
  return p;
}

// c += a b
template <typename A, typename B>
inline void multiply_accumulate(thread float2& c, vec<A, 2> a, vec<B, 2> b) {
  metal::simdgroup_matrix<A, 8, 8> a_matrix;
  metal::simdgroup_matrix<B, 8, 8> b_matrix;
  metal::simdgroup_matrix<float, 8, 8> c_matrix;
  reinterpret_cast<thread vec<A, 2>&>(a_matrix.thread_elements()) = a;
  reinterpret_cast<thread vec<B, 2>&>(b_matrix.thread_elements()) = b;
  reinterpret_cast<thread float2&>(c_matrix.thread_elements()) = c;
  simdgroup_multiply_accumulate(c_matrix, a_matrix, b_matrix, c_matrix);
  c = reinterpret_cast<thread float2&>(c_matrix.thread_elements());
}

// Over the four lanes that share a row.
inline float row_max(float x) {
  x = metal::max(x, simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, simd_shuffle_xor(x, ushort(8)));
}
inline float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

// Over the eight lanes that share a column.
inline float column_max(float x) {
  x = metal::max(x, simd_shuffle_xor(x, ushort(2)));
  x = metal::max(x, simd_shuffle_xor(x, ushort(4)));
  return metal::max(x, simd_shuffle_xor(x, ushort(16)));
}
inline float column_sum(float x) {
  x += simd_shuffle_xor(x, ushort(2));
  x += simd_shuffle_xor(x, ushort(4));
  return x + simd_shuffle_xor(x, ushort(16));
}
