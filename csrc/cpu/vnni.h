// The two instructions that AVX-VNNI adds to AVX2. Tests on processors without them put plain loops in their place.
#pragma once
#ifdef PHL_VNNI_EMULATED
#include "tests/vnni_emulation.h"
#else
#include <immintrin.h>

#include "isa.h"

namespace phl {
namespace PHL_NS {

// sum += four products of unsigned and signed bytes, in every lane (vpdpbusd).
PHL_INLINE __m256i dot_bytes(__m256i sum, __m256i bytes, __m256i signed_bytes) {
  return _mm256_dpbusd_avx_epi32(sum, bytes, signed_bytes);
}
// sum += two products of words (vpdpwssd).
PHL_INLINE __m256i dot_words(__m256i sum, __m256i x, __m256i y) { return _mm256_dpwssd_avx_epi32(sum, x, y); }

}  // namespace PHL_NS
}  // namespace phl
#endif
