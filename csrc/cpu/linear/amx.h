// Matrix products in AMX tiles, over the packed layouts as they are: an operand line (64 bytes: 16 features, four
// integers or a pair of bfloat16 each) is a row of a tile's second factor, prepared activations are the first.
//
// Integers: the sums of a chunk of 32 inputs are exact, and scales are applied in the order of the other kernels, so
// that results are theirs bit for bit; tiles take whole sixteens of rows where there are many, and layouts with one
// scale per 32. bfloat16: tiles round otherwise than vdpbf16ps, so that every number of rows goes through tiles, and a
// row's result does not depend on its company.
#pragma once

#ifdef PHL_AMX_EMULATED
#include "../tests/amx_emulation.h"
#else
#include <immintrin.h>
#endif

namespace phl {
namespace PHL_NS {
namespace {

constexpr int kTileRows = 16;

// The operand of ldtilecfg: palette 1, bytes per row and rows of eight tiles.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t n, int bytes) {
    rows[tile] = static_cast<uint8_t>(n);
    row_bytes[tile] = static_cast<uint16_t>(n > 0 ? bytes : 0);
  }
};
static_assert(sizeof(TileShapes) == 64);

// Some compilers do not know that tile instructions read memory.
PHL_INLINE void memory_is_read() { asm volatile("" ::: "memory"); }

PHL_INLINE void configure(const TileShapes& shapes) {
  memory_is_read();
  _tile_loadconfig(&shapes);
}

// Tiles 0 and 1: sums of two chunks; 2 and 3: rows of activations; 4 and 5: weights.
PHL_INLINE void configure_integers() {
  TileShapes shapes;
  for (int c = 0; c < 2; ++c) {
    shapes.set(c, kTileRows, 64);
    shapes.set(2 + c, kTileRows, kChunk);
    shapes.set(4 + c, kChunk / 4, 64);
  }
  configure(shapes);
}

// Scales the sums of one chunk and adds them. Unrolled early, so that gcc keeps the totals in registers.
template <class L>
PHL_INLINE void add_chunk(F (&total)[kTileRows], const int32_t (&sums)[kTileRows][kBlock], const uint8_t* chunk,
                          const Activation* act, int64_t act_step) {
  const auto* scales = reinterpret_cast<const float*>(chunk + 512);
  const F d = Vec::loadf(scales);
  F m = d;
  if constexpr (L::min) m = Vec::loadf(scales + 16);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    const Activation& a = act[r * act_step];
    const I exact = _mm512_add_epi32(Vec::load(sums[r]), start_sum<L::zero_log, L::wide, false>(a, 0));
    total[r] = accumulate<L::min, false>(total[r], exact, d, m, a, 0);
  }
}

// One unpacked block times 16 rows. Two chunks are in flight, so that scaling one overlaps multiplying the other.
template <class L>
void amx_integer_kernel(const uint8_t* tile, int64_t chunks, const Activation* act, int64_t act_step, float* out,
                        int64_t out_step) {
  alignas(64) int32_t sums[2][kTileRows][kBlock];
  F total[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) total[r] = Vec::zero();
  const int64_t a_step = act_step * int64_t{sizeof(Activation)};
  memory_is_read();
  // Rows are padded to 64 inputs: chunks come in pairs.
  for (int64_t c = 0; c < chunks; c += 2, tile += 2 * kTileChunk<L>, act += 2) {
    _tile_zero(0);
    _tile_loadd(2, act, a_step);
    _tile_loadd(4, tile, 64);
    _tile_dpbsud(0, 2, 4);
    _tile_zero(1);
    _tile_loadd(3, act + 1, a_step);
    _tile_loadd(5, tile + kTileChunk<L>, 64);
    _tile_dpbsud(1, 3, 5);
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    add_chunk<L>(total, sums[0], tile, act, act_step);
    add_chunk<L>(total, sums[1], tile + kTileChunk<L>, act + 1, act_step);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) Vec::storef(out + r * out_step, total[r]);
}

// As `run_tile`: whole sixteens of rows in tiles, the others as ever.
template <class L>
void amx_integers(const Segment& s, int64_t block, int blocks, const Rows& rows, int64_t count, const Output& out,
                  int64_t first_row, uint8_t* tile) {
  alignas(64) float y[kTileRows * 2 * kBlock];
  const int64_t units = (rows.inputs + L::unit_k - 1) / L::unit_k, chunks = units * L::chunks;
  const int64_t act_step = rows.row_bytes / 64, tile_step = chunks * kTileChunk<L> + 64;
  for (int b = 0; b < blocks; ++b) {
    unpack_block<L>(s.data + (block + b) * units * L::unit_bytes, s.data + L::lower(s.blocks, block + b, units), units,
                    tile + b * tile_step);
  }
  const int64_t whole = chunks % 2 == 0 ? count / kTileRows * kTileRows : 0;
  for (int64_t row = 0; row < whole; row += kTileRows) {
    const Place place(out, s, block, blocks, first_row + row, y);
    for (int b = 0; b < blocks; ++b) {
      amx_integer_kernel<L>(tile + b * tile_step, chunks, rows.int8(row), act_step, place.to + b * kBlock, place.step);
    }
    if (!place.direct) out.finish(s, block, blocks, first_row + row, kTileRows, y);
  }
  even_parts(count - whole, Vec::tile_rows, [&](int64_t at, int64_t n_rows) {
    const int64_t row = whole + at;
    const Place place(out, s, block, blocks, first_row + row, y);
    for (int b = 0; b < blocks; ++b) {
      with_count<Vec::tile_rows>(n_rows, [&](auto n) {
        tile_kernel<L, decltype(n)::value, 1, false>(tile + b * tile_step, tile_step, chunks, rows.int8(row), act_step,
                                                     place.to + b * kBlock, place.step, Lines{});
      });
    }
    if (!place.direct) out.finish(s, block, blocks, first_row + row, n_rows, y);
  });
}

