/* Attention over quantized keys and values, read in place.

   The query rows of a KV head (all positions of all query heads of its group) are cut into blocks, and where that gives
   too few pieces for the threads, so are the keys. Each piece goes over its keys in tiles: keys and values are
   unpacked once for all rows of the block, and the softmax is online (Milakov and Gimelshein 2018, as in
   FlashAttention), in float32, so that no score matrix exists. Pieces of the same rows are merged by their
   log-sum-exps. Row = position * group + head in group: a causal block needs no tile beyond its last position. */
#ifndef QSDPA_ATTENTION_H
#define QSDPA_ATTENTION_H

#include <math.h>
#include <stddef.h>

#include "code_products.h"
#include "fused_products.h"
#include "threads.h"

enum { NO_MASK, CAUSAL, BOOLEAN, ADDITIVE };
enum { MOST_ROWS = 128, FEWEST_KEYS = 256 }; /* of a piece */
enum { PIECES = 16 };                        /* for each thread, where the keys are split */

/* Filled by Python as consecutive 64-bit integers: the views by qsdpa_views, the rest in plans.py. */
typedef struct {
  view queries, out, mask, sinks, rope_queries, rope_keys;
  view key_codes, key_scales, key_biases, value_codes, value_scales, value_biases;
  int64_t count, mask_type, sink_type, rope_query_type, rope_key_type;
  format keys, values;
  int64_t batch, query_heads, kv_heads, length, type, mask_kind, rope_dim, threads;
} call;

typedef struct {
  const call *c;
  packed keys, values;
  float scale;
  long group, rows, row_blocks, splits, dim; /* dim: of a score product, rope included, padded to 4 */
  long split_keys;
  float *partials; /* [unit][split][row of block]: value_dim numbers, peak, total; NULL without splits */
  int *finished;   /* [unit] */
} plan;

typedef struct {
  float *q, *keys, *values, *scores, *out, *peak, *total, *decay, *mask, *work; /* total: LANES partial ones a row */
  float *exact_q, *exact_scores; /* as doubles, for float32 queries */
  code_queries code_q;
  code_weights code_w;
  float *rows; /* of a tile's codes */
} memory;

static size_t aligned(size_t n) { return (n + 15) / 16 * 16; }

static size_t larger_size(size_t a, size_t b) { return a > b ? a : b; }

/* Parts a piece's memory; the size needed when `start` is NULL. */
static size_t part_memory(const plan *p, float *start, memory *m) {
  const call *c = p->c;
  const size_t rows = (size_t)(p->rows < MOST_ROWS ? p->rows : MOST_ROWS), dim = (size_t)p->dim;
  const size_t value_dim = (size_t)c->values.dim, most_dim = larger_size(dim, value_dim);
  const size_t key_groups = (size_t)(c->keys.dim / c->keys.group_size);
  const size_t most_groups = larger_size(key_groups, value_dim / (size_t)c->values.group_size);
  const size_t work = (most_dim / 4 + 5 * most_groups) * TILE + most_dim + TILE;
  const size_t exact_dim = c->type == FLOAT32 ? dim : 0;
  const struct {
    void *part;
    size_t size;
  } parts[] = {
    {&m->q, rows * dim},
    {&m->keys, larger_size(dim, value_dim / 4) * TILE},
    {&m->values, value_dim * TILE},
    {&m->scores, rows * TILE},
    {&m->out, rows * value_dim},
    {&m->peak, rows},
    {&m->total, rows * LANES},
    {&m->decay, rows},
    {&m->mask, TILE},
    {&m->work, work},
    {&m->exact_q, 2 * rows * exact_dim},
    {&m->exact_scores, exact_dim ? 2 * rows * TILE : 0},
    {&m->rows, most_dim / 4 * TILE},
    {&m->code_q.digits, rows * dim},
    {&m->code_q.steps, rows * key_groups},
    {&m->code_q.sums, rows * key_groups},
    {&m->code_q.digit_sums, 4 * rows * key_groups},
    {&m->code_w.digits, rows * TILE},
    {&m->code_w.steps, rows},
    {&m->code_w.sums, rows},
    {&m->code_w.zeros, 4 * rows},
  };
  size_t used = 0;
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
    float *const part = start + used;
    if (start) memcpy(parts[i].part, &part, sizeof part);
    used += aligned(parts[i].size);
  }
  return used;
}

