// Ops by name, and which units this CPU can run.
#include <cstring>
#include <vector>

#include "op.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace phl {

#if defined(__aarch64__)
const char* const kLevelNames[kLevels] = {"portable", "neon", "i8mm"};
#else
const char* const kLevelNames[kLevels] = {"portable", "avx2", "avx512", "amx"};
#endif

namespace {
std::vector<OpEntry>& entries() {
  static auto* list = new std::vector<OpEntry>;
  return *list;
}
}  // namespace

namespace {
std::vector<ConstantEntry>& constants() {
  static auto* list = new std::vector<ConstantEntry>;
  return *list;
}
}  // namespace

void register_constant(const ConstantEntry& entry) { constants().push_back(entry); }

int constant_count() { return static_cast<int>(constants().size()); }

const ConstantEntry& constant_at(int index) { return constants()[index]; }

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

namespace {

// AMX needs three things: the processor's tiles with their integer and bfloat16 products, a system that saves them, and
// the system's permission for this process (tile data are 8 KiB of state, which Linux does not grant unasked).
#if defined(__x86_64__)
bool ask_for_amx() {
#if defined(__linux__)
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kSaved = 1u << 27;
  constexpr unsigned kTileState = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kSaved) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & (kBfloat16 | kTile | kInt8)) != (kBfloat16 | kTile | kInt8)) return false;
  unsigned saved = 0, high = 0;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & kTileState) != kTileState) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(__aarch64__)
// Dot products of bytes: Cortex-A75 and its successors, Neoverse, every Apple processor.
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#else
  return true;
#endif
}
#endif

#if defined(__aarch64__)
// Matrix products of bytes: Neoverse V1 and N2, Cortex-A510 and A710, Apple M2, and their successors.
bool has_byte_matrices() {
#if defined(__linux__)
  constexpr unsigned long kByteMatrices = 1ul << 13;  // HWCAP2_I8MM
  return (getauxval(AT_HWCAP2) & kByteMatrices) != 0;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, nullptr, 0) == 0 && found != 0;
#else
  return false;
#endif
}
#endif

// Whether this library has units of a level: the compiler may not have known its instructions.
[[maybe_unused]] bool built(int level) {
  for (const OpEntry& entry : entries()) {
    if (entry.level == level) return true;
  }
  return false;
}

#if defined(__x86_64__)
bool has_amx() {
  static const bool granted = ask_for_amx();
  static const bool there = built(3);
  return there && granted;
}
#endif

}  // namespace

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512bf16");
  if (avx2 && avx512) return has_amx() ? 3 : 2;
  if (avx2) return 1;
#elif defined(__aarch64__)
  if (has_dot_products()) return has_byte_matrices() && built(2) ? 2 : 1;
#endif
  return 0;
}

}  // namespace phl
