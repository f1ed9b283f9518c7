// Rotary position embedding (Su et al. 2021) in place, the writing of new tokens' K and V into the paged cache, and both
// in one op with the heads' norms before them.
// Caches are [pages, K, S, D] bfloat16 or float32, or [pages, K, S, D + 4] int8, laid out as int8_page.h says.
#include "../int8_page.h"
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
PHL_FIELDS(RopeArgs, q, k, positions, cos_sin, position64, tokens, heads, kv_heads, half, interleaved, q_token,
           q_head, k_token, k_head);
PHL_OP(rope, RopeArgs);

struct WriteKvArgs {
  const float *k, *v;      // [T, K, D]
  void *k_cache, *v_cache;
  const int32_t* slots;    // [T] page * S + offset
  int64_t tokens, kv_heads, head_size, page_size;
  int64_t k_token, k_head, v_token, v_head;  // strides of k and v
  int64_t page_stride;                       // elements between pages of a cache
};

PHL_INLINE void store_row(uint16_t* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store_bf16(to + i, load(from + i));
  for (; i < n; ++i) to[i] = float_to_bf16(from[i]);
}
PHL_INLINE void store_row(float* to, const float* from, int64_t n) { __builtin_memcpy(to, from, size_t(n) * sizeof(float)); }

// scale = max |x| / 127; a row of zeros has scale 0. A NaN is the maximum, so that it is not lost.
PHL_INLINE float int8_scale(const float* from, int64_t n) {
  vi top{};
  for (int64_t i = 0; i < n; i += W) {
    const vi bits = (vi)load_n(from + i, n - i < W ? n - i : W) & 0x7FFFFFFF;
    top = bits > top ? bits : top;
  }
  int32_t most = 0;
  for (int i = 0; i < W; ++i) most = top[i] > most ? top[i] : most;
  return __builtin_bit_cast(float, most) / 127.0f;
}

// Values as integers.
PHL_INLINE void int8_values(const float* from, int64_t n, float inverse, int8_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    // Adding 1.5 * 2^23 rounds to nearest even; the product is at most 127 plus a rounding error.
    to[i] = int8_t(__builtin_bit_cast(int32_t, from[i] * inverse + 12582912.0f) - 0x4B400000);
  }
}

// The types of cache: the size of a row of n values, how a token's key and value are stored at `slot` of a page (of one
// head), and which lines that touches.
template <class V>
struct PlainRows {
  using Value = V;
  static int64_t width(int64_t n) { return n; }
  PHL_INLINE static void key(Value* page, int64_t, int64_t slot, const float* from, int64_t n) {
    store_row(page + slot * n, from, n);
  }
  PHL_INLINE static void value(Value* page, int64_t, int64_t slot, const float* from, int64_t n) {
    store_row(page + slot * n, from, n);
  }
  PHL_INLINE static void fetch(const Value* page, int64_t, int64_t slot, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(V))) __builtin_prefetch(page + slot * n + i, 1);
  }
};
using Bf16Rows = PlainRows<uint16_t>;
using FloatRows = PlainRows<float>;
struct Int8Rows {
  using Value = int8_t;
  static constexpr int64_t kStep = 32;
  static int64_t width(int64_t n) { return n + 4; }
  // put(d, values, count) for the integers of a row, kStep at a time; then the scale.
  template <class Put>
  PHL_INLINE static void store(const Int8Slot& to, const float* from, int64_t n, Put&& put) {
    const float scale = int8_scale(from, n), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    int8_t row[kStep] = {};
    for (int64_t d = 0; d < n; d += kStep) {
      const int64_t count = n - d < kStep ? n - d : kStep;
      int8_values(from + d, count, inverse, row);
      put(d, row, count);
    }
    __builtin_memcpy(to.scale(n), &scale, 4);
  }
  PHL_INLINE static void key(Value* page, int64_t page_size, int64_t slot, const float* from, int64_t n) {
    const Int8Slot to(page, page_size, n, slot);
    store(to, from, n, [&](int64_t d, int8_t* row, int64_t count) {
      for (int i = 0; i < kStep; ++i) row[i] = int8_t(row[i] ^ 0x80);  // + 128
      for (int64_t i = 0; i < count; i += 4) __builtin_memcpy(to.key(d + i), row + i, 4);
    });
  }
  PHL_INLINE static void value(Value* page, int64_t page_size, int64_t slot, const float* from, int64_t n) {
    const Int8Slot to(page, page_size, n, slot);
    store(to, from, n, [&](int64_t d, const int8_t* row, int64_t count) {
      // Single bytes: another thread may be writing the other tokens of the four.
      for (int64_t i = 0; i < count; ++i) *to.value(d + i, n) = row[i];
    });
  }
  PHL_INLINE static void fetch(const Value* page, int64_t page_size, int64_t slot, int64_t n) {
    const int64_t tokens = block_tokens(page_size);
    const Value* block = page + slot / tokens * tokens * (n + 4);
    for (int64_t i = 0; i < tokens * (n + 4); i += 64) __builtin_prefetch(block + i, 1);
  }
};

