// Operands of the kernels: strided views of MLX's arrays, and the kinds of masks.
#pragma once
#include "tiles.cuh"

namespace qsdpa {

enum Mask { NO_MASK = 0, CAUSAL = 1, BOOLEAN = 2, ADDITIVE = 3 };

// A four-dimensional operand.
template <typename T>
struct View {
  const T* data;
  i64 strides[4];
  int shape[4];

  // Offset of the leading indices; a dimension of size 1 broadcasts.
  __device__ __forceinline__ i64 offset(i64 i, i64 j, i64 k) const {
    return (shape[0] > 1 ? i * strides[0] : 0) + (shape[1] > 1 ? j * strides[1] : 0) +
           (shape[2] > 1 ? k * strides[2] : 0);
  }
  __device__ __forceinline__ Rows<T> rows(i64 i, i64 j) const {
    return {data + i * strides[0] + j * strides[1], strides[2], strides[3]};
  }
};

// Runs of four elements of 2 bytes can be read at once.
template <typename T>
__device__ __forceinline__ bool view_aligned(const View<T>& x) {
  static_assert(sizeof(T) == 2, "of 2 bytes");
  const u64 bits = reinterpret_cast<u64>(x.data) | 2 * (x.strides[0] | x.strides[1] | x.strides[2]);
  return x.strides[3] == 1 && bits % 8 == 0;
}

template <typename T, typename Shape, typename Strides>
__device__ __forceinline__ View<T> view(const T* data, const Shape& shape, const Strides& strides) {
  return {data, {strides[0], strides[1], strides[2], strides[3]}, {shape[0], shape[1], shape[2], shape[3]}};
}

// The first `count` rows of each head.
template <typename T>
__device__ __forceinline__ View<T> first_rows(View<T> all, int count) {
  all.shape[2] = count;
  return all;
}

// Number `index` of `count` operands that are stacked along the heads.
template <typename T>
__device__ __forceinline__ View<T> stacked(View<T> all, int index, int count) {
  all.shape[1] /= count;
  all.data += index * all.shape[1] * all.strides[1];
  return all;
}

}  // namespace qsdpa
