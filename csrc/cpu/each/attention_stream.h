// One query token: its G heads against a stretch of the cache, which is read once. In float32, except with AVX-512
// where the head size allows pairs: on a bfloat16 cache queries are high and low halves (16 bits in all) and weights
// bfloat16, as in the blocked path; on an int8 cache queries and weights are 16-bit integers (vpdpwssd).
#pragma once
#include "attention_args.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kTile = 128;     // tokens between two looks at the running maximum
constexpr int64_t kAhead = 32;     // tokens whose keys are asked for in advance
constexpr int64_t kMaxPairedHead = 256;
constexpr int kColumns = PHL_LEVEL == 1 ? 2 : 4;

// The sums over the lanes of four vectors, as four floats.
PHL_INLINE void sum4(vf a, vf b, vf c, vf d, float* out) {
#if PHL_LEVEL == 2
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xEE);
  const __m512 lanes = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif PHL_LEVEL == 1
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

PHL_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(row) + at);
}

struct StreamJob {
  const float* q[kMaxStreamGroup];
  int64_t row, kv_head;
  Range range;
  float* values[kMaxStreamGroup];  // [D] each
  float top[kMaxStreamGroup], total[kMaxStreamGroup];
};

// Asks for the values of tokens t to t + 3, and for the keys kAhead further on (`known` offsets reach that far).
template <class Value>
PHL_INLINE void prefetch_tile(const AttentionArgs& a, const int64_t* offsets, int64_t t, int64_t known) {
  const int64_t bytes = a.head_size * int64_t(sizeof(Value));
  for (int64_t i = t; i < t + 4; ++i) prefetch_row(static_cast<const Value*>(a.v_cache) + offsets[i], bytes);
  for (int64_t i = t + kAhead; i < t + kAhead + 4 && i < known; ++i) {
    prefetch_row(static_cast<const Value*>(a.k_cache) + offsets[i], bytes);
  }
}

// scores[g][t] = q_g . k_t for the tile's tokens, in fours; the tile is padded with its last token.
template <int G, bool kInt8>
PHL_INLINE void tile_scores(const AttentionArgs& a, const StreamJob& job, const int64_t* offsets, int64_t count,
                            int64_t known, float (*scores)[kTile]) {
  using Rows = Cache<kInt8>;
  using Value = typename Rows::Value;
  const Value* keys = static_cast<const Value*>(a.k_cache);
  for (int64_t t = 0; t < count; t += 4) {
    const Value* k[4];
    for (int i = 0; i < 4; ++i) k[i] = keys + offsets[t + i];
    prefetch_tile<Value>(a, offsets, t, known);
    vf acc[G][4] = {};
    for (int64_t d = 0; d < a.head_size; d += W) {
      vf key[4];
      for (int i = 0; i < 4; ++i) key[i] = Rows::read(k[i] + d);
      for (int g = 0; g < G; ++g) {
        const vf q = load(job.q[g] + d);
        for (int i = 0; i < 4; ++i) acc[g][i] += q * key[i];
      }
    }
    for (int g = 0; g < G; ++g) sum4(acc[g][0], acc[g][1], acc[g][2], acc[g][3], scores[g] + t);
    if constexpr (kInt8) {
      for (int i = 0; i < 4; ++i) {
        const float scale = Rows::scale(k[i], a.head_size);
        for (int g = 0; g < G; ++g) scores[g][t + i] *= scale;
      }
    }
  }
}

// Turns a tile's scores into weights; gives the factor that earlier values must be multiplied by.
PHL_INLINE float tile_weights(const AttentionArgs& a, float* scores, int64_t count, float& top, float& total) {
  const float scale = float(a.scale) * kLog2e;
  vf highest = splat(kNoScore);
  // Whole pairs of vectors, for the pairing of weights.
  const int64_t padded = (count + 2 * W - 1) / (2 * W) * (2 * W);
  for (int64_t t = 0; t < padded; t += W) {
    vf s = load(scores + t);
    if (a.softcap > 0) s = tanh(s * float(a.scale / a.softcap)) * float(a.softcap * double(kLog2e));
    else s = s * scale;
    const vi past = vi{} + int32_t(count - t) <= load_as<vi>(kLane);
    s = select(past, splat(-__builtin_inff()), s);
    store(scores + t, s);
    highest = max(highest, s);
  }
  const float before = top, now = largest(highest);
  top = now > top ? now : top;
  vf added{};
  for (int64_t t = 0; t < padded; t += W) {
    const vf p = exp2<6>(load(scores + t) - top);
    store(scores + t, p);
    added += p;
  }
  const float factor = exp2<6>(splat(before - top))[0];
  total = total * factor + sum(added);
  return factor;
}

