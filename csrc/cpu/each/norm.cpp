// RMSNorm (Zhang and Sennrich 2019), alone and after a residual addition.
#include "../op.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kGrain = 2048;  // elements that are worth a thread

PHL_INLINE float mean_square_to_scale(float square, int64_t n, float eps) {
  return 1.0f / __builtin_sqrtf(square / float(n) + eps);
}

// Reads x (plus residual, whose sum goes to total), then writes total * scale * weight to out.
template <bool kResidual>
PHL_INLINE void norm_row(const float* x, const float* residual, const float* weight, float* total, float* out, int64_t n,
                         float eps) {
  vf square0{}, square1{};
  int64_t i = 0;
  const auto value = [&](int64_t at, int64_t count) {
    vf v = count == W ? load(x + at) : load_n(x + at, count);
    if constexpr (kResidual) {
      v += count == W ? load(residual + at) : load_n(residual + at, count);
      if (count == W) store(total + at, v);
      else store_n(total + at, v, count);
    }
    return v;
  };
  for (; i + 2 * W <= n; i += 2 * W) {
    const vf v0 = value(i, W), v1 = value(i + W, W);
    square0 += v0 * v0;
    square1 += v1 * v1;
  }
  for (; i < n; i += W) {
    const vf v = value(i, n - i < W ? n - i : W);
    square0 += v * v;
  }
  const float scale = mean_square_to_scale(sum(square0 + square1), n, eps);
  const float* from = kResidual ? total : x;
  for (i = 0; i + W <= n; i += W) store(out + i, load(from + i) * scale * load(weight + i));
  if (i < n) store_n(out + i, load_n(from + i, n - i) * scale * load_n(weight + i, n - i), n - i);
}

struct RmsNormArgs {
  const float *x, *weight;
  float* out;                            // [outer, inner, n] contiguous
  int64_t outer, inner, n, outer_stride, inner_stride;
  double eps;
};

void rms_norm(const RmsNormArgs& a, Team& team) {
  team.split(a.outer * a.inner, (kGrain + a.n - 1) / a.n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = a.x + row / a.inner * a.outer_stride + row % a.inner * a.inner_stride;
      norm_row<false>(x, nullptr, a.weight, nullptr, a.out + row * a.n, a.n, float(a.eps));
    }
  });
}
PHL_OP(rms_norm, RmsNormArgs, "ppp iiiii d");

struct AddRmsNormArgs {
  const float *x, *residual, *weight;
  float *out, *total;  // [rows, n] contiguous
  int64_t rows, n, x_stride, residual_stride;
  double eps;
};

void add_rms_norm(const AddRmsNormArgs& a, Team& team) {
  team.split(a.rows, (kGrain + a.n - 1) / a.n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      norm_row<true>(a.x + row * a.x_stride, a.residual + row * a.residual_stride, a.weight, a.total + row * a.n,
                     a.out + row * a.n, a.n, float(a.eps));
    }
  });
}
PHL_OP(add_rms_norm, AddRmsNormArgs, "ppppp iiii d");

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
