// Packed weights of random bits, in buffers of exact size.
#pragma once
#include <memory>

#include "harness.h"

namespace phl::test {

using std::vector;

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

inline const Kind kKinds[] = {{0, 18, 32, {0}},       {1, 20, 32, {0, 2}},     {2, 22, 32, {0}},        {3, 24, 32, {0, 2}},
                       {4, 34, 32, {0}},       {5, 84, 256, {80, 82}},  {6, 110, 256, {108}},    {7, 144, 256, {0, 2}},
                       {8, 176, 256, {0, 2}},  {9, 210, 256, {208}},    {10, 18, 32, {0}},
                       {14, 34, 32, {0}}};

struct Layer {
  int64_t rows, inputs, padded, forms;
  Buffer packed;
  vector<int64_t> segment;
};

inline Layer pack(const Kind& kind, int64_t rows, int64_t blocks) {
  int64_t geometry[15][4];
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

inline Layer dense(int64_t layout, int64_t rows, int64_t inputs) {
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

// Workspace bytes of a prepared row; as `Rows` of linear/job.h.
inline int64_t prepared_bytes(int64_t forms, int64_t padded) {
  int64_t row = forms & 1 ? ((padded / 32) | 1) * 64 : 0;
  row += forms & 2 ? padded * 2 + 64 : 0;
  return row + (forms & 4 ? padded * 4 + 64 : 0);
}

}  // namespace phl::test
