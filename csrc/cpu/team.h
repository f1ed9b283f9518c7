// A team: the threads that run one op together, and how they share its work. See README.md.
#pragma once
#include <cstdint>
#include <vector>

#include "isa.h"

namespace phl {

struct Crew;  // what the threads of a team share; pool.cpp

struct Team {
  int thread = 0;
  int size = 1;
  uint64_t loop = 0;  // dynamic loops so far; the same in every thread of the team
  Crew* crew = nullptr;

  PHL_INLINE void barrier() {
    if (size > 1) wait_for_all();
  }

  // f(begin, end) on one contiguous part per thread, parts of at least `grain`.
  template <class F>
  PHL_INLINE void split(int64_t n, int64_t grain, F&& f) {
    int64_t part = (n + size - 1) / size;
    if (part < grain) part = grain;
    const int64_t begin = part * thread;
    const int64_t end = begin + part < n ? begin + part : n;
    if (begin < end) f(begin, end);
  }

  // f(task) for each task in [0, n), n < 2^24, in any order, on whichever thread is free.
  template <class F>
  PHL_INLINE void tasks(int64_t n, F&& f) {
    if (size == 1) {
      for (int64_t task = 0; task < n; ++task) f(task);
      return;
    }
    ++loop;
    for (int64_t task; (task = take(n)) >= 0;) f(task);
  }

  void wait_for_all();
  int64_t take(int64_t n);  // the next task of this loop, or -1
};

// Runs f(context, team) on every thread of the pool and returns when all have finished. If the pool is busy with
// another caller's region, runs it alone on the calling thread.
void run_region(void (*f)(void* context, Team& team), void* context);
void set_threads(int threads);  // including the caller; at least 1
int num_threads();
std::vector<int64_t> worker_ids();  // the system's ids of the pool's own threads; empty where it has none

}  // namespace phl
