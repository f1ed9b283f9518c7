// AVX-VNNI's dot products as plain loops, for machines without it: what the instructions do (Intel's manual, VPDPBUSD and
// VPDPWSSD). Sums wrap there; here the sanitizer stops where one does, as no kernel means to.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../isa.h"

namespace phl {
namespace PHL_NS {

template <class X, class Y>
inline __m256i emulated_dot(__m256i sum, __m256i x, __m256i y) {
  constexpr int kProducts = 4 / int(sizeof(X));
  int32_t sums[8];
  X left[8 * kProducts];
  Y right[8 * kProducts];
  static_assert(sizeof(left) == 32 && sizeof(right) == 32);
  std::memcpy(sums, &sum, 32);
  std::memcpy(left, &x, 32);
  std::memcpy(right, &y, 32);
  for (int i = 0; i < 8 * kProducts; ++i) sums[i / kProducts] += int32_t{left[i]} * int32_t{right[i]};
  std::memcpy(&sum, sums, 32);
  return sum;
}

inline __m256i dot_bytes(__m256i sum, __m256i bytes, __m256i signed_bytes) {
  return emulated_dot<uint8_t, int8_t>(sum, bytes, signed_bytes);
}
inline __m256i dot_words(__m256i sum, __m256i x, __m256i y) { return emulated_dot<int16_t, int16_t>(sum, x, y); }

}  // namespace PHL_NS
}  // namespace phl
