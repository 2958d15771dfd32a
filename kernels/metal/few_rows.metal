  // Attention of up to 4 rows, too few to fill 8x8 matrices, with ordinary multiply-adds. A lane multiplies packs of
  // the same keys as in matrix.metal; folding the sums over lanes leaves each lane with the scores of one key of the
  // tile. Then LANES lanes share a key's values, a pack or two each; where they do not divide 32, the last lanes do the
  // work of others for nothing.
  constexpr int KEY_TILES = 4;
  constexpr int KEY_PACKS = ROWS <= 2 && KEY_DIM % 128 == 0 ? 2 : 1;
  constexpr int KEY_RUN = 8 * KEY_PACKS;  // numbers of a key that a lane has at a time
  constexpr int VALUE_PACKS = VALUE_DIM > 256 ? 2 : 1;
  constexpr int VALUE_RUN = 8 * VALUE_PACKS;
  constexpr int LANES = VALUE_DIM / VALUE_RUN;
  constexpr int KEYS_AT_ONCE = 32 / LANES;
  constexpr int READS = TILE / KEYS_AT_ONCE < 4 ? TILE / KEYS_AT_ONCE : 4;  // of values, under way at a time
  static_assert(TILE == 8 * KEY_TILES && TILE % KEYS_AT_ONCE == 0, "a lane has one key of a tile");

  threadgroup float weights[SIMDGROUPS * TILE * ROWS];
  threadgroup float outputs[SIMDGROUPS * 32 * VALUE_RUN];
  threadgroup float peaks[SIMDGROUPS * ROWS];
  threadgroup float totals[SIMDGROUPS * ROWS];

  const int64_t first_output_row = (int64_t(batch) * query_heads + kv_head * group) * length;
  const auto head_queries = queries + first_output_row * KEY_DIM;
#if HAS_MASK
  const int64_t mask_key_stride = mask_shape[3] == 1 ? 0 : mask_strides[3];