// Tiles 0 to 3: sums of (rows, block); 4 and 5: activations of up to 16 rows each; 6 and 7: a block each.
PHL_INLINE void configure_halves(int64_t upper, int64_t lower) {
  TileShapes shapes;
  for (int b = 0; b < 2; ++b) {
    shapes.set(b, upper, 64);
    shapes.set(2 + b, lower, 64);
    shapes.set(6 + b, kTileRows, 64);
  }
  shapes.set(4, upper, 64);
  shapes.set(5, lower, 64);
  configure(shapes);
}

// Up to 32 rows (`Both`: more than 16) times one or two blocks of bfloat16, 32 inputs a step.
template <bool Both, bool Two>
void amx_half_kernel(const uint8_t* w, int64_t block_bytes, const uint16_t* x, int64_t x_bytes, float* out,
                     int64_t out_bytes) {
  const auto* lower = reinterpret_cast<const uint8_t*>(x) + kTileRows * x_bytes;
  const auto* upper = reinterpret_cast<const uint8_t*>(x);
  _tile_zero(0);
  if constexpr (Two) _tile_zero(1);
  if constexpr (Both) _tile_zero(2);
  if constexpr (Both && Two) _tile_zero(3);
  memory_is_read();
  for (int64_t at = 0; at < block_bytes; at += 1024, upper += 64, lower += 64) {
    if constexpr (!Both) {
      for (int line = 0; line < 1024; line += 64) prefetch(w + at + 2 * kPrefetch + line);
    }
    _tile_loadd(6, w + at, 64);
    if constexpr (Two) _tile_loadd(7, w + block_bytes + at, 64);
    _tile_loadd(4, upper, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Two) _tile_dpbf16ps(1, 4, 7);
    if constexpr (Both) {
      _tile_loadd(5, lower, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Two) _tile_dpbf16ps(3, 5, 7);
    }
  }
  auto* to = reinterpret_cast<uint8_t*>(out);
  _tile_stored(0, to, out_bytes);
  if constexpr (Two) _tile_stored(1, to + 64, out_bytes);
  if constexpr (Both) _tile_stored(2, to + kTileRows * out_bytes, out_bytes);
  if constexpr (Both && Two) _tile_stored(3, to + kTileRows * out_bytes + 64, out_bytes);
}

// As `run_dense`, rows by 32.
PHL_INLINE void amx_halves(const Segment& s, int64_t first, int64_t last, const Rows& rows, int64_t count,
                           const Output& out, int64_t first_row) {
  alignas(64) float y[2 * kTileRows * 2 * kBlock];
  const int64_t block_bytes = rows.inputs * 2 * kBlock;
  const int64_t group = kDenseGroup / (2 * block_bytes) > 1 ? kDenseGroup / (2 * block_bytes) * 2 : 2;
  int64_t shaped = 0;  // rows that the tiles have now
  for (int64_t begin = first; begin < last; begin += group) {
    const int64_t end = begin + group < last ? begin + group : last;
    for (int64_t row = 0; row < count; row += 2 * kTileRows) {
      const int64_t n = count - row < 2 * kTileRows ? count - row : 2 * kTileRows;
      if (n != shaped) configure_halves(n < kTileRows ? n : kTileRows, n < kTileRows ? 0 : n - kTileRows);
      shaped = n;
      for (int64_t block = begin; block < end; block += 2) {
        const int blocks = end - block > 1 ? 2 : 1;
        const uint8_t* w = s.data + block * block_bytes;
        const Place place(out, s, block, blocks, first_row + row, y);
        const auto run = [&](auto kernel) {
          kernel(w, block_bytes, rows.half(row), rows.row_bytes, place.to, place.step * int64_t{sizeof(float)});
        };
        if (n > kTileRows) {
          blocks == 2 ? run(amx_half_kernel<true, true>) : run(amx_half_kernel<true, false>);
        } else {
          blocks == 2 ? run(amx_half_kernel<false, true>) : run(amx_half_kernel<false, false>);
        }
        if (!place.direct) out.finish(s, block, blocks, first_row + row, n, y);
      }
    }
  }
}

// Does what `run_blocks` is asked to if tiles are the way to do it; false: they are not.
PHL_INLINE bool amx_blocks(const Segment& s, int64_t first, int64_t last, const Rows& rows, int64_t count,
                           const Output& out, int64_t first_row, uint8_t* tile) {
  if (s.layout == kBF16) {
    amx_halves(s, first, last, rows, count, out, first_row);
    _tile_release();
    return true;
  }
  if (is_dense(static_cast<int>(s.layout)) || count <= kFewRows) return false;
  return with_quantised(static_cast<int>(s.layout), [&](auto l) {
    using L = decltype(l);
    if constexpr (L::chunk_groups != 1) {
      return false;  // two scales a chunk: tiles would be half empty, and scaling is most of the work
    } else {
      configure_integers();
      for (int64_t block = first; block < last; block += 2) {
        amx_integers<L>(s, block, last - block > 1 ? 2 : 1, rows, count, out, first_row, tile);
      }
      _tile_release();
      return true;
    }
  });
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
