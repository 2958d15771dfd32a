// Unpacking tiles of 64 rows of codes into shared memory, for the products of wgmma.cuh: once, into values of T (16
// bits), in the order of dimensions of key_dim(). Queries follow it.
//
// A thread unpacks a quarter of the dimensions of one or two rows; eight lanes write the same unit of eight rows, which
// lie in distinct banks. Codes come ahead of time into registers.
#pragma once
#include "formats.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"

namespace qsdpa {

constexpr int TILE_ROWS = 64;
constexpr int PANEL_BYTES = TILE_ROWS * 128;  // of 64 columns of a tile

// Of so many columns.
__device__ constexpr int panels(int columns) { return (columns + PANEL_COLUMNS - 1) / PANEL_COLUMNS; }

__device__ __forceinline__ void store_unit(u32 address, const u32 (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

template <typename X>
__device__ __forceinline__ u32 raw_bits(X x) {
  u32 y = 0;
  memcpy(&y, &x, sizeof(X));
  return y;
}

// The widest access that divides a run of so many bytes.
__device__ constexpr int access_bytes(int run) {
  return run % 16 == 0 ? 16 : run % 8 == 0 ? 8 : run % 4 == 0 ? 4 : run % 2 == 0 ? 2 : 1;
}

// COUNT elements of a row, from number `column` on, to registers as they lie in memory. ALIGNED: to access_bytes().
template <int COUNT, bool ALIGNED, typename X, int WORDS>
__device__ __forceinline__ void load_run(u32 (&words)[WORDS], const Rows<X>& rows, int row, int column) {
  constexpr int BYTES = COUNT * static_cast<int>(sizeof(X)), SIZE = access_bytes(BYTES);
  static_assert(BYTES <= 4 * WORDS, "the registers hold the run");
  const X* source = rows.data + row * rows.row_stride + column * rows.element_stride;
  if constexpr (!ALIGNED) {
    constexpr int PER_WORD = 4 / static_cast<int>(sizeof(X));
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      words[w] = 0;
#pragma unroll
      for (int i = 0; i < PER_WORD; ++i)
        if (w * PER_WORD + i < COUNT)
          words[w] |= raw_bits(source[(w * PER_WORD + i) * rows.element_stride]) << (32 / PER_WORD * i % 32);
    }
  } else if constexpr (SIZE == 16) {
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i) {
      const uint4 x = reinterpret_cast<const uint4*>(source)[i];
      words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
    }
  } else if constexpr (SIZE == 8) {
#pragma unroll
    for (int i = 0; i < BYTES / 8; ++i) {
      const uint2 x = reinterpret_cast<const uint2*>(source)[i];
      words[2 * i] = x.x, words[2 * i + 1] = x.y;
    }
  } else if constexpr (SIZE == 4) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) words[i] = reinterpret_cast<const u32*>(source)[i];
  } else {
    static_assert(BYTES <= 2, "runs of other lengths are whole words");
    words[0] = BYTES == 2 ? *reinterpret_cast<const unsigned short*>(source)
                          : *reinterpret_cast<const unsigned char*>(source);
  }
}

// Element I of what load_run() gave.
template <int I, typename X, int WORDS>
__device__ __forceinline__ X element_of(const u32 (&words)[WORDS]) {
  constexpr int PER_WORD = 4 / static_cast<int>(sizeof(X));
  const u32 bits = words[I / PER_WORD] >> (32 / PER_WORD * (I % PER_WORD) % 32);
  X x;
  memcpy(&x, &bits, sizeof(X));
  return x;
}

// Eight elements in two runs of four, as `place` (from key_dim() to a number of the eight) pairs them.
template <typename F, int HIGH>
__device__ __forceinline__ void pair_elements(u32 (&x)[4], const u32 (&elements)[8]) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    constexpr auto place = [](int dim) { return dim < 4 ? dim : dim - HIGH + 4; };
    x[p] = elements[place(key_dim<F>(0, 0, p, 0))] | elements[place(key_dim<F>(0, 0, p, 1))] << 16;
  }
}

