// One linear layer over a panel of rows: where activations go, which blocks a thread takes, what happens to results.
#pragma once

#include "../each/norm_row.h"
#include "quantise.h"
#include "top.h"
#if PHL_LEVEL == 2 && !PHL_AMX
#include "bytes.h"
#endif

namespace phl {
namespace PHL_NS {
namespace {

// Forms of the activations that a layer's segments need; kExact: weights keep their form however many rows there are.
enum Kinds : int64_t { kInt8 = 1, kHalf = 2, kSingle = 4, kExact = 8 };

PHL_INLINE int64_t kind_of(int64_t layout) {
  return layout == kBF16 ? kHalf : is_dense(static_cast<int>(layout)) ? kSingle : kInt8;
}

// A row of activations in the workspace: int8 records, then bfloat16, then float32, those that are needed.
struct Rows {
  uint8_t* base;
  int64_t inputs;  // padded to a multiple of 64 (256 with super scales)
  int64_t kinds;
  bool many = false;   // more than kFewForBytes belong together, of which these may be a panel
  bool pairs = false;  // two chunks have one scale, and the first of them the `minus_zero` of both
  int64_t int8_bytes, half_bytes, single_bytes, row_bytes;

  Rows(uint8_t* base, int64_t inputs, int64_t kinds) : base(base), inputs(inputs), kinds(kinds) {
    // An odd number of lines per row: rows of a power of two would share their cache sets.
    int8_bytes = kinds & kInt8 ? ((inputs / kChunk) | 1) * 64 : 0;
    half_bytes = kinds & kHalf ? inputs * 2 + 64 : 0;
    single_bytes = kinds & kSingle ? inputs * 4 + 64 : 0;
    row_bytes = int8_bytes + half_bytes + single_bytes;
  }
  // Whether integer weights meet these rows as bytes (bytes.h).
  PHL_INLINE bool bytes() const { return PHL_LEVEL == 2 && !PHL_AMX && many && (kinds & kExact) == 0; }
  PHL_INLINE Activation* int8(int64_t row) const { return reinterpret_cast<Activation*>(base + row * row_bytes); }
  PHL_INLINE uint16_t* half(int64_t row) const {
    return reinterpret_cast<uint16_t*>(base + row * row_bytes + int8_bytes);
  }
  PHL_INLINE float* single(int64_t row) const {
    return reinterpret_cast<float*>(base + row * row_bytes + int8_bytes + half_bytes);
  }
};

// Whether rows that meet bytes are quantised in pairs of chunks: where every integer segment bears it (bytes.h).
PHL_INLINE bool in_pairs(const Segment* segments, int64_t count) {
#if PHL_LEVEL == 2 && !PHL_AMX
  bool all = true;
  for (int64_t i = 0; i < count; ++i) {
    if (is_dense(static_cast<int>(segments[i].layout))) continue;
    all &= with_quantised(static_cast<int>(segments[i].layout), [](auto l) { return kJoint<decltype(l)> == 2; });
  }
  return all;
#else
  return false;
#endif
}

// The input of a layer: x, or x + addend, or the RMS norm of either. `sum` receives x + addend, if there is an addend.
struct Input {
  const float *x, *addend, *norm;
  float* sum;
  int64_t n, x_stride, addend_stride, sum_stride;
  float eps;

  // 32 inputs from `at`, zero past the end; before the norm.
  PHL_INLINE const float* chunk(int64_t row, int64_t at, float* space) const {
    const float* p = x + row * x_stride + at;
    const int64_t count = n - at < kChunk ? n - at : kChunk;
    if (count == kChunk && addend == nullptr) return p;
    const float* q = addend == nullptr ? nullptr : addend + row * addend_stride + at;
    if (count == kChunk) {
      Vec::storef(space, Vec::add(Vec::loadf(p), Vec::loadf(q)));
      Vec::storef(space + 16, Vec::add(Vec::loadf(p + 16), Vec::loadf(q + 16)));
      return space;
    }
    for (int i = 0; i < kChunk; ++i) space[i] = i < count ? (q == nullptr ? p[i] : p[i] + q[i]) : 0.0f;
    return space;
  }

