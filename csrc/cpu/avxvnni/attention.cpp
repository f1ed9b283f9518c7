// Attention with AVX-VNNI's dot products of bytes beside int8 pages (each/attention_bytes.h).
#include "../each/attention.cpp"
