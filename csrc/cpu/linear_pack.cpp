// From checkpoints to packed layouts (GGUF blocks as they are in the file, or dense tensors), and rows back to floats.
#include <cstring>

#include "linear/half.h"
#include "linear/layout.h"
#include "op.h"

namespace phl {
namespace PHL_NS {
namespace {

uint16_t load16(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}
uint32_t load32(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}
void store16(uint8_t* p, uint16_t x) { std::memcpy(p, &x, 2); }
void store32(uint8_t* p, uint32_t x) { std::memcpy(p, &x, 4); }

// ---- planes: four inputs of one feature are a 32-bit word ----------------------------------------------------------

constexpr uint32_t bytes_of(uint32_t b) { return b * 0x01010101u; }

// Writes 32 unsigned integers of feature f into a cleared chunk.
template <class L>
void put(uint8_t* chunk, [[maybe_unused]] uint8_t* lower, int f, const uint8_t* q) {
  constexpr int Bits = L::bits;
  uint8_t* lane = chunk + 4 * f;
  uint32_t v[8];
  for (int j = 0; j < 8; ++j) v[j] = load32(q + 4 * j);
  if constexpr (L::split) {
    for (int t = 0; t < 4; ++t) {
      store32(lane + 64 * t, (v[t] >> 4 & bytes_of(15)) | (v[t + 4] & bytes_of(240)));
      store32(lower + 4 * f + 64 * t, (v[t] & bytes_of(15)) | (v[t + 4] & bytes_of(15)) << 4);
    }
    return;
  }
  if constexpr (Bits == 8) {
    for (int j = 0; j < 8; ++j) store32(lane + 64 * j, v[j]);
    return;
  }
  if constexpr (Bits >= 4) {
    for (int t = 0; t < 4; ++t) {
      store32(lane + 64 * t, (v[t] & bytes_of(15)) | (v[t + 4] & bytes_of(15)) << 4);
    }
  } else {
    for (int t = 0; t < 2; ++t) {
      uint32_t word = 0;
      for (int i = 0; i < 4; ++i) word |= (v[4 * t + i] & bytes_of(3)) << 2 * i;
      store32(lane + 64 * t, word);
    }
  }
  if constexpr (Bits == 5 || Bits == 3) {
    uint32_t word = 0;
    for (int j = 0; j < 8; ++j) word |= (v[j] >> (Bits - 1) & bytes_of(1)) << j;
    store32(lane + (Bits - 1) * 64, word);
  }
  if constexpr (Bits == 6) {
    for (int t = 0; t < 2; ++t) {
      uint32_t word = 0;
      for (int i = 0; i < 4; ++i) word |= (v[4 * t + i] >> 4 & bytes_of(3)) << 2 * i;
      store32(lane + 256 + 64 * t, word);
    }
  }
}

// Reads what `put` wrote.
template <class L>
void get(const uint8_t* chunk, [[maybe_unused]] const uint8_t* lower, int f, uint8_t* q) {
  constexpr int Bits = L::bits;
  const uint8_t* lane = chunk + 4 * f;
  for (int j = 0; j < 8; ++j) {
    uint32_t v;
    if constexpr (L::split) {
      const int shift = 4 * (j >> 2), at = 64 * (j & 3);
      v = (load32(lane + at) >> shift & bytes_of(15)) << 4 | (load32(lower + 4 * f + at) >> shift & bytes_of(15));
    } else if constexpr (Bits == 8) {
      v = load32(lane + 64 * j);
    } else if constexpr (Bits >= 4) {
      v = load32(lane + 64 * (j & 3)) >> 4 * (j >> 2) & bytes_of(15);
    } else {
      v = load32(lane + 64 * (j >> 2)) >> 2 * (j & 3) & bytes_of(3);
    }
    if constexpr (Bits == 5 || Bits == 3) v |= (load32(lane + (Bits - 1) * 64) >> j & bytes_of(1)) << (Bits - 1);
    if constexpr (Bits == 6) v |= (load32(lane + 256 + 64 * (j >> 2)) >> 2 * (j & 3) & bytes_of(3)) << 4;
    store32(q + 4 * j, v);
  }
}

// ---- GGUF blocks ---------------------------------------------------------------------------------------------------
// Types of 32 weights: `decode` gives the unsigned integers, the float16 scale and minimum.

void nibbles(const uint8_t* packed, uint8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = packed[i] & 15;
    q[i + 16] = packed[i] >> 4;
  }
}
void fifth_bits(uint32_t high, uint8_t* q) {
  for (int i = 0; i < 32; ++i) q[i] |= (high >> i & 1) << 4;
}

struct FromQ4_0 {
  using Layout = Q4S;
  static constexpr int bytes = 18;
  static void decode(const uint8_t* p, uint8_t* q, uint16_t* d, uint16_t*) {
    *d = load16(p);
    nibbles(p + 2, q);
  }
};
struct FromQ4_1 {
  using Layout = Q4M;
  static constexpr int bytes = 20;
  static void decode(const uint8_t* p, uint8_t* q, uint16_t* d, uint16_t* m) {
    *d = load16(p);
    *m = load16(p + 2);
    nibbles(p + 4, q);
  }
};
struct FromQ5_0 {
  using Layout = Q5S;
  static constexpr int bytes = 22;
  static void decode(const uint8_t* p, uint8_t* q, uint16_t* d, uint16_t*) {
    *d = load16(p);
    nibbles(p + 6, q);
    fifth_bits(load32(p + 2), q);
  }
};
struct FromQ5_1 {
  using Layout = Q5M;
  static constexpr int bytes = 24;
  static void decode(const uint8_t* p, uint8_t* q, uint16_t* d, uint16_t* m) {
    *d = load16(p);
    *m = load16(p + 2);
    nibbles(p + 8, q);
    fifth_bits(load32(p + 4), q);
  }
};
struct FromQ8_0 {
  using Layout = Q8S;
  static constexpr int bytes = 34;
  static void decode(const uint8_t* p, uint8_t* q, uint16_t* d, uint16_t*) {
    *d = load16(p);
    for (int i = 0; i < 32; ++i) q[i] = p[2 + i] ^ 0x80;
  }
};
struct FromQ8_0Split : FromQ8_0 {
  using Layout = Q8P;
};
struct FromIQ4_NL {
  using Layout = Q4N;
  static constexpr int bytes = 18;
  static void decode(const uint8_t* p, uint8_t* q, uint16_t* d, uint16_t*) {
    *d = load16(p);
    nibbles(p + 2, q);
  }
};

// Types of 256 weights: all integers, byte scales and minima per group, and their two float16 factors.
struct FromQ2_K {
  using Layout = Q2K;
  static constexpr int bytes = 84;
  static void decode(const uint8_t* p, uint8_t* q, int8_t* scale, int8_t* minimum, uint16_t* d, uint16_t* m) {
    for (int i = 0; i < 16; ++i) scale[i] = p[i] & 15, minimum[i] = p[i] >> 4;
    for (int i = 0; i < 256; ++i) q[i] = p[16 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
    *d = load16(p + 80);
    *m = load16(p + 82);
  }
};
struct FromQ3_K {
  using Layout = Q3K;
  static constexpr int bytes = 110;
  static void decode(const uint8_t* p, uint8_t* q, int8_t* scale, int8_t*, uint16_t* d, uint16_t*) {
    const uint8_t *high = p, *low = p + 32, *s = p + 96;
    for (int i = 0; i < 256; ++i) {
      q[i] = (low[i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3) | (high[i % 32] >> i / 32 & 1) << 2;
    }
    for (int i = 0; i < 16; ++i) {
      const int four = i < 8 ? s[i] & 15 : s[i - 8] >> 4;
      scale[i] = static_cast<int8_t>((four | (s[8 + i % 4] >> i / 4 * 2 & 3) << 4) - 32);
    }
    *d = load16(p + 108);
  }
};

// Six-bit scales and minima of Q4_K and Q5_K: eight of each in twelve bytes.
void six_bit_scales(const uint8_t* s, int8_t* scale, int8_t* minimum) {
  for (int i = 0; i < 4; ++i) {
    scale[i] = s[i] & 63;
    minimum[i] = s[i + 4] & 63;
    scale[i + 4] = static_cast<int8_t>((s[i + 8] & 15) | s[i] >> 6 << 4);
    minimum[i + 4] = static_cast<int8_t>(s[i + 8] >> 4 | s[i + 4] >> 6 << 4);
  }
}
struct FromQ4_K {
  using Layout = Q4K;
  static constexpr int bytes = 144;
  static void decode(const uint8_t* p, uint8_t* q, int8_t* scale, int8_t* minimum, uint16_t* d, uint16_t* m) {
    *d = load16(p);
    *m = load16(p + 2);
    six_bit_scales(p + 4, scale, minimum);
    for (int i = 0; i < 256; ++i) q[i] = p[16 + i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15;
  }
};
struct FromQ5_K {
  using Layout = Q5K;
  static constexpr int bytes = 176;
  static void decode(const uint8_t* p, uint8_t* q, int8_t* scale, int8_t* minimum, uint16_t* d, uint16_t* m) {
    *d = load16(p);
    *m = load16(p + 2);
    six_bit_scales(p + 4, scale, minimum);
    for (int i = 0; i < 256; ++i) {
      q[i] = (p[48 + i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15) | (p[16 + i % 32] >> i / 32 & 1) << 4;
    }
  }
};
struct FromQ6_K {
  using Layout = Q6K;
  static constexpr int bytes = 210;
  static void decode(const uint8_t* p, uint8_t* q, int8_t* scale, int8_t*, uint16_t* d, uint16_t*) {
    for (int i = 0; i < 256; ++i) {
      const int half = i / 128, quarter = i / 32 % 4, l = i % 32;
      const int low = p[half * 64 + quarter % 2 * 32 + l] >> quarter / 2 * 4 & 15;
      q[i] = static_cast<uint8_t>(low | (p[128 + half * 32 + l] >> quarter * 2 & 3) << 4);
    }
    std::memcpy(scale, p + 192, 16);
    *d = load16(p + 208);
  }
};

// ---- packing -------------------------------------------------------------------------------------------------------

struct PackArgs {
  const uint8_t* source;
  uint8_t* target;  // of the fused layer's segment
  int64_t rows, row_bytes, kind, units, first_block, block_step;
};

// One unit of one feature. `left` is how many source blocks the row still has.
template <class From>
void pack_unit(const uint8_t* p, int64_t left, uint8_t* unit, [[maybe_unused]] uint8_t* lower, int f) {
  using L = typename From::Layout;
  uint8_t q[256];
  if constexpr (L::super) {
    if (left <= 0) return;
    int8_t scale[16], minimum[16];
    uint16_t d = 0, m = 0;
    From::decode(p, q, scale, minimum, &d, &m);
    store16(unit + 2 * f, d);
    if constexpr (L::min) store16(unit + 32 + 2 * f, m ^ 0x8000);
    for (int g = 0; g < L::groups; ++g) {
      unit[L::factor_bytes + g * 16 + f] = static_cast<uint8_t>(scale[g]);
      if constexpr (L::min) unit[L::minimum_offset + g * 16 + f] = static_cast<uint8_t>(minimum[g]);
    }
    for (int c = 0; c < L::chunks; ++c) put<L>(unit + L::header + c * L::chunk_bytes, nullptr, f, q + 32 * c);
  } else {
    for (int c = 0; c < L::chunks && c < left; ++c) {
      uint16_t d = 0, m = 0;
      From::decode(p + c * From::bytes, q, &d, &m);
      store16(unit + c * L::scale_step + 2 * f, d);
      if constexpr (L::min) store16(unit + c * L::scale_step + L::minimum_offset + 2 * f, m);
      put<L>(unit + L::header + c * L::chunk_bytes, lower + c * L::chunk_bytes, f, q);
    }
  }
}

template <class From>
void pack_block(const PackArgs& a, int64_t block) {
  using L = typename From::Layout;
  constexpr int per_unit = L::super ? 1 : L::chunks;
  uint8_t* target = a.target + (a.first_block + block * a.block_step) * a.units * L::unit_bytes;
  std::memset(target, 0, a.units * L::unit_bytes);
  // A matrix that is split has one part.
  uint8_t* lower = a.target + L::lower((a.rows + kBlock - 1) / kBlock, block, a.units);
  if (L::split) std::memset(lower, 0, a.units * L::lower_bytes);
  const int64_t blocks = a.row_bytes / From::bytes;
  for (int f = 0; f < kBlock && block * kBlock + f < a.rows; ++f) {
    const uint8_t* p = a.source + (block * kBlock + f) * a.row_bytes;
    for (int64_t u = 0; u < a.units; ++u) {
      pack_unit<From>(p + u * per_unit * From::bytes, blocks - u * per_unit, target + u * L::unit_bytes,
                      lower + u * L::lower_bytes, f);
    }
  }
}

// Calls f with what reads the GGUF blocks of a layout: each type has a layout of its own, and Q8_0 the split one too.
template <class F>
void with_source(int64_t layout, F&& f) {
  switch (layout) {
    case kQ4S: return f(FromQ4_0{});
    case kQ4M: return f(FromQ4_1{});
    case kQ5S: return f(FromQ5_0{});
    case kQ5M: return f(FromQ5_1{});
    case kQ8S: return f(FromQ8_0{});
    case kQ8P: return f(FromQ8_0Split{});
    case kQ2K: return f(FromQ2_K{});
    case kQ3K: return f(FromQ3_K{});
    case kQ4K: return f(FromQ4_K{});
    case kQ5K: return f(FromQ5_K{});
    case kQ6K: return f(FromQ6_K{});
    case kQ4N: return f(FromIQ4_NL{});
    default: break;
  }
}

// `kind` is the layout.
void linear_pack(const PackArgs& a, Team& team) {
  team.tasks((a.rows + kBlock - 1) / kBlock, [&](int64_t block) {
    with_source(a.kind, [&](auto from) { pack_block<decltype(from)>(a, block); });
  });
}
PHL_FIELDS(PackArgs, source, target, rows, row_bytes, kind, units, first_block, block_step);
PHL_OP(linear_pack, PackArgs);

template <class T, int Step>
void pack_dense_rows(const PackArgs& a, int64_t block, uint8_t* target, int64_t first) {
  const int64_t inputs = a.row_bytes / int64_t{sizeof(T)};
  for (int f = 0; f < kBlock && block * kBlock + f < a.rows; ++f) {
    const uint8_t* p = a.source + (block * kBlock + f) * a.row_bytes;
    for (int64_t k = first; k < inputs; ++k) {
      std::memcpy(target + ((k / Step * kBlock + f) * Step + k % Step) * sizeof(T), p + k * sizeof(T), sizeof(T));
    }
  }
}

typedef uint32_t Words __attribute__((vector_size(16)));

inline __attribute__((always_inline)) Words words(const uint8_t* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

// Four words of each of four features -> the four features' word of each place.
inline __attribute__((always_inline)) void transpose(const uint8_t* source, int64_t row_bytes, uint8_t* target) {
  const Words a = words(source), b = words(source + row_bytes);
  const Words c = words(source + 2 * row_bytes), d = words(source + 3 * row_bytes);
  const Words ab = {a[0], b[0], a[1], b[1]}, ab2 = {a[2], b[2], a[3], b[3]};
  const Words cd = {c[0], d[0], c[1], d[1]}, cd2 = {c[2], d[2], c[3], d[3]};
  const Words out[4] = {{ab[0], ab[1], cd[0], cd[1]}, {ab[2], ab[3], cd[2], cd[3]},
                        {ab2[0], ab2[1], cd2[0], cd2[1]}, {ab2[2], ab2[3], cd2[2], cd2[3]}};
  for (int k = 0; k < 4; ++k) std::memcpy(target + k * kBlock * 4, &out[k], sizeof out[k]);
}

// Layouts whose places are words of 32 bits: a matrix of words is transposed, so that what is written is written in order.
template <class T, int Step>
void pack_dense_block(const PackArgs& a, int64_t block) {
  const int64_t padded = a.units * 2;
  uint8_t* target = a.target + (a.first_block + block * a.block_step) * padded * kBlock * int64_t{sizeof(T)};
  const bool whole = (block + 1) * kBlock <= a.rows && Step * sizeof(T) == 4;
  const int64_t done = whole ? a.row_bytes / 16 * 16 : 0;  // bytes of a row
  for (int64_t at = 0; at < done; at += 16) {
    const uint8_t* source = a.source + block * kBlock * a.row_bytes + at;
    for (int f = 0; f < kBlock; f += 4) transpose(source + f * a.row_bytes, a.row_bytes, target + at * kBlock + 4 * f);
  }
  std::memset(target + done * kBlock, 0, padded * kBlock * int64_t{sizeof(T)} - done * kBlock);
  pack_dense_rows<T, Step>(a, block, target, done / int64_t{sizeof(T)});
}

void linear_pack_dense(const PackArgs& a, Team& team) {
  team.tasks((a.rows + kBlock - 1) / kBlock, [&](int64_t block) {
    switch (a.kind) {
      case kBF16: return pack_dense_block<uint16_t, 2>(a, block);
      case kF16: return pack_dense_block<uint16_t, 1>(a, block);
      case kF32: return pack_dense_block<float, 1>(a, block);
      default: break;
    }
  });
}
PHL_OP(linear_pack_dense, PackArgs);

// ---- rows back -----------------------------------------------------------------------------------------------------

// 32 weights of one feature: (q - zero) * scale + minimum, rounded as GGUF's reference does.
template <class L>
void unpack_chunk(const uint8_t* unit, const uint8_t* lower, int c, int f, float* out) {
  uint8_t q[32];
  get<L>(unit + L::header + c * L::chunk_bytes, lower + (L::split ? c * L::chunk_bytes : 0), f, q);
  for (int g = 0; g < L::chunk_groups; ++g) {
    const int at = c * L::chunk_groups + g;
    float d, m = 0.0f;
    if constexpr (L::super) {
      d = half_to_float(load16(unit + 2 * f)) *
          static_cast<float>(static_cast<int8_t>(unit[L::factor_bytes + at * 16 + f]));
      if constexpr (L::min) {
        m = half_to_float(load16(unit + 32 + 2 * f)) *
            static_cast<float>(static_cast<int8_t>(unit[L::minimum_offset + at * 16 + f]));
      }
    } else {
      d = half_to_float(load16(unit + at * L::scale_step + 2 * f));
      if constexpr (L::min) m = half_to_float(load16(unit + at * L::scale_step + L::minimum_offset + 2 * f));
    }
    for (int i = g * L::group; i < (g + 1) * L::group; ++i) {
      const int v = (L::table ? kTable4[q[i] & 15] : q[i]) - L::zero;
      out[i] = L::min ? static_cast<float>(v) * d + m : static_cast<float>(v) * d;
    }
  }
}

struct RowsArgs {
  const int64_t* ids;
  const Segment* parts;
  float* out;
  int64_t count, inputs, padded_inputs, part_count, out_stride;
  double scale;
};

void dense_row(const uint8_t* p, int64_t layout, int f, int64_t inputs, float* out) {
  const int64_t step = dense_step(static_cast<int>(layout));
  for (int64_t k = 0; k < inputs; ++k) {
    const int64_t at = (k / step * kBlock + f) * step + k % step;
    if (layout == kF32) {
      std::memcpy(out + k, p + 4 * at, 4);
    } else {
      const uint16_t x = load16(p + 2 * at);
      out[k] = layout == kBF16 ? bf16_to_float(x) : half_to_float(x);
    }
  }
}

void packed_row(const Segment& part, int64_t block, int f, const RowsArgs& a, float* out) {
  if (is_dense(static_cast<int>(part.layout))) {
    const int64_t bytes = a.padded_inputs * kBlock * dense_bytes(static_cast<int>(part.layout));
    return dense_row(part.data + block * bytes, part.layout, f, a.inputs, out);
  }
  with_quantised(static_cast<int>(part.layout), [&](auto l) {
    using L = decltype(l);
    const int64_t units = a.padded_inputs / L::unit_k;
    const uint8_t* p = part.data + block * units * L::unit_bytes;
    const uint8_t* lower = part.data + L::lower(part.blocks, block, units);
    for (int64_t at = 0; at < a.inputs; at += kChunk) {
      const uint8_t* unit = p + at / L::unit_k * L::unit_bytes;
      const uint8_t* rest = lower + at / L::unit_k * L::lower_bytes;
      const int c = static_cast<int>(at % L::unit_k / kChunk);
      if (at + kChunk <= a.inputs) {
        unpack_chunk<L>(unit, rest, c, f, out + at);
      } else {
        float space[kChunk];
        unpack_chunk<L>(unit, rest, c, f, space);
        std::memcpy(out + at, space, 4 * (a.inputs - at));
      }
    }
  });
}

// Row `id` of the fused matrix; false: there is no such row.
bool find_row(const RowsArgs& a, int64_t id, float* out) {
  for (int64_t i = 0; i < a.part_count; ++i) {
    const Segment& part = a.parts[i];
    const int64_t at = id - part.first_column, n = part.half ? 2 * part.half : part.features;
    if (at < 0 || at >= n) continue;
    const int64_t block = part.half ? at % part.half / kBlock * 2 + at / part.half : at / kBlock;
    packed_row(part, block, static_cast<int>((part.half ? at % part.half : at) % kBlock), a, out);
    return true;
  }
  return false;
}

// Rows of the weight as float32 times `scale`: embedding lookup, and reading weights back. A row that does not exist
// is filled with NaN: ids are checked long before, so this is a bug that must be seen.
void linear_rows(const RowsArgs& a, Team& team) {
  const auto scale = static_cast<float>(a.scale);
  team.split(a.count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = a.out + i * a.out_stride;
      const bool found = find_row(a, a.ids[i], out);
      for (int64_t k = 0; k < a.inputs; ++k) out[k] = found ? out[k] * scale : __builtin_nanf("");
    }
  });
}
PHL_FIELDS(RowsArgs, ids, parts, out, count, inputs, padded_inputs, part_count, out_stride, scale);
PHL_OP(linear_rows, RowsArgs);

// For Python, which lays out the memory: inputs and bytes of a layout's unit, weights and bytes of a GGUF block that
// becomes one (0: the layout is not made of blocks).
struct GeometryArgs {
  int64_t* out;  // [kLayoutCount][4]
};
template <class From>
void source_block(int64_t* out) {
  out[0] = From::Layout::super ? 256 : 32;
  out[1] = From::bytes;
}
void linear_geometry(const GeometryArgs& a, Team& team) {
  if (team.thread != 0) return;
  for (int layout = 0; layout < kLayoutCount; ++layout) {
    int64_t* out = a.out + 4 * layout;
    out[0] = unit_inputs(layout), out[1] = unit_size(layout), out[2] = out[3] = 0;
    if (!is_dense(layout)) with_source(layout, [&](auto from) { source_block<decltype(from)>(out + 2); });
  }
}
PHL_FIELDS(GeometryArgs, out);
PHL_OP(linear_geometry, GeometryArgs);

PHL_CONSTANT(layout, kQ4S);
PHL_CONSTANT(layout, kQ4M);
PHL_CONSTANT(layout, kQ5S);
PHL_CONSTANT(layout, kQ5M);
PHL_CONSTANT(layout, kQ8S);
PHL_CONSTANT(layout, kQ2K);
PHL_CONSTANT(layout, kQ3K);
PHL_CONSTANT(layout, kQ4K);
PHL_CONSTANT(layout, kQ5K);
PHL_CONSTANT(layout, kQ6K);
PHL_CONSTANT(layout, kQ4N);
PHL_CONSTANT(layout, kBF16);
PHL_CONSTANT(layout, kF16);
PHL_CONSTANT(layout, kF32);
PHL_CONSTANT(layout, kQ8P);
PHL_CONSTANT(layout, kLayoutCount);
PHL_CONSTANT(layout, kBlock);
PHL_CONSTANT(layout, kChunk);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
