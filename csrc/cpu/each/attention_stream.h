// One query token: its heads against a stretch of a bfloat16 or float32 cache, which is read once, in units of a tile of tokens and the G
// heads of a kv head, in the order of memory. While one unit is computed the next one's keys, then its values, are asked
// for, so that memory is busy all the time. In float32, except beside a bfloat16 cache with AVX-512, where the
// head size allows pairs: there queries and weights are bfloat16, as in the blocked path. E: what the cache holds, uint16_t
// or float.
#pragma once
#include "attention_args.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kTile = 128;      // tokens of a unit
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

struct StreamJob {
  Stretch own, guess;  // `guess`: what this thread probably computes next
  int64_t kv_heads;
  const float* q[kMaxStreamHeads];     // G for each kv head
  float* values[kMaxStreamHeads];      // [D] each
  float top[kMaxStreamHeads], total[kMaxStreamHeads];
};

// The unit that comes next: tokens from `offsets`, bytes of a row and of one of its elements.
struct Ahead {
  const char *keys, *values;
  const int64_t* offsets;
  int64_t count, bytes, element;

  // Into the second-level cache: its queue of outstanding lines is longer than the first level's.
  PHL_INLINE static void fetch(const char* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
  PHL_INLINE void key_rows(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end && t < count; ++t) fetch(keys + offsets[t] * element, bytes);
  }
  PHL_INLINE void value_rows(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end && t < count; ++t) fetch(values + offsets[t] * element, bytes);
  }
};

// The unit at hand: one kv head's keys and values of up to kTile tokens.
template <class E>
struct Unit {
  const E *keys, *values;
  const int64_t* offsets;  // padded with the last token's to a multiple of 4
  int64_t count;
  const float* const* q;  // [G]
  float* const* to;       // [G]
  Ahead ahead;
};

// scores[g][t] = q_g . k_t for the tile's tokens, in fours; the tile is padded with its last token.
template <int G, class E>
PHL_INLINE void tile_scores(const AttentionArgs& a, const Unit<E>& u, float (*scores)[kTile]) {
  for (int64_t t = 0; t < u.count; t += 4) {
    const E* k[4];
    for (int i = 0; i < 4; ++i) k[i] = u.keys + u.offsets[t + i];
    u.ahead.key_rows(t, t + 4);
    vf acc[G][4] = {};
    for (int64_t d = 0; d < a.head_size; d += W) {
      vf key[4];
      for (int i = 0; i < 4; ++i) key[i] = load_wide(k[i] + d);
      for (int g = 0; g < G; ++g) {
        const vf q = load(u.q[g] + d);
        for (int i = 0; i < 4; ++i) acc[g][i] += q * key[i];
      }
    }
    for (int g = 0; g < G; ++g) sum4(acc[g][0], acc[g][1], acc[g][2], acc[g][3], scores[g] + t);
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

template <int G, class E>
PHL_INLINE void tile_values(const AttentionArgs& a, const Unit<E>& u, const float (*weights)[kTile], const float* factor) {
  const auto columns = [&]<int C>(int64_t d) {
    vf acc[G][C];
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < C; ++c) acc[g][c] = load(u.to[g] + d + c * W) * factor[g];
    for (int64_t t = 0; t < u.count; ++t) {
      if (d == 0) u.ahead.value_rows(t, t + 1);
      vf v[C];
      for (int c = 0; c < C; ++c) v[c] = load_wide(u.values + u.offsets[t] + d + c * W);
      for (int g = 0; g < G; ++g)
        for (int c = 0; c < C; ++c) acc[g][c] += v[c] * weights[g][t];
    }
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < C; ++c) store(u.to[g] + d + c * W, acc[g][c]);
  };
  int64_t d = 0;
  for (; d + kColumns * W <= a.head_size; d += kColumns * W) columns.template operator()<kColumns>(d);
  for (; d < a.head_size; d += W) columns.template operator()<1>(d);
}

#if PHL_LEVEL == 2

using Halves = uint16_t[kMaxPairedHead];  // a query in bfloat16

template <int G>
PHL_INLINE void paired_scores(const AttentionArgs& a, const Unit<uint16_t>& u, const Halves* halves, float (*scores)[kTile]) {
  for (int64_t t = 0; t < u.count; t += 4) {
    u.ahead.key_rows(t, t + 4);
    __m512 acc[G][4];
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 4; ++i) acc[g][i] = _mm512_setzero_ps();
    for (int64_t d = 0; d < a.head_size; d += 2 * W) {
      __m512bh key[4];
      for (int i = 0; i < 4; ++i) key[i] = (__m512bh)_mm512_loadu_si512(u.keys + u.offsets[t + i] + d);
      for (int g = 0; g < G; ++g) {
        const auto q = (__m512bh)_mm512_loadu_si512(halves[g] + d);
        for (int i = 0; i < 4; ++i) acc[g][i] = _mm512_dpbf16_ps(acc[g][i], q, key[i]);
      }
    }
    for (int g = 0; g < G; ++g) sum4((vf)acc[g][0], (vf)acc[g][1], (vf)acc[g][2], (vf)acc[g][3], scores[g] + t);
  }
}

