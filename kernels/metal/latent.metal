  // Absorbed MLA: keys and values are one latent. The latent's dims are shared out over the simdgroups, for both
  // products, so that each number is read once and dequantized once, in registers. A simdgroup has its part of the
  // scores of all rows; the parts are summed in threadgroup memory. Scores are computed as keys times queries^T, in
  // which a lane's numbers of a key lie as they do in the product of weights and values.
  typedef metal::conditional_t<metal::is_same_v<T, half>, half, float> Number;
  constexpr int ROW_TILES = ROWS / 8;
  constexpr int KEY_TILES = TILE / 8;
  constexpr int PACKS = KEY_DIM / (32 * SIMDGROUPS);  // of a key, in a lane
  constexpr int HALF_RUN = 4 * PACKS;
  constexpr int FRAGMENTS = 4 * PACKS;  // of a simdgroup's part of a tile of keys
  constexpr int SHARES = SIMDGROUPS / ROW_TILES < KEY_TILES ? SIMDGROUPS / ROW_TILES : KEY_TILES;
  static_assert(KEY_DIM == VALUE_DIM && KEY_DIM == 32 * PACKS * SIMDGROUPS, "a part of the dims for each simdgroup");

  threadgroup float2 parts[SIMDGROUPS * ROW_TILES * KEY_TILES * 32];
  threadgroup float weights[ROWS * TILE];
  threadgroup float decays[ROWS];
  threadgroup float peaks[ROWS];
  threadgroup float totals[SHARES * ROWS];

  const uint first_head_row = (uint(batch) * query_heads + kv_head * group) * length;  // of queries and output
  const auto head_queries = queries + int64_t(first_head_row) * KEY_DIM;
  const uint pack = PACKS * (4 * simd_gid + at.column / 2);
#if HAS_ROPE
  const auto head_rope_queries = rope_queries + int64_t(first_head_row) * ROPE_DIM;
  const auto head_rope_keys = rope_keys + batch * rope_keys_strides[0] + begin * rope_keys_strides[2];
  const uint rope_key_stride = rope_keys_strides[2];
#endif

  // Of the softmax this lane does two rows, for one of the keys of each tile; in some simdgroups, others have nothing
  // to do. Rows past the last are computed as copies of it and not stored.
  const bool has_rows = simd_gid < ROW_TILES * SHARES;
  const int row_tile = simd_gid % ROW_TILES;
  const int share = simd_gid / ROW_TILES;
  int position[2];
#if HAS_MASK
  int64_t mask_offset[2];
  const int64_t mask_key_stride = mask_shape[3] == 1 ? 0 : mask_strides[3];