  // 1 / root mean square of a row. Also writes the sum.
  PHL_INLINE float inverse_rms(int64_t row, bool write_sum) const {
    const float* p = x + row * x_stride;
    if (addend == nullptr) return row_scale<false>(p, nullptr, nullptr, n, eps);
    float* total = write_sum && sum != nullptr ? sum + row * sum_stride : nullptr;
    return row_scale<true>(p, addend + row * addend_stride, total, n, eps);
  }
};

constexpr int kStep = 4 * kChunk;

// Up to four chunks of a row from `at`, after the sum and the norm: x itself, or `space`.
PHL_INLINE const float* input_step(const Input& in, int64_t row, int64_t at, int chunks, float inverse, float* space) {
  if (in.norm == nullptr && in.addend == nullptr && at + chunks * kChunk <= in.n) return in.x + row * in.x_stride + at;
  const F scale = Vec::set(inverse);
  float raw[kChunk], tail[kChunk];
  for (int c = 0; c < chunks; ++c, at += kChunk) {
    float* to = space + c * kChunk;
    const float* v = in.chunk(row, at, raw);
    if (in.norm == nullptr) {
      std::memcpy(to, v, sizeof(float) * kChunk);
      continue;
    }
    const float* w = in.norm + at;
    if (in.n - at < kChunk) {
      for (int i = 0; i < kChunk; ++i) tail[i] = at + i < in.n ? w[i] : 0.0f;
      w = tail;
    }
    Vec::storef(to, Vec::mul(Vec::mul(Vec::loadf(v), scale), Vec::loadf(w)));
    Vec::storef(to + 16, Vec::mul(Vec::mul(Vec::loadf(v + 16), scale), Vec::loadf(w + 16)));
  }
  return space;
}

#if PHL_LEVEL == 2
// Four whole chunks of a row from `at`, in registers. `q`: an addend, or null.
PHL_INLINE void input_four(const float* p, const float* q, const float* norm, int64_t at, F scale, F (&v)[8]) {
  for (int i = 0; i < 8; ++i) v[i] = Vec::loadf(p + at + 16 * i);
  if (q != nullptr) {
    for (int i = 0; i < 8; ++i) v[i] = Vec::add(v[i], Vec::loadf(q + at + 16 * i));
  }
  if (norm != nullptr) {
    for (int i = 0; i < 8; ++i) v[i] = Vec::mul(Vec::mul(v[i], scale), Vec::loadf(norm + at + 16 * i));
  }
}
#endif

[[maybe_unused]] PHL_APART void prepare_row(const Input& in, int64_t row, const Rows& rows, int64_t to, bool write_sum) {
  const float inverse = in.norm != nullptr || in.sum != nullptr ? in.inverse_rms(row, write_sum) : 0.0f;
  int64_t at = 0;
#if PHL_LEVEL == 2
  if ((rows.kinds & (kHalf | kSingle)) == 0) {
    const bool summed = in.addend != nullptr && in.sum != nullptr && write_sum;
    const float* p = summed ? in.sum + row * in.sum_stride : in.x + row * in.x_stride;
    const float* q = summed || in.addend == nullptr ? nullptr : in.addend + row * in.addend_stride;
    Activation* a = rows.int8(to);
    for (; at + kStep <= in.n; at += kStep, a += 4) {
      F v[8];
      input_four(p, q, in.norm, at, Vec::set(inverse), v);
      rows.pairs ? quantise_two_pairs(v, a) : quantise_four(v, a);
    }
  }
#endif
  alignas(64) float space[kStep];
  for (; at < rows.inputs; at += kStep) {
    const int chunks = rows.inputs - at >= kStep ? 4 : static_cast<int>((rows.inputs - at) / kChunk);
    const float* v = input_step(in, row, at, chunks, inverse, space);
    if (rows.kinds & kInt8) quantise_chunks(v, rows.int8(to) + at / kChunk, chunks, rows.pairs ? 2 : 1);
    if (rows.kinds & kHalf) {
      for (int i = 0; i < chunks * kChunk; i += kBlock) Vec::to_bf16(v + i, rows.half(to) + at + i);
    }
    if (rows.kinds & kSingle) std::memcpy(rows.single(to) + at, v, sizeof(float) * chunks * kChunk);
  }
}

// ---- results -------------------------------------------------------------------------------------------------------

enum Epilogue : int64_t { kStore = 0, kSiluMul = 1, kGeluMul = 2, kBest = 3, kAddScaled = 4, kTop = 5 };

struct Output {
  float* out;
  const float* bias;
  const float* residual;
  int64_t out_stride, residual_stride, epilogue;
  float* best;          // [rows][16], kBest
  int32_t* best_index;  // [rows][16]
  // kAddScaled: scale[row] times the result is added to row target[row] of `out`.
  const int32_t* target = nullptr;
  const float* scale = nullptr;
  const TopRows* top = nullptr;  // kTop

