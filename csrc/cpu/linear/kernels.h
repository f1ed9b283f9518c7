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
// What the inner loops do at a time of an operand and of a block's features: all of it, unless registers are too few.
using Part = Vec::Part;
constexpr int kPartBytes = 64 / Vec::parts, kLanes = kBlock / Vec::parts;

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
      w[t] = Vec::insert<0, 0>(Vec::pick<0, 4>(x, 240), y, 15);
      w[t + 4] = Vec::insert<4, 0>(Vec::pick<0, 0>(x, 240), y, 15);
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
    w[0] = Vec::insert<0, to>(w[0], x, mask);
    w[1] = Vec::insert<1, to>(w[1], x, mask);
    w[2] = Vec::insert<2, to>(w[2], x, mask);
    w[3] = Vec::insert<3, to>(w[3], x, mask);
    w[4] = Vec::insert<4, to>(w[4], x, mask);
    w[5] = Vec::insert<5, to>(w[5], x, mask);
    w[6] = Vec::insert<6, to>(w[6], x, mask);
    w[7] = Vec::insert<7, to>(w[7], x, mask);
  }
  if constexpr (L::bits == 6) {
    for (int t = 0; t < 2; ++t) {
      const U x = Vec::load(p + 256 + 64 * t);
      w[4 * t] = Vec::insert<0, 4>(w[4 * t], x, 48);
      w[4 * t + 1] = Vec::insert<2, 4>(w[4 * t + 1], x, 48);
      w[4 * t + 2] = Vec::insert<4, 4>(w[4 * t + 2], x, 48);
      w[4 * t + 3] = Vec::insert<6, 4>(w[4 * t + 3], x, 48);
    }
  }
}

// Operand `J` alone, or the part of it that `p` and `lower` begin with: the planes are read again for each, but few
// registers are taken.
template <class L, int J, class V = Vec>
PHL_INLINE typename V::U operand(const uint8_t* p, [[maybe_unused]] const uint8_t* lower) {
  if constexpr (L::split) {
    const auto x = V::load(p + J % 4 * 64), y = V::load(lower + J % 4 * 64);
    if constexpr (J < 4) return V::template insert<0, 0>(V::template pick<0, 4>(x, 240), y, 15);
    else return V::template insert<4, 0>(V::template pick<0, 0>(x, 240), y, 15);
  } else if constexpr (L::bits == 8) {
    return V::load(p + J * 64);
  } else {
    typename V::U w;
    if constexpr (L::bits >= 4) w = V::template pick<J / 4 * 4, 0>(V::load(p + J % 4 * 64), 15);
    else w = V::template pick<J % 4 * 2, 0>(V::load(p + J / 4 * 64), 3);
    if constexpr (L::table) w = V::lookup(w, kTable4);
    if constexpr (L::bits == 5 || L::bits == 3) {
      constexpr int to = L::bits - 1;
      w = V::template insert<J, to>(w, V::load(p + to * 64), 1 << to);
    }
    if constexpr (L::bits == 6) w = V::template insert<J % 4 * 2, 4>(w, V::load(p + 256 + J / 4 * 64), 48);
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

// Scale (and minimum) of group g of a unit, for the features from `at` on.
template <class L, class V = Vec>
PHL_INLINE typename V::F scale_of(const uint8_t* unit, int g, int at = 0) {
  if constexpr (L::super) {
    return V::mul(V::half(unit + 2 * at), V::bytes(unit + L::factor_bytes + g * L::scale_step + at));
  } else {
    return V::half(unit + g * L::scale_step + 2 * at);
  }
}
template <class L, class V = Vec>
PHL_INLINE typename V::F minimum_of(const uint8_t* unit, int g, int at = 0) {
  if constexpr (L::super) {
    return V::mul(V::half(unit + 32 + 2 * at), V::bytes(unit + L::minimum_offset + g * L::scale_step + at));
  } else {
    return V::half(unit + g * L::scale_step + L::minimum_offset + 2 * at);
  }
}

// ---- integer kernels -----------------------------------------------------------------------------------------------

template <int ZeroLog, bool Wide, bool Halves, class V = Vec>
PHL_INLINE typename V::I start_sum(const Activation& a, int g) {
  if constexpr (ZeroLog < 0 || (Wide && V::signed_wide)) {
    return V::zero_i();
  } else {
    return V::template minus_shifted<ZeroLog>(Halves ? a.half_sum[g] : a.sum);
  }
}

template <bool Min, bool Halves, class V = Vec>
PHL_INLINE typename V::F accumulate(typename V::F total, typename V::I sum, typename V::F d, typename V::F m,
                                    const Activation& a, int g) {
#if PHL_NEON
  if constexpr (!Halves) return V::template accumulate<Min>(total, sum, d, m, &a.scale);
#endif
  total = V::fma(V::tofloat(sum), V::mul(d, V::set(a.scale)), total);
  if constexpr (Min) total = V::fma(m, V::set(Halves ? a.half_scaled_sum[g] : a.scaled_sum), total);
  return total;
}

// The float sums of some rows and parts of blocks, in registers or, where those are few, in memory, which each chunk
// visits once.
template <int R, int B, bool Memory>
struct Totals {
  Part::F sum[R][B];
  PHL_INLINE Totals(float*, int64_t) {
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) sum[r][b] = Part::zero();
    }
  }
  PHL_INLINE Part::F get(int r, int b) const { return sum[r][b]; }
  PHL_INLINE void set(int r, int b, Part::F x) { sum[r][b] = x; }
  PHL_INLINE void store(float* out, int64_t step) const {
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) Part::storef(out + r * step + kLanes * b, sum[r][b]);
    }
  }
};
template <int R, int B>
struct Totals<R, B, true> {
  float* out;
  int64_t step;
  PHL_INLINE Totals(float* out, int64_t step) : out(out), step(step) {
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) set(r, b, Part::zero());
    }
  }
  PHL_INLINE Part::F get(int r, int b) const { return Part::loadf(out + r * step + kLanes * b); }
  PHL_INLINE void set(int r, int b, Part::F x) { Part::storef(out + r * step + kLanes * b, x); }
  PHL_INLINE void store(float*, int64_t) const {}
};

