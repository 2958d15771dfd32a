// Tiles of rows (keys) in shared memory, copied there asynchronously by the threads of a team of warps.
#pragma once
#include "ptx.cuh"

namespace qsdpa {

// A two-dimensional operand [N, row] in device memory, for one batch entry and head. Strides are in elements.
template <typename T>
struct Rows {
  const T* data;
  i64 row_stride;
  i64 element_stride;
};

template <typename T>
__device__ __forceinline__ bool rows_aligned(const Rows<T>& x, int bytes) {
  const u64 bits = reinterpret_cast<u64>(x.data) | static_cast<u64>(x.row_stride * static_cast<i64>(sizeof(T)));
  return x.element_stride == 1 && bits % bytes == 0;
}

// Zero if the rows follow each other without gaps, from an aligned address: a tile is one run of bytes. (No truth value:
// what is gathered from many operands makes no branches.)
template <typename T>
__device__ __forceinline__ u64 rows_apart(const Rows<T>& x, int row, int bytes) {
  return static_cast<u64>((x.element_stride ^ 1) | (x.row_stride ^ row)) | reinterpret_cast<u64>(x.data) % bytes;
}

// How TILE rows of ROW_BYTES bytes each lie in shared memory, so that 16 bytes of 8 rows lie in distinct banks: without
// gaps, the units of 16 bytes SWIZZLED within 128, where rows are of a power of two; else PITCH bytes apart, an odd
// number of units. Copies without gaps make fewer, longer requests to memory.
template <int TILE, int THREADS, int ROW_BYTES_, typename T, bool MAY_SWIZZLE = true>
struct RowTile {
  static constexpr int ROW_BYTES = ROW_BYTES_;
  static constexpr bool SWIZZLED = MAY_SWIZZLE && ROW_BYTES >= 32 && (ROW_BYTES & (ROW_BYTES - 1)) == 0;
  static constexpr int PITCH = SWIZZLED || ROW_BYTES % 16 != 0 ? ROW_BYTES : (ROW_BYTES / 16 | 1) * 16;
  static constexpr int BYTES = TILE * PITCH;
  static constexpr int SOURCE_BYTES = TILE * ROW_BYTES;
  static constexpr int CHUNK = ROW_BYTES % 16 == 0 ? 16 : ROW_BYTES % 8 == 0 ? 8 : 4;

  // What byte `at` of a row is XORed with.
  __device__ __forceinline__ static constexpr int swizzle(int row) {
    return !SWIZZLED ? 0 : ROW_BYTES >= 128 ? row % 8 * 16 : row * ROW_BYTES / 128 * 16 % ROW_BYTES;
  }
  __device__ __forceinline__ static constexpr int place(int row, int at) { return row * PITCH + (at ^ swizzle(row)); }

  // Where the chunks of a thread go: each THREADS-th one from its number on.
  static constexpr int PER_ROW = ROW_BYTES / CHUNK, ALL = TILE * PER_ROW;
  struct Places {
    static constexpr bool REGULAR = THREADS % PER_ROW == 0;
    u32 at[REGULAR ? 1 : (ALL + THREADS - 1) / THREADS];