typedef struct {
  long sequence, kv_head, first_row, rows, first_key, end_key;
} piece;

static long head_of(const plan *p, const piece *w, long row) {
  return w->kv_head * p->group + (w->first_row + row) % p->group;
}

static long position_of(const plan *p, const piece *w, long row) { return (w->first_row + row) / p->group; }

/* Query rows as floats, times the scale, followed by those of the rope term (which has it already). */
static void load_queries(const plan *p, const piece *w, float *q) {
  const call *c = p->c;
  for (long r = 0; r < w->rows; r++, q += p->dim) {
    const long head = head_of(p, w, r), position = position_of(p, w, r);
    to_floats(row_of(&c->queries, w->sequence, head, position), (int)c->type, c->keys.dim, q);
    for (long d = 0; d < c->keys.dim; d++) q[d] *= p->scale;
    if (!c->rope_dim) continue;
    to_floats(row_of(&c->rope_queries, w->sequence, head, position), (int)c->rope_query_type, c->rope_dim,
              q + c->keys.dim);
    for (long d = c->keys.dim + c->rope_dim; d < p->dim; d++) q[d] = 0;
  }
}

static void load_rope_keys(const plan *p, const piece *w, long first, long count, float *row, float *to) {
  const call *c = p->c;
  memset(to, 0, (size_t)(p->dim - c->keys.dim) * TILE * sizeof *to);
  for (long t = 0; t < count; t++) {
    to_floats(row_of(&c->rope_keys, w->sequence, 0, first + t), (int)c->rope_key_type, c->rope_dim, row);
    for (long d = 0; d < c->rope_dim; d++) to[d * TILE + t] = row[d];
  }
}

/* What the mask adds to a row of scores: [TILE], 0 or -inf for a boolean one. */
static void load_mask(const call *c, const uint8_t *row, long count, float *restrict mask) {
  const long step = c->mask.column;
  if (c->mask_kind == BOOLEAN) {
    for (long t = 0; t < count; t++) mask[t] = row[t * step] ? 0.0f : -INFINITY;
  } else if (step == type_size((int)c->mask_type)) {
    to_floats(row, (int)c->mask_type, count, mask);
  } else {
    for (long t = 0; t < count; t++) to_floats(row + t * step, (int)c->mask_type, 1, mask + t);
  }
}

/* Adds the mask, and puts -inf at positions after the tile's last key. */
static void mask_scores(const plan *p, const piece *w, long first, long count, float *mask, float *scores) {
  const call *c = p->c;
  const uint8_t *loaded = NULL;
  for (long r = 0; r < w->rows; r++, scores += TILE) {
    long visible = count;
    if (c->mask_kind == CAUSAL) {
      visible = c->count - c->length + position_of(p, w, r) + 1 - first;
      visible = visible < 0 ? 0 : visible < count ? visible : count;
    } else if (c->mask_kind != NO_MASK) {
      const uint8_t *row = c->mask.data + w->sequence * c->mask.sequence + head_of(p, w, r) * c->mask.head +
                           position_of(p, w, r) * c->mask.row + first * c->mask.column;
      if (row != loaded) load_mask(c, row, count, mask);
      loaded = row;
      for (long t = 0; t < count; t++) scores[t] += mask[t];
    }
    for (long t = visible; t < TILE; t++) scores[t] = -INFINITY;
  }
}

/* Scores to weights, against the running peak of each row; the running totals and the decay of what is summed so far.
   False when the mask leaves no weight at all. */
