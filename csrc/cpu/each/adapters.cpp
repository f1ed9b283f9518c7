// Low-rank additions to a linear layer (LoRA), each token with its own adapter or none, over stacks of adapters.
//
// y[t] = factor * (y[t] + s up) + shift, s = x[t] down^T: of few tokens s in a first phase, part by part, and y in a
// second; of many, both of a tile in one. Tokens beside one another that have the same adapter share what is read of it.
// A token's result does not depend on the tokens beside it: every sum has the same order however many tokens share it.
// Legend: T tokens, N inputs, M outputs, r rank.
#include "../op.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kTile = 4;         // tokens that may share what is read of an adapter
constexpr int kColumns = 512;    // outputs of a task
constexpr int kTilesEach = 4;    // tiles of a thread from which on a tile is one task

struct AdaptersArgs {
  const float* x;        // [T, N]
  const int32_t* index;  // [T] which entry of the stacks; 0: none
  const int32_t* facts;  // [entries, 2] rank, whether factor and shift count
  const void* down;      // [entries, parts, most, N] bfloat16, or float32
  const void* up;        // [entries, most, M]
  const float* factor;   // [entries, M]
  const float* shift;    // [entries, M]
  const int64_t* ends;   // [parts] the column behind each part
  float* small;          // [T, parts, most]
  float* y;              // [T, M], changed in place
  int64_t rows, inputs, outputs, parts, most, x_stride, y_stride, half;
};

PHL_INLINE vf muladd(vf a, vf b, vf c) {
#if PHL_LEVEL == 2
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif PHL_LEVEL == 1
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

PHL_INLINE vf wide(const float* p) { return load(p); }
PHL_INLINE vf wide(const uint16_t* p) { return load_bf16(p); }
PHL_INLINE float one(const float* p) { return *p; }
PHL_INLINE float one(const uint16_t* p) { return bf16_to_float(*p); }

// R rows of `down` times G tokens.
template <int G, int R, class E>
PHL_INLINE void dots(const float* x, int64_t x_stride, const E* down, int64_t n, float* out, int64_t out_stride) {
  vf acc[G][R] = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf a[G];
    for (int g = 0; g < G; ++g) a[g] = load(x + g * x_stride + i);
    for (int r = 0; r < R; ++r) {
      const vf b = wide(down + r * n + i);
      for (int g = 0; g < G; ++g) acc[g][r] = muladd(a[g], b, acc[g][r]);
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int r = 0; r < R; ++r) {
      float total = sum(acc[g][r]);
      for (int64_t j = i; j < n; ++j) total += x[g * x_stride + j] * one(down + r * n + j);
      out[g * out_stride + r] = total;
    }
  }
}

template <int G, class E>
PHL_INLINE void shrink(const float* x, int64_t x_stride, const E* down, int64_t n, int64_t rank, float* out,
                       int64_t out_stride) {
  constexpr int R = G == 1 ? 8 : G == 2 ? 4 : 3;
  int64_t r = 0;
  for (; r + R <= rank; r += R) dots<G, R>(x, x_stride, down + r * n, n, out + r, out_stride);
  for (; r < rank; ++r) dots<G, 1>(x, x_stride, down + r * n, n, out + r, out_stride);
}

// Columns [begin, end) of G tokens, of one part.
template <int G, class E>
PHL_INLINE void expand(const float* small, int64_t small_stride, const E* up, int64_t m, int64_t rank, float* y,
                       int64_t y_stride, int64_t begin, int64_t end) {
  const int64_t whole = begin + (end - begin) / W * W;
  for (int64_t k = 0; k < rank; k += 4) {
    const int some = rank - k < 4 ? int(rank - k) : 4;
    if (some == 4) {
      vf s[G][4];
      for (int g = 0; g < G; ++g)
        for (int q = 0; q < 4; ++q) s[g][q] = splat(small[g * small_stride + k + q]);
      for (int64_t c = begin; c < whole; c += W) {
        vf b[4];
        for (int q = 0; q < 4; ++q) b[q] = wide(up + (k + q) * m + c);
        for (int g = 0; g < G; ++g) {
          vf v = load(y + g * y_stride + c);
          for (int q = 0; q < 4; ++q) v = muladd(s[g][q], b[q], v);
          store(y + g * y_stride + c, v);
        }
      }
    } else {
      for (int q = 0; q < some; ++q) {
        for (int64_t c = begin; c < whole; c += W) {
          const vf b = wide(up + (k + q) * m + c);
          for (int g = 0; g < G; ++g) {
            float* at = y + g * y_stride + c;
            store(at, muladd(splat(small[g * small_stride + k + q]), b, load(at)));
          }
        }
      }
    }
    for (int64_t c = whole; c < end; ++c) {
      for (int g = 0; g < G; ++g) {
        for (int q = 0; q < some; ++q) y[g * y_stride + c] += small[g * small_stride + k + q] * one(up + (k + q) * m + c);
      }
    }
  }
}

