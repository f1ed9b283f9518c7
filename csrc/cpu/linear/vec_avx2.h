// The vocabulary of vec_avx512.h in AVX2, FMA and F16C: every vector is a pair of halves. vec_avxvnni.h has other products.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../isa.h"
#include <cstring>

namespace phl {
namespace PHL_NS {
namespace {

struct Avx2 {
  struct U {
    __m256i a, b;
  };
  struct I {
    __m256i a, b;
  };
  struct F {
    __m256 a, b;
  };
  using Part = Avx2;
  static constexpr int parts = 1;
  static constexpr int tile_rows = 6, wide_rows = 4, tile_blocks = 1;
  static constexpr int dense_rows = 6, dense_blocks = 1;
  static constexpr int small_rows = 4, held_rows = 4;
  static constexpr int dense_steps = 1;  // that a dense kernel takes at a time
  static constexpr bool holds_chunk = false;  // a chunk's operands are made one at a time: registers hold few
  static constexpr bool signed_wide = true;  // eight-bit operands are multiplied as signed, their zero taken off

  static U load(const void* p) {
    const auto* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void store(void* p, U x) {
    auto* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
  }
  template <int From, int To>
  static __m256i pick1(__m256i x, int mask) {
    if constexpr (From > To) x = _mm256_srli_epi16(x, From - To);
    if constexpr (From < To) x = _mm256_slli_epi16(x, To - From);
    return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>(mask)));
  }
  template <int From, int To>
  static U pick(U x, int mask) {
    return {pick1<From, To>(x.a, mask), pick1<From, To>(x.b, mask)};
  }
  static U either(U x, U y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  template <int From, int To>
  static U insert(U w, U x, int mask) {  // what `pick` gives of x, in bits that w has not
    return either(w, pick<From, To>(x, mask));
  }
  static U lookup(U x, const uint8_t* table) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, x.a), _mm256_shuffle_epi8(t, x.b)};
  }

