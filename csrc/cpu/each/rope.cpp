// Rotary position embedding (Su et al. 2021) in place, the writing of new tokens' K and V into the paged cache, and both
// in one op with the heads' norms before them.
// Caches are [pages, K, S, D] bfloat16, or [pages, K, S, D + 4] int8: D values, then the float32 scale.
#include "../op.h"
#include "norm_row.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kGrain = 1024;  // elements that are worth a thread

struct RopeArgs {
  float *q, *k;             // [T, heads, D], [T, kv_heads, D]; last axis contiguous
  const void* positions;    // [T] int64 or int32
  const float* cos_sin;     // [positions, 2, half]
  int64_t position64, tokens, heads, kv_heads, half, interleaved;
  int64_t q_token, q_head, k_token, k_head;  // strides
};

PHL_INLINE void turn_halves(float* x, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const vf first = load(x + i), second = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, first * c - second * s);
    store(x + half + i, second * c + first * s);
  }
  if (i < half) {
    const int64_t n = half - i;
    const vf first = load_n(x + i, n), second = load_n(x + half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(x + i, first * c - second * s, n);
    store_n(x + half + i, second * c + first * s, n);
  }
}

PHL_INLINE void turn_neighbours(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[2 * i], second = x[2 * i + 1];
    x[2 * i] = first * cos[i] - second * sin[i];
    x[2 * i + 1] = second * cos[i] + first * sin[i];
  }
}

PHL_INLINE int64_t position_of(const void* positions, int64_t position64, int64_t token) {
  return position64 ? static_cast<const int64_t*>(positions)[token] : static_cast<const int32_t*>(positions)[token];
}

PHL_INLINE void turn(float* x, const float* cos, int64_t half, int64_t interleaved) {
  if (interleaved) turn_neighbours(x, cos, cos + half, half);
  else turn_halves(x, cos, cos + half, half);
}

void rope(const RopeArgs& a, Team& team) {
  const int64_t per_token = (a.heads + a.kv_heads) * a.half * 2;
  team.split(a.tokens, (kGrain + per_token - 1) / per_token, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float* cos = a.cos_sin + position_of(a.positions, a.position64, token) * 2 * a.half;
      for (int64_t head = 0; head < a.heads + a.kv_heads; ++head) {
        float* x = head < a.heads ? a.q + token * a.q_token + head * a.q_head
                                  : a.k + token * a.k_token + (head - a.heads) * a.k_head;
        turn(x, cos, a.half, a.interleaved);
      }
    }
  });
}
PHL_OP(rope, RopeArgs, "pppp iiiiii iiii");

struct WriteKvArgs {
  const float *k, *v;      // [T, K, D]
  void *k_cache, *v_cache;
  const int32_t* slots;    // [T] page * S + offset
  int64_t tokens, kv_heads, head_size, page_size;
  int64_t k_token, k_head, v_token, v_head;  // strides of k and v
  int64_t page_stride;                       // elements between pages of a cache
};

PHL_INLINE void store_bf16_row(uint16_t* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store_bf16(to + i, load(from + i));
  for (; i < n; ++i) to[i] = float_to_bf16(from[i]);
}

// scale = max |x| / 127; a row of zeros has scale 0.
PHL_INLINE void store_int8_row(int8_t* to, const float* from, int64_t n) {
  vf top{};
  int64_t i = 0;
  for (; i < n; i += W) {
    const vf x = load_n(from + i, n - i < W ? n - i : W);
    top = max(top, max(x, -x));
  }
  const float scale = largest(top) / 127.0f;
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (i = 0; i < n; ++i) {
    // Adding 1.5 * 2^23 rounds to nearest even; the product is at most 127 plus a rounding error.
    const float shifted = from[i] * inverse + 12582912.0f;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    to[i] = int8_t(bits - 0x4B400000);
  }
  __builtin_memcpy(to + n, &scale, 4);
}

// The types of cache: elements of a row of n values, and how it is stored.
struct Bf16Rows {
  using Value = uint16_t;
  static int64_t width(int64_t n) { return n; }
  PHL_INLINE static void store(Value* to, const float* from, int64_t n) { store_bf16_row(to, from, n); }
};
struct Int8Rows {
  using Value = int8_t;
  static int64_t width(int64_t n) { return n + 4; }
  PHL_INLINE static void store(Value* to, const float* from, int64_t n) { store_int8_row(to, from, n); }
};

template <class Rows>
PHL_INLINE void write_tokens(const WriteKvArgs& a, Team& team) {
  using Value = typename Rows::Value;
  const int64_t per_token = a.kv_heads * a.head_size * 2;
  team.split(a.tokens, (kGrain + per_token - 1) / per_token, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t page = a.slots[token] / a.page_size, offset = a.slots[token] % a.page_size;
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        const int64_t at = page * a.page_stride + (head * a.page_size + offset) * Rows::width(a.head_size);
        Rows::store(static_cast<Value*>(a.k_cache) + at, a.k + token * a.k_token + head * a.k_head, a.head_size);
        Rows::store(static_cast<Value*>(a.v_cache) + at, a.v + token * a.v_token + head * a.v_head, a.head_size);
      }
    }
  });
}

