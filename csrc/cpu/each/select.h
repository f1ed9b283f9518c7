// The best of many weights without sorting them: tokens as 64-bit keys whose order is (value falling, id rising).
#pragma once
#include "../op.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kDrawBlock = 1024;
constexpr int64_t kMaxDrawBlocks = 1024;  // vocabularies up to a million
constexpr int64_t kMaxima = 1536;

PHL_INLINE uint64_t with_id(uint32_t high, int64_t id) { return uint64_t(high) << 32 | (0xFFFFFFFFu - uint32_t(id)); }
PHL_INLINE int32_t id_of(uint64_t key) { return int32_t(0xFFFFFFFFu - uint32_t(key)); }

// Weights are not negative, so their bits are in order as they are.
PHL_INLINE uint64_t weight_key(float weight, int64_t id) {
  uint32_t bits;
  __builtin_memcpy(&bits, &weight, 4);
  return with_id(bits, id);
}
PHL_INLINE float weight_of(uint64_t key) {
  const uint32_t bits = uint32_t(key >> 32);
  float weight;
  __builtin_memcpy(&weight, &bits, 4);
  return weight;
}

PHL_INLINE uint64_t ordered_key(float value, int64_t id) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return with_id(bits >> 31 ? ~bits : bits | 0x80000000u, id);
}

PHL_INLINE uint64_t median(uint64_t a, uint64_t b, uint64_t c) {
  const uint64_t low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c > high ? high : c;
}

void sort_descending(uint64_t* keys, int64_t n) {
  // Heap sort with the smallest at the root.
  const auto sift = [&](int64_t at, int64_t size) {
    const uint64_t key = keys[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && keys[child + 1] < keys[child]) ++child;
      if (key <= keys[child]) break;
      keys[at] = keys[child];
    }
    keys[at] = key;
  };
  for (int64_t i = n / 2 - 1; i >= 0; --i) sift(i, n);
  for (int64_t size = n - 1; size > 0; --size) {
    const uint64_t smallest = keys[0];
    keys[0] = keys[size];
    keys[size] = smallest;
    sift(0, size);
  }
}

struct Best {
  int64_t count;
  double mass;
  uint64_t cut;  // the smallest key among them
};

// Moves the best keys to the front: at most `most`, and only while the better ones weigh less than `limit` together
// (at least one). Keys are distinct. Quickselect that looks into one side alone.
Best best_keys(uint64_t* keys, int64_t n, int64_t most, double limit, bool weighed) {
  int64_t begin = 0, end = n;
  Best best{0, 0.0, 0};
  while (end - begin > 24) {
    const uint64_t pivot = median(keys[begin], keys[(begin + end) / 2], keys[end - 1]);
    int64_t to = begin;
    double mass = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t key = keys[i];
      keys[i] = keys[to];
      keys[to] = key;
      const bool upper = key >= pivot;
      mass += upper ? double(weight_of(key)) : 0.0;
      to += upper;
    }
    if (best.count + to - begin <= most && (!weighed || best.mass + mass <= limit)) {
      best = {best.count + to - begin, best.mass + mass, pivot};
      begin = to;
    } else {
      end = to;
    }
  }
  sort_descending(keys + begin, end - begin);
  while (begin < end && best.count < most && (!weighed || best.mass < limit || best.count == 0)) {
    best = {best.count + 1, best.mass + double(weight_of(keys[begin])), keys[begin]};
    ++begin;
  }
  return best;
}

// The k-th largest of n values (k from 1); reorders them.
[[maybe_unused]] float kth_largest(float* values, int64_t n, int64_t k) {
  int64_t begin = 0, end = n, wanted = k - 1;
  while (end - begin > 1) {
    const float a = values[begin], b = values[(begin + end) / 2], c = values[end - 1];
    const float low = a < b ? a : b, high = a < b ? b : a, pivot = c < low ? low : c > high ? high : c;
    // Three parts: above, equal, below.
    int64_t above = begin, equal = begin;
    for (int64_t i = begin; i < end; ++i) {
      const float v = values[i];
      if (v < pivot || v != v) continue;
      values[i] = values[equal];
      if (v > pivot) {
        values[equal++] = values[above];
        values[above++] = v;
      } else {
        values[equal++] = v;
      }
    }
    if (wanted < above) end = above;
    else if (wanted < equal) return pivot;
    else begin = equal;
  }
  return values[begin < n ? begin : n - 1];
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
