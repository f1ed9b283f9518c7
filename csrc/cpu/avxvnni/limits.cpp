// The machine's limits, of which AVX-VNNI has its own for products of bytes.
#include "../each/limits.cpp"
