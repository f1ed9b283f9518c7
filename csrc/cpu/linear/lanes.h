// Few and many rows on Arm processors with dot products of bytes: four features at a time, one register of each of a
// chunk's eight operands, whose products with a lane of the activations need no register in which those are spread.
//
// Integer sums are exact in any order, and scales are applied as in kernels.h: results are those of small_block and
// tile_kernel, bit for bit.
#pragma once

#include "kernels.h"

namespace phl {
namespace PHL_NS {
namespace {

// Eight-bit operands are multiplied as unsigned where the processor can, and their zero taken off the sum.
template <class L>
constexpr bool kUnsigned = PHL_I8MM && L::bits == 8;

template <int From, int To>
PHL_INLINE uint8x16_t moved(uint8x16_t x) {
  if constexpr (From > To) x = vshrq_n_u8(x, From - To);
  if constexpr (From < To) x = vshlq_n_u8(x, To - From);
  return x;
}
// `x`, its bits of `Mask` taken from `y`.
template <int Mask>
PHL_INLINE uint8x16_t inserted(uint8x16_t x, uint8x16_t y) {
  return vbslq_u8(vdupq_n_u8(Mask), y, x);
}

// Operand J of four features: `p` and `lower` point to their bytes in the first plane of either part of a chunk.
template <class L, int J>
PHL_INLINE uint8x16_t raw_lanes(const uint8_t* p, [[maybe_unused]] const uint8_t* lower) {
  const auto plane = [&](int t) __attribute__((always_inline)) { return vld1q_u8(p + 64 * t); };
  if constexpr (L::split) {
    const uint8x16_t x = plane(J % 4), y = vld1q_u8(lower + 64 * (J % 4));
    return J < 4 ? vsliq_n_u8(y, x, 4) : vsriq_n_u8(x, y, 4);
  } else if constexpr (L::bits == 8) {
    return plane(J);
  } else {
    uint8x16_t w;
    if constexpr (L::bits >= 4) {
      w = J < 4 ? vandq_u8(plane(J % 4), vdupq_n_u8(15)) : vshrq_n_u8(plane(J % 4), 4);
    } else {
      w = moved<J % 4 * 2, 0>(plane(J / 4));
      if constexpr (J % 4 != 3) w = vandq_u8(w, vdupq_n_u8(3));
    }
    if constexpr (L::bits == 5 || L::bits == 3) {
      constexpr int to = L::bits - 1;
      w = inserted<1 << to>(w, moved<J, to>(plane(to)));
    }
    if constexpr (L::bits == 6) w = inserted<48>(w, moved<J % 4 * 2, 4>(plane(4 + J / 4)));
    return w;
  }
}

template <class L, int J, bool Unsigned = kUnsigned<L>>
PHL_INLINE int8x16_t lanes_of(const uint8_t* p, const uint8_t* lower) {
  const uint8x16_t w = raw_lanes<L, J>(p, lower);
  if constexpr (L::table) {
    return vreinterpretq_s8_u8(vqtbl1q_u8(veorq_u8(vld1q_u8(kTable4), vdupq_n_u8(0x80)), w));
  } else if constexpr (L::wide && !Unsigned) {
    return vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(0x80)));
  } else {
    return vreinterpretq_s8_u8(w);
  }
}

// Scales (or minima) of group g of a unit, of the features from 4 * i on.
template <class L>
PHL_INLINE float32x4_t half_lanes(const uint8_t* p, int i) {
  return vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(p) + 4 * i));
}
PHL_INLINE float32x4_t byte_lanes(const uint8_t* p, int i) {
  const int8x8_t x = vreinterpret_s8_u32(vld1_lane_u32(reinterpret_cast<const uint32_t*>(p + 4 * i), vdup_n_u32(0), 0));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(x))));
}
template <class L>
PHL_INLINE float32x4_t scale_lanes(const uint8_t* unit, int g, int i) {
  if constexpr (L::super) {
    return vmulq_f32(half_lanes<L>(unit, i), byte_lanes(unit + L::factor_bytes + g * L::scale_step, i));
  } else {
    return half_lanes<L>(unit + g * L::scale_step, i);
  }
}
template <class L>
PHL_INLINE float32x4_t minimum_lanes(const uint8_t* unit, int g, int i) {
  if constexpr (L::super) {
    return vmulq_f32(half_lanes<L>(unit + 32, i), byte_lanes(unit + L::minimum_offset + g * L::scale_step, i));
  } else {
    return half_lanes<L>(unit + g * L::scale_step + L::minimum_offset, i);
  }
}

