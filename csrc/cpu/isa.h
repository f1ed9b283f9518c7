// The instruction set that a unit is compiled for. setup.py defines PHL_LEVEL for each object, and PHL_AMX for those
// that use AMX tiles beside AVX-512: their ops are one level above.
#pragma once
#ifndef PHL_LEVEL
#define PHL_LEVEL 0
#endif
#ifndef PHL_AMX
#define PHL_AMX 0
#endif
#if PHL_AMX
#define PHL_NS amx
#elif PHL_LEVEL == 2
#define PHL_NS avx512
#elif PHL_LEVEL == 1
#define PHL_NS avx2
#else
#define PHL_NS portable
#endif
#define PHL_INLINE inline __attribute__((always_inline))
