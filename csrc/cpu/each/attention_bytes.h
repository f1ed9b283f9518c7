// What attention_int8.h does with AVX2: products of bytes, as keys and values lie in their pages. vpmaddubsw adds two
// products as a word, and the words of two steps are added before vpmaddwd widens them: five instructions for 64
// products, where words take eight and must be taken apart first. So that no word overflows, four numbers of a query
// (four weights of a tile) share one: a row's scale is such that no four of one word, those of one sign, add up to more
// than a word bears. A number alone in its four has seven bits of magnitude, a weight eight; four that are alike have
// five and six. With AVX-VNNI a product and its sum are one instruction; the bits are the same.
#pragma once
#if PHL_VNNI
#include "../vnni.h"
#endif

namespace phl {
namespace PHL_NS {
namespace {

constexpr float kMostOfFour = 126.0f;         // of a query: rounded 128, times a key of 255 a word
constexpr float kMostOfFourWeights = 253.0f;  // rounded 255, times a value of 128

// Sums of the four numbers that a word takes, of twice eight: those at 0, 1, 4, 5 and at 2, 3, 6, 7.
PHL_INLINE __m128 fours(__m256 x, __m256 y) {
  const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xdd));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}
// As whole numbers, of which a NaN is the largest.
PHL_INLINE __m128i magnitude(__m128 x) { return _mm_and_si128(_mm_castps_si128(x), _mm_set1_epi32(0x7FFFFFFF)); }
PHL_INLINE float highest_of(__m128i x) {
  x = _mm_max_epi32(x, _mm_unpackhi_epi64(x, x));
  return __builtin_bit_cast(float, _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 1))));
}

// Query rows as bytes with one scale each.
PHL_INLINE int8_t* query_bytes(const Int8Job& job, int64_t size, int64_t row) {
  return reinterpret_cast<int8_t*>(job.q + row * size);
}

PHL_INLINE void pack_query(const AttentionArgs& a, const Int8Job& job, const float* q, int64_t row) {
  const int64_t size = a.head_size;
  int8_t* to = query_bytes(job, size, row);
  const auto eight = [&](int64_t d) { return (__m256)(size - d >= W ? load(q + d) : load_n(q + d, size - d)); };
  __m128i top = _mm_setzero_si128();
  for (int64_t d = 0; d < size; d += W) {
    const __m256 x = eight(d), zero = _mm256_setzero_ps();
    const __m256 above = _mm256_max_ps(zero, x), below = _mm256_max_ps(zero, _mm256_sub_ps(zero, x));  // of a NaN, it
    top = _mm_max_epi32(top, magnitude(fours(above, below)));
  }
  const float largest = highest_of(top);  // NaN, if there is one
  const __m256 inverse = _mm256_set1_ps(largest > 0.0f ? kMostOfFour / largest : 0.0f);
  vi sum{};
  for (int64_t d = 0; d < size; d += W) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(eight(d), inverse));
    sum += (vi)whole;
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
    __builtin_memcpy(to + d, &bytes, size_t(size - d >= W ? W : size - d));
  }
  int32_t total = 0;
  for (int i = 0; i < W; ++i) total += sum[i];
  const double factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * double(kLog2e);
  // Not 0: what is masked must stay small.
  job.scale[row] = largest == 0.0f ? 1e-20f : largest / kMostOfFour * float(factor);
  job.start[row] = -128 * total;
}

