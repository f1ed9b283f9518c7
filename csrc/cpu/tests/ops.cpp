// Every op at odd sizes; the portable unit is the reference of the others.
#include <algorithm>

#include "harness.h"

using namespace phl::test;
using std::vector;

namespace {

constexpr int64_t kSizes[] = {1, 3, 15, 16, 17, 33, 64, 130};

// `compute(level)` gives an op's result; compared between the level and the portable unit.
void compare(int level, float tolerance, const std::string& what, const std::function<vector<float>(int)>& compute) {
  const vector<float> got = compute(level), want = compute(0);
  for (float x : got) check(!std::isnan(x), what + ": NaN");
  close(got, want, tolerance, what);
}

}  // namespace

PHL_TEST(elementwise) {
  for (int64_t rows : {1, 3, 40}) {
    for (int64_t n : kSizes) {
      const vector<float> x = floats(rows * 2 * n), y = floats(rows * n);
      const auto result = [&](auto&& f) {
        return [&, f](int at) {
          vector<float> out(size_t(rows * n));
          f(at, out.data());
          return out;
        };
      };
      compare(level, 0, "add", result([&](int at, float* out) {
                run(at, "add", x.data(), y.data(), out, rows, n, 2 * n, n, n);
              }));
      compare(level, 1e-5f, "silu", result([&](int at, float* out) {
                run(at, "silu_and_mul", x.data(), out, rows, n, 2 * n, n);
              }));
      compare(level, 1e-5f, "gelu", result([&](int at, float* out) {
                run(at, "gelu_tanh_and_mul", x.data(), out, rows, n, 2 * n, n);
              }));
      compare(level, 1e-5f, "softcap", result([&](int at, float* out) {
                run(at, "softcap", x.data(), out, rows, n, 2 * n, n, 2.5);
              }));
      vector<int64_t> index(size_t(rows), rows - 1);
      compare(level, 0, "select", result([&](int at, float* out) {
                run(at, "select_rows", y.data(), index.data(), out, 1, rows, n, n);
              }));
    }
  }
}

PHL_TEST(not_a_number) {
  // Whatever else stands in its bits, which an exponential adds to.
  for (uint32_t bits : {0x7FC00000u, 0x7FC000AAu, 0x7FC00001u, 0xFFFFFFFFu, 0xFFC00100u}) {
    vector<float> x(2 * 17, 1.0f), out(17);
    std::memcpy(&x[3], &bits, sizeof bits);
    run(level, "silu_and_mul", x.data(), out.data(), 1, 17, 34, 17);
    for (size_t i = 0; i < out.size(); ++i) check(std::isnan(out[i]) == (i == 3), "silu of a NaN");
  }
}

PHL_TEST(adapters) {
  // Three parts, an adapter of rank 5 of at most 6, one with a factor, runs of tokens that share one.
  const vector<int32_t> index{1, 1, 1, 1, 1, 0, 2, 1, 2, 2, 2}, facts{0, 0, 5, 0, 6, 1};
  for (int64_t n : kSizes) {
    for (int64_t half : {0, 1}) {
      const int64_t rows = int64_t(index.size()), parts = 3, most = 6, m = 2 * n + 5;
      const vector<int64_t> ends{n, n + 2, m};
      const vector<float> x = floats(rows * n), y = floats(rows * m), factor = floats(3 * m), shift = floats(3 * m);
      const vector<float> down = floats(3 * parts * most * n), up = floats(3 * most * m);
      vector<uint16_t> down16(down.size()), up16(up.size());
      const auto round = [](const vector<float>& from, vector<uint16_t>& to) {
        for (size_t i = 0; i < from.size(); ++i) {
          uint32_t bits;
          std::memcpy(&bits, &from[i], 4);
          to[i] = uint16_t(bits >> 16);
        }
      };
      round(down, down16), round(up, up16);
      compare(level, 1e-4f, "add_adapters", [&](int at) {
        vector<float> out = y, small(size_t(rows * parts * most));
        const void* d = half ? static_cast<const void*>(down16.data()) : down.data();
        const void* u = half ? static_cast<const void*>(up16.data()) : up.data();
        run(at, "add_adapters", x.data(), index.data(), facts.data(), d, u, factor.data(), shift.data(), ends.data(),
            small.data(), out.data(), rows, n, m, parts, most, n, m, half);
        return out;
      });
    }
  }
}

