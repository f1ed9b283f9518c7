// Linear layers over packed weights: y = x W^T, with RMS norm before and activation, residual or arg-max after.
#include "../linear/job.h"
#include "../op.h"

namespace phl {
namespace PHL_NS {
namespace {

struct LinearArgs {
  const float *x, *addend, *norm;  // input: norm(x + addend); null: absent
  float* sum;                      // x + addend, or null
  const Segment* segments;
  const float *bias, *residual;
  float* out;
  uint8_t* workspace;  // 64-byte aligned; see native_linear.py for its size
  int64_t rows, inputs, x_stride, addend_stride, sum_stride, out_stride, residual_stride;
  int64_t segment_count, kinds, padded_inputs, panel_rows, tile_bytes;
  int64_t alone;    // each thread prepares all rows for itself: cheaper than a barrier when they are few
  int64_t threads;  // that the workspace has room for; more of them wait
  int64_t epilogue;
  double eps;
};

PHL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Panels of rows: prepare (quantise), then multiply. Two panels alternate, so that one barrier a panel is enough.
// f(rows of the panel, first row, count) multiplies a thread's share.
template <class A, class G>
PHL_INLINE void over_panels(const A& a, Team& team, const Input& in, uint8_t* space, G&& f) {
  Rows rows(space, a.padded_inputs, a.kinds);
  if (a.alone) {
    rows.base += team.thread * a.rows * rows.row_bytes;
    if (team.thread < a.threads) {
      for (int64_t row = 0; row < a.rows; ++row) prepare_row(in, row, rows, row, team.thread == 0);
    }
    f(rows, 0, a.rows);
    return;
  }
  for (int64_t first = 0, turn = 0; first < a.rows; first += a.panel_rows, turn ^= 1) {
    const int64_t count = smaller(a.panel_rows, a.rows - first);
    rows.base = space + turn * a.panel_rows * rows.row_bytes;
    team.split(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) prepare_row(in, first + row, rows, row, true);
    });
    team.barrier();
    f(rows, first, count);
  }
}

// Multiplies this thread's blocks; threads without workspace have none.
template <class A>
PHL_INLINE void multiply(const A& a, const Team& team, int size, const Rows& rows, int64_t count, const Output& out,
                         int64_t first) {
  if (team.thread >= size) return;
  uint8_t* tile = a.workspace + team.thread * a.tile_bytes;
  own_blocks(a.segments, a.segment_count, team.thread, size, [&](const Segment& s, int64_t begin, int64_t end) {
    run_blocks(s, begin, end, rows, count, out, first, tile);
  });
}

void linear(const LinearArgs& a, Team& team) {
  const int size = static_cast<int>(smaller(team.size, a.threads));
  const Input in{a.x, a.addend, a.norm, a.sum, a.inputs, a.x_stride, a.addend_stride, a.sum_stride, float(a.eps)};
  const Output out{a.out, a.bias, a.residual, a.out_stride, a.residual_stride, a.epilogue, nullptr, nullptr};
  over_panels(a, team, in, a.workspace + size * a.tile_bytes, [&](const Rows& rows, int64_t first, int64_t count) {
    multiply(a, team, size, rows, count, out, first);
  });
}
PHL_OP(linear, LinearArgs, "pppp p pp p p iiiiiii iiiii ii i d");

// The head with arg-max: the token of the largest logit (the first of equals), and that logit.
struct LinearArgmaxArgs {
  const float *x, *addend, *norm;
  float* sum;
  const Segment* segments;
  const float* bias;
  int32_t* token;
  float* logit;  // or null
  uint8_t* workspace;
  int64_t rows, inputs, x_stride, addend_stride, sum_stride;
  int64_t segment_count, kinds, padded_inputs, panel_rows, tile_bytes, best_bytes;
  int64_t alone, threads;
  double eps;
};

// Best of all threads and lanes for one row of a panel.
PHL_INLINE void best_of(const uint8_t* best, int64_t best_bytes, int64_t panel_rows, int threads, int64_t row,
                        int32_t* token, float* logit) {
  float value = -__builtin_inff();
  int32_t index = 0;
  for (int t = 0; t < threads; ++t) {
    const auto* values = reinterpret_cast<const float*>(best + t * best_bytes);
    const auto* indices = reinterpret_cast<const int32_t*>(values + panel_rows * kBlock);
    for (int64_t i = row * kBlock; i < (row + 1) * kBlock; ++i) {
      if (values[i] > value || (values[i] == value && indices[i] < index)) value = values[i], index = indices[i];
    }
  }
  *token = index;
  if (logit != nullptr) *logit = value;
}

void linear_argmax(const LinearArgmaxArgs& a, Team& team) {
  const int size = static_cast<int>(smaller(team.size, a.threads));
  uint8_t* best = a.workspace + size * a.tile_bytes;
  const Input in{a.x, a.addend, a.norm, a.sum, a.inputs, a.x_stride, a.addend_stride, a.sum_stride, float(a.eps)};
  auto* values = reinterpret_cast<float*>(best + team.thread * a.best_bytes);
  auto* indices = reinterpret_cast<int32_t*>(values + a.panel_rows * kBlock);
  const Output out{nullptr, a.bias, nullptr, 0, 0, kBest, values, indices};
  over_panels(a, team, in, best + size * a.best_bytes, [&](const Rows& rows, int64_t first, int64_t count) {
    if (team.thread < size) {
      for (int64_t i = 0; i < count * kBlock; ++i) values[i] = -__builtin_inff(), indices[i] = INT32_MAX;
    }
    multiply(a, team, size, rows, count, out, 0);
    team.barrier();
    team.split(count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        best_of(best, a.best_bytes, a.panel_rows, size, r, a.token + first + r,
                a.logit == nullptr ? nullptr : a.logit + first + r);
      }
    });
    if (first + count < a.rows) team.barrier();
  });
}
PHL_OP(linear_argmax, LinearArgmaxArgs, "pppp p p p p p iiiii iiiiii ii d");

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
