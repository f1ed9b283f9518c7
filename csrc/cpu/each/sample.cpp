// From rows of logits to tokens: arg-max, log-sum-exp, the k best, grammar masks, and the whole draw.
// Legend: L rows, V vocabulary.
#include "select.h"

namespace phl {
namespace PHL_NS {
namespace {

struct Top {
  float value;
  int64_t index;  // of its first occurrence; of the first NaN, if there is one
};

template <class F>
PHL_INLINE void over_vectors(const float* x, int64_t n, float padding, F&& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, load(x + i));
  if (i < n) {
    const vi past = load_as<vi>(kLane) >= vi{} + int32_t(n - i);
    f(i, select(past, splat(padding), load_n(x + i, n - i)));
  }
}

Top find_top(const float* x, int64_t n) {
  const float lowest = -__builtin_inff();
  vf best[4] = {splat(lowest), splat(lowest), splat(lowest), splat(lowest)};
  vi broken{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int j = 0; j < 4; ++j) {
      const vf v = load(x + i + j * W);
      broken |= v != v;
      best[j] = max(v, best[j]);
    }
  }
  over_vectors(x + i, n - i, lowest, [&](int64_t, vf v) {
    broken |= v != v;
    best[0] = max(v, best[0]);
  });
  if (lanes_of(broken) != 0) {
    for (i = 0; x[i] == x[i];) ++i;
    return {x[i], i};
  }
  const float top = largest(max(max(best[0], best[1]), max(best[2], best[3])));
  for (i = 0; i + W <= n; i += W) {
    const uint32_t lanes = lanes_of(load(x + i) == splat(top));
    if (lanes != 0) return {top, i + __builtin_ctz(lanes)};
  }
  while (i < n && x[i] != top) ++i;
  return {top, i < n ? i : 0};
}

struct ArgmaxArgs {
  const float* logits;
  int32_t* out;
  int64_t rows, vocab, stride;
};

void argmax(const ArgmaxArgs& a, Team& team) {
  team.tasks(a.rows, [&](int64_t row) { a.out[row] = int32_t(find_top(a.logits + row * a.stride, a.vocab).index); });
}
PHL_FIELDS(ArgmaxArgs, logits, out, rows, vocab, stride);
PHL_OP(argmax, ArgmaxArgs);

struct LogsumexpArgs {
  const float* logits;
  float* out;
  int64_t rows, vocab, stride;
};

void logsumexp(const LogsumexpArgs& a, Team& team) {
  team.tasks(a.rows, [&](int64_t row) {
    const float* x = a.logits + row * a.stride;
    const float top = find_top(x, a.vocab).value;
    if (top - top != 0.0f) {  // an infinity or NaN is the answer
      a.out[row] = top;
      return;
    }
    double total = 0;
    for (int64_t begin = 0; begin < a.vocab; begin += kDrawBlock) {
      vf sums{};
      const int64_t count = a.vocab - begin < kDrawBlock ? a.vocab - begin : kDrawBlock;
      over_vectors(x + begin, count, -__builtin_inff(), [&](int64_t, vf v) { sums += exp(v - top); });
      total += double(sum(sums));
    }
    a.out[row] = top + float(__builtin_log(total));
  });
}
PHL_FIELDS(LogsumexpArgs, logits, out, rows, vocab, stride);
PHL_OP(logsumexp, LogsumexpArgs);

struct MaskTokensArgs {
  float* logits;
  const int32_t* rows;   // [count] which row of the logits each mask is for
  const uint32_t* mask;  // [count, words]: bit i of word w allows token 32 w + i
  int64_t count, vocab, stride, words;
};

// Forbidden tokens, and those past the mask's end, become -inf.
void mask_tokens(const MaskTokensArgs& a, Team& team) {
  const vf minus_infinity = splat(-__builtin_inff());
  team.tasks(a.count, [&](int64_t i) {
    float* x = a.logits + a.rows[i] * a.stride;
    const uint32_t* mask = a.mask + i * a.words;
    for (int64_t word = 0; word * 32 < a.vocab; ++word) {
      const uint32_t bits = word < a.words ? mask[word] : 0;
      if (bits == 0xFFFFFFFFu) continue;
      for (int64_t at = word * 32, shift = 0; shift < 32 && at < a.vocab; at += W, shift += W) {
        const vi allowed = (((vi{} + int32_t(bits >> shift)) >> load_as<vi>(kLane)) & 1) != 0;
        if (at + W <= a.vocab) store(x + at, select(allowed, load(x + at), minus_infinity));
        else store_n(x + at, select(allowed, load_n(x + at, a.vocab - at), minus_infinity), a.vocab - at);
      }
    }
  });
}
PHL_FIELDS(MaskTokensArgs, logits, rows, mask, count, vocab, stride, words);
PHL_OP(mask_tokens, MaskTokensArgs);

// A lower bound of the k-th largest of x: the k-th largest of the maxima of disjoint groups. -inf where that is no help.
float bound_of_kth(const float* x, int64_t n, int64_t k, float* maxima) {
  const int64_t vectors = n / W, groups = kMaxima / W, per_group = vectors / groups;
  if (k > kMaxima / 3 || per_group < 2) return -__builtin_inff();
  for (int64_t g = 0; g < groups; ++g) {
    vf best = load(x + g * per_group * W);
    for (int64_t i = 1; i < per_group; ++i) best = max(load(x + (g * per_group + i) * W), best);
    store(maxima + g * W, best);
  }
  return kth_largest(maxima, kMaxima, k);
}

// Keys of all x[i] >= bound, ids rising. `kOrdered`: x may be negative.
template <bool kOrdered>
PHL_INLINE int64_t collect(const float* x, int64_t n, float bound, uint64_t* keys) {
  int64_t found = 0;
  over_vectors(x, n, __builtin_nanf(""), [&](int64_t i, vf v) {
    uint32_t lanes = lanes_of(v >= splat(bound));
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t id = i + __builtin_ctz(lanes);
      keys[found++] = kOrdered ? ordered_key(x[id], id) : weight_key(x[id], id);
    }
  });
  return found;
}

