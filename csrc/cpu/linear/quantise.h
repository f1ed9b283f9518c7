// Activations as int8: one scale per chunk of 32 inputs, and the sums that zeros and minima need.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace phl {
namespace PHL_NS {
namespace {

#if PHL_LEVEL >= 1 || PHL_NEON

#if PHL_NEON
using Numbers = int32x4_t;
#else
using Numbers = __m128i;
#endif

// One number of each of four chunks.
struct Four {
  Numbers scale, sum, scaled_sum, half_sum[2], half_scaled_sum[2], minus_zero;
};

// The numbers of a chunk follow its integers.
static_assert(offsetof(Activation, scale) == 32 && offsetof(Activation, minus_zero) == 60);

#endif

#if PHL_LEVEL >= 1

PHL_INLINE __m256i beside(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

PHL_INLINE void store_numbers(const Four& of, Activation* a) {
  // Rows of numbers become columns: four and four of them, in the halves of a register.
  const __m256i r0 = beside(of.scale, of.half_sum[1]), r1 = beside(of.sum, of.half_scaled_sum[0]);
  const __m256i r2 = beside(of.scaled_sum, of.half_scaled_sum[1]), r3 = beside(of.half_sum[0], of.minus_zero);
  const __m256i low01 = _mm256_unpacklo_epi32(r0, r1), high01 = _mm256_unpackhi_epi32(r0, r1);
  const __m256i low23 = _mm256_unpacklo_epi32(r2, r3), high23 = _mm256_unpackhi_epi32(r2, r3);
  const __m256i columns[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                              _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
  for (int c = 0; c < 4; ++c) _mm256_store_si256(reinterpret_cast<__m256i*>(&a[c].scale), columns[c]);
}

// What stands behind the integers of four chunks. `part`: their sums of fours, those of a chunk's first half in the lower 128 bits.
PHL_INLINE void number_four(const __m256i (&part)[4], __m128 scale, Activation* a) {
  const __m256i half = _mm256_hadd_epi32(_mm256_hadd_epi32(part[0], part[1]), _mm256_hadd_epi32(part[2], part[3]));
  const auto scaled = [&](__m128i sum) { return _mm_castps_si128(_mm_mul_ps(_mm_cvtepi32_ps(sum), scale)); };
  Four of;
  of.scale = _mm_castps_si128(scale);
  of.half_sum[0] = _mm256_castsi256_si128(half);
  of.half_sum[1] = _mm256_extracti128_si256(half, 1);
  of.sum = _mm_add_epi32(of.half_sum[0], of.half_sum[1]);
  of.scaled_sum = scaled(of.sum);
  for (int h = 0; h < 2; ++h) of.half_scaled_sum[h] = scaled(of.half_sum[h]);
  of.minus_zero = _mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), of.sum), 7);
  store_numbers(of, a);
}

#endif

#if PHL_LEVEL == 1

// The largest magnitudes of four chunks; as integers, see Vec::larger.
PHL_INLINE __m128 largest_of_four(const float* x) {
  const __m256i size = _mm256_set1_epi32(0x7fffffff);
  __m256i m[4];
  for (int c = 0; c < 4; ++c, x += kChunk) {
    m[c] = _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x)), size);
    for (int i = 8; i < kChunk; i += 8) {
      m[c] = _mm256_max_epi32(m[c], _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + i)), size));
    }
  }
  const __m256i m01 = _mm256_max_epi32(_mm256_unpacklo_epi32(m[0], m[1]), _mm256_unpackhi_epi32(m[0], m[1]));
  const __m256i m23 = _mm256_max_epi32(_mm256_unpacklo_epi32(m[2], m[3]), _mm256_unpackhi_epi32(m[2], m[3]));
  const __m256i all = _mm256_max_epi32(_mm256_unpacklo_epi64(m01, m23), _mm256_unpackhi_epi64(m01, m23));
  return _mm_castsi128_ps(_mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}