// `total` and what one chunk of a row adds to it: eight operands, and a scale (and a minimum) for each of its groups.
template <class L>
PHL_INLINE float32x4_t chunk_of_row(float32x4_t total, const int8x16_t (&op)[8], const float32x4_t (&d)[2],
                                    const float32x4_t (&m)[2], const Activation& a) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG;
  const int8x16_t low = vld1q_s8(a.q), high = vld1q_s8(a.q + 16);
  each_count<0, CG>([&](auto group) __attribute__((always_inline)) {
    constexpr int g = decltype(group)::value;
    int32x4_t sum = vdupq_n_s32(0);
    if constexpr (kUnsigned<L>) {
      sum = vld1q_dup_s32(&a.minus_zero);
    } else if constexpr (L::zero_log >= 0 && !L::wide) {
      sum = vdupq_n_s32(-(CG == 2 ? a.half_sum[g] : a.sum) * (1 << L::zero_log));
    }
    each_count<g * per_group, (g + 1) * per_group>([&](auto nth) __attribute__((always_inline)) {
      constexpr int j = decltype(nth)::value;
#if PHL_I8MM
      if constexpr (kUnsigned<L>) {
        sum = vusdotq_laneq_s32(sum, vreinterpretq_u8_s8(op[j]), j < 4 ? low : high, j % 4);
        return;
      }
#endif
      sum = vdotq_laneq_s32(sum, op[j], j < 4 ? low : high, j % 4);
    });
    total = vfmaq_f32(total, vcvtq_f32_s32(sum), vmulq_n_f32(d[g], a.scale));
    if constexpr (L::min) total = vfmaq_n_f32(total, m[g], CG == 2 ? a.half_scaled_sum[g] : a.scaled_sum);
  });
  return total;
}

// As small_block.
template <class L, int R, bool Single>
void lanes_block(const uint8_t* w, const uint8_t* lower, int64_t units, const Activation* act, int64_t act_step, float* out,
                 int64_t out_step, const Fetch& fetch) {
  constexpr int CG = L::chunk_groups;
  const int64_t ahead = Single ? kPrefetch : fetch.ahead;
  const int first = Single ? 0 : fetch.first, step = Single ? 64 : fetch.step;
  float32x4_t total[4][R];
  each_count<0, 4 * R>([&](auto n) __attribute__((always_inline)) {
    total[decltype(n)::value / R][decltype(n)::value % R] = vdupq_n_f32(0.0f);
  });
  for (int64_t u = 0; u < units; ++u, w += L::unit_bytes) {
    for (int at = first; at < L::header; at += step) prefetch<!Single>(w + ahead + at);
    for (int c = 0; c < L::chunks; ++c, ++act) {
      const uint8_t* p = w + L::header + c * L::chunk_bytes;
      for (int at = first; at < L::chunk_bytes; at += step) prefetch<!Single>(p + ahead + at);
      if constexpr (L::split) {
        const int64_t further = ahead / L::unit_bytes * L::lower_bytes;
        for (int at = first; at < L::chunk_bytes; at += step) prefetch<!Single>(lower + further + at);
      }
      each_count<0, 4>([&](auto quarter) __attribute__((always_inline)) {
        constexpr int i = decltype(quarter)::value;
        int8x16_t op[8];
        each_count<0, 8>([&](auto nth) __attribute__((always_inline)) {
          constexpr int n = decltype(nth)::value, j = n / 2 + n % 2 * 4;  // those of one plane beside each other
          op[j] = lanes_of<L, j>(p + 16 * i, lower + 16 * i);
        });
        float32x4_t d[2], m[2];
        each_count<0, CG>([&](auto group) __attribute__((always_inline)) {
          constexpr int g = decltype(group)::value;
          d[g] = m[g] = scale_lanes<L>(w, c * CG + g, i);
          if constexpr (L::min) m[g] = minimum_lanes<L>(w, c * CG + g, i);
        });
        each_count<0, R>([&](auto row) __attribute__((always_inline)) {
          constexpr int r = decltype(row)::value;
          total[i][r] = chunk_of_row<L>(total[i][r], op, d, m, act[r * act_step]);
        });
      });
      lower += L::split ? L::chunk_bytes : 0;
    }
  }
  each_count<0, 4 * R>([&](auto n) __attribute__((always_inline)) {
    constexpr int i = decltype(n)::value / R, r = decltype(n)::value % R;
    vst1q_f32(out + r * out_step + 4 * i, total[i][r]);
  });
}

