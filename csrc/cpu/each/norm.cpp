// RMSNorm (Zhang and Sennrich 2019), alone and after a residual addition.
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

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
