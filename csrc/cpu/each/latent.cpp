// Latent attention (DeepSeek-V2, 2024) over a bfloat16 cache, in its absorbed form: a head's query goes through the
// matrix of its keys once, so that all heads attend to the latents as they lie; its values come out of the sum of latents.
//
// A row's cached tokens are cut at the same places whatever the step is, and a head knows nothing of the others: a token's
// bits depend neither on what else is in the step nor on the threads.
// Legend: T tokens, H heads, L latent, P rotated part, C = L + P, N and D a head's key (but for that part) and value.
#include "../op.h"
#include "../simd.h"

namespace phl {
namespace PHL_NS {
namespace {

constexpr int64_t kLatentSplit = 1024;  // cached tokens of a split, or a multiple
constexpr int64_t kLatentTokens = 32;   // tokens of a step that are in hand at a time
constexpr int64_t kHeads = 4;           // that share a look at the cache
constexpr int64_t kChunk = 64;          // cached tokens between two looks at the largest score
PHL_CONSTANT(latent, kLatentSplit);
PHL_CONSTANT(latent, kLatentTokens);

struct WriteLatentArgs {
  const float* x;  // [tokens, width]
  uint16_t* cache;
  const int32_t* slots;
  int64_t tokens, width, page_size, x_stride, page_stride;
};

void write_latent(const WriteLatentArgs& a, Team& team) {
  team.split(a.tokens, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = a.slots[t];
      const float* x = a.x + t * a.x_stride;
      uint16_t* to = a.cache + slot / a.page_size * a.page_stride + slot % a.page_size * a.width;
      int64_t i = 0;
      for (; i + W <= a.width; i += W) store_bf16(to + i, load(x + i));
      for (; i < a.width; ++i) to[i] = float_to_bf16(x[i]);
    }
  });
}
PHL_FIELDS(WriteLatentArgs, x, cache, slots, tokens, width, page_size, x_stride, page_stride);
PHL_OP(write_latent, WriteLatentArgs);

struct LatentArgs {
  const float *q_nope, *q_rope;  // [T, H, N], [T, H, P]
  const float* up;               // [H, N + D, L]: keys, then values of each head
  const uint16_t* up_bf16;       // the same where they are kept so; null: `up` has them
  const uint16_t* cache;         // [pages, S, C]
  float* out;                    // [T, H, D] contiguous
  const int32_t *query_start, *seq_lens, *page_table;
  const int32_t* chosen;  // [T, count] ascending, those behind the last beyond any text; null: all up to a token's own
  float *queries, *partial;  // [kLatentTokens, H, C], [kLatentTokens, H, splits, L + 2]
  int64_t tokens, rows, heads, rank, rope, nope, value, page_size, page_stride, pages_per_row;
  int64_t nope_token, nope_head, rope_token, rope_head, splits, count;
  int64_t most;  // rows of more tokens than this are left out
  double scale;
};

// A token's row, and how many cached tokens it sees; none: it is left out.
struct Sight {
  int64_t row, seen;
};

Sight sight_of(const LatentArgs& a, int64_t token) {
  int64_t low = 0, high = a.rows;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.query_start[middle] <= token ? low : high) = middle;
  }
  const int64_t first = a.query_start[low], end = a.query_start[low + 1];
  if (token < first || token >= end || end - first > a.most) return {low, 0};
  const int64_t position = a.seq_lens[low] - (end - token);
  if (a.chosen == nullptr) return {low, position + 1};
  const int32_t* chosen = a.chosen + token * a.count;
  int64_t seen = 0;
  while (seen < a.count && chosen[seen] <= position) ++seen;
  return {low, seen};
}

int64_t part_of(const LatentArgs& a, int64_t seen) {
  const int64_t most = kLatentSplit * a.splits;
  return kLatentSplit * ((seen + most - 1) / most);
}

PHL_INLINE vf some(const float* p, int64_t n) { return n >= W ? load(p) : load_n(p, n); }
PHL_INLINE void put(float* p, vf v, int64_t n) {
  if (n >= W) store(p, v);
  else store_n(p, v, n);
}
PHL_INLINE vf some_bf16(const uint16_t* p, int64_t n) {
  if (n >= W) return load_bf16(p);
  float rest[W] = {};
  for (int64_t i = 0; i < n; ++i) rest[i] = bf16_to_float(p[i]);
  return load(rest);
}

PHL_INLINE vf row_part(const float* p, int64_t n) { return some(p, n); }
PHL_INLINE vf row_part(const uint16_t* p, int64_t n) { return some_bf16(p, n); }

