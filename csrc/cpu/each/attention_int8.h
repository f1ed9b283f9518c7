// Query rows against the int8 cache: one path for one query token and for many. A tile of 64 tokens is used as it lies in
// its pages, in groups of 16 (int8_page.h); while it is computed the next one is asked for, so that memory is busy all
// the time. With AVX-512 all products are of bytes (vpdpbusd): a query row has one scale, and so have a row's weights in
// a tile, whose largest is 255. With AVX2 they are of bytes too, of which four of a row share a word
// (attention_bytes.h). With NEON they are of bytes, two for each query and weight (attention_dots.h). Elsewhere queries,
// weights and products are float32.
#pragma once
#include "../int8_page.h"
#include "attention_args.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kGroups = kBlockTokens / kGroup;
constexpr int64_t kGroupVectors = kGroup / W;
constexpr int64_t kLinesPerStep = 3;
constexpr int kInt8Rows = PHL_LEVEL == 2 ? 6 : PHL_LEVEL == 1 || PHL_NEON ? 4 : 3;

// Where the groups of a tile are.
struct Int8Tile {
  const int8_t *keys[kGroups], *values[kGroups];
};

struct Int8Job {
  int64_t row, kv_head, kv_heads;  // heads of the cache: `kv_heads` from `kv_head` on
  int64_t token, tokens;           // query tokens [token, token + tokens) of the packed T
  const int32_t* sharers;          // or the single tokens of so many rows, which all see all of the range; null: no
  int64_t position;                // of the first of them
  Range range;                     // of the cache
  Stretch guess;                   // what this thread probably computes next; empty: nobody knows
  int64_t m;                       // query rows of a kv head: tokens x G
  // Scratch, rows of all heads one after the other: queries, results [m, wide], sums [m, W], four times [m].
  int64_t wide;
  float *q, *results, *sums, *tops, *scale;
  int32_t* start;  // what the keys' offset of 128 adds up to, negated
  int32_t* sees;   // how many positions a row sees, from 0 on; its window aside
  int8_t *copies;  // of groups whose pages are smaller
};

PHL_INLINE void lay_out(const AttentionArgs& a, Int8Job& job, float* scratch) {
  const int64_t rows = job.m * job.kv_heads;
  job.wide = (a.head_size + W - 1) / W * W;
  const auto take = [&](int64_t floats) {
    float* at = scratch;
    scratch += (floats + 15) / 16 * 16;
    return at;
  };
  job.q = take((job.m + kInt8Rows) * job.kv_heads * a.head_size);
  job.results = take(rows * job.wide);
  job.sums = take(rows * W);
  job.tops = take(rows);
  job.scale = take(rows);
  job.start = reinterpret_cast<int32_t*>(take(rows));
  job.sees = reinterpret_cast<int32_t*>(take(rows));
  job.copies = reinterpret_cast<int8_t*>(take(2 * kBlockTokens * (a.head_size + 4) / 4));
}

// The group of 16 tokens from `token` on, put together from smaller blocks.
PHL_INLINE void copy_group(const AttentionArgs& a, const int32_t* pages, int64_t kv_head, int64_t token, int64_t end,
                           int8_t* keys, int8_t* values) {
  const int64_t size = a.head_size, width = size + 4, tokens = block_tokens(a.page_size);
  for (int64_t t = 0; t < kGroup; t += tokens) {
    const int64_t from = token + t < end ? token + t : token;
    const int64_t at = pages[from / a.page_size] * a.page_stride + (kv_head * a.page_size + from % a.page_size) * width;
    const int8_t *key = static_cast<const int8_t*>(a.k_cache) + at, *value = static_cast<const int8_t*>(a.v_cache) + at;
    for (int64_t d = 0; d < size; d += 4) __builtin_memcpy(keys + d * kGroup + 4 * t, key + d * tokens, 4 * tokens);
    __builtin_memcpy(values + t * size, value, tokens * size);
    __builtin_memcpy(keys + kGroup * size + 4 * t, key + tokens * size, 4 * tokens);
    __builtin_memcpy(values + kGroup * size + 4 * t, value + tokens * size, 4 * tokens);
  }
}

