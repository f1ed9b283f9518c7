// The arg-max of a large head for a few rows, where reading the weights is what takes the time.
//
// A copy of the head in four bits, the screen, or the upper halves of a split head tell about what each logit is and how far off that can be. Only blocks
// of features that may hold the largest logit are read whole, by the kernels that serve without a screen: the token is
// the one that those find. Every weight of the screen is at most half a step off (`linear_screen`; 7.5 of a split
// head's 16), so that `kDeviations` times the root of the sum of (half a step times an input)^2 bounds a logit's error as long as the
// roundings of a row do not conspire with the input: for evenly spread roundings these are 8.7 standard deviations.
#pragma once

#include "job.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kScreenRows = 8;
constexpr float kDeviations = 5.0f;
// What 32 inputs rounded to int8 add to the sum of their squares where the head itself takes them in floating point:
// each is off by half at most, each weight is 7.5 steps at most; twice that.
constexpr int32_t kInputError = 32 * 2 * 57;

// (half a step of the input's scale)^2 times the inputs' squares, per chunk of a row.
PHL_INLINE void energies(const Activation* a, int64_t chunks, float* out) {
  for (int64_t c = 0; c < chunks; ++c) {
    int32_t squares = 0;
    for (int i = 0; i < kChunk; ++i) squares += int32_t{a[c].q[i]} * a[c].q[i];
    out[c] = static_cast<float>(squares + kInputError) * (0.25f * a[c].scale * a[c].scale);
  }
}

// f(r, sum) for R rows: the products of a chunk of few bits with its inputs. Where registers hold no chunk, an operand
// meets as many rows as their sums leave room for, and products are added before they are widened.
template <class L, int R, class G>
PHL_INLINE void each_chunk_sum(const uint8_t* p, const Activation* act, int64_t act_step, G&& f) {
  if constexpr (Vec::parts == 1 && !Vec::holds_chunk) {
    constexpr int most = Vec::held_rows;
    each_count<0, (R + most - 1) / most>([&](auto nth_pass) __attribute__((always_inline)) {
      constexpr int first = decltype(nth_pass)::value * most, N = R - first < most ? R - first : most;
      Vec::Sum<L::bits, false> sum[N];
      for (int r = 0; r < N; ++r) sum[r].total = start_sum<L::zero_log, false, false>(act[(first + r) * act_step], 0);
      each_count<0, 8>([&](auto nth) __attribute__((always_inline)) {
        constexpr int j = decltype(nth)::value;
        const auto w = Vec::ready<false>(operand<L, j>(p, nullptr));
        for (int r = 0; r < N; ++r) sum[r].add(j, w, Vec::spread4(act[(first + r) * act_step].q, j));
      });
      for (int r = 0; r < N; ++r) f(first + r, sum[r].all(8));
    });
  } else {
    U op[8];
    unpack<L>(p, nullptr, op);
    for (int r = 0; r < R; ++r) {
      I sum = start_sum<L::zero_log, false, false>(act[r * act_step], 0);
      for (int j = 0; j < 8; ++j) sum = Vec::dot<false>(sum, op[j], Vec::spread4(act[r * act_step].q, j));
      f(r, sum);
    }
  }
}

// Upper bounds of the logits of one block of the screen for R rows. energy[r * chunks + c]. Split: a weight is
// 16 (n - 8) + 7.5 +- 7.5 for the n that is read.
template <int R, bool Split>
void screen_block(const uint8_t* w, int64_t units, const Activation* act, int64_t act_step, const float* energy,
                  F* upper) {
  using L = Q4S;
  static_assert(L::unit_bytes == Q8P::unit_bytes && L::header == Q8P::header && L::unit_k == Q8P::unit_k);
  const int64_t chunks = units * L::chunks;
  F total[R], spread[R];
  for (int r = 0; r < R; ++r) total[r] = spread[r] = Vec::zero();
  for (int64_t u = 0; u < units; ++u, w += L::unit_bytes, act += L::chunks, energy += L::chunks) {
    for (int at = 0; at < L::unit_bytes; at += 64) prefetch(w + kPrefetch + at);
    for (int c = 0; c < L::chunks; ++c) {
      const uint8_t* p = w + L::header + c * L::chunk_bytes;
      F d = scale_of<L>(w, c);
      const F middle = Vec::mul(d, Vec::set(7.5f));
      if constexpr (Split) d = Vec::mul(d, Vec::set(16.0f));
      const F step = Split ? Vec::add(middle, middle) : d, square = Vec::mul(step, step);
      each_chunk_sum<L, R>(p, act + c, act_step, [&](int r, I sum) __attribute__((always_inline)) {
        total[r] = accumulate<Split, false>(total[r], sum, d, middle, act[r * act_step + c], 0);
        spread[r] = Vec::fma(square, Vec::set(energy[r * chunks + c]), spread[r]);
      });
    }
  }
  for (int r = 0; r < R; ++r) upper[r] = Vec::fma(Vec::sqrt(spread[r]), Vec::set(kDeviations), total[r]);
}

// One thread's part of a screen. `bound`, shared by the threads: [rows][blocks], no logit of the block is larger.
struct Screen {
  const uint8_t* data;
  float* bound;
  int64_t blocks;
  bool split;

  // Bounds of blocks [first, last); of each row the block with the largest.
  void pass(int64_t first, int64_t last, const Rows& rows, int64_t count, float* energy, int64_t* best) const {
    const int64_t units = rows.inputs / Q4S::unit_k, chunks = rows.inputs / kChunk;
    for (int64_t r = 0; r < count; ++r) {
      energies(rows.int8(r), chunks, energy + r * chunks);
      best[r] = first;
    }
    with_count<kScreenRows>(count, [&](auto n) {
      constexpr int R = decltype(n)::value;
      for (int64_t block = first; block < last; ++block) {
        F upper[R];
        const auto bounds = split ? screen_block<R, true> : screen_block<R, false>;
        bounds(data + block * units * Q4S::unit_bytes, units, rows.int8(0), rows.row_bytes / 64, energy, upper);
        for (int r = 0; r < R; ++r) {
          float* own = bound + r * blocks;
          own[block] = Vec::top(upper[r]);
          if (own[block] > own[best[r]]) best[r] = block;
        }
      }
    });
  }

  // Whether one of the rows may have its largest logit in the block. What is not a number stays.
  PHL_INLINE bool keeps(int64_t block, int64_t count, const float* least) const {
    for (int64_t r = 0; r < count; ++r) {
      if (!(bound[r * blocks + block] < least[r])) return true;
    }
    return false;
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