// What one of several passes over a block fetches meanwhile: `ahead` bytes on, of every header and chunk the lines from
// `first` on, `step` bytes apart. A single pass fetches the block itself, a little ahead.
struct Fetch {
  int64_t ahead;
  int first, step;
};

// Group G of chunk `c` of a unit times R rows, an operand after the other.
template <class L, int G, int R, bool Memory>
PHL_INLINE void group_of_chunk(Totals<R, Vec::parts, Memory>& total, const uint8_t* unit, const uint8_t* p,
                               const uint8_t* lower, int c, const Activation* act, int64_t act_step) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG;
#if PHL_NEON
  // Two loads beside each other are one: a single row's scales, and the inputs of rows whose sums take no registers.
  constexpr bool scales_first = R == 1 && !L::super, inputs_first = Memory;
  F scales{}, minima{};
  if constexpr (scales_first) scales = scale_of<L>(unit, c * CG + G);
  if constexpr (scales_first && L::min) minima = minimum_of<L>(unit, c * CG + G);
  Part::Inputs inputs[R];
  for (int r = 0; r < R && inputs_first; ++r) inputs[r] = Part::inputs(act[r * act_step + c].q);
#endif
  each_count<0, Vec::parts>([&](auto nth_part) __attribute__((always_inline)) {
    constexpr int part = decltype(nth_part)::value, at = part * kLanes;
    Part::Sum<L::bits, L::wide> sum[R];
    for (int r = 0; r < R; ++r) {
      sum[r].total = start_sum<L::zero_log, L::wide, CG == 2, Part>(act[r * act_step + c], G);
    }
    each_count<0, per_group>([&](auto nth) __attribute__((always_inline)) {
      constexpr int n = decltype(nth)::value, j = G * per_group + n;
      const auto w = Part::ready<L::wide>(operand<L, j, Part>(p + part * kPartBytes, lower + part * kPartBytes));
      for (int r = 0; r < R; ++r) {
#if PHL_NEON
        if constexpr (inputs_first) sum[r].add(n, w, Part::spread4(inputs[r], j));
        else
#endif
          sum[r].add(n, w, Part::spread4(act[r * act_step + c].q, j));
      }
    });
    Part::F d, m;
#if PHL_NEON
    if constexpr (scales_first) d = Part::part_of(scales, part), m = Part::part_of(minima, part);
    else
#endif
    {
      d = m = scale_of<L, Part>(unit, c * CG + G, at);
      if constexpr (L::min) m = minimum_of<L, Part>(unit, c * CG + G, at);
    }
    for (int r = 0; r < R; ++r) {
      const Part::I all = sum[r].all(per_group);
      total.set(r, part, accumulate<L::min, CG == 2, Part>(total.get(r, part), all, d, m, act[r * act_step + c], G));
    }
  });
}

