// The KV cache that is read next, asked for while something else is computed.
//
// With many rows a decode step's linear layers wait for arithmetic and its attention for memory. So attention ends with
// a list of the pages that it will read in the next layer, and the kernels for many rows ask for a few of their lines
// with every chunk of weights; these go to the second-level cache and from there to the third. Nothing but hints: a
// result never depends on them. Each thread has a list of its own, and learns by itself which cache follows which.
#pragma once
#include <cstdint>

#include "isa.h"

namespace phl {

struct Lines {  // side by side, of 64 bytes
  uintptr_t at, end;
};

class NextCache {
 public:
  static constexpr int64_t kBytes = 8 << 20;  // of all threads together: what a third-level cache holds beside weights
  static constexpr int kPages = 4096, kCaches = 256;
  static constexpr int64_t kFewRows = 24;  // with so many or fewer, no kernel asks (linear/job.h)

  // Attention over this cache is done: forgets what is left of the list, and points at the cache that came after this
  // one the last time.
  PHL_INLINE void done(const void* keys, const void* values, int64_t page_bytes) {
    count_ = page_ = 0;
    at_ = 0;
    in_values_ = false;
    page_bytes_ = page_bytes;
    int here = current_ + 1 < caches_ ? current_ + 1 : 0;
    if (caches_ == 0 || order_[here].keys != keys || order_[here].values != values) here = find(keys, values);
    current_ = here;
    const Cache& next = order_[here + 1 < caches_ ? here + 1 : 0];
    base_[0] = reinterpret_cast<uintptr_t>(next.keys);
    base_[1] = reinterpret_cast<uintptr_t>(next.values);
  }

  // One more page of the next cache; false: there is no room. `threads` share what may be asked for.
  PHL_INLINE bool add(int32_t page, int threads) {
    if (count_ == kPages || (count_ + 1) * 2 * page_bytes_ * threads > kBytes) return false;
    pages_[count_++] = page;
    return true;
  }

  // The next lines of the list, at most so many; none: it is at its end.
  PHL_INLINE Lines take(int64_t most) {
    if (page_ >= count_) return {0, 0};
    const uintptr_t from = base_[in_values_] + static_cast<uintptr_t>(pages_[page_] * page_bytes_ + at_);
    const int64_t left = page_bytes_ - at_, bytes = left < 64 * most ? left : 64 * most;
    at_ += bytes;
    if (at_ >= page_bytes_) {
      at_ = 0;
      page_ += in_values_;
      in_values_ = !in_values_;
    }
    return {from, from + static_cast<uintptr_t>(bytes)};
  }

 private:
  struct Cache {
    const void *keys, *values;
  };

  PHL_INLINE int find(const void* keys, const void* values) {
    for (int i = 0; i < caches_; ++i) {
      if (order_[i].keys == keys && order_[i].values == values) return i;
    }
    if (caches_ == kCaches) caches_ = 0;  // those of pools that are gone
    order_[caches_] = {keys, values};
    return caches_++;
  }

  Cache order_[kCaches];
  int32_t pages_[kPages];
  uintptr_t base_[2] = {0, 0};
  int64_t page_bytes_ = 0, at_ = 0;
  int caches_ = 0, current_ = 0, count_ = 0, page_ = 0;
  bool in_values_ = false;
};

NextCache& next_cache();  // this thread's

}  // namespace phl
