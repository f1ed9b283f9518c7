// Makes the screen of a head: a copy in four bits, of which linear/screen.h tells what it is for.
#include <cstring>

#include "../linear/half.h"
#include "../linear/kernels.h"
#include "../op.h"

namespace phl {
namespace PHL_NS {
namespace {

struct ScreenArgs {
  const Segment* parts;  // one, of a layout that is not split
  uint8_t* target;    // as kQ4S, in as many blocks
  int64_t* unfit;     // how many groups of weights do not fit: not finite, or too large
  int64_t inputs;     // padded to whole units
};

// 32 inputs of 16 features.
struct Floats {
  float x[kChunk][kBlock];
};

template <class L>
void floats_of(const uint8_t* p, int64_t chunk, Floats& out) {
  const uint8_t* unit = p + chunk / L::chunks * L::unit_bytes;
  const int c = static_cast<int>(chunk % L::chunks);
  U op[8];
  unpack<L>(unit + L::header + c * L::chunk_bytes, nullptr, op);
  uint32_t words[8][kBlock];
  for (int j = 0; j < 8; ++j) Vec::store(words[j], op[j]);
  for (int g = 0; g < L::chunk_groups; ++g) {
    float d[kBlock], m[kBlock] = {};
    Vec::storef(d, scale_of<L>(unit, c * L::chunk_groups + g));
    if constexpr (L::min) Vec::storef(m, minimum_of<L>(unit, c * L::chunk_groups + g));
    for (int i = g * L::group; i < (g + 1) * L::group; ++i) {
      for (int f = 0; f < kBlock; ++f) {
        const auto q = static_cast<int32_t>(words[i / 4][f] >> i % 4 * 8 & 255u);
        out.x[i][f] = static_cast<float>(q - L::zero) * d[f] + m[f];
      }
    }
  }
}

void dense_floats(const uint8_t* p, int64_t layout, int64_t chunk, Floats& out) {
  for (int64_t i = 0; i < kChunk; ++i) {
    const int64_t at = chunk * kChunk + i;
    if (layout == kF32) {
      std::memcpy(out.x[i], p + at * kBlock * 4, kBlock * 4);
    } else if (layout == kF16) {
      Vec::storef(out.x[i], Vec::half(p + at * kBlock * 2));
    } else {
      uint32_t pairs[kBlock];
      std::memcpy(pairs, p + at / 2 * kBlock * 4, sizeof pairs);
      for (int f = 0; f < kBlock; ++f) out.x[i][f] = bits_to_float(at % 2 ? pairs[f] & 0xffff0000u : pairs[f] << 16);
    }
  }
}

// Rounds each feature's 32 weights to the nearest of -8..7 steps; a step is such that none is off by more than half.
int64_t screen_chunk(const Floats& in, uint8_t* scales, uint8_t* chunk) {
  float largest[kBlock] = {}, inverse[kBlock];
  bool finite[kBlock];
  for (int f = 0; f < kBlock; ++f) finite[f] = true;
  for (const auto& row : in.x) {
    for (int f = 0; f < kBlock; ++f) {
      const float size = row[f] < 0.0f ? -row[f] : row[f];
      largest[f] = size > largest[f] ? size : largest[f];
      finite[f] &= size < 4e5f;
    }
  }
  int64_t unfit = 0;
  for (int f = 0; f < kBlock; ++f) {
    uint16_t d = finite[f] ? float_to_half(largest[f] / 7.5f) : 0;
    if (finite[f] && half_to_float(d) * 7.5f < largest[f]) ++d;
    unfit += !finite[f];
    inverse[f] = d == 0 ? 0.0f : 1.0f / half_to_float(d);
    std::memcpy(scales + 2 * f, &d, 2);
  }
  if (unfit != 0) return unfit;
  uint32_t words[4][kBlock] = {};
  for (int i = 0; i < kChunk; ++i) {
    const int shift = i % 4 * 8 + i / 16 * 4;
    for (int f = 0; f < kBlock; ++f) {
      const auto n = static_cast<int32_t>(in.x[i][f] * inverse[f] + 8.5f);
      words[i / 4 % 4][f] |= static_cast<uint32_t>(n > 15 ? 15 : n) << shift;
    }
  }
  std::memcpy(chunk, words, sizeof words);
  return 0;
}

void linear_screen(const ScreenArgs& a, Team& team) {
  using To = Q4S;
  const Segment& part = a.parts[0];
  const int layout = static_cast<int>(part.layout);
  const int64_t units = a.inputs / To::unit_k, bytes = a.inputs / unit_inputs(layout) * unit_size(layout);
  team.tasks(part.blocks, [&](int64_t block) {
    const uint8_t* from = part.data + block * bytes;
    uint8_t* to = a.target + block * units * To::unit_bytes;
    int64_t unfit = 0;
    for (int64_t chunk = 0; chunk < a.inputs / kChunk; ++chunk) {
      Floats space;
      if (is_dense(layout)) {
        dense_floats(from, layout, chunk, space);
      } else {
        with_quantised(layout, [&](auto l) {
          if constexpr (!decltype(l)::split) floats_of<decltype(l)>(from, chunk, space);
        });
      }
      uint8_t* unit = to + chunk / To::chunks * To::unit_bytes;
      const int64_t c = chunk % To::chunks;
      unfit += screen_chunk(space, unit + c * To::scale_step, unit + To::header + c * To::chunk_bytes);
    }
    if (unfit != 0) __atomic_fetch_add(a.unfit, unfit, __ATOMIC_RELAXED);
  });
}
PHL_FIELDS(ScreenArgs, parts, target, unfit, inputs);
PHL_OP(linear_screen, ScreenArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