// The query of one head as latents see it, times the scale in base 2, and its rotated part. Rows of the matrix are read
// from end to end, some at a time: it is larger than any cache, and each step reads it once.
template <class U>
void absorb(const LatentArgs& a, const U* whole, int64_t token, int64_t head, float* query) {
  const float factor = float(a.scale * 1.44269504088896341);
  const U* up = whole + head * (a.nope + a.value) * a.rank;
  const float* q = a.q_nope + token * a.nope_token + head * a.nope_head;
  constexpr int64_t kRows = 4;
  for (int64_t i = 0; i < a.rank; ++i) query[i] = 0.0f;
  for (int64_t n = 0; n < a.nope; n += kRows) {
    const U* rows[kRows];
    float by[kRows];
    for (int64_t j = 0; j < kRows; ++j) {
      rows[j] = up + (n + j < a.nope ? n + j : n) * a.rank;
      by[j] = n + j < a.nope ? q[n + j] * factor : 0.0f;
    }
    int64_t i = 0;
    for (; i + W <= a.rank; i += W) {
      vf total = load(query + i);
      for (int64_t j = 0; j < kRows; ++j) total += row_part(rows[j] + i, W) * by[j];
      store(query + i, total);
    }
    if (i < a.rank) {
      vf total = load_n(query + i, a.rank - i);
      for (int64_t j = 0; j < kRows; ++j) total += row_part(rows[j] + i, a.rank - i) * by[j];
      store_n(query + i, total, a.rank - i);
    }
  }
  const float* turned = a.q_rope + token * a.rope_token + head * a.rope_head;
  for (int64_t i = 0; i < a.rope; ++i) query[a.rank + i] = turned[i] * factor;
}

// Up to kHeads heads of one token over one split: sums of latents by weight, the largest score and the sum of weights.
void attend(const LatentArgs& a, int64_t token, int64_t head, int64_t split, Sight sight, float* const* sums) {
  const int64_t width = a.rank + a.rope, place = token % kLatentTokens, part = part_of(a, sight.seen);
  const int64_t begin = split * part, end = begin + part < sight.seen ? begin + part : sight.seen;
  const int64_t heads = a.heads - head < kHeads ? a.heads - head : kHeads;
  const int32_t *pages = a.page_table + sight.row * a.pages_per_row, *chosen = nullptr;
  if (a.chosen != nullptr) chosen = a.chosen + token * a.count;
  const float* queries[kHeads];
  float top[kHeads], total[kHeads];
  for (int64_t h = 0; h < kHeads; ++h) {
    queries[h] = a.queries + (place * a.heads + head + (h < heads ? h : 0)) * width;
    top[h] = -1e30f, total[h] = 0.0f;
    for (int64_t i = 0; h < heads && i < a.rank; ++i) sums[h][i] = 0.0f;
  }
  const uint16_t* at[kChunk];
  float scores[kHeads][kChunk];
  for (int64_t from = begin; from < end; from += kChunk) {
    const int64_t count = end - from < kChunk ? end - from : kChunk;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = chosen == nullptr ? from + i : chosen[from + i];
      at[i] = a.cache + pages[position / a.page_size] * a.page_stride + position % a.page_size * width;
      vf dots[kHeads] = {};
      int64_t c = 0;
      for (; c + W <= width; c += W) {
        const vf key = load_bf16(at[i] + c);
        for (int64_t h = 0; h < kHeads; ++h) dots[h] += load(queries[h] + c) * key;
      }
      if (c < width) {
        const vf key = some_bf16(at[i] + c, width - c);
        for (int64_t h = 0; h < kHeads; ++h) dots[h] += load_n(queries[h] + c, width - c) * key;
      }
      for (int64_t h = 0; h < kHeads; ++h) scores[h][i] = sum(dots[h]);
    }
    float shrink[kHeads];
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t i = count; i % W != 0; ++i) scores[h][i] = -1e30f;
      float best = top[h];
      for (int64_t i = 0; i < count; ++i) best = scores[h][i] < best ? best : scores[h][i];
      shrink[h] = exp2<6>(splat(top[h] - best))[0];
      vf added{};
      for (int64_t i = 0; i < count; i += W) {
        const vf weight = exp2<6>(load(scores[h] + i) - best);
        store(scores[h] + i, weight);
        added += weight;
      }
      total[h] = total[h] * shrink[h] + sum(added);
      top[h] = best;
    }
    for (int64_t i = 0; i < a.rank; i += W) {
      vf values[kHeads] = {};
      const int64_t left = a.rank - i;
      for (int64_t h = 0; h < heads; ++h) values[h] = some(sums[h] + i, left) * shrink[h];
      for (int64_t j = 0; j < count; ++j) {
        const vf value = some_bf16(at[j] + i, left);
        for (int64_t h = 0; h < kHeads; ++h) values[h] += value * scores[h][j];
      }
      for (int64_t h = 0; h < heads; ++h) put(sums[h] + i, values[h], left);
    }
  }
  for (int64_t h = 0; h < heads; ++h) sums[h][a.rank] = top[h], sums[h][a.rank + 1] = total[h];
}

