// What an op is: arguments of 8-byte slots, a function that a team of threads runs, and the registry by name.
#pragma once
#include <cstddef>
#include <cstdint>

#include "team.h"

namespace phl {

using OpFunction = void (*)(const void* args, Team& team);

struct OpEntry {
  const char* name;
  int level;              // of the unit: 0 portable, 1 AVX2, 2 AVX-512, 3 AMX
  const char* signature;  // one of p, i, d for each slot
  int slots;
  OpFunction run;
};

constexpr int kMaxSlots = 40;
constexpr int kLevels = 4;
extern const char* const kLevelNames[kLevels];

void register_op(const OpEntry& entry);
const OpEntry* find_op(const char* name, int highest_level);  // nullptr: none
int best_level();                                             // what this CPU can run
int op_count();
const OpEntry& op_at(int index);

struct Registered {
  explicit Registered(const OpEntry& entry) { register_op(entry); }
};

}  // namespace phl

#define PHL_OP(op, Args, signature)                                                      \
  static_assert(sizeof(Args) % 8 == 0 && sizeof(Args) <= 8 * ::phl::kMaxSlots);          \
  static void run_##op(const void* args, ::phl::Team& team) {                            \
    op(*static_cast<const Args*>(args), team);                                           \
  }                                                                                      \
  [[maybe_unused]] static const ::phl::Registered registered_##op {                      \
    ::phl::OpEntry { #op, PHL_LEVEL + PHL_AMX, signature, int(sizeof(Args) / 8), run_##op } \
  }