PHL_TEST(norms) {
  for (int64_t rows : {1, 5, 50}) {
    for (int64_t n : kSizes) {
      const vector<float> x = floats(rows * n), y = floats(rows * n), weight = floats(n);
      compare(level, 1e-5f, "rms_norm", [&](int at) {
        vector<float> out(size_t(rows * n));
        run(at, "rms_norm", x.data(), weight.data(), out.data(), rows, 1, n, n, 0, 1e-5);
        return out;
      });
      compare(level, 1e-5f, "add_rms_norm", [&](int at) {
        vector<float> out(size_t(rows * n)), total(size_t(rows * n));
        run(at, "add_rms_norm", x.data(), y.data(), weight.data(), out.data(), total.data(), rows, n, n, n, 1e-5);
        out.insert(out.end(), total.begin(), total.end());
        return out;
      });
      for (const float* bias : {y.data(), static_cast<const float*>(nullptr)}) {
        compare(level, 1e-5f, "layer_norm", [&](int at) {
          vector<float> out(size_t(rows * n));
          run(at, "layer_norm", x.data(), weight.data(), bias, out.data(), rows, n, n, 1e-5);
          return out;
        });
      }
    }
  }
}

PHL_TEST(rope) {
  for (int64_t half : {1, 4, 16, 20, 32}) {
    for (int64_t interleaved : {0, 1}) {
      const int64_t tokens = 5, heads = 3, kv_heads = 1, size = 2 * half + 3;
      const vector<float> q = floats(tokens * heads * size), k = floats(tokens * kv_heads * size);
      const vector<float> cos_sin = floats(9 * 2 * half);
      const vector<int32_t> positions{8, 0, 3, 4, 8};
      compare(level, 1e-6f, "rope", [&](int at) {
        vector<float> a = q, b = k;
        run(at, "rope", a.data(), b.data(), positions.data(), cos_sin.data(), 0, tokens, heads, kv_heads, half,
            interleaved, heads * size, size, kv_heads * size, size);
        a.insert(a.end(), b.begin(), b.end());
        return a;
      });
    }
  }
}

namespace {

// The types of cache: the name that its ops end with, and bytes of an element.
struct Pages {
  const char* name;
  int64_t element;

  int64_t width(int64_t size) const { return element == 1 ? size + 4 : element * size; }  // bytes of a token and head
  std::string op(const char* what) const { return std::string(what) + "_" + name; }
};
constexpr Pages kPages[] = {{"bf16", 2}, {"int8", 1}, {"f32", 4}};

}  // namespace