    __device__ __forceinline__ explicit Places(int thread) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(at) / 4); ++i) {
        const int c = i * THREADS + thread;
        at[i] = place(c / PER_ROW, c % PER_ROW * CHUNK);
        keep(at[i]);
      }
    }
    __device__ __forceinline__ u32 operator[](int i) const {
      if constexpr (!REGULAR) return at[i];
      const int row = i * THREADS / PER_ROW;  // further on: a multiple of the thread's first row plus one
      return (at[0] ^ swizzle(row)) + row * PITCH;
    }
  };

  // From a run of bytes; `source` is the thread's first chunk. Chunks from `valid` bytes on read as zeros (PARTIAL).
  template <bool PARTIAL>
  __device__ __forceinline__ static void copy_run(u32 shared, const Places& places, const char* source, int thread,
                                                  int valid) {
#pragma unroll
    for (int i = 0; i < ALL; i += THREADS) {
      const int c = i + thread;
      const u32 at = places[i / THREADS];
      if (i + THREADS <= ALL || c < ALL) {
        if constexpr (PARTIAL) {
          const bool inside = c * CHUNK < valid;
          copy_async<CHUNK>(shared + at, inside ? source + i * CHUNK : source - thread * CHUNK, inside ? CHUNK : 0);
        } else {
          copy_async<CHUNK>(shared + at, source + i * CHUNK);
        }
      }
    }
  }

  // Any strides; rows from `count` on read as zeros.
  __device__ static void copy_rows(u32 shared, const Rows<T>& rows, int first, int count, int thread) {
    if (rows_aligned(rows, CHUNK)) {
      copy_chunks<CHUNK>(shared, rows, first, count, thread);
    } else if constexpr (sizeof(T) == 4) {
      copy_chunks<4>(shared, rows, first, count, thread);
    } else {
      constexpr int PER_ROW = ROW_BYTES / static_cast<int>(sizeof(T));
      for (int c = thread; c < TILE * PER_ROW; c += THREADS) {
        const int row = c / PER_ROW, column = c % PER_ROW;
        T x{};
        if (first + row < count) x = rows.data[(first + row) * rows.row_stride + column * rows.element_stride];
        *reinterpret_cast<T*>(__cvta_shared_to_generic(shared + place(row, column * sizeof(T)))) = x;
      }
    }
  }

 private:
  template <int SIZE>
  __device__ __forceinline__ static void copy_chunks(u32 shared, const Rows<T>& rows, int first, int count,
                                                     int thread) {
    constexpr int PER_ROW = ROW_BYTES / SIZE;
    for (int c = thread; c < TILE * PER_ROW; c += THREADS) {
      const int row = c / PER_ROW, column = c % PER_ROW;
      const bool valid = first + row < count;
      const i64 element = column * (SIZE / static_cast<int>(sizeof(T))) * rows.element_stride;
      const T* source = rows.data + (valid ? (first + row) * rows.row_stride + element : 0);
      copy_async<SIZE>(shared + place(row, column * SIZE), source, valid ? SIZE : 0);
    }
  }
};

// Scales (or biases) of TILE rows, ROW of them each, packed without gaps.
template <int TILE, int THREADS, int ROW_, typename T>
struct ScaleTile {
  static constexpr int ROW = ROW_;
  static constexpr int BYTES = TILE * ROW * static_cast<int>(sizeof(T));

  // Any strides; rows from `count` on read as zeros.
  __device__ static void copy_rows(u32 shared, const Rows<T>& rows, int first, int count, int thread) {
    constexpr int SIZE = sizeof(T), PER_WORD = 4 / SIZE;
    if (ROW % PER_WORD == 0 && rows_aligned(rows, 4)) {
      constexpr int PER_ROW = ROW % PER_WORD == 0 ? ROW / PER_WORD : 1;
      for (int c = thread; c < TILE * PER_ROW; c += THREADS) {
        const int row = c / PER_ROW, column = c % PER_ROW;
        const bool valid = first + row < count;
        const T* source = rows.data + (valid ? (first + row) * rows.row_stride + column * PER_WORD : 0);
        copy_async<4>(shared + c * 4, source, valid ? 4 : 0);
      }
    } else {
      for (int c = thread; c < TILE * ROW; c += THREADS) {
        const int row = c / ROW, column = c % ROW;
        T x{};
        if (first + row < count) x = rows.data[(first + row) * rows.row_stride + column * rows.element_stride];
        *reinterpret_cast<T*>(__cvta_shared_to_generic(shared + c * SIZE)) = x;
      }
    }
  }
};

template <typename T>
__device__ __forceinline__ T load_scale(u32 address) {
  return *reinterpret_cast<const T*>(__cvta_shared_to_generic(address));
}

// COUNT scales of one row of a tile of rows of ROW, from number `first` on. A few are read at once, as words.
template <int ROW, int COUNT, typename T>
struct ScaleRow {
  static constexpr int WORDS = COUNT * static_cast<int>(sizeof(T)) / 4;
  static constexpr bool HELD = sizeof(T) == 2 && ROW % 2 == 0 && COUNT % 2 == 0 && WORDS <= 2;
  u32 address;
  u32 words[HELD ? WORDS : 1];

  ScaleRow() = default;

  __device__ __forceinline__ ScaleRow(u32 tile, int row, int first)
      : address(tile + (row * ROW + first) * static_cast<int>(sizeof(T))) {
    if constexpr (HELD) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[i] = load_word(address + 4 * i);
    }
  }

  __device__ __forceinline__ T operator[](int i) const {
    if constexpr (HELD) {
      return from_bits(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffff);
    } else {
      return load_scale<T>(address + i * sizeof(T));
    }
  }
  __device__ __forceinline__ static T from_bits(unsigned short bits) {
    T x;
    memcpy(&x, &bits, sizeof(T));
    return x;
  }
};

}  // namespace qsdpa