  PHL_INLINE F biased(const float* y, int64_t column, int64_t valid) const {
    const F v = Vec::loadf(y);
    if (bias == nullptr) return v;
    if (valid == kBlock) return Vec::add(v, Vec::loadf(bias + column));
    float space[kBlock] = {};
    for (int64_t i = 0; i < valid; ++i) space[i] = bias[column + i];
    return Vec::add(v, Vec::loadf(space));
  }

  PHL_INLINE void store(int64_t row, int64_t column, int64_t valid, F v) const {
    float* to = out + row * out_stride + column;
    const float* add = residual == nullptr ? nullptr : residual + row * residual_stride + column;
    if (valid == kBlock) {
      Vec::storef(to, add == nullptr ? v : Vec::add(v, Vec::loadf(add)));
      return;
    }
    float space[kBlock];
    Vec::storef(space, v);
    for (int64_t i = 0; i < valid; ++i) to[i] = add == nullptr ? space[i] : space[i] + add[i];
  }

  PHL_INLINE void add_scaled(int64_t row, int64_t column, int64_t valid, F v) const {
    float* to = out + target[row] * out_stride + column;
    const F factor = Vec::set(scale[row]);
    if (valid == kBlock) {
      Vec::storef(to, Vec::fma(v, factor, Vec::loadf(to)));
      return;
    }
    float space[kBlock] = {};
    for (int64_t i = 0; i < valid; ++i) space[i] = to[i];
    Vec::storef(space, Vec::fma(v, factor, Vec::loadf(space)));
    for (int64_t i = 0; i < valid; ++i) to[i] = space[i];
  }

  PHL_INLINE void keep(int64_t row, int64_t column, int64_t valid, F v) const {
    if (valid < kBlock) {
      float space[kBlock];
      Vec::storef(space, v);
      for (int64_t i = valid; i < kBlock; ++i) space[i] = -__builtin_inff();
      v = Vec::loadf(space);
    }
    Vec::keep_best(best + row * kBlock, best_index + row * kBlock, v, static_cast<int32_t>(column));
  }

  // Whether a kernel may store a group of blocks straight to `out`: nothing to add, and their columns are neighbours.
  PHL_INLINE bool direct(const Segment& s, int64_t block, int blocks) const {
    return epilogue == kStore && bias == nullptr && residual == nullptr && (blocks == 1 || s.half == 0) &&
           s.valid(block + blocks - 1) == kBlock;
  }