// One op instead of three or four: the same bits, at every level.
PHL_TEST(rope_write_kv) {
  for (int64_t given : {2, 13, 16, 24, 50, 64}) {
    for (int64_t variant = 0; variant < 12; ++variant) {
      const Pages& pages = kPages[variant / 4];
      const bool int8 = pages.element == 1, normed = variant & 1;
      const int64_t size = int8 ? (given + 3) / 4 * 4 : given;  // int8 pages take multiples of 4
      const std::string what = pages.op("rope_write_kv") + " " + std::to_string(variant) + " of " + std::to_string(size);
      const int64_t interleaved = variant >> 1 & 1, half = size / 2 - size / 40;
      const int64_t tokens = 5, heads = 3, kv_heads = 2, page_size = int8 ? 4 : 3, width = pages.width(size);
      const int64_t page = kv_heads * page_size * width / pages.element, row = (heads + 2 * kv_heads) * size;
      const vector<float> qkv = floats(tokens * row), cos_sin = floats(9 * 2 * half);
      const vector<float> q_norm = floats(size), k_norm = floats(size);
      const vector<int64_t> positions{8, 0, 3, 4, 8};
      const vector<int32_t> slots{5, 0, 2, 8, 7};
      vector<uint8_t> k_fused(size_t(3 * kv_heads * page_size * width)), v_fused(k_fused.size());
      vector<uint8_t> k_apart(k_fused.size()), v_apart(k_fused.size());
      vector<float> fused = qkv, apart = qkv;
      float *q = fused.data(), *k = q + heads * size, *v = k + kv_heads * size;
      run(level, pages.op("rope_write_kv").c_str(), q, k, v, positions.data(), cos_sin.data(),
          normed ? q_norm.data() : nullptr, normed ? k_norm.data() : nullptr, k_fused.data(), v_fused.data(),
          slots.data(), 1, tokens, heads, kv_heads, size, half, interleaved, page_size, row, size, row, size, row, size,
          page, 1e-5);
      q = apart.data(), k = q + heads * size, v = k + kv_heads * size;
      for (int64_t token = 0; normed && token < tokens; ++token) {
        vector<float> heads_of_q(size_t(heads * size)), heads_of_k(size_t(kv_heads * size));
        run(level, "rms_norm", q + token * row, q_norm.data(), heads_of_q.data(), 1, heads, size, row, size, 1e-5);
        run(level, "rms_norm", k + token * row, k_norm.data(), heads_of_k.data(), 1, kv_heads, size, row, size, 1e-5);
        std::copy(heads_of_q.begin(), heads_of_q.end(), q + token * row);
        std::copy(heads_of_k.begin(), heads_of_k.end(), k + token * row);
      }
      run(level, "rope", q, k, positions.data(), cos_sin.data(), 1, tokens, heads, kv_heads, half, interleaved, row,
          size, row, size);
      run(level, pages.op("write_kv").c_str(), k, v, k_apart.data(), v_apart.data(), slots.data(), tokens,
          kv_heads, size, page_size, row, size, row, size, page);
      check(std::memcmp(fused.data(), apart.data(), fused.size() * sizeof(float)) == 0, what + ": q and k");
      check(k_fused == k_apart && v_fused == v_apart, what + ": caches");
    }
  }
}

namespace {

struct Shape {
  vector<int32_t> queries, lengths;
  int64_t heads, kv_heads, size, page_size, window;
  bool sinks;
  int64_t block = 0;
};

void attend(int level, const Shape& s, const Pages& kind) {
  const int64_t rows = int64_t(s.queries.size());
  vector<int32_t> start{0};
  int64_t most = 1, pages = 1;
  for (int32_t n : s.queries) start.push_back(start.back() + n);
  for (int32_t n : s.lengths) most = std::max(most, (n + s.page_size - 1) / s.page_size);
  vector<int32_t> table(size_t(rows * most), 0), slots;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i * s.page_size < s.lengths[size_t(row)]; ++i) table[size_t(row * most + i)] = int32_t(pages++);
  }
  for (int64_t slot = 0; slot < pages * s.page_size; ++slot) slots.push_back(int32_t(slot));
  const int64_t tokens = start.back(), cached = int64_t(slots.size()), group = s.heads / s.kv_heads;
  const int64_t width = kind.width(s.size), page = s.kv_heads * s.page_size * width / kind.element;
  const vector<float> q = floats(tokens * s.heads * s.size), sinks = floats(s.heads);
  const vector<float> keys = floats(cached * s.kv_heads * s.size), values = floats(cached * s.kv_heads * s.size);
  const int64_t splits = std::min<int64_t>(16, (most * s.page_size + 255) / 256);
  const int64_t wide = (s.size + 15) / 16 * 16, query_rows = std::max<int64_t>(96, group);
  const int64_t stride = (2 * query_rows + 192) * wide + 18 * query_rows + 1024;
  const bool int8 = kind.element == 1, whole = kind.element == 4 || !rounds_attention(level, int8);
  const auto result = [&](int at) {
    vector<uint8_t> k_cache(size_t(pages * s.kv_heads * s.page_size * width)), v_cache(k_cache.size());
    run(at, kind.op("write_kv").c_str(), keys.data(), values.data(), k_cache.data(), v_cache.data(),
        slots.data(), cached, s.kv_heads, s.size, s.page_size, s.kv_heads * s.size, s.size, s.kv_heads * s.size, s.size,
        page);
    vector<float> out(size_t(tokens * s.heads * s.size)), partial(size_t(rows * s.heads * splits * (s.size + 2)));
    vector<float> scratch(size_t(phl::num_threads() * stride));
    run(at, kind.op("attention").c_str(), q.data(), k_cache.data(), v_cache.data(), out.data(),
        start.data(), s.lengths.data(), table.data(), s.sinks ? sinks.data() : nullptr, partial.data(), scratch.data(),
        rows, s.heads, s.kv_heads, s.size, s.page_size, most, page, s.heads * s.size, s.size, splits, stride, s.window,
        s.block, 0.2, s.sinks ? 4.0 : 0.0);
    return out;
  };
  compare(level, whole ? 1e-4f : !int8 ? 2e-2f : makes_bytes(level) ? 5e-2f : 8e-2f, "attention", result);
  if (partial(level)) check(result(level) == result(level - 1), "attention: bits");
}

