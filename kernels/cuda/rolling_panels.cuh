// Unpacking tiles into panels as in panels.cuh, a few rows at a time, with loads under way throughout.
//
// A thread of a warpgroup unpacks halves of panels, 32 dimensions of a row at a time. What a warp loads at once is of
// as few rows as possible, so that it touches few lines of memory: four rows by four panels, or eight by two, or
// sixteen. Eight lanes write the same unit of both halves of four rows, which lie in distinct banks. As soon as a half
// is unpacked, the codes of another are fetched into its registers.
//
// It takes more instructions and registers, for addresses. On an H200 tiles of 256 columns of 8 bits gain (a prompt of
// 2,048 over 32,768 keys takes 4.6 ms instead of 6.6), since panels.cuh fetches these in chunks, each of which it waits
// for; so do narrower tiles of 4 bits (192 and 128 columns: 1.44 ms instead of 1.51). Tiles of 256 columns of 4 bits
// are a single chunk and lose (4.4 ms against 4.2), and wider ones of 8 bits do too (11.1 against 10.6).
#pragma once
#include "panels.cuh"

namespace qsdpa {

template <typename T, typename F, int D, int PANELS>
class RollingUnpacker {
  using Scale = typename F::Scale;
  using Packed = PackedHalf<F>;
  static constexpr int BLOCKS = D / 32, WORDS = Packed::WORDS, SCALES = Packed::SCALES;
  static constexpr int SPREAD = PANELS % 4 == 0 ? 4 : PANELS % 2 == 0 ? 2 : 1;  // panels of a warp at one time
  static constexpr int ROWS_APART = 16 / SPREAD;                                // rows of a thread
  static constexpr int AHEAD = WORDS <= 4 ? 4 : 2;                              // halves in registers

  // Rows of an operand, from some column on. Strides of 32 bits make one instruction of an address.
  template <typename X>
  struct Lines {
    const Rows<X> rows;
    const char* data;
    int stride;  // bytes

    __device__ __forceinline__ Lines(const Rows<X>& all, int column)
        : rows{all.data + column * all.element_stride, all.row_stride, all.element_stride},
          data(reinterpret_cast<const char*>(rows.data)),
          stride(static_cast<int>(rows.row_stride * static_cast<int>(sizeof(X)))) {
      keep(data), keep(stride);
    }
    __device__ __forceinline__ friend bool rows_aligned(const Lines& x, int bytes) {
      return rows_aligned(x.rows, bytes) && x.rows.row_stride * static_cast<int>(sizeof(X)) == x.stride;
    }
    // Row number `at`, as a row of its own.
    template <bool ALIGNED>
    __device__ __forceinline__ Rows<X> line(int at) const {
      if constexpr (ALIGNED) {
        const char* there = data + static_cast<i64>(at) * stride;
        __builtin_assume(__isGlobal(there));
        return {reinterpret_cast<const X*>(there), 0, 1};
      }
      return {rows.data + at * rows.row_stride, 0, rows.element_stride};
    }
  };

  const Lines<u32> codes;  // from the first half of the thread on
  const Lines<Scale> scales, biases;
  const int row, block;  // of that half
  const u32 place;       // of its first unit
  Packed packed[AHEAD];

 public:
  __device__ __forceinline__ RollingUnpacker(const Rows<u32>& codes, const Rows<Scale>& scales,
                                             const Rows<Scale>& biases, int thread)
      : RollingUnpacker(codes, scales, biases, thread / 32 * 16 + thread % 32 / 8 % (4 / SPREAD) * 4 + thread % 4,
                        thread % 32 / 8 / (4 / SPREAD), thread / 4 % 2) {}

  // Whether ALIGNED is true of them.
  __device__ __forceinline__ bool aligned() const { return Packed::aligned(codes, scales, biases); }

  // The first codes of the tile from row `first` on, of `count` rows.
  template <bool ALIGNED, int N = 0>
  __device__ __forceinline__ void fetch_first(int first, int count) {
    fetch<N, ALIGNED>(first, count);
    if constexpr (N + 1 < AHEAD) fetch_first<ALIGNED, N + 1>(first, count);
  }

  // That tile to shared memory.
  template <bool ALIGNED, int N = 0>
  __device__ __forceinline__ void unpack(u32 tile, int first, int count) {
    unpack_half<N>(tile);
    fetch<N + AHEAD, ALIGNED>(first, count);
    if constexpr (N + 1 < PANELS) unpack<ALIGNED, N + 1>(tile, first, count);
  }

 private:
  __device__ __forceinline__ RollingUnpacker(const Rows<u32>& codes, const Rows<Scale>& scales,
                                             const Rows<Scale>& biases, int row, int panel, int half)
      : codes(codes, Packed::first_word(panel, half)),
        scales(scales, Packed::first_scale(panel, half)),
        biases(biases, Packed::first_scale(panel, half)),
        row(row),
        block(2 * panel + half),
        place(swizzled(row, 4 * half) + panel * PANEL_BYTES) {}

  // Codes of half number N of the thread, of the tile from row `first` on, into registers; rows from `count` on repeat
  // the last.
  template <int N, bool ALIGNED>
  __device__ __forceinline__ void fetch(int first, int count) {
    if constexpr (N < PANELS) {
      auto& into = packed[N % AHEAD];
      const int at = min(first + row + N % SPREAD * ROWS_APART, count - 1);
      if (is_past<N>()) return;
      constexpr int WORD = Packed::first_word(panel_of(N), 0), SCALE = Packed::first_scale(panel_of(N), 0);
      load_run<WORDS, ALIGNED>(into.codes, codes.template line<ALIGNED>(at), 0, WORD);
      load_run<SCALES, ALIGNED>(into.scales, scales.template line<ALIGNED>(at), 0, SCALE);
      if constexpr (F::HAS_BIAS) load_run<SCALES, ALIGNED>(into.biases, biases.template line<ALIGNED>(at), 0, SCALE);
    }
  }

  // How many panels half number n is further on than the thread's first.
  __device__ static constexpr int panel_of(int n) { return n / SPREAD * SPREAD; }

  // Whether half number N has no dimensions.
  template <int N>
  __device__ __forceinline__ bool is_past() const {
    return 2 * (panel_of(N) + SPREAD) > BLOCKS && 2 * panel_of(N) + block >= BLOCKS;
  }

  template <int N>
  __device__ __forceinline__ void unpack_half(u32 tile) {
    auto unit_place = [&](int u) {
      constexpr int DOWN = N % SPREAD * ROWS_APART;  // rows further down, where units change places
      return ((tile + place) ^ (u << 4) ^ (DOWN % 8 << 4)) + DOWN * 128 + panel_of(N) * PANEL_BYTES;
    };
    if (is_past<N>()) {
      store_zeros(unit_place);
    } else {
      packed[N % AHEAD].template unpack<T>(block % 2, unit_place);
    }
  }
};

// PANELS: of a tile.
template <typename T, typename F, int D, int PANELS, bool ROLLING = PANELS < 4 || (PANELS == 4 && F::BITS > 4)>
struct ChooseUnpacker {
  using Class = PanelUnpacker<T, F, D, PANELS>;
};
template <typename T, typename F, int D, int PANELS>
struct ChooseUnpacker<T, F, D, PANELS, true> {
  using Class = RollingUnpacker<T, F, D, PANELS>;
};

}  // namespace qsdpa
