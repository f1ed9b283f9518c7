// Many rows: weights of fewer than eight bits as bytes with one scale per output feature and kScaled * 32 inputs. Those of eight
// bits keep their scale per 32: they have as many instructions already, and rounding them again costs what it costs.
//
// Per 32 inputs and row a packed layout costs two or three float instructions beside its eight integer ones (four to
// six with a scale per 16 inputs): scale, minimum, activation scale. Here a weight is (byte - 128) * scale, so that one is
// left (half of one where activations come in pairs), and one more per scale. Making the bytes takes as long as
// multiplying some six rows. One scale for a whole feature took a perplexity more than 1 % from float32
// (docs/benchmarks.md).
#pragma once

#include "kernels.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kByteChunk = 512;  // 32 inputs of 16 features

// Chunks with one scale of a feature. Weights of two or three bits lose too much precision by more than two.
template <class L>
constexpr int kScaled = L::bits >= 4 ? 4 : 2;

// Chunks of activations with one scale. Weights of two and three bits do not bear it, nor do those of eight, which are not
// rounded again.
template <class L>
constexpr int kJoint = L::bits >= 4 && L::bits < 8 ? 2 : 1;

// Steps of the bytes of chunks [first, last): 1 / 127 of the largest magnitude that each feature's scales allow.
template <class L>
F byte_scale(const uint8_t* w, int64_t first, int64_t last) {
  constexpr float low = L::table ? kTable4[0] - 128 : -L::zero;
  constexpr float high = (L::table ? kTable4[15] - 128 : (1 << L::bits) - 1 - L::zero);
  F largest = Vec::zero();
  for (int64_t c = first; c < last; ++c) {
    const uint8_t* unit = w + c / L::chunks * L::unit_bytes;
    for (int g = 0; g < L::chunk_groups; ++g) {
      const int group = static_cast<int>(c % L::chunks) * L::chunk_groups + g;
      const F d = scale_of<L>(unit, group);
      if constexpr (L::min) {
        const F m = minimum_of<L>(unit, group);  // what 0 stands for
        largest = Vec::larger(largest, Vec::larger(m, Vec::fma(d, Vec::set(high), m)));
      } else {
        largest = Vec::larger(largest, Vec::mul(d, Vec::set(high > -low ? high : low)));
      }
    }
  }
  return Vec::mul(largest, Vec::set(1.0f / 127.0f));
}

// A block as bytes, behind every kScaled<L> chunks their scales: (q * factor + offset) / one, rounded down. Exact to an
// eighth of a step.
template <class L>
PHL_APART void bytes_of_block(const uint8_t* w, int64_t units, uint8_t* tile) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG;
  constexpr float one = L::wide ? 64 : 256;
  const F middle = Vec::set(128.5f * one), zero = Vec::set(-L::zero * one);
  const int64_t chunks = units * L::chunks;
  for (int64_t first = 0; first < chunks; first += kScaled<L>) {
    const int64_t last = first + kScaled<L> < chunks ? first + kScaled<L> : chunks;
    const F scale = byte_scale<L>(w, first, last), inverse = Vec::inverse(scale);
    const F base = Vec::mul(inverse, Vec::set(one)), step = L::wide ? Vec::mul(base, Vec::set(256.0f)) : base;
    for (int64_t c = first; c < last; ++c, tile += kByteChunk) {
      const uint8_t* unit = w + c / L::chunks * L::unit_bytes;
      const int at = static_cast<int>(c % L::chunks);
      const uint8_t* planes = unit + L::header + at * L::chunk_bytes;
      U factor[CG], add[CG];
      for (int g = 0; g < CG; ++g) {
        const F d = scale_of<L>(unit, at * CG + g);
        factor[g] = Vec::twice16(Vec::mul(d, step));
        if constexpr (L::min) {
          add[g] = Vec::twice16(Vec::fma(minimum_of<L>(unit, at * CG + g), base, middle));
        } else {
          add[g] = Vec::twice16(Vec::fma(Vec::mul(d, inverse), zero, middle));
        }
      }
      if constexpr (L::bits == 4 && !L::table) {
        for (int t = 0; t < 4; ++t) {
          const U x = Vec::load(planes + 64 * t);
          Vec::store(tile + 64 * t, Vec::rescale_low(x, factor[0], add[0]));
          Vec::store(tile + 64 * (t + 4), Vec::rescale_high(x, factor[0], add[0]));
        }
      } else {
        U op[8];
        unpack<L>(planes, nullptr, op);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          const int g = j / per_group;
          Vec::store(tile + 64 * j, L::wide ? Vec::rescale_wide(op[j], factor[g], add[g])
                                            : Vec::rescale(op[j], factor[g], add[g]));
        }
      }
    }
    Vec::storef(reinterpret_cast<float*>(tile), scale);
    tile += 64;
  }
}

