// Routing: the experts of each token, and the order in which a sparse layer computes. Legend: T tokens, E experts,
// k choices of a token; a slot is one (token, choice), slots stand sorted by expert and then by token.
#pragma once

#include "../linear/job.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {
namespace {

PHL_INLINE int64_t up64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// An expert that has tokens: slots [first, first + count), and its tasks begin at number `task`.
struct Active {
  int64_t id, first, count, task;
};

// The tables of one panel of tokens, in the workspace. See _native_moe.py for their size.
struct Tables {
  int32_t* ids;    // [T, k]
  float* chosen;   // [T, k] weights
  int32_t* token;  // [slots]
  float* weight;   // [slots]
  int32_t* next;   // [E]: counts, then places
  Active* active;  // [min(E, slots) + 1]: the last one's `task` is the number of tasks, its `id` of active experts

  Tables(uint8_t* at, int64_t slots, int64_t experts) {
    const int64_t bytes = up64(4 * slots);
    ids = reinterpret_cast<int32_t*>(at);
    chosen = reinterpret_cast<float*>(at + bytes);
    token = reinterpret_cast<int32_t*>(at + 2 * bytes);
    weight = reinterpret_cast<float*>(at + 3 * bytes);
    next = reinterpret_cast<int32_t*>(at + 4 * bytes);
    active = reinterpret_cast<Active*>(at + 4 * bytes + up64(4 * experts));
  }
  static int64_t bytes(int64_t slots, int64_t experts) {
    const int64_t most = slots < experts ? slots : experts;
    return 4 * up64(4 * slots) + up64(4 * experts) + up64((most + 1) * int64_t{sizeof(Active)});
  }
};

// The k largest, best first and the first of equals first. With a NaN among them the ids are valid, whatever they are.
PHL_INLINE void choose(const float* logits, int64_t experts, int64_t k, int32_t* ids) {
  int64_t found = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const float x = logits[e];
    if (found == k && !(x > logits[ids[k - 1]])) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && x > logits[ids[at - 1]]; --at) ids[at] = ids[at - 1];
    ids[at] = static_cast<int32_t>(e);
  }
}

// e^(x - peak) of up to W numbers, in `out`; returns their sum.
PHL_INLINE float exponentials(const float* x, int64_t n, float peak, float* out) {
  float space[W];
  for (int i = 0; i < W; ++i) space[i] = i < n ? x[i] - peak : -__builtin_inff();
  const vf y = exp(load(space));
  store(out, y);
  return sum(y);
}

// Softmax over all experts, the k best, their weights scaled to sum to 1 if asked. A NaN among the logits makes every
// weight one.
PHL_INLINE void route(const float* logits, int64_t experts, int64_t k, bool renormalise, int32_t* ids, float* weights) {
  choose(logits, experts, k, ids);
  float peak = -__builtin_inff(), total = 0.0f, kept = 0.0f, space[W];
  for (int64_t e = 0; e < experts; ++e) peak = logits[e] > peak ? logits[e] : peak;
  for (int64_t e = 0; e < experts; e += W) total += exponentials(logits + e, experts - e, peak, space);
  for (int64_t j = 0; j < k; j += W) {
    const int64_t n = k - j < W ? k - j : W;
    for (int64_t i = 0; i < n; ++i) weights[j + i] = logits[ids[j + i]];
    exponentials(weights + j, n, peak, space);
    for (int64_t i = 0; i < n; ++i) kept += weights[j + i] = space[i] / total;
  }
  for (int64_t j = 0; renormalise && j < k; ++j) weights[j] /= kept;
}

// A counting sort of the slots by expert; those of an expert that is not here are left out.
PHL_INLINE void sort_slots(const Tables& t, int64_t slots, int64_t experts, int64_t k) {
  for (int64_t e = 0; e < experts; ++e) t.next[e] = 0;
  const auto here = [&](int64_t i) { return t.ids[i] >= 0 && t.ids[i] < experts; };
  for (int64_t i = 0; i < slots; ++i) {
    if (here(i)) ++t.next[t.ids[i]];
  }
  int64_t found = 0, first = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t count = t.next[e];
    t.next[e] = static_cast<int32_t>(first);
    if (count > 0) t.active[found++] = {e, first, count, 0};
    first += count;
  }
  t.active[found] = {found, first, 0, 0};
  for (int64_t i = 0; i < slots; ++i) {
    if (!here(i)) continue;
    const int32_t slot = t.next[t.ids[i]]++;
    t.token[slot] = static_cast<int32_t>(i / k);
    t.weight[slot] = t.chosen[i];
  }
}

// Numbers the tasks: about `target` in all, at least one and at most `pairs` an expert, by its share of the work. An
// expert's weights are read once (about 10 bytes a nanosecond) and each of its rows costs `row_work` in that unit.
PHL_INLINE void number_tasks(const Tables& t, int64_t active, int64_t weight_work, int64_t row_work, int64_t pairs,
                             int64_t target) {
  int64_t total = 1, task = 0;
  for (int64_t i = 0; i < active; ++i) total += weight_work + t.active[i].count * row_work;
  for (int64_t i = 0; i < active; ++i) {
    const int64_t work = weight_work + t.active[i].count * row_work;
    const auto share = static_cast<int64_t>(double(work) * double(target) / double(total));
    t.active[i].task = task;
    task += share < 1 ? 1 : share > pairs ? pairs : share;
  }
  t.active[active].task = task;
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