void write_kv_bf16(const WriteKvArgs& a, Team& team) { write_tokens<Bf16Rows>(a, team); }
PHL_OP(write_kv_bf16, WriteKvArgs, "ppppp iiii iiii i");

void write_kv_int8(const WriteKvArgs& a, Team& team) { write_tokens<Int8Rows>(a, team); }
PHL_OP(write_kv_int8, WriteKvArgs, "ppppp iiii iiii i");

struct RopeWriteKvArgs {
  float *q, *k;                  // [T, heads, D], [T, kv_heads, D]: rotated in place
  const float* v;                // [T, kv_heads, D]
  const void* positions;         // [T] int64 or int32
  const float* cos_sin;          // [positions, 2, half]
  const float *q_norm, *k_norm;  // [D], or both null: no norm of the heads
  void *k_cache, *v_cache;
  const int32_t* slots;  // [T] page * S + offset
  int64_t position64, tokens, heads, kv_heads, head_size, half, interleaved, page_size;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head, page_stride;
  double eps;
};

template <bool kNorm, bool kInterleaved>
PHL_INLINE void norm_and_turn(float* x, const float* weight, int64_t size, float eps, const float* cos, int64_t half) {
  if constexpr (kNorm) norm_row<false>(x, nullptr, weight, nullptr, x, size, eps);
  if constexpr (kInterleaved) turn_neighbours(x, cos, cos + half, half);
  else turn_halves(x, cos, cos + half, half);
}

template <class Value>
PHL_INLINE void prefetch_row(const void* cache, int64_t at, int64_t width) {
  const Value* row = static_cast<const Value*>(cache) + at;
  for (int64_t i = 0; i < width; i += 64 / int64_t(sizeof(Value))) __builtin_prefetch(row + i, 1);
}

// `a` is a copy: its fields stay in registers, whatever the stores might point to.
template <class Rows, bool kNorm, bool kInterleaved>
PHL_INLINE void rope_and_write(const RopeWriteKvArgs a, Team& team) {
  using Value = typename Rows::Value;
  const int64_t size = a.head_size, half = a.half, width = Rows::width(size);
  const int64_t per_token = (a.heads + 3 * a.kv_heads) * size;
  const float eps = float(a.eps);
  team.split(a.tokens, (kGrain + per_token - 1) / per_token, [=](int64_t begin, int64_t end) {
    // Where the token's first row goes; its rows in the caches are cold, so they are fetched one token ahead.
    const auto place = [=](int64_t token) {
      const int64_t page = a.slots[token] / a.page_size, offset = a.slots[token] % a.page_size;
      const int64_t first = page * a.page_stride + offset * width;
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        prefetch_row<Value>(a.k_cache, first + head * a.page_size * width, width);
        prefetch_row<Value>(a.v_cache, first + head * a.page_size * width, width);
      }
      return first;
    };
    int64_t next = place(begin);
    for (int64_t token = begin; token < end; ++token) {
      int64_t at = next;
      if (token + 1 < end) next = place(token + 1);
      const float* cos = a.cos_sin + position_of(a.positions, a.position64, token) * 2 * half;
      float* q = a.q + token * a.q_token;
      for (int64_t head = 0; head < a.heads; ++head, q += a.q_head) {
        norm_and_turn<kNorm, kInterleaved>(q, a.q_norm, size, eps, cos, half);
      }
      float* k = a.k + token * a.k_token;
      const float* v = a.v + token * a.v_token;
      for (int64_t head = 0; head < a.kv_heads; ++head, k += a.k_head, v += a.v_head, at += a.page_size * width) {
        norm_and_turn<kNorm, kInterleaved>(k, a.k_norm, size, eps, cos, half);
        Rows::store(static_cast<Value*>(a.k_cache) + at, k, size);
        Rows::store(static_cast<Value*>(a.v_cache) + at, v, size);
      }
    }
  });
}

template <class Rows>
PHL_INLINE void rope_and_write_any(const RopeWriteKvArgs& a, Team& team) {
  if (a.q_norm != nullptr) {
    if (a.interleaved) rope_and_write<Rows, true, true>(a, team);
    else rope_and_write<Rows, true, false>(a, team);
  } else {
    if (a.interleaved) rope_and_write<Rows, false, true>(a, team);
    else rope_and_write<Rows, false, false>(a, team);
  }
}

void rope_write_kv_bf16(const RopeWriteKvArgs& a, Team& team) { rope_and_write_any<Bf16Rows>(a, team); }
PHL_OP(rope_write_kv_bf16, RopeWriteKvArgs, "pppppppppp iiiiiiii iiiiiii d");

void rope_write_kv_int8(const RopeWriteKvArgs& a, Team& team) { rope_and_write_any<Int8Rows>(a, team); }
PHL_OP(rope_write_kv_int8, RopeWriteKvArgs, "pppppppppp iiiiiiii iiiiiii d");

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
