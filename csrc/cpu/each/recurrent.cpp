// Recurrent mixers: causal convolution, the scans of Mamba 1 (Gu and Dao 2023) and Mamba 2 (Dao and Gu 2024), and the
// gated delta rule (Yang et al. 2024; with a decay of each entry of a key, Kimi Delta Attention, 2025).
//
// Tokens of row r are [query_start[r], query_start[r + 1]). A row's state is worked on where it goes to, so that what was
// read stays as it was. A row and head (or a block of channels) is one piece of work, token after token: neither the
// threads nor the other rows of a step change a bit of it.
#include "../op.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kMaxTaps = 16;
constexpr int64_t kMaxKey = 1024;  // entries of a key: a block of the state's columns lies on the stack
PHL_CONSTANT(recurrent, kMaxTaps);
PHL_CONSTANT(recurrent, kMaxKey);

PHL_INLINE vf load_some(const float* p, int64_t n) { return n >= W ? load(p) : load_n(p, n); }
PHL_INLINE void store_some(float* p, vf v, int64_t n) {
  if (n >= W) store(p, v);
  else store_n(p, v, n);
}

struct ConvArgs {
  const float *x, *weight, *bias, *state;  // [tokens, channels], [channels, taps], null or [channels]
  float *out, *after;                      // [tokens, channels]; states are [rows, channels, taps - 1]
  const int32_t* query_start;
  int64_t rows, channels, taps, x_stride, silu;
};

// One block of W channels of one row.
void convolve(const ConvArgs& a, int64_t row, int64_t from, int64_t count) {
  vf taps[kMaxTaps], seen[kMaxTaps];
  const int64_t last = a.taps - 1;
  for (int64_t j = 0; j < a.taps; ++j) {
    for (int64_t c = 0; c < W; ++c) {
      taps[j][c] = c < count ? a.weight[(from + c) * a.taps + j] : 0.0f;
      if (j < last) seen[j][c] = c < count ? a.state[(row * a.channels + from + c) * last + j] : 0.0f;
    }
  }
  const vf bias = a.bias == nullptr ? vf{} : load_some(a.bias + from, count);
  for (int64_t t = a.query_start[row]; t < a.query_start[row + 1]; ++t) {
    seen[last] = load_some(a.x + t * a.x_stride + from, count);
    vf y = bias;
    for (int64_t j = 0; j < a.taps; ++j) y += taps[j] * seen[j];
    if (a.silu) y = y / (1.0f + exp(-y));
    store_some(a.out + t * a.channels + from, y, count);
    for (int64_t j = 0; j < last; ++j) seen[j] = seen[j + 1];
  }
  for (int64_t j = 0; j < last; ++j) {
    for (int64_t c = 0; c < count && c < W; ++c) a.after[(row * a.channels + from + c) * last + j] = seen[j][c];
  }
}

void causal_conv(const ConvArgs& a, Team& team) {
  const int64_t blocks = (a.channels + W - 1) / W;
  team.split(a.rows * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t from = piece % blocks * W;
      convolve(a, piece / blocks, from, a.channels - from);
    }
  });
}
PHL_FIELDS(ConvArgs, x, weight, bias, state, out, after, query_start, rows, channels, taps, x_stride, silu);
PHL_OP(causal_conv, ConvArgs);

struct ScanArgs {
  const float *x, *dt, *decay, *b, *c, *skip, *state;  // [tokens, heads, size], [tokens, heads], [heads], [.., groups, n]
  float *out, *after;                                  // [tokens, heads, size]; states are [rows, heads, size, n]
  const int32_t* query_start;
  int64_t rows, heads, size, groups, n, x_stride, b_stride, c_stride;
};

void mamba2_scan(const ScanArgs& a, Team& team) {
  const int64_t width = a.size * a.n, share = a.heads / a.groups;
  team.split(a.rows * a.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / a.heads, head = piece % a.heads, group = head / share;
      float* state = a.after + piece * width;
      __builtin_memcpy(state, a.state + piece * width, size_t(width) * sizeof(float));
      for (int64_t t = a.query_start[row]; t < a.query_start[row + 1]; ++t) {
        const float dt = a.dt[t * a.heads + head];
        const float kept = exp(splat(dt * a.decay[head]))[0];
        const float* x = a.x + t * a.x_stride + head * a.size;
        const float* b = a.b + t * a.b_stride + group * a.n;
        const float* c = a.c + t * a.c_stride + group * a.n;
        float* out = a.out + (t * a.heads + head) * a.size;
        for (int64_t d = 0; d < a.size; ++d) {
          const float added = dt * x[d];
          float* h = state + d * a.n;
          vf y{};
          for (int64_t s = 0; s < a.n; s += W) {
            const vf value = load_some(h + s, a.n - s) * kept + load_some(b + s, a.n - s) * added;
            store_some(h + s, value, a.n - s);
            y += value * load_some(c + s, a.n - s);
          }
          out[d] = sum(y) + a.skip[head] * x[d];
        }
      }
    }
  });
}
PHL_FIELDS(ScanArgs, x, dt, decay, b, c, skip, state, out, after, query_start, rows, heads, size, groups, n, x_stride,
           b_stride, c_stride);
