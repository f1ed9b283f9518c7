// What attention_int8.h does with NEON: dot products of signed bytes. Queries and weights have 14 bits, as two bytes each:
// what is loaded of a tile is multiplied by the upper ones and by the lower ones, and the sums of the upper ones count 2^7
// times. A load of sixteen of them serves four products, which take four by their place.
#pragma once

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kLowBits = 7;
constexpr int kTogether = 2;  // vectors of a tile at a time, mostly: with four rows, their sums take half of the registers

// Four whole numbers below 2^13 in magnitude, or positive ones up to kMostWeight, as bytes.
PHL_INLINE void store_halves(int8_t* upper, int8_t* lower, int32x4_t whole) {
  const int32x4_t high = vrshrq_n_s32(whole, kLowBits), low = vsubq_s32(whole, vshlq_n_s32(high, kLowBits));
  const int32x2_t bytes = vreinterpret_s32_s8(vmovn_s16(vcombine_s16(vmovn_s32(high), vmovn_s32(low))));
  const int32_t words[2] = {vget_lane_s32(bytes, 0), vget_lane_s32(bytes, 1)};
  __builtin_memcpy(upper, words, 4);
  __builtin_memcpy(lower, words + 1, 4);
}

// Sums of V vectors' products with the upper and the lower bytes of R rows.
template <int R, int V>
struct HalfSums {
  int32x4_t upper[R][V], lower[R][V];

  PHL_INLINE HalfSums() {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) upper[r][v] = lower[r][v] = vdupq_n_s32(0);
    }
  }
  template <int Lane>
  PHL_INLINE void add(const int8x16_t (&x)[V], const int8x16_t (&high)[R], const int8x16_t (&low)[R]) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        upper[r][v] = vdotq_laneq_s32(upper[r][v], x[v], high[r], Lane);
        lower[r][v] = vdotq_laneq_s32(lower[r][v], x[v], low[r], Lane);
      }
    }
  }
  PHL_INLINE vf all(int r, int v) const {
    return (vf)vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(upper[r][v], kLowBits), lower[r][v]));
  }
};

// Of a row `size` upper bytes, then the lower ones.
PHL_INLINE int8_t* query_bytes(const Int8Job& job, int64_t size, int64_t row) {
  return reinterpret_cast<int8_t*>(job.q + row * size);
}

PHL_INLINE void pack_query(const AttentionArgs& a, const Int8Job& job, const float* q, int64_t row) {
  constexpr float kMost = 8191.0f;
  const int64_t size = a.head_size;
  int8_t* to = query_bytes(job, size, row);
  uint32x4_t top = vdupq_n_u32(0);
  for (int64_t d = 0; d < size; d += W) {
    top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32((float32x4_t)load_n(q + d, size - d < W ? size - d : W))));
  }
  const float largest = __builtin_bit_cast(float, vmaxvq_u32(top));  // NaN, if there is one
  const float inverse = largest > 0.0f ? kMost / largest : 0.0f;
  for (int64_t d = 0; d < size; d += W) {
    const auto x = (float32x4_t)load_n(q + d, size - d < W ? size - d : W);
    store_halves(to + d, to + size + d, vcvtnq_s32_f32(vmulq_n_f32(x, inverse)));
  }
  const double factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * double(kLog2e);
  // Not 0: what is masked must stay small.
  job.scale[row] = largest == 0.0f ? 1e-20f : largest / kMost * float(factor);
  job.start[row] = 0;  // keys are taken as signed
}

// Four values of eight keys.
PHL_INLINE void load_keys(const int8_t* keys, int8x16_t (&key)[kTogether]) {
  for (int v = 0; v < kTogether; ++v) key[v] = veorq_s8(vld1q_s8(keys + 16 * v), vdupq_n_s8(-128));
}

