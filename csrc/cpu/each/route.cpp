// Which experts each token goes to, for routers that `moe` does not know: sigmoid scores, a correction that decides who
// is chosen but weighs nothing, and groups of experts of which the best take part. See `reference_models.route`.
#include "moe_route.h"

#include "../op.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kMostExperts = 1024;

struct RouteArgs {
  const float *logits, *bias;  // [T, E], [E] or null
  int32_t* ids;                // [T, k]
  float* weights;              // [T, k]
  int64_t tokens, experts, choices, sigmoid, renormalise, groups, keep, group_best, logits_stride;
  double eps, floor, scale;
};

// Scores of all experts; `out` has room for whole vectors.
PHL_INLINE void scores_of(const RouteArgs& a, const float* logits, float* out) {
  float peak = -__builtin_inff(), total = 0.0f;
  if (!a.sigmoid) {
    for (int64_t e = 0; e < a.experts; ++e) peak = logits[e] > peak ? logits[e] : peak;
  }
  for (int64_t e = 0; e < a.experts; e += W) {
    const int64_t n = a.experts - e < W ? a.experts - e : W;
    float space[W];
    if (a.sigmoid) {
      for (int i = 0; i < W; ++i) space[i] = i < n ? -logits[e + i] : 0.0f;
      store(out + e, splat(1.0f) / (splat(1.0f) + exp(load(space))));
    } else {
      total += exponentials(logits + e, n, peak, space);
      for (int i = 0; i < W; ++i) out[e + i] = space[i];
    }
  }
  for (int64_t e = 0; !a.sigmoid && e < a.experts; ++e) out[e] /= total;
}

// -inf outside the groups that are kept: those with the largest sum of their best.
PHL_INLINE void within_groups(const RouteArgs& a, float* rank) {
  const int64_t size = a.experts / a.groups;
  float value[kMostExperts];
  int32_t best[kMostExperts];
  bool kept[kMostExperts] = {};
  for (int64_t g = 0; g < a.groups; ++g) {
    choose(rank + g * size, size, a.group_best, best);
    value[g] = 0.0f;
    for (int64_t i = 0; i < a.group_best; ++i) value[g] += rank[g * size + best[i]];
  }
  choose(value, a.groups, a.keep, best);
  for (int64_t i = 0; i < a.keep; ++i) kept[best[i]] = true;
  for (int64_t e = 0; e < a.experts; ++e) {
    if (!kept[e / size]) rank[e] = -__builtin_inff();
  }
}

PHL_INLINE void route_token(const RouteArgs& a, int64_t t) {
  float score[kMostExperts + W], rank[kMostExperts];
  int32_t* ids = a.ids + t * a.choices;
  float *weights = a.weights + t * a.choices, total = 0.0f;
  scores_of(a, a.logits + t * a.logits_stride, score);
  for (int64_t e = 0; e < a.experts; ++e) rank[e] = a.bias == nullptr ? score[e] : score[e] + a.bias[e];
  if (a.groups > 1) within_groups(a, rank);
  choose(rank, a.experts, a.choices, ids);
  for (int64_t j = 0; j < a.choices; ++j) total += weights[j] = score[ids[j]];
  if (a.renormalise) {
    total += static_cast<float>(a.eps);
    if (a.floor > 0.0 && total < static_cast<float>(a.floor)) total = static_cast<float>(a.floor);
    for (int64_t j = 0; j < a.choices; ++j) weights[j] /= total;
  }
  for (int64_t j = 0; a.scale != 1.0 && j < a.choices; ++j) weights[j] *= static_cast<float>(a.scale);
}

void route_tokens(const RouteArgs& a, Team& team) {
  team.split(a.tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) route_token(a, t);
  });
}
PHL_FIELDS(RouteArgs, logits, bias, ids, weights, tokens, experts, choices, sigmoid, renormalise, groups, keep,
           group_best, logits_stride, eps, floor, scale);
PHL_OP(route_tokens, RouteArgs);
PHL_CONSTANT(route, kMostExperts);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
