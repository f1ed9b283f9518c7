// The instruction set that a unit is compiled for. setup.py defines PHL_LEVEL for each object, PHL_AMX for those that use
// AMX tiles beside AVX-512, and PHL_NEON for Arm processors with dot products of bytes, whose vectors are as wide as the
// portable ones; PHL_I8MM for those that have matrix products of bytes as well. A unit's rank is its place among the levels of its kind of processor.
#pragma once
#ifndef PHL_LEVEL
#define PHL_LEVEL 0
#endif
#ifndef PHL_AMX
#define PHL_AMX 0
#endif
#ifndef PHL_NEON
#define PHL_NEON 0
#endif
#ifndef PHL_I8MM
#define PHL_I8MM 0
#endif
#define PHL_RANK (PHL_LEVEL + PHL_AMX + PHL_NEON + PHL_I8MM)
#if PHL_I8MM
#define PHL_NS i8mm
#elif PHL_NEON
#define PHL_NS neon
#elif PHL_AMX
#define PHL_NS amx
#elif PHL_LEVEL == 2
#define PHL_NS avx512
#elif PHL_LEVEL == 1
#define PHL_NS avx2
#else
#define PHL_NS portable
#endif
#define PHL_INLINE inline __attribute__((always_inline))
