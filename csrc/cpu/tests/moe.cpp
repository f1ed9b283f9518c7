// The sparse layer of several layouts: against the portable unit, and tokens alone against tokens together.
#include "packed.h"

using namespace phl::test;

namespace {

constexpr int64_t kThreads = 3;

// The projections of all experts. Gate and up are `pack`ed one after the other, or interleaved where `paired`.
struct Stack {
  vector<Layer> parts;
  vector<int64_t> segments, at{0};
  int64_t padded = 0, forms = 0, columns = 0;

  void add(Layer part) {
    padded = part.padded, forms |= part.forms;
    part.segment[4] = columns;
    columns += part.rows;
    segments.insert(segments.end(), part.segment.begin(), part.segment.end());
    parts.push_back(std::move(part));
  }
  void end_expert() { at.push_back(int64_t(segments.size()) / 6); }
};

struct Sparse {
  int64_t experts, inputs, inner;
  bool paired;
  Stack up, down;
};

Layer make(int64_t layout, int64_t rows, int64_t inputs) {
  return layout >= 11 ? dense(layout, rows, inputs) : pack(kKinds[layout], rows, inputs / kKinds[layout].weights);
}

Sparse sparse(int64_t layout, int64_t experts, int64_t inputs, int64_t inner, bool paired) {
  Sparse s{experts, inputs, inner, paired, {}, {}};
  for (int64_t e = 0; e < experts; ++e) {
    if (paired) {
      // One matrix of twice the rows whose blocks are taken to alternate: all bits are random anyway.
      Layer both = make(layout, 2 * inner, inputs);
      both.segment[5] = inner;
      s.up.add(std::move(both));
    } else {
      s.up.add(make(layout, inner, inputs));
      s.up.add(make(layout, inner, inputs));
    }
    s.up.end_expert();
    s.down.add(make(layout, inputs, inner));
    s.down.end_expert();
  }
  return s;
}

int64_t up64(int64_t n) { return (n + 63) / 64 * 64; }

// As _native_moe.py's `_sizes`, with panels of at most `most` tokens.
// `ids`: chosen elsewhere, with weights of 1; null: by the logits.
vector<float> run_moe(int at, const Sparse& s, const vector<float>& x, const vector<float>& logits, int64_t tokens,
                      int64_t k, int64_t most, bool alone, const int32_t* ids = nullptr) {
  const int64_t panel = std::min(tokens, most), slots = panel * k, stride = s.paired ? s.inner : 2 * s.inner;
  const int64_t up_row = prepared_bytes(s.up.forms, s.up.padded);
  const int64_t down_row = prepared_bytes(s.down.forms, s.down.padded);
  const int64_t table = 4 * up64(4 * slots) + up64(4 * s.experts) + up64((std::min(slots, s.experts) + 1) * 32);
  const int64_t prepared = table + panel * up_row + slots * (down_row + (tokens > 1 ? up_row : 0));
  const int64_t tile = 2 * (std::max(s.up.padded, s.down.padded) / 32 * 768 + 64);
  alone = alone && s.paired && panel == tokens;
  Buffer space(kThreads * tile + up64(4 * slots * stride) + prepared * (alone ? kThreads : 1));
  vector<float> out(size_t(tokens * s.inputs), NAN);
  const vector<float> ones(size_t(tokens * k), 1.0f);
  run(at, "moe", x.data(), logits.data(), ids, ids == nullptr ? nullptr : ones.data(), s.up.segments.data(), s.down.segments.data(), s.up.at.data(),
      s.down.at.data(), out.data(), space.data.get(), tokens, s.inputs, s.inner, s.experts, k, 1, s.inputs, s.experts,
      s.up.forms, s.up.padded, s.down.forms, s.down.padded, int64_t(s.paired), stride, panel, tile, int64_t(alone),
      kThreads);
  return out;
}

void try_sparse(int level, int64_t layout, int64_t inputs, int64_t inner, bool paired, bool exact) {
  const int64_t experts = 5, k = 2;
  Sparse s = sparse(layout, experts, inputs, inner, paired);
  if (exact) s.up.forms |= 8, s.down.forms |= 8;
  const std::string what = "moe of layout " + std::to_string(layout);
  vector<float> lone;
  for (int64_t tokens : {1, 3, 90}) {
    phl::test::random_state() = 99;
    const vector<float> all_x = floats(90 * inputs), all_logits = floats(90 * experts);
    const vector<float> x(all_x.begin(), all_x.begin() + tokens * inputs);
    const vector<float> logits(all_logits.begin(), all_logits.begin() + tokens * experts);
    const vector<float> got = run_moe(level, s, x, logits, tokens, k, 40, tokens < 4);
    const vector<float> want = run_moe(0, s, x, logits, tokens, k, 1000, false);
    float size = 0, error = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      check(!std::isnan(got[i]), what + ": NaN");
      size += want[i] * want[i], error += (got[i] - want[i]) * (got[i] - want[i]);
    }
    // A hidden value may round to the next of 127 steps. Weights that are bytes are other numbers.
    const bool bytes = !exact && tokens > 24 && makes_bytes(level);
    check(error <= (bytes ? 1e-2f : 1e-4f) * size, what + ": error " + std::to_string(error / size));
    if (partial(level) && !(rounds_pairs(level) && layout == 11)) {
      check(got == run_moe(level - 1, s, x, logits, tokens, k, 40, tokens < 4), what + " bits");
    }
    if (tokens == 1) lone = got;
    if (!bytes) check(std::equal(lone.begin(), lone.end(), got.begin()), what + ": a token depends on others");
  }
}

}  // namespace

PHL_TEST(moe) {
  for (int at : with_derived(level)) {
    for (bool exact : {true, false}) {
      for (int64_t layout : {0, 1, 4, 10}) try_sparse(at, layout, 96, 64, true, exact);
      for (int64_t layout : {5, 7, 9}) try_sparse(at, layout, 256, 256, true, exact);
    }
    for (int64_t layout : {11, 12, 13}) {
      try_sparse(at, layout, 33, 32, true, false);
      try_sparse(at, layout, 40, 21, false, false);
    }
    try_sparse(at, 1, 32, 32, false, true);
  }
}

PHL_TEST(moe_of_not_a_number) {
  const Sparse s = sparse(13, 4, 20, 16, true);
  for (int64_t tokens : {1, 30}) {
    const vector<float> x = floats(tokens * 20), logits(size_t(tokens * 4), NAN);
    for (float y : run_moe(level, s, x, logits, tokens, 3, 40, tokens == 1)) check(std::isnan(y), "NaN is hidden");
  }
}

PHL_TEST(moe_of_experts_chosen_elsewhere) {
  const Sparse s = sparse(13, 4, 20, 16, true);
  for (int64_t tokens : {1, 30}) {
    const vector<float> x = floats(tokens * 20);
    vector<int32_t> ids(size_t(tokens * 6), -1);  // more choices than experts, most of them of another place
    check(run_moe(level, s, x, {}, tokens, 6, 40, tokens == 1, ids.data()) == vector<float>(size_t(tokens * 20), 0.0f),
          "nothing is here");
    for (int64_t t = 0; t < tokens; ++t) ids[t * 6 + 1] = int32_t(t % 4), ids[t * 6 + 4] = 4 + int32_t(t);
    const vector<float> got = run_moe(level, s, x, {}, tokens, 6, 40, tokens == 1, ids.data());
    const vector<float> want = run_moe(level, s, x, {}, tokens, 6, 7, false, ids.data());
    check(got == want, "experts chosen elsewhere depend on panels");
    for (float y : got) check(std::isfinite(y), "experts chosen elsewhere: not finite");
  }
}
