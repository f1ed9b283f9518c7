// The inner loops: unpacking, the in-register kernel for few rows, the tile kernel for many, dense kernels. Each adds
// the same numbers in the same order, so that a row's result depends neither on the rows beside it nor on the threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "../next_cache.h"
#include "layout.h"
#if PHL_LEVEL == 2
#include "vec_avx512.h"
#elif PHL_VNNI
#include "vec_avxvnni.h"
#elif PHL_LEVEL == 1
#include "vec_avx2.h"
#elif PHL_NEON
#include "vec_neon.h"
#else
#include "vec_portable.h"
#endif

namespace phl {
namespace PHL_NS {
namespace {

using U = Vec::U;
using I = Vec::I;
using F = Vec::F;

constexpr int kPrefetch = 4096;  // bytes ahead of the weight stream

template <bool Second = false>  // into the second-level cache only
PHL_INLINE void prefetch(const uint8_t* p) {
  __builtin_prefetch(p, 0, Second ? 2 : 3);
}

// ---- weights -------------------------------------------------------------------------------------------------------

// A chunk's planes to its eight operands. `lower`: its second part, where the layout has one.
template <class L>
PHL_INLINE void unpack(const uint8_t* p, [[maybe_unused]] const uint8_t* lower, U* w) {
  if constexpr (L::split) {
    for (int t = 0; t < 4; ++t) {
      const U x = Vec::load(p + 64 * t), y = Vec::load(lower + 64 * t);
      w[t] = Vec::either(Vec::pick<0, 4>(x, 240), Vec::pick<0, 0>(y, 15));
      w[t + 4] = Vec::either(Vec::pick<0, 0>(x, 240), Vec::pick<4, 0>(y, 15));
    }
  } else if constexpr (L::bits == 8) {
    for (int j = 0; j < 8; ++j) w[j] = Vec::load(p + 64 * j);
  } else if constexpr (L::bits >= 4) {
    for (int t = 0; t < 4; ++t) {
      const U x = Vec::load(p + 64 * t);
      w[t] = Vec::pick<0, 0>(x, 15);
      w[t + 4] = Vec::pick<4, 0>(x, 15);
    }
    if constexpr (L::table) {
      for (int j = 0; j < 8; ++j) w[j] = Vec::lookup(w[j], kTable4);
    }
  } else {
    for (int t = 0; t < 2; ++t) {
      const U x = Vec::load(p + 64 * t);
      w[4 * t] = Vec::pick<0, 0>(x, 3);
      w[4 * t + 1] = Vec::pick<2, 0>(x, 3);
      w[4 * t + 2] = Vec::pick<4, 0>(x, 3);
      w[4 * t + 3] = Vec::pick<6, 0>(x, 3);
    }
  }
  if constexpr (L::bits == 5 || L::bits == 3) {
    constexpr int to = L::bits - 1, mask = 1 << to;
    const U x = Vec::load(p + (L::bits - 1) * 64);
    w[0] = Vec::either(w[0], Vec::pick<0, to>(x, mask));
    w[1] = Vec::either(w[1], Vec::pick<1, to>(x, mask));
    w[2] = Vec::either(w[2], Vec::pick<2, to>(x, mask));
    w[3] = Vec::either(w[3], Vec::pick<3, to>(x, mask));
    w[4] = Vec::either(w[4], Vec::pick<4, to>(x, mask));
    w[5] = Vec::either(w[5], Vec::pick<5, to>(x, mask));
    w[6] = Vec::either(w[6], Vec::pick<6, to>(x, mask));
    w[7] = Vec::either(w[7], Vec::pick<7, to>(x, mask));
  }
  if constexpr (L::bits == 6) {
    for (int t = 0; t < 2; ++t) {
      const U x = Vec::load(p + 256 + 64 * t);
      w[4 * t] = Vec::either(w[4 * t], Vec::pick<0, 4>(x, 48));
      w[4 * t + 1] = Vec::either(w[4 * t + 1], Vec::pick<2, 4>(x, 48));
      w[4 * t + 2] = Vec::either(w[4 * t + 2], Vec::pick<4, 4>(x, 48));
      w[4 * t + 3] = Vec::either(w[4 * t + 3], Vec::pick<6, 4>(x, 48));
    }
  }
}

// Operand `j` alone: the planes are read again for each, but few registers are taken.
template <class L, int J>
PHL_INLINE U operand(const uint8_t* p, [[maybe_unused]] const uint8_t* lower) {
  if constexpr (L::split) {
    const U x = Vec::load(p + J % 4 * 64), y = Vec::load(lower + J % 4 * 64);
    if constexpr (J < 4) return Vec::either(Vec::pick<0, 4>(x, 240), Vec::pick<0, 0>(y, 15));
    else return Vec::either(Vec::pick<0, 0>(x, 240), Vec::pick<4, 0>(y, 15));
  } else if constexpr (L::bits == 8) {
    return Vec::load(p + J * 64);
  } else {
    U w;
    if constexpr (L::bits >= 4) w = Vec::pick<J / 4 * 4, 0>(Vec::load(p + J % 4 * 64), 15);
    else w = Vec::pick<J % 4 * 2, 0>(Vec::load(p + J / 4 * 64), 3);
    if constexpr (L::table) w = Vec::lookup(w, kTable4);
    if constexpr (L::bits == 5 || L::bits == 3) {
      constexpr int to = L::bits - 1;
      w = Vec::either(w, Vec::pick<J, to>(Vec::load(p + to * 64), 1 << to));
    }
    if constexpr (L::bits == 6) w = Vec::either(w, Vec::pick<J % 4 * 2, 4>(Vec::load(p + 256 + J / 4 * 64), 48));
    return w;
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// f(Count<n>) for n from First up to Last - 1.
template <int First, int Last, class G>
PHL_INLINE void each_count(G&& f) {
  if constexpr (First < Last) {
    f(Count<First>{});
    each_count<First + 1, Last>(f);
  }
}

// Scale (and minimum) of group g of a unit, for 16 features.
template <class L>
PHL_INLINE F scale_of(const uint8_t* unit, int g) {
  if constexpr (L::super) {
    return Vec::mul(Vec::half(unit), Vec::bytes(unit + L::factor_bytes + g * L::scale_step));
  } else {
    return Vec::half(unit + g * L::scale_step);
  }
}
template <class L>
PHL_INLINE F minimum_of(const uint8_t* unit, int g) {
  if constexpr (L::super) {
    return Vec::mul(Vec::half(unit + 32), Vec::bytes(unit + L::minimum_offset + g * L::scale_step));
  } else {
    return Vec::half(unit + g * L::scale_step + L::minimum_offset);
  }
}

// ---- integer kernels -----------------------------------------------------------------------------------------------

template <int ZeroLog, bool Wide, bool Halves>
PHL_INLINE I start_sum(const Activation& a, int g) {
  if constexpr (ZeroLog < 0 || (Wide && Vec::signed_wide)) {
    return Vec::zero_i();
  } else {
    return Vec::minus_shifted<ZeroLog>(Halves ? a.half_sum[g] : a.sum);
  }
}

template <bool Min, bool Halves>
PHL_INLINE F accumulate(F total, I sum, F d, F m, const Activation& a, int g) {
  total = Vec::fma(Vec::tofloat(sum), Vec::mul(d, Vec::set(a.scale)), total);
  if constexpr (Min) total = Vec::fma(m, Vec::set(Halves ? a.half_scaled_sum[g] : a.scaled_sum), total);
  return total;
}

// What one of several passes over a block fetches meanwhile: `ahead` bytes on, of every header and chunk the lines from
// `first` on, `step` bytes apart. A single pass fetches the block itself, a little ahead.
struct Fetch {
  int64_t ahead;
  int first, step;
};

// Group G of chunk `c` of a unit times R rows, an operand after the other.
template <class L, int G, int R>
PHL_INLINE void group_of_chunk(F (&total)[R], const uint8_t* unit, const uint8_t* p, const uint8_t* lower, int c,
                               const Activation* act, int64_t act_step) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG;
  typename Vec::Sum<L::bits, L::wide> sum[R];
  for (int r = 0; r < R; ++r) sum[r].total = start_sum<L::zero_log, L::wide, CG == 2>(act[r * act_step + c], G);
  each_count<0, per_group>([&](auto nth) __attribute__((always_inline)) {
    constexpr int n = decltype(nth)::value, j = G * per_group + n;
    const auto w = Vec::ready<L::wide>(operand<L, j>(p, lower));
    for (int r = 0; r < R; ++r) sum[r].add(n, w, Vec::spread4(act[r * act_step + c].q + 4 * j));
  });
  const F d = scale_of<L>(unit, c * CG + G);
  F m = d;
  if constexpr (L::min) m = minimum_of<L>(unit, c * CG + G);
  for (int r = 0; r < R; ++r) {
    total[r] = accumulate<L::min, CG == 2>(total[r], sum[r].all(per_group), d, m, act[r * act_step + c], G);
  }
}

// One block of 16 features times R rows, unpacking in registers. out[r * out_step + lane].
template <class L, int R, bool Single>
PHL_APART void small_block(const uint8_t* w, const uint8_t* lower, int64_t units, const Activation* act, int64_t act_step, float* out,
                 int64_t out_step, const Fetch& fetch) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG;
  const int64_t ahead = Single ? kPrefetch : fetch.ahead;
  const int first = Single ? 0 : fetch.first, step = Single ? 64 : fetch.step;
  F total[R];
  for (int r = 0; r < R; ++r) total[r] = Vec::zero();
  for (int64_t u = 0; u < units; ++u, w += L::unit_bytes, act += L::chunks) {
    for (int at = first; at < L::header; at += step) prefetch<!Single>(w + ahead + at);
    for (int c = 0; c < L::chunks; ++c) {
      const uint8_t* p = w + L::header + c * L::chunk_bytes;
      for (int at = first; at < L::chunk_bytes; at += step) prefetch<!Single>(p + ahead + at);
      if constexpr (L::split) {
        const int64_t further = ahead / L::unit_bytes * L::lower_bytes;
        for (int at = first; at < L::chunk_bytes; at += step) prefetch<!Single>(lower + further + at);
      }
      if constexpr (!Vec::holds_chunk) {
        each_count<0, CG>([&](auto g) __attribute__((always_inline)) {
          group_of_chunk<L, decltype(g)::value>(total, w, p, lower, c, act, act_step);
        });
        lower += L::split ? L::chunk_bytes : 0;
        continue;
      }
      U op[8];
      unpack<L>(p, lower, op);
      lower += L::split ? L::chunk_bytes : 0;
#pragma GCC unroll 2  // else the operands go to the stack
      for (int g = 0; g < CG; ++g) {
        const F d = scale_of<L>(w, c * CG + g);
        F m = d;
        if constexpr (L::min) m = minimum_of<L>(w, c * CG + g);
        for (int r = 0; r < R; ++r) {
          const Activation& a = act[r * act_step + c];
          I sum = start_sum<L::zero_log, L::wide, CG == 2>(a, g);
          for (int j = g * per_group; j < (g + 1) * per_group; ++j) {
            sum = Vec::dot<L::wide>(sum, op[j], Vec::spread4(a.q + 4 * j));
          }
          total[r] = accumulate<L::min, CG == 2>(total[r], sum, d, m, a, g);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) Vec::storef(out + r * out_step, total[r]);
}

// What the tile kernel reads, per chunk: eight operands, then float scales and minima.
template <class L>
constexpr int kTileChunk = 512 + 64 * L::chunk_groups * (L::min ? 2 : 1);

template <class L>
PHL_APART void unpack_block(const uint8_t* w, const uint8_t* lower, int64_t units, uint8_t* tile) {
  constexpr int CG = L::chunk_groups;
  for (int64_t u = 0; u < units; ++u, w += L::unit_bytes) {
    for (int c = 0; c < L::chunks; ++c, tile += kTileChunk<L>) {
      U op[8];
      unpack<L>(w + L::header + c * L::chunk_bytes, lower, op);
      lower += L::split ? L::chunk_bytes : 0;
      for (int j = 0; j < 8; ++j) Vec::store(tile + 64 * j, op[j]);
      for (int g = 0; g < CG; ++g) {
        auto* scales = reinterpret_cast<float*>(tile + 512) + 16 * g * (L::min ? 2 : 1);
        Vec::storef(scales, scale_of<L>(w, c * CG + g));
        if constexpr (L::min) Vec::storef(scales + 16, minimum_of<L>(w, c * CG + g));
      }
    }
  }
}

// The float sums of a tile of rows and blocks, in registers or, where those are few, in memory, which each chunk visits
// once.
template <int R, int B, bool Memory>
struct Totals {
  F sum[R][B];
  PHL_INLINE Totals(float*, int64_t) {
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) sum[r][b] = Vec::zero();
    }
  }
  PHL_INLINE F get(int r, int b) const { return sum[r][b]; }
  PHL_INLINE void set(int r, int b, F x) { sum[r][b] = x; }
  PHL_INLINE void store(float* out, int64_t step) const {
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) Vec::storef(out + r * step + 16 * b, sum[r][b]);
    }
  }
};
template <int R, int B>
struct Totals<R, B, true> {
  float* out;
  int64_t step;
  PHL_INLINE Totals(float* out, int64_t step) : out(out), step(step) {
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) set(r, b, Vec::zero());
    }
  }
  PHL_INLINE F get(int r, int b) const { return Vec::loadf(out + r * step + 16 * b); }
  PHL_INLINE void set(int r, int b, F x) { Vec::storef(out + r * step + 16 * b, x); }
  PHL_INLINE void store(float*, int64_t) const {}
};