template <int G, bool kInt8>
PHL_INLINE void tile_values(const AttentionArgs& a, StreamJob& job, const int64_t* offsets, int64_t count,
                            const float (*weights)[kTile], const float* factor) {
  using Rows = Cache<kInt8>;
  using Value = typename Rows::Value;
  const Value* values = static_cast<const Value*>(a.v_cache);
  const auto columns = [&]<int C>(int64_t d) {
    vf acc[G][C];
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < C; ++c) acc[g][c] = load(job.values[g] + d + c * W) * factor[g];
    for (int64_t t = 0; t < count; ++t) {
      vf v[C];
      for (int c = 0; c < C; ++c) v[c] = Rows::read(values + offsets[t] + d + c * W);
      for (int g = 0; g < G; ++g)
        for (int c = 0; c < C; ++c) acc[g][c] += v[c] * weights[g][t];
    }
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < C; ++c) store(job.values[g] + d + c * W, acc[g][c]);
  };
  int64_t d = 0;
  for (; d + kColumns * W <= a.head_size; d += kColumns * W) columns.template operator()<kColumns>(d);
  for (; d < a.head_size; d += W) columns.template operator()<1>(d);
}

#if PHL_LEVEL == 2

using Halves = uint16_t[2][kMaxPairedHead];  // a query's high and low halves

template <int G>
PHL_INLINE void split_queries(const AttentionArgs& a, const StreamJob& job, Halves* halves) {
  for (int g = 0; g < G; ++g) {
    for (int64_t d = 0; d < a.head_size; d += W) {
      const vf q = load(job.q[g] + d);
      const vh high = to_bf16(q);
      store_as(halves[g][0] + d, high);
      store_bf16(halves[g][1] + d, q - from_bf16(high));
    }
  }
}

template <int G>
PHL_INLINE void paired_scores(const AttentionArgs& a, const Halves* halves, const int64_t* offsets, int64_t count,
                              int64_t known, float (*scores)[kTile]) {
  const uint16_t* keys = static_cast<const uint16_t*>(a.k_cache);
  for (int64_t t = 0; t < count; t += 4) {
    prefetch_tile<uint16_t>(a, offsets, t, known);
    __m512 acc[G][4];
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 4; ++i) acc[g][i] = _mm512_setzero_ps();
    for (int64_t d = 0; d < a.head_size; d += 2 * W) {
      __m512bh key[4];
      for (int i = 0; i < 4; ++i) key[i] = (__m512bh)_mm512_loadu_si512(keys + offsets[t + i] + d);
      for (int g = 0; g < G; ++g) {
        const auto high = (__m512bh)_mm512_loadu_si512(halves[g][0] + d);
        const auto low = (__m512bh)_mm512_loadu_si512(halves[g][1] + d);
        for (int i = 0; i < 4; ++i) acc[g][i] = _mm512_dpbf16_ps(acc[g][i], high, key[i]);
        for (int i = 0; i < 4; ++i) acc[g][i] = _mm512_dpbf16_ps(acc[g][i], low, key[i]);
      }
    }
    for (int g = 0; g < G; ++g) sum4((vf)acc[g][0], (vf)acc[g][1], (vf)acc[g][2], (vf)acc[g][3], scores[g] + t);
  }
}