// Four chunks of 32, each as `quantise_chunk` does it.
PHL_INLINE void quantise_four(const float* x, Activation* a) {
  const __m128 all = largest_of_four(x);
  const __m128 most = _mm_set1_ps(127.0f);
  const __m128 inverse = _mm_and_ps(_mm_cmp_ps(all, _mm_setzero_ps(), _CMP_GT_OQ), _mm_div_ps(most, all));
  const __m256 s[4] = {_mm256_broadcastss_ps(inverse), _mm256_broadcastss_ps(_mm_permute_ps(inverse, 0x55)),
                       _mm256_broadcastss_ps(_mm_permute_ps(inverse, 0xaa)),
                       _mm256_broadcastss_ps(_mm_permute_ps(inverse, 0xff))};
  // Both packs work within 128 bits: fours of inputs come out as 0, 2, 4, 6, 1, 3, ...
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i part[4];
  for (int c = 0; c < 4; ++c, x += kChunk) {
    __m256i n[4];
    for (int i = 0; i < 4; ++i) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), s[c]));
    const __m256i words01 = _mm256_packs_epi32(n[0], n[1]), words23 = _mm256_packs_epi32(n[2], n[3]);
    const __m256i q = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words01, words23), order);
    _mm256_store_si256(reinterpret_cast<__m256i*>(a[c].q), q);
    part[c] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
  }
  number_four(part, _mm_div_ps(all, most), a);
}

#elif PHL_NEON

// The largest magnitudes of four chunks; as integers, see Vec::larger.
PHL_INLINE float32x4_t largest_of_four(const float* x) {
  uint32x4_t m[4];
  for (int c = 0; c < 4; ++c, x += kChunk) {
    uint32x4_t size[8];
    for (int i = 0; i < 8; ++i) size[i] = Vec::size_of(vld1q_f32(x + 4 * i));
    for (int i = 0; i < 4; ++i) size[i] = vmaxq_u32(size[i], size[i + 4]);
    m[c] = vmaxq_u32(vmaxq_u32(size[0], size[1]), vmaxq_u32(size[2], size[3]));
  }
  return vreinterpretq_f32_u32(vpmaxq_u32(vpmaxq_u32(m[0], m[1]), vpmaxq_u32(m[2], m[3])));
}

// A chunk of 32 as bytes: no number is beyond a byte's range, and a NaN is 0.
PHL_INLINE int16x8_t quantise_by(const float* x, float32x4_t inverse, int8_t* q) {
  int16x8_t sums[2];
  for (int h = 0; h < 2; ++h, x += 16) {
    int16x8_t n[4];
    for (int i = 0; i < 4; ++i) {
      n[i] = vreinterpretq_s16_s32(vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + 4 * i), inverse)));
    }
    const int8x16_t low = vreinterpretq_s8_s16(vuzp1q_s16(n[0], n[1]));
    const int8x16_t bytes = vuzp1q_s8(low, vreinterpretq_s8_s16(vuzp1q_s16(n[2], n[3])));
    vst1q_s8(q + 16 * h, bytes);
    sums[h] = vpaddlq_s8(bytes);
  }
  return vpaddq_s16(sums[0], sums[1]);  // of fours, those of the first half first
}

PHL_INLINE void store_numbers(const Four& of, Activation* a) {
  const int32x4x4_t first{{of.scale, of.sum, of.scaled_sum, of.half_sum[0]}};
  const int32x4x4_t second{{of.half_sum[1], of.half_scaled_sum[0], of.half_scaled_sum[1], of.minus_zero}};
  auto* to = reinterpret_cast<int32_t*>(&a->scale);
  constexpr int step = sizeof(Activation) / sizeof(int32_t);
  vst4q_lane_s32(to, first, 0), vst4q_lane_s32(to + 4, second, 0);
  vst4q_lane_s32(to + step, first, 1), vst4q_lane_s32(to + step + 4, second, 1);
  vst4q_lane_s32(to + 2 * step, first, 2), vst4q_lane_s32(to + 2 * step + 4, second, 2);
  vst4q_lane_s32(to + 3 * step, first, 3), vst4q_lane_s32(to + 3 * step + 4, second, 3);
}

