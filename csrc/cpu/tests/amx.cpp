// AMX kernels, on emulated tiles, against those of AVX-512: the same bits for integers, the same sums for bfloat16.
#include "packed.h"

using namespace phl::test;

namespace {

constexpr int64_t kThreads = 3;

// `gated`: the blocks alternate between gate and up, whose product is the result.
vector<float> multiply(int level, const Layer& layer, const vector<float>& x, int64_t rows, bool gated,
                       const float* bias) {
  const int64_t row = prepared_bytes(layer.forms, layer.padded), panel = std::min<int64_t>(rows, 100);
  const int64_t tile = 2 * (layer.padded / 32 * 768 + 64), columns = gated ? layer.rows / 2 : layer.rows;
  Buffer space(kThreads * tile + 2 * panel * row);
  vector<int64_t> segment = layer.segment;
  segment[5] = gated ? columns : 0;
  vector<float> out(size_t(rows * columns), NAN);
  run(level, "linear", x.data(), nullptr, nullptr, nullptr, segment.data(), bias, nullptr, out.data(),
      space.data.get(), rows, layer.inputs, layer.inputs, 0, 0, columns, 0, 1, layer.forms, layer.padded, panel, tile,
      0, kThreads, gated ? 1 : 0, 0.0);
  return out;
}

void same_bits(const Layer& layer, const std::string& what, bool exact) {
  for (int64_t rows : {1, 17, 33, 83}) {
    const vector<float> x = floats(rows * layer.inputs), bias = floats(layer.rows);
    for (bool gated : {false, true}) {
      if (gated && layer.rows % 32 != 0) continue;
      const float* added = rows % 2 != 0 && !gated ? bias.data() : nullptr;
      const vector<float> got = multiply(phl::kAmx, layer, x, rows, gated, added);
      const vector<float> want = multiply(phl::kAvx512, layer, x, rows, gated, added);
      close(got, want, exact ? 0.0f : 2e-5f * float(layer.inputs), what);
      if (exact) continue;
      // A row alone, whatever the way its tiles are cut.
      for (int64_t row : {int64_t{0}, rows / 2, rows - 1}) {
        const vector<float> one(x.begin() + row * layer.inputs, x.begin() + (row + 1) * layer.inputs);
        const vector<float> alone = multiply(phl::kAmx, layer, one, 1, gated, added);
        check(std::equal(alone.begin(), alone.end(), got.begin() + row * int64_t(alone.size())), what + ": company");
      }
    }
  }
}

}  // namespace

PHL_TEST(amx) {
  if (with_derived(level).back() != phl::kAmx) return;
  for (const Kind& kind : kKinds) {
    for (int64_t rows : {1, 37, 64}) {
      Layer layer = pack(kind, rows, kind.weights == 256 ? 2 : 7);
      layer.forms |= 8;  // the level below would make bytes of them
      same_bits(layer, "amx of layout " + std::to_string(kind.layout), true);
    }
  }
  for (int64_t inputs : {1, 64, 190}) {
    for (int64_t rows : {16, 37, 64}) same_bits(dense(11, rows, inputs), "amx of bfloat16", false);
  }
}
