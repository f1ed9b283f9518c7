// Many rows on Arm processors with matrix products of bytes (i8mm): smmla multiplies two rows of eight activations by two
// features of eight weights, which is what two of sdot's instructions do.
//
// Sums of a group are integers, exact in any order, and scales are applied as in the tile kernel: results are its, bit for
// bit. An odd row stands twice in its pair.
#pragma once

#include "lanes.h"

namespace phl {
namespace PHL_NS {
namespace {

// What many rows read: of eight features, then of the other eight, all chunks, each with its operands two by two (for
// eight inputs features 0 and 1, then 2 and 3, ...), scales and minima.
template <class L>
constexpr int kPairsChunk = 2 * kLanesChunk<L>;

// Four sums of two rows each as a group begins with them.
template <class L>
PHL_INLINE int32x4_t pair_start(const Activation& a, const Activation& b, int g) {
  if constexpr (L::zero_log < 0 || L::wide) {
    return vdupq_n_s32(0);
  } else {
    constexpr bool halves = L::chunk_groups == 2;
    constexpr int factor = -(1 << (L::zero_log < 0 ? 0 : L::zero_log));
    return vcombine_s32(vdup_n_s32((halves ? a.half_sum[g] : a.sum) * factor),
                        vdup_n_s32((halves ? b.half_sum[g] : b.sum) * factor));
  }
}

// Eight features times R rows. out[r * out_step + lane]. Of 32 registers three pairs' sums and totals take 24.
template <class L, int R>
void pair_kernel(const uint8_t* tile, int64_t chunks, const Activation* act, int64_t act_step, float* out,
                 int64_t out_step) {
  constexpr int CG = L::chunk_groups, P = (R + 1) / 2;
  float32x4_t total[R][2];
  each_count<0, R>([&](auto row) __attribute__((always_inline)) {
    constexpr int r = decltype(row)::value;
    total[r][0] = total[r][1] = vdupq_n_f32(0.0f);
  });
  for (int64_t c = 0; c < chunks; ++c, tile += kPairsChunk<L>, ++act) {
    each_count<0, CG>([&](auto group) __attribute__((always_inline)) {
      constexpr int g = decltype(group)::value;
      int32x4_t sum[P][4];
      each_count<0, P>([&](auto pair) __attribute__((always_inline)) {
        constexpr int p = decltype(pair)::value, second = 2 * p + 1 < R ? 2 * p + 1 : 2 * p;
        const int32x4_t start = pair_start<L>(act[2 * p * act_step], act[second * act_step], g);
        sum[p][0] = sum[p][1] = sum[p][2] = sum[p][3] = start;
      });
      each_count<4 / CG * g, 4 / CG * (g + 1)>([&](auto eight) __attribute__((always_inline)) {
        constexpr int j = decltype(eight)::value;
        int8x16_t w[4];
        each_count<0, 4>([&](auto n) __attribute__((always_inline)) {
          constexpr int f = decltype(n)::value;
          w[f] = vreinterpretq_s8_u8(vld1q_u8(tile + 64 * j + 16 * f));
        });
        each_count<0, P>([&](auto pair) __attribute__((always_inline)) {
          constexpr int p = decltype(pair)::value, second = 2 * p + 1 < R ? 2 * p + 1 : 2 * p;
          const int8x16_t a =
              vcombine_s8(vld1_s8(act[2 * p * act_step].q + 8 * j), vld1_s8(act[second * act_step].q + 8 * j));
          each_count<0, 4>([&](auto n) __attribute__((always_inline)) {
            constexpr int f = decltype(n)::value;
            sum[p][f] = vmmlaq_s32(sum[p][f], a, w[f]);
          });
        });
      });
      const auto* scales = reinterpret_cast<const float*>(tile + 256) + 8 * g * (L::min ? 2 : 1);
      each_count<0, R>([&](auto row) __attribute__((always_inline)) {
        constexpr int r = decltype(row)::value;
        const Activation& a = act[r * act_step];
        each_count<0, 2>([&](auto quarter) __attribute__((always_inline)) {
          constexpr int i = decltype(quarter)::value;
          const int64x2_t low = vreinterpretq_s64_s32(sum[r / 2][2 * i]);
          const int64x2_t high = vreinterpretq_s64_s32(sum[r / 2][2 * i + 1]);
          const int32x4_t all = vreinterpretq_s32_s64(r % 2 == 0 ? vzip1q_s64(low, high) : vzip2q_s64(low, high));
          const float32x4_t d = vld1q_f32(scales + 4 * i);
          total[r][i] = vfmaq_f32(total[r][i], vcvtq_f32_s32(all), vmulq_n_f32(d, a.scale));
          if constexpr (L::min) {
            const float factor = CG == 2 ? a.half_scaled_sum[g] : a.scaled_sum;
            total[r][i] = vfmaq_n_f32(total[r][i], vld1q_f32(scales + 8 + 4 * i), factor);
          }
        });
      });
    });
  }
  each_count<0, R>([&](auto row) __attribute__((always_inline)) {
    constexpr int r = decltype(row)::value;
    vst1q_f32(out + r * out_step, total[r][0]);
    vst1q_f32(out + r * out_step + 4, total[r][1]);
  });
}

// As AsPacked.
template <class L>
struct AsPairs {
  static constexpr int64_t fetches = 0;
  static constexpr int64_t tile_bytes(int64_t chunks) { return 2 * chunks * kPairsChunk<L>; }
  static_assert(2 * kPairsChunk<L> == kTileChunk<L>);

