// The instruction set that a unit is compiled for. setup.py defines PHL_LEVEL for each object: how wide its vectors are; and
// for those that have more, PHL_VNNI (AVX-VNNI's dot products beside AVX2), PHL_AMX (tiles beside AVX-512), PHL_NEON (Arm
// processors with dot products of bytes, whose vectors are as wide as the portable ones) and PHL_I8MM (matrix products of
// bytes and dot products of bfloat16 as well). A unit's rank is its place among the levels of its kind of processor (op.h).
#pragma once
#ifndef PHL_LEVEL
#define PHL_LEVEL 0
#endif
#ifndef PHL_VNNI
#define PHL_VNNI 0
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
#if PHL_LEVEL == 2
#define PHL_RANK (3 + PHL_AMX)
#else
#define PHL_RANK (PHL_LEVEL + PHL_VNNI + PHL_NEON + PHL_I8MM)
#endif
#if PHL_I8MM
#define PHL_NS i8mm
#elif PHL_NEON
#define PHL_NS neon
#elif PHL_AMX
#define PHL_NS amx
#elif PHL_LEVEL == 2
#define PHL_NS avx512
#elif PHL_VNNI
#define PHL_NS avxvnni
#elif PHL_LEVEL == 1
#define PHL_NS avx2
#else
#define PHL_NS portable
#endif
#define PHL_INLINE inline __attribute__((always_inline))
#define PHL_APART __attribute__((noinline))  // a function of its own wherever it is called: scripts/count_step.py counts it
