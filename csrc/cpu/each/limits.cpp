// What the machine gives, for `phloem bench kernels`: reading memory, and multiply-adds from registers.
#include "../op.h"
#include "../simd.h"
#if PHL_VNNI
#include "../vnni.h"
#endif

namespace phl {
namespace PHL_NS {
namespace {

#if defined(__x86_64__)
#define PHL_VECTOR_REGISTER(v) "+v"(v)
#else
#define PHL_VECTOR_REGISTER(v) "+w"(v)
#endif

constexpr int kChains = 12;  // independent sums: covers the latency of any multiply-add

struct ReadArgs {
  const float* data;
  int64_t count;  // floats
  float* out;     // [threads]
};

void limit_read(const ReadArgs& a, Team& team) {
  team.split(a.count / (8 * W), 1, [&](int64_t begin, int64_t end) {
    vf sums[8] = {};
    for (int64_t i = begin; i < end; ++i) {
      const float* p = a.data + i * 8 * W;
      for (int j = 0; j < 8; ++j) sums[j] += load(p + j * W);
    }
    for (int j = 1; j < 8; ++j) sums[0] += sums[j];
    a.out[team.thread] = sum(sums[0]);
  });
}
PHL_FIELDS(ReadArgs, data, count, out);
PHL_OP(limit_read, ReadArgs);

struct PeakArgs {
  int64_t rounds;
  float* out;  // [threads]
};

// Each thread does rounds * kChains vector operations; `step` is one of them.
template <class V, class F>
PHL_INLINE void chains(const PeakArgs& a, Team& team, V one, F&& step) {
  V sums[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sums[i] = one;
  V x = one;
  asm volatile("" : PHL_VECTOR_REGISTER(x));
  for (int64_t round = 0; round < a.rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = step(sums[i], x);
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) asm volatile("" : PHL_VECTOR_REGISTER(sums[i]));  // keeps every operation
  }
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) sums[0] = step(sums[0], sums[i]);
  __builtin_memcpy(a.out + team.thread, &sums[0], 4);
}

void limit_float(const PeakArgs& a, Team& team) {
  chains(a, team, splat(1.0f), [](vf sum, vf x) { return sum + x * x; });
}
PHL_FIELDS(PeakArgs, rounds, out);
PHL_OP(limit_float, PeakArgs);

#if PHL_LEVEL == 2
void limit_bf16(const PeakArgs& a, Team& team) {
  chains(a, team, _mm512_set1_ps(1.0f),
         [](__m512 sum, __m512 x) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x); });
}
PHL_OP(limit_bf16, PeakArgs);

void limit_int8(const PeakArgs& a, Team& team) {
  chains(a, team, _mm512_set1_epi32(1), [](__m512i sum, __m512i x) { return _mm512_dpbusd_epi32(sum, x, x); });
}
PHL_OP(limit_int8, PeakArgs);
#elif PHL_VNNI
void limit_int8(const PeakArgs& a, Team& team) {
  chains(a, team, _mm256_set1_epi32(1), [](__m256i sum, __m256i x) { return dot_bytes(sum, x, x); });
}
PHL_OP(limit_int8, PeakArgs);
#elif PHL_LEVEL == 1
// Pairs of products of bytes. Of equal operands: as an intrinsic it would be taken out of the loop.
PHL_INLINE __m256i pairs_of(__m256i x) {
  __m256i pairs;
  asm volatile("vpmaddubsw %1, %1, %0" : "=x"(pairs) : "x"(x));
  return pairs;
}

void limit_int8(const PeakArgs& a, Team& team) {
  const __m256i one = _mm256_set1_epi16(1);
  chains(a, team, _mm256_set1_epi32(1), [one](__m256i sum, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs_of(x), one));
  });
}
PHL_OP(limit_int8, PeakArgs);

// Where one operand has so few bits that several products are added as words.
void limit_int4(const PeakArgs& a, Team& team) {
  chains(a, team, _mm256_set1_epi32(1), [](__m256i sum, __m256i x) { return _mm256_add_epi16(sum, pairs_of(x)); });
}
PHL_OP(limit_int4, PeakArgs);
#elif PHL_NEON
void limit_int8(const PeakArgs& a, Team& team) {
  chains(a, team, vdupq_n_s32(1), [](int32x4_t sum, int32x4_t x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(x));
  });
}
PHL_OP(limit_int8, PeakArgs);
#endif

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
