// A few helpers for running ops without Python, so that sanitizers see every buffer at its exact size.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../op.h"

namespace phl::test {

struct Test {
  const char* name;
  void (*run)(int level);
};

inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

struct AddTest {
  AddTest(const char* name, void (*run)(int)) { tests().push_back({name, run}); }
};

#define PHL_TEST(name)                                   \
  static void name(int level);                           \
  static const ::phl::test::AddTest add_##name{#name, name}; \
  static void name([[maybe_unused]] int level)

inline void check(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

inline uint32_t& random_state() {
  static uint32_t state = 12345;
  return state;
}

inline uint32_t random_bits() {
  uint32_t& x = random_state();
  x ^= x << 13, x ^= x >> 17, x ^= x << 5;
  return x;
}

inline float random_float() { return float(random_bits() >> 8) / float(1 << 23) - 1.0f; }

inline std::vector<float> floats(int64_t n) {
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = random_float();
  return v;
}

inline void close(const std::vector<float>& a, const std::vector<float>& b, float tolerance, const std::string& what) {
  check(a.size() == b.size(), what + ": sizes");
  for (size_t i = 0; i < a.size(); ++i) {
    const bool same = a[i] == b[i] || std::fabs(a[i] - b[i]) <= tolerance * (1 + std::fabs(b[i]));
    check(same, what + " [" + std::to_string(i) + "]: " + std::to_string(a[i]) + " is not " + std::to_string(b[i]));
  }
}

template <class T>
uint64_t slot(T value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<uint64_t>(value);
  } else if constexpr (std::is_floating_point_v<T>) {
    const double number = value;
    uint64_t bits;
    std::memcpy(&bits, &number, 8);
    return bits;
  } else if constexpr (std::is_same_v<T, std::nullptr_t>) {
    return 0;
  } else {
    return static_cast<uint64_t>(static_cast<int64_t>(value));
  }
}

#if defined(__aarch64__)
// A level that has a few units alone, whose bits are those of the level below; its other ops are that one's.
constexpr bool partial(int level) { return level == kI8mm; }
// Whether its products of bfloat16 round otherwise than those of the level below.
constexpr bool rounds_pairs(int level) { return level == kI8mm; }
// Whether this level makes bytes of the weights that meet many rows.
constexpr bool makes_bytes(int) { return false; }
constexpr bool rounds_attention(int, bool) { return false; }  // to 8 bits
// The level itself, and the one that is derived from it where its units are linked in.
inline std::vector<int> with_derived(int level) { return {level}; }
#else
constexpr bool partial(int level) { return level == kAvxVnni; }
constexpr bool rounds_pairs(int) { return false; }
constexpr bool makes_bytes(int level) { return level >= kAvx512; }
constexpr bool rounds_attention(int level, bool int8) { return level >= (int8 ? kAvx2 : kAvx512); }
inline std::vector<int> with_derived(int level) {
  const OpEntry* op = find_op("linear", level + 1);
  const bool linked = (level == kAvx2 || level == kAvx512) && op != nullptr && op->level == level + 1;
  return linked ? std::vector<int>{level, level + 1} : std::vector<int>{level};
}
#endif

// Runs an op at exactly this level, by all threads of the pool.
template <class... Args>
void run(int level, const char* name, Args... args) {
  const OpEntry* op = find_op(name, level);
  check(op != nullptr && (op->level == level || partial(level)), std::string("no op ") + name);
  check(op->slots == sizeof...(Args), std::string(name) + ": number of arguments");
  std::vector<uint64_t> slots{slot(args)...};
  std::pair<const OpEntry*, const uint64_t*> call{op, slots.data()};
  run_region(
      [](void* context, Team& team) {
        const auto& both = *static_cast<std::pair<const OpEntry*, const uint64_t*>*>(context);
        both.first->run(both.second, team);
      },
      &call);
}

}  // namespace phl::test
