// Vectors of the unit's width, written with GCC/Clang vector types so that one source serves every instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#if PHL_LEVEL >= 1
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "isa.h"

namespace phl {
namespace PHL_NS {

#if PHL_LEVEL == 2
constexpr int W = 16;
#elif PHL_LEVEL == 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

// Lane numbers: load_as<vi>(kLane).
constexpr int32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

PHL_INLINE vf splat(float x) { return vf{} + x; }

template <class V, class T>
PHL_INLINE V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
PHL_INLINE void store_as(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

PHL_INLINE vf load(const float* p) { return load_as<vf>(p); }
PHL_INLINE void store(float* p, vf v) { store_as(p, v); }

// The first n (0..W) lanes; the others are zero. Reads nothing past them.
PHL_INLINE vf load_n(const float* p, int64_t n) {
#if PHL_LEVEL == 2
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  vf v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

PHL_INLINE void store_n(float* p, vf v, int64_t n) {
#if PHL_LEVEL == 2
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

PHL_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// One bit per lane of a comparison's result.
PHL_INLINE uint32_t lanes_of(vi mask) {
#if PHL_LEVEL == 2
  return _mm512_movepi32_mask((__m512i)mask);
#elif PHL_LEVEL == 1
  return uint32_t(_mm256_movemask_ps((__m256)mask));
#else
  return uint32_t((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8));
#endif
}

// Of a NaN and a number, the second argument.
PHL_INLINE vf max(vf a, vf b) {
#if PHL_LEVEL == 2
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif PHL_LEVEL == 1
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
PHL_INLINE vf min(vf a, vf b) {
#if PHL_LEVEL == 2
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif PHL_LEVEL == 1
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}

// sum + x * y, rounded once where the level can: the compiler would choose anew in every function, and ops that must give the
// same bits are in several.
PHL_INLINE vf fused(vf x, vf y, vf sum) {
#if PHL_LEVEL == 2
  return (vf)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif PHL_LEVEL == 1
  return (vf)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)sum, (float32x4_t)x, (float32x4_t)y);
#else
  return sum + x * y;
#endif
}

PHL_INLINE float sum(vf v) {
#if PHL_LEVEL == 2
  return _mm512_reduce_add_ps((__m512)v);
#elif PHL_LEVEL == 1
  __m128 low = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  low = _mm_add_ps(low, _mm_movehl_ps(low, low));
  return _mm_cvtss_f32(_mm_add_ss(low, _mm_shuffle_ps(low, low, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

PHL_INLINE float largest(vf v) {
#if PHL_LEVEL == 2
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

PHL_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// p * 2^n, where n stands in the low bits of `shifted`. In unsigned numbers: a NaN has any bits there, and stays one.
PHL_INLINE vf times_power(vf p, vf shifted) { return p * (vf)(((vu)shifted << 23) + (127u << 23)); }

// e^x, relative error below 2e-7; 0 below -87.3 (so that -inf gives 0), saturates at e^88.
// Range reduction by powers of two and a polynomial of degree 6 (Cephes' expf coefficients).
PHL_INLINE vf exp(vf x) {
  const vi tiny = x < splat(-87.3f);
  x = min(splat(88.0f), max(splat(-87.3f), x));
  const vf shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const vf n = shifted - 12582912.0f;
  const vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return select(tiny, vf{}, times_power(p, shifted));
}

// 2^x by rounding to an integer and a Taylor polynomial on [-0.5, 0.5]: relative error 2e-7 at degree 6, 4e-5 at 4.
// 0 below -126 or, with AVX-512, -150.
template <int kDegree>
PHL_INLINE vf exp2(vf x) {
#if PHL_LEVEL == 2
  x = max(splat(-200.0f), x);  // -inf would be NaN below; 2^-200 is 0 anyway. A NaN passes.
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, 8);
  const vf r = x - n;
#else
  const vi tiny = x < splat(-126.0f);
  x = min(splat(127.0f), max(splat(-126.0f), x));
  const vf shifted = x + 12582912.0f;
  const vf n = shifted - 12582912.0f;
  const vf r = x - n;
#endif
  vf p = splat(kDegree == 6 ? 1.54035304e-4f : 9.61812911e-3f);
  if constexpr (kDegree == 6) {
    p = p * r + 1.33335581e-3f;
    p = p * r + 9.61812911e-3f;
  }
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.0f;
#if PHL_LEVEL == 2
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return select(tiny, vf{}, times_power(p, shifted));
#endif
}

// tanh(x) = 1 - 2 / (e^2x + 1), with a short series near zero where that cancels.
PHL_INLINE vf tanh(vf x) {
  const vf square = x * x;
  const vf series =
      x + x * square * (-0.333333333f + square * (0.133333333f + square * (-0.0539682540f + square * 0.0218694885f)));
  const vf full = 1.0f - 2.0f / (exp(min(x * 2.0f, splat(40.0f))) + 1.0f);
  return select(square < splat(0.04f), series, full);
}

// GCC 12 makes poor code of __builtin_convertvector between widths, so the x86 levels spell it out.
PHL_INLINE vu widen(vh v) {
#if PHL_LEVEL == 2
  return (vu)_mm512_cvtepu16_epi32((__m256i)v);
#elif PHL_LEVEL == 1
  return (vu)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vu);
#endif
}
PHL_INLINE vh narrow(vu v) {
#if PHL_LEVEL == 2
  return (vh)_mm512_cvtepi32_epi16((__m512i)v);
#elif PHL_LEVEL == 1
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, vh);
#endif
}

PHL_INLINE vf from_bf16(vh v) { return (vf)(widen(v) << 16); }

// Round to nearest even; NaN stays NaN.
PHL_INLINE vh to_bf16(vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const vu quiet = (bits >> 16) | 64;
  const vi nan = x != x;
  return narrow((rounded & ~(vu)nan) | (quiet & (vu)nan));
}

PHL_INLINE vf load_bf16(const uint16_t* p) { return from_bf16(load_as<vh>(p)); }
PHL_INLINE void store_bf16(uint16_t* p, vf v) { store_as(p, to_bf16(v)); }

PHL_INLINE float bf16_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
PHL_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace PHL_NS
}  // namespace phl
