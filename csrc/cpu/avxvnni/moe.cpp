// The sparse layer with AVX-VNNI's dot products, as in avxvnni/linear.cpp.
#include "../each/moe.cpp"