static int soften_scores(long rows, float *scores, float *peak, float *total, float *decay) {
  float new_peak[MOST_ROWS], highest = -INFINITY;
  for (long r = 0; r < rows; r++) {
    vf high = load(scores + r * TILE);
    UNROLL for (int t = LANES; t < TILE; t += LANES) high = larger(load(scores + r * TILE + t), high);
    const float tile_peak = lanes_max(high);
    new_peak[r] = tile_peak > peak[r] ? tile_peak : peak[r];
    highest = tile_peak > highest ? tile_peak : highest;
  }
  if (highest == -INFINITY) return 0;
  for (long r = 0; r < rows; r++, scores += TILE) {
    const float shift = new_peak[r] == -INFINITY ? 0 : new_peak[r]; /* every weight is 0 where every score is -inf */
    vf sum = {0};
    UNROLL for (int t = 0; t < TILE; t += LANES) {
      const vf weight = exp_nonpositive(load(scores + t) - shift);
      store(scores + t, weight);
      sum += weight;
    }
    decay[r] = 1;
    if (shift > peak[r]) decay[r] = exp_nonpositive(splat(peak[r] - shift))[0];
    store(total + r * LANES, load(total + r * LANES) * decay[r] + sum);
    peak[r] = new_peak[r];
  }
  return 1;
}

/* How a piece is computed: on codes, or on unpacked numbers, unpacked within the products or before. */
typedef struct {
  int digits; /* of numbers that codes are multiplied with; three make up for a float32 */
  int code_keys, code_values, fuse_keys, fuse_values;
} method;

static method method_of(const plan *p, long rows) {
  const int exact = p->c->type == FLOAT32;
  method h = {.digits = exact ? 3 : 2, .code_keys = can_use_codes(&p->keys), .code_values = can_use_codes(&p->values)};
  h.fuse_keys = !h.code_keys && !exact && !p->c->rope_dim && can_fuse(&p->keys, rows, exact);
  h.fuse_values = !h.code_values && can_fuse(&p->values, rows, exact);
  return h;
}

static void prepare_queries(const plan *p, const piece *w, method h, const memory *m) {
  load_queries(p, w, m->q);
  if (p->c->type == FLOAT32) widen(m->q, w->rows * p->dim, (double *)m->exact_q);
  if (h.code_keys) prepare_code_queries(h.digits, &p->keys, m->q, p->dim, w->rows, m->work, &m->code_q);
  if (h.fuse_keys) prepare_fused_queries(&p->keys, m->q, w->rows, m->keys); /* no tile of keys needs that memory */
}

/* Scores of dimensions from `d` on, of keys as floats. */
static void score_floats(const plan *p, const piece *w, const memory *m, long d) {
  const float *keys = m->keys + d * TILE;
  if (p->c->type == FLOAT32) {
    const double *q = (double *)m->exact_q + d;
    exact_score_tile(w->rows, q, p->dim, p->dim - d, keys, (double *)m->exact_scores, m->scores);
  } else {
    score_tile(w->rows, m->q + d, p->dim, p->dim - d, keys, m->scores);
  }
}

static void score_keys(const plan *p, const piece *w, method h, const memory *m, long first, long count) {
  const call *c = p->c;
  if (h.fuse_keys) {
    fused_score_tile(w->rows, &p->keys, w->sequence, w->kv_head, first, count, m->work, m->keys, m->scores);
    return;
  }
  if (c->rope_dim) load_rope_keys(p, w, first, count, m->work, m->keys + c->keys.dim * TILE);
  if (!h.code_keys) {
    unpack_keys(&p->keys, w->sequence, w->kv_head, first, count, m->work, m->keys);
    score_floats(p, w, m, 0);
    return;
  }
  if (c->rope_dim) {
    score_floats(p, w, m, c->keys.dim);
  } else {
    memset(m->scores, 0, (size_t)(w->rows * TILE) * sizeof *m->scores);
  }
  uint32_t *codes = (uint32_t *)m->keys;
  load_key_codes(&p->keys, w->sequence, w->kv_head, first, count, (uint32_t *)m->work, (uint8_t *)m->rows, codes);
  const code_scales k = load_code_scales(h.digits, &p->keys, w->sequence, w->kv_head, first, count, m->work);
  const coming_codes coming = half_tile_to_come(&p->keys, w->sequence, w->kv_head, first + TILE, w->rows);
  code_score_tile(h.digits, w->rows, &p->keys, codes, &k, m->code_q, coming, m->scores);
}

