// Where the ranks of one machine meet within a step: sums over all of them, through memory that they share, whose layout
// distributed/shm.py gives; and the part of a vocabulary that a rank has. Legend: T rows, N features.
#include <sched.h>
#include <time.h>

#include "../op.h"
#include "../pause.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kGrain = 4096;     // elements that are worth a thread
constexpr int64_t kLine = 8;         // numbers from one rank's counter to the next
constexpr int64_t kSpins = 1500;     // looks before the core is offered to others: about 20 us
constexpr int64_t kYields = 4000;    // and before it is left for a while
constexpr int64_t kNap = 50'000;     // nanoseconds
enum Told { kFailed, kCalls, kSpent, kWaited, kBytes, kUndone };  // places of SharedSumArgs::told

struct SharedSumArgs {
  int64_t* head;    // a line each: whether the group has ended, and how many steps were undone; of each rank, how often it
                    // has met the others
  float* places;    // two turns, in each a place of every rank
  const float* x;   // [rows, n]
  float* out;       // [rows, n]; may be x
  int64_t* told;    // why it failed: 0 not, -1 the step is undone, 1 the group has ended, 2 + r rank r did not come;
                    // calls; nanoseconds of all of them; of these waiting for others; bytes that this rank has brought;
                    // how many undone steps this rank knows of
  int64_t rows, n, rank, size;
  int64_t place;     // floats of a place: what is larger goes in pieces
  int64_t patience;  // nanoseconds
};

int64_t now() {
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return int64_t(at.tv_sec) * 1'000'000'000 + at.tv_nsec;
}

// Whether nobody must be waited for: sets why.
bool over(const SharedSumArgs& a) {
  if (__atomic_load_n(a.head, __ATOMIC_ACQUIRE) != 0) {
    a.told[kFailed] = 1;
  } else if (__atomic_load_n(a.head + 1, __ATOMIC_ACQUIRE) > a.told[kUndone]) {
    a.told[kFailed] = -1;
  }
  return a.told[kFailed] != 0;
}

// Says that this rank has written its part of this call, and waits until all have. Once it has failed it waits for nobody.
void meet(const SharedSumArgs& a, int64_t call) {
  if (a.told[kFailed] != 0 || over(a)) return;
  __atomic_store_n(a.head + kLine * (1 + a.rank), call, __ATOMIC_RELEASE);
  int64_t begun = 0;
  for (int64_t rank = 0; rank < a.size; ++rank) {
    const int64_t* counter = a.head + kLine * (1 + rank);
    for (int64_t looks = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < call; ++looks) {
      if (looks < kSpins) {
        pause_core();
        continue;
      }
      if (looks < kYields) {
        sched_yield();
      } else {
        const timespec nap{0, kNap};
        nanosleep(&nap, nullptr);
      }
      const int64_t at = now();
      if (begun == 0) begun = at;
      if (over(a)) return;
      if (at - begun > a.patience) {
        a.told[kFailed] = 2 + rank;
        return;
      }
    }
  }
  over(a);
}

// The sum over the ranks in their order, so that all have the same bits. Who writes a place again has seen all ranks at
// the call in between, and so behind their reading of it.
void shared_sum(const SharedSumArgs& a, Team& team) {
  const int64_t total = a.rows * a.n, entered = team.thread == 0 ? now() : 0;
  for (int64_t first = 0; first < total; first += a.place) {
    const int64_t count = total - first < a.place ? total - first : a.place;
    const int64_t call = a.head[kLine * (1 + a.rank)] + 1;
    float* turn = a.places + (call & 1) * a.size * a.place;
    float* own = turn + a.rank * a.place;
    team.split(count, kGrain, [&](int64_t begin, int64_t end) {
      __builtin_memcpy(own + begin, a.x + first + begin, size_t(end - begin) * sizeof(float));
    });
    team.barrier();
    if (team.thread == 0) {
      const int64_t before = now();
      meet(a, call);
      a.told[kWaited] += now() - before;
    }
    team.barrier();
    team.split(count, kGrain, [&](int64_t begin, int64_t end) {
      int64_t i = begin;
      for (; i + W <= end; i += W) {
        vf sum = load(turn + i);
        for (int64_t rank = 1; rank < a.size; ++rank) sum += load(turn + rank * a.place + i);
        store(a.out + first + i, sum);
      }
      for (; i < end; ++i) {
        float sum = turn[i];
        for (int64_t rank = 1; rank < a.size; ++rank) sum += turn[rank * a.place + i];
        a.out[first + i] = sum;
      }
    });
  }
  if (team.thread == 0) {
    a.told[kCalls] += 1;
    a.told[kSpent] += now() - entered;
    a.told[kBytes] += total * int64_t(sizeof(float));
  }
}
PHL_FIELDS(SharedSumArgs, head, places, x, out, told, rows, n, rank, size, place, patience);
PHL_OP(shared_sum, SharedSumArgs);

struct OwnIdsArgs {
  const int64_t* ids;  // [count]
  int64_t* out;        // [count]: rows of the part [first, last) of a vocabulary; of ids elsewhere, any row
  int64_t count, first, last;
};

void own_ids(const OwnIdsArgs& a, Team& team) {
  team.split(a.count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = a.ids[i];
      a.out[i] = id < a.first ? 0 : (id < a.last ? id : a.last - 1) - a.first;
    }
  });
}
PHL_FIELDS(OwnIdsArgs, ids, out, count, first, last);
PHL_OP(own_ids, OwnIdsArgs);

struct ClearOthersArgs {
  const int64_t* ids;  // [rows]
  float* x;            // [rows, n]: those of ids outside [first, last) become 0
  int64_t rows, n, first, last;
};

void clear_others(const ClearOthersArgs& a, Team& team) {
  team.split(a.rows, 1 + kGrain / (a.n > 0 ? a.n : 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (a.ids[row] >= a.first && a.ids[row] < a.last) continue;
      __builtin_memset(a.x + row * a.n, 0, size_t(a.n) * sizeof(float));
    }
  });
}
PHL_FIELDS(ClearOthersArgs, ids, x, rows, n, first, last);
PHL_OP(clear_others, ClearOthersArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
