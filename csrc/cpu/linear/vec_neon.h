// The vocabulary of vec_avx512.h in NEON with dot products of bytes (Armv8.2 and later), and in i8mm's where the unit has
// them. A vector is N quarters: four, of 16 lanes, as everywhere; or two, as much of each row as registers hold in the
// inner loops (Vec::Part).
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "half.h"

namespace phl {
namespace PHL_NS {
namespace {

template <int N>
struct Neon {
  struct U {
    uint8x16_t q[N];
  };
  struct I {
    int32x4_t q[N];
  };
  struct F {
    float32x4_t q[N];
  };
  using Part = Neon<2>;
  static constexpr int parts = N / 2;
  // Of 32 registers a tile's sums take 24, its rows' bytes six, and a part of an operand two; pairs (pairs.h) need some
  // for scales as well.
  static constexpr int tile_rows = PHL_I8MM ? 4 : 6, wide_rows = tile_rows, tile_blocks = 1;
  static constexpr int dense_rows = PHL_I8MM ? 6 : 4, dense_blocks = 1;  // pairs of bfloat16 as two floats take more
  static constexpr int dense_steps = 4;  // as many of a row's inputs as a load gives
  static constexpr int small_rows = 4, held_rows = 3;  // of three rows the float sums stay in registers
  static constexpr bool holds_chunk = false;        // a chunk's operands are all the registers
  static constexpr bool signed_wide = !PHL_I8MM;  // products are of signed bytes alone

  template <class V, class G>
  PHL_INLINE static V quarters(G&& g) {
    if constexpr (N == 2) return V{{g(0), g(1)}};
    else return V{{g(0), g(1), g(2), g(3)}};
  }

  PHL_INLINE static U load(const void* p) {
    const auto* b = static_cast<const uint8_t*>(p);
    return quarters<U>([&](int i) __attribute__((always_inline)) { return vld1q_u8(b + 16 * i); });
  }
  PHL_INLINE static void store(void* p, U x) {
    auto* b = static_cast<uint8_t*>(p);
    for (int i = 0; i < N; ++i) vst1q_u8(b + 16 * i, x.q[i]);
  }
  template <int From, int To>
  PHL_INLINE static uint8x16_t moved(uint8x16_t x) {
    if constexpr (From > To) return vshrq_n_u8(x, From - To);
    else if constexpr (From < To) return vshlq_n_u8(x, To - From);
    else return x;
  }
  template <int From, int To>
  PHL_INLINE static U pick(const U& x, int mask) {
    constexpr int left = From > To ? 0xff >> (From - To) : (0xff << (To - From)) & 0xff;  // what moving leaves of a byte
    return quarters<U>([&](int i) __attribute__((always_inline)) {
      const uint8x16_t y = moved<From, To>(x.q[i]);
      return (mask & left) == left ? y : vandq_u8(y, vdupq_n_u8(static_cast<uint8_t>(mask)));
    });
  }
  template <int From, int To>
  PHL_INLINE static U insert(const U& w, const U& x, int mask) {
    const uint8x16_t m = vdupq_n_u8(static_cast<uint8_t>(mask));
    return quarters<U>([&](int i) __attribute__((always_inline)) { return vbslq_u8(m, moved<From, To>(x.q[i]), w.q[i]); });
  }
  PHL_INLINE static U lookup(const U& x, const uint8_t* table) {
    const uint8x16_t t = vld1q_u8(table);
    return quarters<U>([&](int i) __attribute__((always_inline)) { return vqtbl1q_u8(t, x.q[i]); });
  }

