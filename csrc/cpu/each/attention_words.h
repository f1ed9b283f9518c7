// What attention_int8.h does with AVX2: products of words, whose sums are int32. Keys and values are taken apart into even
// and odd bytes once for all the rows of a tile. With AVX-VNNI a product and its sum are one instruction; the bits are the same.
#pragma once
#if PHL_VNNI
#include "../vnni.h"
#endif

namespace phl {
namespace PHL_NS {
namespace {

// Query rows as words with one scale each: of every four values the even ones, then the odd, as keys are taken apart.
PHL_INLINE int16_t* query_words(const Int8Job& job, int64_t size, int64_t row) {
  return reinterpret_cast<int16_t*>(job.q + row * size);
}

PHL_INLINE void pack_query(const AttentionArgs& a, const Int8Job& job, const float* q, int64_t row) {
  constexpr float kMost = 8191.0f;  // times 255 and a head of 512: still an int32
  const int64_t size = a.head_size;
  int16_t* to = query_words(job, size, row);
  vi top{};
  for (int64_t d = 0; d < size; d += W) {
    const vi bits = (vi)load_n(q + d, size - d < W ? size - d : W) & 0x7FFFFFFF;
    top = bits > top ? bits : top;
  }
  const float largest = __builtin_bit_cast(float, highest_of(top));  // NaN, if there is one
  const vf inverse = splat(largest > 0.0f ? kMost / largest : 0.0f);
  vi sum{};
  for (int64_t d = 0; d < size; d += W) {
    const int64_t n = size - d < W ? size - d : W;
    const __m256i whole = _mm256_cvtps_epi32((__m256)((n == W ? load(q + d) : load_n(q + d, n)) * inverse));
    sum += (vi)whole;
    const __m128i words = even_and_odd(whole);
    __builtin_memcpy(to + d, &words, size_t(2 * n));
  }
  int32_t total = 0;
  for (int i = 0; i < W; ++i) total += sum[i];
  const double factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * double(kLog2e);
  // Not 0: what is masked must stay small.
  job.scale[row] = largest == 0.0f ? 1e-20f : largest / kMost * float(factor);
  job.start[row] = -128 * total;
}

// sum + pairs of words, multiplied. One after the other: gcc 12 would make many products first, and put them on the stack.
// By value, as it leaves an array there whose elements an asm refers to.
PHL_INLINE __m256i add_pairs(__m256i sum, __m256i x, __m256i y) {
#if PHL_VNNI
  sum = dot_words(sum, x, y);
#else
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
#endif
  asm("" : "+x"(sum));
  return sum;
}
PHL_INLINE __m256i word_at(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm256_set1_epi32(pair);
}

template <int R, int C>
PHL_INLINE void dots(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, float (*scores)[kBlockTokens]) {
  constexpr int V = kGroup / W;
  const int64_t size = a.head_size;
  const __m256i low = _mm256_set1_epi16(255);
  const bool fetch = span.ahead.any();
  for (int c = 0; c < C; ++c) {
    const int16_t* q = query_words(job, size, first);
    const int8_t* keys = span.tile.keys[c];
    __m256i acc[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = _mm256_set1_epi32(job.start[first + r]);
    for (int64_t d = 0; d < size; d += 4, q += 4, keys += 4 * kGroup) {
      __m256i even[V], odd[V];
      for (int v = 0; v < V; ++v) {
        const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 32 * v));
        even[v] = _mm256_and_si256(four, low);
        odd[v] = _mm256_srli_epi16(four, 8);
      }
      if (fetch) span.ahead.lines(1);
      for (int r = 0; r < R; ++r) {
        const __m256i x = word_at(q + 2 * r * size), y = word_at(q + 2 * r * size + 2);
        for (int v = 0; v < V; ++v) acc[r][v] = add_pairs(acc[r][v], even[v], x);
        for (int v = 0; v < V; ++v) acc[r][v] = add_pairs(acc[r][v], odd[v], y);
      }
    }
    for (int v = 0; v < V; ++v) {
      const vf scale = load(scales_of(span.tile.keys[c], size) + v * W);
      for (int r = 0; r < R; ++r) store(scores[r] + c * kGroup + v * W, (vf)_mm256_cvtepi32_ps(acc[r][v]) * scale);
    }
  }
}

using Weight = int16_t;

PHL_INLINE void store_weights(Weight* row, int64_t token, vf weights) {
  const __m128i words = even_and_odd(_mm256_cvtps_epi32((__m256)weights));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(row + token), words);
}

// As below, W columns V times.
template <int R, int V>
PHL_INLINE void add_some(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t quads,
                         const Weight (*weights)[kBlockTokens], const float* factor, const float* unit, int64_t column) {
  __m256i acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = _mm256_setzero_si256();
  const bool fetch = span.ahead.any();
  const int8_t* from = nullptr;
  for (int64_t quad = 0; quad < quads; ++quad, from += 4 * a.head_size) {
    if (quad % 4 == 0) from = span.tile.values[quad / 4] + 4 * column;
    __m256i even[V], odd[V];
    for (int v = 0; v < V; ++v) {
      const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * v));
      even[v] = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
      odd[v] = _mm256_srai_epi16(four, 8);
    }
    if (fetch) span.ahead.lines(1);
    for (int r = 0; r < R; ++r) {
      const __m256i x = word_at(weights[r] + 4 * quad), y = word_at(weights[r] + 4 * quad + 2);
      for (int v = 0; v < V; ++v) acc[r][v] = add_pairs(acc[r][v], even[v], x);
      for (int v = 0; v < V; ++v) acc[r][v] = add_pairs(acc[r][v], odd[v], y);
    }
  }
  for (int r = 0; r < R; ++r) {
    float* to = job.results + (first + r) * job.wide + column;
    for (int v = 0; v < V; ++v) {
      const vf sum = (vf)_mm256_cvtepi32_ps(acc[r][v]);
      store(to + v * W, shrunk_sum(load(to + v * W), factor[r], sum, unit[r]));
    }
  }
}

// results[r] = results[r] * factor[r] + unit[r] * the tile's weighted values, of its first `quads` times four tokens.
template <int R, int C>
PHL_INLINE void add_columns(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t quads,
                            const Weight (*weights)[kBlockTokens], const float* factor, const float* unit, int64_t column) {
  constexpr int V = C > 1 ? 2 : 1;
  for (int c = 0; c < C; c += V) add_some<R, V>(a, job, span, first, quads, weights, factor, unit, column + c * W);
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
