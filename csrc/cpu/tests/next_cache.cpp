// The list of what is asked for ahead: each line of the noted pages once, of the cache that follows.
#include "../next_cache.h"

#include <memory>
#include <utility>
#include <vector>

#include "harness.h"

using namespace phl;
using namespace phl::test;

PHL_TEST(next_cache) {
  if (level != 0) return;
  auto list = std::make_unique<NextCache>();
  char first[1], second[1], third[1], values[1];
  const auto base = [](const char* p) { return reinterpret_cast<uintptr_t>(p); };
  const int64_t page = 200;
  for (int turn = 0; turn < 2; ++turn) {
    for (const char* keys : {first, second, third}) list->done(keys, values, page);
  }
  list->done(first, values, page);
  check(list->take(10).at == 0, "an empty list");
  check(list->add(3, 2) && list->add(0, 2), "pages fit");
  const std::vector<std::pair<uintptr_t, int64_t>> wanted{{base(second) + 600, 128}, {base(second) + 728, 72},
                                                          {base(values) + 600, 128}, {base(values) + 728, 72},
                                                          {base(second), 128},       {base(second) + 128, 72}};
  for (const auto& [at, bytes] : wanted) {
    const Lines lines = list->take(2);
    check(lines.at == at && lines.end == at + uintptr_t(bytes), "lines of the cache that followed");
  }
  list->done(third, values, page);  // behind the last one the first
  check(list->add(1, 1), "a page fits");
  check(list->take(1).at == base(first) + 200, "what was left is forgotten");
  list->done(second, values, NextCache::kBytes / 4);
  check(list->add(0, 2) && !list->add(0, 2), "threads share what may be asked for");
}