  // `y` holds `count` rows of two blocks, 32 floats a row.
  PHL_INLINE void finish(const Segment& s, int64_t block, int blocks, int64_t row, int64_t count,
                         const float* y) const {
    const int64_t columns[2] = {s.column(block), blocks > 1 ? s.column(block + 1) : 0};
    const int64_t valid[2] = {s.valid(block), blocks > 1 ? s.valid(block + 1) : 0};
    for (int64_t r = row; r < row + count; ++r, y += 2 * kBlock) {
      if (epilogue == kSiluMul || epilogue == kGeluMul) {
        const F gate = biased(y, columns[0], kBlock), up = biased(y + kBlock, columns[1], kBlock);
        store(r, columns[0], kBlock, Vec::mul(epilogue == kSiluMul ? silu(gate) : gelu_tanh(gate), up));
        continue;
      }
      for (int b = 0; b < blocks; ++b) {
        const F v = biased(y + b * kBlock, columns[b], valid[b]);
        if (epilogue == kBest) {
          keep(r, columns[b], valid[b], v);
        } else if (epilogue == kTop) {
          float space[kBlock];
          Vec::storef(space, v);
          top->take(r, columns[b], valid[b], space);
        } else if (epilogue == kAddScaled) {
          add_scaled(r, columns[b], valid[b], v);
        } else {
          store(r, columns[b], valid[b], v);
        }
      }
    }
  }
};

// ---- one pair of blocks over a panel -------------------------------------------------------------------------------

// f(Count<n>) for n in 1..Max.
template <int Max, class G>
PHL_INLINE void with_count(int64_t n, G&& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_count<Max - 1>(n, f);
  }
  f(Count<Max>{});
}

// Calls f(first, count) over `rows` in as equal parts as can be, of at most `most`; not at all over none.
template <class G>
PHL_INLINE void even_parts(int64_t rows, int64_t most, G&& f) {
  if (rows == 0) return;
  const int64_t parts = (rows + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = rows * i / parts;
    f(begin, rows * (i + 1) / parts - begin);
  }
}

constexpr int kBytesARow = 44;
// Up to so many rows, several passes over packed weights in the first-level cache beat unpacking; and making bytes.
// Bytes that are split take longer to unpack.
constexpr int64_t kFewRows = 4 * Vec::small_rows, kFewForBytes = 3 * Vec::small_rows, kFewOfSplit = 2 * Vec::small_rows;
static_assert(PHL_LEVEL != 2 || kFewForBytes == NextCache::kFewRows);

// Where a kernel puts `rows` from `row`: `out` itself, or `y`, to be finished.
struct Place {
  float* to;
  int64_t step;
  bool direct;