// Groups of the tile [begin, end), at most 64 tokens from a multiple of 16. Groups past the end repeat the first: they
// are masked.
PHL_INLINE Int8Tile find_tile(const AttentionArgs& a, int64_t row, int64_t kv_head, int64_t begin, int64_t end,
                              int8_t* copies) {
  Int8Tile tile;
  const int32_t* pages = a.page_table + row * a.pages_per_row;
  const int64_t width = a.head_size + 4;
  for (int64_t g = 0; g < kGroups; ++g) {
    const int64_t token = begin + g * kGroup;
    if (token >= end) {
      tile.keys[g] = tile.keys[0];
      tile.values[g] = tile.values[0];
    } else if (a.page_size % kGroup == 0) {
      const int64_t page = token / a.page_size, slot = token % a.page_size;
      const int64_t at = pages[page] * a.page_stride + (kv_head * a.page_size + slot) * width;
      tile.keys[g] = static_cast<const int8_t*>(a.k_cache) + at;
      tile.values[g] = static_cast<const int8_t*>(a.v_cache) + at;
    } else {
      int8_t* const to = copies + 2 * g * kGroup * width;
      copy_group(a, pages, kv_head, token, end, to, to + kGroup * width);
      tile.keys[g] = to;
      tile.values[g] = to + kGroup * width;
    }
  }
  return tile;
}

// Asks for a tile's bytes line by line, spread over the computation of another: a burst would only wait in the queues.
// Into the second-level cache, whose queue of outstanding lines is longer than the first level's.
struct TileAhead {
  const int8_t* groups[2 * kGroups];
  int64_t bytes, group, at;  // of a group; the next line

  PHL_INLINE TileAhead() : group(2 * kGroups), at(0) {}
  PHL_INLINE TileAhead(const Int8Tile& tile, int64_t size) : bytes(kGroup * (size + 4)), group(0), at(0) {
    for (int64_t g = 0; g < kGroups; ++g) groups[g] = tile.keys[g], groups[kGroups + g] = tile.values[g];
  }
  PHL_INLINE bool any() const { return group < 2 * kGroups; }
  PHL_INLINE void lines(int64_t count) {
    for (; count > 0 && any(); --count) {
      __builtin_prefetch(groups[group] + at, 0, 2);
      at += 64;
      if (at >= bytes) at = 0, ++group;
    }
  }
};

// x * f + y * g. Which of the products is rounded first must not depend on how many rows there are: the compiler would
// choose anew for each number.
PHL_INLINE vf shrunk_sum(vf x, float f, vf y, float g) {
#if PHL_LEVEL == 1
  return (vf)_mm256_fmadd_ps((__m256)x, _mm256_set1_ps(f), _mm256_mul_ps((__m256)y, _mm256_set1_ps(g)));
#elif defined(__aarch64__)
  return (vf)vfmaq_n_f32(vmulq_n_f32((float32x4_t)y, g), (float32x4_t)x, f);
#else
  return x * f + y * g;
#endif
}

// A number that is rounded before it goes on, for the same reason.
PHL_INLINE vf alone(vf x) {
#if PHL_LEVEL == 1
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// What a tile's rows have in common.
struct Int8Span {
  Int8Tile tile;
  TileAhead ahead;  // what is asked for meanwhile
  int64_t begin, end;    // positions: the first token's, and that behind the last valid one
  float* weights;        // [64] of the values: kMostWeight * scale / largest scale (portable: scale)
  float unit;            // largest scale / kMostWeight (portable: 1)
};

constexpr float kMostWeight = PHL_LEVEL == 2 ? 255.0f : PHL_NEON ? 16300.0f : 1.0f;  // in a tile

PHL_INLINE const float* scales_of(const int8_t* group, int64_t size) {
  return reinterpret_cast<const float*>(group + kGroup * size);
}

#if PHL_LEVEL == 2
PHL_INLINE int32_t highest_of(vi x) { return _mm512_reduce_max_epi32((__m512i)x); }
#elif PHL_LEVEL == 1
PHL_INLINE int32_t highest_of(vi x) {
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  y = _mm_max_epi32(y, _mm_unpackhi_epi64(y, y));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 1)));
}
#elif PHL_NEON
PHL_INLINE int32_t highest_of(vi x) { return vmaxvq_s32((int32x4_t)x); }
#endif

