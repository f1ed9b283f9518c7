// What count_kernels.py counts: a kernel, called so many times, by one thread.
//     program LEVEL linear LAYOUT ROWS CALLS          512 inputs, 256 features
//     program LEVEL attention TOKENS ROWS CALLS       int8 pages of 16 tokens, 8 heads of 64 over 2 kv heads
// Two calls less one are a call without the start, the packing and the making of inputs.
#include "../csrc/cpu/tests/packed.h"

using namespace phl::test;

namespace {

constexpr int64_t kInputs = 512, kFeatures = 256;

int level_of(const std::string& name) {
  for (int level = 0; level < phl::kLevels; ++level) {
    if (name == phl::kLevelNames[level]) return level;
  }
  check(false, "no level " + name);
  return -1;
}

Layer layer_of(int64_t layout) {
  for (const Kind& kind : kKinds) {
    if (kind.layout == layout) return pack(kind, kFeatures, kInputs / kind.weights);
  }
  return dense(layout, kFeatures, kInputs);
}

void linear(int level, int64_t layout, int64_t rows, int64_t calls) {
  const Layer layer = layer_of(layout);
  const bool alone = rows <= 4;
  const int64_t row = prepared_bytes(layer.forms, layer.padded), tile = 2 * (layer.padded / 32 * 768 + 64);
  Buffer space(tile + row * (alone ? rows : 2 * rows));
  const vector<float> x = floats(rows * kInputs);
  vector<float> out(size_t(rows * kFeatures));
  for (int64_t i = 0; i < calls; ++i) {
    run(level, "linear", x.data(), nullptr, nullptr, nullptr, layer.segment.data(), nullptr, nullptr, out.data(),
        space.data.get(), rows, kInputs, kInputs, int64_t{0}, int64_t{0}, kFeatures, int64_t{0}, int64_t{1},
        layer.forms, layer.padded, rows, tile, int64_t{alone}, int64_t{1}, int64_t{0}, 0.0);
  }
}

// One query token a row, of which each sees `tokens`.
void attention(int level, int64_t tokens, int64_t rows, int64_t calls) {
  constexpr int64_t heads = 8, kv_heads = 2, size = 64, page_size = 16, width = size + 4;
  const int64_t pages = (tokens + page_size - 1) / page_size, cached = rows * pages * page_size;
  const int64_t page = kv_heads * page_size * width, splits = (tokens + 255) / 256 < 16 ? (tokens + 255) / 256 : 16;
  const vector<float> q = floats(rows * heads * size), keys = floats(cached * kv_heads * size),
                      values = floats(cached * kv_heads * size);
  vector<int32_t> slots, table, start{0}, lengths(static_cast<size_t>(rows), int32_t(tokens));
  for (int64_t i = 0; i < cached; ++i) slots.push_back(int32_t(i));
  for (int64_t i = 0; i < rows * pages; ++i) table.push_back(int32_t(i));
  for (int64_t i = 0; i < rows; ++i) start.push_back(int32_t(i + 1));
  Buffer k_cache(rows * pages * page), v_cache(rows * pages * page);
  run(0, "write_kv_int8", keys.data(), values.data(), k_cache.data.get(), v_cache.data.get(), slots.data(), cached,
      kv_heads, size, page_size, kv_heads * size, size, kv_heads * size, size, page);
  constexpr int64_t stride = (2 * 96 + 192) * size + 18 * 96 + 1024;
  vector<float> out(q.size()), partial(size_t(rows * heads * splits * (size + 2))), scratch(size_t{stride});
  for (int64_t i = 0; i < calls; ++i) {
    run(level, "attention_int8", q.data(), k_cache.data.get(), v_cache.data.get(), out.data(), start.data(),
        lengths.data(), table.data(), nullptr, partial.data(), scratch.data(), rows, heads, kv_heads, size, page_size,
        pages, page, heads * size, size, splits, stride, int64_t{0}, int64_t{0}, 0.2, 0.0);
  }
}

}  // namespace

int main(int count, char** arguments) {
  check(count == 6, "LEVEL KERNEL LAYOUT|TOKENS ROWS CALLS");
  phl::set_threads(1);
  const int level = level_of(arguments[1]);
  const int64_t what = std::atoll(arguments[3]), rows = std::atoll(arguments[4]), calls = std::atoll(arguments[5]);
  std::string(arguments[2]) == "linear" ? linear(level, what, rows, calls) : attention(level, what, rows, calls);
}