// Chunk `c` of a unit times R rows, all of its operands in registers.
template <class L, int R, class V = Vec>
PHL_INLINE void whole_chunk(Totals<R, 1, false>& total, const uint8_t* unit, const uint8_t* p, const uint8_t* lower, int c,
                            const Activation* act, int64_t act_step) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG;
  U op[8];
  unpack<L>(p, lower, op);
#pragma GCC unroll 2  // else the operands go to the stack
  for (int g = 0; g < CG; ++g) {
    const F d = scale_of<L>(unit, c * CG + g);
    F m = d;
    if constexpr (L::min) m = minimum_of<L>(unit, c * CG + g);
    // Operands outside, rows inside: neighbouring instructions are of different rows, so that none waits for the one
    // before it. Row after row, each sum is one chain of all its operands.
    I sum[R];
    for (int r = 0; r < R; ++r) sum[r] = start_sum<L::zero_log, L::wide, CG == 2>(act[r * act_step + c], g);
#pragma GCC unroll 8
    for (int j = g * per_group; j < (g + 1) * per_group; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) V::dot_input(sum[r], op[j], act[r * act_step + c].q, j);
    }
    for (int r = 0; r < R; ++r) {
      const Activation& a = act[r * act_step + c];
      total.set(r, 0, accumulate<L::min, CG == 2>(total.get(r, 0), sum[r], d, m, a, g));
    }
  }
}

// One block of 16 features times R rows, unpacking in registers. out[r * out_step + lane].
template <class L, int R, bool Single>
PHL_APART void small_block(const uint8_t* w, const uint8_t* lower, int64_t units, const Activation* act, int64_t act_step, float* out,
                 int64_t out_step, const Fetch& fetch) {
  const int64_t ahead = Single ? kPrefetch : fetch.ahead;
  const int first = Single ? 0 : fetch.first, step = Single ? 64 : fetch.step;
  Totals<R, Vec::parts, (R > Vec::held_rows && L::chunk_groups == 1)> total(out, out_step);
  for (int64_t u = 0; u < units; ++u, w += L::unit_bytes, act += L::chunks) {
    for (int at = first; at < L::header; at += step) prefetch<!Single>(w + ahead + at);
    for (int c = 0; c < L::chunks; ++c) {
      const uint8_t* p = w + L::header + c * L::chunk_bytes;
      for (int at = first; at < L::chunk_bytes; at += step) prefetch<!Single>(p + ahead + at);
      if constexpr (L::split) {
        const int64_t further = ahead / L::unit_bytes * L::lower_bytes;
        for (int at = first; at < L::chunk_bytes; at += step) prefetch<!Single>(lower + further + at);
      }
      if constexpr (Vec::holds_chunk) {
        whole_chunk<L>(total, w, p, lower, c, act, act_step);
      } else {
        each_count<0, L::chunk_groups>([&](auto g) __attribute__((always_inline)) {
          group_of_chunk<L, decltype(g)::value>(total, w, p, lower, c, act, act_step);
        });
      }
      lower += L::split ? L::chunk_bytes : 0;
    }
  }
  total.store(out, out_step);
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
      for (int j = 0; j < 8; ++j) Vec::store(tile + 64 * j, Vec::keep<L::wide>(op[j]));
      for (int g = 0; g < CG; ++g) {
        auto* scales = reinterpret_cast<float*>(tile + 512) + 16 * g * (L::min ? 2 : 1);
        Vec::storef(scales, scale_of<L>(w, c * CG + g));
        if constexpr (L::min) Vec::storef(scales + 16, minimum_of<L>(w, c * CG + g));
      }
    }
  }
}

// Lines of the next cache that a kernel for many rows asks for in a chunk.
constexpr int64_t kFetches = 3;

