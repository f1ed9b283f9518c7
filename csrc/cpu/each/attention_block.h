// Many query rows against a bfloat16 or float32 cache: blocks of cached tokens are packed once and multiplied with tiles of query
// rows, softmax in between (FlashAttention, Dao et al. 2022). Beside a bfloat16 cache with AVX-512 the products are bfloat16
// pairs (vdpbf16ps) with float32 sums; elsewhere everything is float32. A Cell is one step of a dot product: two bfloat16, or one
// float. E: what the cache holds, uint16_t or float.
#pragma once
#include "attention_args.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kTileRows = PHL_LEVEL == 2 ? 6 : 4, kTileColumns = PHL_LEVEL == 2 ? 4 : 2;

template <class E>
struct CellOf {
  using Cell = float;
};
#if PHL_LEVEL == 2
template <>
struct CellOf<uint16_t> {
  using Cell = uint32_t;
};
PHL_INLINE vf dot(vf sum, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#endif
PHL_INLINE vf dot(vf sum, vf a, vf b) { return sum + a * b; }
PHL_INLINE vf cells_at(const float* p) { return load(p); }
PHL_INLINE vu cells_at(const uint32_t* p) { return load_as<vu>(p); }
PHL_INLINE vf same_cells(float x) { return splat(x); }
PHL_INLINE vu same_cells(uint32_t x) { return vu{} + x; }

template <class Cell>
constexpr int kPair = std::is_same_v<Cell, float> ? 1 : 2;
template <class Cell>
constexpr int64_t kCells = kBlockTokens / kPair<Cell>;  // steps over a block's tokens

// acc[r][c] += sum over steps of a[r][step] * b[step][column c]
template <int R, int C, class Cell>
PHL_INLINE void multiply(const Cell* a, int64_t a_stride, const Cell* b, int64_t b_stride, int64_t steps, vf (&acc)[R][C]) {
  for (int64_t step = 0; step < steps; ++step) {
    decltype(cells_at(b)) right[C];
    for (int c = 0; c < C; ++c) right[c] = cells_at(b + step * b_stride + c * W);
    for (int r = 0; r < R; ++r) {
      const auto left = same_cells(a[r * a_stride + step]);
      for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], left, right[c]);
    }
  }
}

template <class E>
struct BlockJob {
  using Cell = typename CellOf<E>::Cell;
  int64_t row, kv_head, token, tokens;  // query tokens [token, token + tokens) of the packed T
  int64_t position;                     // of the first of them
  Range range;                          // of the cache
  int64_t m;                            // tokens x G query rows
  // Scratch: query cells [m, steps], keys [steps, 64], values [kCells, wide], results [m, wide], ...
  int64_t steps, wide;
  Cell *q, *keys, *values;
  float *results, *sums, *tops;
};

template <class E>
PHL_INLINE void lay_out(const AttentionArgs& a, BlockJob<E>& job, float* scratch, int64_t most_rows) {
  using Cell = typename CellOf<E>::Cell;
  job.steps = (a.head_size + kPair<Cell> - 1) / kPair<Cell>;
  job.wide = (a.head_size + W - 1) / W * W;
  const auto take = [&](int64_t floats) {
    float* at = scratch;
    scratch += (floats + 15) / 16 * 16;
    return at;
  };
  job.q = reinterpret_cast<Cell*>(take(most_rows * job.steps));
  job.keys = reinterpret_cast<Cell*>(take(job.steps * kBlockTokens));
  job.values = reinterpret_cast<Cell*>(take(kCells<Cell> * job.wide));
  job.results = take(most_rows * job.wide);
  job.sums = take(most_rows * W);
  job.tops = take(most_rows);
}

// A row of n floats as cells.
PHL_INLINE void pack_row(const float* from, int64_t n, float* to) {
  __builtin_memcpy(to, from, size_t(n) * sizeof(float));
}
#if PHL_LEVEL == 2
PHL_INLINE void pack_row(const float* from, int64_t n, uint32_t* to) {
  auto* half = reinterpret_cast<uint16_t*>(to);
  int64_t d = 0;
  for (; d + W <= n; d += W) store_bf16(half + d, load(from + d));
  for (; d < n; ++d) half[d] = float_to_bf16(from[d]);
  if (d % 2) half[d] = 0;
}
#endif

