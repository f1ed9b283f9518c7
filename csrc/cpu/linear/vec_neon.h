// The vocabulary of vec_avx512.h in NEON with dot products of bytes (Armv8.2 and later): every vector is four quarters.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "half.h"

namespace phl {
namespace PHL_NS {
namespace {

struct Vec {
  struct U {
    uint8x16_t q[4];
  };
  struct I {
    int32x4_t q[4];
  };
  struct F {
    float32x4_t q[4];
  };
  // Of 32 registers a tile's sums take 16 to 24, an operand and a row's bytes five more.
  static constexpr int tile_rows = 4, wide_rows = 6, tile_blocks = 1;
  static constexpr int dense_rows = 6, dense_blocks = 1;
  static constexpr int small_rows = 4;
  static constexpr bool holds_chunk = false;  // a chunk's operands are all the registers
  static constexpr bool signed_wide = true;   // products are of signed bytes alone

  template <class V, class G>
  PHL_INLINE static V quarters(G&& g) {
    return V{{g(0), g(1), g(2), g(3)}};
  }

  PHL_INLINE static U load(const void* p) {
    const auto* b = static_cast<const uint8_t*>(p);
    return quarters<U>([&](int i) __attribute__((always_inline)) { return vld1q_u8(b + 16 * i); });
  }
  PHL_INLINE static void store(void* p, U x) {
    auto* b = static_cast<uint8_t*>(p);
    for (int i = 0; i < 4; ++i) vst1q_u8(b + 16 * i, x.q[i]);
  }
  template <int From, int To>
  PHL_INLINE static uint8x16_t pick1(uint8x16_t x, int mask) {
    if constexpr (From > To) x = vshrq_n_u8(x, From - To);
    if constexpr (From < To) x = vshlq_n_u8(x, To - From);
    return vandq_u8(x, vdupq_n_u8(static_cast<uint8_t>(mask)));
  }
  template <int From, int To>
  PHL_INLINE static U pick(U x, int mask) {
    return quarters<U>([&](int i) __attribute__((always_inline)) { return pick1<From, To>(x.q[i], mask); });
  }
  PHL_INLINE static U either(U x, U y) {
    return quarters<U>([&](int i) __attribute__((always_inline)) { return vorrq_u8(x.q[i], y.q[i]); });
  }
  PHL_INLINE static U lookup(U x, const uint8_t* table) {
    const uint8x16_t t = vld1q_u8(table);
    return quarters<U>([&](int i) __attribute__((always_inline)) { return vqtbl1q_u8(t, x.q[i]); });
  }

  PHL_INLINE static I all_i(int32_t v) {
    const int32x4_t x = vdupq_n_s32(v);
    return I{{x, x, x, x}};
  }
  PHL_INLINE static I zero_i() { return all_i(0); }
  template <int Log>
  PHL_INLINE static I minus_shifted(int32_t x) {
    return all_i(-x * (1 << Log));
  }
  using A = int8x16_t;
  PHL_INLINE static A spread4(const int8_t* a) {
    return vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(a)));
  }
  // Operands as products take them. Those of all eight bits stand for their value less 128; the others have no eighth.
  template <bool Wide>
  PHL_INLINE static U ready(U w) {
    if constexpr (Wide) {
      return quarters<U>([&](int i) __attribute__((always_inline)) { return veorq_u8(w.q[i], vdupq_n_u8(0x80)); });
    } else {
      return w;
    }
  }
  PHL_INLINE static I products(I sum, const U& w, A a) {
    for (int i = 0; i < 4; ++i) sum.q[i] = vdotq_s32(sum.q[i], vreinterpretq_s8_u8(w.q[i]), a);
    return sum;
  }
  template <int Bits, bool Wide>
  struct Sum {
    I total;
    PHL_INLINE void add(int, const U& w, A a) { total = products(total, w, a); }
    PHL_INLINE I all(int) const { return total; }
  };
  template <bool Wide>
  PHL_INLINE static I dot(I sum, const U& w, A a) {
    return products(sum, ready<Wide>(w), a);
  }