static void add_values(const plan *p, const piece *w, method h, const memory *m, long first, long count) {
  if (h.code_values) {
    uint32_t *codes = (uint32_t *)m->keys; /* in their place: both would not stay in the first level of cache */
    uint8_t *rows = (uint8_t *)m->rows, *wide = (uint8_t *)m->work;
    load_value_codes(&p->values, w->sequence, w->kv_head, first, count, rows, wide, codes);
    const code_scales k = load_code_scales(h.digits, &p->values, w->sequence, w->kv_head, first, count, m->work);
    const coming_codes coming = half_tile_to_come(&p->values, w->sequence, w->kv_head, first + TILE, w->rows);
    code_output_tile(h.digits, w->rows, &p->values, codes, &k, m->scores, m->decay, &m->code_w, coming, m->out);
  } else if (h.fuse_values) {
    fused_output_tile(p->c->type == FLOAT32, w->rows, &p->values, w->sequence, w->kv_head, first, count, m->work,
                      m->values, m->scores, m->decay, m->out);
  } else {
    unpack_values(&p->values, w->sequence, w->kv_head, first, count, m->work, m->values);
    output_tile(w->rows, m->scores, m->decay, m->values, p->c->values.dim, count, m->out);
  }
}

/* A piece, whose queries are prepared. */
static void attend_piece(const plan *p, const piece *w, method h, const memory *m) {
  const call *c = p->c;
  memset(m->out, 0, (size_t)(w->rows * c->values.dim) * sizeof *m->out);
  memset(m->total, 0, (size_t)w->rows * LANES * sizeof *m->total);
  for (long r = 0; r < w->rows; r++) m->peak[r] = -INFINITY;
  for (long first = w->first_key; first < w->end_key; first += TILE) {
    const long count = w->end_key - first < TILE ? w->end_key - first : TILE;
    score_keys(p, w, h, m, first, count);
    if (c->mask_kind != NO_MASK || count < TILE) mask_scores(p, w, first, count, m->mask, m->scores);
    if (soften_scores(w->rows, m->scores, m->peak, m->total, m->decay)) add_values(p, w, h, m, first, count);
  }
}

static int all_finite(const float *x, long n) {
  int finite = 1;
  for (long i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    finite &= (bits & 0x7f800000u) != 0x7f800000u;
  }
  return finite;
}

/* Divides a row by its total, with the head's sink in it, and writes it. A row without a key gives zeros, and one of
   queries that are not finite NaN: the integers that they were multiplied as cannot tell. */
static void write_row(const plan *p, const piece *w, long row, float *out, float peak, float total, const memory *m) {
  const call *c = p->c;
  if (can_use_codes(&p->values)) order_values(&p->values, out, m->work);
  const long head = head_of(p, w, row);
  float factor = total > 0 ? 1 / total : 0;
  if (c->sinks.data) {
    float sink;
    to_floats(c->sinks.data + head * c->sinks.sequence, (int)c->sink_type, 1, &sink);
    const float high = sink > peak ? sink : peak;
    if (total > 0) {
      const float decay = expf(peak - high);
      factor = decay / (total * decay + expf(sink - high));
    }
  }
  if (!all_finite(m->q + row * p->dim, p->dim)) factor = NAN;
  for (long d = 0; d < c->values.dim; d++) out[d] *= factor;
  from_floats(out, (int)c->type, c->values.dim,
              (uint8_t *)row_of(&c->out, w->sequence, head, position_of(p, w, row)));
}

