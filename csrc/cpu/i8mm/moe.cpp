// The experts with matrix products of bytes, as in i8mm/linear.cpp.
#include "../each/moe.cpp"