// The same of two runs in registers.
template <typename F, int HIGH>
__device__ __forceinline__ void pair_runs(u32 (&x)[4], uint2 low, uint2 high) {
  const u32 words[4] = {low.x, low.y, high.x, high.y};
  u32 elements[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) elements[i] = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffff;
  pair_elements<F, HIGH>(x, elements);
}

// Between the two runs of four dimensions of a unit.
template <typename F>
__device__ constexpr int run_distance() {
  return F::PAIRED_BLOCKS ? 8 : F::BITS == 8 ? 16 : 4;
}

// Rows of queries into shared memory, in the order of dimensions of the tiles, by WARPS warps: `row_of` gives a row's
// first element. Columns past the last, up to a whole panel, are zeros. ALIGNED: elements follow each other, and rows
// begin at multiples of 8 bytes.
template <typename F, int D, int ROWS, int WARPS, bool ALIGNED, typename RowOf>
__device__ __forceinline__ void load_queries(u32 tile, int warp, i64 stride, RowOf row_of) {
  constexpr int HIGH = run_distance<F>();
  constexpr int UNROLL = ALIGNED ? 4 : 1;                             // little code: it runs once, and must be fetched
  const int lane = threadIdx.x % 32;
#pragma unroll UNROLL
  for (int row = warp; row < ROWS; row += WARPS) {
    const auto* source = row_of(row);
#pragma unroll
    for (int unit = lane; unit < panels(D) * 8; unit += 32) {
      u32 x[4] = {};
      if (D % PANEL_COLUMNS == 0 || unit < D / 8) {
        const int first = key_dim<F>(unit / 4, unit % 4, 0, 0);
        if constexpr (ALIGNED) {
          pair_runs<F, HIGH>(x, *reinterpret_cast<const uint2*>(source + first),
                             *reinterpret_cast<const uint2*>(source + first + HIGH));
        } else {
          u32 elements[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) elements[i] = raw_bits(source[(first + i % 4 + i / 4 * HIGH) * stride]);
          pair_elements<F, HIGH>(x, elements);
        }
      }
      store_unit(tile + unit / 8 * PANEL_BYTES + swizzled(row, unit % 8), x);
    }
  }
}

// Likewise, of aligned rows, with all loads of a thread under way at once. `offset_of` gives a row's distance from
// `queries`; a lane finds that of one row. (Addresses themselves, handed on, would no longer be known to be global.)
template <typename F, int D, int ROWS, int WARPS, typename T, typename OffsetOf>
__device__ __forceinline__ void load_queries_at_once(u32 tile, int warp, const T* queries, OffsetOf offset_of) {
  constexpr int EACH = ROWS / WARPS, UNITS = D / 8 / 32, HIGH = run_distance<F>();  // rows of a warp, units of a lane
  static_assert(EACH <= 32 && D % 256 == 0, "lanes have a row each, and the same number of units");
  const int lane = threadIdx.x % 32;
  const i64 offset = offset_of(warp + lane % EACH * WARPS);
  uint2 low[EACH][UNITS], high[EACH][UNITS];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const uint2* row = reinterpret_cast<const uint2*>(queries + __shfl_sync(~0u, offset, i));
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const int unit = u * 32 + lane, first = key_dim<F>(unit / 4, unit % 4, 0, 0);
      low[i][u] = row[first / 4], high[i][u] = row[(first + HIGH) / 4];
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i)
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const int unit = u * 32 + lane;
      u32 x[4];
      pair_runs<F, HIGH>(x, low[i][u], high[i][u]);
      store_unit(tile + unit / 8 * PANEL_BYTES + swizzled(warp + i * WARPS, unit % 8), x);
    }
}

