// Many rows: weights of fewer than eight bits as bytes with one scale per output feature and kScaled * 32 inputs. Those of eight
// bits keep their scale per 32: they have as many instructions already, and rounding them again costs what it costs.
//
// Per 32 inputs and row a packed layout costs two or three float instructions beside its eight integer ones (four to
// six with a scale per 16 inputs): scale, minimum, activation scale. Here a weight is (byte - 128) * scale, so that one
// is left, and one more per scale. Making the bytes takes as long as multiplying some eight rows. One scale for a
// whole feature took a perplexity more than 1 % from float32 (docs/benchmarks.md).
#pragma once

#include "kernels.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kByteChunk = 512;  // 32 inputs of 16 features
constexpr int64_t kFetches = 3;  // lines of the next cache that are asked for in a chunk

// Chunks with one scale of a feature. Weights of two or three bits lose too much precision by more than two.
template <class L>
constexpr int kScaled = L::bits >= 4 ? 4 : 2;

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
      F one = Vec::mul(d, Vec::set(low)), two = Vec::mul(d, Vec::set(high));
      if constexpr (L::min) {
        const F m = minimum_of<L>(unit, group);
        one = Vec::add(one, m);
        two = Vec::add(two, m);
      }
      largest = Vec::larger(largest, Vec::larger(one, two));
    }
  }
  return Vec::mul(largest, Vec::set(1.0f / 127.0f));
}

// A block as bytes, behind every kScaled<L> chunks their scales. Exact to 1/64 of a step.
template <class L>
void bytes_of_block(const uint8_t* w, int64_t units, uint8_t* tile) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG, bits = L::wide ? 8 : L::bits;
  const F middle = Vec::set(128.5f * 64.0f), zero = Vec::set(static_cast<float>(-L::zero) * 64.0f);
  const int64_t chunks = units * L::chunks;
  for (int64_t first = 0; first < chunks; first += kScaled<L>) {
    const int64_t last = first + kScaled<L> < chunks ? first + kScaled<L> : chunks;
    const F scale = byte_scale<L>(w, first, last), inverse = Vec::inverse(scale);
    const F step = Vec::mul(inverse, Vec::set(static_cast<float>(1 << (bits + 6))));
    const F base = Vec::mul(inverse, Vec::set(64.0f));
    for (int64_t c = first; c < last; ++c, tile += kByteChunk) {
      const uint8_t* unit = w + c / L::chunks * L::unit_bytes;
      const int at = static_cast<int>(c % L::chunks);
      U op[8];
      unpack<L>(unit + L::header + at * L::chunk_bytes, nullptr, op);
#pragma GCC unroll 2
      for (int g = 0; g < CG; ++g) {
        const F d = scale_of<L>(unit, at * CG + g);
        F offset = middle;
        if constexpr (L::min) {
          offset = Vec::fma(minimum_of<L>(unit, at * CG + g), base, offset);
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
    Vec::storef(reinterpret_cast<float*>(tile), scale);
    tile += 64;
  }
}

// B blocks of bytes, `tile_step` bytes apart, times R rows. out[r * out_step + 16 * b + lane]. Fetch: asks for `lines`
// meanwhile.
template <int R, int B, int Scaled, bool Fetch>
void byte_kernel(const uint8_t* tile, int64_t tile_step, int64_t chunks, const Activation* act, int64_t act_step,
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
    for (const int64_t last = c + Scaled < chunks ? c + Scaled : chunks; c < last; ++c, tile += kByteChunk, ++act) {
      if (Fetch && lines.at < lines.end) {
        for (int64_t i = 0; i < kFetches; ++i) __builtin_prefetch(reinterpret_cast<const void*>(lines.at + 64 * i), 0, 2);
        lines.at += 64 * kFetches;
      }
      I sum[R][B];
      for (int r = 0; r < R; ++r) {
        const I start = Vec::set_i(act[r * act_step].minus_zero);
        for (int b = 0; b < B; ++b) sum[r][b] = start;
      }
      for (int j = 0; j < 8; ++j) {
        U w[B];
        for (int b = 0; b < B; ++b) w[b] = Vec::load(tile + b * tile_step + 64 * j);
        for (int r = 0; r < R; ++r) {
          const Vec::A a = Vec::spread4(act[r * act_step].q + 4 * j);
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
template <class L>
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
    const auto kernel = lines.at < lines.end ? byte_kernel<R, B, kScaled<L>, true> : byte_kernel<R, B, kScaled<L>, false>;
    kernel(tile, tile_step, chunks, act, act_step, out, out_step, lines);
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