struct TopKArgs {
  const float* logits;
  float* values;  // [rows, k], best first
  int32_t* ids;
  uint64_t* scratch;  // [threads, vocab]
  int64_t rows, vocab, stride, k;
};

void top_k(const TopKArgs& a, Team& team) {
  uint64_t* keys = a.scratch + team.thread * a.vocab;
  team.tasks(a.rows, [&](int64_t row) {
    const float* x = a.logits + row * a.stride;
    float maxima[kMaxima];
    int64_t found = collect<true>(x, a.vocab, bound_of_kth(x, a.vocab, a.k, maxima), keys);
    if (found > a.k) found = best_keys(keys, found, a.k, __builtin_inf(), false).count;
    sort_descending(keys, found);
    for (int64_t i = 0; i < a.k; ++i) {
      a.ids[row * a.k + i] = i < found ? id_of(keys[i]) : 0;
      a.values[row * a.k + i] = i < found ? x[id_of(keys[i])] : -__builtin_inff();
    }
  });
}
PHL_FIELDS(TopKArgs, logits, values, ids, scratch, rows, vocab, stride, k);
PHL_OP(top_k, TopKArgs);

struct SampleArgs {
  const float* logits;
  const float* temperature;
  const int32_t* top_k;  // below 1 or at least V: off
  const float *top_p, *min_p;
  const int64_t *seeds, *positions;
  int32_t* out;
  float* weights;  // [threads, vocab]
  uint64_t* keys;  // [threads, 2, vocab]
  int64_t rows, vocab, stride;
};

// splitmix64's output (Steele, Lea and Flood 2014) at state seed + golden * (position + 1); its upper 24 bits in [0, 1).
double uniform(uint64_t seed, uint64_t position) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * (position + 1);
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return double(z >> 40) * 0x1p-24;
}

// The token at which the running sum of weights passes target; the sums of blocks come first.
int64_t walk_blocks(const float* weights, int64_t n, const double* sums, double target) {
  int64_t block = 0;
  const int64_t blocks = (n + kDrawBlock - 1) / kDrawBlock;
  while (block + 1 < blocks && target >= sums[block]) target -= sums[block++];
  int64_t last = -1;
  for (int64_t i = block * kDrawBlock; i < n; ++i) {
    if (weights[i] <= 0.0f) continue;
    last = i;
    target -= double(weights[i]);
    if (target < 0) return i;
  }
  // Rounding ran past the end: the last token of any weight.
  for (int64_t i = n - 1; last < 0 && i >= 0; --i) last = weights[i] > 0.0f ? i : -1;
  return last;
}