// Eight elements of a row as they are. `aligned`: to 8 bytes.
template <typename T>
__device__ __forceinline__ void load_unit(u32 (&x)[4], const T* source, i64 stride, bool aligned) {
  if (aligned) {
    const uint2 low = reinterpret_cast<const uint2*>(source)[0], high = reinterpret_cast<const uint2*>(source)[1];
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  } else {
#pragma unroll
    for (int p = 0; p < 4; ++p) x[p] = raw_bits(source[2 * p * stride]) | raw_bits(source[(2 * p + 1) * stride]) << 16;
  }
}

// Codes of four bits as the pairs of take_nibbles(), in bfloat16: it has room for them beside the 128 of 0x4300, so
// that integers need no detour over halves and float32.
template <typename F>
__device__ __forceinline__ void take_bfloat16_nibbles(u32 (&x)[4], u32 w) {
  constexpr u32 ONE = 0x3f803f80u, LESS_BASE = F::CENTER == 8 ? 0xc308c308u : 0xc300c300u;  // -136 or -128
  static_assert(F::CENTER == 0 || F::CENTER == 8, "of four bits");
#pragma unroll
  for (int p = 0; p < 4; ++p) x[p] = fma_bfloat162(and_or(w >> (4 * p), 0x000f000fu, 0x43004300u), ONE, LESS_BASE);
}

// Codes (exact halves) to values of T.
template <typename T, typename F>
__device__ __forceinline__ void apply_scale(u32 (&x)[4], typename F::Scale scale, typename F::Scale bias) {
  constexpr bool BF16 = IsBfloat16<T>::value;
  if constexpr (sizeof(scale) == 2 && !BF16) {
    const u32 s = raw_bits(scale) * 0x10001u, b = F::HAS_BIAS ? raw_bits(bias) * 0x10001u : 0;
#pragma unroll
    for (int p = 0; p < 4; ++p) x[p] = F::HAS_BIAS ? fma_half2(x[p], s, b) : mul_half2(x[p], s);
  } else {
    float s, b = 0.0f;
    if constexpr (F::MODE == NVFP4) {
      s = low_half(e4m3_pair(scale, 0)) * F::CODE_FACTOR;
    } else {
      s = scale_value(scale) * F::CODE_FACTOR;
    }
    if constexpr (F::HAS_BIAS) b = scale_value(bias);
#pragma unroll
    for (int p = 0; p < 4; ++p) x[p] = pack_pair<BF16>(fmaf(low_half(x[p]), s, b), fmaf(high_half(x[p]), s, b));
  }
}

// Unit number t of block number `block` of codes in registers, as values of T: see unpack_keys().
template <typename T, typename F, int WORDS>
__device__ __forceinline__ void unpack_unit(u32 (&x)[4], const u32 (&codes)[WORDS], int block, int t,
                                            typename F::Scale scale, typename F::Scale bias) {
  constexpr bool INTEGERS = F::MODE == AFFINE || F::MODE == SYMMETRIC;
  if constexpr (IsBfloat16<T>::value && INTEGERS && F::BITS == 4 && sizeof(scale) == 2) {
    take_bfloat16_nibbles<F>(x, codes[4 * block + t]);
    const u32 s = raw_bits(scale) * 0x10001u, b = F::HAS_BIAS ? raw_bits(bias) * 0x10001u : 0x80008000u;
#pragma unroll
    for (int p = 0; p < 4; ++p) x[p] = fma_bfloat162(x[p], s, b);
  } else {
    unpack_keys<F>(x, codes, block, t);
    apply_scale<T, F>(x, scale, bias);
  }
}

// Of one operand, by THREADS threads. A thread fetches up to MOST_WORDS words of codes ahead.
template <typename T, typename F, int D, int THREADS, int MOST_WORDS>
class TileUnpacker {
  using Scale = typename F::Scale;
  static constexpr int PASSES = TILE_ROWS * 4 / THREADS;  // rows of a thread, eight apart
  static constexpr int SPAN = D / 4, WORDS = SPAN * F::BITS / 32;
  static constexpr int AHEAD = PASSES * WORDS <= MOST_WORDS ? PASSES : 1;  // rows of the next tile that registers hold
  static constexpr int SCALES = SPAN >= F::GROUP ? SPAN / F::GROUP : 1;
  static constexpr int SCALE_WORDS = (SCALES * static_cast<int>(sizeof(Scale)) + 3) / 4;
  static_assert(D % 256 == 0, "a quarter of the dimensions is made of panels");

