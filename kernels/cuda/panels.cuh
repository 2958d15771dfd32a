// Unpacking tiles of 64 rows of codes, of any number of dimensions that is a multiple of 32, into panels of 64 columns
// in shared memory: once, into values of T (16 bits), in the order of dimensions of key_dim().
//
// A thread of a warpgroup has one row and one half of each panel; eight lanes write the same unit of eight rows, which
// lie in distinct banks. Codes of a few panels at a time come into registers first.
#pragma once
#include "unpack.cuh"

namespace qsdpa {

// The codes of 32 dimensions, half a panel's row, with their scales and biases.
template <typename F>
struct PackedHalf {
  using Scale = typename F::Scale;
  // Codes of 64 dimensions lie interleaved where blocks are paired.
  static constexpr int WORDS = (F::PAIRED_BLOCKS ? 64 : 32) * F::BITS / 32;
  static constexpr int SCALES = F::GROUP < 32 ? 32 / F::GROUP : 1;

  u32 codes[WORDS], scales[1], biases[1];

  // Whether loads from these rows may be aligned.
  template <typename Codes, typename Scales>
  __device__ __forceinline__ static bool aligned(const Codes& codes, const Scales& scales, const Scales& biases) {
    constexpr int CODE_ACCESS = access_bytes(4 * WORDS), SCALE_ACCESS = access_bytes(SCALES * sizeof(Scale));
    return rows_aligned(codes, CODE_ACCESS) && rows_aligned(scales, SCALE_ACCESS) &&
           (!F::HAS_BIAS || rows_aligned(biases, SCALE_ACCESS));
  }

  // Where half `half` of a panel begins in a row of codes, and in one of scales.
  __device__ static constexpr int first_word(int panel, int half) {
    return (F::PAIRED_BLOCKS ? panel : 2 * panel + half) * WORDS;
  }
  __device__ static constexpr int first_scale(int panel, int half) {
    return F::GROUP >= 64 ? 64 * panel / F::GROUP : 32 * (2 * panel + half) / F::GROUP;
  }

  // To shared memory, as half `half`: unit number u to place(u).
  template <typename T, typename Place>
  __device__ __forceinline__ void unpack(int half, Place place) {
    if constexpr (F::PAIRED_BLOCKS) {
#pragma unroll
      for (int w = 0; w < WORDS; ++w) codes[w] >>= 8 * half;
    }
    unpack_group<T, 0>(place);
  }

 private:
  template <typename T, int G, typename Place>
  __device__ __forceinline__ void unpack_group(Place place) const {
    if constexpr (G < SCALES) {
      constexpr int UNITS = 4 / SCALES;  // of a group
      const Scale scale = element_of<G, Scale>(scales);
      Scale bias{};
      if constexpr (F::HAS_BIAS) bias = element_of<G, Scale>(biases);
#pragma unroll
      for (int u = G * UNITS; u < (G + 1) * UNITS; ++u) {
        u32 x[4];
        unpack_unit<T, F>(x, codes, 0, u, scale, bias);
        store_unit(place(u), x);
      }
      unpack_group<T, G + 1>(place);
    }
  }
};

// Half a row of zeros.
template <typename Place>
__device__ __forceinline__ void store_zeros(Place place) {
  const u32 zeros[4] = {};
#pragma unroll
  for (int u = 0; u < 4; ++u) store_unit(place(u), zeros);
}

// PANELS: of a tile. Columns from number D on are zeros.
template <typename T, typename F, int D, int PANELS_>
class PanelUnpacker {
  using Scale = typename F::Scale;
  using Packed = PackedHalf<F>;
  static constexpr int BLOCKS = D / 32, WORDS = Packed::WORDS, SCALES = Packed::SCALES;

  const Rows<u32> codes;
  const Rows<Scale> scales, biases;
  const int row, half;

