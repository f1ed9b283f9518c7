// Packing, linear layers, rows back and arg-max of every layout, with all buffers at their exact size.
#include "packed.h"

using namespace phl::test;

namespace {

constexpr int64_t kThreads = 3;

struct Plan {
  int64_t panel, tile, best, alone, space;
};

// As native_linear.py's `_plan`, with small panels.
Plan plan(const Layer& layer, int64_t rows) {
  const int64_t row = prepared_bytes(layer.forms, layer.padded);
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
    const auto linear = [&](int at, Buffer& space, vector<float>& out, vector<float>& sum) {
      run(at, "linear", x.data(), other.data(), norm.data(), sum.data(), layer.segment.data(), bias.data(),
          residual.data(), out.data(), space.data.get(), rows, layer.inputs, layer.inputs, layer.inputs, layer.inputs,
          layer.rows, layer.rows, 1, layer.forms, layer.padded, p.panel, p.tile, p.alone, kThreads, 0, 1e-5);
    };
    for (int at : {0, level}) {
      Buffer space(p.space);
      vector<float> out(size_t(rows * layer.rows)), sum(x.size());
      vector<int32_t> token(static_cast<size_t>(rows));
      linear(at, space, out, sum);
      run(at, "linear_argmax", x.data(), nullptr, nullptr, nullptr, layer.segment.data(), nullptr, token.data(),
          nullptr, space.data.get(), rows, layer.inputs, layer.inputs, 0, 0, 1, layer.forms, layer.padded, p.panel,
          p.tile, p.best, p.alone, kThreads, 0.0);
      results[at != 0] = out, sums[at != 0] = sum, tokens[at != 0] = token;
    }
    if (level == 0) results[1] = results[0], sums[1] = sums[0], tokens[1] = tokens[0];
    // Inputs that the norm rounds otherwise may fall to the next of 127 steps. Bytes of weights whose scales may be any
    // float16 are other numbers: their values are tested elsewhere.
    const bool bytes = layer.forms == 1 && rows > 24 && makes_bytes(level);
    if (partial(level) && !(rounds_pairs(level) && (layer.forms & 2))) {  // sums of integers, in whichever order: the bits of the level below
      Buffer space(p.space);
      vector<float> out(size_t(rows * layer.rows)), sum(x.size());
      linear(level - 1, space, out, sum);
      check(out == results[1], what + " bits");
    }
    if (!bytes) close(results[1], results[0], layer.forms & 1 ? 0.05f : 1e-2f, what);
    close(sums[1], sums[0], 1e-6f, what + " sum");
    for (int32_t token : tokens[1]) check(token >= 0 && token < layer.rows, what + " token");
  }
}

// The token of a screened arg-max is that of the arg-max.
void try_screen(int level, const Layer& layer, const std::string& what) {
  const int64_t blocks = (layer.rows + 15) / 16, forms = layer.forms | 1;
  Buffer screen(blocks * layer.padded / 64 * 576);
  const uint8_t* data = screen.data.get();
  int64_t unfit = 0;
  if (layer.segment[1] == 14) {  // split: its own screen
    data = layer.packed.data.get();
  } else {
    run(phl::find_op("linear_screen", level)->level, "linear_screen", layer.segment.data(), screen.data.get(), &unfit, layer.padded);
  }
  check(unfit == 0, what + " fits");
  for (int64_t rows : {1, 3, 8}) {
    const vector<float> x = floats(rows * layer.inputs);
    const Plan p = plan(layer, rows);
    vector<int32_t> want(static_cast<size_t>(rows)), got(want.size());
    Buffer space(p.space);
    run(level, "linear_argmax", x.data(), nullptr, nullptr, nullptr, layer.segment.data(), nullptr, want.data(),
        nullptr, space.data.get(), rows, layer.inputs, layer.inputs, 0, 0, 1, layer.forms, layer.padded, p.panel,
        p.tile, p.best, p.alone, kThreads, 0.0);
    const int64_t best = rows * 128 + 64 + (rows * layer.padded / 32 * 4 + 63) / 64 * 64;
    const int64_t row = prepared_bytes(forms, layer.padded);
    Buffer other(kThreads * (p.tile + best) + (rows * blocks * 4 + 63) / 64 * 64 +
                 row * (p.alone ? kThreads * rows : 2 * p.panel));
    run(level, "linear_argmax_screened", x.data(), layer.segment.data(), data, got.data(),
        other.data.get(), rows, layer.inputs, layer.inputs, forms, layer.padded, p.panel, p.tile, best, p.alone,
        kThreads);
    check(got == want, what + " screened token");
  }
}

}  // namespace

PHL_TEST(linear_screen) {
  for (const Kind& kind : kKinds) {
    const Layer layer = pack(kind, 517, kind.weights == 256 ? 1 : 3);
    for (int at : with_derived(level)) try_screen(at, layer, "layout " + std::to_string(kind.layout));
  }
  for (int64_t layout : {11, 12, 13}) {
    const Layer layer = dense(layout, 517, 33);
    for (int at : with_derived(level)) try_screen(at, layer, "dense " + std::to_string(layout));
  }
}

PHL_TEST(linear_quantised) {
  for (const Kind& kind : kKinds) {
    for (int64_t rows : {1, 37}) {
      Layer layer = pack(kind, rows, kind.weights == 256 ? 1 : rows == 1 ? 3 : 7);
      for (int64_t forms : {layer.forms | 8, layer.forms}) {  // exact, and bytes where there are many rows
        layer.forms = forms;
        const std::string what = "layout " + std::to_string(kind.layout) + " forms " + std::to_string(forms);
        for (int at : with_derived(level)) try_layer(at, layer, what);
      }
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
    for (int64_t inputs : {1, 33, 128}) {
      const Layer layer = dense(layout, 21, inputs);
      for (int at : with_derived(level)) try_layer(at, layer, "dense " + std::to_string(layout));
    }
  }
}