template <int G>
PHL_INLINE void paired_values(const AttentionArgs& a, const Unit<uint16_t>& u, const float (*weights)[kTile],
                              const float* factor) {
  alignas(64) uint32_t cells[G][kTile / 2];
  for (int g = 0; g < G; ++g) {
    for (int64_t t = 0; t < u.count; t += 2 * W) {
      const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)load(weights[g] + t + W), (__m512)load(weights[g] + t));
      _mm512_store_si512(cells[g] + t / 2, (__m512i)pair);
    }
  }
  const __m512i first = _mm512_load_si512(kPairs.first), second = _mm512_load_si512(kPairs.second);
  const auto columns = [&]<int C>(int64_t d) {  // C vectors of 16 results
    __m512 acc[G][C];
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < C; ++c) acc[g][c] = (__m512)(load(u.to[g] + d + c * W) * factor[g]);
    for (int64_t t = 0; t < u.count; t += 2) {
      if (d == 0) u.ahead.value_rows(t, t + 2);
      const uint16_t *even = u.values + u.offsets[t] + d, *odd = u.values + u.offsets[t + 1] + d;
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
      for (int c = 0; c < C; ++c) store(u.to[g] + d + c * W, (vf)acc[g][c]);
  };
  int64_t d = 0;
  for (; d + 4 * W <= a.head_size; d += 4 * W) columns.template operator()<4>(d);
  for (; d < a.head_size; d += 2 * W) columns.template operator()<2>(d);
}

#endif

// Offsets of a tile's tokens in the first kv head's part of the pages, padded to a multiple of 4; gives their number.
PHL_INLINE int64_t tile_offsets(const AttentionArgs& a, const Stretch& of, int64_t begin, int64_t* offsets) {
  const int64_t left = of.range.end - begin;
  const int64_t count = left < kTile ? left : kTile;
  if (count <= 0) return 0;
  token_offsets(a, of.row, of.kv_head, {begin, begin + count}, offsets);
  for (int64_t t = count; t % 4 != 0; ++t) offsets[t] = offsets[count - 1];
  return count;
}

template <int G, class E>
struct Stream {
  const AttentionArgs& a;
  StreamJob& job;
  alignas(64) float scores[G][kTile];
#if PHL_LEVEL == 2
  static constexpr bool may_pair = std::is_same_v<E, uint16_t>;
  const bool paired;
  alignas(64) Halves halves[may_pair ? kMaxStreamHeads : 1];
#endif

  PHL_INLINE Stream(const AttentionArgs& a, StreamJob& job)
      : a(a), job(job)
#if PHL_LEVEL == 2
        ,
        paired(may_pair && a.head_size % (2 * W) == 0 && a.head_size <= kMaxPairedHead)
#endif
  {
    for (int64_t h = 0; h < job.kv_heads * G; ++h) {
      job.top[h] = kNoScore;
      job.total[h] = 0.0f;
      for (int64_t d = 0; d < a.head_size; d += W) store(job.values[h] + d, vf{});
#if PHL_LEVEL == 2
      for (int64_t d = 0; paired && d < a.head_size; d += W) store_bf16(halves[h] + d, load(job.q[h] + d));
#endif
    }
  }

  PHL_INLINE void weigh(const Unit<E>& u, int64_t h, float* factor) {
    for (int g = 0; g < G; ++g) factor[g] = tile_weights(a, scores[g], u.count, job.top[h + g], job.total[h + g]);
  }

  // Query heads h to h + G - 1 against their unit.
  PHL_INLINE void run(const Unit<E>& u, int64_t h) {
    float factor[G];
#if PHL_LEVEL == 2
    if constexpr (may_pair) {
      if (paired) {
        paired_scores<G>(a, u, halves + h, scores);
        weigh(u, h, factor);
        paired_values<G>(a, u, scores, factor);
        return;
      }
    }
#endif
    tile_scores<G>(a, u, scores);
    weigh(u, h, factor);
    tile_values<G>(a, u, scores, factor);
  }
};

template <int G, class E>
void stream(const AttentionArgs& a, StreamJob& job) {
  const int64_t step = a.page_size * a.head_size;
  const auto* keys = static_cast<const E*>(a.k_cache);
  const auto* values = static_cast<const E*>(a.v_cache);
  Stream<G, E> work(a, job);
  int64_t space[2][kTile];
  int64_t *offsets = space[0], *next_offsets = space[1];
  int64_t count = tile_offsets(a, job.own, job.own.range.begin, offsets);
  Ahead ahead{reinterpret_cast<const char*>(keys), reinterpret_cast<const char*>(values), offsets, count,
              a.head_size * int64_t(sizeof(E)), int64_t(sizeof(E))};
  ahead.key_rows(0, count);
  ahead.value_rows(0, count);
  for (int64_t begin = job.own.range.begin; begin < job.own.range.end; begin += kTile) {
    int64_t next = tile_offsets(a, job.own, begin + kTile, next_offsets);
    if (next == 0) next = tile_offsets(a, job.guess, job.guess.range.begin, next_offsets);
    for (int64_t h = 0; h < job.kv_heads; ++h) {
      const bool last = h + 1 == job.kv_heads;
      const int64_t after = last ? 0 : (h + 1) * step;
      ahead.keys = reinterpret_cast<const char*>(keys + after);
      ahead.values = reinterpret_cast<const char*>(values + after);
      ahead.offsets = last ? next_offsets : offsets;
      ahead.count = last ? next : count;
      work.run({keys + h * step, values + h * step, offsets, count, job.q + h * G, job.values + h * G, ahead}, h * G);
    }
    count = next;
    int64_t* const used = offsets;
    offsets = next_offsets;
    next_offsets = used;
  }
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
