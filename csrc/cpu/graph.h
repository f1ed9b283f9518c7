// A recorded step: ops with copies of their arguments, replayed in one parallel region.
#pragma once
#include <cstdint>
#include <vector>

#include "op.h"

namespace phl {

constexpr int64_t kSoloNanoseconds = 1500;  // an op of less work runs on one thread: a barrier costs about a tenth

struct Record {
  const OpEntry* op;
  int64_t work;         // estimated nanoseconds on one thread
  uint32_t first_slot;  // into Graph::slots
  bool solo;
  bool barrier_after;
};

struct Graph {
  std::vector<Record> records;
  std::vector<uint64_t> slots;
  bool runs = true;  // whether calls are carried out while they are recorded

  void append(const OpEntry* op, int64_t work, const uint64_t* values);
  void finish();  // decides where barriers are needed
  void replay();
  void replay_timed(int64_t* nanoseconds);  // per record, barrier included
};

}  // namespace phl
