  // Attention with 8x8 matrix products, for any number of rows. TEAM false: each simdgroup takes tiles of keys of its
  // own, keeps the whole output in registers, and they are merged at the end. TEAM true: the output's dims are shared
  // out over the simdgroups, which exchange their weights at each tile.
  constexpr int ROW_TILES = ROWS / 8;
  constexpr int KEY_TILES = TILE / 8;
  constexpr int SLICES = TEAM ? (VALUE_DIM / 32 + SIMDGROUPS - 1) / SIMDGROUPS : VALUE_DIM / 32;  // of 32 dims
  // Registers: what is summed, and queries and keys for one pack of each. A lane has 128; some 16 go into addresses.
  constexpr int SUM_REGISTERS = ROW_TILES * (8 * SLICES + 2 * KEY_TILES);
  constexpr int QUERY_TILES = KEY_TILES > 1 ? ROW_TILES : 1;  // kept for several tiles of keys
  constexpr int KEY_PACKS = KEY_DIM % 128 == 0 && SUM_REGISTERS + 2 * 16 * (QUERY_TILES + 1) <= 112 ? 2 : 1;
  constexpr int KEY_RUN = 8 * KEY_PACKS;  // numbers of a key that a lane has at a time
  constexpr int VALUE_PACKS = VALUE_DIM % 64 == 0 && SLICES % 2 == 0 ? 2 : 1;
  constexpr int VALUE_RUN = 8 * VALUE_PACKS;
  constexpr int VALUE_CHUNKS = VALUE_DIM / (32 * VALUE_PACKS);
  constexpr int CHUNKS = SLICES / VALUE_PACKS;  // of one simdgroup
  constexpr int FRAGMENTS = 4 * VALUE_PACKS * CHUNKS;  // of its output, for each tile of rows
  constexpr int WEIGHT_FRAGMENTS = TEAM ? SIMDGROUPS * KEY_TILES * ROW_TILES : 1;
  constexpr int UNITS = 2 / VALUE_PACKS;  // chunks of output merged at a time
  constexpr int UNIT = 256 * VALUE_PACKS;
  constexpr int SHARED = TEAM ? WEIGHT_FRAGMENTS * 64 : SIMDGROUPS * UNITS * UNIT;

  constexpr int STEP = SIMDGROUPS * TILE;
  threadgroup float shared[SHARED];
  threadgroup float peaks[SIMDGROUPS * ROWS];
  threadgroup float totals[SIMDGROUPS * ROWS];

  // Rows past the last are computed as copies of it and not stored.
  const uint first_head_row = (uint(batch) * query_heads + kv_head * group) * length;  // of queries and output
  uint row_of_head[ROW_TILES];
  int position[ROW_TILES];
#if HAS_MASK
  int64_t mask_offset[ROW_TILES];
  const int64_t mask_key_stride = mask_shape[3] == 1 ? 0 : mask_strides[3];
#endif
  MLX_MTL_PRAGMA_UNROLL
  for (int r = 0; r < ROW_TILES; r++) {
    const int row = min(first_row + 8 * r + at.row, row_count - 1);
    position[r] = row % length;
    row_of_head[r] = row;
#if HAS_MASK
    const int head = kv_head * group + row / length;
    mask_offset[r] = offset_in_mask(mask_shape, mask_strides, batch, head, position[r]);
#endif
  }

  const auto head_queries = queries + int64_t(first_head_row) * KEY_DIM;
#if HAS_ROPE
  const auto head_rope_queries = rope_queries + int64_t(first_head_row) * ROPE_DIM;
  const auto head_rope_keys = rope_keys + batch * rope_keys_strides[0] + begin * rope_keys_strides[2];
  const uint rope_key_stride = rope_keys_strides[2];