// Draws among the keys (ids rising) at or above the cut.
int64_t walk_keys(const uint64_t* keys, int64_t n, uint64_t cut, double u) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += keys[i] >= cut ? double(weight_of(keys[i])) : 0.0;
  double target = u * total;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] < cut) continue;
    last = id_of(keys[i]);
    target -= double(weight_of(keys[i]));
    if (target < 0) break;
  }
  return last;
}

int64_t draw(const SampleArgs& a, int64_t row, float* weights, uint64_t* keys) {
  const float* x = a.logits + row * a.stride;
  const int64_t vocab = a.vocab;
  const Top top = find_top(x, vocab);
  const float temperature = a.temperature[row];
  const int64_t k = a.top_k[row] > 0 && a.top_k[row] < vocab ? a.top_k[row] : vocab;
  if (temperature <= 0.0f || k == 1 || top.value - top.value != 0.0f) return top.index;
  // Weights e^((x - top) / temperature), the best one 1, and the sums of their blocks.
  double sums[kMaxDrawBlocks], total = 0;
  const float inverse = 1.0f / temperature;
  for (int64_t begin = 0, block = 0; begin < vocab; begin += kDrawBlock, ++block) {
    vf added{};
    const int64_t count = vocab - begin < kDrawBlock ? vocab - begin : kDrawBlock;
    over_vectors(x + begin, count, -__builtin_inff(), [&](int64_t i, vf v) {
      const vf e = exp((v - top.value) * inverse);
      added += e;
      if (i + W <= count) store(weights + begin + i, e);
      else store_n(weights + begin + i, e, count - i);
    });
    total += sums[block] = double(sum(added));
  }
  const double u = uniform(uint64_t(a.seeds[row]), uint64_t(a.positions[row]));
  const float top_p = a.top_p[row], min_p = a.min_p[row];
  if (k == vocab && top_p >= 1.0f && min_p <= 0.0f) return walk_blocks(weights, vocab, sums, u * total);
  // No token below the bound can be kept: fewer than k are above it, or those below weigh less than 1 - top_p together.
  // min-p comes last: with top-k before it, top-p still counts what min-p will drop.
  float bound = 1e-37f;
  if (min_p > bound && (k == vocab || top_p >= 1.0f)) bound = min_p;
  if (k < vocab) {
    float maxima[kMaxima];
    const float kth = bound_of_kth(weights, vocab, k, maxima);
    bound = kth > bound ? kth : bound;
  } else if (top_p < 1.0f) {
    const float tail = float((1.0 - double(top_p)) * total / double(vocab) * 0.99);
    bound = tail > bound ? tail : bound;
  }
  const int64_t found = collect<false>(weights, vocab, bound, keys);
  uint64_t* order = keys + vocab;
  std::memcpy(order, keys, size_t(found) * 8);
  Best best{found, total, 0};
  if (k < vocab) best = best_keys(order, found, k, __builtin_inf(), false);
  if (top_p < 1.0f) best = best_keys(order, best.count, vocab, double(top_p) * best.mass, true);
  const uint64_t floor = weight_key(min_p > 0.0f ? min_p : 0.0f, 0xFFFFFFFF);
  return walk_keys(keys, found, floor > best.cut ? floor : best.cut, u);
}

void sample(const SampleArgs& a, Team& team) {
  team.tasks(a.rows, [&](int64_t row) {
    a.out[row] = int32_t(draw(a, row, a.weights + team.thread * a.vocab, a.keys + team.thread * 2 * a.vocab));
  });
}
PHL_FIELDS(SampleArgs, logits, temperature, top_k, top_p, min_p, seeds, positions, out, weights, keys, rows, vocab,
           stride);
PHL_OP(sample, SampleArgs);

constexpr int64_t kMaxVocab = kDrawBlock * kMaxDrawBlocks;
PHL_CONSTANT(sample, kMaxVocab);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
