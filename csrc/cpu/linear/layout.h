// Packed weight layouts of the linear kernels, shared by the packer, the kernels and embedding lookups.
//
// A matrix [out_features, in_features] is cut into blocks of 16 output features. A block is a row of units along
// in_features (32, 64 or 256 inputs each); a unit is a header of scales followed by chunks of 32 inputs. The block is
// one contiguous stream, read once from front to back. A chunk holds its 16 x 32 integers as bit planes of 64-byte
// vectors: in "operand" j (0..7), byte f * 4 + k is input 4 * j + k of feature f, what one vpdpbusd takes.
//
//   nibble plane  4 vectors   vector t: low nibble operand t, high nibble operand t + 4
//   pair plane    2 vectors   vector t: bits 2i operand 4 * t + i
//   bit plane     1 vector    bit j: operand j
//   byte plane    8 vectors   operand j
//
// Bits 2: pairs. 3: pairs, bits (value bit 2). 4: nibbles. 5: nibbles, bits (value bit 4). 6: nibbles, pairs. 8: bytes,
// or "split": nibbles of the upper halves here and, behind all blocks of the matrix, those of the lower halves, in the
// order of the blocks. The first part of such a matrix is one of 4 bits by itself, which screen.h reads.
// The weight is (q - zero) * scale + minimum. Scales are float16 as GGUF stores them, or ("super") a signed byte per
// group times a float16 per 256, exactly as in GGUF's K types; the minimum likewise (its factor stored negated).
#pragma once

#include <cstdint>

#include "../isa.h"

namespace phl {
namespace PHL_NS {
namespace {

enum Layout : int32_t {
  kQ4S = 0,   // 4 bits, scale per 32 (Q4_0)
  kQ4M = 1,   // 4 bits, scale and minimum per 32 (Q4_1, online int4)
  kQ5S = 2,   // Q5_0
  kQ5M = 3,   // Q5_1
  kQ8S = 4,   // Q8_0, online int8
  kQ2K = 5,
  kQ3K = 6,
  kQ4K = 7,
  kQ5K = 8,
  kQ6K = 9,
  kQ4N = 10,  // 4 bits through a table (IQ4_NL)
  kBF16 = 11,
  kF16 = 12,
  kF32 = 13,
  kQ8P = 14,  // as Q8S, split
  kLayoutCount = 15,
};

constexpr int kBlock = 16;  // output features per block
constexpr int kChunk = 32;  // inputs per chunk

template <int Bits_, int Group_, bool Super_, bool Min_, int ZeroLog_, bool Table_ = false, bool Split_ = false>
struct Quantised {
  static constexpr int bits = Bits_;          // stored bits per weight
  static constexpr int group = Group_;        // inputs per scale: 16 or 32
  static constexpr bool super = Super_;       // byte scales times one float16 per 256
  static constexpr bool min = Min_;           // has a minimum (then zero is 0)
  static constexpr int zero_log = ZeroLog_;   // zero = 1 << zero_log; -1: none
  static constexpr bool table = Table_;
  static constexpr bool split = Split_;
  static constexpr bool wide = Bits_ == 8 || Table_;  // operands use all eight bits
  static constexpr int zero = ZeroLog_ < 0 ? 0 : 1 << (ZeroLog_ < 0 ? 0 : ZeroLog_);
  static constexpr int unit_k = Super_ ? 256 : (Min_ ? 32 : 64);
  static constexpr int chunks = unit_k / kChunk;
  static constexpr int groups = unit_k / Group_;
  static constexpr int chunk_groups = kChunk / Group_;
  static constexpr int chunk_bytes = (Split_ ? Bits_ / 2 : Bits_) * 64;
  static constexpr int factor_bytes = Super_ ? (Min_ ? 64 : 32) : 0;
  static constexpr int scale_step = Super_ ? 16 : (Min_ ? 64 : 32);  // from one group's scales to the next
  static constexpr int minimum_offset = Super_ ? factor_bytes + groups * 16 : 32;
  static constexpr int header_raw = Super_ ? factor_bytes + groups * (Min_ ? 32 : 16) : groups * (Min_ ? 64 : 32);
  static constexpr int header = (header_raw + 63) / 64 * 64;
  static constexpr int unit_bytes = header + chunks * chunk_bytes;
  static constexpr int lower_bytes = Split_ ? chunks * chunk_bytes : 0;  // of a unit, in the second part

