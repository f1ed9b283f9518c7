// Many rows on Arm processors with matrix products of bytes (i8mm): smmla multiplies two rows of eight activations by two
// features of eight weights, which is what two of sdot's instructions do.
//
// Sums of a group are integers, exact in any order, and scales are applied as in the tile kernel: results are its, bit for
// bit. An odd row stands twice in its pair.
#pragma once

#include "kernels.h"

namespace phl {
namespace PHL_NS {
namespace {

// A tile as AsPacked's, its operands two by two: of every quarter features 0 and 1, then 2 and 3, eight inputs each.
template <class L>
void pair_up(uint8_t* tile, int64_t chunks) {
  for (int64_t c = 0; c < chunks; ++c, tile += kTileChunk<L>) {
    for (int j = 0; j < 8; j += 2) {
      const U first = Vec::ready<L::wide>(Vec::load(tile + 64 * j));
      const U second = Vec::ready<L::wide>(Vec::load(tile + 64 * j + 64));
      for (int i = 0; i < 4; ++i) {
        const uint32x4_t x = vreinterpretq_u32_u8(first.q[i]), y = vreinterpretq_u32_u8(second.q[i]);
        vst1q_u8(tile + 64 * j + 32 * i, vreinterpretq_u8_u32(vzip1q_u32(x, y)));
        vst1q_u8(tile + 64 * j + 32 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(x, y)));
      }
    }
  }
}

// As tile_kernel, of one block.
template <class L, int R>
void pair_kernel(const uint8_t* tile, int64_t chunks, const Activation* act, int64_t act_step, float* out,
                 int64_t out_step) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG, P = (R + 1) / 2;
  Totals<R, 1, true> total(out, out_step);
  for (int64_t c = 0; c < chunks; ++c, tile += kTileChunk<L>, ++act) {
    for (int g = 0; g < CG; ++g) {
      int32x4_t sum[P][8];
      for (int p = 0; p < P; ++p) {
        for (int i = 0; i < 8; ++i) sum[p][i] = vdupq_n_s32(0);
      }
#pragma GCC unroll 4
      for (int j = g * per_group; j < (g + 1) * per_group; j += 2) {
        int8x16_t a[P];
        for (int p = 0; p < P; ++p) {
          const int second = 2 * p + 1 < R ? 2 * p + 1 : 2 * p;
          a[p] = vcombine_s8(vld1_s8(act[2 * p * act_step].q + 4 * j), vld1_s8(act[second * act_step].q + 4 * j));
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(tile + 64 * j + 16 * i));
          for (int p = 0; p < P; ++p) sum[p][i] = vmmlaq_s32(sum[p][i], a[p], w);
        }
      }
      const auto* scales = reinterpret_cast<const float*>(tile + 512) + 16 * g * (L::min ? 2 : 1);
      const F d = Vec::loadf(scales);
      F m = d;
      if constexpr (L::min) m = Vec::loadf(scales + 16);
      for (int r = 0; r < R; ++r) {
        const Activation& a = act[r * act_step];
        I all = start_sum<L::zero_log, L::wide, CG == 2>(a, g);
        for (int i = 0; i < 4; ++i) {
          const int64x2_t low = vreinterpretq_s64_s32(sum[r / 2][2 * i]);
          const int64x2_t high = vreinterpretq_s64_s32(sum[r / 2][2 * i + 1]);
          const int64x2_t mine = r % 2 == 0 ? vzip1q_s64(low, high) : vzip2q_s64(low, high);
          all.q[i] = vaddq_s32(all.q[i], vreinterpretq_s32_s64(mine));
        }
        total.set(r, 0, accumulate<L::min, CG == 2>(total.get(r, 0), all, d, m, a, g));
      }
    }
  }
}

// As AsPacked.
template <class L>
struct AsPairs {
  static constexpr int64_t fetches = 0;
  static constexpr int64_t tile_bytes(int64_t chunks) { return chunks * kTileChunk<L>; }
  static void unpack(const uint8_t* w, const uint8_t* lower, int64_t units, uint8_t* tile) {
    unpack_block<L>(w, lower, units, tile);
    pair_up<L>(tile, units * L::chunks);
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