void attend_all(int level, const Pages& kind) {
  const bool int8 = kind.element == 1;
  attend(level, {{1, 1, 1, 1}, {1, 37, 300, 0}, 9, 3, 64, 16, 0, false}, kind);
  attend(level, {{1, 1}, {700, 129}, 2, 1, 32, 16, 0, true}, kind);
  attend(level, {{1, 6, 1}, {7, 70, 270}, 6, 1, 24, 8, 0, false}, kind);
  attend(level, {{35, 1, 5}, {35, 20, 90}, 3, 3, 64, 16, 20, true}, kind);
  attend(level, {{3, 1}, {5, 70}, 2, 2, int8 ? 8 : 5, int8 ? 4 : 3, 4, false}, kind);
  attend(level, {{3, 1}, {5, 70}, 4, 2, 20, 12, 0, false}, kind);
  attend(level, {{64, 8, 37}, {64, 72, 300}, 4, 2, 32, 16, 0, false, 32}, kind);
  attend(level, {{8, 90, 1}, {70, 90, 9}, 3, 3, 64, 16, 0, true, 4}, kind);
}

}  // namespace

PHL_TEST(attention) {
  for (int at : with_derived(level)) {
    if (at != level && !partial(at)) continue;  // tiles are for linear layers
    phl::test::random_state() = 12345;  // the same numbers for each level
    for (const Pages& kind : kPages) attend_all(at, kind);
  }
}

namespace {

struct Texts {
  vector<int32_t> lengths;
  int64_t heads, kv_heads, size, values;
  int64_t causal = 0, window = 0, chunk = 0, block = 0;
  bool extras = false;  // a soft cap, sinks, and numbers for distances
};

void attend_packed(int level, const Texts& s) {
  vector<int32_t> starts{0};
  int64_t longest = 1, scratch_floats = 0;
  for (int32_t n : s.lengths) {
    starts.push_back(starts.back() + n);
    longest = std::max<int64_t>(longest, n);
  }
  const int64_t tokens = starts.back(), spread = 2 * longest - 1, kv = s.kv_heads;
  const vector<float> q = floats(tokens * s.heads * s.size), k = floats(tokens * kv * s.size);
  const vector<float> v = floats(tokens * kv * s.values), sinks = floats(s.heads), distances = floats(s.heads * spread);
  compare(level, 1e-5f, "packed attention", [&](int at) {
    run(at, "packed_attention_scratch", s.size, s.values, s.heads / kv, &scratch_floats);
    vector<float> out(size_t(tokens * s.heads * s.values)), scratch(size_t(phl::num_threads() * scratch_floats));
    run(at, "packed_attention", q.data(), k.data(), v.data(), out.data(), starts.data(), s.extras ? sinks.data() : nullptr,
        s.extras ? distances.data() : nullptr, scratch.data(), int64_t(s.lengths.size()), s.heads, kv, s.size, s.values,
        s.heads * s.size, s.size, kv * s.size, s.size, kv * s.values, s.values, s.extras ? spread : 0, scratch_floats,
        s.causal, s.window, s.chunk, s.block, 0.2, s.extras ? 4.0 : 0.0);
    return out;
  });
}

}  // namespace

