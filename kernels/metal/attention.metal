// Where the mask of a query row begins. Dims of size 1 broadcast.
inline int64_t offset_in_mask(
    const constant int* shape,
    const constant int64_t* strides,
    int batch,
    int head,
    int position) {
  return (shape[0] == 1 ? 0 : batch * strides[0]) + (shape[1] == 1 ? 0 : head * strides[1]) +
      (shape[2] == 1 ? 0 : position * strides[2]);
}

// The two products of attention, on fragments.
//
// Both may permute freely what they run over, so that a lane reads whole packs: PACKS neighbours of a row, which are in
// one group.
//
// Scores: queries (rows x dims) times keys (dims x keys). Of a chunk of 64 PACKS dims a lane dequantizes PACKS packs of
// each of its two keys, and reads 16 PACKS consecutive numbers of its query row. Fragment e of 8 PACKS takes number e
// of each lane's run.
//
// Output: weights (rows x keys) times values (keys x dims). Of a chunk of 32 PACKS dims, a lane dequantizes PACKS packs
// of its key, which are its part of 4 PACKS fragments, and ends with 8 PACKS consecutive numbers of its output row.

// COUNT numbers of a row of DIM plain ones that begins at `row`, from number `first` on; zeros past its end.
template <int DIM, int COUNT, typename Rows>
inline void load_numbers(Rows rows, uint row, uint first, thread float* numbers) {
  const auto run = rows + (row + first);
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < COUNT; i++) {
    numbers[i] = (DIM % 64 == 0 || first + i < DIM) ? float(run[i]) : 0.0f;
  }
}

// scores += queries keys^T over one chunk, for one tile of 8 rows and one of 8 keys. `q`: two runs of COUNT numbers of
// a row; `k`: one of each of two keys. The chunk is summed by itself, so that after a large product fewer sums are
// rounded to its size.
template <int COUNT>
inline void add_scores(thread float2& scores, const thread float* q, const thread float* k0, const thread float* k1) {
  float2 part = float2(0.0f);
  MLX_MTL_PRAGMA_UNROLL
  for (int e = 0; e < COUNT; e++) {
    multiply_accumulate(part, float2(q[e], q[COUNT + e]), float2(k0[e], k1[e]));
  }
  scores += part;
}

// out += weights values for one tile of 8 keys, of which this lane has the one that lies at `row`, over CHUNKS chunks
// of 32 PACKS dims from `first_chunk` on.
template <
    int MODE,
    int BITS,
    int GROUP,
    int PACKS,
    int ALL_CHUNKS,
    int ROW_TILES,
    int CHUNKS,
    typename Codes,
    typename Scales>
inline void add_values(
    Codes codes,
    Scales scales,
    Scales biases,
    RowOffsets row,
    int first_chunk,
    FragmentPosition at,
    const thread float2* weights,
    thread float2* out) {
  MLX_MTL_PRAGMA_UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    if (first_chunk + c < ALL_CHUNKS) {
      float numbers[8 * PACKS];
      const uint pack = PACKS * (4 * (first_chunk + c) + at.column / 2);
      dequantize<MODE, BITS, GROUP, PACKS>(codes, scales, biases, row, pack, numbers);
      MLX_MTL_PRAGMA_UNROLL
      for (int e = 0; e < 4 * PACKS; e++) {
        MLX_MTL_PRAGMA_UNROLL
        for (int r = 0; r < ROW_TILES; r++) {
          multiply_accumulate(
              out[4 * PACKS * (r * CHUNKS + c) + e], weights[r], float2(numbers[2 * e], numbers[2 * e + 1]));
        }
      }
    }
  }
}

// The sums of COUNT values over the two lanes that differ in the bit MASK. Each of them gets the half of the sums that
// its bit selects, in the first half of `v`: half as many exchanges as values.
template <int COUNT, int MASK>
inline void fold(thread float* v, uint lane) {
  const bool upper = (lane & MASK) != 0;
  MLX_MTL_PRAGMA_UNROLL
  for (int j = 0; j < COUNT / 2; j++) {
    const float low = v[j], high = v[j + COUNT / 2];  // both read: a choice of addresses would keep `v` in memory
    const float keep = upper ? high : low;
    const float give = upper ? low : high;
    v[j] = keep + simd_shuffle_xor(give, ushort(MASK));
  }
}
