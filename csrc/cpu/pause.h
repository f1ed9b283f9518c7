// For loops that wait for another core.
#pragma once

#include "isa.h"

namespace phl {

// Tells this core that it is waiting, so that it leaves what it shares to others.
PHL_INLINE void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace phl
