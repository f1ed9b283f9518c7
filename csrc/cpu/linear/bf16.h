// bfloat16 weights on Arm processors with products of them (those of level i8mm): bfdot for one or two rows, and for more
// bfmmla, which does of two rows and two features what two of bfdot's instructions do, in their order: the same bits.
//
// Both add two products at a time and round once, where the level below rounds twice.
#pragma once

#include "kernels.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kBF16Rows = 8;  // at a time: four pairs times eight features are 16 registers

PHL_INLINE bfloat16x8_t load_bf16(const void* p) { return vld1q_bf16(static_cast<const bfloat16_t*>(p)); }
PHL_INLINE bfloat16x8_t joined(uint64x2_t x) { return vreinterpretq_bf16_u64(x); }

// 16 features times R rows, a lane of eight activations times a register of weights.
template <int R>
void bf16_dots(const uint8_t* w, int64_t steps, const uint16_t* x, int64_t x_step, float* out, int64_t out_step) {
  float32x4_t total[4][R];
  each_count<0, 4 * R>([&](auto n) __attribute__((always_inline)) {
    total[decltype(n)::value / R][decltype(n)::value % R] = vdupq_n_f32(0.0f);
  });
  for (int64_t k = 0; k < steps; k += 4, w += 4 * 64, x += 8) {
    for (int s = 0; s < 4; ++s) prefetch(w + 64 * s + kPrefetch);
    each_count<0, 16>([&](auto n) __attribute__((always_inline)) {
      constexpr int s = decltype(n)::value / 4, i = decltype(n)::value % 4;
      const bfloat16x8_t weights = load_bf16(w + 64 * s + 16 * i);
      each_count<0, R>([&](auto row) __attribute__((always_inline)) {
        constexpr int r = decltype(row)::value;
        total[i][r] = vbfdotq_laneq_f32(total[i][r], weights, load_bf16(x + r * x_step), s);
      });
    });
  }
  each_count<0, 4 * R>([&](auto n) __attribute__((always_inline)) {
    constexpr int i = decltype(n)::value / R, r = decltype(n)::value % R;
    vst1q_f32(out + r * out_step + 4 * i, total[i][r]);
  });
}

// Eight features from `w` on times R rows, two by two; an odd row stands twice in its pair.
template <int R>
void bf16_pairs(const uint8_t* w, int64_t steps, const uint16_t* x, int64_t x_step, float* out, int64_t out_step) {
  constexpr int P = (R + 1) / 2;
  float32x4_t total[P][4];
  each_count<0, 4 * P>([&](auto n) __attribute__((always_inline)) {
    total[decltype(n)::value / 4][decltype(n)::value % 4] = vdupq_n_f32(0.0f);
  });
  for (int64_t k = 0; k < steps; k += 4, w += 4 * 64, x += 8) {
    each_count<0, 2>([&](auto half) __attribute__((always_inline)) {  // four inputs of these eight
      constexpr int h = decltype(half)::value;
      bfloat16x8_t b[4];
      each_count<0, 2>([&](auto quarter) __attribute__((always_inline)) {
        constexpr int i = decltype(quarter)::value;
        const auto* first = reinterpret_cast<const uint32_t*>(w + 128 * h + 16 * i);
        const uint32x4_t two = vld1q_u32(first), next = vld1q_u32(first + 16);
        b[2 * i] = vreinterpretq_bf16_u32(vzip1q_u32(two, next));
        b[2 * i + 1] = vreinterpretq_bf16_u32(vzip2q_u32(two, next));
      });
      each_count<0, P>([&](auto pair) __attribute__((always_inline)) {
        constexpr int p = decltype(pair)::value, second = 2 * p + 1 < R ? 2 * p + 1 : 2 * p;
        const uint64x2_t one = vreinterpretq_u64_bf16(load_bf16(x + 2 * p * x_step));
        const uint64x2_t other = vreinterpretq_u64_bf16(load_bf16(x + second * x_step));
        const bfloat16x8_t a = joined(h == 0 ? vzip1q_u64(one, other) : vzip2q_u64(one, other));
        each_count<0, 4>([&](auto n) __attribute__((always_inline)) {
          constexpr int f = decltype(n)::value;
          total[p][f] = vbfmmlaq_f32(total[p][f], a, b[f]);
        });
      });
    });
  }
  each_count<0, R>([&](auto row) __attribute__((always_inline)) {
    constexpr int r = decltype(row)::value;
    each_count<0, 2>([&](auto quarter) __attribute__((always_inline)) {
      constexpr int i = decltype(quarter)::value;
      const uint64x2_t x = vreinterpretq_u64_f32(total[r / 2][2 * i]), y = vreinterpretq_u64_f32(total[r / 2][2 * i + 1]);
      vst1q_f32(out + r * out_step + 4 * i, vreinterpretq_f32_u64(r % 2 == 0 ? vzip1q_u64(x, y) : vzip2q_u64(x, y)));
    });
  });
}

// As dense_kernel, of one block. `steps` (of two inputs) are a multiple of four.
template <int R>
void bf16_kernel(const uint8_t* w, int64_t steps, const uint16_t* x, int64_t x_step, float* out, int64_t out_step) {
  if constexpr (R <= 2) {
    bf16_dots<R>(w, steps, x, x_step, out, out_step);
  } else {
    for (int h = 0; h < 2; ++h) bf16_pairs<R>(w + 32 * h, steps, x, x_step, out + 8 * h, out_step);
  }
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
