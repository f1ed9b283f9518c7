// Recurrent mixers at odd sizes, with a row that has no tokens; the portable unit is the reference of the others.
#include "harness.h"

using namespace phl::test;
using std::vector;

namespace {

const vector<int32_t> kStarts = {0, 3, 4, 4, 9};
constexpr int64_t kRows = 4, kTokens = 9;

void compare(int level, const std::string& what, const std::function<vector<float>(int)>& compute) {
  const vector<float> got = compute(level), want = compute(0);
  for (float x : got) check(!std::isnan(x), what + ": NaN");
  close(got, want, 1e-4f, what);
}

vector<float> joined(vector<float> a, const vector<float>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace

PHL_TEST(convolution) {
  for (int64_t channels : {1, 7, 16, 37}) {
    for (int64_t taps : {2, 4, 16}) {
      const vector<float> x = floats(kTokens * channels), weight = floats(channels * taps), bias = floats(channels);
      const vector<float> state = floats(kRows * channels * (taps - 1));
      for (int64_t plain : {0, 1}) {
        compare(level, "causal_conv", [&](int at) {
          vector<float> out(size_t(kTokens * channels)), after(state.size());
          const float* added = plain ? nullptr : bias.data();
          run(at, "causal_conv", x.data(), weight.data(), added, state.data(), out.data(), after.data(), kStarts.data(),
              kRows, channels, taps, channels, int64_t(1) - plain);
          return joined(out, after);
        });
      }
    }
  }
}

PHL_TEST(scan) {
  for (int64_t n : {1, 13, 16}) {
    const int64_t heads = 4, groups = 2, size = 5;
    const vector<float> x = floats(kTokens * heads * size), b = floats(kTokens * groups * n);
    const vector<float> c = floats(kTokens * groups * n), dt = floats(kTokens * heads), decay = floats(heads);
    const vector<float> skip = floats(heads), state = floats(kRows * heads * size * n);
    compare(level, "mamba2_scan", [&](int at) {
      vector<float> out(x.size()), after(state.size());
      run(at, "mamba2_scan", x.data(), dt.data(), decay.data(), b.data(), c.data(), skip.data(), state.data(),
          out.data(), after.data(), kStarts.data(), kRows, heads, size, groups, n, heads * size, groups * n, groups * n);
      return joined(out, after);
    });
  }
}

PHL_TEST(selective) {
  for (int64_t n : {1, 13, 16}) {
    const int64_t channels = 11;
    const vector<float> x = floats(kTokens * channels), dt = floats(x.size()), decay = floats(channels * n);
    const vector<float> b = floats(kTokens * n), c = floats(b.size()), skip = floats(channels);
    const vector<float> state = floats(kRows * channels * n);
    compare(level, "selective_scan", [&](int at) {
      vector<float> out(x.size()), after(state.size());
      run(at, "selective_scan", x.data(), dt.data(), decay.data(), b.data(), c.data(), skip.data(), state.data(),
          out.data(), after.data(), kStarts.data(), kRows, channels, n, channels, n, n);
      return joined(out, after);
    });
  }
}

PHL_TEST(delta) {
  for (int64_t size : {1, 7, 16, 21, 37}) {
    const int64_t heads = 3, n = 6, by_entry = size % 2;
    const vector<float> q = floats(kTokens * heads * n), k = floats(q.size()), v = floats(kTokens * heads * size);
    const vector<float> decay = floats(kTokens * heads * (by_entry ? n : 1)), beta = floats(kTokens * heads);
    const vector<float> state = floats(kRows * heads * n * size);
    compare(level, "gated_delta", [&](int at) {
      vector<float> out(v.size()), after(state.size());
      run(at, "gated_delta", q.data(), k.data(), v.data(), decay.data(), beta.data(), state.data(), out.data(),
          after.data(), kStarts.data(), kRows, heads, n, size, heads * n, heads * n, heads * size, by_entry, 0.5);
      return joined(out, after);
    });
  }
}