  Place(const Output& out, const Segment& s, int64_t block, int blocks, int64_t row, float* y)
      : direct(out.direct(s, block, blocks)) {
    to = direct ? out.out + row * out.out_stride + s.column(block) : y;
    step = direct ? out.out_stride : 2 * kBlock;
  }
};

template <class L>
void run_small(const Segment& s, int64_t block, int blocks, const Rows& rows, int64_t count, const Output& out,
               int64_t first_row) {
  alignas(64) float y[Vec::small_rows * 2 * kBlock];
  const int64_t units = (rows.inputs + L::unit_k - 1) / L::unit_k;
  const int64_t act_step = rows.row_bytes / 64;
  const int passes = static_cast<int>((count + Vec::small_rows - 1) / Vec::small_rows);
  // Where the first pass waits for memory, the later ones, whose block is in the first-level cache, fetch the next pair:
  // that is where a chunk has more bytes than its rows' work takes cycles, times four.
  const bool fetches = (L::unit_bytes + L::lower_bytes) / L::chunks > kBytesARow * (count / passes);
  Fetch fetch{blocks * units * L::unit_bytes, -64, 64 * (passes - 1)};
  even_parts(count, Vec::small_rows, [&](int64_t row, int64_t n_rows) {
    const Place place(out, s, block, blocks, first_row + row, y);
    for (int b = 0; b < blocks; ++b) {
      const uint8_t* w = s.data + (block + b) * units * L::unit_bytes;
      const uint8_t* lower = s.data + L::lower(s.blocks, block + b, units);
      with_count<Vec::small_rows>(n_rows, [&](auto n) {
        constexpr int R = decltype(n)::value;
        float* to = place.to + b * kBlock;
        if (R < Vec::small_rows / 2 || row == 0 || !fetches) {
          small_block<L, R, true>(w, lower, units, rows.int8(row), act_step, to, place.step, fetch);
        } else {
          small_block<L, R, false>(w, lower, units, rows.int8(row), act_step, to, place.step, fetch);
        }
      });
    }
    fetch.first += 64;
    if (!place.direct) out.finish(s, block, blocks, first_row + row, n_rows, y);
  });
}

template <class L, class Form>
void run_tile(const Segment& s, int64_t block, int blocks, const Rows& rows, int64_t count, const Output& out,
              int64_t first_row, uint8_t* tile) {
  constexpr int MaxR = L::wide ? Vec::wide_rows : Vec::tile_rows, MaxB = Vec::tile_blocks;
  alignas(64) float y[MaxR * 2 * kBlock];
  const int64_t units = (rows.inputs + L::unit_k - 1) / L::unit_k, chunks = units * L::chunks;
  const int64_t act_step = rows.row_bytes / 64;
  const int64_t tile_step = Form::tile_bytes(chunks) + 64;
  for (int b = 0; b < blocks; ++b) {
    Form::unpack(s.data + (block + b) * units * L::unit_bytes, s.data + L::lower(s.blocks, block + b, units), units,
                 tile + b * tile_step);
  }
  NextCache& cache = next_cache();
  Lines wanted{};
  const auto run = [&](auto n, auto b, int64_t at, int64_t row, const Place& place) {
    Form::template multiply<decltype(n)::value, decltype(b)::value>(
        tile + at * tile_step, tile_step, chunks, rows.int8(row), act_step, place.to + at * kBlock, place.step, wanted);
  };
  // The next pair's bytes come from memory while this pair is computed.
  const uint8_t* next = s.data + (block + blocks) * units * L::unit_bytes;
  const uint8_t* const end = next + blocks * units * L::unit_bytes;
  [[maybe_unused]] const uint8_t* lower = s.data + L::lower(s.blocks, block + blocks, units);
  const int64_t lines = (end - next) / 64 * MaxR / count + 1;  // for each group of rows
  const auto pass = [&](auto n, int64_t row) {
    if constexpr (Form::fetches > 0) wanted = cache.take(Form::fetches * chunks);
    for (const uint8_t* stop = next + 64 * lines; next < stop; next += 64) __builtin_prefetch(next, 0, 2);
    if constexpr (L::split) {
      for (const uint8_t* stop = lower + 64 * lines; lower < stop; lower += 64) __builtin_prefetch(lower, 0, 2);
    }
    const Place place(out, s, block, blocks, first_row + row, y);
    if (MaxB == 2 && blocks == 2) {
      run(n, Count<MaxB>{}, 0, row, place);
    } else {
      for (int b = 0; b < blocks; ++b) run(n, Count<1>{}, b, row, place);
    }
    if (!place.direct) out.finish(s, block, blocks, first_row + row, decltype(n)::value, y);
  };
  int64_t row = 0;
  for (; row + MaxR <= count; row += MaxR) pass(Count<MaxR>{}, row);
  if (row < count) with_count<MaxR>(count - row, [&](auto n) { pass(n, row); });
}

// Dense weights are read as they are. Rows outside, blocks inside: a tile of activations stays in the first-level cache
// while a group of blocks, small enough for the second level, streams past it.
constexpr int64_t kDenseGroup = 320 << 10;

template <class D>
void run_dense(const Segment& s, int64_t first, int64_t last, const Rows& rows, int64_t count, const Output& out,
               int64_t first_row) {
  constexpr int MaxR = Vec::dense_rows, MaxB = Vec::dense_blocks;
  using X = typename D::X;
  alignas(64) float y[MaxR * 2 * kBlock];
  const int64_t steps = rows.inputs / D::step, block_bytes = steps * D::bytes;
  const int64_t x_step = rows.row_bytes / static_cast<int64_t>(sizeof(X));
  const int64_t group = kDenseGroup / (2 * block_bytes) > 1 ? kDenseGroup / (2 * block_bytes) * 2 : 2;
  for (int64_t begin = first; begin < last; begin += group) {
    const int64_t end = begin + group < last ? begin + group : last;
    even_parts(count, MaxR, [&](int64_t row, int64_t n_rows) {
      const X* x;
      if constexpr (sizeof(X) == 2) {
        x = rows.half(row);
      } else {
        x = rows.single(row);
      }
      for (int64_t block = begin; block < end; block += 2) {
        const int blocks = end - block > 1 ? 2 : 1;
        const uint8_t* w = s.data + block * block_bytes;
        const Place place(out, s, block, blocks, first_row + row, y);
        with_count<MaxR>(n_rows, [&](auto n) {
          constexpr int R = decltype(n)::value;
          if (MaxB == 2 && blocks == 2) {
            dense_kernel<D, R, MaxB>(w, block_bytes, steps, x, x_step, place.to, place.step);
          } else {
            for (int b = 0; b < blocks; ++b) {
              dense_kernel<D, R, 1>(w + b * block_bytes, block_bytes, steps, x, x_step, place.to + b * kBlock,
                                    place.step);
            }
          }
        });
        if (!place.direct) out.finish(s, block, blocks, first_row + row, n_rows, y);
      }
    });
  }
}

#if PHL_I8MM
}  // namespace
}  // namespace PHL_NS
}  // namespace phl
#include "pairs.h"
namespace phl {
namespace PHL_NS {
namespace {
#endif

#if PHL_AMX
}  // namespace
}  // namespace PHL_NS
}  // namespace phl
#include "amx.h"
namespace phl {
namespace PHL_NS {
namespace {
#endif

// Rows [0, count) of `rows` times blocks [first, last) of a segment, two at a time; results are those of rows first_row
// and on.
PHL_INLINE void run_blocks(const Segment& s, int64_t first, int64_t last, const Rows& rows, int64_t count,
                           const Output& out, int64_t first_row, uint8_t* tile) {
#if PHL_AMX
  if (amx_blocks(s, first, last, rows, count, out, first_row, tile)) return;
#endif
  switch (s.layout) {
    case kBF16: return run_dense<DenseBF16>(s, first, last, rows, count, out, first_row);
    case kF16: return run_dense<DenseF16>(s, first, last, rows, count, out, first_row);
    case kF32: return run_dense<DenseF32>(s, first, last, rows, count, out, first_row);
    default: break;
  }
  with_quantised(static_cast<int>(s.layout), [&](auto l) {
    using L = decltype(l);
    for (int64_t block = first; block < last; block += 2) {
      const int blocks = last - block > 1 ? 2 : 1;
#if PHL_LEVEL == 2 && !PHL_AMX
      if constexpr (L::bits != 8) {  // those are bytes, with a scale per 32
        if (rows.bytes()) {
          const auto run = rows.pairs ? run_tile<L, AsBytes<L, kJoint<L>>> : run_tile<L, AsBytes<L, 1>>;
          run(s, block, blocks, rows, count, out, first_row, tile);
          continue;
        }
      }
#endif
      if (count <= (L::split ? kFewOfSplit : kFewRows)) {
        run_small<L>(s, block, blocks, rows, count, out, first_row);
      } else {
#if PHL_I8MM
        run_tile<L, AsPairs<L>>(s, block, blocks, rows, count, out, first_row, tile);
#else
        run_tile<L, AsPacked<L>>(s, block, blocks, rows, count, out, first_row, tile);
#endif
      }
    }
  });
}

// f(segment, first, last) for this thread's blocks, whole pairs: a contiguous part of all segments' bytes.
template <class G>
PHL_INLINE void own_blocks(const Segment* segments, int64_t count, int thread, int size, G&& f) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += (segments[i].blocks + 1) / 2 * unit_size(segments[i].layout) * 256 /
                                              unit_inputs(segments[i].layout);
  const int64_t low = total * thread / size, high = total * (thread + 1) / size;
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    const int64_t pairs = (s.blocks + 1) / 2, cost = unit_size(s.layout) * 256 / unit_inputs(s.layout);
    const auto from = [&](int64_t bound) {
      const int64_t p = bound <= at ? 0 : (bound - at + cost - 1) / cost;
      return p < pairs ? p : pairs;
    };
    const int64_t first = 2 * from(low), last = 2 * from(high);
    if (first < last) f(s, first, last < s.blocks ? last : s.blocks);
    at += pairs * cost;
  }
}

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
