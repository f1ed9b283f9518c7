// Around recurrent and latent mixers: states fetched and put away, factors, gates and the steps that states go by.
// Legend: T rows, N features; strides count elements.
#include "../op.h"
#include "norm_row.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kGrain = 2048;  // elements that are worth a thread

PHL_INLINE vf some(const float* p, int64_t n) { return n >= W ? load(p) : load_n(p, n); }
PHL_INLINE void put(float* p, vf v, int64_t n) {
  if (n >= W) store(p, v);
  else store_n(p, v, n);
}
PHL_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
PHL_INLINE float softplus(float x) { return x > 20.0f ? x : __builtin_log1pf(exp(splat(x))[0]); }

template <class F>
PHL_INLINE void by_row(Team& team, int64_t rows, int64_t n, F&& f) {
  team.split(rows, (kGrain + n - 1) / (n > 0 ? n : 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

struct StatesArgs {
  float *pool, *out;  // [states, n]: read_states reads the first, write_states writes it; [rows, n]
  const int64_t* index;
  const uint8_t* fresh;  // rows that read zeros; null: none
  int64_t rows, n, stride;
};

// Parts of a row are shared out too: a state is large, and rows may be few.
template <class F>
PHL_INLINE void over_states(const StatesArgs& a, Team& team, F&& f) {
  const int64_t parts = (a.n + kGrain - 1) / kGrain;
  team.split(a.rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / parts, from = i % parts * kGrain;
      f(row, from, a.n - from < kGrain ? a.n - from : kGrain);
    }
  });
}

void read_states(const StatesArgs& a, Team& team) {
  over_states(a, team, [&](int64_t row, int64_t from, int64_t count) {
    float* to = a.out + row * a.n + from;
    if (a.fresh != nullptr && a.fresh[row] != 0) std::memset(to, 0, size_t(count) * sizeof(float));
    else std::memcpy(to, a.pool + a.index[row] * a.stride + from, size_t(count) * sizeof(float));
  });
}
PHL_FIELDS(StatesArgs, pool, out, index, fresh, rows, n, stride);
PHL_OP(read_states, StatesArgs);

void write_states(const StatesArgs& a, Team& team) {
  over_states(a, team, [&](int64_t row, int64_t from, int64_t count) {
    std::memcpy(a.pool + a.index[row] * a.stride + from, a.out + row * a.n + from, size_t(count) * sizeof(float));
  });
}
PHL_OP(write_states, StatesArgs);

struct JoinArgs {
  const float *x, *y;
  float* out;  // [rows, n + m]
  int64_t rows, n, m, x_stride, y_stride;
};

void join(const JoinArgs& a, Team& team) {
  by_row(team, a.rows, a.n + a.m, [&](int64_t row) {
    float* to = a.out + row * (a.n + a.m);
    std::memcpy(to, a.x + row * a.x_stride, size_t(a.n) * sizeof(float));
    std::memcpy(to + a.n, a.y + row * a.y_stride, size_t(a.m) * sizeof(float));
  });
}
PHL_FIELDS(JoinArgs, x, y, out, rows, n, m, x_stride, y_stride);
PHL_OP(join, JoinArgs);

struct ScaleArgs {
  const float *x, *factors;  // [rows, n]; [rows], or null: `factor` for all
  float* out;
  int64_t rows, n, x_stride;
  double factor;
};

void scale(const ScaleArgs& a, Team& team) {
  by_row(team, a.rows, a.n, [&](int64_t row) {
    const float factor = a.factors == nullptr ? float(a.factor) : a.factors[row], *x = a.x + row * a.x_stride;
    for (int64_t i = 0; i < a.n; i += W) put(a.out + row * a.n + i, some(x + i, a.n - i) * factor, a.n - i);
  });
}
PHL_FIELDS(ScaleArgs, x, factors, out, rows, n, x_stride, factor);
PHL_OP(scale, ScaleArgs);

struct MulArgs {
  const float *x, *y;  // [rows, parts, n]
  float* out;          // the same, contiguous
  int64_t rows, parts, n, x_stride, y_stride, x_part, y_part, single;  // single: y has one number for each part
};

// out[i] = f(x, y) for W numbers at a time.
template <class F>
PHL_INLINE void over_parts(const MulArgs& a, Team& team, F&& f) {
  by_row(team, a.rows * a.parts, a.n, [&](int64_t piece) {
    const int64_t row = piece / a.parts, part = piece % a.parts;
    const float *x = a.x + row * a.x_stride + part * a.x_part, *y = a.y + row * a.y_stride + part * a.y_part;
    float* out = a.out + piece * a.n;
    for (int64_t i = 0; i < a.n; i += W) {
      put(out + i, f(some(x + i, a.n - i), a.single ? splat(*y) : some(y + i, a.n - i)), a.n - i);
    }
  });
}

void mul(const MulArgs& a, Team& team) {
  over_parts(a, team, [](vf x, vf y) { return x * y; });
}
PHL_FIELDS(MulArgs, x, y, out, rows, parts, n, x_stride, y_stride, x_part, y_part, single);
PHL_OP(mul, MulArgs);

void sigmoid_mul(const MulArgs& a, Team& team) {
  over_parts(a, team, [](vf x, vf y) { return x * sigmoid(y); });
}
PHL_OP(sigmoid_mul, MulArgs);

struct GatedNormArgs {
  const float *x, *gate, *weight;  // [rows, parts, n] twice, [parts, n], or [n] with a step of 0
  float* out;                      // [rows, parts, n] contiguous
  int64_t rows, parts, n, x_stride, gate_stride, x_part, gate_part, weight_part, norm_first;
  double eps;
};

void gated_rms_norm(const GatedNormArgs& a, Team& team) {
  by_row(team, a.rows * a.parts, a.n, [&](int64_t piece) {
    const int64_t row = piece / a.parts, part = piece % a.parts;
    const float *x = a.x + row * a.x_stride + part * a.x_part, *gate = a.gate + row * a.gate_stride + part * a.gate_part;
    const float* weight = a.weight + part * a.weight_part;
    float* out = a.out + piece * a.n;
    const auto open = [&](int64_t i) {
      const vf g = some(gate + i, a.n - i);
      return g * sigmoid(g);
    };
    if (a.norm_first) {
      norm_row<false>(x, nullptr, weight, nullptr, out, a.n, float(a.eps));
      for (int64_t i = 0; i < a.n; i += W) put(out + i, some(out + i, a.n - i) * open(i), a.n - i);
    } else {
      for (int64_t i = 0; i < a.n; i += W) put(out + i, some(x + i, a.n - i) * open(i), a.n - i);
      norm_row<false>(out, nullptr, weight, nullptr, out, a.n, float(a.eps));
    }
  });
}
PHL_FIELDS(GatedNormArgs, x, gate, weight, out, rows, parts, n, x_stride, gate_stride, x_part, gate_part, weight_part,
           norm_first, eps);
PHL_OP(gated_rms_norm, GatedNormArgs);

struct StepSizesArgs {
  const float *x, *bias;  // [rows, n], [n]
  float* out;
  int64_t rows, n, x_stride;
  double lowest, highest;
};

void step_sizes(const StepSizesArgs& a, Team& team) {
  const float low = float(a.lowest), high = float(a.highest);
  by_row(team, a.rows, 8 * a.n, [&](int64_t row) {
    for (int64_t i = 0; i < a.n; ++i) {
      const float dt = softplus(a.x[row * a.x_stride + i] + a.bias[i]);
      a.out[row * a.n + i] = dt < low ? low : dt > high ? high : dt;
    }
  });
}
PHL_FIELDS(StepSizesArgs, x, bias, out, rows, n, x_stride, lowest, highest);
PHL_OP(step_sizes, StepSizesArgs);

struct DecaysArgs {
  const float* log;
  float* out;
  int64_t n;
};

void decays(const DecaysArgs& a, Team& team) {
  team.split((a.n + W - 1) / W, kGrain / W, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * W; i < end * W && i < a.n; i += W) put(a.out + i, -exp(some(a.log + i, a.n - i)), a.n - i);
  });
}
PHL_FIELDS(DecaysArgs, log, out, n);
PHL_OP(decays, DecaysArgs);