// Lines of the next cache that a kernel for many rows asks for in a chunk.
constexpr int64_t kFetches = 3;

// B unpacked blocks, `tile_step` bytes apart, times R rows. out[r * out_step + 16 * b + lane]. Fetch: asks for `lines`
// meanwhile.
template <class L, int R, int B, bool Fetch>
PHL_APART void tile_kernel(const uint8_t* tile, int64_t tile_step, int64_t chunks, const Activation* act,
                           int64_t act_step, float* out, int64_t out_step, [[maybe_unused]] Lines lines) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG;
  Totals<R, B, !Vec::holds_chunk> total(out, out_step);
  for (int64_t c = 0; c < chunks; ++c, tile += kTileChunk<L>, ++act) {
    if (Fetch && lines.at < lines.end) {
      for (int64_t i = 0; i < kFetches; ++i) {
        __builtin_prefetch(reinterpret_cast<const void*>(lines.at + 64 * i), 0, 2);
      }
      lines.at += 64 * kFetches;
    }
    for (int g = 0; g < CG; ++g) {
      typename Vec::Sum<L::bits, L::wide> sum[R][B];
      for (int r = 0; r < R; ++r) {
        const I start = start_sum<L::zero_log, L::wide, CG == 2>(act[r * act_step], g);
        for (int b = 0; b < B; ++b) sum[r][b].total = start;
      }
#pragma GCC unroll 8
      for (int n = 0; n < per_group; ++n) {
        const int j = g * per_group + n;
        U w[B];
        for (int b = 0; b < B; ++b) w[b] = Vec::load(tile + b * tile_step + 64 * j);
        for (int b = 0; b < B; ++b) {
          const auto ready = Vec::ready<L::wide>(w[b]);
          for (int r = 0; r < R; ++r) sum[r][b].add(n, ready, Vec::spread4(act[r * act_step].q + 4 * j));
        }
      }
      for (int b = 0; b < B; ++b) {
        const auto* scales =
            reinterpret_cast<const float*>(tile + b * tile_step + 512) + 16 * g * (L::min ? 2 : 1);
        const F d = Vec::loadf(scales);
        F m = d;
        if constexpr (L::min) m = Vec::loadf(scales + 16);
        for (int r = 0; r < R; ++r) {
          const I all = sum[r][b].all(per_group);
          total.set(r, b, accumulate<L::min, CG == 2>(total.get(r, b), all, d, m, act[r * act_step], g));
        }
      }
    }
  }
  total.store(out, out_step);
}