  PHL_INLINE static F set(float v) {
    const float32x4_t x = vdupq_n_f32(v);
    return F{{x, x, x, x}};
  }
  PHL_INLINE static F zero() { return set(0.0f); }
  PHL_INLINE static F loadf(const float* p) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vld1q_f32(p + 4 * i); });
  }
  PHL_INLINE static void storef(float* p, F x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.q[i]);
  }
  PHL_INLINE static F half(const void* p) {
    const auto* h = static_cast<const uint16_t*>(p);
    return quarters<F>([&](int i) __attribute__((always_inline)) {
      return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h + 4 * i)));
    });
  }
  PHL_INLINE static F bytes(const void* p) {
    const int8x16_t x = vld1q_s8(static_cast<const int8_t*>(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
    return F{{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
              vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
  }
  PHL_INLINE static F tofloat(I x) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vcvtq_f32_s32(x.q[i]); });
  }
  PHL_INLINE static F add(F x, F y) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vaddq_f32(x.q[i], y.q[i]); });
  }
  PHL_INLINE static F sub(F x, F y) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vsubq_f32(x.q[i], y.q[i]); });
  }
  PHL_INLINE static F mul(F x, F y) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vmulq_f32(x.q[i], y.q[i]); });
  }
  PHL_INLINE static F reciprocal(F x) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vdivq_f32(vdupq_n_f32(1.0f), x.q[i]); });
  }
  PHL_INLINE static F fma(F x, F y, F z) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vfmaq_f32(z.q[i], x.q[i], y.q[i]); });
  }
  // Of a NaN and a number the second, as elsewhere.
  PHL_INLINE static F max(F x, F y) {
    return quarters<F>([&](int i) __attribute__((always_inline)) {
      return vbslq_f32(vcgtq_f32(x.q[i], y.q[i]), x.q[i], y.q[i]);
    });
  }
  PHL_INLINE static F min(F x, F y) {
    return quarters<F>([&](int i) __attribute__((always_inline)) {
      return vbslq_f32(vcltq_f32(x.q[i], y.q[i]), x.q[i], y.q[i]);
    });
  }
  PHL_INLINE static F sqrt(F x) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vsqrtq_f32(x.q[i]); });
  }
  PHL_INLINE static float top(F x) {  // the largest
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.q[0], x.q[1]), vmaxq_f32(x.q[2], x.q[3])));
  }
  PHL_INLINE static F abs(F x) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vabsq_f32(x.q[i]); });
  }
  PHL_INLINE static F round(F x) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vrndnq_f32(x.q[i]); });
  }
  PHL_INLINE static F scale2(F x, F n) {
    return quarters<F>([&](int i) __attribute__((always_inline)) {
      const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.q[i]), vdupq_n_s32(127)), 23);
      return vmulq_f32(x.q[i], vreinterpretq_f32_s32(power));
    });
  }
  // In the order of the other levels: eight and eight, four and four, then the pairs.
  PHL_INLINE static float sum(F x) {
    const float32x4_t low = vaddq_f32(x.q[0], x.q[2]), high = vaddq_f32(x.q[1], x.q[3]), four = vaddq_f32(low, high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  PHL_INLINE static uint32x4_t size_of(float32x4_t x) { return vreinterpretq_u32_f32(vabsq_f32(x)); }
  PHL_INLINE static F larger(F x, F y) {  // in magnitude, as integers: a NaN is larger than anything and is not lost
    return quarters<F>([&](int i) __attribute__((always_inline)) {
      return vreinterpretq_f32_u32(vmaxq_u32(size_of(x.q[i]), size_of(y.q[i])));
    });
  }
  PHL_INLINE static float largest(F x) {
    const auto bits = [&](int i) { return vreinterpretq_u32_f32(x.q[i]); };
    return bits_to_float(vmaxvq_u32(vmaxq_u32(vmaxq_u32(bits(0), bits(1)), vmaxq_u32(bits(2), bits(3)))));
  }

  PHL_INLINE static void keep_best(float* best, int32_t* index, F value, int32_t first) {
    uint32x4_t any = vdupq_n_u32(0);
    for (int i = 0; i < 4; ++i) any = vorrq_u32(any, vcgtq_f32(value.q[i], vld1q_f32(best + 4 * i)));
    if (vmaxvq_u32(any) == 0) return;  // almost always
    float x[16];
    storef(x, value);
    for (int i = 0; i < 16; ++i) {
      if (x[i] > best[i]) best[i] = x[i], index[i] = first + i;
    }
  }

  // Beyond the range of a byte: its ends; a NaN is 0.
  PHL_INLINE static void quantise32(const float* x, float inverse, int8_t* q, int32_t* half_sum) {
    for (int h = 0; h < 2; ++h) {
      int16x4_t words[4];
      int32x4_t sums = vdupq_n_s32(0);
      for (int i = 0; i < 4; ++i) {
        const int32x4_t whole = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 16 * h + 4 * i), inverse));
        words[i] = vqmovn_s32(whole);
        sums = vaddq_s32(sums, whole);
      }
      const int8x8_t low = vqmovn_s16(vcombine_s16(words[0], words[1]));
      const int8x8_t high = vqmovn_s16(vcombine_s16(words[2], words[3]));
      vst1q_s8(q + 16 * h, vcombine_s8(low, high));
      half_sum[h] = vaddvq_s32(sums);
    }
  }

  struct P {
    float even, odd;
  };
  PHL_INLINE static P pair(const uint16_t* a) { return {bf16_to_float(a[0]), bf16_to_float(a[1])}; }
  PHL_INLINE static F dot_pair(F sum, const U& w, P a) {
    return quarters<F>([&](int i) __attribute__((always_inline)) {
      const uint32x4_t words = vreinterpretq_u32_u8(w.q[i]);
      const float32x4_t even = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
      const float32x4_t odd = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000u)));
      return vfmaq_n_f32(vfmaq_n_f32(sum.q[i], odd, a.odd), even, a.even);
    });
  }
  PHL_INLINE static void to_bf16(const float* x, uint16_t* out) {
    for (int i = 0; i < 16; ++i) out[i] = float_to_bf16(x[i]);
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
