// What an op is: arguments of 8-byte slots, a function that a team of threads runs, and the registry by name.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "team.h"

namespace phl {

using OpFunction = void (*)(const void* args, Team& team);

// One slot of an op's arguments.
struct Field {
  const char* name;
  char kind;  // p pointer, i int64_t, d double
  int64_t offset;
};

// Instruction sets of this kind of processor, the best last; a unit's is its PHL_RANK. Those that another is derived from
// by more instructions (AVX-VNNI, AMX, I8MM) have units of a few ops; the other ops are those of a level below.
#if defined(__aarch64__)
enum Level : int { kPortable, kNeon, kI8mm, kLevels };
#else
enum Level : int { kPortable, kAvx2, kAvxVnni, kAvx512, kAmx, kLevels };
#endif
extern const char* const kLevelNames[kLevels];

struct OpEntry {
  const char* name;
  int level;  // of the unit
  const Field* fields;
  int slots;
  OpFunction run;
};

// A number that kernels and their callers must agree on, as one unit knows it.
struct ConstantEntry {
  const char* name;  // "room.kName"
  int level;
  int64_t value;
};

constexpr int kMaxSlots = 40;

void register_op(const OpEntry& entry);
// The op's best unit at or below a level; nullptr: none. Every op has a unit at each level that is derived from no other, so
// that a level which this CPU lacks (AVX-VNNI on some with AVX-512) is never taken for a higher one.
const OpEntry* find_op(const char* name, int highest_level);
bool runs(int level);  // whether this CPU does, and this library has units of it
int best_level();      // the highest that runs
int op_count();
const OpEntry& op_at(int index);
void register_constant(const ConstantEntry& entry);
int constant_count();
const ConstantEntry& constant_at(int index);

struct Registered {
  explicit Registered(const OpEntry& entry) { register_op(entry); }
  explicit Registered(const ConstantEntry& entry) { register_constant(entry); }
};

template <class T>
consteval char kind_of_slot() {
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, int64_t> || std::is_same_v<T, double>);
  return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, int64_t> ? 'i' : 'd';
}

// Whether the fields are all of the struct's, in its order.
template <size_t N>
consteval bool complete(const Field (&fields)[N], size_t bytes) {
  for (size_t i = 0; i < N; ++i) {
    if (fields[i].offset != static_cast<int64_t>(8 * i)) return false;
  }
  return bytes == 8 * N && N <= kMaxSlots;
}

}  // namespace phl

// PHL_EACH(f, context, a, b, ...) is f(context, a) f(context, b) ..., for up to 64 names.
#define PHL_EACH(f, context, ...) PHL_PASS_64(PHL_EACH_NEXT(f, context, __VA_ARGS__))
#define PHL_EACH_NEXT(f, context, name, ...) \
  f(context, name) __VA_OPT__(PHL_EACH_LATER PHL_NOTHING()(f, context, __VA_ARGS__))
#define PHL_EACH_LATER() PHL_EACH_NEXT
#define PHL_NOTHING() ()
#define PHL_PASS_64(...) PHL_PASS_16(PHL_PASS_16(PHL_PASS_16(PHL_PASS_16(__VA_ARGS__))))
#define PHL_PASS_16(...) PHL_PASS_4(PHL_PASS_4(PHL_PASS_4(PHL_PASS_4(__VA_ARGS__))))
#define PHL_PASS_4(...) PHL_PASS(PHL_PASS(PHL_PASS(PHL_PASS(__VA_ARGS__))))
#define PHL_PASS(...) __VA_ARGS__

#define PHL_FIELD(Args, field) ::phl::Field{#field, ::phl::kind_of_slot<decltype(Args::field)>(), offsetof(Args, field)},

// The arguments of one op or several: every field of the struct by name, which is how Python passes them.
#define PHL_FIELDS(Args, ...)                                                               \
  static constexpr ::phl::Field fields_of_##Args[] = {PHL_EACH(PHL_FIELD, Args, __VA_ARGS__)}; \
  static_assert(::phl::complete(fields_of_##Args, sizeof(Args)), "PHL_FIELDS must name all fields, in their order")

#define PHL_OP(op, Args)                                                       \
  static void run_##op(const void* args, ::phl::Team& team) {                  \
    op(*static_cast<const Args*>(args), team);                                 \
  }                                                                            \
  [[maybe_unused]] static const ::phl::Registered registered_##op {            \
    ::phl::OpEntry {                                                           \
      #op, PHL_RANK, fields_of_##Args, int(sizeof(Args) / 8), run_##op \
    }                                                                          \
  }

// A constant that Python reads, as "room.name".
#define PHL_CONSTANT(room, name)                                                   \
  [[maybe_unused]] static const ::phl::Registered constant_##room##_##name {       \
    ::phl::ConstantEntry { #room "." #name, PHL_RANK, int64_t(name) }   \
  }