// The two forms that the weights of many rows take are this one and AsBytes (bytes.h).
template <class L>
struct AsPacked {
  static constexpr int64_t fetches = PHL_LEVEL == 1 ? kFetches : 0;  // with AVX-512 these are for few rows
  static constexpr int64_t tile_bytes(int64_t chunks) { return chunks * kTileChunk<L>; }
  static void unpack(const uint8_t* w, const uint8_t* lower, int64_t units, uint8_t* tile) {
    unpack_block<L>(w, lower, units, tile);
  }
  template <int R, int B>
  static void multiply(const uint8_t* tile, int64_t tile_step, int64_t chunks, const Activation* act, int64_t act_step,
                       float* out, int64_t out_step, Lines lines) {
    if (fetches > 0 && lines.at < lines.end) {
      tile_kernel<L, R, B, fetches != 0>(tile, tile_step, chunks, act, act_step, out, out_step, lines);
    } else {
      tile_kernel<L, R, B, false>(tile, tile_step, chunks, act, act_step, out, out_step, lines);
    }
  }
};

// ---- dense kernels -------------------------------------------------------------------------------------------------

struct DenseBF16 {
  using X = uint16_t;  // activations
  static constexpr int step = 2, bytes = 64;
  PHL_INLINE static F madd(F sum, const uint8_t* w, const X* x) {
    return Vec::dot_pair(sum, Vec::load(w), Vec::pair(x));
  }
};
struct DenseF16 {
  using X = float;
  static constexpr int step = 1, bytes = 32;
  PHL_INLINE static F madd(F sum, const uint8_t* w, const X* x) { return Vec::fma(Vec::half(w), Vec::set(*x), sum); }
};
struct DenseF32 {
  using X = float;
  static constexpr int step = 1, bytes = 64;
  PHL_INLINE static F madd(F sum, const uint8_t* w, const X* x) {
    return Vec::fma(Vec::loadf(reinterpret_cast<const float*>(w)), Vec::set(*x), sum);
  }
};

