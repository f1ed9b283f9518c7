// Attention of whole texts, pictures or windows that lie packed one behind the other, each of which sees itself alone: for
// models that read once and keep nothing. As the blocked path over pages (attention_block.h), in float32 throughout: blocks
// of keys and values are packed once for up to 192 query rows and multiplied with tiles of rows, softmax in between
// (FlashAttention, Dao et al. 2022). Keys and values lie in panels as wide as a tile's registers, so that both products read
// forwards, and a group of four tiles reads a panel while it is in the first-level cache.
// Legend: R texts, T tokens, H query heads, K kv heads, G = H / K, D and V head sizes of keys and values, M the longest text.
#include "attention_block.h"

namespace phl {
namespace PHL_NS {
namespace {

#if PHL_LEVEL == 2 || PHL_NEON
constexpr int kRows = 6, kColumns = 4;  // of a tile: 24 of 32 registers are sums
#else
constexpr int kRows = 6, kColumns = 2;  // 12 of 16
#endif
constexpr int64_t kGroup = 4 * kRows, kPanel = kColumns * W;
static_assert(kBlockTokens % kPanel == 0);

struct PackedAttentionArgs {
  const float *q, *k, *v;  // [T, H, D], [T, K, D], [T, K, V]
  float* out;              // [T, H, V] contiguous
  const int32_t* starts;   // [R + 1]
  const float* sinks;      // [H] or null
  const float* distances;  // [H, 2 M - 1] or null: added to the score of query i and key j, at j - i + M - 1
  float* scratch;          // [threads, scratch_stride]
  int64_t rows, heads, kv_heads, head_size, value_size;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head, distance_head, scratch_stride;
  int64_t causal, window, chunk, block;
  double scale, softcap;
};

// One number in all lanes, straight from memory: `splat` adds it to zeros, which an inner loop feels.
PHL_INLINE vf lanes_at(const float* p) {
#if PHL_LEVEL == 2
  return (vf)_mm512_set1_ps(*p);
#elif PHL_LEVEL == 1
  return (vf)_mm256_broadcast_ss(p);
#else
  return vf{*p, *p, *p, *p};
#endif
}

// sums[r][c] += sum over steps of a[r][step] * panel[step][c], a panel as wide as the C vectors
template <int C>
PHL_INLINE void products(const float* a, int64_t a_stride, const float* panel, int64_t steps, vf (&sums)[kRows][C]) {
  for (int64_t step = 0; step < steps; ++step) {
    vf right[C];
    for (int c = 0; c < C; ++c) right[c] = load(panel + (step * C + c) * W);
    for (int r = 0; r < kRows; ++r) {
      const vf left = lanes_at(a + r * a_stride + step);
      for (int c = 0; c < C; ++c) sums[r][c] = fused(left, right[c], sums[r][c]);
    }
  }
}

PHL_INLINE int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Query rows of a task: as many as keep their queries and results in the second-level cache beside a block.
PHL_INLINE int64_t most_rows(int64_t head_size, int64_t value_size, int64_t group) {
  const int64_t wide = head_size > value_size ? head_size : value_size;
  int64_t rows = 16384 / up_to(wide, 16) / kGroup * kGroup;
  rows = rows < kGroup ? kGroup : rows > 192 ? 192 : rows;
  return up_to(rows > group ? rows : group, kRows);
}

// Floats of scratch memory of a thread; an upper bound for every level.
PHL_INLINE int64_t packed_floats(int64_t head_size, int64_t value_size, int64_t group) {
  const int64_t both = up_to(head_size, 16) + up_to(value_size, 16), rows = most_rows(head_size, value_size, group);
  return (rows + kBlockTokens + 1) * both + 18 * rows + 256;
}

// What the query at a position of a text sees of it. Both ends rise with the position.
PHL_INLINE Range seen(const PackedAttentionArgs& a, int64_t at, int64_t length) {
  Range range{0, length};
  if (a.causal) range.end = a.block > 0 ? (at / a.block + 1) * a.block : at + 1;
  if (a.window > 0) {
    range.begin = at - a.window + 1;
    if (!a.causal && at + a.window < range.end) range.end = at + a.window;
  }
  if (a.chunk > 0) {
    const int64_t first = at / a.chunk * a.chunk;
    if (first > range.begin) range.begin = first;
    if (first + a.chunk < range.end) range.end = first + a.chunk;
  }
  return {range.begin > 0 ? range.begin : 0, range.end < length ? range.end : length};
}

// A text, cut into blocks of query tokens: a task for each of them and each kv head.
struct TextPlan {
  int64_t first, length, block_tokens, blocks;
};

PHL_INLINE TextPlan plan_text(const PackedAttentionArgs& a, int64_t row) {
  TextPlan plan{a.starts[row], a.starts[row + 1] - a.starts[row], 1, 0};
  if (plan.length <= 0) return plan;
  const int64_t group = a.heads / a.kv_heads, room = most_rows(a.head_size, a.value_size, group) / group;
  plan.blocks = (plan.length + room - 1) / room;
  const int64_t even = up_to((plan.length + plan.blocks - 1) / plan.blocks, kRows);  // of one size, in whole tiles
  plan.block_tokens = even < room ? even : room;
  plan.blocks = (plan.length + plan.block_tokens - 1) / plan.block_tokens;
  return plan;
}

struct PackedJob {
  TextPlan text;
  int64_t kv_head, at, m;  // query rows: m = tokens x G, from position `at` on
  int64_t padded, wide;    // m in whole tiles, V in whole vectors
  float *q, *results;      // [padded, D], [padded, wide]
  float *keys, *values;    // panels: [64 / kPanel, D, kPanel]; [wide / kPanel, 64, kPanel], the last ones of one vector
  float *sums, *tops;      // [padded, W], [padded]
  float* nothing;          // [D or V], zeros: what stands behind the last token
};

PHL_INLINE int64_t position_of(const PackedAttentionArgs& a, const PackedJob& job, int64_t i) {
  return job.at + (i < job.m ? i : job.m - 1) / (a.heads / a.kv_heads);
}

PHL_INLINE void lay_out(const PackedAttentionArgs& a, PackedJob& job, float* scratch) {
  job.padded = up_to(job.m, kRows);
  job.wide = up_to(a.value_size, W);
  const auto take = [&](int64_t floats) {
    float* at = scratch;
    scratch += up_to(floats, 16);
    return at;
  };
  job.q = take(job.padded * a.head_size);
  job.results = take(job.padded * job.wide);
  job.keys = take(kBlockTokens * a.head_size);
  job.values = take(kBlockTokens * job.wide);
  job.sums = take(job.padded * W);
  job.tops = take(job.padded);
  job.nothing = take(a.head_size > a.value_size ? a.head_size : a.value_size);
}

// Queries times what their scores are multiplied by, so that scores are in base 2 (with a soft cap: in its units).
PHL_INLINE void begin(const PackedAttentionArgs& a, PackedJob& job) {
  const int64_t group = a.heads / a.kv_heads, size = a.head_size;
  const float factor = a.softcap > 0 ? float(a.scale / a.softcap) : float(a.scale * double(kLog2e));
  for (int64_t i = 0; i < job.m; ++i) {
    const float* from =
        a.q + (job.text.first + job.at + i / group) * a.q_token + (job.kv_head * group + i % group) * a.q_head;
    float* to = job.q + i * size;
    int64_t d = 0;
    for (; d + W <= size; d += W) store(to + d, load(from + d) * factor);
    for (; d < size; ++d) to[d] = from[d] * factor;
  }
  for (int64_t i = job.m * size; i < job.padded * size; ++i) job.q[i] = 0.0f;
  for (int64_t i = 0; i < job.padded * job.wide; i += W) store(job.results + i, vf{});
  for (int64_t i = 0; i < job.padded; ++i) {
    store(job.sums + i * W, vf{});
    job.tops[i] = kNoScore;
  }
  for (int64_t d = 0; d < (size > a.value_size ? size : a.value_size); ++d) job.nothing[d] = 0.0f;
}

PHL_INLINE void pack_panels(const PackedAttentionArgs& a, const PackedJob& job, Range span) {
  const float *keys[kBlockTokens], *values[kBlockTokens];
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    const int64_t token = job.text.first + span.begin + t;
    const bool there = span.begin + t < span.end;
    keys[t] = there ? a.k + token * a.k_token + job.kv_head * a.k_head : job.nothing;
    values[t] = there ? a.v + token * a.v_token + job.kv_head * a.v_head : job.nothing;
  }
  const int64_t whole = a.head_size / W * W, panels = up_to(span.end - span.begin, kPanel);
  for (int64_t t = 0; t < panels; t += W) {
    float* to = job.keys + t / kPanel * kPanel * a.head_size + t % kPanel;
    for (int64_t d = 0; d < whole; d += W) transpose(keys + t, d, to + d * kPanel, kPanel);
    for (int64_t d = whole; d < a.head_size; ++d)
      for (int64_t i = 0; i < W; ++i) to[d * kPanel + i] = keys[t + i][d];
  }
  const auto panel = [&]<int C>(int64_t column) {
    float* to = job.values + column * kBlockTokens;
    for (int64_t t = 0; t < span.end - span.begin; ++t, to += C * W) {
      const int64_t left = a.value_size - column;
      if (left >= C * W) {
        for (int c = 0; c < C; ++c) store(to + c * W, load(values[t] + column + c * W));
      } else {
        for (int64_t d = 0; d < C * W; ++d) to[d] = d < left ? values[t][column + d] : 0.0f;
      }
    }
  };
  int64_t column = 0;
  for (; column + kPanel <= job.wide; column += kPanel) panel.template operator()<kColumns>(column);
  for (; column < job.wide; column += W) panel.template operator()<1>(column);
}

// The highest lane; of a NaN whatever comes.
PHL_INLINE float highest_of(vf v) {
#if PHL_LEVEL == 1
  __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
#else
  return largest(v);
#endif
}

// Scores of query row i against the first `columns` tokens of a span become weights, not yet divided by their sum; gives the
// factor that what the row has so far must be multiplied by.
PHL_INLINE float weigh(const PackedAttentionArgs& a, PackedJob& job, Range span, int64_t columns, int64_t i, bool masked,
                       float* scores) {
  const int64_t at = position_of(a, job, i);
  const Range sight = seen(a, at, job.text.length);
  const int32_t hidden = int32_t(sight.begin > span.begin ? sight.begin - span.begin : 0);
  const int32_t end = int32_t(sight.end > span.begin ? sight.end - span.begin : 0);
  const float* bias = nullptr;
  if (a.distances != nullptr) {
    const int64_t group = a.heads / a.kv_heads, head = job.kv_head * group + i % group;
    bias = a.distances + head * a.distance_head + a.distance_head / 2 - at + span.begin;
  }
  vf highest = splat(kNoScore);
  for (int64_t t = 0; t < columns; t += W) {
    vf s = load(scores + t);
    if (a.softcap > 0) s = tanh(s) * float(a.softcap * double(kLog2e));
    if (bias != nullptr) {
      const int64_t left = span.end - span.begin - t;
      s = s + (left >= W ? load(bias + t) : load_n(bias + t, left > 0 ? left : 0)) * kLog2e;
    }
    if (masked) {
      const vi lane = load_as<vi>(kLane) + int32_t(t);
      s = select((lane < vi{} + hidden) | (lane >= vi{} + end), splat(-__builtin_inff()), s);
    }
    if (a.softcap > 0 || bias != nullptr || masked) store(scores + t, s);
    highest = max(highest, s);
  }
  const float before = job.tops[i], now = highest_of(highest), top = now > before ? now : before;
  job.tops[i] = top;
  const float factor = top > before ? exp2<6>(splat(before - top))[0] : 1.0f;
  vf total = load(job.sums + i * W) * factor;
  for (int64_t t = 0; t < columns; t += W) {
    const vf p = exp2<6>(load(scores + t) - top);
    total += p;
    store(scores + t, p);
  }
  store(job.sums + i * W, total);
  return factor;
}

// Query rows [first, first + rows), in whole tiles, against the span whose keys and values are packed.
PHL_INLINE void attend_group(const PackedAttentionArgs& a, PackedJob& job, Range span, int64_t first, int64_t rows) {
  const int64_t length = job.text.length, size = a.head_size;
  const Range low = seen(a, position_of(a, job, first), length);
  const Range high = seen(a, position_of(a, job, first + rows - 1), length);
  const int64_t end = high.end < span.end ? high.end : span.end, tokens = end - span.begin;
  if (tokens <= 0 || low.begin >= span.end) return;
  const int64_t columns = up_to(tokens, kPanel);
  const bool masked = high.begin > span.begin || low.end < span.begin + columns;
  alignas(64) float scores[kGroup][kBlockTokens];
  float factor[kGroup];
  for (int64_t column = 0; column < columns; column += kPanel) {
    for (int64_t r = 0; r < rows; r += kRows) {
      vf acc[kRows][kColumns] = {};
      products(job.q + (first + r) * size, size, job.keys + column * size, size, acc);
      for (int i = 0; i < kRows; ++i)
        for (int c = 0; c < kColumns; ++c) store(scores[r + i] + column + c * W, acc[i][c]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) factor[r] = weigh(a, job, span, columns, first + r, masked, scores[r]);
  const auto panel = [&]<int C>(int64_t column) {
    for (int64_t r = 0; r < rows; r += kRows) {
      float* to = job.results + (first + r) * job.wide + column;
      vf acc[kRows][C];
      for (int i = 0; i < kRows; ++i)
        for (int c = 0; c < C; ++c) acc[i][c] = load(to + i * job.wide + c * W) * factor[r + i];
      products(scores[r], kBlockTokens, job.values + column * kBlockTokens, tokens, acc);
      for (int i = 0; i < kRows; ++i)
        for (int c = 0; c < C; ++c) store(to + i * job.wide + c * W, acc[i][c]);
    }
  };
  int64_t column = 0;
  for (; column + kPanel <= job.wide; column += kPanel) panel.template operator()<kColumns>(column);
  for (; column < job.wide; column += W) panel.template operator()<1>(column);
}

// out = results / sum, with the head's sink in the sum.
PHL_INLINE void finish(const PackedAttentionArgs& a, const PackedJob& job, int64_t i) {
  const int64_t group = a.heads / a.kv_heads, head = job.kv_head * group + i % group, size = a.value_size;
  const float* values = job.results + i * job.wide;
  float* out = a.out + ((job.text.first + job.at + i / group) * a.heads + head) * size;
  float factor = 1.0f, total = sum(load(job.sums + i * W));
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head] * kLog2e, top = sink > job.tops[i] ? sink : job.tops[i];
    factor = exp2<6>(splat(job.tops[i] - top))[0];
    total = total * factor + exp2<6>(splat(sink - top))[0];
  }
  factor /= total;  // above zero, as a query sees itself; a NaN stays one
  int64_t d = 0;
  for (; d + W <= size; d += W) store(out + d, load(values + d) * factor);
  for (; d < size; ++d) out[d] = values[d] * factor;
}

void attend_text(const PackedAttentionArgs& a, PackedJob& job) {
  begin(a, job);
  const Range first = seen(a, job.at, job.text.length), last = seen(a, position_of(a, job, job.m - 1), job.text.length);
  for (int64_t at = first.begin; at < last.end; at += kBlockTokens) {
    const Range span{at, at + kBlockTokens < last.end ? at + kBlockTokens : last.end};
    pack_panels(a, job, span);
    for (int64_t row = 0; row < job.padded; row += kGroup) {
      attend_group(a, job, span, row, job.padded - row < kGroup ? job.padded - row : kGroup);
    }
  }
  for (int64_t i = 0; i < job.m; ++i) finish(a, job, i);
}

void packed_attention(const PackedAttentionArgs& a, Team& team) {
  int64_t tasks = 0;
  for (int64_t row = 0; row < a.rows; ++row) tasks += plan_text(a, row).blocks * a.kv_heads;
  // From a task to its text: tasks come to a thread in rising order.
  int64_t row = 0, before = 0;
  TextPlan plan = a.rows > 0 ? plan_text(a, 0) : TextPlan{};
  team.tasks(tasks, [&](int64_t task) {
    while (task - before >= plan.blocks * a.kv_heads) {
      before += plan.blocks * a.kv_heads;
      plan = plan_text(a, ++row);
    }
    PackedJob job;
    job.text = plan;
    job.kv_head = (task - before) / plan.blocks;
    job.at = (task - before) % plan.blocks * plan.block_tokens;
    const int64_t left = plan.length - job.at, tokens = left < plan.block_tokens ? left : plan.block_tokens;
    job.m = tokens * (a.heads / a.kv_heads);
    lay_out(a, job, a.scratch + team.thread * a.scratch_stride);
    attend_text(a, job);
  });
}
PHL_FIELDS(PackedAttentionArgs, q, k, v, out, starts, sinks, distances, scratch, rows, heads, kv_heads, head_size, value_size,
           q_token, q_head, k_token, k_head, v_token, v_head, distance_head, scratch_stride, causal, window, chunk, block, scale,
           softcap);
PHL_OP(packed_attention, PackedAttentionArgs);

// How many floats of scratch memory a thread needs, for Python, which allocates it.
struct PackedScratchArgs {
  int64_t head_size, value_size, group;
  int64_t* floats;
};
void packed_attention_scratch(const PackedScratchArgs& a, Team& team) {
  if (team.thread == 0) *a.floats = packed_floats(a.head_size, a.value_size, a.group);
}
PHL_FIELDS(PackedScratchArgs, head_size, value_size, group, floats);
PHL_OP(packed_attention_scratch, PackedScratchArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
