// One query token: its G heads against a stretch of the cache, which is read once, in float32.
#pragma once
#include "attention_args.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kTile = 128;  // tokens between two looks at the running maximum
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
  const float* q[kMaxStreamGroup];
  int64_t row, kv_head;
  Range range;
  float* values[kMaxStreamGroup];  // [D] each
  float top[kMaxStreamGroup], total[kMaxStreamGroup];
};

// scores[g][t] = q_g . k_t for the tile's tokens, in fours; the tile is padded with its last token.
template <int G, bool kInt8>
PHL_INLINE void tile_scores(const AttentionArgs& a, const StreamJob& job, const int64_t* offsets, int64_t count,
                            float (*scores)[kTile]) {
  using Rows = Cache<kInt8>;
  using Value = typename Rows::Value;
  const Value* keys = static_cast<const Value*>(a.k_cache);
  const Value* values = static_cast<const Value*>(a.v_cache);
  for (int64_t t = 0; t < count; t += 4) {
    const Value* k[4];
    for (int i = 0; i < 4; ++i) {
      k[i] = keys + offsets[t + i];
      for (int64_t byte = 0; byte < a.head_size * int64_t(sizeof(Value)); byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(values + offsets[t + i]) + byte);
      }
    }
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
  for (int64_t t = 0; t < count; t += W) {
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
  for (int64_t t = 0; t < count; t += W) {
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

template <int G, bool kInt8>
void stream(const AttentionArgs& a, StreamJob& job) {
  using Rows = Cache<kInt8>;
  const int64_t width = a.head_size + Rows::kExtra;
  alignas(64) float scores[G][kTile];
  int64_t offsets[kTile + 4];
  for (int g = 0; g < G; ++g) {
    job.top[g] = kNoScore;
    job.total[g] = 0.0f;
    for (int64_t d = 0; d < a.head_size; d += W) store(job.values[g] + d, vf{});
  }
  for (int64_t begin = job.range.begin; begin < job.range.end; begin += kTile) {
    const int64_t end = begin + kTile < job.range.end ? begin + kTile : job.range.end;
    const int64_t count = end - begin;
    token_offsets(a, job.row, job.kv_head, width, {begin, end}, offsets);
    for (int i = 0; i < 3; ++i) offsets[count + i] = offsets[count - 1];
    tile_scores<G, kInt8>(a, job, offsets, count, scores);
    float factor[G];
    for (int g = 0; g < G; ++g) {
      factor[g] = tile_weights(a, scores[g], count, job.top[g], job.total[g]);
      if constexpr (kInt8) {
        const auto* values = static_cast<const int8_t*>(a.v_cache);
        for (int64_t t = 0; t < count; ++t) scores[g][t] *= Rows::scale(values + offsets[t], a.head_size);
      }
    }
    tile_values<G, kInt8>(a, job, offsets, count, scores, factor);
  }
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