template <class E>
PHL_INLINE void pack_queries(const AttentionArgs& a, const BlockJob<E>& job) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t i = 0; i < job.m; ++i) {
    const float* q = a.q + (job.token + i / group) * a.q_token + (job.kv_head * group + i % group) * a.q_head;
    pack_row(q, a.head_size, job.q + i * job.steps);
  }
}

#if PHL_LEVEL == 2

// to[s][t] = dword s of token t from element `at` on, for 16 tokens and 16 dwords.
template <class E, class Cell>
PHL_INLINE void transpose(const E* const* from, int64_t at, Cell* to, int64_t stride = kBlockTokens) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from[i] + at);
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  // a[4g + j], 128-bit lane l: dwords 4l + j of tokens 4g to 4g + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xEE);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xEE);
    _mm512_storeu_si512(to + (0 + j) * stride, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (4 + j) * stride, _mm512_shuffle_i32x4(low01, low23, 0xDD));
    _mm512_storeu_si512(to + (8 + j) * stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (12 + j) * stride, _mm512_shuffle_i32x4(high01, high23, 0xDD));
  }
}

PHL_INLINE void pack_keys(const AttentionArgs& a, const BlockJob<uint16_t>& job, const uint16_t* const* rows) {
  const int64_t whole = a.head_size / 32 * 16;
  for (int64_t t = 0; t < kBlockTokens; t += 16) {
    for (int64_t s = 0; s < whole; s += 16) transpose(rows + t, 2 * s, job.keys + s * kBlockTokens + t);
  }
  for (int64_t s = whole; s < job.steps; ++s) {
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      const uint32_t high = 2 * s + 1 < a.head_size ? rows[t][2 * s + 1] : 0;
      job.keys[s * kBlockTokens + t] = rows[t][2 * s] | high << 16;
    }
  }
}

PHL_INLINE void pack_values(const AttentionArgs& a, const BlockJob<uint16_t>& job, const uint16_t* const* rows) {
  const __m512i first = _mm512_load_si512(kPairs.first), second = _mm512_load_si512(kPairs.second);
  for (int64_t pair = 0; pair < kCells<uint32_t>; ++pair) {
    const uint16_t *even = rows[2 * pair], *odd = rows[2 * pair + 1];
    uint32_t* to = job.values + pair * job.wide;
    int64_t d = 0;
    for (; d + 32 <= a.head_size; d += 32) {
      const __m512i x = _mm512_loadu_si512(even + d), y = _mm512_loadu_si512(odd + d);
      _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(x, first, y));
      _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(x, second, y));
    }
    for (; d < a.head_size; ++d) to[d] = even[d] | uint32_t(odd[d]) << 16;
    for (; d < job.wide; ++d) to[d] = 0;
  }
}

#elif PHL_LEVEL == 1

// to[s][t] = number s of token t from element `at` on, for 8 tokens and 8 numbers.
template <class E>
PHL_INLINE void transpose(const E* const* from, int64_t at, float* to, int64_t stride = kBlockTokens) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = (__m256)load_wide(from[i] + at);
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  // a[4g + j]: in its halves numbers j and 4 + j of tokens 4g to 4g + 3.
  for (int g = 0; g < 2; ++g) {
    for (int i = 0; i < 2; ++i) {
      a[4 * g + 2 * i] = _mm256_shuffle_ps(b[4 * g + i], b[4 * g + 2 + i], 0x44);
      a[4 * g + 2 * i + 1] = _mm256_shuffle_ps(b[4 * g + i], b[4 * g + 2 + i], 0xee);
    }
  }
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(to + (4 + j) * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
}

#else

template <class E>
PHL_INLINE void transpose(const E* const* from, int64_t at, float* to, int64_t stride = kBlockTokens) {
  for (int s = 0; s < W; ++s) {
    for (int t = 0; t < W; ++t) to[s * stride + t] = as_float(from[t][at + s]);
  }
}

#endif

