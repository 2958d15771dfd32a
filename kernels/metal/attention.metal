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
// Scores: queries (rows x dims) times keys (dims x keys). A contraction may be permuted freely, so a chunk of 64 dims is
// eight fragments, where fragment e takes number e of each of eight packs: a lane dequantizes one pack of each of its
// two keys, and reads 16 consecutive numbers of its query row.
//
// Output: weights (rows x keys) times values (keys x dims). The columns may be permuted too: of a chunk of 32 dims, a
// lane dequantizes one pack of its key, which is its part of four fragments, and ends with 8 consecutive numbers of its
// output row.

// Numbers `pack` and `pack + 1` of a row of plain floats; zeros past its end.
template <int DIM, typename Row>
inline void load_query(Row row, int pack, thread float* q) {
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 16; i++) {
    q[i] = (DIM % 64 == 0 || pack + i / 8 < DIM / 8) ? float(row[8 * pack + i]) : 0.0f;
  }
}

// scores += queries keys^T over one chunk, for one tile of 8 rows and one of 8 keys. `k`: 8 numbers of each of two keys.
inline void add_scores(thread float2& scores, const thread float* q, const thread float* k0, const thread float* k1) {
  MLX_MTL_PRAGMA_UNROLL
  for (int e = 0; e < 8; e++) {
    multiply_accumulate(scores, float2(q[e], q[8 + e]), float2(k0[e], k1[e]));
  }
}

// out += weights values for one tile of 8 keys, of which this lane has the one whose row is given, over CHUNKS chunks of
// 32 dims from `first_chunk` on.
template <
    int MODE,
    int BITS,
    int GROUP,
    int ALL_CHUNKS,
    int ROW_TILES,
    int CHUNKS,
    typename Codes,
    typename Scales>
inline void add_values(
    Codes codes,
    Scales scales,
    Scales biases,
    int first_chunk,
    FragmentPosition at,
    const thread float2* weights,
    thread float2* out) {
  MLX_MTL_PRAGMA_UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    if (first_chunk + c < ALL_CHUNKS) {
      float numbers[8];
      dequantize_pack<MODE, BITS, GROUP>(codes, scales, biases, 4 * (first_chunk + c) + at.column / 2, numbers);
      MLX_MTL_PRAGMA_UNROLL
      for (int e = 0; e < 4; e++) {
        MLX_MTL_PRAGMA_UNROLL
        for (int r = 0; r < ROW_TILES; r++) {
          multiply_accumulate(out[r * 4 * CHUNKS + 4 * c + e], weights[r], float2(numbers[2 * e], numbers[2 * e + 1]));
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
    const float keep = upper ? v[j + COUNT / 2] : v[j];
    const float give = upper ? v[j] : v[j + COUNT / 2];
    v[j] = keep + simd_shuffle_xor(give, ushort(MASK));
  }
}