// B blocks `block_bytes` apart times R rows of `steps` steps each.
template <class D, int R, int B>
PHL_APART void dense_kernel(const uint8_t* w, int64_t block_bytes, int64_t steps, const typename D::X* x, int64_t x_step,
                  float* out, int64_t out_step) {
  F total[R][B];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) total[r][b] = Vec::zero();
  }
  for (int64_t k = 0; k < steps; ++k, w += D::bytes, x += D::step) {
    for (int b = 0; b < B; ++b) {
      if (R <= 2) prefetch(w + b * block_bytes + kPrefetch);
      for (int r = 0; r < R; ++r) total[r][b] = D::madd(total[r][b], w + b * block_bytes, x + r * x_step);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) Vec::storef(out + r * out_step + 16 * b, total[r][b]);
  }
}

// ---- small functions of 16 lanes -----------------------------------------------------------------------------------

// e^x to 2e-7, from -87 to 88: 2^n times a polynomial of the rest, of the least relative error (1e-7) that begins 1 + x.
PHL_INLINE F exponential(F x) {
  x = Vec::min(Vec::max(x, Vec::set(-87.0f)), Vec::set(88.0f));
  const F n = Vec::round(Vec::mul(x, Vec::set(1.44269504088896341f)));
  F r = Vec::fma(n, Vec::set(-0.693359375f), x);
  r = Vec::fma(n, Vec::set(2.12194440e-4f), r);
  F p = Vec::fma(Vec::set(8.312525228e-3f), r, Vec::set(4.189011455e-2f));
  p = Vec::fma(p, r, Vec::set(1.666711420e-1f));
  p = Vec::fma(p, r, Vec::set(4.999923110e-1f));
  p = Vec::fma(p, r, Vec::set(1.0f));
  p = Vec::fma(p, r, Vec::set(1.0f));
  return Vec::scale2(p, n);
}

// x * sigmoid(x)
PHL_INLINE F silu(F x) {
  return Vec::mul(x, Vec::reciprocal(Vec::add(Vec::set(1.0f), exponential(Vec::sub(Vec::zero(), x)))));
}

// The tanh form of GELU is x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3)).
PHL_INLINE F gelu_tanh(F x) {
  const F cube = Vec::mul(Vec::mul(x, x), x);
  const F inner = Vec::mul(Vec::fma(cube, Vec::set(0.044715f), x), Vec::set(-1.5957691216057308f));
  return Vec::mul(x, Vec::reciprocal(Vec::add(Vec::set(1.0f), exponential(inner))));
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