// Into cells that are floats.
template <class E>
PHL_INLINE void pack_keys(const AttentionArgs& a, const BlockJob<E>& job, const E* const* rows) {
  const int64_t whole = a.head_size / W * W;
  for (int64_t t = 0; t < kBlockTokens; t += W) {
    for (int64_t s = 0; s < whole; s += W) transpose(rows + t, s, job.keys + s * kBlockTokens + t);
  }
  for (int64_t s = whole; s < job.steps; ++s) {
    for (int64_t t = 0; t < kBlockTokens; ++t) job.keys[s * kBlockTokens + t] = as_float(rows[t][s]);
  }
}

template <class E>
PHL_INLINE void pack_values(const AttentionArgs& a, const BlockJob<E>& job, const E* const* rows) {
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    float* to = job.values + t * job.wide;
    int64_t d = 0;
    for (; d + W <= a.head_size; d += W) store(to + d, load_wide(rows[t] + d));
    for (; d < a.head_size; ++d) to[d] = as_float(rows[t][d]);
    for (; d < job.wide; ++d) to[d] = 0.0f;
  }
}

template <class E>
PHL_INLINE void pack_block(const AttentionArgs& a, BlockJob<E>& job, const int64_t* offsets) {
  const E *keys[kBlockTokens], *values[kBlockTokens];
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    keys[t] = static_cast<const E*>(a.k_cache) + offsets[t];
    values[t] = static_cast<const E*>(a.v_cache) + offsets[t];
  }
  pack_keys(a, job, keys);
  pack_values(a, job, values);
}

// What softmax needs of the block of tokens at hand.
struct BlockSpan {
  int64_t begin;  // position of its first token
  int64_t count;  // valid tokens
  bool masked;    // whether any query row must not see all of them
};

// Scores of one query row: scale, cap, mask. Gives the row's maximum.
PHL_INLINE float shape_scores(const AttentionArgs& a, const BlockSpan& span, int64_t position, float* scores) {
  constexpr int kVectors = int(kBlockTokens / W);
  vf s[kVectors];
  const float scale = float(a.scale) * kLog2e;
  for (int c = 0; c < kVectors; ++c) s[c] = load(scores + c * W);
  if (a.softcap > 0) {
    for (int c = 0; c < kVectors; ++c) s[c] = tanh(s[c] * float(a.scale / a.softcap)) * float(a.softcap * double(kLog2e));
  } else {
    for (int c = 0; c < kVectors; ++c) s[c] = s[c] * scale;
  }
  if (span.masked) {
    const int64_t until = sees(a, position) - span.begin, seen = until < span.count ? until : span.count;
    const int64_t hidden = a.window > 0 ? position - a.window + 1 - span.begin : 0;
    for (int c = 0; c < kVectors; ++c) {
      const vi lane = load_as<vi>(kLane) + int32_t(c * W);
      const vi out = (lane >= vi{} + int32_t(seen)) | (lane < vi{} + int32_t(hidden > 0 ? hidden : 0));
      s[c] = select(out, splat(-__builtin_inff()), s[c]);
    }
  }
  vf highest = s[0];
  for (int c = 1; c < kVectors; ++c) highest = max(highest, s[c]);
  for (int c = 0; c < kVectors; ++c) store(scores + c * W, s[c]);
  return largest(highest);
}

// Weights of one query row as cells; adds them up in `sums`, lane by lane.
#if PHL_LEVEL == 2
PHL_INLINE void weigh(const float* scores, float top, float factor, float* sums, uint32_t* cells) {
  vf total = load(sums) * factor;
  for (int c = 0; c < int(kBlockTokens / W); c += 2) {
    const vf p0 = exp2<4>(load(scores + c * W) - top), p1 = exp2<4>(load(scores + (c + 1) * W) - top);
    total += p0 + p1;
    _mm512_storeu_si512(cells + c * W / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)p1, (__m512)p0));
  }
  store(sums, total);
}
#endif
PHL_INLINE void weigh(const float* scores, float top, float factor, float* sums, float* cells) {
  vf total = load(sums) * factor;
  for (int c = 0; c < int(kBlockTokens / W); ++c) {
    const vf p = exp2<6>(load(scores + c * W) - top);
    total += p;
    store(cells + c * W, p);
  }
  store(sums, total);
}