// Four chunks of 32, each as `quantise_chunk` does it.
PHL_INLINE void quantise_four(const float* x, Activation* a) {
  const float32x4_t all = largest_of_four(x), most = vdupq_n_f32(127.0f);
  const uint32x4_t some = vcgtq_f32(all, vdupq_n_f32(0.0f));
  const float32x4_t inverse = vreinterpretq_f32_u32(vandq_u32(some, vreinterpretq_u32_f32(vdivq_f32(most, all))));
  const int16x8_t first = vpaddq_s16(quantise_by(x, vdupq_laneq_f32(inverse, 0), a[0].q),
                                     quantise_by(x + kChunk, vdupq_laneq_f32(inverse, 1), a[1].q));
  const int16x8_t second = vpaddq_s16(quantise_by(x + 2 * kChunk, vdupq_laneq_f32(inverse, 2), a[2].q),
                                      quantise_by(x + 3 * kChunk, vdupq_laneq_f32(inverse, 3), a[3].q));
  const int16x8_t halves = vpaddq_s16(first, second);  // of each chunk both
  const float32x4_t scale = vdivq_f32(all, most);
  const auto scaled = [&](int32x4_t sum) { return vreinterpretq_s32_f32(vmulq_f32(vcvtq_f32_s32(sum), scale)); };
  Four of;
  of.scale = vreinterpretq_s32_f32(scale);
  of.half_sum[0] = vmovl_s16(vget_low_s16(vuzp1q_s16(halves, halves)));
  of.half_sum[1] = vmovl_s16(vget_low_s16(vuzp2q_s16(halves, halves)));
  of.sum = vaddq_s32(of.half_sum[0], of.half_sum[1]);
  of.scaled_sum = scaled(of.sum);
  for (int h = 0; h < 2; ++h) of.half_scaled_sum[h] = scaled(of.half_sum[h]);
  of.minus_zero = vshlq_n_s32(vnegq_s32(of.sum), 7);
  store_numbers(of, a);
}

#elif PHL_LEVEL == 2

// The largest magnitudes of four chunks, in every 128 bits; as integers, see Vec::larger.
PHL_INLINE F largest_of_four(const F (&v)[8]) {
  I m[4];
  for (int c = 0; c < 4; ++c) m[c] = _mm512_castps_si512(Vec::larger(v[2 * c], v[2 * c + 1]));
  const I m01 = _mm512_max_epi32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
  const I m23 = _mm512_max_epi32(_mm512_unpacklo_epi32(m[2], m[3]), _mm512_unpackhi_epi32(m[2], m[3]));
  I all = _mm512_max_epi32(_mm512_unpacklo_epi64(m01, m23), _mm512_unpackhi_epi64(m01, m23));
  all = _mm512_max_epi32(all, _mm512_shuffle_i32x4(all, all, 0x4e));
  return _mm512_castsi512_ps(_mm512_max_epi32(all, _mm512_shuffle_i32x4(all, all, 0xb1)));
}

PHL_INLINE void quantise_four(const F (&v)[8], Activation* a) {
  const F all = largest_of_four(v);
  const F inverse = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(all, Vec::zero(), _CMP_GT_OQ), Vec::set(127.0f), all);
  const F s[4] = {_mm512_permute_ps(inverse, 0x00), _mm512_permute_ps(inverse, 0x55),
                  _mm512_permute_ps(inverse, 0xaa), _mm512_permute_ps(inverse, 0xff)};
  __m256i part[4];
  for (int c = 0; c < 4; ++c) {
    const __m128i low = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(Vec::mul(v[2 * c], s[c])));
    const __m128i high = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(Vec::mul(v[2 * c + 1], s[c])));
    const __m256i q = beside(low, high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(a[c].q), q);
    part[c] = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
  }
  number_four(part, _mm_div_ps(_mm512_castps512_ps128(all), _mm_set1_ps(127.0f)), a);
}