// B blocks of bytes, `tile_step` bytes apart, times R rows. out[r * out_step + 16 * b + lane]. Joint: so many chunks of
// activations have one scale (1 or 2). Fetch: asks for `lines` meanwhile.
template <int R, int B, int Scaled, int Joint, bool Fetch>
PHL_APART void byte_kernel(const uint8_t* tile, int64_t tile_step, int64_t chunks, const Activation* act, int64_t act_step,
                 float* out, int64_t out_step, [[maybe_unused]] Lines lines) {
  F total[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) total[r][b] = Vec::zero();
  }
  for (int64_t c = 0; c < chunks; tile += 64) {
    F part[R][B];
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) part[r][b] = Vec::zero();
    }
    const int64_t last = c + Scaled < chunks ? c + Scaled : chunks;
    for (; c < last; c += Joint, tile += Joint * kByteChunk, act += Joint) {
      if (Fetch && lines.at < lines.end) {
        for (int64_t i = 0; i < Joint * kFetches; ++i) {
          __builtin_prefetch(reinterpret_cast<const void*>(lines.at + 64 * i), 0, 2);
        }
        lines.at += 64 * Joint * kFetches;
      }
      I sum[R][B];
      for (int r = 0; r < R; ++r) {
        const I start = Vec::set_i(act[r * act_step].minus_zero);
        for (int b = 0; b < B; ++b) sum[r][b] = start;
      }
#pragma GCC unroll 16
      for (int j = 0; j < 8 * Joint; ++j) {
        U w[B];
        for (int b = 0; b < B; ++b) w[b] = Vec::load(tile + b * tile_step + 64 * j);
        for (int r = 0; r < R; ++r) {
          const Vec::A a = Vec::spread4(act[r * act_step + j / 8].q, j % 8);
          for (int b = 0; b < B; ++b) sum[r][b] = Vec::dot<true>(sum[r][b], w[b], a);
        }
      }
      for (int r = 0; r < R; ++r) {
        const F scale = Vec::set(act[r * act_step].scale);
        for (int b = 0; b < B; ++b) part[r][b] = Vec::fma(Vec::tofloat(sum[r][b]), scale, part[r][b]);
      }
    }
    for (int b = 0; b < B; ++b) {
      const F scale = Vec::loadf(reinterpret_cast<const float*>(tile + b * tile_step));
      for (int r = 0; r < R; ++r) total[r][b] = Vec::fma(part[r][b], scale, total[r][b]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) Vec::storef(out + r * out_step + 16 * b, total[r][b]);
  }
}

// As AsPacked.
template <class L, int Joint>
struct AsBytes {
  static constexpr int64_t fetches = kFetches;
  static constexpr int64_t tile_bytes(int64_t chunks) {
    return chunks * kByteChunk + (chunks + kScaled<L> - 1) / kScaled<L> * 64;
  }
  static void unpack(const uint8_t* w, const uint8_t*, int64_t units, uint8_t* tile) {
    bytes_of_block<L>(w, units, tile);
  }
  template <int R, int B>
  static void multiply(const uint8_t* tile, int64_t tile_step, int64_t chunks, const Activation* act, int64_t act_step,
                       float* out, int64_t out_step, Lines lines) {
    const auto kernel = lines.at < lines.end ? byte_kernel<R, B, kScaled<L>, Joint, true>
                                             : byte_kernel<R, B, kScaled<L>, Joint, false>;
    kernel(tile, tile_step, chunks, act, act_step, out, out_step, lines);
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