PHL_INLINE __m256i bytes_at(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
PHL_INLINE __m256i four_at(const void* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// sum + products of unsigned and signed bytes of two steps (one: y and v are not there). One after the other: gcc 12
// would make many products first, and put them on the stack. By value, as it leaves an array there whose elements an
// asm refers to.
template <bool Two>
PHL_INLINE __m256i add_bytes(__m256i sum, __m256i x, __m256i u, __m256i y, __m256i v) {
#if PHL_VNNI
  sum = dot_bytes(sum, x, u);
  if (Two) sum = dot_bytes(sum, y, v);
#else
  __m256i words = _mm256_maddubs_epi16(x, u);
  if (Two) words = _mm256_add_epi16(words, _mm256_maddubs_epi16(y, v));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
#endif
  asm("" : "+x"(sum));
  return sum;
}

template <int R, int C>
PHL_INLINE void dots(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first,
                     float (*scores)[kBlockTokens]) {
  constexpr int V = kGroup / W;
  const int64_t size = a.head_size;
  const bool fetch = span.ahead.any();
  for (int c = 0; c < C; ++c) {
    const int8_t* q = query_bytes(job, size, first);
    const int8_t* keys = span.tile.keys[c];
    __m256i acc[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = _mm256_set1_epi32(job.start[first + r]);
    int64_t d = 0;
    for (; d + 8 <= size; d += 8, q += 8, keys += 8 * kGroup) {
      __m256i x[V], y[V];
      for (int v = 0; v < V; ++v) x[v] = bytes_at(keys + 32 * v), y[v] = bytes_at(keys + 4 * kGroup + 32 * v);
      if (fetch) span.ahead.lines(2);
      for (int r = 0; r < R; ++r) {
        const __m256i four = four_at(q + 4 * r * size), next = four_at(q + 4 * r * size + 4);
        for (int v = 0; v < V; ++v) acc[r][v] = add_bytes<true>(acc[r][v], x[v], four, y[v], next);
      }
    }
    if (d < size) {
      for (int r = 0; r < R; ++r) {
        const __m256i four = four_at(q + 4 * r * size);
        for (int v = 0; v < V; ++v) acc[r][v] = add_bytes<false>(acc[r][v], bytes_at(keys + 32 * v), four, four, four);
      }
    }
    for (int v = 0; v < V; ++v) {
      const vf scale = load(scales_of(span.tile.keys[c], size) + v * W);
      for (int r = 0; r < R; ++r) store(scores[r] + c * kGroup + v * W, (vf)_mm256_cvtepi32_ps(acc[r][v]) * scale);
    }
  }
}

using Weight = uint8_t;

// A row's weights of so many tokens (a multiple of 16) as bytes: what one of them stands for.
PHL_INLINE float pack_weights(const float* from, int64_t tokens, Weight* to) {
  const auto eight = [&](int64_t t) { return (__m256)load(from + t); };
  __m128i top = _mm_setzero_si128();
  for (int64_t t = 0; t < tokens; t += 2 * W) top = _mm_max_epi32(top, magnitude(fours(eight(t), eight(t + W))));
  const float largest = highest_of(top);
  const __m256 inverse = _mm256_set1_ps(largest > 0.0f ? kMostOfFourWeights / largest : 0.0f);
  for (int64_t t = 0; t < tokens; t += 2 * W) {
    const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(eight(t), inverse));
    const __m256i y = _mm256_cvtps_epi32(_mm256_mul_ps(eight(t + W), inverse));
    const __m256i words = _mm256_packs_epi32(x, y), bytes = _mm256_packus_epi16(words, words);
    const __m256i sorted = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + t), _mm256_castsi256_si128(sorted));
  }
  return largest * (1.0f / kMostOfFourWeights);
}

// As below, W columns V times. Of a group's last tokens those that nobody sees weigh nothing.
template <int R, int V>
PHL_INLINE void add_some(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t quads,
                         const Weight (*weights)[kBlockTokens], const float* factor, const float* unit, int64_t column) {
  __m256i acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = _mm256_setzero_si256();
  const bool fetch = span.ahead.any();
  const int64_t step = 4 * a.head_size;
  const int8_t* from = nullptr;
  for (int64_t quad = 0; quad < quads; quad += 2, from += 2 * step) {
    if (quad % 4 == 0) from = span.tile.values[quad / 4] + 4 * column;
    __m256i x[V], y[V];
    for (int v = 0; v < V; ++v) x[v] = bytes_at(from + 32 * v), y[v] = bytes_at(from + step + 32 * v);
    if (fetch) span.ahead.lines(2);
    for (int r = 0; r < R; ++r) {
      const __m256i four = four_at(weights[r] + 4 * quad), next = four_at(weights[r] + 4 * quad + 4);
      for (int v = 0; v < V; ++v) acc[r][v] = add_bytes<true>(acc[r][v], four, x[v], next, y[v]);
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