// f(first token, how many, entry) for tokens beside one another in a tile that have the same adapter.
template <class F>
PHL_INLINE void runs(const AdaptersArgs& a, int64_t tile, F&& f) {
  const int64_t last = (tile + 1) * kTile < a.rows ? (tile + 1) * kTile : a.rows;
  for (int64_t t = tile * kTile; t < last;) {
    const int32_t entry = a.index[t];
    int64_t stop = t + 1;
    while (stop < last && a.index[stop] == entry) ++stop;
    if (entry > 0) f(t, int(stop - t), int64_t(entry));
    t = stop;
  }
}

template <class E>
PHL_INLINE void shrink_tile(const AdaptersArgs& a, int64_t tile, int64_t part) {
  const int64_t stride = a.parts * a.most;
  runs(a, tile, [&](int64_t t, int count, int64_t entry) {
    const int64_t rank = a.facts[2 * entry];
    const E* down = static_cast<const E*>(a.down) + (entry * a.parts + part) * a.most * a.inputs;
    const float* x = a.x + t * a.x_stride;
    float* out = a.small + t * stride + part * a.most;
    switch (count) {
      case 1: return shrink<1>(x, a.x_stride, down, a.inputs, rank, out, stride);
      case 2: return shrink<2>(x, a.x_stride, down, a.inputs, rank, out, stride);
      case 3: return shrink<3>(x, a.x_stride, down, a.inputs, rank, out, stride);
      default: return shrink<4>(x, a.x_stride, down, a.inputs, rank, out, stride);
    }
  });
}

template <class E>
PHL_INLINE void expand_tile(const AdaptersArgs& a, int64_t tile, int64_t first, int64_t last) {
  const int64_t stride = a.parts * a.most, m = a.outputs;
  runs(a, tile, [&](int64_t t, int count, int64_t entry) {
    const int64_t rank = a.facts[2 * entry];
    const E* up = static_cast<const E*>(a.up) + entry * a.most * m;
    float* y = a.y + t * a.y_stride;
    int64_t start = 0;
    for (int64_t part = 0; part < a.parts; ++part) {
      const int64_t begin = start > first ? start : first, end = a.ends[part] < last ? a.ends[part] : last;
      start = a.ends[part];
      if (begin >= end) continue;
      const float* small = a.small + t * stride + part * a.most;
      switch (count) {
        case 1: expand<1>(small, stride, up, m, rank, y, a.y_stride, begin, end); break;
        case 2: expand<2>(small, stride, up, m, rank, y, a.y_stride, begin, end); break;
        case 3: expand<3>(small, stride, up, m, rank, y, a.y_stride, begin, end); break;
        default: expand<4>(small, stride, up, m, rank, y, a.y_stride, begin, end); break;
      }
    }
    if (!a.facts[2 * entry + 1]) return;
    const float *factor = a.factor + entry * m, *shift = a.shift + entry * m;
    for (int g = 0; g < count; ++g) {
      for (int64_t c = first; c < last; ++c) y[g * a.y_stride + c] = factor[c] * y[g * a.y_stride + c] + shift[c];
    }
  });
}

template <class E>
PHL_INLINE void both(const AdaptersArgs& a, Team& team) {
  const int64_t tiles = (a.rows + kTile - 1) / kTile, chunks = (a.outputs + kColumns - 1) / kColumns;
  const auto expanded = [&](int64_t tile, int64_t chunk) {
    const int64_t first = chunk * kColumns;
    expand_tile<E>(a, tile, first, first + kColumns < a.outputs ? first + kColumns : a.outputs);
  };
  if (tiles >= kTilesEach * team.size) {  // enough tiles for all: no thread waits for what another has shrunk
    team.tasks(tiles, [&](int64_t tile) {
      for (int64_t part = 0; part < a.parts; ++part) shrink_tile<E>(a, tile, part);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) expanded(tile, chunk);
    });
    return;
  }
  team.tasks(tiles * a.parts, [&](int64_t task) { shrink_tile<E>(a, task / a.parts, task % a.parts); });
  team.barrier();
  team.tasks(tiles * chunks, [&](int64_t task) { expanded(task / chunks, task % chunks); });
}

void add_adapters(const AdaptersArgs& a, Team& team) {
  if (a.half) return both<uint16_t>(a, team);
  both<float>(a, team);
}
PHL_FIELDS(AdaptersArgs, x, index, facts, down, up, factor, shift, ends, small, y, rows, inputs, outputs, parts, most,
           x_stride, y_stride, half);
PHL_OP(add_adapters, AdaptersArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