#endif
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < 2; i++) {
    const int row = min(first_row + 8 * row_tile + at.column + i, row_count - 1);
    position[i] = row % length;
#if HAS_MASK
    const int head = kv_head * group + row / length;
    mask_offset[i] = offset_in_mask(mask_shape, mask_strides, batch, head, position[i]);
#endif
  }
  float2 peak = Limits<float>::finite_min;
  float2 total = 0.0f;
  float2 out[ROW_TILES * FRAGMENTS];
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < ROW_TILES * FRAGMENTS; i++) {
    out[i] = float2(0.0f);
  }

  RowOffsets key_row = offsets_of_key(at.row, key_strides);
  PackedRun<PACKS> runs[KEY_TILES];
  if (begin < end) {
    MLX_MTL_PRAGMA_UNROLL
    for (int k = 0; k < KEY_TILES; k++) {
      runs[k] = load_run<KEY_MODE, KEY_BITS, KEY_GROUP, PACKS>(
          key_codes_head, key_scales_head, key_biases_head, offsets_ahead(key_row, 8 * k, key_strides, last_key), pack);
    }
  }

  for (int tile = begin; tile < end; tile += TILE) {
    Number numbers[KEY_TILES][2 * HALF_RUN];
    MLX_MTL_PRAGMA_UNROLL
    for (int k = 0; k < KEY_TILES; k++) {
      float exact[2 * HALF_RUN];
      dequantize<KEY_MODE, KEY_BITS>(runs[k], exact);
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < 2 * HALF_RUN; i++) {
        numbers[k][i] = Number(exact[i]);
      }
    }
    // The next tile is under way while this one is computed.
    key_row = offsets_ahead(key_row, TILE, key_strides, last_key);
    MLX_MTL_PRAGMA_UNROLL
    for (int k = 0; k < KEY_TILES; k++) {
      runs[k] = load_run<KEY_MODE, KEY_BITS, KEY_GROUP, PACKS>(
          key_codes_head, key_scales_head, key_biases_head, offsets_ahead(key_row, 8 * k, key_strides, last_key), pack);
    }

    // Parts of the scores: over this simdgroup's dims. A lane has number e of each half of its run in fragment e.
    MLX_MTL_PRAGMA_UNROLL
    for (int r = 0; r < ROW_TILES; r++) {
      uint row[2];
      vec<Number, 2> q[FRAGMENTS];
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < 2; i++) {
        row[i] = min(first_row + 8 * r + at.column + i, row_count - 1);
        const auto run = head_queries + (row[i] * KEY_DIM + HALF_RUN * (8 * simd_gid + at.row));
        MLX_MTL_PRAGMA_UNROLL
        for (int e = 0; e < FRAGMENTS; e++) {
          q[e][i] = Number(run[e]);
        }
      }
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        float2 part = float2(0.0f);
        MLX_MTL_PRAGMA_UNROLL
        for (int e = 0; e < FRAGMENTS; e++) {
          multiply_accumulate(part, vec<Number, 2>(numbers[k][e], numbers[k][HALF_RUN + e]), q[e]);
        }
        part *= scale;
#if HAS_ROPE
        const uint key = min(tile + 8 * k + at.row, count - 1) - begin;
        for (int dim = 8 * simd_gid; dim < ROPE_DIM; dim += 8 * SIMDGROUPS) {
          const auto rope_key = head_rope_keys + (key * rope_key_stride + dim + at.column);
          const auto rope_query = head_rope_queries + (dim + at.row);
          multiply_accumulate(
              part, vec<Number, 2>(Number(rope_key[0]), Number(rope_key[1])),
              vec<Number, 2>(Number(rope_query[row[0] * ROPE_DIM]), Number(rope_query[row[1] * ROPE_DIM])));
        }
