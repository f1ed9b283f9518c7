// What sampling needs of a row of logits, gathered while the head makes them: the k best and the log-sum-exp.
#pragma once

#include "../each/select.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kTopChunk = 32;  // blocks of 16 columns whose exponentials are added together, by one thread
constexpr int64_t kTopState = 32;  // floats of a chunk's state: 16 sums, and what they are relative to

PHL_INLINE float value_of(uint64_t key) {  // of an ordered key
  const uint32_t high = uint32_t(key >> 32), bits = high >> 31 ? high & 0x7FFFFFFFu : ~high;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// One thread's part of a panel of rows.
struct TopRows {
  uint64_t* keys;    // [rows][capacity]: candidates so far
  int64_t* count;    // [rows]
  float* bound;      // [rows]: what is below is not among the k best
  float* states;     // [norms][rows][chunks][kTopState], shared by the threads
  const float* scale;  // [rows][norms]: of the logits before the log-sum-exp; null: none
  int64_t capacity, k, panel_rows, chunks, norms;
  float cap;  // soft cap of the logits; 0: none

  void start(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) count[r] = 0, bound[r] = -__builtin_inff();
  }

  PHL_INLINE float* state(int64_t norm, int64_t row, int64_t chunk) const {
    return states + ((norm * panel_rows + row) * chunks + chunk) * kTopState;
  }

  void shrink(int64_t row) const {
    uint64_t* own = keys + row * capacity;
    if (count[row] <= k) return;
    const Best best = best_keys(own, count[row], k, 0.0, false);
    count[row] = best.count;
    bound[row] = value_of(best.cut);
  }

  // Sixteen logits from `column`, of which the first `valid` are in the vocabulary.
  void take(int64_t row, int64_t column, int64_t valid, float* y) const {
    if (cap > 0.0f) {
      for (int i = 0; i < kBlock; i += W) store(y + i, tanh(load(y + i) * (1.0f / cap)) * cap);
    }
    for (int64_t i = valid; i < kBlock; ++i) y[i] = -__builtin_inff();
    for (int i = 0; i < kBlock; i += W) {
      const vf v = load(y + i);
      uint32_t lanes = lanes_of(v >= splat(bound[row]));
      if (lanes == 0) continue;
      if (count[row] + W > capacity) shrink(row);
      uint64_t* to = keys + row * capacity + count[row];
      for (; lanes != 0; lanes &= lanes - 1) {
        const int lane = i + __builtin_ctz(lanes);
        if (y[lane] > -__builtin_inff()) *to++ = ordered_key(y[lane], column + lane);
      }
      count[row] = to - (keys + row * capacity);
    }
    for (int64_t n = 0; n < norms; ++n) {
      const float factor = scale == nullptr ? 1.0f : scale[row * norms + n];
      add(y, factor, state(n, row, column / kBlock / kTopChunk));
    }
  }

  // Adds exponentials relative to about the first logits' largest, so that most of the time nothing is rescaled.
  static void add(const float* y, float factor, float* s) {
    float base = s[kBlock];
    vf top = load(y) * factor;
    for (int i = W; i < kBlock; i += W) top = max(load(y + i) * factor, top);
    if (lanes_of(top > splat(base + 40.0f)) != 0) {
      const float next = largest(top);
      const vf down = exp(splat(base - next));
      for (int i = 0; i < kBlock; i += W) store(s + i, load(s + i) * down);
      s[kBlock] = base = next;
    }
    if (base == -__builtin_inff()) {  // none but -inf so far, or what is not a number
      for (int i = 0; i < kBlock; ++i) s[i] += y[i] == y[i] ? 0.0f : y[i];
      return;
    }
    for (int i = 0; i < kBlock; i += W) store(s + i, load(s + i) + exp(load(y + i) * factor - base));
  }

  // The chunks' sums in their order, whatever threads made them.
  float log_sum_exp(int64_t norm, int64_t row) const {
    float top = -__builtin_inff();
    for (int64_t c = 0; c < chunks; ++c) {
      const float base = state(norm, row, c)[kBlock];
      top = base > top ? base : top;
    }
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      const float* s = state(norm, row, c);
      double sum = 0;
      for (int i = 0; i < kBlock; ++i) sum += double(s[i]);
      total += s[kBlock] == -__builtin_inff() ? sum : sum * __builtin_exp(double(s[kBlock]) - double(top));
    }
    return float(double(top) + __builtin_log(total));
  }
};

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