// Four chunks in two pairs: the integers, and in the first chunk of each pair what byte_kernel reads beside them.
PHL_INLINE void quantise_two_pairs(const F (&v)[8], Activation* a) {
  I m[2];
  for (int p = 0; p < 2; ++p) {
    m[p] = _mm512_castps_si512(Vec::larger(Vec::larger(v[4 * p], v[4 * p + 1]), Vec::larger(v[4 * p + 2], v[4 * p + 3])));
  }
  I all = _mm512_max_epi32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
  __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  __m128i few = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  few = _mm_max_epi32(few, _mm_shuffle_epi32(few, 0x4e));  // first, second, first, second
  const __m128 largest = _mm_castsi128_ps(few), scale = _mm_div_ps(largest, _mm_set1_ps(127.0f));
  const __m128 inverse =
      _mm_maskz_div_ps(_mm_cmp_ps_mask(largest, _mm_setzero_ps(), _CMP_GT_OQ), _mm_set1_ps(127.0f), largest);
  I sum[2];
  for (int p = 0; p < 2; ++p) {
    const F s = _mm512_broadcastss_ps(p == 0 ? inverse : _mm_movehdup_ps(inverse));
    I n[4];
    for (int i = 0; i < 4; ++i) n[i] = _mm512_cvtps_epi32(Vec::mul(v[4 * p + i], s));
    // Both packs work within 128 bits: fours of inputs come out as 0, 4, 8, 12, 1, 5, ...
    const I q = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
        _mm512_packs_epi16(_mm512_packs_epi32(n[0], n[1]), _mm512_packs_epi32(n[2], n[3])));
    _mm256_store_si256(reinterpret_cast<__m256i*>(a[2 * p].q), _mm512_castsi512_si256(q));
    _mm256_store_si256(reinterpret_cast<__m256i*>(a[2 * p + 1].q), _mm512_extracti64x4_epi64(q, 1));
    sum[p] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), q);  // unsigned: 128
  }
  all = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[0], sum[1]), _mm512_unpackhi_epi32(sum[0], sum[1]));
  half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  few = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  few = _mm_sub_epi32(_mm_setzero_si128(), _mm_add_epi32(few, _mm_shuffle_epi32(few, 0x4e)));
  a[0].scale = _mm_cvtss_f32(scale);
  a[2].scale = _mm_cvtss_f32(_mm_movehdup_ps(scale));
  a[0].minus_zero = _mm_cvtsi128_si32(few);
  a[2].minus_zero = _mm_extract_epi32(few, 1);
}

#endif

PHL_INLINE void quantise_chunk(const float* x, float largest, Activation& a) {
  Vec::quantise32(x, largest > 0.0f ? 127.0f / largest : 0.0f, a.q, a.half_sum);
  const float scale = largest / 127.0f;
  a.scale = scale;
  a.sum = a.half_sum[0] + a.half_sum[1];
  a.scaled_sum = static_cast<float>(a.sum) * scale;
  for (int h = 0; h < 2; ++h) a.half_scaled_sum[h] = static_cast<float>(a.half_sum[h]) * scale;
  a.minus_zero = -128 * a.sum;
}

// `joint` chunks (1 or 2, of which `chunks` is a multiple) have one scale; the `minus_zero` of all is in the first.
PHL_INLINE void quantise_chunks(const float* x, Activation* a, int chunks, int joint) {
#if PHL_LEVEL == 1 || PHL_NEON
  if (chunks == 4 && joint == 1) return quantise_four(x, a);
#endif
  for (int c = 0; c < chunks; c += joint, x += joint * kChunk) {
    F all = Vec::zero();
    for (int i = 0; i < joint * kChunk; i += 16) all = Vec::larger(all, Vec::loadf(x + i));
    const float largest = Vec::largest(all);
    for (int i = 0; i < joint; ++i) {
      quantise_chunk(x + i * kChunk, largest, a[c + i]);
      if (i > 0) a[c].minus_zero += a[c + i].minus_zero;
    }
  }
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
