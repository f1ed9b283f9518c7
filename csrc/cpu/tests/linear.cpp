// Packing, linear layers, rows back and arg-max of every layout, with all buffers at their exact size.
#include <memory>

#include "harness.h"

using namespace phl::test;
using std::vector;

namespace {

// 64-byte aligned, of exactly this size.
struct Buffer {
  explicit Buffer(int64_t size)
      : size(size), data(static_cast<uint8_t*>(std::aligned_alloc(64, size_t((size + 63) / 64 * 64))), std::free) {
    std::memset(data.get(), 0, size_t(size));
  }
  int64_t size;
  std::unique_ptr<uint8_t, void (*)(void*)> data;
};

struct Kind {
  int64_t layout, bytes, weights;
  vector<int64_t> factors;  // offsets of float16 numbers in a block
};

const Kind kKinds[] = {{0, 18, 32, {0}},       {1, 20, 32, {0, 2}},     {2, 22, 32, {0}},        {3, 24, 32, {0, 2}},
                       {4, 34, 32, {0}},       {5, 84, 256, {80, 82}},  {6, 110, 256, {108}},    {7, 144, 256, {0, 2}},
                       {8, 176, 256, {0, 2}},  {9, 210, 256, {208}},    {10, 18, 32, {0}}};

struct Layer {
  int64_t rows, inputs, padded, forms;
  Buffer packed;
  vector<int64_t> segment;
};

Layer pack(const Kind& kind, int64_t rows, int64_t blocks) {
  int64_t geometry[14][2];
  run(0, "linear_geometry", geometry);
  const int64_t inputs = blocks * kind.weights, unit = kind.weights == 256 ? 256 : 64;
  const int64_t padded = (inputs + unit - 1) / unit * unit, units = padded / geometry[kind.layout][0];
  vector<uint8_t> raw(size_t(rows * blocks * kind.bytes));
  for (uint8_t& x : raw) x = uint8_t(random_bits());
  for (int64_t block = 0; block < rows * blocks; ++block) {
    for (int64_t at : kind.factors) raw[size_t(block * kind.bytes + at + 1)] = 0x20 | (random_bits() & 0x80);
  }
  Buffer packed((rows + 15) / 16 * units * geometry[kind.layout][1]);
  run(0, "linear_pack", raw.data(), packed.data.get(), rows, blocks * kind.bytes, kind.layout, units, 0, 1);
  vector<int64_t> segment{int64_t(slot(packed.data.get())), kind.layout, (rows + 15) / 16, rows, 0, 0};
  return {rows, inputs, padded, 1, std::move(packed), std::move(segment)};
}

Layer dense(int64_t layout, int64_t rows, int64_t inputs) {
  const int64_t padded = (inputs + 63) / 64 * 64, size = layout == 13 ? 4 : 2;
  vector<uint8_t> raw(size_t(rows * inputs * size));
  for (int64_t i = 0; i < rows * inputs; ++i) {
    const float x = random_float();
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t half = layout == 11 ? uint16_t(bits >> 16) : uint16_t(0x2c00 | (random_bits() & 0x83ff));
    std::memcpy(&raw[size_t(i * size)], size == 4 ? static_cast<const void*>(&x) : &half, size_t(size));
  }
  Buffer packed((rows + 15) / 16 * 16 * padded * size);
  run(0, "linear_pack_dense", raw.data(), packed.data.get(), rows, inputs * size, layout, padded / 2, 0, 1);
  vector<int64_t> segment{int64_t(slot(packed.data.get())), layout, (rows + 15) / 16, rows, 0, 0};
  return {rows, inputs, padded, layout == 11 ? 2 : 4, std::move(packed), std::move(segment)};
}

constexpr int64_t kThreads = 3;

struct Plan {
  int64_t panel, tile, best, alone, space;
};

// As native_linear.py's `_plan`, with small panels.
Plan plan(const Layer& layer, int64_t rows) {
  int64_t row = layer.forms & 1 ? ((layer.padded / 32) | 1) * 64 : 0;
  row += layer.forms & 2 ? layer.padded * 2 + 64 : 0;
  row += layer.forms & 4 ? layer.padded * 4 + 64 : 0;
  Plan p{};
  p.panel = rows < 40 ? rows : 40;
  p.tile = 2 * (layer.padded / 32 * 768 + 64);
  p.best = p.panel * 16 * 8;
  p.alone = rows <= 4;
  p.space = kThreads * (p.tile + p.best) + row * (p.alone ? kThreads * rows : 2 * p.panel);
  return p;
}

void try_layer(int level, const Layer& layer, const std::string& what) {
  for (int64_t rows : {1, 4, 7, 83}) {
    const vector<float> x = floats(rows * layer.inputs), bias = floats(layer.rows), norm = floats(layer.inputs),
                        other = floats(rows * layer.inputs), residual = floats(rows * layer.rows);
    const Plan p = plan(layer, rows);
    vector<float> results[2], sums[2];
    vector<int32_t> tokens[2];
    for (int at : {0, level}) {
      Buffer space(p.space);
      vector<float> out(size_t(rows * layer.rows)), sum(x.size());
      vector<int32_t> token(static_cast<size_t>(rows));
      run(at, "linear", x.data(), other.data(), norm.data(), sum.data(), layer.segment.data(), bias.data(),
          residual.data(), out.data(), space.data.get(), rows, layer.inputs, layer.inputs, layer.inputs, layer.inputs,
          layer.rows, layer.rows, 1, layer.forms, layer.padded, p.panel, p.tile, p.alone, kThreads, 0, 1e-5);
      run(at, "linear_argmax", x.data(), nullptr, nullptr, nullptr, layer.segment.data(), nullptr, token.data(),
          nullptr, space.data.get(), rows, layer.inputs, layer.inputs, 0, 0, 1, layer.forms, layer.padded, p.panel,
          p.tile, p.best, p.alone, kThreads, 0.0);
      results[at != 0] = out, sums[at != 0] = sum, tokens[at != 0] = token;
    }
    if (level == 0) results[1] = results[0], sums[1] = sums[0], tokens[1] = tokens[0];
    // Inputs that the norm rounds otherwise may fall to the next of 127 steps.
    close(results[1], results[0], layer.forms == 1 ? 0.05f : 1e-2f, what);
    close(sums[1], sums[0], 1e-6f, what + " sum");
    for (int32_t token : tokens[1]) check(token >= 0 && token < layer.rows, what + " token");
  }
}

}  // namespace

PHL_TEST(linear_quantised) {
  for (const Kind& kind : kKinds) {
    for (int64_t rows : {1, 37}) {
      const Layer layer = pack(kind, rows, kind.weights == 256 ? 1 : 3);
      try_layer(level, layer, "layout " + std::to_string(kind.layout));
      vector<int64_t> ids{0, rows - 1, rows};
      vector<float> out(ids.size() * size_t(layer.inputs));
      run(0, "linear_rows", ids.data(), layer.segment.data(), out.data(), 3, layer.inputs, layer.padded, 1,
          layer.inputs, 1.0);
      check(!std::isnan(out[0]) && std::isnan(out.back()), "rows");
    }
  }
}

PHL_TEST(linear_dense) {
  for (int64_t layout : {11, 12, 13}) {
    for (int64_t inputs : {1, 33, 128}) try_layer(level, dense(layout, 21, inputs), "dense " + std::to_string(layout));
  }
}