 public:
  static constexpr int PANELS = PANELS_, THREADS = 128;
  static constexpr int AT_A_TIME = WORDS <= 4 ? 4 : 2;  // panels whose codes are in registers
  static constexpr int CHUNKS = (PANELS + AT_A_TIME - 1) / AT_A_TIME;

 private:
  Packed packed[AT_A_TIME];

 public:
  __device__ __forceinline__ PanelUnpacker(const Rows<u32>& codes, const Rows<Scale>& scales, const Rows<Scale>& biases,
                                           int thread)
      : codes(codes),
        scales(scales),
        biases(biases),
        row(thread / 32 * 16 + thread % 32 / 16 * 8 + thread % 8),
        half(thread / 8 % 2) {}

  // Whether ALIGNED is true of them.
  __device__ __forceinline__ bool aligned() const { return Packed::aligned(codes, scales, biases); }

  // The first codes of the tile from row `first` on, of `count` rows.
  template <bool ALIGNED>
  __device__ __forceinline__ void fetch_first(int first, int count) {
    fetch<0, ALIGNED>(first, count);
  }

  // That tile to shared memory.
  template <bool ALIGNED>
  __device__ __forceinline__ void unpack(u32 tile, int first, int count) {
    unpack_chunks<0, ALIGNED>(tile, first, count);
  }

 private:
  // Chunk C, which was fetched, and those after it.
  template <int C, bool ALIGNED>
  __device__ __forceinline__ void unpack_chunks(u32 tile, int first, int count) {
    unpack_chunk<C>(tile);
    if constexpr (C + 1 < CHUNKS) {
      fetch<C + 1, ALIGNED>(first, count);
      unpack_chunks<C + 1, ALIGNED>(tile, first, count);
    }
  }

  // Codes of chunk C of the tile from row `first` on into registers; rows from `count` on repeat the last.
  template <int C, bool ALIGNED>
  __device__ __forceinline__ void fetch(int first, int count) {
    const int at = min(first + row, count - 1);
    const auto code_line = line<ALIGNED>(codes, at);
    const auto scale_line = line<ALIGNED>(scales, at), bias_line = line<ALIGNED>(biases, at);
#pragma unroll
    for (int p = 0; p < AT_A_TIME; ++p) {
      const int panel = C * AT_A_TIME + p, block = 2 * panel + half;
      if (2 * panel >= BLOCKS || block >= BLOCKS) continue;
      const int group = Packed::first_scale(panel, half);
      load_run<WORDS, ALIGNED>(packed[p].codes, code_line, 0, Packed::first_word(panel, half));
      load_run<SCALES, ALIGNED>(packed[p].scales, scale_line, 0, group);
      if constexpr (F::HAS_BIAS) load_run<SCALES, ALIGNED>(packed[p].biases, bias_line, 0, group);
    }
  }

  // What was fetched of chunk C, into the tile.
  template <int C>
  __device__ __forceinline__ void unpack_chunk(u32 tile) {
#pragma unroll
    for (int p = 0; p < AT_A_TIME; ++p) {
      const int panel = C * AT_A_TIME + p;
      if (panel >= PANELS) continue;
      auto unit_place = [&](int u) { return place(tile, panel, u); };
      if (2 * panel >= BLOCKS || 2 * panel + half >= BLOCKS) {
        store_zeros(unit_place);
      } else {
        packed[p].template unpack<T>(half, unit_place);
      }
    }
  }

  // Row number `at`, as a row of its own. Elements of aligned rows follow each other.
  template <bool ALIGNED, typename X>
  __device__ __forceinline__ static Rows<X> line(const Rows<X>& rows, int at) {
    return {rows.data + at * rows.row_stride, 0, ALIGNED ? 1 : rows.element_stride};
  }

  // Where unit number u of the thread's half of a panel goes.
  __device__ __forceinline__ u32 place(u32 tile, int panel, int u) const {
    return ((tile + swizzled(row, 4 * half)) ^ (u << 4)) + panel * PANEL_BYTES;
  }
};

}  // namespace qsdpa
