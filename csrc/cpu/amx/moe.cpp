// The sparse layer with AMX tiles: `run_blocks` of this unit tries linear/amx.h first.
#include "../each/moe.cpp"