  static I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  template <int Log>
  static I minus_shifted(int32_t x) {
    const __m256i y = _mm256_slli_epi32(_mm256_set1_epi32(-x), Log);
    return {y, y};
  }
  using A = __m256i;
  static A spread4(const int8_t* a, int j) {  // of 32 inputs the j-th four
    int32_t word;
    std::memcpy(&word, a + 4 * j, 4);
    return _mm256_set1_epi32(word);
  }
  // Operands as products take them: of eight bits, signed, and their magnitudes.
  struct Signed {
    U value, size;
  };
  template <bool Wide>
  static auto ready(U w) {
    if constexpr (Wide) {
      const __m256i zero = _mm256_set1_epi8(static_cast<char>(0x80));
      const U s{_mm256_xor_si256(w.a, zero), _mm256_xor_si256(w.b, zero)};
      return Signed{s, {_mm256_abs_epi8(s.a), _mm256_abs_epi8(s.b)}};
    } else {
      return w;
    }
  }
  template <bool Wide>
  static U keep(U w) {  // as a tile keeps it
    return w;
  }
  template <bool Wide>
  static auto kept(U w) {
    return ready<Wide>(w);
  }
  // |w| <= 128 times +-127, two of them, stay within int16.
  static U products(Signed w, A a) {
    return {_mm256_maddubs_epi16(w.size.a, _mm256_sign_epi8(a, w.value.a)),
            _mm256_maddubs_epi16(w.size.b, _mm256_sign_epi8(a, w.value.b))};
  }
  static U products(U w, A a) { return {_mm256_maddubs_epi16(w.a, a), _mm256_maddubs_epi16(w.b, a)}; }
  static I widened(I sum, U words) {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(words.a, one)),
            _mm256_add_epi32(sum.b, _mm256_madd_epi16(words.b, one))};
  }
  // The sum of some operands' products. Those of few bits are added as int16 first, as many as cannot overflow: an add in
  // place of a multiplication and an add.
  template <int Bits, bool Wide>
  struct Sum {
    static constexpr int most = Wide ? 1 : 32767 / (2 * 128 * ((1 << Bits) - 1));
    static constexpr int run = most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
    I total;
    U words;
    template <class W>
    void add(int nth, W w, A a) {  // nth: how many were added before
      const U p = products(w, a);
      words = nth % run == 0 ? p : U{_mm256_add_epi16(words.a, p.a), _mm256_add_epi16(words.b, p.b)};
      // In this order: gcc would rather make all the products first, and put them on the stack.
      asm("" : "+x"(words.a), "+x"(words.b));
      if (nth % run == run - 1) {
        total = widened(total, words);
        asm("" : "+x"(total.a), "+x"(total.b));
      }
    }
    I all(int count) { return count % run == 0 ? total : widened(total, words); }
  };
  template <bool Wide>
  static I dot(I sum, U w, A a) {
    return widened(sum, products(ready<Wide>(w), a));
  }

  static F both(__m256 x) { return {x, x}; }
  static F zero() { return both(_mm256_setzero_ps()); }
  static F set(float x) { return both(_mm256_set1_ps(x)); }
  static F loadf(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void storef(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static F half(const void* p) {
    const auto* q = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  static F bytes(const void* p) {
    const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(x, x)))};
  }
  static F tofloat(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F reciprocal(F x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    return {_mm256_div_ps(one, x.a), _mm256_div_ps(one, x.b)};
  }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F fma_input(F w, const float* x, int u, F sum) { return fma(w, set(x[u]), sum); }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
  static float top(F x) {  // the largest
    const __m256 y = _mm256_max_ps(x.a, x.b);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
  }
  static F abs(F x) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
  }
  static F round(F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
  }
  static __m256 power2(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static F scale2(F x, F n) { return mul(x, {power2(n.a), power2(n.b)}); }
  static float sum(F x) {
    const __m256 y = _mm256_add_ps(x.a, x.b);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
  }
  static F larger(F x, F y) {  // in magnitude, as integers: a NaN is larger than anything and is not lost
    x = abs(x), y = abs(y);
    return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x.a), _mm256_castps_si256(y.a))),
            _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(x.b), _mm256_castps_si256(y.b)))};
  }
  static float largest(F x) {
    const __m256i y = _mm256_max_epi32(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
    __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epi32(z, _mm_unpackhi_epi64(z, z));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 1));
    return _mm_cvtss_f32(_mm_castsi128_ps(z));
  }

  static void keep_best(float* best, int32_t* index, F value, int32_t first) {
    const __m256 a = _mm256_cmp_ps(value.a, _mm256_loadu_ps(best), _CMP_GT_OQ);
    const __m256 b = _mm256_cmp_ps(value.b, _mm256_loadu_ps(best + 8), _CMP_GT_OQ);
    if (_mm256_movemask_ps(_mm256_or_ps(a, b)) == 0) return;  // almost always
    alignas(32) float x[16];
    storef(x, value);
    for (int i = 0; i < 16; ++i) {
      if (x[i] > best[i]) best[i] = x[i], index[i] = first + i;
    }
  }

  static int32_t sum8(__m256i x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_add_epi32(y, _mm_unpackhi_epi64(y, y));
    return _mm_cvtsi128_si32(y) + _mm_extract_epi32(y, 1);
  }
  static void quantise32(const float* x, float inverse, int8_t* q, int32_t* half_sum) {
    const __m256 s = _mm256_set1_ps(inverse);
    for (int h = 0; h < 2; ++h) {
      const __m256i lo = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + h * 16), s));
      const __m256i hi = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + h * 16 + 8), s));
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
      const __m128i narrow = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + h * 16), narrow);
      half_sum[h] = sum8(_mm256_add_epi32(lo, hi));
    }
  }

  struct P {
    __m256 even, odd;
  };
  static P pair(const uint16_t* a, int u) {
    const uint32_t even = uint32_t{a[2 * u]} << 16, odd = uint32_t{a[2 * u + 1]} << 16;
    float x, y;
    std::memcpy(&x, &even, 4);
    std::memcpy(&y, &odd, 4);
    return {_mm256_set1_ps(x), _mm256_set1_ps(y)};
  }
  static __m256 dot_pair1(__m256 sum, __m256i w, P a) {
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    return _mm256_fmadd_ps(even, a.even, _mm256_fmadd_ps(odd, a.odd, sum));
  }
  static F dot_pair(F sum, U w, P a) { return {dot_pair1(sum.a, w.a, a), dot_pair1(sum.b, w.b, a)}; }
  static void to_bf16(const float* x, uint16_t* out) {
    for (int i = 0; i < 16; ++i) {
      uint32_t u;
      std::memcpy(&u, x + i, 4);
      const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
      out[i] = nan ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
  }
};

#if !PHL_VNNI
using Vec = Avx2;
#endif

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