/* The split's rows, relative to the peak of all splits, summed into those of the first. */
static void merge_splits(const plan *p, const piece *w, float *partials, const memory *m) {
  const long value_dim = p->c->values.dim, width = value_dim + 2;
  const long stride = (p->rows < MOST_ROWS ? p->rows : MOST_ROWS) * width;
  for (long r = 0; r < w->rows; r++) {
    float *sum = partials + r * width, peak = -INFINITY;
    for (long s = 0; s < p->splits; s++) peak = fmaxf(peak, sum[s * stride + value_dim]);
    if (peak > -INFINITY) {
      for (long s = 0; s < p->splits; s++) {
        const float *from = sum + s * stride, decay = expf(from[value_dim] - peak);
        for (long d = 0; d < value_dim; d++) sum[d] = (s ? sum[d] : 0) + decay * from[d];
        sum[value_dim + 1] = (s ? sum[value_dim + 1] : 0) + decay * from[value_dim + 1];
      }
    }
    write_row(p, w, r, sum, peak, sum[value_dim + 1], m);
  }
}

static piece piece_of(const plan *p, long unit, long split) {
  const call *c = p->c;
  const long heads = c->batch * c->kv_heads, head = unit % heads;
  const long block = p->row_blocks - 1 - unit / heads; /* causal: those with the most keys first */
  piece w = {.sequence = head / c->kv_heads, .kv_head = head % c->kv_heads, .first_row = block * MOST_ROWS};
  w.rows = p->rows - w.first_row < MOST_ROWS ? p->rows - w.first_row : MOST_ROWS;
  w.first_key = split * p->split_keys;
  w.end_key = split == p->splits - 1 ? c->count : w.first_key + p->split_keys;
  if (c->mask_kind == CAUSAL) {
    const long visible = c->count - c->length + position_of(p, &w, w.rows - 1) + 1;
    if (w.end_key > visible) w.end_key = visible;
  }
  return w;
}

/* Writes the rows of a piece, or where there are splits keeps them until the last of the unit is there. */
static void finish_piece(const plan *p, const piece *w, long unit, long split, const memory *m) {
  const long value_dim = p->c->values.dim;
  if (p->splits == 1) {
    for (long r = 0; r < w->rows; r++) {
      write_row(p, w, r, m->out + r * value_dim, m->peak[r], lanes_sum(load(m->total + r * LANES)), m);
    }
    return;
  }
  const long width = value_dim + 2, stride = (p->rows < MOST_ROWS ? p->rows : MOST_ROWS) * width;
  float *partials = p->partials + unit * p->splits * stride, *to = partials + split * stride;
  for (long r = 0; r < w->rows; r++, to += width) {
    memcpy(to, m->out + r * value_dim, (size_t)value_dim * sizeof *to);
    to[value_dim] = m->peak[r], to[value_dim + 1] = lanes_sum(load(m->total + r * LANES));
  }
  if (__atomic_add_fetch(p->finished + unit, 1, __ATOMIC_ACQ_REL) == p->splits) merge_splits(p, w, partials, m);
}

static void attend_pieces(void *argument, items of, float *start) {
  const plan *p = argument;
  memory m;
  part_memory(p, start, &m);
  long prepared = -1; /* the unit whose queries are in the memory */
  for (long item; (item = take_item(of)) >= 0;) {
    const long unit = item / p->splits, split = item % p->splits;
    const piece w = piece_of(p, unit, split);
    const method h = method_of(p, w.rows);
    if (unit != prepared) prepare_queries(p, &w, h, &m);
    prepared = unit;
    attend_piece(p, &w, h, &m);
    finish_piece(p, &w, unit, split, &m);
  }
}