struct DeltaGatesArgs {
  const float *a, *b, *bias, *log;  // [rows, heads, n], [rows, heads], [heads, n], [heads]
  float *decay, *beta;              // [rows, heads, n], [rows, heads]
  int64_t rows, heads, n, a_stride, b_stride;
};

void delta_gates(const DeltaGatesArgs& a, Team& team) {
  by_row(team, a.rows * a.heads, 8 * a.n, [&](int64_t piece) {
    const int64_t row = piece / a.heads, head = piece % a.heads;
    const float rate = -exp(splat(a.log[head]))[0], *from = a.a + row * a.a_stride + head * a.n;
    for (int64_t i = 0; i < a.n; ++i) a.decay[piece * a.n + i] = rate * softplus(from[i] + a.bias[head * a.n + i]);
    a.beta[piece] = sigmoid(splat(a.b[row * a.b_stride + head]))[0];
  });
}
PHL_FIELDS(DeltaGatesArgs, a, b, bias, log, decay, beta, rows, heads, n, a_stride, b_stride);
PHL_OP(delta_gates, DeltaGatesArgs);

struct RepeatHeadsArgs {
  const float* x;  // [tokens, heads, n] contiguous
  float* out;      // [tokens, heads * share, n]
  int64_t tokens, heads, share, n, tiled;
};

void repeat_heads(const RepeatHeadsArgs& a, Team& team) {
  const int64_t heads = a.heads * a.share;
  by_row(team, a.tokens, heads * a.n, [&](int64_t token) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t from = a.tiled ? head % a.heads : head / a.share;
      std::memcpy(a.out + (token * heads + head) * a.n, a.x + (token * a.heads + from) * a.n, size_t(a.n) * sizeof(float));
    }
  });
}
PHL_FIELDS(RepeatHeadsArgs, x, out, tokens, heads, share, n, tiled);
PHL_OP(repeat_heads, RepeatHeadsArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