PHL_OP(mamba2_scan, ScanArgs);

struct SelectiveArgs {
  const float *x, *dt, *decay, *b, *c, *skip, *state;  // [tokens, channels] twice, [channels, n], [tokens, n] twice
  float *out, *after;                                  // [tokens, channels]; states are [rows, channels, n]
  const int32_t* query_start;
  int64_t rows, channels, n, x_stride, b_stride, c_stride;
};

void selective_scan(const SelectiveArgs& a, Team& team) {
  team.split(a.rows * a.channels, 8, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / a.channels, channel = piece % a.channels;
      const float* decay = a.decay + channel * a.n;
      float* h = a.after + piece * a.n;
      __builtin_memcpy(h, a.state + piece * a.n, size_t(a.n) * sizeof(float));
      for (int64_t t = a.query_start[row]; t < a.query_start[row + 1]; ++t) {
        const float dt = a.dt[t * a.channels + channel], x = a.x[t * a.x_stride + channel];
        const float *b = a.b + t * a.b_stride, *c = a.c + t * a.c_stride;
        vf y{};
        for (int64_t s = 0; s < a.n; s += W) {
          const vf kept = exp(load_some(decay + s, a.n - s) * dt);
          const vf value = load_some(h + s, a.n - s) * kept + load_some(b + s, a.n - s) * (dt * x);
          store_some(h + s, value, a.n - s);
          y += value * load_some(c + s, a.n - s);
        }
        a.out[t * a.channels + channel] = sum(y) + a.skip[channel] * x;
      }
    }
  });
}
PHL_FIELDS(SelectiveArgs, x, dt, decay, b, c, skip, state, out, after, query_start, rows, channels, n, x_stride,
           b_stride, c_stride);
PHL_OP(selective_scan, SelectiveArgs);

struct DeltaArgs {
  const float *q, *k, *v, *decay, *beta, *state;  // [tokens, heads, n] twice, [tokens, heads, size], [tokens, heads]
                                                  // twice; by_entry: decay is [tokens, heads, n]
  float *out, *after;                             // [tokens, heads, size]; states are [rows, heads, n, size]
  const int32_t* query_start;
  int64_t rows, heads, n, size, q_stride, k_stride, v_stride, by_entry;
  double scale;
};

// The sum over n of key[s] * columns[s], in four parts whose order is fixed.
PHL_INLINE vf over_keys(const float* key, const vf* columns, int64_t n) {
  vf part[4] = {};
  int64_t s = 0;
  for (; s + 4 <= n; s += 4) {
    for (int i = 0; i < 4; ++i) part[i] += columns[s + i] * key[s + i];
  }
  for (; s < n; ++s) part[0] += columns[s] * key[s];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// W columns of one head's state: they know nothing of the others.
void delta_columns(const DeltaArgs& a, int64_t row, int64_t head, int64_t from) {
  const int64_t count = a.size - from, base = (row * a.heads + head) * a.n;
  vf columns[kMaxKey];
  for (int64_t s = 0; s < a.n; ++s) columns[s] = load_some(a.state + (base + s) * a.size + from, count);
  for (int64_t t = a.query_start[row]; t < a.query_start[row + 1]; ++t) {
    const float* q = a.q + t * a.q_stride + head * a.n;
    const float* k = a.k + t * a.k_stride + head * a.n;
    const float beta = a.beta[t * a.heads + head];
    if (a.by_entry) {
      const float* decay = a.decay + (t * a.heads + head) * a.n;
      for (int64_t s = 0; s < a.n; s += W) {
        const vf kept = exp(load_some(decay + s, a.n - s));
        for (int64_t i = 0; i < W && s + i < a.n; ++i) columns[s + i] *= kept[i];
      }
    } else {
      const float kept = exp(splat(a.decay[t * a.heads + head]))[0];
      for (int64_t s = 0; s < a.n; ++s) columns[s] *= kept;
    }
    const vf held = over_keys(k, columns, a.n);
    const vf change = (load_some(a.v + t * a.v_stride + head * a.size + from, count) - held) * beta;
    for (int64_t s = 0; s < a.n; ++s) columns[s] += change * k[s];
    store_some(a.out + (t * a.heads + head) * a.size + from, over_keys(q, columns, a.n) * float(a.scale), count);
  }
  for (int64_t s = 0; s < a.n; ++s) store_some(a.after + (base + s) * a.size + from, columns[s], count);
}

void gated_delta(const DeltaArgs& a, Team& team) {
  const int64_t blocks = (a.size + W - 1) / W;
  team.split(a.rows * a.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t place = piece / blocks;
      delta_columns(a, place / a.heads, place % a.heads, piece % blocks * W);
    }
  });
}
PHL_FIELDS(DeltaArgs, q, k, v, decay, beta, state, out, after, query_start, rows, heads, n, size, q_stride, k_stride,
           v_stride, by_entry, scale);
PHL_OP(gated_delta, DeltaArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