/* Waking threads takes as long as this many multiply-adds. */
#define FEWEST_MULTIPLY_ADDS (1L << 20)

static long threads_for(const call *c) {
  const long pairs = c->batch * c->query_heads * c->length * c->count;
  return pairs * (c->keys.dim + c->values.dim) < FEWEST_MULTIPLY_ADDS ? 1 : c->threads;
}

/* Splits of the keys: enough pieces that threads end together, be they of unequal speed or one woken late; none of too
   few keys. */
static void plan_splits(plan *p, long units, long threads) {
  const call *c = p->c;
  const long wanted = (PIECES * threads + units - 1) / units, most = c->count / FEWEST_KEYS;
  p->splits = wanted < most ? wanted : most;
  if (p->splits < 1 || threads < 2) p->splits = 1;
  p->split_keys = (c->count / p->splits + TILE - 1) / TILE * TILE;
  p->splits = c->count ? (c->count + p->split_keys - 1) / p->split_keys : 1;
}

static packed packed_of(view codes, view scales, view biases, const format *f) {
  return (packed){codes, scales, biases, f->kind, f->bits, f->group_size, f->symmetric, f->scale_type, f->dim};
}

static int rows_are_contiguous(const view *v, long length, int type) {
  return !v->data || length == 1 || v->column == type_size(type);
}

static int packed_rows_are_contiguous(const packed *p) {
  const long groups = p->dim / p->group_size;
  return rows_are_contiguous(&p->codes, p->dim * p->bits / 32, FLOAT32) &&
         rows_are_contiguous(&p->scales, groups, (int)p->scale_type) &&
         rows_are_contiguous(&p->biases, groups, (int)p->scale_type);
}

enum { DONE, NO_MEMORY, SCATTERED_ROWS };

/* Returns DONE, NO_MEMORY, or SCATTERED_ROWS when the numbers of an input's row are not contiguous. */
__attribute__((visibility("default"))) int qsdpa_attend(const call *c, double scale) {
  plan p = {.c = c, .scale = (float)scale, .group = c->query_heads / c->kv_heads};
  p.keys = packed_of(c->key_codes, c->key_scales, c->key_biases, &c->keys);
  p.values = packed_of(c->value_codes, c->value_scales, c->value_biases, &c->values);
  if (!packed_rows_are_contiguous(&p.keys) || !packed_rows_are_contiguous(&p.values) ||
      !rows_are_contiguous(&c->queries, c->keys.dim, (int)c->type) ||
      !rows_are_contiguous(&c->rope_queries, c->rope_dim, (int)c->rope_query_type) ||
      !rows_are_contiguous(&c->rope_keys, c->rope_dim, (int)c->rope_key_type)) {
    return SCATTERED_ROWS;
  }
  p.rows = p.group * c->length;
  p.row_blocks = (p.rows + MOST_ROWS - 1) / MOST_ROWS;
  p.dim = (c->keys.dim + c->rope_dim + 3) / 4 * 4;
  const long units = c->batch * c->kv_heads * p.row_blocks;
  if (units == 0) return DONE;
  const long threads = threads_for(c);
  plan_splits(&p, units, threads);
  if (p.splits > 1) {
    const long rows = p.rows < MOST_ROWS ? p.rows : MOST_ROWS;
    p.partials = aligned_floats((size_t)(units * p.splits * rows * (c->values.dim + 2)));
    p.finished = calloc((size_t)units, sizeof *p.finished);
  }
  int failed = p.splits > 1 && !(p.partials && p.finished);
  if (!failed) {
    memory unused;
    job j = {.run = attend_pieces, .argument = &p, .items = units * p.splits, .memory = part_memory(&p, NULL, &unused)};
    failed = !run_job(&j, (int)threads);
  }
  free(p.partials);
  free(p.finished);
  clear_upper_halves();
  return failed ? NO_MEMORY : DONE;
}

#endif