  // Where the lower halves of a block are, in a matrix of so many blocks; the block's units are at block * units *
  // unit_bytes.
  static constexpr int64_t lower(int64_t blocks, int64_t block, int64_t units) {
    return (blocks * unit_bytes + block * lower_bytes) * units;
  }
};

using Q4S = Quantised<4, 32, false, false, 3>;
using Q4M = Quantised<4, 32, false, true, -1>;
using Q5S = Quantised<5, 32, false, false, 4>;
using Q5M = Quantised<5, 32, false, true, -1>;
using Q8S = Quantised<8, 32, false, false, 7>;
using Q2K = Quantised<2, 16, true, true, -1>;
using Q3K = Quantised<3, 16, true, false, 2>;
using Q4K = Quantised<4, 32, true, true, -1>;
using Q5K = Quantised<5, 32, true, true, -1>;
using Q6K = Quantised<6, 16, true, false, 5>;
using Q4N = Quantised<4, 32, false, false, 7, true>;
using Q8P = Quantised<8, 32, false, false, 7, false, true>;

// IQ4_NL's sixteen values, plus 128 so that they are unsigned operands.
constexpr uint8_t kTable4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

// Dense layouts: [in_features / step][16 features][step].
constexpr int dense_step(int layout) { return layout == kBF16 ? 2 : 1; }
constexpr int dense_bytes(int layout) { return layout == kF32 ? 4 : 2; }

// Calls f.template operator()<L>() with the quantised layout's description.
template <class F>
inline auto with_quantised(int layout, F&& f) {
  switch (layout) {
    case kQ4S: return f(Q4S{});
    case kQ4M: return f(Q4M{});
    case kQ5S: return f(Q5S{});
    case kQ5M: return f(Q5M{});
    case kQ8S: return f(Q8S{});
    case kQ2K: return f(Q2K{});
    case kQ3K: return f(Q3K{});
    case kQ4K: return f(Q4K{});
    case kQ5K: return f(Q5K{});
    case kQ6K: return f(Q6K{});
    case kQ8P: return f(Q8P{});
    default: return f(Q4N{});
  }
}

inline bool is_dense(int layout) { return layout >= kBF16 && layout <= kF32; }

// Inputs per unit and bytes per unit of 16 features: a block of K inputs takes ceil(K / unit_k) * unit_bytes.
inline int64_t unit_inputs(int layout) {
  if (is_dense(layout)) return 2;
  return with_quantised(layout, [](auto l) { return int64_t{decltype(l)::unit_k}; });
}
inline int64_t unit_size(int layout) {
  if (is_dense(layout)) return int64_t{2} * kBlock * dense_bytes(layout);
  return with_quantised(layout, [](auto l) { return int64_t{decltype(l)::unit_bytes + decltype(l)::lower_bytes}; });
}

// A part of a fused layer: blocks of one layout whose features are consecutive output columns. With `half`, blocks
// alternate between the first and the second `half` columns (gate and up), so that a pair can be combined.
struct Segment {
  const uint8_t* data;
  int64_t layout, blocks, features, first_column, half;

  PHL_INLINE int64_t column(int64_t block) const {
    return half ? first_column + (block & 1) * half + (block >> 1) * kBlock : first_column + block * kBlock;
  }
  PHL_INLINE int64_t valid(int64_t block) const {
    const int64_t left = features - block * kBlock;
    return left < kBlock ? left : kBlock;
  }
};

// One row of quantised activations is a line of these, one per chunk: everything a kernel needs of 32 inputs.
struct alignas(64) Activation {
  int8_t q[32];
  float scale;       // x is about q * scale
  int32_t sum;       // of q
  float scaled_sum;  // sum * scale
  int32_t half_sum[2];
  float half_scaled_sum[2];
  int32_t minus_zero;  // -128 * sum: what bytes with a zero of 128 add
};
static_assert(sizeof(Activation) == 64);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