#endif
        parts[((simd_gid * ROW_TILES + r) * KEY_TILES + k) * 32 + lane] = part;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (has_rows) {
      float2 scores[KEY_TILES];
      float excess = -numeric_limits<float>::infinity();
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        scores[k] = float2(0.0f);
        MLX_MTL_PRAGMA_UNROLL
        for (int s = 0; s < SIMDGROUPS; s++) {
          scores[k] += parts[((s * ROW_TILES + row_tile) * KEY_TILES + k) * 32 + lane];
        }
        const int key = tile + 8 * k + at.row;
        MLX_MTL_PRAGMA_UNROLL
        for (int i = 0; i < 2; i++) {
          bool visible = key < end;
#if IS_CAUSAL
          visible = visible && key <= count - length + position[i];
#endif
#if HAS_MASK
          const auto mask_value = mask[mask_offset[i] + min(key, count - 1) * mask_key_stride];
#if MASK_IS_BOOL
          visible = visible && mask_value;
#else
          scores[k][i] += float(mask_value);
#endif
#endif
          scores[k][i] = visible ? scores[k][i] : -numeric_limits<float>::infinity();
          excess = max(excess, scores[k][i] - peak[i]);
        }
      }
      // What exponentials are relative to need not be the highest score: it is raised when one exceeds it by a margin.
      float2 decay = 1.0f;
      if (simd_max(excess) > 8.0f) {
        MLX_MTL_PRAGMA_UNROLL
        for (int i = 0; i < 2; i++) {
          float highest = peak[i];
          MLX_MTL_PRAGMA_UNROLL
          for (int k = 0; k < KEY_TILES; k++) {
            highest = max(highest, scores[k][i]);
          }
          highest = column_max(highest);
          decay[i] = fast::exp(peak[i] - highest);
          peak[i] = highest;
          total[i] *= decay[i];
        }
      }
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        if (k % SHARES == share) {
          MLX_MTL_PRAGMA_UNROLL
          for (int i = 0; i < 2; i++) {
            const float weight = fast::exp(scores[k][i] - peak[i]);
            total[i] += weight;
            weights[(row_tile * KEY_TILES + k) * 64 + 8 * (at.column + i) + at.row] = weight;
          }
        }
      }
      if (share == 0 && at.row == 0) {
        decays[8 * row_tile + at.column] = decay[0];
        decays[8 * row_tile + at.column + 1] = decay[1];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float least = 1.0f;
    for (int row = lane; row < ROWS; row += 32) {
      least = min(least, decays[row]);
    }
    if (simd_min(least) < 1.0f) {
      MLX_MTL_PRAGMA_UNROLL
      for (int r = 0; r < ROW_TILES; r++) {
        const float decay = decays[8 * r + at.row];
        MLX_MTL_PRAGMA_UNROLL
        for (int e = 0; e < FRAGMENTS; e++) {
          out[r * FRAGMENTS + e] *= decay;
        }
      }
    }
    MLX_MTL_PRAGMA_UNROLL
    for (int k = 0; k < KEY_TILES; k++) {
      MLX_MTL_PRAGMA_UNROLL
      for (int r = 0; r < ROW_TILES; r++) {
        const threadgroup float* const pair = weights + (r * KEY_TILES + k) * 64 + 8 * at.row + at.column;
        const float2 weight = float2(pair[0], pair[1]);
        MLX_MTL_PRAGMA_UNROLL
        for (int e = 0; e < FRAGMENTS; e++) {
          multiply_accumulate(
              out[r * FRAGMENTS + e], weight, vec<Number, 2>(numbers[k][e], numbers[k][HALF_RUN + e]));
        }
      }
    }
  }

  // The total of each row, and its output.
  if (has_rows) {
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < 2; i++) {
      const float sum = column_sum(total[i]);
      if (at.row == 0) {
        totals[share * ROWS + 8 * row_tile + at.column + i] = sum;
        if (share == 0) {
          peaks[8 * row_tile + at.column + i] = peak[i];
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  MLX_MTL_PRAGMA_UNROLL
  for (int r = 0; r < ROW_TILES; r++) {
    const int row = first_row + 8 * r + at.row;
    if (row >= row_count) {
      continue;
    }
    const int64_t output_row = first_head_row + row;
    float sum = 0.0f;
    for (int s = 0; s < SHARES; s++) {
      sum += totals[s * ROWS + 8 * r + at.row];
    }
    float factor = 1.0f;
#if SPLIT
    if (simd_gid == 0 && at.column == 0) {
      device float* row_stats = stats + 2 * (output_row * splits + split);
      row_stats[0] = peaks[8 * r + at.row];
      row_stats[1] = sum;
    }
    device float* const destination = partials + (output_row * splits + split) * VALUE_DIM + 8 * pack;
    typedef float Output;
#else
#if HAS_SINKS
    const float own_peak = peaks[8 * r + at.row];
    const float sink = float(sinks[(kv_head * group + row / length) * sinks_strides[0]]);
    const float common = max(own_peak, sink);
    factor = fast::exp(own_peak - common);
    sum = sum * factor + fast::exp(sink - common);
#endif
    device T* const destination = output + output_row * VALUE_DIM + 8 * pack;
    typedef T Output;
#endif
    factor = sum > 0.0f ? factor / sum : 0.0f;
    MLX_MTL_PRAGMA_UNROLL
    for (int e = 0; e < FRAGMENTS; e++) {
      destination[e] = Output(out[r * FRAGMENTS + e][0] * factor);
      destination[HALF_RUN + e] = Output(out[r * FRAGMENTS + e][1] * factor);
    }
  }