// The splits of a head put together in the first of them, and the head's values of it.
template <class U>
void finish(const LatentArgs& a, const U* whole, int64_t token, int64_t head, Sight sight, float* sums) {
  const int64_t part = part_of(a, sight.seen), splits = (sight.seen + part - 1) / part;
  float top = sums[a.rank], total = sums[a.rank + 1];
  for (int64_t split = 1; split < splits; ++split) {
    const float *other = sums + split * (a.rank + 2), found = other[a.rank];
    const float best = found < top ? top : found;
    const float mine = exp2<6>(splat(top - best))[0], its = exp2<6>(splat(found - best))[0];
    for (int64_t i = 0; i < a.rank; ++i) sums[i] = sums[i] * mine + other[i] * its;
    total = total * mine + other[a.rank + 1] * its, top = best;
  }
  const float factor = 1.0f / total;
  const U* up = whole + (head * (a.nope + a.value) + a.nope) * a.rank;
  float* out = a.out + (token * a.heads + head) * a.value;
  for (int64_t d = 0; d < a.value; d += 4) {
    vf dots[4] = {};
    const int64_t many = a.value - d < 4 ? a.value - d : 4;
    for (int64_t i = 0; i < a.rank; i += W) {
      const vf value = some(sums + i, a.rank - i);
      for (int64_t j = 0; j < many; ++j) dots[j] += row_part(up + (d + j) * a.rank + i, a.rank - i) * value;
    }
    for (int64_t j = 0; j < many; ++j) out[d + j] = sum(dots[j]) * factor;
  }
}

template <class U>
void attend_all(const LatentArgs& a, const U* up, Team& team) {
  const int64_t width = a.rank + a.rope, groups = (a.heads + kHeads - 1) / kHeads;
  const auto sums_of = [&](int64_t token, int64_t head, int64_t split) {
    return a.partial + ((token % kLatentTokens * a.heads + head) * a.splits + split) * (a.rank + 2);
  };
  for (int64_t first = 0; first < a.tokens; first += kLatentTokens) {
    const int64_t tokens = a.tokens - first < kLatentTokens ? a.tokens - first : kLatentTokens;
    // By head, whose matrix then serves all tokens.
    team.split(a.heads * tokens, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / tokens, token = first + i % tokens;
        if (sight_of(a, token).seen > 0) absorb(a, up, token, head, a.queries + (token % kLatentTokens * a.heads + head) * width);
      }
    });
    team.barrier();
    team.tasks(tokens * groups * a.splits, [&](int64_t task) {
      const int64_t split = task % a.splits, head = task / a.splits % groups * kHeads, token = first + task / a.splits / groups;
      const Sight sight = sight_of(a, token);
      if (sight.seen == 0 || split * part_of(a, sight.seen) >= sight.seen) return;
      float* sums[kHeads];
      for (int64_t h = 0; h < kHeads; ++h) sums[h] = sums_of(token, head + h < a.heads ? head + h : head, split);
      attend(a, token, head, split, sight, sums);
    });
    team.barrier();
    team.split(a.heads * tokens, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / tokens, token = first + i % tokens;
        const Sight sight = sight_of(a, token);
        if (sight.seen > 0) finish(a, up, token, head, sight, sums_of(token, head, 0));
      }
    });
    if (first + kLatentTokens < a.tokens) team.barrier();
  }
}

void latent_attention(const LatentArgs& a, Team& team) {
  if (a.up_bf16 != nullptr) attend_all(a, a.up_bf16, team);
  else attend_all(a, a.up, team);
}
PHL_FIELDS(LatentArgs, q_nope, q_rope, up, up_bf16, cache, out, query_start, seq_lens, page_table, chosen, queries, partial, tokens,
           rows, heads, rank, rope, nope, value, page_size, page_stride, pages_per_row, nope_token, nope_head, rope_token,
           rope_head, splits, count, most, scale);
PHL_OP(latent_attention, LatentArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