  const Rows<u32> codes;
  const Rows<Scale> scales, biases;
  const int row, quarter;
  struct {
    u32 codes[WORDS], scales[SCALE_WORDS], biases[SCALE_WORDS];
  } packed[PASSES];

 public:
  __device__ __forceinline__ TileUnpacker(const Rows<u32>& codes, const Rows<Scale>& scales, const Rows<Scale>& biases,
                                          int thread)
      : codes(codes),
        scales(scales),
        biases(biases),
        row(thread / 32 * 8 * PASSES + thread % 8),
        quarter(thread % 32 / 8) {}

  // Whether fetch<true>() may read them.
  __device__ __forceinline__ bool aligned() const {
    constexpr int SCALE_ACCESS = access_bytes(SCALES * sizeof(Scale));
    return rows_aligned(codes, access_bytes(4 * WORDS)) && rows_aligned(scales, SCALE_ACCESS) &&
           (!F::HAS_BIAS || rows_aligned(biases, SCALE_ACCESS));
  }

  // Codes of the tile from row `first` on into registers, or their first rows; rows from `count` on repeat the last.
  template <bool ALIGNED>
  __device__ __forceinline__ void fetch(int first, int count) {
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      if (i < AHEAD) {
        fetch_row<ALIGNED>(i, first, count);
      } else {
        prefetch(codes.data + row_number(i, first, count) * codes.row_stride + quarter * WORDS * codes.element_stride);
      }
    }
  }

  // What was fetched, and the rest, into the tile.
  template <bool ALIGNED>
  __device__ __forceinline__ void unpack(u32 tile, int first, int count) {
    const u32 panel = tile + quarter * (SPAN / PANEL_COLUMNS) * PANEL_BYTES;
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      if (i >= AHEAD) fetch_row<ALIGNED>(i, first, count);
      unpack_groups<0>(panel, i);
    }
  }

 private:
  __device__ __forceinline__ int row_number(int i, int first, int count) const {
    return min(first + row + 8 * i, count - 1);
  }

  template <bool ALIGNED>
  __device__ __forceinline__ void fetch_row(int i, int first, int count) {
    const int at = row_number(i, first, count);
    load_run<WORDS, ALIGNED>(packed[i].codes, codes, at, quarter * WORDS);
    load_run<SCALES, ALIGNED>(packed[i].scales, scales, at, quarter * SPAN / F::GROUP);
    if constexpr (F::HAS_BIAS) load_run<SCALES, ALIGNED>(packed[i].biases, biases, at, quarter * SPAN / F::GROUP);
  }

  template <int G>
  __device__ __forceinline__ void unpack_groups(u32 panel, int i) const {
    if constexpr (G < SCALES) {
      constexpr int UNITS = SPAN / 8 / SCALES;  // of a group
      // Units stored together. One by one they share registers, and each waits until those of the last were read.
      constexpr int BATCH = UNITS < 4 ? UNITS : 4;
      const Scale scale = element_of<G, Scale>(packed[i].scales);
      Scale bias{};
      if constexpr (F::HAS_BIAS) bias = element_of<G, Scale>(packed[i].biases);
#pragma unroll
      for (int u = G * UNITS; u < (G + 1) * UNITS; u += BATCH) {
        u32 x[BATCH][4];
#pragma unroll
        for (int v = 0; v < BATCH; ++v)
          unpack_unit<T, F>(x[v], packed[i].codes, (u + v) / 4, (u + v) % 4, scale, bias);
#pragma unroll
        for (int v = 0; v < BATCH; ++v)
          store_unit(panel + (u + v) / 8 * PANEL_BYTES + swizzled(row + 8 * i, (u + v) % 8), x[v]);
      }
      unpack_groups<G + 1>(panel, i);
    }
  }
};

}  // namespace qsdpa