  static void unpack(const uint8_t* w, const uint8_t* lower, int64_t units, uint8_t* tile) {
    constexpr int CG = L::chunk_groups;
    const int64_t half_bytes = units * L::chunks * kPairsChunk<L>;
    for (int64_t u = 0; u < units; ++u, w += L::unit_bytes) {
      for (int c = 0; c < L::chunks; ++c, tile += kPairsChunk<L>) {
        const uint8_t* p = w + L::header + c * L::chunk_bytes;
        each_count<0, 4>([&](auto quarter) __attribute__((always_inline)) {
          constexpr int i = decltype(quarter)::value;
          uint8_t* to = tile + i / 2 * half_bytes;
          uint32x4_t op[8];
          each_count<0, 8>([&](auto nth) __attribute__((always_inline)) {
            constexpr int n = decltype(nth)::value, j = n / 2 + n % 2 * 4;
            op[j] = vreinterpretq_u32_s8(lanes_of<L, j, false>(p + 16 * i, lower + 16 * i));
          });
          each_count<0, 4>([&](auto nth) __attribute__((always_inline)) {
            constexpr int j = decltype(nth)::value;
            uint8_t* at = to + 64 * j + 32 * (i % 2);
            vst1q_u8(at, vreinterpretq_u8_u32(vzip1q_u32(op[2 * j], op[2 * j + 1])));
            vst1q_u8(at + 16, vreinterpretq_u8_u32(vzip2q_u32(op[2 * j], op[2 * j + 1])));
          });
          auto* scales = reinterpret_cast<float*>(to + 256) + 4 * (i % 2);
          each_count<0, CG>([&](auto group) __attribute__((always_inline)) {
            constexpr int g = decltype(group)::value;
            vst1q_f32(scales + 8 * g * (L::min ? 2 : 1), scale_lanes<L>(w, c * CG + g, i));
            if constexpr (L::min) vst1q_f32(scales + 16 * g + 8, minimum_lanes<L>(w, c * CG + g, i));
          });
        });
        lower += L::split ? L::chunk_bytes : 0;
      }
    }
  }

  template <int R, int B>
  static void multiply(const uint8_t* tile, int64_t tile_step, int64_t chunks, const Activation* act, int64_t act_step,
                       float* out, int64_t out_step, Lines) {
    for (int b = 0; b < B; ++b) {
      for (int h = 0; h < 2; ++h) {
        const uint8_t* half = tile + b * tile_step + h * chunks * kPairsChunk<L>;
        pair_kernel<L, R>(half, chunks, act, act_step, out + 16 * b + 8 * h, out_step);
      }
    }
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
