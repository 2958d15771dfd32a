  // What a threadgroup works on: one split of the keys of one key head, for up to ROWS of the rows (query head,
  // position) that share it. A simdgroup takes TILE keys at a time. Blocks of rows that read the same keys are
  // neighbours in the grid, so that they run side by side and share what the GPU's cache holds.
  const int lane = int(thread_index_in_simdgroup);
  const int simd_gid = int(simdgroup_index_in_threadgroup);
  const FragmentPosition at = fragment_position(lane);

  const int query_heads = queries_shape[1];
  const int length = queries_shape[2];
  const int kv_heads = key_codes_shape[1] / STACKED;
  const int count = key_codes_shape[2];
  const int group = query_heads / kv_heads;
  const int row_count = group * length;
  const int blocks = (row_count + ROWS - 1) / ROWS;
  const int splits = int(threadgroups_per_grid.y);
  const int split = int(threadgroup_position_in_grid.y);
  const int kv_head = int(threadgroup_position_in_grid.x) / blocks;
  const int first_row = (int(threadgroup_position_in_grid.x) % blocks) * ROWS;
  const int batch = int(threadgroup_position_in_grid.z);

  const int tiles = (count + TILE - 1) / TILE;
  const int begin = (tiles + splits - 1) / splits * split * TILE;
  int end = min(count, (tiles + splits - 1) / splits * (split + 1) * TILE);
#if IS_CAUSAL
  // The last position of this threadgroup's rows, after which it needs no key.
  const int last_row = min(first_row + ROWS, row_count) - 1;
  const int last_position = first_row / length == last_row / length ? last_row % length : length - 1;
  end = min(end, count - length + last_position + 1);
#endif

  // This head's keys and values, from the first key of the split on. Where they share two arrays, they are planes of
  // these.
  const int key_bias_plane = kv_head + KEY_BIASES_AT * kv_heads;
  const int value_plane = kv_head + VALUES_AT * kv_heads;
  const int value_bias_plane = kv_head + VALUE_BIASES_AT * kv_heads;
  const auto key_codes_head =
      key_codes + batch * key_codes_strides[0] + kv_head * key_codes_strides[1] + begin * key_codes_strides[2];
  const auto key_scales_head =
      key_scales + batch * key_scales_strides[0] + kv_head * key_scales_strides[1] + begin * key_scales_strides[2];
  const auto key_biases_head =
      key_biases + batch * key_biases_strides[0] + key_bias_plane * key_biases_strides[1] +
      begin * key_biases_strides[2];
  const auto value_codes_head =
      value_codes + batch * value_codes_strides[0] + value_plane * value_codes_strides[1] +
      begin * value_codes_strides[2];
  const auto value_scales_head =
      value_scales + batch * value_scales_strides[0] + value_plane * value_scales_strides[1] +
      begin * value_scales_strides[2];
  const auto value_biases_head =
      value_biases + batch * value_biases_strides[0] + value_bias_plane * value_biases_strides[1] +
      begin * value_biases_strides[2];
  const RowOffsets key_strides = {
      uint(key_codes_strides[2]), uint(key_scales_strides[2]), uint(key_biases_strides[2])};
  const RowOffsets value_strides = {
      uint(value_codes_strides[2]), uint(value_scales_strides[2]), uint(value_biases_strides[2])};
  // The last key of the split: none after it is read. Of no use where the split has none.
  const RowOffsets last_key = offsets_of_key(end - 1 - begin, key_strides);
  const RowOffsets last_value = offsets_of_key(end - 1 - begin, value_strides);
