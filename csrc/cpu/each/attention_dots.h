// What attention_int8.h does with NEON: dot products of signed bytes. Queries and weights have 14 bits, as two bytes each,
// so that a tile is gone through twice: with the upper bytes, whose sums are then shifted, and with the lower.
#pragma once

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kLowBits = 7;

// Four whole numbers below 2^13 in magnitude, or positive ones up to kMostWeight: their upper bytes, then their lower ones.
PHL_INLINE void store_halves(int16_t* to, int32x4_t whole) {
  const int32x4_t upper = vrshrq_n_s32(whole, kLowBits), lower = vsubq_s32(whole, vshlq_n_s32(upper, kLowBits));
  const int16x8_t words = vcombine_s16(vmovn_s32(upper), vmovn_s32(lower));
  vst1_s8(reinterpret_cast<int8_t*>(to), vmovn_s16(words));
}

// The upper (Half 0) or lower bytes of four numbers, in every quarter of a register.
template <int Half>
PHL_INLINE int8x16_t half_at(const int16_t* p) {
  int32_t word;
  __builtin_memcpy(&word, reinterpret_cast<const int8_t*>(p) + 4 * Half, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

PHL_INLINE int16_t* query_words(const Int8Job& job, int64_t size, int64_t row) {
  return reinterpret_cast<int16_t*>(job.q + row * size);
}

PHL_INLINE void pack_query(const AttentionArgs& a, const Int8Job& job, const float* q, int64_t row) {
  constexpr float kMost = 8191.0f;
  const int64_t size = a.head_size;
  int16_t* to = query_words(job, size, row);
  uint32x4_t top = vdupq_n_u32(0);
  for (int64_t d = 0; d < size; d += W) {
    top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32((float32x4_t)load_n(q + d, size - d < W ? size - d : W))));
  }
  const float largest = __builtin_bit_cast(float, vmaxvq_u32(top));  // NaN, if there is one
  const float inverse = largest > 0.0f ? kMost / largest : 0.0f;
  for (int64_t d = 0; d < size; d += W) {
    store_halves(to + d, vcvtnq_s32_f32(vmulq_n_f32((float32x4_t)load_n(q + d, size - d < W ? size - d : W), inverse)));
  }
  const double factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * double(kLog2e);
  // Not 0: what is masked must stay small.
  job.scale[row] = largest == 0.0f ? 1e-20f : largest / kMost * float(factor);
  job.start[row] = 0;  // keys are taken as signed
}

template <int R, int Half>
PHL_INLINE void add_dots(int32x4_t (&acc)[R][4], const int16_t* q, int64_t size, const int8_t* keys, Int8Span& span) {
  const bool fetch = Half == 0 && span.ahead.any();
  for (int64_t d = 0; d < size; d += 4, keys += 4 * kGroup) {
    int8x16_t key[4];
    for (int v = 0; v < 4; ++v) key[v] = veorq_s8(vld1q_s8(keys + 16 * v), vdupq_n_s8(-128));
    if (fetch) span.ahead.lines(1);
    for (int r = 0; r < R; ++r) {
      const int8x16_t x = half_at<Half>(q + 2 * r * size + d);
      for (int v = 0; v < 4; ++v) acc[r][v] = vdotq_s32(acc[r][v], key[v], x);
    }
  }
}

template <int R, int C>
PHL_INLINE void dots(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, float (*scores)[kBlockTokens]) {
  const int64_t size = a.head_size;
  const int16_t* q = query_words(job, size, first);
  for (int c = 0; c < C; ++c) {
    const int8_t* keys = span.tile.keys[c];
    int32x4_t acc[R][4];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 4; ++v) acc[r][v] = vdupq_n_s32(0);
    add_dots<R, 0>(acc, q, size, keys, span);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 4; ++v) acc[r][v] = vshlq_n_s32(acc[r][v], kLowBits);
    add_dots<R, 1>(acc, q, size, keys, span);
    for (int v = 0; v < 4; ++v) {
      const vf scale = load(scales_of(keys, size) + v * W);
      for (int r = 0; r < R; ++r) store(scores[r] + c * kGroup + v * W, (vf)vcvtq_f32_s32(acc[r][v]) * scale);
    }
  }
}

using Weight = int16_t;

PHL_INLINE void store_weights(Weight* to, vf weights) { store_halves(to, vcvtnq_s32_f32((float32x4_t)weights)); }

template <int R, int C, int Half>
PHL_INLINE void add_values(int32x4_t (&acc)[R][C], const AttentionArgs& a, Int8Span& span, int64_t quads,
                           const Weight (*weights)[kBlockTokens], int64_t column) {
  const bool fetch = Half == 0 && span.ahead.any();
  for (int64_t quad = 0; quad < quads; ++quad) {
    const int8_t* from = span.tile.values[quad / 4] + quad % 4 * 4 * a.head_size + 4 * column;
    int8x16_t value[C];
    for (int c = 0; c < C; ++c) value[c] = vld1q_s8(from + 16 * c);
    if (fetch) span.ahead.lines(1);
    for (int r = 0; r < R; ++r) {
      const int8x16_t x = half_at<Half>(weights[r] + 4 * quad);
      for (int c = 0; c < C; ++c) acc[r][c] = vdotq_s32(acc[r][c], value[c], x);
    }
  }
}

// results[r] = results[r] * factor[r] + unit[r] * the tile's weighted values, of its first `quads` times four tokens.
template <int R, int C>
PHL_INLINE void add_columns(const AttentionArgs& a, const Int8Job& job, Int8Span& span, int64_t first, int64_t quads,
                            const Weight (*weights)[kBlockTokens], const float* factor, const float* unit, int64_t column) {
  int32x4_t acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = vdupq_n_s32(0);
  add_values<R, C, 0>(acc, a, span, quads, weights, column);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = vshlq_n_s32(acc[r][c], kLowBits);
  add_values<R, C, 1>(acc, a, span, quads, weights, column);
  for (int r = 0; r < R; ++r) {
    float* to = job.results + (first + r) * job.wide + column;
    for (int c = 0; c < C; ++c) {
      store(to + c * W, shrunk_sum(load(to + c * W), factor[r], (vf)vcvtq_f32_s32(acc[r][c]), unit[r]));
    }
  }
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
