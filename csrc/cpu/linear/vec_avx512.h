// Sixteen features at a time in AVX-512 (VNNI, BF16). The three vec_*.h give the kernels the same vocabulary:
// U 64 operand bytes, I 16 int32, F 16 float.
#pragma once

// gcc 12 warns of its own intrinsics (_mm512_undefined_*) wherever they are inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstdint>

#include "../isa.h"
#include <cstring>

namespace phl {
namespace PHL_NS {
namespace {

struct Vec {
  using U = __m512i;
  using I = __m512i;
  using F = __m512;
  static constexpr int tile_rows = 4, tile_blocks = 2;    // integer tile: 8 int32 and 8 float accumulators
  static constexpr int dense_rows = 10, dense_blocks = 2;  // float tile: 20 accumulators; from 11 rows on gcc spills
  static constexpr int small_rows = 8;                     // rows whose weights stay in registers
  static constexpr bool signed_wide = false;

  static U load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, U x) { _mm512_storeu_si512(p, x); }
  template <int From, int To>
  static U pick(U x, int mask) {  // the bits of `mask` after moving bit From of each byte to bit To
    if constexpr (From > To) x = _mm512_srli_epi16(x, From - To);
    if constexpr (From < To) x = _mm512_slli_epi16(x, To - From);
    return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(mask)));
  }
  static U either(U x, U y) { return _mm512_or_si512(x, y); }
  static U lookup(U x, const uint8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), x);
  }

  static I zero_i() { return _mm512_setzero_si512(); }
  template <int Log>
  static I minus_shifted(int32_t x) {  // -(x << Log) in every lane
    return _mm512_slli_epi32(_mm512_set1_epi32(-x), Log);
  }
  using A = __m512i;
  static A spread4(const int8_t* a) {
    int32_t word;
    std::memcpy(&word, a, 4);
    return _mm512_set1_epi32(word);
  }
  template <bool Wide>
  static I dot(I sum, U w, A a) {
    return _mm512_dpbusd_epi32(sum, w, a);
  }

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F loadf(const float* p) { return _mm512_loadu_ps(p); }
  static void storef(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  static F bytes(const void* p) {  // 16 signed bytes
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  static F tofloat(I x) { return _mm512_cvtepi32_ps(x); }
  static F add(F x, F y) { return _mm512_add_ps(x, y); }
  static F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static F div(F x, F y) { return _mm512_div_ps(x, y); }
  static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static F max(F x, F y) { return _mm512_max_ps(x, y); }
  static F min(F x, F y) { return _mm512_min_ps(x, y); }
  static F abs(F x) { return _mm512_abs_ps(x); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power2(F n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
  static float sum(F x) { return _mm512_reduce_add_ps(x); }
  // The larger magnitude, as integers: a NaN is larger than anything and is not lost.
  static F larger(F x, F y) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(abs(x)), _mm512_castps_si512(abs(y))));
  }
  static float largest(F x) {
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(x));
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
  }

  // value > best per lane (strictly, so that the lowest index wins): keeps value and index.
  static void keep_best(float* best, int32_t* index, F value, int32_t first) {
    const F old = _mm512_loadu_ps(best);
    const __mmask16 m = _mm512_cmp_ps_mask(value, old, _CMP_GT_OQ);
    if (m == 0) return;  // almost always; and masked stores are microcode on some processors
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_ps(best, _mm512_mask_blend_ps(m, old, value));
    _mm512_storeu_si512(index, _mm512_mask_add_epi32(_mm512_loadu_si512(index), m, _mm512_set1_epi32(first), lane));
  }

  // x * inverse rounded to int8, 32 of them, with the sums of the two halves.
  static void quantise32(const float* x, float inverse, int8_t* q, int32_t* half_sum) {
    const F s = _mm512_set1_ps(inverse);
    const __m512i lo = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), s));
    const __m512i hi = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), s));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtsepi32_epi8(lo));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtsepi32_epi8(hi));
    half_sum[0] = _mm512_reduce_add_epi32(lo);
    half_sum[1] = _mm512_reduce_add_epi32(hi);
  }

  // Four chunks at once: their reductions share the shuffles.
  static void quantise4(const float* x, float* largest, int8_t* q0, int8_t* q1, int8_t* q2, int8_t* q3, int32_t* s0,
                        int32_t* s1, int32_t* s2, int32_t* s3) {
    F v[8], m[4];
    for (int i = 0; i < 8; ++i) v[i] = loadf(x + 16 * i);
    for (int c = 0; c < 4; ++c) m[c] = larger(v[2 * c], v[2 * c + 1]);
    const F m01 = larger(_mm512_unpacklo_ps(m[0], m[1]), _mm512_unpackhi_ps(m[0], m[1]));
    const F m23 = larger(_mm512_unpacklo_ps(m[2], m[3]), _mm512_unpackhi_ps(m[2], m[3]));
    const __m512d d01 = _mm512_castps_pd(m01), d23 = _mm512_castps_pd(m23);
    F all = larger(_mm512_castpd_ps(_mm512_unpacklo_pd(d01, d23)), _mm512_castpd_ps(_mm512_unpackhi_pd(d01, d23)));
    all = larger(all, _mm512_shuffle_f32x4(all, all, 0x4e));
    all = larger(all, _mm512_shuffle_f32x4(all, all, 0xb1));  // every 128 bits: the four largest
    _mm_storeu_ps(largest, _mm512_castps512_ps128(all));
    const __mmask16 some = _mm512_cmp_ps_mask(all, zero(), _CMP_GT_OQ);
    const F inverse = _mm512_maskz_div_ps(some, set(127.0f), all);
    const F s[4] = {_mm512_permute_ps(inverse, 0x00), _mm512_permute_ps(inverse, 0x55),
                    _mm512_permute_ps(inverse, 0xaa), _mm512_permute_ps(inverse, 0xff)};
    __m128i half[8];
    for (int i = 0; i < 8; ++i) half[i] = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(v[i], s[i / 2])));
    int8_t* q[4] = {q0, q1, q2, q3};
    int32_t* sums[4] = {s0, s1, s2, s3};
    const __m256i ones = _mm256_set1_epi8(1);
    for (int c = 0; c < 4; ++c) {
      const __m256i chunk = _mm256_inserti128_si256(_mm256_castsi128_si256(half[2 * c]), half[2 * c + 1], 1);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q[c]), chunk);
      __m256i t = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, chunk);
      t = _mm256_add_epi32(t, _mm256_shuffle_epi32(t, 0x4e));
      t = _mm256_add_epi32(t, _mm256_shuffle_epi32(t, 0xb1));
      sums[c][0] = _mm256_cvtsi256_si32(t);
      sums[c][1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(t, 1));
    }
  }

  // Two neighbouring inputs of 16 features in bfloat16 times a pair of inputs.
  using P = __m512i;
  static P pair(const uint16_t* a) {
    int32_t word;
    std::memcpy(&word, a, 4);
    return _mm512_set1_epi32(word);
  }
  static F dot_pair(F sum, U w, P a) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)a); }
  static void to_bf16(const float* x, uint16_t* out) {  // 16
    const __m256bh y = _mm512_cvtneps_pbh(_mm512_loadu_ps(x));
    std::memcpy(out, &y, 32);
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