#endif
  const int own_key = min(lane / LANES, KEYS_AT_ONCE - 1);
  float out[ROWS][VALUE_RUN];
  float peak[ROWS];
  float total[ROWS];
  MLX_MTL_PRAGMA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    peak[r] = Limits<float>::finite_min;
    total[r] = 0.0f;
    MLX_MTL_PRAGMA_UNROLL
    for (int e = 0; e < VALUE_RUN; e++) {
      out[r][e] = 0.0f;
    }
  }

  RowOffsets key_row = offsets_of_key(simd_gid * TILE + at.column, key_strides);
  RowOffsets value_row = offsets_of_key(simd_gid * TILE + own_key, value_strides);
  for (int tile = begin + simd_gid * TILE; tile < end; tile += SIMDGROUPS * TILE) {
    // Partial scores of two keys in each of KEY_TILES tiles, as [which of the two][tile][row].
    float scores[2 * KEY_TILES * ROWS];
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < 2 * KEY_TILES * ROWS; i++) {
      scores[i] = 0.0f;
    }
    for (int chunk = 0; chunk < (KEY_DIM + 8 * KEY_RUN - 1) / (8 * KEY_RUN); chunk++) {
      const uint pack = KEY_PACKS * (8 * chunk + at.row);
      if (KEY_DIM % 64 == 0 || pack < KEY_DIM / 8) {
        float q[ROWS][KEY_RUN];
        MLX_MTL_PRAGMA_UNROLL
        for (int r = 0; r < ROWS; r++) {
          load_numbers<KEY_DIM, KEY_RUN>(head_queries, r * KEY_DIM, 8 * pack, q[r]);
        }
        MLX_MTL_PRAGMA_UNROLL
        for (int i = 0; i < 2 * KEY_TILES; i++) {
          const RowOffsets row = offsets_ahead(key_row, 8 * (i % KEY_TILES) + i / KEY_TILES, key_strides, last_key);
          float numbers[KEY_RUN];
          dequantize<KEY_MODE, KEY_BITS, KEY_GROUP, KEY_PACKS>(
              key_codes_head, key_scales_head, key_biases_head, row, pack, numbers);
          MLX_MTL_PRAGMA_UNROLL
          for (int r = 0; r < ROWS; r++) {
            MLX_MTL_PRAGMA_UNROLL
            for (int e = 0; e < KEY_RUN; e++) {
              scores[i * ROWS + r] = fma(q[r][e], numbers[e], scores[i * ROWS + r]);
            }
          }
        }
      }
    }
    key_row = offsets_ahead(key_row, SIMDGROUPS * TILE, key_strides, last_key);
    fold<8 * ROWS, 16>(scores, lane);
    fold<4 * ROWS, 4>(scores, lane);
    fold<2 * ROWS, 2>(scores, lane);
    const int in_tile = 8 * (at.row % 4) + at.column + at.row / 4;
    const int key = tile + in_tile;

    float excess = -numeric_limits<float>::infinity();
    MLX_MTL_PRAGMA_UNROLL
    for (int r = 0; r < ROWS; r++) {
      float score = scores[r] * scale;
      bool visible = key < end;
      const int position = r % length;
#if IS_CAUSAL
      visible = visible && key <= count - length + position;
#endif
#if HAS_MASK
      const int64_t row_mask = offset_in_mask(mask_shape, mask_strides, batch, kv_head * group + r / length, position);
      const auto mask_value = mask[row_mask + min(key, count - 1) * mask_key_stride];
#if MASK_IS_BOOL
      visible = visible && mask_value;
#else
      score += float(mask_value);
#endif
#endif
      scores[r] = visible ? score : -numeric_limits<float>::infinity();
      excess = max(excess, scores[r] - peak[r]);
    }
    // What exponentials are relative to need not be the highest score: it is raised when one exceeds it by a margin.
    if (simd_max(excess) > 8.0f) {
      MLX_MTL_PRAGMA_UNROLL
      for (int r = 0; r < ROWS; r++) {
        const float new_peak = max(peak[r], simd_max(scores[r]));
        const float decay = fast::exp(peak[r] - new_peak);
        peak[r] = new_peak;
        total[r] *= decay;
        MLX_MTL_PRAGMA_UNROLL
        for (int e = 0; e < VALUE_RUN; e++) {
          out[r][e] *= decay;
        }
      }
    }
    MLX_MTL_PRAGMA_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const float weight = fast::exp(scores[r] - peak[r]);
      total[r] += weight;
      weights[(simd_gid * TILE + in_tile) * ROWS + r] = weight;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    // Keys past the last have no weight.
    for (int first = 0; first < TILE; first += READS * KEYS_AT_ONCE) {
      PackedRun<VALUE_PACKS> runs[READS];
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < READS; i++) {
        runs[i] = load_run<VALUE_MODE, VALUE_BITS, VALUE_GROUP, VALUE_PACKS>(
            value_codes_head, value_scales_head, value_biases_head,
            offsets_ahead(value_row, i * KEYS_AT_ONCE, value_strides, last_value), VALUE_PACKS * (lane % LANES));
      }
      value_row = offsets_ahead(value_row, READS * KEYS_AT_ONCE, value_strides, last_value);
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < READS; i++) {
        float numbers[VALUE_RUN];
        dequantize<VALUE_MODE, VALUE_BITS>(runs[i], numbers);
        MLX_MTL_PRAGMA_UNROLL
        for (int r = 0; r < ROWS; r++) {
          const float weight = weights[(simd_gid * TILE + first + i * KEYS_AT_ONCE + own_key) * ROWS + r];
          MLX_MTL_PRAGMA_UNROLL
          for (int e = 0; e < VALUE_RUN; e++) {
            out[r][e] = fma(weight, numbers[e], out[r][e]);
          }
        }
      }
    }
    value_row = offsets_ahead(value_row, (SIMDGROUPS - 1) * TILE, value_strides, last_value);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Merge what lanes and simdgroups have summed over their keys.
  MLX_MTL_PRAGMA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    total[r] = simd_sum(total[r]);
    if (lane == 0) {
      peaks[simd_gid * ROWS + r] = peak[r];
      totals[simd_gid * ROWS + r] = total[r];
    }
  }
  MLX_MTL_PRAGMA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    MLX_MTL_PRAGMA_UNROLL
    for (int e = 0; e < VALUE_RUN; e++) {
      outputs[(simd_gid * 32 + lane) * VALUE_RUN + e] = out[r][e];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float common = Limits<float>::finite_min;
    for (int s = 0; s < SIMDGROUPS; s++) {
      common = max(common, peaks[s * ROWS + r]);
    }
#if !SPLIT && HAS_SINKS
    const float sink = float(sinks[(kv_head * group + r / length) * sinks_strides[0]]);
    common = max(common, sink);
#endif
    float sum = 0.0f;
    for (int s = 0; s < SIMDGROUPS; s++) {
      sum += totals[s * ROWS + r] * fast::exp(peaks[s * ROWS + r] - common);
    }
#if SPLIT
    if (thread_index_in_threadgroup == 0) {
      device float* row_stats = stats + 2 * ((first_output_row + r) * splits + split);
      row_stats[0] = common;
      row_stats[1] = sum;
    }
#elif HAS_SINKS
    sum += fast::exp(sink - common);
#endif
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int i = int(thread_index_in_threadgroup); i < VALUE_DIM; i += 32 * SIMDGROUPS) {
      float merged = 0.0f;
      for (int s = 0; s < SIMDGROUPS; s++) {
        float own = 0.0f;
        for (int k = 0; k < KEYS_AT_ONCE; k++) {
          own += outputs[s * 32 * VALUE_RUN + k * VALUE_DIM + i];
        }
        merged += own * fast::exp(peaks[s * ROWS + r] - common);
      }
#if SPLIT
      partials[((first_output_row + r) * splits + split) * VALUE_DIM + i] = merged * inverse;
#else
      output[(first_output_row + r) * VALUE_DIM + i] = T(merged * inverse);
#endif
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