// Scales of the values that exist. A NaN there is the largest.
PHL_INLINE void weigh_values(const AttentionArgs& a, int64_t first, Int8Span& span) {
  vi top{};
  for (int64_t t = 0; t < kBlockTokens; t += W) {
    const vf scale = load(scales_of(span.tile.values[t / kGroup], a.head_size) + t % kGroup);
    const vi lane = load_as<vi>(kLane) + int32_t(t);
    const vi there = (lane < vi{} + int32_t(span.end - span.begin)) & (lane >= vi{} + int32_t(first - span.begin));
    const vi bits = (vi)scale & there;
    store(span.weights + t, (vf)bits);
    top = bits > top ? bits : top;
  }
#if PHL_LEVEL >= 1 || PHL_NEON
  const float largest = __builtin_bit_cast(float, highest_of(top));
  span.unit = largest / kMostWeight;
  const float factor = largest > 0.0f ? kMostWeight / largest : 0.0f;
  for (int64_t t = 0; t < kBlockTokens; t += W) store(span.weights + t, load(span.weights + t) * factor);
#else
  span.unit = 1.0f;
#endif
}

#if PHL_LEVEL == 2

// sum += four products of unsigned and signed bytes, in place: around the intrinsic gcc 12 copies and spills the sums.
PHL_INLINE void add_dot(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}
PHL_INLINE void add_dot(__m512i& sum, __m512i bytes, const int32_t& signed_word) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(bytes), "m"(signed_word));
}

// Words of four bytes of a query row. Rows that are taken together lie word by word beside each other.
PHL_INLINE int32_t* query_words(const Int8Job& job, int64_t size, int64_t row) {
  const int64_t tiles = (job.m + kInt8Rows - 1) / kInt8Rows;
  const int64_t tile = row / job.m * tiles + row % job.m / kInt8Rows;
  return reinterpret_cast<int32_t*>(job.q) + tile * kInt8Rows * (size / 4) + row % job.m % kInt8Rows;
}

// Query rows as bytes with one scale each, which takes the attention's own in.
PHL_INLINE void pack_query(const AttentionArgs& a, const Int8Job& job, const float* q, int64_t row) {
  const int64_t size = a.head_size;
  int32_t* to = query_words(job, size, row);
  __m512i top = _mm512_setzero_si512();
  for (int64_t d = 0; d < size; d += W) {
    const vf x = load_n(q + d, size - d < W ? size - d : W);
    top = _mm512_max_epi32(top, _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7FFFFFFF)));
  }
  const float largest = __builtin_bit_cast(float, int32_t(_mm512_reduce_max_epi32(top)));  // NaN, if there is one
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  __m512i sum = _mm512_setzero_si512();
  for (int64_t d = 0; d < size; d += W) {
    const int64_t n = size - d < W ? size - d : W;
    const __m512i whole = _mm512_cvtps_epi32((__m512)(load_n(q + d, n) * inverse));
    sum = _mm512_add_epi32(sum, whole);
    alignas(16) int32_t words[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtsepi32_epi8(whole));
    for (int64_t i = 0; i < n; i += 4, to += kInt8Rows) *to = words[i / 4];
  }
  const double factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * double(kLog2e);
  // Not 0: what is masked must stay small.
  job.scale[row] = largest == 0.0f ? 1e-20f : largest / 127.0f * float(factor);
  job.start[row] = -128 * _mm512_reduce_add_epi32(sum);
}

// scores[r][t] = q_r . k_t / the row's scale, for the first C groups; `ahead`'s keys are asked for.
template <int R, int C>
PHL_INLINE void dots(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, float (*scores)[kBlockTokens]) {
  const int64_t size = a.head_size;
  const int32_t* q = query_words(job, size, first);
  __m512i acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = _mm512_set1_epi32(job.start[first + r]);
  const bool fetch = span.ahead.any();
  for (int64_t d = 0; d < size; d += 4, q += kInt8Rows) {
    __m512i key[C];
    for (int c = 0; c < C; ++c) key[c] = _mm512_loadu_si512(span.tile.keys[c] + d * kGroup);
    if (fetch) span.ahead.lines(kLinesPerStep);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) add_dot(acc[r][c], key[c], q[r]);
    }
  }
  for (int c = 0; c < C; ++c) {
    const vf scale = load(scales_of(span.tile.keys[c], size));
    for (int r = 0; r < R; ++r) store(scores[r] + c * W, (vf)_mm512_cvtepi32_ps(acc[r][c]) * scale);
  }
}

