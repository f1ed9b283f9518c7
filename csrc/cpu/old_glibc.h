// Put before every source of the library, so that it loads with glibc 2.28 wherever it was built (manylinux_2_28): what later
// versions export a second time is asked for under its first version. On Arm all of it is older than that.
#if defined(__x86_64__) && defined(__linux__)
#include <features.h>
#if defined(__GLIBC__)
#define PHL_FIRST_VERSION(name) __asm__(".symver " #name "," #name "@GLIBC_2.2.5")
PHL_FIRST_VERSION(exp);
PHL_FIRST_VERSION(log);
PHL_FIRST_VERSION(pow);
PHL_FIRST_VERSION(pthread_create);
PHL_FIRST_VERSION(pthread_join);
PHL_FIRST_VERSION(pthread_mutex_trylock);
#undef PHL_FIRST_VERSION
#endif
#endif