template <int G>
PHL_INLINE void paired_values(const AttentionArgs& a, StreamJob& job, const int64_t* offsets, int64_t count,
                              const float (*weights)[kTile], const float* factor) {
  const uint16_t* values = static_cast<const uint16_t*>(a.v_cache);
  alignas(64) uint32_t cells[G][kTile / 2];
  for (int g = 0; g < G; ++g) {
    for (int64_t t = 0; t < count; t += 2 * W) {
      const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)load(weights[g] + t + W), (__m512)load(weights[g] + t));
      _mm512_store_si512(cells[g] + t / 2, (__m512i)pair);
    }
  }
  const __m512i first = _mm512_load_si512(kPairs.first), second = _mm512_load_si512(kPairs.second);
  const auto columns = [&]<int C>(int64_t d) {  // C vectors of 16 results
    __m512 acc[G][C];
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < C; ++c) acc[g][c] = (__m512)(load(job.values[g] + d + c * W) * factor[g]);
    for (int64_t t = 0; t < count; t += 2) {
      const uint16_t *even = values + offsets[t] + d, *odd = values + offsets[t + 1] + d;
      __m512bh v[C];
      for (int c = 0; c < C; c += 2) {
        const __m512i x = _mm512_loadu_si512(even + c * W), y = _mm512_loadu_si512(odd + c * W);
        v[c] = (__m512bh)_mm512_permutex2var_epi16(x, first, y);
        v[c + 1] = (__m512bh)_mm512_permutex2var_epi16(x, second, y);
      }
      for (int g = 0; g < G; ++g) {
        const auto p = (__m512bh)_mm512_set1_epi32(int32_t(cells[g][t / 2]));
        for (int c = 0; c < C; ++c) acc[g][c] = _mm512_dpbf16_ps(acc[g][c], p, v[c]);
      }
    }
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < C; ++c) store(job.values[g] + d + c * W, (vf)acc[g][c]);
  };
  int64_t d = 0;
  for (; d + 4 * W <= a.head_size; d += 4 * W) columns.template operator()<4>(d);
  for (; d < a.head_size; d += 2 * W) columns.template operator()<2>(d);
}

using Words = int16_t[kMaxPairedHead];

// A query as 16-bit integers; gives what one of them stands for.
PHL_INLINE float query_words(const float* q, int64_t size, int16_t* words) {
  vf top{};
  for (int64_t d = 0; d < size; d += W) top = max(max(load(q + d), -load(q + d)), top);
  const float scale = largest(top) / 32767.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int64_t d = 0; d < size; d += W) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)(load(q + d) * inverse));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + d), _mm512_cvtepi32_epi16(whole));
  }
  return scale;
}

// As the float sum4. 16 bits times 7 bits, 256 times, fit an int32.
PHL_INLINE __m128 sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i lanes = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
  return _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

template <int G>
PHL_INLINE void word_scores(const AttentionArgs& a, const Words* words, const float* word_scale, const int64_t* offsets,
                            int64_t count, int64_t known, float (*scores)[kTile]) {
  const int8_t* keys = static_cast<const int8_t*>(a.k_cache);
  for (int64_t t = 0; t < count; t += 4) {
    prefetch_tile<int8_t>(a, offsets, t, known);
    __m512i acc[G][4];
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 4; ++i) acc[g][i] = _mm512_setzero_si512();
    for (int64_t d = 0; d < a.head_size; d += 2 * W) {
      __m512i key[4];
      for (int i = 0; i < 4; ++i) {
        const int8_t* row = keys + offsets[t + i] + d;
        key[i] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
      }
      for (int g = 0; g < G; ++g) {
        const __m512i q = _mm512_loadu_si512(words[g] + d);
        for (int i = 0; i < 4; ++i) acc[g][i] = _mm512_dpwssd_epi32(acc[g][i], q, key[i]);
      }
    }
    float scale[4];
    for (int i = 0; i < 4; ++i) scale[i] = Cache<true>::scale(keys + offsets[t + i], a.head_size);
    const __m128 key_scale = _mm_loadu_ps(scale);
    for (int g = 0; g < G; ++g) {
      const __m128 dots = sum4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]);
      _mm_storeu_ps(scores[g] + t, _mm_mul_ps(_mm_mul_ps(dots, key_scale), _mm_set1_ps(word_scale[g])));
    }
  }
}

