// Many rows on Arm processors with matrix products of bytes (i8mm): usmmla multiplies two features of eight weights by two
// rows of eight activations, which is what two of sdot's instructions do.
//
// What it gives stands by two features and two rows, and stays so until a kernel is done: scales are applied there, in the
// order of the tile kernel and to the same numbers, so that results are its, bit for bit. An odd row stands twice in its
// pair.
#pragma once

#include "kernels.h"

namespace phl {
namespace PHL_NS {
namespace {

// A tile as AsPacked's, its operands two by two: of every quarter features 0 and 1, then 2 and 3, eight inputs each.
template <class L>
PHL_APART void unpack_pairs(const uint8_t* w, const uint8_t* lower, int64_t units, uint8_t* tile) {
  constexpr int CG = L::chunk_groups;
  for (int64_t u = 0; u < units; ++u, w += L::unit_bytes) {
    for (int c = 0; c < L::chunks; ++c, tile += kTileChunk<L>) {
      U op[8];
      unpack<L>(w + L::header + c * L::chunk_bytes, lower, op);
      lower += L::split ? L::chunk_bytes : 0;
      for (int j = 0; j < 8; j += 2) {
        for (int i = 0; i < 4; ++i) {
          const uint32x4_t x = vreinterpretq_u32_u8(op[j].q[i]), y = vreinterpretq_u32_u8(op[j + 1].q[i]);
          vst1q_u8(tile + 64 * j + 32 * i, vreinterpretq_u8_u32(vzip1q_u32(x, y)));
          vst1q_u8(tile + 64 * j + 32 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(x, y)));
        }
      }
      for (int g = 0; g < CG; ++g) {
        auto* scales = reinterpret_cast<float*>(tile + 512) + 16 * g * (L::min ? 2 : 1);
        Vec::storef(scales, scale_of<L>(w, c * CG + g));
        if constexpr (L::min) Vec::storef(scales + 16, minimum_of<L>(w, c * CG + g));
      }
    }
  }
}

// One number of each of two rows, as they stand beside two features.
PHL_INLINE float32x4_t beside(const float& first, const float& second) {
  return vreinterpretq_f32_u64(vdupq_lane_u64(vreinterpret_u64_f32(vset_lane_f32(second, vdup_n_f32(first), 1)), 0));
}
PHL_INLINE int32x4_t beside(int32_t first, int32_t second) {
  return vreinterpretq_s32_u64(vdupq_lane_u64(vreinterpret_u64_s32(vset_lane_s32(second, vdup_n_s32(first), 1)), 0));
}

// Of four features' numbers the first two or the last two, each beside two rows.
PHL_INLINE float32x4_t twice(const float* four, int half) {
  const float32x4_t x = vld1q_f32(four);
  return half == 0 ? vzip1q_f32(x, x) : vzip2q_f32(x, x);
}

// R rows times one block. out[r * out_step + lane].
template <class L, int R>
PHL_APART void pair_kernel(const uint8_t* tile, int64_t chunks, const Activation* act, int64_t act_step, float* out,
                           int64_t out_step) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG, P = (R + 1) / 2;
  const auto second = [](int p) { return 2 * p + 1 < R ? 2 * p + 1 : 2 * p; };
  alignas(16) float total[P][32] = {};  // [pair of rows][feature][row]
  for (int64_t c = 0; c < chunks; ++c, tile += kTileChunk<L>, ++act) {
    each_count<0, CG>([&](auto nth) __attribute__((always_inline)) {
      constexpr int g = decltype(nth)::value;
      int32x4_t sum[P][8];
      for (int p = 0; p < P; ++p) {
        int32x4_t start = vdupq_n_s32(0);
        if constexpr (L::zero_log >= 0) {
          const Activation &a = act[2 * p * act_step], &b = act[second(p) * act_step];
          start = vshlq_n_s32(CG == 2 ? beside(-a.half_sum[g], -b.half_sum[g]) : beside(-a.sum, -b.sum),
                              L::zero_log < 0 ? 0 : L::zero_log);
        }
        for (int i = 0; i < 8; ++i) sum[p][i] = start;
      }
      each_count<0, per_group / 2>([&](auto nth_pair) __attribute__((always_inline)) {
        constexpr int j = g * per_group + 2 * decltype(nth_pair)::value;
        int8x16_t a[P];
        for (int p = 0; p < P; ++p) {
          a[p] = vcombine_s8(vld1_s8(act[2 * p * act_step].q + 4 * j), vld1_s8(act[second(p) * act_step].q + 4 * j));
        }
        each_count<0, 8>([&](auto nth_two) __attribute__((always_inline)) {
          constexpr int i = decltype(nth_two)::value;
          const uint8x16_t w = vld1q_u8(tile + 64 * j + 16 * i);
          for (int p = 0; p < P; ++p) sum[p][i] = vusmmlaq_s32(sum[p][i], w, a[p]);
        });
      });
      const auto* scales = reinterpret_cast<const float*>(tile + 512) + 16 * g * (L::min ? 2 : 1);
      float32x4_t scale[P], scaled_sum[P];
      for (int p = 0; p < P; ++p) {
        const Activation &a = act[2 * p * act_step], &b = act[second(p) * act_step];
        scale[p] = beside(a.scale, b.scale);
        if constexpr (L::min) {
          scaled_sum[p] = CG == 2 ? beside(a.half_scaled_sum[g], b.half_scaled_sum[g]) : beside(a.scaled_sum, b.scaled_sum);
        }
      }
      each_count<0, 8>([&](auto nth_two) __attribute__((always_inline)) {
        constexpr int i = decltype(nth_two)::value;
        const float32x4_t d = twice(scales + i / 2 * 4, i % 2);
        float32x4_t m = d;
        if constexpr (L::min) m = twice(scales + 16 + i / 2 * 4, i % 2);
        for (int p = 0; p < P; ++p) {
          float32x4_t x = vld1q_f32(total[p] + 4 * i);
          x = vfmaq_f32(x, vcvtq_f32_s32(sum[p][i]), vmulq_f32(d, scale[p]));
          if constexpr (L::min) x = vfmaq_f32(x, m, scaled_sum[p]);
          vst1q_f32(total[p] + 4 * i, x);
        }
      });
    });
  }
  for (int p = 0; p < P; ++p) {
    for (int i = 0; i < 4; ++i) {
      const float32x4_t low = vld1q_f32(total[p] + 8 * i), high = vld1q_f32(total[p] + 8 * i + 4);
      vst1q_f32(out + 2 * p * out_step + 4 * i, vuzp1q_f32(low, high));
      if (2 * p + 1 < R) vst1q_f32(out + (2 * p + 1) * out_step + 4 * i, vuzp2q_f32(low, high));
    }
  }
}

// As AsPacked.
template <class L>
struct AsPairs {
  static constexpr int64_t fetches = 0;
  static constexpr int64_t tile_bytes(int64_t chunks) { return chunks * kTileChunk<L>; }
  static void unpack(const uint8_t* w, const uint8_t* lower, int64_t units, uint8_t* tile) {
    unpack_pairs<L>(w, lower, units, tile);
  }
  template <int R, int B>
  static void multiply(const uint8_t* tile, int64_t tile_step, int64_t chunks, const Activation* act, int64_t act_step,
                       float* out, int64_t out_step, Lines) {
    for (int b = 0; b < B; ++b) pair_kernel<L, R>(tile + b * tile_step, chunks, act, act_step, out + 16 * b, out_step);
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
