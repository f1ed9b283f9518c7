// The linear ops with AVX-VNNI's dot products: those of `Vec` in this unit (linear/vec_avxvnni.h).
#include "../each/linear.cpp"