// What many rows read: for four features after the other all chunks, each with eight operands, scales and minima.
template <class L>
constexpr int kLanesChunk = 128 + 16 * L::chunk_groups * (L::min ? 2 : 1);

// Four features times R rows. out[r * out_step + lane].
template <class L, int R>
void lanes_kernel(const uint8_t* tile, int64_t chunks, const Activation* act, int64_t act_step, float* out,
                  int64_t out_step) {
  constexpr int CG = L::chunk_groups;
  float32x4_t total[R];
  each_count<0, R>([&](auto row) __attribute__((always_inline)) { total[decltype(row)::value] = vdupq_n_f32(0.0f); });
  for (int64_t c = 0; c < chunks; ++c, tile += kLanesChunk<L>, ++act) {
    int8x16_t op[8];
    each_count<0, 8>([&](auto nth) __attribute__((always_inline)) {
      constexpr int j = decltype(nth)::value;
      op[j] = vreinterpretq_s8_u8(vld1q_u8(tile + 16 * j));
    });
    const auto* scales = reinterpret_cast<const float*>(tile + 128);
    float32x4_t d[2], m[2];
    each_count<0, CG>([&](auto group) __attribute__((always_inline)) {
      constexpr int g = decltype(group)::value;
      d[g] = m[g] = vld1q_f32(scales + 4 * g * (L::min ? 2 : 1));
      if constexpr (L::min) m[g] = vld1q_f32(scales + 8 * g + 4);
    });
    each_count<0, R>([&](auto row) __attribute__((always_inline)) {
      constexpr int r = decltype(row)::value;
      total[r] = chunk_of_row<L>(total[r], op, d, m, act[r * act_step]);
    });
  }
  each_count<0, R>([&](auto row) __attribute__((always_inline)) {
    constexpr int r = decltype(row)::value;
    vst1q_f32(out + r * out_step, total[r]);
  });
}

// As AsPacked.
template <class L>
struct AsLanes {
  static constexpr int64_t fetches = 0;
  static constexpr int64_t tile_bytes(int64_t chunks) { return 4 * chunks * kLanesChunk<L>; }
  static_assert(4 * kLanesChunk<L> == kTileChunk<L>);

  static void unpack(const uint8_t* w, const uint8_t* lower, int64_t units, uint8_t* tile) {
    constexpr int CG = L::chunk_groups;
    const int64_t quarter_bytes = units * L::chunks * kLanesChunk<L>;
    for (int64_t u = 0; u < units; ++u, w += L::unit_bytes) {
      for (int c = 0; c < L::chunks; ++c, tile += kLanesChunk<L>) {
        const uint8_t* p = w + L::header + c * L::chunk_bytes;
        each_count<0, 4>([&](auto quarter) __attribute__((always_inline)) {
          constexpr int i = decltype(quarter)::value;
          uint8_t* to = tile + i * quarter_bytes;
          each_count<0, 8>([&](auto nth) __attribute__((always_inline)) {
            constexpr int n = decltype(nth)::value, j = n / 2 + n % 2 * 4;
            vst1q_s8(reinterpret_cast<int8_t*>(to) + 16 * j, lanes_of<L, j>(p + 16 * i, lower + 16 * i));
          });
          auto* scales = reinterpret_cast<float*>(to + 128);
          each_count<0, CG>([&](auto group) __attribute__((always_inline)) {
            constexpr int g = decltype(group)::value;
            vst1q_f32(scales + 4 * g * (L::min ? 2 : 1), scale_lanes<L>(w, c * CG + g, i));
            if constexpr (L::min) vst1q_f32(scales + 8 * g + 4, minimum_lanes<L>(w, c * CG + g, i));
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
      for (int i = 0; i < 4; ++i) {
        const uint8_t* quarter = tile + b * tile_step + i * chunks * kLanesChunk<L>;
        lanes_kernel<L, R>(quarter, chunks, act, act_step, out + 16 * b + 4 * i, out_step);
      }
    }
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
