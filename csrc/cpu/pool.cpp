// The persistent thread pool. A region costs about a microsecond while the workers still spin; after kSpin they sleep
// on a futex and an idle pool costs nothing.
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "next_cache.h"
#include "pause.h"
#include "team.h"

namespace phl {

NextCache& next_cache() {
  static thread_local NextCache own;
  return own;
}

namespace {

constexpr int64_t kSpinNanoseconds = 40'000;

// A word that threads wait on: spin for a while, then sleep until it changes.
struct alignas(64) WaitWord {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> sleepers{0};

  void change_and_wake() {
    value.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) == 0) return;
#if defined(__linux__)
    syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#else
    value.notify_all();
#endif
  }

  void wait_while(uint32_t old) {
    if (spin_while(old)) return;
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (value.load(std::memory_order_seq_cst) == old) {
#if defined(__linux__)
      syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
      value.wait(old);
#endif
    }
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  bool spin_while(uint32_t old) {
    using Clock = std::chrono::steady_clock;
    for (int i = 0; i < 64; ++i) {
      if (value.load(std::memory_order_acquire) != old) return true;
      pause_core();
    }
    const auto deadline = Clock::now() + std::chrono::nanoseconds(kSpinNanoseconds);
    do {
      for (int i = 0; i < 32; ++i) {
        if (value.load(std::memory_order_acquire) != old) return true;
        pause_core();
      }
    } while (Clock::now() < deadline);
    return false;
  }
};

}  // namespace

struct Crew {
  WaitWord epoch;       // a region begins
  WaitWord generation;  // a barrier opens
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint64_t> ticket{0};  // loop << 24 | next task
  alignas(64) int size = 1;
  bool stop = false;
  void (*work)(void*, Team&) = nullptr;
  void* context = nullptr;
};

void Team::wait_for_all() {
  const uint32_t now = crew->generation.value.load(std::memory_order_acquire);
  if (crew->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    crew->arrived.store(0, std::memory_order_relaxed);
    crew->generation.change_and_wake();
  } else {
    crew->generation.wait_while(now);
  }
}

int64_t Team::take(int64_t n) {
  std::atomic<uint64_t>& ticket = crew->ticket;
  uint64_t seen = ticket.load(std::memory_order_relaxed);
  while (true) {
    // A later loop's ticket means that this loop was used up before this thread came to it.
    const uint64_t owner = seen >> 24;
    const uint64_t next = owner == loop ? seen & 0xFFFFFF : 0;
    if (owner > loop || next >= static_cast<uint64_t>(n)) return -1;
    if (ticket.compare_exchange_weak(seen, loop << 24 | (next + 1), std::memory_order_acq_rel)) {
      return static_cast<int64_t>(next);
    }
  }
}

namespace {

struct Worker {
  pthread_t handle;
  Team team;
  uint32_t epoch;  // the last region this worker knows of
  std::atomic<int64_t> id{0};  // as the system knows the thread; 0: it has not begun
};

struct Pool {
  std::mutex busy;
  Crew* crew = new Crew;
  Team caller;
  std::vector<Worker*> workers;
};

Pool* pool = new Pool;  // never destroyed: workers may sleep in it until the process ends

int64_t own_thread_id() {
#if defined(__linux__)
  return syscall(SYS_gettid);
#else
  return -1;
#endif
}

void* work_loop(void* argument) {
  Worker& self = *static_cast<Worker*>(argument);
  Crew& crew = *self.team.crew;
  self.id.store(own_thread_id(), std::memory_order_release);
  while (true) {
    crew.epoch.wait_while(self.epoch);
    ++self.epoch;
    if (crew.stop) return nullptr;
    crew.work(crew.context, self.team);
    self.team.barrier();
  }
}

void stop_workers() {
  if (pool->workers.empty()) return;
  pool->crew->stop = true;
  pool->crew->epoch.change_and_wake();
  for (Worker* worker : pool->workers) {
    pthread_join(worker->handle, nullptr);
    delete worker;
  }
  pool->workers.clear();
}

void start_workers(int threads) {
  delete pool->crew;
  pool->crew = new Crew;
  pool->crew->size = threads;
  pool->caller = Team{0, threads, 0, pool->crew};
  for (int i = 1; i < threads; ++i) {
    auto* worker = new Worker{{}, Team{i, threads, 0, pool->crew}, 0, {}};
    if (pthread_create(&worker->handle, nullptr, work_loop, worker) != 0) {
      // Fewer threads than asked for: stop those that started and make a smaller team.
      delete worker;
      stop_workers();
      start_workers(i);
      return;
    }
    pool->workers.push_back(worker);
  }
}

// The child of a fork has none of the workers: it begins with a new pool of one thread less work to do.
void after_fork_in_child() {
  const int threads = pool->caller.size;
  pool = new Pool;
  start_workers(threads);
}

struct AtFork {
  AtFork() { pthread_atfork(nullptr, nullptr, after_fork_in_child); }
} at_fork;

}  // namespace

void set_threads(int threads) {
  std::lock_guard lock(pool->busy);
  if (threads < 1) threads = 1;
  if (threads == pool->caller.size) return;
  stop_workers();
  start_workers(threads);
}

int num_threads() { return pool->caller.size; }

std::vector<int64_t> worker_ids() {
  std::lock_guard lock(pool->busy);
  std::vector<int64_t> found;
  for (Worker* worker : pool->workers) {
    int64_t id;
    while ((id = worker->id.load(std::memory_order_acquire)) == 0) pause_core();
    if (id > 0) found.push_back(id);
  }
  return found;
}

void run_region(void (*f)(void*, Team&), void* context) {
  std::unique_lock lock(pool->busy, std::try_to_lock);
  if (!lock.owns_lock() || pool->caller.size == 1) {
    Team alone;
    f(context, alone);
    return;
  }
  Crew& crew = *pool->crew;
  crew.work = f;
  crew.context = context;
  crew.epoch.change_and_wake();
  f(context, pool->caller);
  pool->caller.barrier();
}

}  // namespace phl
