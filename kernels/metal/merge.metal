  // One threadgroup: one output row, merged from the splits. The sink enters here, as a score without a value.
  threadgroup float weights[MAX_SPLITS];

  const int row = int(threadgroup_position_in_grid.x);
  const int splits = partials_shape[3];
  const int dim = partials_shape[4];
  const int lane = int(thread_index_in_simdgroup);
  const auto row_stats = stats + 2 * row * splits;
  const auto row_partials = partials + int64_t(row) * splits * dim;

  float peak = Limits<float>::finite_min;
  for (int s = lane; s < splits; s += 32) {
    peak = max(peak, row_stats[2 * s]);
  }
  peak = simd_max(peak);
#if HAS_SINKS
  const float sink = float(sinks[row / partials_shape[2] % partials_shape[1]]);
  peak = max(peak, sink);
#endif
  float total = 0.0f;
  for (int s = lane; s < splits; s += 32) {
    const float weight = row_stats[2 * s + 1] * fast::exp(row_stats[2 * s] - peak);
    if (simdgroup_index_in_threadgroup == 0) {
      weights[s] = weight;
    }
    total += weight;
  }
  total = simd_sum(total);
#if HAS_SINKS
  total += fast::exp(sink - peak);
#endif
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
  for (int i = int(thread_index_in_threadgroup); i < dim; i += int(threads_per_threadgroup.x)) {
    float sum = 0.0f;
    for (int s = 0; s < splits; s++) {
      sum += weights[s] * row_partials[s * dim + i];
    }
    output[int64_t(row) * dim + i] = T(sum * inverse);
  }