// R query rows from `first` against the packed block.
template <int R, class E>
PHL_INLINE void tile(const AttentionArgs& a, BlockJob<E>& job, const BlockSpan& span, int64_t first) {
  using Cell = typename CellOf<E>::Cell;
  const int64_t group = a.heads / a.kv_heads;
  // How many of the block's tokens the last of these rows sees; none of them needs more.
  const int64_t until = sees(a, job.position + (first + R - 1) / group) - span.begin;
  const int64_t seen = until < span.count ? until : span.count;
  if (seen <= 0) return;
  const int64_t steps = (seen + kPair<Cell> - 1) / kPair<Cell>;
  alignas(64) float scores[R][kBlockTokens];
  alignas(64) Cell cells[R][kCells<Cell>];
  for (int64_t column = 0; column < seen; column += kTileColumns * W) {
    vf acc[R][kTileColumns] = {};
    multiply<R, kTileColumns>(job.q + first * job.steps, job.steps, job.keys + column, kBlockTokens, job.steps, acc);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kTileColumns; ++c) store(scores[r] + column + c * W, acc[r][c]);
  }
  alignas(64) float factor[W > R ? W : R] = {};
  alignas(64) float tops[W > R ? W : R];
  static_assert(R <= W || W == 4);
  for (int r = 0; r < R; ++r) {
    const float highest = shape_scores(a, span, job.position + (first + r) / group, scores[r]);
    const float before = job.tops[first + r];
    tops[r] = highest > before ? highest : before;
    factor[r] = before - tops[r];
    job.tops[first + r] = tops[r];
  }
  for (int r = 0; r < R; r += W) store(factor + r, exp2<6>(load(factor + r)));
  for (int r = 0; r < R; ++r) weigh(scores[r], tops[r], factor[r], job.sums + (first + r) * W, cells[r]);
  const auto columns = [&]<int C>(int64_t column) {
    vf acc[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = load(job.results + (first + r) * job.wide + column + c * W) * factor[r];
    multiply<R, C>(cells[0], kCells<Cell>, job.values + column, job.wide, steps, acc);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) store(job.results + (first + r) * job.wide + column + c * W, acc[r][c]);
  };
  int64_t column = 0;
  for (; column + kTileColumns * W <= job.wide; column += kTileColumns * W) columns.template operator()<kTileColumns>(column);
  for (; column < job.wide; column += W) columns.template operator()<1>(column);
}

template <int R, class E>
PHL_INLINE void last_tile(const AttentionArgs& a, BlockJob<E>& job, const BlockSpan& span, int64_t first, int64_t count) {
  if constexpr (R > 0) {
    if (count == R) tile<R>(a, job, span, first);
    else last_tile<R - 1>(a, job, span, first, count);
  }
}

template <class E>
void block(const AttentionArgs& a, BlockJob<E>& job) {
  pack_queries(a, job);
  for (int64_t i = 0; i < job.m * job.wide; i += W) store(job.results + i, vf{});
  for (int64_t i = 0; i < job.m; ++i) {
    store(job.sums + i * W, vf{});
    job.tops[i] = kNoScore;
  }
  const int64_t last = job.position + job.tokens - 1;
  for (int64_t begin = job.range.begin; begin < job.range.end; begin += kBlockTokens) {
    const int64_t end = begin + kBlockTokens < job.range.end ? begin + kBlockTokens : job.range.end;
    int64_t offsets[kBlockTokens];
    token_offsets(a, job.row, job.kv_head, {begin, end}, offsets);
    // Lanes past the end repeat a valid token; the mask hides them.
    for (int64_t t = end - begin; t < kBlockTokens; ++t) offsets[t] = offsets[0];
    pack_block(a, job, offsets);
    const bool window = a.window > 0 && last - a.window + 1 > begin;
    const bool masked = end - begin < kBlockTokens || end > sees(a, job.position) || window;
    const BlockSpan span{begin, end - begin, masked};
    int64_t i = 0;
    for (; i + kTileRows <= job.m; i += kTileRows) tile<kTileRows>(a, job, span, i);
    last_tile<kTileRows - 1>(a, job, span, i, job.m - i);
  }
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
