// Paged attention: arguments, the plan that every thread derives from them, and how partial results are finished.
// Legend: R rows, T query tokens, H heads, K kv heads, G = H / K, D head size, S page size, M = tokens x G query rows.
// Scores live in base 2: score * scale * log2(e).
#pragma once
#include "../op.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kNoScore = -1e30f;    // the running maximum before anything was seen: finite, so differences are
constexpr int64_t kBlockRows = 96;    // query rows of a task in the blocked path
constexpr int64_t kBlockTokens = 64;  // cached tokens that are packed together
constexpr int64_t kSplitTokens = 256;
constexpr int64_t kMaxStreamGroup = 4;
constexpr int64_t kMaxStreamHeads = 16;  // query heads of a task in the streaming path

struct AttentionArgs {
  const float* q;  // [T, H, D]
  const void *k_cache, *v_cache;
  float* out;  // [T, H, D] contiguous
  const int32_t *query_start, *seq_lens, *page_table;
  const float* sinks;  // [H] or null
  float* partial;      // [R, H, max_splits, D + 2]: values, running maximum, sum
  float* scratch;      // [threads, scratch_stride]
  int64_t rows, heads, kv_heads, head_size, page_size, pages_per_row, page_stride;
  int64_t q_token, q_head, max_splits, scratch_stride, window;
  int64_t block;  // a token sees to the end of its own block of so many positions; 0: to itself
  double scale, softcap;
};

// Floats of scratch memory of a thread: packed queries, keys, values and results; an upper bound for every level.
PHL_INLINE int64_t scratch_floats(int64_t head_size, int64_t group) {
  const int64_t wide = (head_size + 15) / 16 * 16, rows = kBlockRows > group ? kBlockRows : group;
  return (2 * rows + 3 * kBlockTokens) * wide + 18 * rows + 1024;
}

struct Range {
  int64_t begin, end;
};

// Cached tokens of a row, from a kv head on.
struct Stretch {
  int64_t row, kv_head;
  Range range;
};

// Behind the last position that the token at `position` sees, were all of them cached.
PHL_INLINE int64_t sees(const AttentionArgs& a, int64_t position) {
  return a.block > 0 ? (position / a.block + 1) * a.block : position + 1;
}

// Positions that the tokens at `first` to `last` of a row of so many tokens can see.
PHL_INLINE Range visible(const AttentionArgs& a, int64_t first, int64_t last, int64_t length) {
  const int64_t begin = a.window > 0 && first - a.window + 1 > 0 ? first - a.window + 1 : 0, end = sees(a, last);
  return {begin, end < length ? end : length};
}

// Cached tokens of each split of a row, a multiple of 256: rows of about the same length, which may share their first
// tokens, are cut at the same places.
PHL_INLINE int64_t split_tokens(const AttentionArgs& a, Range range) {
  const int64_t most = kSplitTokens * (a.max_splits > 1 ? a.max_splits : 1);
  const int64_t times = (range.end - range.begin + most - 1) / most;
  return kSplitTokens * (times > 1 ? times : 1);
}

PHL_INLINE int64_t splits_of(const AttentionArgs& a, Range range) {
  const int64_t part = split_tokens(a, range), splits = (range.end - range.begin + part - 1) / part;
  return a.max_splits > 1 && splits > 1 ? splits : 1;
}

PHL_INLINE Range split_range(const AttentionArgs& a, Range range, int64_t splits, int64_t split) {
  if (splits == 1) return range;
  const int64_t part = split_tokens(a, range), begin = range.begin + split * part;
  return {begin, begin + part < range.end ? begin + part : range.end};
}

// What a cache that is not int8 holds, as float32.
PHL_INLINE vf load_wide(const uint16_t* p) { return load_bf16(p); }
PHL_INLINE vf load_wide(const float* p) { return load(p); }
PHL_INLINE float as_float(uint16_t x) { return bf16_to_float(x); }
PHL_INLINE float as_float(float x) { return x; }

// Element offsets of the tokens of `range` in such a cache, for one kv head.
PHL_INLINE void token_offsets(const AttentionArgs& a, int64_t row, int64_t kv_head, Range range, int64_t* offsets) {
  const int64_t width = a.head_size;
  const int32_t* pages = a.page_table + row * a.pages_per_row;
  int64_t page = range.begin / a.page_size, slot = range.begin % a.page_size;
  int64_t at = pages[page] * a.page_stride + (kv_head * a.page_size + slot) * width;
  for (int64_t i = 0; i < range.end - range.begin; ++i) {
    offsets[i] = at;
    at += width;
    if (++slot == a.page_size && i + 1 < range.end - range.begin) {
      slot = 0;
      at = pages[++page] * a.page_stride + kv_head * a.page_size * width;
    }
  }
}

// out = values / sum, with the head's sink in the sum.
PHL_INLINE void finish_head(const AttentionArgs& a, int64_t head, const float* values, float top, float total, float* out) {
  float factor = 1.0f;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head] * kLog2e;
    const float highest = sink > top ? sink : top;
    factor = exp2<6>(splat(top - highest))[0];
    total = total * factor + exp2<6>(splat(sink - highest))[0];
  }
  factor = total != 0.0f ? factor / total : 0.0f;  // nothing seen: zeros; a NaN stays one
  int64_t i = 0;
  for (; i + W <= a.head_size; i += W) store(out + i, load(values + i) * factor);
  for (; i < a.head_size; ++i) out[i] = values[i] * factor;
}

PHL_INLINE float* partial_of(const AttentionArgs& a, int64_t row, int64_t head, int64_t split) {
  return a.partial + ((row * a.heads + head) * a.max_splits + split) * (a.head_size + 2);
}

#if PHL_LEVEL == 2
// For words: pairs (x_i, y_i) of the first and of the second sixteen words of x and y.
struct PairOrder {
  uint16_t first[32], second[32];
};
alignas(64) constexpr PairOrder kPairs = [] {
  PairOrder order{};
  for (uint16_t i = 0; i < 16; ++i) {
    order.first[2 * i] = i, order.first[2 * i + 1] = uint16_t(32 + i);
    order.second[2 * i] = uint16_t(16 + i), order.second[2 * i + 1] = uint16_t(48 + i);
  }
  return order;
}();
#endif

}  // namespace PHL_NS
}  // namespace phl
