// RMSNorm (Zhang and Sennrich 2019), alone and after a residual addition; layer norm.
#include "../op.h"
#include "norm_row.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kGrain = 2048;  // elements that are worth a thread

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
PHL_FIELDS(RmsNormArgs, x, weight, out, outer, inner, n, outer_stride, inner_stride, eps);
PHL_OP(rms_norm, RmsNormArgs);

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
PHL_FIELDS(AddRmsNormArgs, x, residual, weight, out, total, rows, n, x_stride, residual_stride, eps);
PHL_OP(add_rms_norm, AddRmsNormArgs);

struct LayerNormArgs {
  const float *x, *weight, *bias;  // bias may be null
  float* out;                      // [rows, n] contiguous
  int64_t rows, n, x_stride;
  double eps;
};

// Layer norm (Ba et al. 2016) of one row: its mean first, then what is left of it.
void layer_norm_row(const float* x, const LayerNormArgs& a, float* out) {
  const auto at = [](const float* p, int64_t left) { return left >= W ? load(p) : load_n(p, left); };
  vf total{}, square{};
  for (int64_t i = 0; i < a.n; i += W) total += at(x + i, a.n - i);
  const float mean = sum(total) / float(a.n);
  int64_t i = 0;
  for (; i + W <= a.n; i += W) square += (load(x + i) - mean) * (load(x + i) - mean);
  float rest = 0.0f;
  for (; i < a.n; ++i) rest += (x[i] - mean) * (x[i] - mean);
  const float scale = mean_square_to_scale(sum(square) + rest, a.n, float(a.eps));
  for (i = 0; i < a.n; i += W) {
    vf value = (at(x + i, a.n - i) - mean) * scale * at(a.weight + i, a.n - i);
    if (a.bias != nullptr) value += at(a.bias + i, a.n - i);
    if (a.n - i >= W) store(out + i, value);
    else store_n(out + i, value, a.n - i);
  }
}

void layer_norm(const LayerNormArgs& a, Team& team) {
  team.split(a.rows, (kGrain + a.n - 1) / a.n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) layer_norm_row(a.x + row * a.x_stride, a, a.out + row * a.n);
  });
}
PHL_FIELDS(LayerNormArgs, x, weight, bias, out, rows, n, x_stride, eps);
PHL_OP(layer_norm, LayerNormArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