// B unpacked blocks, `tile_step` bytes apart, times R rows. out[r * out_step + 16 * b + lane]. Fetch: asks for `lines`
// meanwhile.
template <class L, int R, int B, bool Fetch>
PHL_APART void tile_kernel(const uint8_t* tile, int64_t tile_step, int64_t chunks, const Activation* act,
                           int64_t act_step, float* out, int64_t out_step, [[maybe_unused]] Lines lines) {
  constexpr int CG = L::chunk_groups, per_group = 8 / CG, parts = Vec::parts;
  Totals<R, B * parts, !Vec::holds_chunk> total(out, out_step);
  for (int64_t c = 0; c < chunks; ++c, tile += kTileChunk<L>, ++act) {
    if (Fetch && lines.at < lines.end) {
      for (int64_t i = 0; i < kFetches; ++i) {
        __builtin_prefetch(reinterpret_cast<const void*>(lines.at + 64 * i), 0, 2);
      }
      lines.at += 64 * kFetches;
    }
    for (int g = 0; g < CG; ++g) {
      Part::Sum<L::bits, L::wide> sum[R][B * parts];
      for (int r = 0; r < R; ++r) {
        const Part::I start = start_sum<L::zero_log, L::wide, CG == 2, Part>(act[r * act_step], g);
        for (int b = 0; b < B * parts; ++b) sum[r][b].total = start;
      }
#pragma GCC unroll 8
      for (int n = 0; n < per_group; ++n) {
        const int j = g * per_group + n;
        for (int part = 0; part < parts; ++part) {
          Part::U w[B];
          for (int b = 0; b < B; ++b) w[b] = Part::load(tile + b * tile_step + 64 * j + kPartBytes * part);
          for (int b = 0; b < B; ++b) {
            const auto ready = Part::kept<L::wide>(w[b]);
            for (int r = 0; r < R; ++r) {
              sum[r][b * parts + part].add(n, ready, Part::spread4(act[r * act_step].q, j));
            }
          }
        }
      }
      for (int b = 0; b < B; ++b) {
        const auto* scales =
            reinterpret_cast<const float*>(tile + b * tile_step + 512) + 16 * g * (L::min ? 2 : 1);
#pragma GCC unroll 2
        for (int part = 0; part < parts; ++part) {
          const Part::F d = Part::loadf(scales + part * kLanes);
          Part::F m = d;
          if constexpr (L::min) m = Part::loadf(scales + 16 + part * kLanes);
          for (int r = 0; r < R; ++r) {
            const int at = b * parts + part;
            const Part::I all = sum[r][at].all(per_group);
            total.set(r, at, accumulate<L::min, CG == 2, Part>(total.get(r, at), all, d, m, act[r * act_step], g));
          }
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

// `madd`: a step's products of a part of 16 features and input `u` (a pair of them) from `x` on.
struct DenseBF16 {
  using X = uint16_t;  // activations
  static constexpr int step = 2, bytes = 64;
  PHL_INLINE static Part::F madd(Part::F sum, const uint8_t* w, const X* x, int u) {
    return Part::dot_pair(sum, Part::load(w), Part::pair(x, u));
  }
};
struct DenseF16 {
  using X = float;
  static constexpr int step = 1, bytes = 32;
  PHL_INLINE static Part::F madd(Part::F sum, const uint8_t* w, const X* x, int u) {
    return Part::fma_input(Part::half(w), x, u, sum);
  }
};
struct DenseF32 {
  using X = float;
  static constexpr int step = 1, bytes = 64;
  PHL_INLINE static Part::F madd(Part::F sum, const uint8_t* w, const X* x, int u) {
    return Part::fma_input(Part::loadf(reinterpret_cast<const float*>(w)), x, u, sum);
  }
};

// B blocks `block_bytes` apart times R rows of `steps` steps each; inputs are padded to 64, so that steps come in fours.
template <class D, int R, int B>
PHL_APART void dense_kernel(const uint8_t* w, int64_t block_bytes, int64_t steps, const typename D::X* x, int64_t x_step,
                  float* out, int64_t out_step) {
  constexpr int parts = Vec::parts, S = Vec::dense_steps;
  Part::F total[R][B * parts];
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B * parts; ++b) total[r][b] = Part::zero();
  }
  for (int64_t k = 0; k < steps; k += S, w += S * D::bytes, x += S * D::step) {
    each_count<0, S>([&](auto nth) __attribute__((always_inline)) {
      constexpr int u = decltype(nth)::value;
      for (int b = 0; b < B; ++b) {
        if (R <= 2 && u * D::bytes % 64 == 0) prefetch(w + b * block_bytes + u * D::bytes + kPrefetch);
        for (int part = 0; part < parts; ++part) {
          const uint8_t* own = w + b * block_bytes + u * D::bytes + part * (D::bytes / parts);
          for (int r = 0; r < R; ++r) {
            total[r][b * parts + part] = D::madd(total[r][b * parts + part], own, x + r * x_step, u);
          }
        }
      }
    });
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B * parts; ++b) Part::storef(out + r * out_step + kLanes * b, total[r][b]);
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
