// Runs every test at the levels given as arguments (their names), with one thread and with three.
#include "harness.h"

static int level_of(const char* name) {
  for (int level = 0; level < phl::kLevels; ++level) {
    if (std::strcmp(phl::kLevelNames[level], name) == 0) return level;
  }
  phl::test::check(false, std::string("no level ") + name);
  return -1;
}

int main(int count, char** arguments) {
  for (int threads : {1, 3}) {
    phl::set_threads(threads);
    for (int i = 1; i < count; ++i) {
      const int level = level_of(arguments[i]);
      for (const auto& test : phl::test::tests()) {
        phl::test::random_state() = 12345;
        test.run(level);
      }
    }
  }
  std::printf("%zu tests, best level %s\n", phl::test::tests().size(), phl::kLevelNames[phl::best_level()]);
  phl::set_threads(1);
}
