// RMSNorm of one row, shared by the ops that have one inside.
#pragma once
#include "../simd.h"

namespace phl {
namespace PHL_NS {

PHL_INLINE float mean_square_to_scale(float square, int64_t n, float eps) {
  return 1.0f / __builtin_sqrtf(square / float(n) + eps);
}

// 1 / root mean square of x (plus residual, whose sum goes to total unless that is null). The one place that adds up
// squares: a norm inside a linear layer gives the bits of one before it.
template <bool kResidual>
PHL_INLINE float row_scale(const float* x, const float* residual, float* total, int64_t n, float eps) {
  vf square0{}, square1{};
  int64_t i = 0;
  const auto value = [&](int64_t at, int64_t count) {
    vf v = count == W ? load(x + at) : load_n(x + at, count);
    if constexpr (kResidual) {
      v += count == W ? load(residual + at) : load_n(residual + at, count);
      if (total == nullptr) return v;
      if (count == W) store(total + at, v);
      else store_n(total + at, v, count);
    }
    return v;
  };
  for (; i + 2 * W <= n; i += 2 * W) {
    const vf v0 = value(i, W), v1 = value(i + W, W);
    square0 = fused(v0, v0, square0);
    square1 = fused(v1, v1, square1);
  }
  for (; i < n; i += W) {
    const vf v = value(i, n - i < W ? n - i : W);
    square0 = fused(v, v, square0);
  }
  return mean_square_to_scale(sum(square0 + square1), n, eps);
}

// Reads x (plus residual, whose sum goes to total), then writes total * scale * weight to out, which may be x.
template <bool kResidual>
PHL_INLINE void norm_row(const float* x, const float* residual, const float* weight, float* total, float* out, int64_t n,
                         float eps) {
  const float scale = row_scale<kResidual>(x, residual, total, n, eps);
  const float* from = kResidual ? total : x;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(from + i) * scale * load(weight + i));
  if (i < n) store_n(out + i, load_n(from + i, n - i) * scale * load_n(weight + i, n - i), n - i);
}

}  // namespace PHL_NS
}  // namespace phl
