// Elementwise ops over float32 rows. Legend: T rows, N features; `stride` counts elements between rows.
#include "../op.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kGrain = 2048;  // elements that are worth a thread

// f(x vector) or f(x, y) over [T, N]; rows are shared out when there are several, else columns.
template <class F>
PHL_INLINE void over_rows(Team& team, int64_t rows, int64_t n, F&& f) {
  if (rows == 1) {
    team.split((n + W - 1) / W, kGrain / W, [&](int64_t begin, int64_t end) {
      f(0, begin * W, end * W < n ? end * W : n);
    });
    return;
  }
  team.split(rows, (kGrain + n - 1) / n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row, 0, n);
  });
}

struct AddArgs {
  const float *x, *y;
  float* out;
  int64_t rows, n, x_stride, y_stride, out_stride;
};

void add(const AddArgs& a, Team& team) {
  over_rows(team, a.rows, a.n, [&](int64_t row, int64_t begin, int64_t end) {
    const float *x = a.x + row * a.x_stride, *y = a.y + row * a.y_stride;
    float* out = a.out + row * a.out_stride;
    int64_t i = begin;
    for (; i + W <= end; i += W) store(out + i, load(x + i) + load(y + i));
    if (i < end) store_n(out + i, load_n(x + i, end - i) + load_n(y + i, end - i), end - i);
  });
}
PHL_OP(add, AddArgs, "ppp iiiii");

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