  PHL_INLINE static I all_i(int32_t v) {
    return quarters<I>([&](int) __attribute__((always_inline)) { return vdupq_n_s32(v); });
  }
  PHL_INLINE static I zero_i() { return all_i(0); }
  template <int Log>
  PHL_INLINE static I minus_shifted(int32_t x) {
    return all_i(-x * (1 << Log));
  }
  // Sixteen inputs, and which four of them are meant: a product takes them by their place, so that one load serves four.
  struct A {
    int8x16_t q;
    int lane;
  };
  // All of a chunk's inputs.
  struct Inputs {
    int8x16_t q[2];
  };
  PHL_INLINE static Inputs inputs(const int8_t* a) { return {{vld1q_s8(a), vld1q_s8(a + 16)}}; }
  PHL_INLINE static A spread4(const Inputs& x, int j) { return {x.q[j / 4], j % 4}; }
  PHL_INLINE static A spread4(const int8_t* a, int j) { return {vld1q_s8(a + j / 4 * 16), j % 4}; }
  // Operands as products take them. Those of all eight bits stand for their value less 128; the others have no eighth.
  template <bool Wide>
  PHL_INLINE static U ready(const U& w) {
    if constexpr (Wide && signed_wide) {
      return quarters<U>([&](int i) __attribute__((always_inline)) { return veorq_u8(w.q[i], vdupq_n_u8(0x80)); });
    } else {
      return w;
    }
  }
  // An operand as a tile keeps it, and as products take what is kept.
  template <bool Wide>
  PHL_INLINE static U keep(const U& w) {
    return ready<Wide>(w);
  }
  template <bool Wide>
  PHL_INLINE static U kept(const U& w) {
    return w;
  }
  template <int Lane>
  PHL_INLINE static int32x4_t product(int32x4_t sum, uint8x16_t w, int8x16_t a) {
#if PHL_I8MM
    return vusdotq_laneq_s32(sum, w, a, Lane);
#else
    return vdotq_laneq_s32(sum, vreinterpretq_s8_u8(w), a, Lane);
#endif
  }
  PHL_INLINE static I products(I sum, const U& w, const A& a) {
    for (int i = 0; i < N; ++i) {
      switch (a.lane) {  // a constant, once loops are unrolled
        case 0: sum.q[i] = product<0>(sum.q[i], w.q[i], a.q); break;
        case 1: sum.q[i] = product<1>(sum.q[i], w.q[i], a.q); break;
        case 2: sum.q[i] = product<2>(sum.q[i], w.q[i], a.q); break;
        default: sum.q[i] = product<3>(sum.q[i], w.q[i], a.q); break;
      }
    }
    return sum;
  }
  template <int Bits, bool Wide>
  struct Sum {
    I total;
    PHL_INLINE void add(int, const U& w, const A& a) { total = products(total, w, a); }
    PHL_INLINE I all(int) const { return total; }
  };
  template <bool Wide>
  PHL_INLINE static I dot(I sum, const U& w, const A& a) {
    return products(sum, ready<Wide>(w), a);
  }

