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
inline void multiply_accumulate(thread float2& c, float2 a, float2 b) {
  metal::simdgroup_matrix<float, 8, 8> a_matrix, b_matrix, c_matrix;
  reinterpret_cast<thread float2&>(a_matrix.thread_elements()) = a;
  reinterpret_cast<thread float2&>(b_matrix.thread_elements()) = b;
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
