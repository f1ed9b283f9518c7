// Many rows: weights of every integer layout as bytes with one scale per output feature.
//
// Per 32 inputs and row a packed layout costs two or three float instructions beside its eight integer ones (four to
// six with a scale per 16 inputs): scale, minimum, activation scale. Here a weight is (byte - 128) * scale[feature], so
// that one per 64 is left: sums times the activations' scale, which two chunks share. Rounding to 255 steps over a whole
// row of weights adds noise of about a tenth of that of a type of 4 bits; making the bytes takes as long as multiplying
// some seven rows.
#pragma once

#include "kernels.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kByteChunk = 512;  // 32 inputs of 16 features

// Steps of the bytes: 1 / 127 of the largest magnitude that each feature's scales allow.
template <class L>
F byte_scale(const uint8_t* w, int64_t units) {
  constexpr float low = L::table ? kTable4[0] - 128 : -L::zero;
  constexpr float high = (L::table ? kTable4[15] - 128 : (1 << L::bits) - 1 - L::zero);
  F largest = Vec::zero();
  for (int64_t u = 0; u < units; ++u, w += L::unit_bytes) {
    for (int g = 0; g < L::groups; ++g) {
      const F d = scale_of<L>(w, g);
      F first = Vec::mul(d, Vec::set(low)), last = Vec::mul(d, Vec::set(high));
      if constexpr (L::min) {
        const F m = minimum_of<L>(w, g);
        first = Vec::add(first, m);
        last = Vec::add(last, m);
      }
      largest = Vec::larger(largest, Vec::larger(first, last));
    }
  }
  return Vec::mul(largest, Vec::set(1.0f / 127.0f));
}

// A block as bytes, then their scales. Exact to 1/64 of a step.
template <class L>
void bytes_of_block(const uint8_t* w, int64_t units, uint8_t* tile) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG, bits = L::wide ? 8 : L::bits;
  const F scale = byte_scale<L>(w, units), inverse = Vec::inverse(scale);
  Vec::storef(reinterpret_cast<float*>(tile + units * L::chunks * kByteChunk), scale);
  const F step = Vec::mul(inverse, Vec::set(static_cast<float>(1 << (bits + 6))));
  const F base = Vec::mul(inverse, Vec::set(64.0f)), middle = Vec::set(128.5f * 64.0f);
  const F zero = Vec::set(static_cast<float>(-L::zero) * 64.0f);
  for (int64_t u = 0; u < units; ++u, w += L::unit_bytes) {
    for (int c = 0; c < L::chunks; ++c, tile += kByteChunk) {
      U op[8];
      unpack<L>(w + L::header + c * L::chunk_bytes, op);
#pragma GCC unroll 2
      for (int g = 0; g < CG; ++g) {
        const F d = scale_of<L>(w, c * CG + g);
        F offset = middle;
        if constexpr (L::min) {
          offset = Vec::fma(minimum_of<L>(w, c * CG + g), base, offset);
        } else {
          offset = Vec::fma(Vec::mul(d, inverse), zero, offset);
        }
        const U factor = Vec::twice16(Vec::mul(d, step)), add = Vec::twice16(offset);
#pragma GCC unroll 8
        for (int j = g * per_group; j < (g + 1) * per_group; ++j) {
          Vec::store(tile + 64 * j, Vec::rescale<bits>(op[j], factor, add));
        }
      }
    }
  }
}

// B blocks of bytes, `tile_step` bytes apart, times R rows. out[r * out_step + 16 * b + lane].
template <int R, int B>
void byte_kernel(const uint8_t* tile, int64_t tile_step, int64_t chunks, const Activation* act, int64_t act_step,
                 float* out, int64_t out_step) {
  F total[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) total[r][b] = Vec::zero();
  }
  for (int64_t c = 0; c < chunks; c += 2, tile += 2 * kByteChunk, act += 2) {
    I sum[R][B];
    for (int r = 0; r < R; ++r) {
      const I start = Vec::set_i(act[r * act_step].minus_zero);
      for (int b = 0; b < B; ++b) sum[r][b] = start;
    }
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      U w[B];
      for (int b = 0; b < B; ++b) w[b] = Vec::load(tile + b * tile_step + 64 * j);
      for (int r = 0; r < R; ++r) {
        const Vec::A a = Vec::spread4(act[r * act_step + j / 8].q + j % 8 * 4);
        for (int b = 0; b < B; ++b) sum[r][b] = Vec::dot<true>(sum[r][b], w[b], a);
      }
    }
    for (int r = 0; r < R; ++r) {
      const F scale = Vec::set(act[r * act_step].scale);
      for (int b = 0; b < B; ++b) total[r][b] = Vec::fma(Vec::tofloat(sum[r][b]), scale, total[r][b]);
    }
  }
  for (int b = 0; b < B; ++b) {
    const F scale = Vec::loadf(reinterpret_cast<const float*>(tile + b * tile_step));
    for (int r = 0; r < R; ++r) Vec::storef(out + r * out_step + 16 * b, Vec::mul(total[r][b], scale));
  }
}

// As AsPacked.
template <class L>
struct AsBytes {
  static constexpr int chunk_bytes = kByteChunk;
  static constexpr bool whole_chunks = true, pairs = true;  // of chunks, with one activation scale
  static void unpack(const uint8_t* w, int64_t units, uint8_t* tile) { bytes_of_block<L>(w, units, tile); }
  template <int R, int B>
  static constexpr auto kernel = byte_kernel<R, B>;

  struct Scales {};
  PHL_INLINE static Scales scales(const uint8_t*) { return {}; }
  PHL_INLINE static I start(const Activation& a) { return Vec::set_i(a.minus_zero); }
  PHL_INLINE static F add(F total, I sum, const Scales&, const Activation& a) {
    return Vec::fma(Vec::tofloat(sum), Vec::set(a.scale), total);
  }
  PHL_INLINE static F finish(F total, const uint8_t* end) {
    return Vec::mul(total, Vec::loadf(reinterpret_cast<const float*>(end)));
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