PHL_TEST(packed_attention) {
  phl::test::random_state() = 12345;  // the same numbers for each level
  attend_packed(level, {{1, 0, 7, 64, 65}, 2, 2, 72, 72});
  attend_packed(level, {{200, 3}, 3, 1, 80, 80});
  attend_packed(level, {{130}, 2, 1, 5, 3});
  attend_packed(level, {{70, 33}, 4, 2, 24, 40, 1});
  attend_packed(level, {{150, 9}, 2, 2, 16, 16, 0, 20, 0, 0, true});
  attend_packed(level, {{150, 9}, 2, 2, 17, 17, 1, 20, 0, 0, true});
  attend_packed(level, {{150, 9}, 2, 2, 16, 16, 1, 0, 32, 0, true});
  attend_packed(level, {{150, 9}, 6, 2, 16, 16, 1, 0, 0, 12, true});
  attend_packed(level, {{100}, 32, 1, 16, 16});
}

PHL_TEST(sampling) {
  for (int64_t vocab : {1, 7, 64, 3000}) {
    const int64_t rows = 4, threads = phl::num_threads();
    const vector<float> logits = floats(rows * vocab);
    compare(level, 1e-5f, "scans", [&](int at) {
      vector<float> out(rows);
      vector<int32_t> best(rows), ids(size_t(rows * std::min<int64_t>(vocab, 5)));
      vector<float> values(ids.size());
      vector<uint64_t> keys(size_t(threads * vocab));
      run(at, "logsumexp", logits.data(), out.data(), rows, vocab, vocab);
      run(at, "argmax", logits.data(), best.data(), rows, vocab, vocab);
      run(at, "top_k", logits.data(), values.data(), ids.data(), keys.data(), rows, vocab, vocab,
          int64_t(ids.size()) / rows);
      out.insert(out.end(), best.begin(), best.end());
      out.insert(out.end(), ids.begin(), ids.end());
      return out;
    });
    compare(level, 0, "mask", [&](int at) {
      vector<float> masked = logits;
      vector<int32_t> which{2, 0};
      vector<uint32_t> words(size_t(2 * ((vocab + 31) / 32)), 0xA5F00FFFu);
      run(at, "mask_tokens", masked.data(), which.data(), words.data(), 2, vocab, vocab, (vocab + 31) / 32);
      return masked;
    });
    for (int64_t k : {0, 1, 3, 2000}) {
      for (float top_p : {1.0f, 0.4f}) {
        compare(level, 0, "sample", [&](int at) {
          const vector<float> temperature(rows, 0.5f), nucleus(rows, top_p), floor(rows, 0.01f);
          const vector<int32_t> limit(rows, int32_t(k));
          const vector<int64_t> seeds{1, -2, 3, 4}, positions{0, 1, 2, 3};
          vector<int32_t> out(rows);
          vector<float> weights(size_t(threads * vocab));
          vector<uint64_t> keys(size_t(threads * 2 * vocab));
          run(at, "sample", logits.data(), temperature.data(), limit.data(), nucleus.data(), floor.data(), seeds.data(),
              positions.data(), out.data(), weights.data(), keys.data(), rows, vocab, vocab);
          return vector<float>(out.begin(), out.end());
        });
      }
    }
  }
}
