// Attention with AVX-VNNI's dot products of words beside int8 pages (each/attention_words.h).
#include "../each/attention.cpp"
