// Ops by name, and which units this CPU can run.
#include <cstring>
#include <vector>

#include "op.h"

namespace phl {

const char* const kLevelNames[kLevels] = {"portable", "avx2", "avx512"};

namespace {
std::vector<OpEntry>& entries() {
  static auto* list = new std::vector<OpEntry>;
  return *list;
}
}  // namespace

void register_op(const OpEntry& entry) { entries().push_back(entry); }

int op_count() { return static_cast<int>(entries().size()); }

const OpEntry& op_at(int index) { return entries()[index]; }

const OpEntry* find_op(const char* name, int highest_level) {
  const OpEntry* best = nullptr;
  for (const OpEntry& entry : entries()) {
    const bool fits = entry.level <= highest_level && std::strcmp(entry.name, name) == 0;
    if (fits && (best == nullptr || entry.level > best->level)) best = &entry;
  }
  return best;
}

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512bf16");
  if (avx2 && avx512) return 2;
  if (avx2) return 1;
#endif
  return 0;
}

}  // namespace phl
