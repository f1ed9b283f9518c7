// float16 and bfloat16 in integer arithmetic, for code that any machine runs.
#pragma once

#include <cstdint>

#include "../isa.h"
#include <cstring>

namespace phl {
namespace PHL_NS {
namespace {

[[maybe_unused]] static inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
[[maybe_unused]] static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

[[maybe_unused]] static inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return bits_to_float(sign | ((rest + 0x1c000u) << 13));
  const float tiny = static_cast<float>(rest) * 0x1p-24f;  // subnormal: exact
  return sign ? -tiny : tiny;
}

// Round to nearest, ties to even; overflow gives infinity.
[[maybe_unused]] static inline uint16_t float_to_half(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x38800000u) {  // below the smallest normal: let float addition round
    const float shifted = bits_to_float(a) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13));
}

[[maybe_unused]] static inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t{h} << 16); }
[[maybe_unused]] static inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