template <class Rows>
PHL_INLINE void write_tokens(const WriteKvArgs& a, Team& team) {
  using Value = typename Rows::Value;
  const int64_t per_token = a.kv_heads * a.head_size * 2;
  team.split(a.tokens, (kGrain + per_token - 1) / per_token, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t page = a.slots[token] / a.page_size, offset = a.slots[token] % a.page_size;
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        const int64_t at = page * a.page_stride + head * a.page_size * Rows::width(a.head_size);
        const float *k = a.k + token * a.k_token + head * a.k_head, *v = a.v + token * a.v_token + head * a.v_head;
        Rows::key(static_cast<Value*>(a.k_cache) + at, a.page_size, offset, k, a.head_size);
        Rows::value(static_cast<Value*>(a.v_cache) + at, a.page_size, offset, v, a.head_size);
      }
    }
  });
}

void write_kv_bf16(const WriteKvArgs& a, Team& team) { write_tokens<Bf16Rows>(a, team); }
PHL_FIELDS(WriteKvArgs, k, v, k_cache, v_cache, slots, tokens, kv_heads, head_size, page_size, k_token, k_head,
           v_token, v_head, page_stride);
PHL_OP(write_kv_bf16, WriteKvArgs);

void write_kv_f32(const WriteKvArgs& a, Team& team) { write_tokens<FloatRows>(a, team); }
PHL_OP(write_kv_f32, WriteKvArgs);

void write_kv_int8(const WriteKvArgs& a, Team& team) { write_tokens<Int8Rows>(a, team); }
PHL_OP(write_kv_int8, WriteKvArgs);

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

// `a` is a copy: its fields stay in registers, whatever the stores might point to.
template <class Rows, bool kNorm, bool kInterleaved>
PHL_INLINE void rope_and_write(const RopeWriteKvArgs a, Team& team) {
  using Value = typename Rows::Value;
  const int64_t size = a.head_size, half = a.half, width = Rows::width(size);
  const int64_t per_token = (a.heads + 3 * a.kv_heads) * size;
  const float eps = float(a.eps);
  team.split(a.tokens, (kGrain + per_token - 1) / per_token, [=](int64_t begin, int64_t end) {
    // A token's rows in the caches are cold, so they are fetched one token ahead.
    const int64_t page_bytes = a.page_size * width;
    const auto place = [=](int64_t token) { return a.slots[token] / a.page_size * a.page_stride; };
    const auto fetch = [=](int64_t token) {
      int64_t at = place(token);
      for (int64_t head = 0; head < a.kv_heads; ++head, at += page_bytes) {
        Rows::fetch(static_cast<const Value*>(a.k_cache) + at, a.page_size, a.slots[token] % a.page_size, size);
        Rows::fetch(static_cast<const Value*>(a.v_cache) + at, a.page_size, a.slots[token] % a.page_size, size);
      }
    };
    fetch(begin);
    for (int64_t token = begin; token < end; ++token) {
      if (token + 1 < end) fetch(token + 1);
      int64_t at = place(token);
      const int64_t slot = a.slots[token] % a.page_size;
      const float* cos = a.cos_sin + position_of(a.positions, a.position64, token) * 2 * half;
      float* q = a.q + token * a.q_token;
      for (int64_t head = 0; head < a.heads; ++head, q += a.q_head) {
        norm_and_turn<kNorm, kInterleaved>(q, a.q_norm, size, eps, cos, half);
      }
      float* k = a.k + token * a.k_token;
      const float* v = a.v + token * a.v_token;
      for (int64_t head = 0; head < a.kv_heads; ++head, k += a.k_head, v += a.v_head, at += page_bytes) {
        norm_and_turn<kNorm, kInterleaved>(k, a.k_norm, size, eps, cos, half);
        Rows::key(static_cast<Value*>(a.k_cache) + at, a.page_size, slot, k, size);
        Rows::value(static_cast<Value*>(a.v_cache) + at, a.page_size, slot, v, size);
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
PHL_FIELDS(RopeWriteKvArgs, q, k, v, positions, cos_sin, q_norm, k_norm, k_cache, v_cache, slots, position64, tokens,
           heads, kv_heads, head_size, half, interleaved, page_size, q_token, q_head, k_token, k_head, v_token,
           v_head, page_stride, eps);
PHL_OP(rope_write_kv_bf16, RopeWriteKvArgs);

void rope_write_kv_f32(const RopeWriteKvArgs& a, Team& team) { rope_and_write_any<FloatRows>(a, team); }
PHL_OP(rope_write_kv_f32, RopeWriteKvArgs);

void rope_write_kv_int8(const RopeWriteKvArgs& a, Team& team) { rope_and_write_any<Int8Rows>(a, team); }
PHL_OP(rope_write_kv_int8, RopeWriteKvArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
