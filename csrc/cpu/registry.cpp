// Ops by name, and which units this CPU can run.
#include <cstring>
#include <vector>

#include "op.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
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
const char* const kLevelNames[kLevels] = {"portable", "avx2", "avxvnni", "avx512", "amx"};
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
#if defined(__APPLE__)
bool apple_has(const char* feature) {
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found != 0;
}
#endif

// Matrix products of bytes and dot products of bfloat16, which have come together: Neoverse V1 and N2, Cortex-A510 and A710,
// Apple M2, and their successors. A processor that has one of them alone runs the level below.
bool has_byte_matrices() {
#if defined(__linux__)
  constexpr unsigned long kByteMatrices = 1ul << 13, kBfloat16 = 1ul << 14;  // HWCAP2_I8MM, HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & (kByteMatrices | kBfloat16)) == (kByteMatrices | kBfloat16);
#elif defined(__APPLE__)
  return apple_has("hw.optional.arm.FEAT_I8MM") && apple_has("hw.optional.arm.FEAT_BF16");
#else
  return false;
#endif
}
#endif

// Whether this library has units of a level: the compiler may not have known its instructions.
bool built(int level) {
  for (const OpEntry& entry : entries()) {
    if (entry.level == level) return true;
  }
  return false;
}

#if defined(__x86_64__)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// VEX-encoded dot products of bytes: Alder Lake and its successors, Sapphire Rapids, Zen 5. Their registers are AVX's, which
// the system saves where it lets AVX2 be used.
bool has_avx_vnni() {
  constexpr unsigned kAvxVnniBit = 1u << 4;
  unsigned a = 0, b = 0, c = 0, d = 0;
  // In its first part the leaf tells the number of its last one.
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnniBit) != 0;
}

bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16");
}

// Of the processor alone, from the lowest level to the highest.
bool can(int level) {
  static const bool avx2 = has_avx2(), vnni = avx2 && has_avx_vnni(), avx512 = avx2 && has_avx512();
  switch (level) {
    case kAvx2: return avx2;
    case kAvxVnni: return vnni;
    case kAvx512: return avx512;
    case kAmx: {
      static const bool granted = avx512 && ask_for_amx();
      return granted;
    }
    default: return level == kPortable;
  }
}
#elif defined(__aarch64__)
bool can(int level) {
  static const bool dots = has_dot_products(), matrices = dots && has_byte_matrices();
  return level == kPortable || (level == kNeon && dots) || (level == kI8mm && matrices);
}
#else
bool can(int level) { return level == kPortable; }
#endif

}  // namespace

bool runs(int level) { return can(level) && built(level); }

int best_level() {
  static const int best = [] {
    int level = kLevels - 1;
    while (level > kPortable && !runs(level)) --level;
    return level;
  }();
  return best;
}

}  // namespace phl
