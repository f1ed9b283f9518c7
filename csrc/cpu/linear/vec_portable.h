// The vocabulary of vec_avx512.h in plain loops, for any machine. The compiler vectorises what it can.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace phl {
namespace PHL_NS {
namespace {

struct Vec {
  struct U {
    uint8_t x[64];
  };
  struct I {
    int32_t x[16];
  };
  struct F {
    float x[16];
  };
  using Part = Vec;
  static constexpr int parts = 1;
  static constexpr int tile_rows = 2, wide_rows = 2, tile_blocks = 1;
  static constexpr int dense_rows = 2, dense_blocks = 1;
  static constexpr int small_rows = 1, held_rows = 1;
  static constexpr int dense_steps = 1;  // that a dense kernel takes at a time
  static constexpr bool signed_wide = false;
  static constexpr bool holds_chunk = true;

  static U load(const void* p) {
    U r;
    std::memcpy(r.x, p, 64);
    return r;
  }
  static void store(void* p, U x) { std::memcpy(p, x.x, 64); }
  template <int From, int To>
  static U pick(U x, int mask) {
    for (auto& b : x.x) b = static_cast<uint8_t>(From > To ? b >> (From > To ? From - To : 0) : b << (To > From ? To - From : 0)) & mask;
    return x;
  }
  static U either(U x, U y) {
    for (int i = 0; i < 64; ++i) x.x[i] |= y.x[i];
    return x;
  }
  template <int From, int To>
  static U insert(U w, U x, int mask) {  // what `pick` gives of x, in bits that w has not
    return either(w, pick<From, To>(x, mask));
  }
  static U lookup(U x, const uint8_t* table) {
    for (auto& b : x.x) b = table[b & 15];
    return x;
  }

  static I all(int32_t v) {
    I r;
    for (auto& e : r.x) e = v;
    return r;
  }
  static I zero_i() { return all(0); }
  template <int Log>
  static I minus_shifted(int32_t x) {
    return all(-x * (1 << Log));
  }
  using A = const int8_t*;
  static A spread4(const int8_t* a, int j) { return a + 4 * j; }
  template <bool Wide>
  static I dot(I sum, const U& w, A a) {
    for (int i = 0; i < 16; ++i) {
      const uint8_t* p = w.x + i * 4;
      sum.x[i] += p[0] * a[0] + p[1] * a[1] + p[2] * a[2] + p[3] * a[3];
    }
    return sum;
  }
  static void dot_input(I& sum, const U& w, const int8_t* a, int j) { sum = dot<false>(sum, w, a + 4 * j); }
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

  template <class G>
  static F each(G&& g) {
    F r;
    for (int i = 0; i < 16; ++i) r.x[i] = g(i);
    return r;
  }
  static F set(float v) {
    return each([&](int) { return v; });
  }
  static F zero() { return set(0.0f); }
  static F loadf(const float* p) {
    F r;
    std::memcpy(r.x, p, 64);
    return r;
  }
  static void storef(float* p, F x) { std::memcpy(p, x.x, 64); }
  static F half(const void* p) {
    uint16_t h[16];
    std::memcpy(h, p, 32);
    return each([&](int i) { return half_to_float(h[i]); });
  }
  static F bytes(const void* p) {
    const auto* b = static_cast<const int8_t*>(p);
    return each([&](int i) { return static_cast<float>(b[i]); });
  }
  static F tofloat(I x) {
    return each([&](int i) { return static_cast<float>(x.x[i]); });
  }
  static F add(F x, F y) {
    return each([&](int i) { return x.x[i] + y.x[i]; });
  }
  static F sub(F x, F y) {
    return each([&](int i) { return x.x[i] - y.x[i]; });
  }
  static F mul(F x, F y) {
    return each([&](int i) { return x.x[i] * y.x[i]; });
  }
  static F reciprocal(F x) {
    return each([&](int i) { return 1.0f / x.x[i]; });
  }
  static F fma(F x, F y, F z) {
    return each([&](int i) { return x.x[i] * y.x[i] + z.x[i]; });
  }
  static F fma_input(F w, const float* x, int u, F sum) { return fma(w, set(x[u]), sum); }
  static F max(F x, F y) {
    return each([&](int i) { return x.x[i] > y.x[i] ? x.x[i] : y.x[i]; });
  }
  static F min(F x, F y) {
    return each([&](int i) { return x.x[i] < y.x[i] ? x.x[i] : y.x[i]; });
  }
  static F sqrt(F x) {
    return each([&](int i) { return std::sqrt(x.x[i]); });
  }
  static float top(F x) {  // the largest
    float m = x.x[0];
    for (float v : x.x) m = v > m ? v : m;
    return m;
  }
  static F abs(F x) {
    return each([&](int i) { return std::fabs(x.x[i]); });
  }
  static F round(F x) {
    return each([&](int i) { return std::nearbyintf(x.x[i]); });
  }
  static F scale2(F x, F n) {
    return each([&](int i) { return std::ldexp(x.x[i], static_cast<int>(n.x[i])); });
  }
  static float sum(F x) {
    float s[8];
    for (int i = 0; i < 8; ++i) s[i] = x.x[i] + x.x[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  }
  static F larger(F x, F y) {  // in magnitude, as integers: a NaN is larger than anything and is not lost
    return each([&](int i) {
      const uint32_t a = float_to_bits(x.x[i]) & 0x7fffffffu, b = float_to_bits(y.x[i]) & 0x7fffffffu;
      return bits_to_float(a > b ? a : b);
    });
  }
  static float largest(F x) {
    uint32_t m = 0;
    for (float v : x.x) m = float_to_bits(v) > m ? float_to_bits(v) : m;
    return bits_to_float(m);
  }

  static void keep_best(float* best, int32_t* index, F value, int32_t first) {
    for (int i = 0; i < 16; ++i) {
      if (value.x[i] > best[i]) best[i] = value.x[i], index[i] = first + i;
    }
  }

  static void quantise32(const float* x, float inverse, int8_t* q, int32_t* half_sum) {
    half_sum[0] = half_sum[1] = 0;
    for (int i = 0; i < 32; ++i) {
      const float y = std::nearbyintf(x[i] * inverse);
      const int v = y >= 127.0f ? 127 : (y <= -128.0f ? -128 : (y == y ? static_cast<int>(y) : 0));
      q[i] = static_cast<int8_t>(v);
      half_sum[i / 16] += v;
    }
  }

  using P = const uint16_t*;
  static P pair(const uint16_t* a, int u) { return a + 2 * u; }
  static F dot_pair(F sum, const U& w, P a) {
    const float even = bf16_to_float(a[0]), odd = bf16_to_float(a[1]);
    for (int i = 0; i < 16; ++i) {
      uint16_t pair[2];
      std::memcpy(pair, w.x + i * 4, 4);
      sum.x[i] += bf16_to_float(pair[1]) * odd;
      sum.x[i] += bf16_to_float(pair[0]) * even;
    }
    return sum;
  }
  static void to_bf16(const float* x, uint16_t* out) {
    for (int i = 0; i < 16; ++i) out[i] = float_to_bf16(x[i]);
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
