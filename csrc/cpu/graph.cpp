#include "graph.h"

#include <chrono>

namespace phl {
namespace {

int64_t now_nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

struct Replay {
  const Graph* graph;
  int64_t* nanoseconds;  // null: not timed
};

void run_step(void* context, Team& team) {
  const Replay& replay = *static_cast<Replay*>(context);
  const Graph& graph = *replay.graph;
  const bool timed = replay.nanoseconds != nullptr;
  Team alone;
  int64_t before = timed ? now_nanoseconds() : 0;
  for (size_t i = 0; i < graph.records.size(); ++i) {
    const Record& record = graph.records[i];
    const uint64_t* args = graph.slots.data() + record.first_slot;
    if (!record.solo) {
      record.op->run(args, team);
    } else if (team.thread == 0) {
      record.op->run(args, alone);
    }
    if (record.barrier_after) team.barrier();
    if (timed && team.thread == 0) {
      const int64_t after = now_nanoseconds();
      replay.nanoseconds[i] = after - before;
      before = after;
    }
  }
}

}  // namespace

void Graph::append(const OpEntry* op, int64_t work, const uint64_t* values) {
  const auto first = static_cast<uint32_t>(slots.size());
  slots.insert(slots.end(), values, values + op->slots);
  records.push_back({op, work, first, work < kSoloNanoseconds, true});
}

void Graph::finish() {
  for (size_t i = 0; i < records.size(); ++i) {
    const bool last = i + 1 == records.size();  // the region itself ends with a barrier
    records[i].barrier_after = !last && !(records[i].solo && records[i + 1].solo);
  }
}

void Graph::replay() {
  Replay replay{this, nullptr};
  run_region(run_step, &replay);
}

void Graph::replay_timed(int64_t* nanoseconds) {
  Replay replay{this, nanoseconds};
  run_region(run_step, &replay);
}

}  // namespace phl