#endif

  float2 out[ROW_TILES * FRAGMENTS];
  float peak[ROW_TILES];
  float total[ROW_TILES];
  MLX_MTL_PRAGMA_UNROLL
  for (int r = 0; r < ROW_TILES; r++) {
    peak[r] = Limits<float>::finite_min;
    total[r] = 0.0f;
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < FRAGMENTS; i++) {
      out[r * FRAGMENTS + i] = float2(0.0f);
    }
  }

  RowOffsets key_row = offsets_of_key(simd_gid * TILE + at.column, key_strides);
  RowOffsets value_row = offsets_of_key((TEAM ? 0 : simd_gid * TILE) + at.row, value_strides);
  for (int base = begin; base < end; base += STEP) {
    const int tile = base + simd_gid * TILE;
    if (!TEAM && tile >= end) {
      break;
    }

    // Scores of this simdgroup's keys.
    float2 scores[ROW_TILES][KEY_TILES];
    MLX_MTL_PRAGMA_UNROLL
    for (int r = 0; r < ROW_TILES; r++) {
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        scores[r][k] = float2(0.0f);
      }
    }
    for (int chunk = 0; chunk < (KEY_DIM + 8 * KEY_RUN - 1) / (8 * KEY_RUN); chunk++) {
      const uint pack = KEY_PACKS * (8 * chunk + at.row);
      const uint first_number = KEY_RUN * (8 * chunk + at.column);
      float q[QUERY_TILES][2 * KEY_RUN];
      MLX_MTL_PRAGMA_UNROLL
      for (int r = 0; r < (KEY_TILES > 1 ? ROW_TILES : 0); r++) {
        load_numbers<KEY_DIM, 2 * KEY_RUN>(head_queries, row_of_head[r] * KEY_DIM, first_number, q[r]);
      }
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        float numbers[2][KEY_RUN] = {};
        MLX_MTL_PRAGMA_UNROLL
        for (int i = 0; i < 2; i++) {
          if (KEY_DIM % 64 == 0 || pack < KEY_DIM / 8) {
            dequantize<KEY_MODE, KEY_BITS, KEY_GROUP, KEY_PACKS>(
                key_codes_head, key_scales_head, key_biases_head,
                offsets_ahead(key_row, 8 * k + i, key_strides, last_key), pack, numbers[i]);
          }
        }
        MLX_MTL_PRAGMA_UNROLL
        for (int r = 0; r < ROW_TILES; r++) {
          if (KEY_TILES == 1) {
            load_numbers<KEY_DIM, 2 * KEY_RUN>(head_queries, row_of_head[r] * KEY_DIM, first_number, q[0]);
          }
          add_scores<KEY_RUN>(scores[r][k], q[KEY_TILES > 1 ? r : 0], numbers[0], numbers[1]);
        }
      }
    }
    MLX_MTL_PRAGMA_UNROLL
    for (int r = 0; r < ROW_TILES; r++) {
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        scores[r][k] *= scale;
      }
    }
#if HAS_ROPE
    for (int chunk = 0; chunk < (ROPE_DIM + 63) / 64; chunk++) {
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        float numbers[2][8];
        MLX_MTL_PRAGMA_UNROLL
        for (int i = 0; i < 2; i++) {
          const uint key = min(tile + 8 * k + at.column + i, count - 1) - begin;
          load_numbers<ROPE_DIM, 8>(head_rope_keys, key * rope_key_stride, 8 * (8 * chunk + at.row), numbers[i]);
        }
        MLX_MTL_PRAGMA_UNROLL
        for (int r = 0; r < ROW_TILES; r++) {
          float q[16];
          load_numbers<ROPE_DIM, 16>(head_rope_queries, row_of_head[r] * ROPE_DIM, 8 * (8 * chunk + at.column), q);
          add_scores<8>(scores[r][k], q, numbers[0], numbers[1]);
        }
      }
    }
