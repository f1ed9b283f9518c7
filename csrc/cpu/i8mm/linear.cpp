// The linear ops with matrix products of bytes: `run_blocks` of this unit takes linear/pairs.h for many rows.
#include "../each/linear.cpp"