// The tile's weights, which hold the values' scales already, become 16-bit integers with a scale for each head. A tile's
// 128 products of 15 and 7 bits fit an int32.
template <int G>
PHL_INLINE void word_values(const AttentionArgs& a, StreamJob& job, const int64_t* offsets, int64_t count,
                            const float (*weights)[kTile], const float* factor) {
  const int8_t* values = static_cast<const int8_t*>(a.v_cache);
  alignas(64) int16_t cells[G][kTile];
  float unit[G];
  for (int g = 0; g < G; ++g) {
    vf top{};
    for (int64_t t = 0; t < count; t += W) top = max(load(weights[g] + t), top);
    unit[g] = largest(top) / 32767.0f;
    const float inverse = unit[g] > 0.0f ? 1.0f / unit[g] : 0.0f;
    for (int64_t t = 0; t < count; t += W) {
      const __m512i whole = _mm512_cvtps_epi32((__m512)(load(weights[g] + t) * inverse));
      _mm256_store_si256(reinterpret_cast<__m256i*>(cells[g] + t), _mm512_cvtepi32_epi16(whole));
    }
  }
  for (int64_t d = 0; d < a.head_size; d += 2 * W) {
    __m512i low[G], high[G];
    for (int g = 0; g < G; ++g) low[g] = high[g] = _mm512_setzero_si512();
    for (int64_t t = 0; t < count; t += 2) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + offsets[t] + d));
      const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + offsets[t + 1] + d));
      const __m512i v_low = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(x, y));    // columns 0 to 7, 16 to 23
      const __m512i v_high = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(x, y));  // columns 8 to 15, 24 to 31
      for (int g = 0; g < G; ++g) {
        int32_t pair;
        __builtin_memcpy(&pair, cells[g] + t, 4);
        const __m512i p = _mm512_set1_epi32(pair);
        low[g] = _mm512_dpwssd_epi32(low[g], p, v_low);
        high[g] = _mm512_dpwssd_epi32(high[g], p, v_high);
      }
    }
    for (int g = 0; g < G; ++g) {
      const __m512i first = _mm512_shuffle_i64x2(low[g], high[g], 0x44), second = _mm512_shuffle_i64x2(low[g], high[g], 0xEE);
      float* to = job.values[g] + d;
      store(to, load(to) * factor[g] + (vf)_mm512_cvtepi32_ps(first) * unit[g]);
      store(to + W, load(to + W) * factor[g] + (vf)_mm512_cvtepi32_ps(second) * unit[g]);
    }
  }
}

#endif

template <int G, bool kInt8>
void stream(const AttentionArgs& a, StreamJob& job) {
  using Rows = Cache<kInt8>;
  using Value = typename Rows::Value;
  const int64_t width = a.head_size + Rows::kExtra;
  alignas(64) float scores[G][kTile];
  int64_t offsets[kTile + kAhead + 4];
#if PHL_LEVEL == 2
  const bool paired = a.head_size % (2 * W) == 0 && a.head_size <= kMaxPairedHead;
  alignas(64) Halves halves[G];  // or, for int8, words
  auto* words = reinterpret_cast<Words*>(halves);
  float word_scale[G];
  if (paired && kInt8) {
    for (int g = 0; g < G; ++g) word_scale[g] = query_words(job.q[g], a.head_size, words[g]);
  } else if (paired) {
    split_queries<G>(a, job, halves);
  }
#endif
  for (int g = 0; g < G; ++g) {
    job.top[g] = kNoScore;
    job.total[g] = 0.0f;
    for (int64_t d = 0; d < a.head_size; d += W) store(job.values[g] + d, vf{});
  }
  for (int64_t begin = job.range.begin; begin < job.range.end; begin += kTile) {
    const int64_t left = job.range.end - begin;
    const int64_t count = left < kTile ? left : kTile, known = left < kTile + kAhead ? left : kTile + kAhead;
    token_offsets(a, job.row, job.kv_head, width, {begin, begin + known}, offsets);
    if (begin == job.range.begin) {
      for (int64_t t = 0; t < kAhead && t < count; ++t) {
        prefetch_row(static_cast<const Value*>(a.k_cache) + offsets[t], a.head_size * int64_t(sizeof(Value)));
      }
    }
    for (int64_t t = count; t < count + 3 && t >= known; ++t) offsets[t] = offsets[count - 1];
    float factor[G];
    alignas(64) float value_scale[kTile];
    const auto weigh = [&] {
      for (int g = 0; g < G; ++g) factor[g] = tile_weights(a, scores[g], count, job.top[g], job.total[g]);
      if constexpr (kInt8) {
        const auto* values = static_cast<const int8_t*>(a.v_cache);
        const int64_t padded = (count + W - 1) / W * W;
        for (int64_t t = 0; t < padded; ++t) value_scale[t] = t < count ? Rows::scale(values + offsets[t], a.head_size) : 0;
        for (int g = 0; g < G; ++g) {
          for (int64_t t = 0; t < padded; t += W) store(scores[g] + t, load(scores[g] + t) * load(value_scale + t));
        }
      }
    };
#if PHL_LEVEL == 2
    if (paired) {
      if constexpr (kInt8) {
        word_scores<G>(a, words, word_scale, offsets, count, known, scores);
        weigh();
        word_values<G>(a, job, offsets, count, scores, factor);
      } else {
        paired_scores<G>(a, halves, offsets, count, known, scores);
        weigh();
        paired_values<G>(a, job, offsets, count, scores, factor);
      }
      continue;
    }
#endif
    tile_scores<G, kInt8>(a, job, offsets, count, known, scores);
    weigh();
    tile_values<G, kInt8>(a, job, offsets, count, scores, factor);
  }
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