template <int R, int C>
PHL_INLINE void dots(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, float (*scores)[kBlockTokens]) {
  constexpr int64_t kStep = 4 * kGroup;  // bytes from four values of a group's keys to the next four
  const int64_t size = a.head_size;
  const int8_t* q = query_bytes(job, size, first);
  for (int64_t at = 0; at < C * kGroup; at += kTogether * W) {
    const int8_t *group = span.tile.keys[at / kGroup], *keys = group + at % kGroup * 4;
    const bool fetch = at % kGroup == 0 && span.ahead.any();
    HalfSums<R, kTogether> sums;
    int8x16_t key[kTogether], high[R], low[R];
    int64_t d = 0;
    for (; d + 16 <= size; d += 16, keys += 4 * kStep) {
      if (fetch) span.ahead.lines(4);
      for (int r = 0; r < R; ++r) {
        const int8_t* row = q + 4 * r * size + d;
        high[r] = vld1q_s8(row), low[r] = vld1q_s8(row + size);
      }
      load_keys(keys, key);
      sums.template add<0>(key, high, low);
      load_keys(keys + kStep, key);
      sums.template add<1>(key, high, low);
      load_keys(keys + 2 * kStep, key);
      sums.template add<2>(key, high, low);
      load_keys(keys + 3 * kStep, key);
      sums.template add<3>(key, high, low);
    }
    for (; d < size; d += 4, keys += kStep) {
      if (fetch) span.ahead.lines(1);
      for (int r = 0; r < R; ++r) {
        int32_t words[2];
        __builtin_memcpy(words, q + 4 * r * size + d, 4);
        __builtin_memcpy(words + 1, q + 4 * r * size + size + d, 4);
        high[r] = vreinterpretq_s8_s32(vdupq_n_s32(words[0])), low[r] = vreinterpretq_s8_s32(vdupq_n_s32(words[1]));
      }
      load_keys(keys, key);
      sums.template add<0>(key, high, low);
    }
    for (int v = 0; v < kTogether; ++v) {
      const vf scale = load(scales_of(group, size) + at % kGroup + v * W);
      for (int r = 0; r < R; ++r) store(scores[r] + at + v * W, sums.all(r, v) * scale);
    }
  }
}

using Weight = int16_t;

// Of each 16 tokens the upper bytes, then the lower ones.
PHL_INLINE void store_weights(Weight* row, int64_t token, vf weights) {
  int8_t* to = reinterpret_cast<int8_t*>(row + token / kGroup * kGroup) + token % kGroup;
  store_halves(to, to + kGroup, vcvtnq_s32_f32((float32x4_t)weights));
}

// Of four tokens the values of four columns, V times.
template <int V>
PHL_INLINE void load_values(const int8_t* from, int8x16_t (&value)[V]) {
  for (int v = 0; v < V; ++v) value[v] = vld1q_s8(from + 16 * v);
}

// As below, W columns V times. Of the last group too all tokens are taken: what nobody sees of it weighs nothing.
template <int R, int V>
PHL_INLINE void add_some(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t quads,
                         const Weight (*weights)[kBlockTokens], const float* factor, const float* unit, int64_t column) {
  const int64_t step = 4 * a.head_size;
  const bool fetch = span.ahead.any();
  HalfSums<R, V> sums;
  for (int64_t group = 0; 4 * group < quads; ++group) {
    const int8_t* from = span.tile.values[group] + 4 * column;
    if (fetch) span.ahead.lines(2);
    int8x16_t value[V], high[R], low[R];
    for (int r = 0; r < R; ++r) {
      const auto* of = reinterpret_cast<const int8_t*>(weights[r] + group * kGroup);
      high[r] = vld1q_s8(of), low[r] = vld1q_s8(of + kGroup);
    }
    load_values(from, value);
    sums.template add<0>(value, high, low);
    load_values(from + step, value);
    sums.template add<1>(value, high, low);
    load_values(from + 2 * step, value);
    sums.template add<2>(value, high, low);
    load_values(from + 3 * step, value);
    sums.template add<3>(value, high, low);
  }
  for (int r = 0; r < R; ++r) {
    float* to = job.results + (first + r) * job.wide + column;
    for (int v = 0; v < V; ++v) {
      store(to + v * W, shrunk_sum(load(to + v * W), factor[r], sums.all(r, v), unit[r]));
    }
  }
}

// results[r] = results[r] * factor[r] + unit[r] * the tile's weighted values, of its first `quads` times four tokens.
template <int R, int C>
PHL_INLINE void add_columns(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t quads,
                            const Weight (*weights)[kBlockTokens], const float* factor, const float* unit, int64_t column) {
  constexpr int V = C > 1 ? kTogether : 1;
  for (int c = 0; c < C; c += V) add_some<R, V>(a, job, span, first, quads, weights, factor, unit, column + c * W);
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
