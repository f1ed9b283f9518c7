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
  using Part = Vec;
  static constexpr int parts = 1;
  static constexpr int tile_rows = 4, wide_rows = 4, tile_blocks = 2;  // integer tile: 8 int32 and 8 float accumulators
  static constexpr int dense_rows = 10, dense_blocks = 2;  // float tile: 20 accumulators; from 11 rows on gcc spills
  static constexpr int small_rows = 8, held_rows = 8;      // rows whose weights stay in registers
  static constexpr int dense_steps = 1;  // that a dense kernel takes at a time
  static constexpr bool signed_wide = false;
  static constexpr bool holds_chunk = true;  // registers hold the eight operands of a chunk

  static U load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, U x) { _mm512_storeu_si512(p, x); }
  template <int From, int To>
  static U pick(U x, int mask) {  // the bits of `mask` after moving bit From of each byte to bit To
    if constexpr (From > To) x = _mm512_srli_epi16(x, From - To);
    if constexpr (From < To) x = _mm512_slli_epi16(x, To - From);
    return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(mask)));
  }
  static U either(U x, U y) { return _mm512_or_si512(x, y); }
  template <int From, int To>
  static U insert(U w, U x, int mask) {  // what `pick` gives of x, in bits that w has not
    return either(w, pick<From, To>(x, mask));
  }
  static U lookup(U x, const uint8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), x);
  }

  // 16 numbers modulo 2^16, each in both halves of its lane.
  static U twice16(F x) {
    const __m128i both = _mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
    return _mm512_shuffle_epi8(_mm512_cvtps_epi32(x), _mm512_broadcast_i32x4(both));
  }
  // (x * factor + offset) / 256 of bytes x, modulo 2^16 before the division; those of two registers' even bytes, and odd.
  static U rescaled(U even, U odd, U factor, U offset) {
    const U low = _mm512_add_epi16(_mm512_mullo_epi16(even, factor), offset);
    const U high = _mm512_add_epi16(_mm512_mullo_epi16(odd, factor), offset);
    return _mm512_mask_mov_epi8(_mm512_srli_epi16(low, 8), 0xaaaaaaaaaaaaaaaaull, high);
  }
  static U rescale(U x, U factor, U offset) {
    return rescaled(_mm512_and_si512(x, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(x, 8), factor, offset);
  }
  // The same of nibbles: the lower ones, or the upper ones.
  static U rescale_low(U x, U factor, U offset) {
    const U mask = _mm512_set1_epi16(15);
    return rescaled(_mm512_and_si512(x, mask), _mm512_and_si512(_mm512_srli_epi16(x, 8), mask), factor, offset);
  }
  static U rescale_high(U x, U factor, U offset) {
    const U mask = _mm512_set1_epi16(15);
    return rescaled(_mm512_and_si512(_mm512_srli_epi16(x, 4), mask), _mm512_srli_epi16(x, 12), factor, offset);
  }
  // Bytes that use all eight bits times factor / 2^8 plus offset, both of the byte's lane, / 64.
  static U rescale_wide(U x, U factor, U offset) {
    const U low = _mm512_and_si512(x, _mm512_set1_epi16(0xff)), high = _mm512_srli_epi16(x, 8);
    const U even = _mm512_mulhrs_epi16(_mm512_slli_epi16(low, 7), factor);
    const U odd = _mm512_mulhrs_epi16(_mm512_slli_epi16(high, 7), factor);
    return _mm512_mask_mov_epi8(_mm512_srli_epi16(_mm512_add_epi16(even, offset), 6), 0xaaaaaaaaaaaaaaaaull,
                                _mm512_slli_epi16(_mm512_add_epi16(odd, offset), 2));
  }
  static F inverse(F x) {  // 0 of 0
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ), _mm512_set1_ps(1.0f), x);
  }

  static I zero_i() { return _mm512_setzero_si512(); }
  static I set_i(int32_t x) { return _mm512_set1_epi32(x); }
  template <int Log>
  static I minus_shifted(int32_t x) {  // -(x << Log) in every lane
    return _mm512_slli_epi32(_mm512_set1_epi32(-x), Log);
  }
  using A = __m512i;
  static A spread4(const int8_t* a, int j) {  // of 32 inputs the j-th four
    int32_t word;
    std::memcpy(&word, a + 4 * j, 4);
    return _mm512_set1_epi32(word);
  }
  template <bool Wide>
  static I dot(I sum, U w, A a) {
    return _mm512_dpbusd_epi32(sum, w, a);
  }

  // Of 32 inputs the j-th four are added to a sum. In words of its own: gcc would load the four into a register first,
  // and put row after row, each a chain.
  PHL_INLINE static void dot_input(I& sum, U w, const int8_t* a, int j) {
    asm volatile("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(reinterpret_cast<const int32_t&>(a[4 * j])));
  }

  template <bool Wide>
  static U ready(U w) {
    return w;
  }
  template <bool Wide>
  static U keep(U w) {  // as a tile keeps it
    return w;
  }
  template <bool Wide>
  static U kept(U w) {
    return w;
  }
  template <int Bits, bool Wide>
  struct Sum {
    I total;
    PHL_INLINE void add(int, U w, A a) { total = dot<Wide>(total, w, a); }
    PHL_INLINE I all(int) { return total; }
  };

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
  static F reciprocal(F x) {  // to 2^-23: an estimate of 14 bits and a step of Newton's
    const F r = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.0f)));
  }
  static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static F fma_input(F w, const float* x, int u, F sum) { return fma(w, set(x[u]), sum); }
  static F max(F x, F y) { return _mm512_max_ps(x, y); }
  static F min(F x, F y) { return _mm512_min_ps(x, y); }
  static F sqrt(F x) { return _mm512_sqrt_ps(x); }
  static float top(F x) { return _mm512_reduce_max_ps(x); }  // the largest
  static F abs(F x) { return _mm512_abs_ps(x); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale2(F x, F n) { return _mm512_scalef_ps(x, n); }  // x 2^n
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

  // Two neighbouring inputs of 16 features in bfloat16 times a pair of inputs.
  using P = __m512i;
  static P pair(const uint16_t* a, int u) {
    int32_t word;
    std::memcpy(&word, a + 2 * u, 4);
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