using Weight = uint8_t;

// 2^x for x <= 0, to 8e-5: the weights have 8 bits. Very small for anything below -150; a NaN passes.
PHL_INLINE vf power(vf x) {
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, 8), r = x - n;
  vf p = splat(5.517166e-2f);
  p = p * r + 2.4261114e-1f;
  p = p * r + 6.9326099e-1f;
  p = p * r + 9.9992807e-1f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
}

PHL_INLINE void store_weights(Weight* row, int64_t token, vf weights) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(row + token), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32((__m512)weights)));
}

// results[r] = results[r] * factor[r] + unit[r] * the tile's weighted values, of its first `quads` times four tokens.
template <int R, int C>
PHL_INLINE void add_columns(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t quads,
                            const Weight (*weights)[kBlockTokens], const float* factor, const float* unit, int64_t column) {
  __m512i acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_si512();
  const bool fetch = span.ahead.any();
  for (int64_t quad = 0; quad < quads; ++quad) {
    const int64_t at = quad % 4 * 4 * a.head_size + 4 * column;
    const int8_t* from = span.tile.values[quad / 4] + at;
    __m512i value[C];
    for (int c = 0; c < C; ++c) value[c] = _mm512_loadu_si512(from + 64 * c);
    if (fetch) span.ahead.lines(kLinesPerStep);
    for (int r = 0; r < R; ++r) {
      int32_t word;
      __builtin_memcpy(&word, weights[r] + 4 * quad, 4);
      const __m512i left = _mm512_set1_epi32(word);
      for (int c = 0; c < C; ++c) add_dot(acc[r][c], left, value[c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float* to = job.results + (first + r) * job.wide + column;
    for (int c = 0; c < C; ++c) store(to + c * W, load(to + c * W) * factor[r] + (vf)_mm512_cvtepi32_ps(acc[r][c]) * unit[r]);
  }
}

#elif PHL_LEVEL == 1 || PHL_NEON

// 2^x for x <= 0, to 4e-5. Very small for anything below -125; a NaN passes, as arithmetic makes it.
PHL_INLINE vf power(vf x) {
  x = max(splat(-125.0f), x);
  const vf shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
  vf p = splat(9.61812911e-3f);
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.0f;
  return (vf)((vu)p + ((vu)shifted << 23));  // unsigned, as a NaN has any bits; a product takes longer
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
#if PHL_NEON
#include "attention_dots.h"
#else
#include "attention_bytes.h"
#endif
namespace phl {
namespace PHL_NS {
namespace {

#else

PHL_INLINE void pack_query(const AttentionArgs& a, const Int8Job& job, const float* q, int64_t row) {
  const double factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * double(kLog2e);
  for (int64_t d = 0; d < a.head_size; ++d) job.q[row * a.head_size + d] = q[d];
  job.scale[row] = float(factor);
}

template <int R, int C>
PHL_INLINE void dots(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, float (*scores)[kBlockTokens]) {
  const float* q = job.q + first * a.head_size;
  for (int64_t t = 0; t < C * kGroup; t += W) {
    const int8_t* keys = span.tile.keys[t / kGroup] + t % kGroup * 4;
    vf acc[R] = {};
    for (int64_t d = 0; d < a.head_size; d += 4) {
      const vu four = load_as<vu>(keys + d * kGroup);
      for (int j = 0; j < 4; ++j) {
        const vf key = to_float((vi)((four >> (8 * j)) & 255u) - 128);
        for (int r = 0; r < R; ++r) acc[r] += key * q[r * a.head_size + d + j];
      }
    }
    const vf scale = load(scales_of(span.tile.keys[t / kGroup], a.head_size) + t % kGroup);
    for (int r = 0; r < R; ++r) store(scores[r] + t, acc[r] * scale);
  }
}

using Weight = float;

PHL_INLINE vf power(vf x) { return exp2<6>(x); }

PHL_INLINE void store_weights(Weight* row, int64_t token, vf weights) { store(row + token, weights); }

template <int R, int C>
PHL_INLINE void add_columns(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t quads,
                            const Weight (*weights)[kBlockTokens], const float* factor, const float* unit, int64_t column) {
  for (int c = 0; c < C; ++c, column += W) {
    vf acc[R] = {};
    for (int64_t quad = 0; quad < quads; ++quad) {
      const vi four = load_as<vi>(span.tile.values[quad / 4] + quad % 4 * 4 * a.head_size + 4 * column);
      for (int j = 0; j < 4; ++j) {
        const vf value = to_float((vi)((vu)four << (24 - 8 * j)) >> 24);
        for (int r = 0; r < R; ++r) acc[r] += value * weights[r][4 * quad + j];
      }
    }
    for (int r = 0; r < R; ++r) {
      float* to = job.results + (first + r) * job.wide + column;
      store(to, load(to) * factor[r] + acc[r] * unit[r]);
    }
  }
}

#endif

constexpr float kHidden = -1e30f;

// The maximum of each row's lanes, in the row's lane; R lanes count.
template <int R>
PHL_INLINE vf maxima(const vf (&rows)[R]) {
  static_assert(R <= W && R <= 8);
#if PHL_LEVEL == 2
  // Two rows in one register after the first step, four after the second, eight after the third.
  const auto row = [&](int r) { return (__m512)rows[r < R ? r : R - 1]; };
  const auto four = [&](int r) {
    const __m512 x = _mm512_max_ps(_mm512_unpacklo_ps(row(r), row(r + 1)), _mm512_unpackhi_ps(row(r), row(r + 1)));
    const __m512 y = _mm512_max_ps(_mm512_unpacklo_ps(row(r + 2), row(r + 3)), _mm512_unpackhi_ps(row(r + 2), row(r + 3)));
    const __m512d a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
    return _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  };
  const __m512 low = four(0), high = R > 4 ? four(4) : low;
  const __m512 both = _mm512_max_ps(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xee));
  const __m512 whole = _mm512_max_ps(both, _mm512_shuffle_f32x4(both, both, 0xb1));
  return (vf)_mm512_shuffle_f32x4(whole, whole, 0x08);
#else
  alignas(64) float found[W] = {};
  for (int r = 0; r < R; ++r) found[r] = largest(rows[r]);
  return load(found);
#endif
}

// Cap and mask of one row's scores in the first C groups: of each lane the maximum. Tokens outside of [low, high) are
// hidden.
template <int C>
PHL_INLINE vf shape(const AttentionArgs& a, float* scores, float scale, int64_t low, int64_t high) {
  constexpr int64_t kTokens = C * kGroup;
  if (a.softcap > 0) {
    for (int64_t t = 0; t < kTokens; t += W) {
      store(scores + t, tanh(load(scores + t) * scale) * float(a.softcap * double(kLog2e)));
    }
  }
  if (low > 0 || high < kTokens) {
    for (int64_t t = 0; t < kTokens; t += W) {
      const vi lane = load_as<vi>(kLane) + int32_t(t);
      const vi out = (lane >= vi{} + int32_t(high)) | (lane < vi{} + int32_t(low));
      store(scores + t, select(out, splat(kHidden), load(scores + t)));
    }
  }
  vf highest = load(scores);
  for (int64_t t = W; t < kTokens; t += W) highest = max(highest, load(scores + t));
  return highest;
}

// R query rows from `first` of a kv head against the first C groups of a tile, of which the last row sees `seen` tokens.
template <int R, int C>
PHL_INLINE void tile(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t seen) {
  alignas(64) float scores[R][kBlockTokens];
  alignas(64) Weight weights[R][kBlockTokens];
  dots<R, C>(a, job, span, first, scores);
  vf highest[R];
  for (int r = 0; r < R; ++r) {
    const int64_t sees = job.sees[first + r], window = a.window > 0 ? sees - a.window : 0;
    const int64_t high = (sees < span.end ? sees : span.end) - span.begin;
    const int64_t low = (window > job.range.begin ? window : job.range.begin) - span.begin;
    highest[r] = shape<C>(a, scores[r], job.scale[first + r], low, high);
  }
  // A row's weights are 2^(score * scale - base). What was added before shrinks, what is added now is a share. All rows
  // at once, a lane each; what the other lanes hold is not used.
  alignas(64) float base[W], scale[W], shrink[W], share[W], unit[W];
  const vf peak = maxima<R>(highest), factor = a.softcap > 0 ? splat(1.0f) : load(job.scale + first);
  const vf before = load(job.tops + first);
  const vi none = peak <= splat(kHidden);
  const vf from = alone(select(none, vf{}, peak * factor)), top = select(none | (before > from), before, from);
  const vf part = exp2<6>(select(none, vf{}, from - top));
  store(scale, factor);
  store(base, from);
  store(shrink, exp2<6>(before - top));
  store(share, part);
  store(unit, part * span.unit);
  store_n(job.tops + first, top, R);
  for (int r = 0; r < R; ++r) {
    vf total{};
    if (span.ahead.any()) span.ahead.lines(4 * kLinesPerStep);
    for (int64_t t = 0; t < C * kGroup; t += W) {
      const vf p = power(alone(load(scores[r] + t) * scale[r]) - base[r]);
      total += p;
#if PHL_LEVEL == 1
      store(scores[r] + t, p * load(span.weights + t));
#else
      store_weights(weights[r], t, p * load(span.weights + t));
#endif
    }
#if PHL_LEVEL == 1
    unit[r] *= pack_weights(scores[r], C * kGroup, weights[r]);
#endif
    float* const sums = job.sums + (first + r) * W;
    store(sums, shrunk_sum(load(sums), shrink[r], total, share[r]));
  }
  const int64_t quads = (seen + 3) / 4;
  int64_t column = 0;
  for (; column + 4 * W <= job.wide; column += 4 * W) {
    add_columns<R, 4>(a, job, span, first, quads, weights, shrink, unit, column);
  }
  for (; column < job.wide; column += W) {
    add_columns<R, 1>(a, job, span, first, quads, weights, shrink, unit, column);
  }
}

// Count rows, at most R, of one kv head.
template <int R>
PHL_INLINE void rows_of_tile(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t count) {
  if constexpr (R > 1) {
    if (count < R) return rows_of_tile<R - 1>(a, job, span, first, count);
  }
  // How many of the tile's tokens the last of these rows sees; none of them needs more.
  const int64_t last = job.sees[first + R - 1], seen = (last < span.end ? last : span.end) - span.begin;
  if (seen > 2 * kGroup) tile<R, 4>(a, job, span, first, seen);
  else if (seen > kGroup) tile<R, 2>(a, job, span, first, seen);
  else if (seen > 0) tile<R, 1>(a, job, span, first, seen);
}

PHL_INLINE int64_t tile_begin(Range range) { return range.begin / kGroup * kGroup; }

void attend_int8(const AttentionArgs& a, Int8Job& job) {
  const int64_t group = a.heads / a.kv_heads, rows = job.m * job.kv_heads;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t head = (job.kv_head + i / job.m) * group + i % job.m % group, at = i % job.m / group;
    const int64_t token = job.sharers == nullptr ? job.token + at : a.query_start[job.sharers[at]];
    pack_query(a, job, a.q + token * a.q_token + head * a.q_head, i);
    store(job.sums + i * W, vf{});
    job.tops[i] = kNoScore;
    job.sees[i] = int32_t(job.sharers == nullptr ? sees(a, job.position + at) : job.range.end);
  }
  for (int64_t i = 0; i < rows * job.wide; i += W) store(job.results + i, vf{});
  alignas(64) float weights[kBlockTokens];
  const bool direct = a.page_size % kGroup == 0;
  for (int64_t begin = tile_begin(job.range); begin < job.range.end; begin += kBlockTokens) {
    const int64_t end = begin + kBlockTokens < job.range.end ? begin + kBlockTokens : job.range.end;
    for (int64_t h = 0; h < job.kv_heads; ++h) {
      Int8Span span{find_tile(a, job.row, job.kv_head + h, begin, end, job.copies), TileAhead(), begin, end, weights, 0.0f};
      weigh_values(a, job.range.begin, span);
      if (direct) {
        const Range& next = job.guess.range;
        if (end < job.range.end) {
          span.ahead = TileAhead(find_tile(a, job.row, job.kv_head + h, end, job.range.end, nullptr), a.head_size);
        } else if (next.begin < next.end) {
          span.ahead = TileAhead(find_tile(a, job.guess.row, job.guess.kv_head + h, tile_begin(next), next.end, nullptr), a.head_size);
        }
      }
      for (int64_t i = 0; i < job.m; i += kInt8Rows) {
        rows_of_tile<kInt8Rows>(a, job, span, h * job.m + i, job.m - i);
      }
      span.ahead.lines(2 * kBlockTokens);
    }
  }
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