  PHL_INLINE static F set(float v) {
    return quarters<F>([&](int) __attribute__((always_inline)) { return vdupq_n_f32(v); });
  }
  PHL_INLINE static F zero() { return set(0.0f); }
  // total + sum * d * scale + m * scaled_sum. Both numbers of the activation by one load.
  template <bool Min>
  PHL_INLINE static F accumulate(F total, I sum, F d, F m, const float* numbers) {
    const float32x4_t x = vld1q_f32(numbers);  // the scale, and the third is the scaled sum
    for (int i = 0; i < N; ++i) {
      total.q[i] = vfmaq_f32(total.q[i], vcvtq_f32_s32(sum.q[i]), vmulq_laneq_f32(d.q[i], x, 0));
      if constexpr (Min) total.q[i] = vfmaq_laneq_f32(total.q[i], m.q[i], x, 2);
    }
    return total;
  }
  PHL_INLINE static F loadf(const float* p) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vld1q_f32(p + 4 * i); });
  }
  PHL_INLINE static void store_two(float* p, float32x4_t x, float32x4_t y) { vst1q_f32(p, x), vst1q_f32(p + 4, y); }
  PHL_INLINE static void storef(float* p, const F& x) {
    for (int i = 0; i < N; i += 2) store_two(p + 4 * i, x.q[i], x.q[i + 1]);  // beside each other, so that they are one
  }
  PHL_INLINE static F half(const void* p) {
    const auto* h = static_cast<const uint16_t*>(p);
    F x;
    for (int i = 0; i < N; i += 2) {
      const float16x8_t both = vreinterpretq_f16_u16(vld1q_u16(h + 4 * i));
      x.q[i] = vcvt_f32_f16(vget_low_f16(both));
      x.q[i + 1] = vcvt_high_f32_f16(both);
    }
    return x;
  }
  PHL_INLINE static F bytes(const void* p) {
    const auto* b = static_cast<const int8_t*>(p);
    F x;
    for (int i = 0; i < N; i += 2) {
      const int16x8_t words = vmovl_s8(vld1_s8(b + 4 * i));
      x.q[i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
      x.q[i + 1] = vcvtq_f32_s32(vmovl_high_s16(words));
    }
    return x;
  }
  PHL_INLINE static F tofloat(I x) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vcvtq_f32_s32(x.q[i]); });
  }
  template <class Whole>
  PHL_INLINE static F part_of(const Whole& x, int part) { return {{x.q[2 * part], x.q[2 * part + 1]}}; }
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
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.q[0], x.q[1]), vmaxq_f32(x.q[N - 2], x.q[N - 1])));
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
    static_assert(N == 4);
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
    return bits_to_float(vmaxvq_u32(vmaxq_u32(vmaxq_u32(bits(0), bits(1)), vmaxq_u32(bits(N - 2), bits(N - 1)))));
  }

  PHL_INLINE static void keep_best(float* best, int32_t* index, F value, int32_t first) {
    uint32x4_t any = vdupq_n_u32(0);
    for (int i = 0; i < N; ++i) any = vorrq_u32(any, vcgtq_f32(value.q[i], vld1q_f32(best + 4 * i)));
    if (vmaxvq_u32(any) == 0) return;  // almost always
    float x[4 * N];
    storef(x, value);
    for (int i = 0; i < 4 * N; ++i) {
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

  template <int Lane>
  PHL_INLINE static F fma_lane(F w, float32x4_t x, F sum) {
    return quarters<F>([&](int i) __attribute__((always_inline)) { return vfmaq_laneq_f32(sum.q[i], w.q[i], x, Lane); });
  }
  PHL_INLINE static F fma_by(F w, float32x4_t x, int lane, F sum) {
    switch (lane) {
      case 0: return fma_lane<0>(w, x, sum);
      case 1: return fma_lane<1>(w, x, sum);
      case 2: return fma_lane<2>(w, x, sum);
      default: return fma_lane<3>(w, x, sum);
    }
  }
  // sum + w times the u-th of four inputs.
  PHL_INLINE static F fma_input(F w, const float* x, int u, F sum) { return fma_by(w, vld1q_f32(x), u, sum); }

#if PHL_I8MM
  // Four pairs of bfloat16, and which is meant. A product of two pairs rounds otherwise than two fused ones, and takes
  // denormal numbers as zero; there is one form of it, so that a row's bits do not depend on the others.
  struct P {
    bfloat16x8_t q;
    int lane;
  };
  PHL_INLINE static bfloat16x8_t halves_of(const void* p) {
    return vreinterpretq_bf16_u16(vld1q_u16(static_cast<const uint16_t*>(p)));
  }
  PHL_INLINE static P pair(const uint16_t* a, int u) { return {halves_of(a), u}; }
  template <int Lane>
  PHL_INLINE static F dot_lane(F sum, const U& w, bfloat16x8_t a) {
    return quarters<F>([&](int i) __attribute__((always_inline)) {
      return vbfdotq_laneq_f32(sum.q[i], vreinterpretq_bf16_u8(w.q[i]), a, Lane);
    });
  }
  PHL_INLINE static F dot_pair(F sum, const U& w, const P& a) {
    switch (a.lane) {
      case 0: return dot_lane<0>(sum, w, a.q);
      case 1: return dot_lane<1>(sum, w, a.q);
      case 2: return dot_lane<2>(sum, w, a.q);
      default: return dot_lane<3>(sum, w, a.q);
    }
  }
  PHL_INLINE static void to_bf16(const float* x, uint16_t* out) {
    for (int i = 0; i < N; i += 2) {
      const bfloat16x8_t low = vcvtq_low_bf16_f32(vld1q_f32(x + 4 * i));
      vst1q_u16(out + 4 * i, vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(low, vld1q_f32(x + 4 * i + 4))));
    }
  }
#else
  // Four pairs of bfloat16, and which is meant.
  struct P {
    float32x4_t even, odd;
    int lane;
  };
  PHL_INLINE static float32x4_t evens(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
  PHL_INLINE static float32x4_t odds(uint32x4_t pairs) {
    return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
  }
  PHL_INLINE static P pair(const uint16_t* a, int u) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(a));
    return {evens(pairs), odds(pairs), u};
  }
  PHL_INLINE static F dot_pair(F sum, const U& w, const P& a) {
    F even, odd;
    for (int i = 0; i < N; ++i) {
      even.q[i] = evens(vreinterpretq_u32_u8(w.q[i]));
      odd.q[i] = odds(vreinterpretq_u32_u8(w.q[i]));
    }
    return fma_by(even, a.even, a.lane, fma_by(odd, a.odd, a.lane, sum));
  }
  PHL_INLINE static void to_bf16(const float* x, uint16_t* out) {
    for (int i = 0; i < 4 * N; ++i) out[i] = float_to_bf16(x[i]);
  }
#endif
};

using Vec = Neon<4>;

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