#endif

    // Mask, and the running peak of each row.
    float new_peak[ROW_TILES];
    MLX_MTL_PRAGMA_UNROLL
    for (int r = 0; r < ROW_TILES; r++) {
      float highest = peak[r];
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        MLX_MTL_PRAGMA_UNROLL
        for (int i = 0; i < 2; i++) {
          const int key = tile + 8 * k + at.column + i;
          bool visible = key < end;
#if IS_CAUSAL
          visible = visible && key <= count - length + position[r];
#endif
#if HAS_MASK
          const auto mask_value = mask[mask_offset[r] + min(key, count - 1) * mask_key_stride];
#if MASK_IS_BOOL
          visible = visible && mask_value;
#else
          scores[r][k][i] += float(mask_value);
#endif
#endif
          scores[r][k][i] = visible ? scores[r][k][i] : -numeric_limits<float>::infinity();
          highest = max(highest, scores[r][k][i]);
        }
      }
      new_peak[r] = row_max(highest);
    }
    if (TEAM) {
      MLX_MTL_PRAGMA_UNROLL
      for (int r = 0; r < ROW_TILES; r++) {
        if (at.column == 0) {
          peaks[simd_gid * ROWS + 8 * r + at.row] = new_peak[r];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      MLX_MTL_PRAGMA_UNROLL
      for (int r = 0; r < ROW_TILES; r++) {
        for (int s = 0; s < SIMDGROUPS; s++) {
          new_peak[r] = max(new_peak[r], peaks[s * ROWS + 8 * r + at.row]);
        }
      }
    }

    // Weights; what is summed so far becomes relative to the new peak.
    MLX_MTL_PRAGMA_UNROLL
    for (int r = 0; r < ROW_TILES; r++) {
      const float decay = fast::exp(peak[r] - new_peak[r]);
      peak[r] = new_peak[r];
      total[r] *= decay;
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < FRAGMENTS; i++) {
        out[r * FRAGMENTS + i] *= decay;
      }
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        scores[r][k] = float2(fast::exp(scores[r][k][0] - peak[r]), fast::exp(scores[r][k][1] - peak[r]));
        total[r] += scores[r][k][0] + scores[r][k][1];
      }
    }

    // Output += weights times values.
    if (TEAM) {
      MLX_MTL_PRAGMA_UNROLL
      for (int r = 0; r < ROW_TILES; r++) {
        MLX_MTL_PRAGMA_UNROLL
        for (int k = 0; k < KEY_TILES; k++) {
          const int index = (simd_gid * KEY_TILES + k) * ROW_TILES + r;
          shared[64 * index + 8 * at.row + at.column] = scores[r][k][0];
          shared[64 * index + 8 * at.row + at.column + 1] = scores[r][k][1];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const int fragments = min(SIMDGROUPS * KEY_TILES, (end - base + 7) / 8);
      for (int k = 0; k < fragments; k++) {
        float2 weights[ROW_TILES];
        MLX_MTL_PRAGMA_UNROLL
        for (int r = 0; r < ROW_TILES; r++) {
          const int element = 64 * (k * ROW_TILES + r) + 8 * at.row + at.column;
          weights[r] = float2(shared[element], shared[element + 1]);
        }
        const RowOffsets row = offsets_ahead(value_row, 8 * k, value_strides, last_value);
        add_values<VALUE_MODE, VALUE_BITS, VALUE_GROUP, VALUE_PACKS, VALUE_CHUNKS, ROW_TILES, CHUNKS>(
            value_codes_head, value_scales_head, value_biases_head, row, simd_gid * CHUNKS, at, weights, out);
      }
    } else {
      MLX_MTL_PRAGMA_UNROLL
      for (int k = 0; k < KEY_TILES; k++) {
        float2 weights[ROW_TILES];
        MLX_MTL_PRAGMA_UNROLL
        for (int r = 0; r < ROW_TILES; r++) {
          weights[r] = scores[r][k];
        }
        const RowOffsets row = offsets_ahead(value_row, 8 * k, value_strides, last_value);
        add_values<VALUE_MODE, VALUE_BITS, VALUE_GROUP, VALUE_PACKS, VALUE_CHUNKS, ROW_TILES, CHUNKS>(
            value_codes_head, value_scales_head, value_biases_head, row, 0, at, weights, out);
      }
    }
    key_row = offsets_ahead(key_row, STEP, key_strides, last_key);
    value_row = offsets_ahead(value_row, STEP, value_strides, last_value);
  }

  // Merge the simdgroups: the common peak, the total, and the factor for what this one has summed.
  MLX_MTL_PRAGMA_UNROLL
  for (int r = 0; r < ROW_TILES; r++) {
    total[r] = row_sum(total[r]);
    if (at.column == 0) {
      peaks[simd_gid * ROWS + 8 * r + at.row] = peak[r];
      totals[simd_gid * ROWS + 8 * r + at.row] = total[r];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  MLX_MTL_PRAGMA_UNROLL
  for (int r = 0; r < ROW_TILES; r++) {
    const int row = 8 * r + at.row;
    float common = Limits<float>::finite_min;
    for (int s = 0; s < SIMDGROUPS; s++) {
      common = max(common, peaks[s * ROWS + row]);
    }
#if !SPLIT && HAS_SINKS
    const int head = kv_head * group + min(first_row + row, row_count - 1) / length;
    const float sink = float(sinks[head * sinks_strides[0]]);
    common = max(common, sink);
#endif
    float sum = 0.0f;
    for (int s = 0; s < SIMDGROUPS; s++) {
      sum += totals[s * ROWS + row] * fast::exp(peaks[s * ROWS + row] - common);
    }
#if SPLIT
    if (first_row + row < row_count && simd_gid == 0 && at.column == 0) {
      device float* row_stats = stats + 2 * (int64_t(first_head_row + row_of_head[r]) * splits + split);
      row_stats[0] = common;
      row_stats[1] = sum;
    }
#elif HAS_SINKS
    sum += fast::exp(sink - common);
#endif
    const float factor = sum > 0.0f ? fast::exp(peak[r] - common) / sum : 0.0f;
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < FRAGMENTS; i++) {
      out[r * FRAGMENTS + i] *= factor;
    }
  }

#if SPLIT
  typedef float Output;
  device float* const destination = partials + split * VALUE_DIM;
  const int64_t row_stride = int64_t(splits) * VALUE_DIM;
#else
  typedef T Output;
  device T* const destination = output;
  const int64_t row_stride = VALUE_DIM;
#endif
  if (TEAM) {
    MLX_MTL_PRAGMA_UNROLL
    for (int r = 0; r < ROW_TILES; r++) {
      const auto row_destination = destination + int64_t(first_head_row + row_of_head[r]) * row_stride;
      MLX_MTL_PRAGMA_UNROLL
      for (int c = 0; c < CHUNKS; c++) {
        const int chunk = simd_gid * CHUNKS + c;
        if (chunk < VALUE_CHUNKS && first_row + 8 * r + at.row < row_count) {
          MLX_MTL_PRAGMA_UNROLL
          for (int e = 0; e < VALUE_RUN; e++) {
            row_destination[VALUE_PACKS * (32 * chunk + 4 * at.column) + e] =
                Output(out[r * FRAGMENTS + 4 * VALUE_PACKS * c + e / 2][e % 2]);
          }
        }
      }
    }
    return;
  }
  MLX_MTL_PRAGMA_UNROLL
  for (int first = 0; first < ROW_TILES * VALUE_CHUNKS; first += UNITS) {
    MLX_MTL_PRAGMA_UNROLL
    for (int u = 0; u < UNITS; u++) {
      const int unit = first + u;
      if (unit < ROW_TILES * VALUE_CHUNKS) {
        MLX_MTL_PRAGMA_UNROLL
        for (int e = 0; e < VALUE_RUN; e++) {
          shared[(simd_gid * UNITS + u) * UNIT + VALUE_PACKS * (32 * at.row + 4 * at.column) + e] =
              out[4 * VALUE_PACKS * unit + e / 2][e % 2];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = int(thread_index_in_threadgroup); i < UNITS * UNIT; i += 32 * SIMDGROUPS) {
      const int unit = first + i / UNIT;
      const int row = first_row + 8 * (unit / VALUE_CHUNKS) + i % UNIT / (32 * VALUE_PACKS);
      if (unit < ROW_TILES * VALUE_CHUNKS && row < row_count) {
        float sum = 0.0f;
        for (int s = 0; s < SIMDGROUPS; s++) {
          sum += shared[s * UNITS * UNIT + i];
        }
        const int dim = 32 * VALUE_PACKS * (unit % VALUE_CHUNKS) + i % (32 * VALUE_PACKS);
        destination[int64_t(first_head_row + row) * row_stride + dim] = Output(sum);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
