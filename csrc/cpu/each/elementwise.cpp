// Elementwise ops over float32 rows. Legend: T rows, N features; strides count elements.
#include "../op.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kGrain = 2048;  // elements that are worth a thread

// f(row, begin, end) over [rows, n]; rows are shared out, or the columns of a single row.
template <class F>
PHL_INLINE void over_rows(Team& team, int64_t rows, int64_t n, F&& f) {
  if (rows == 1) {
    team.split((n + W - 1) / W, kGrain / W, [&](int64_t begin, int64_t end) {
      f(0, begin * W, end * W < n ? end * W : n);
    });
    return;
  }
  team.split(rows, (kGrain + n - 1) / (n > 0 ? n : 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row, 0, n);
  });
}

// out[i] = f(x[i], y[i]) for i in [begin, end).
template <class F>
PHL_INLINE void map2(float* out, const float* x, const float* y, int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + W <= end; i += W) store(out + i, f(load(x + i), load(y + i)));
  if (i < end) store_n(out + i, f(load_n(x + i, end - i), load_n(y + i, end - i)), end - i);
}

struct AddArgs {
  const float *x, *y;
  float* out;
  int64_t rows, n, x_stride, y_stride, out_stride;
};

void add(const AddArgs& a, Team& team) {
  over_rows(team, a.rows, a.n, [&](int64_t row, int64_t begin, int64_t end) {
    map2(a.out + row * a.out_stride, a.x + row * a.x_stride, a.y + row * a.y_stride, begin, end,
         [](vf x, vf y) { return x + y; });
  });
}
PHL_FIELDS(AddArgs, x, y, out, rows, n, x_stride, y_stride, out_stride);
PHL_OP(add, AddArgs);

struct GatedArgs {
  const float* x;  // [rows, 2n]: gate, up
  float* out;
  int64_t rows, n, x_stride, out_stride;
};

PHL_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }

// 0.5 x (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
PHL_INLINE vf gelu_tanh(vf x) {
  const vf u = x * (1.5957691216057308f + 0.071354816272600246f * x * x);
  return x / (1.0f + exp(-u));
}

void silu_and_mul(const GatedArgs& a, Team& team) {
  over_rows(team, a.rows, a.n, [&](int64_t row, int64_t begin, int64_t end) {
    const float* x = a.x + row * a.x_stride;
    map2(a.out + row * a.out_stride, x, x + a.n, begin, end, [](vf gate, vf up) { return silu(gate) * up; });
  });
}
PHL_FIELDS(GatedArgs, x, out, rows, n, x_stride, out_stride);
PHL_OP(silu_and_mul, GatedArgs);

void gelu_tanh_and_mul(const GatedArgs& a, Team& team) {
  over_rows(team, a.rows, a.n, [&](int64_t row, int64_t begin, int64_t end) {
    const float* x = a.x + row * a.x_stride;
    map2(a.out + row * a.out_stride, x, x + a.n, begin, end, [](vf gate, vf up) { return gelu_tanh(gate) * up; });
  });
}
PHL_OP(gelu_tanh_and_mul, GatedArgs);

// 0.5 x (1 + erf(x / sqrt 2)) = max(x, 0) - |x| r, r = 0.5 erfc(|x| / sqrt 2), by a rational approximation of absolute
// error 1.5e-7 (Abramowitz and Stegun, 7.1.26).
PHL_INLINE vf gelu_exact(vf x) {
  const vf size = max(x, -x);
  const vf t = 1.0f / (1.0f + 0.23164190f * size);
  const vf series = t * (0.127414796f + t * (-0.142248368f + t * (0.710706871f + t * (-0.726576014f + t * 0.530702715f))));
  return max(x, splat(0.0f)) - size * series * exp(-0.5f * size * size);
}

void gelu(const GatedArgs& a, Team& team) {
  over_rows(team, a.rows, a.n, [&](int64_t row, int64_t begin, int64_t end) {
    const float* x = a.x + row * a.x_stride;
    map2(a.out + row * a.out_stride, x, x, begin, end, [](vf v, vf) { return gelu_exact(v); });
  });
}
PHL_OP(gelu, GatedArgs);

struct SoftcapArgs {
  const float* x;
  float* out;
  int64_t rows, n, x_stride, out_stride;
  double cap;
};

void softcap(const SoftcapArgs& a, Team& team) {
  const float cap = float(a.cap), inverse = 1.0f / cap;
  over_rows(team, a.rows, a.n, [&](int64_t row, int64_t begin, int64_t end) {
    const float* x = a.x + row * a.x_stride;
    map2(a.out + row * a.out_stride, x, x, begin, end, [&](vf v, vf) { return tanh(v * inverse) * cap; });
  });
}
PHL_FIELDS(SoftcapArgs, x, out, rows, n, x_stride, out_stride, cap);
PHL_OP(softcap, SoftcapArgs);

struct SelectRowsArgs {
  const float* x;     // [T, n]
  const void* index;  // [rows] int64 or int32
  float* out;         // [rows, n]
  int64_t index64, rows, n, x_stride;
};

void select_rows(const SelectRowsArgs& a, Team& team) {
  over_rows(team, a.rows, a.n, [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t from = a.index64 ? static_cast<const int64_t*>(a.index)[row] : static_cast<const int32_t*>(a.index)[row];
    std::memcpy(a.out + row * a.n + begin, a.x + from * a.x_stride + begin, (end - begin) * sizeof(float));
  });
}
PHL_FIELDS(SelectRowsArgs, x, index, out, index64, rows, n, x_stride);
PHL_OP(select_rows, SelectRowsArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
