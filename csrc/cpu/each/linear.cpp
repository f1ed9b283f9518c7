// Linear layers over packed weights: y = x W^T, with RMS norm before and activation, residual or arg-max after.
#include "../linear/screen.h"
#include "../op.h"

namespace phl {
namespace PHL_NS {
namespace {

struct LinearArgs {
  const float *x, *addend, *norm;  // input: norm(x + addend); null: absent
  float* sum;                      // x + addend, or null
  const Segment* segments;
  const float *bias, *residual;
  float* out;
  uint8_t* workspace;  // 64-byte aligned; see native_linear.py for its size
  int64_t rows, inputs, x_stride, addend_stride, sum_stride, out_stride, residual_stride;
  int64_t segment_count, kinds, padded_inputs, panel_rows, tile_bytes;
  int64_t alone;    // each thread prepares all rows for itself: cheaper than a barrier when they are few
  int64_t threads;  // that the workspace has room for; more of them wait
  int64_t epilogue;
  double eps;
};

PHL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Panels of rows, of one size: prepare (quantise), then multiply. Two panels alternate, so that one barrier a panel is
// enough.
// f(rows of the panel, first row, count) multiplies a thread's share.
template <class A, class G>
PHL_INLINE void over_panels(const A& a, int64_t segments, Team& team, const Input& in, uint8_t* space, G&& f) {
  Rows rows(space, a.padded_inputs, a.kinds);
  rows.many = a.rows > kFewForBytes;
  rows.pairs = rows.bytes() && in_pairs(a.segments, segments);
  if (a.alone) {
    rows.base += team.thread * a.rows * rows.row_bytes;
    if (team.thread < a.threads) {
      for (int64_t row = 0; row < a.rows; ++row) prepare_row(in, row, rows, row, team.thread == 0);
    }
    f(rows, 0, a.rows);
    return;
  }
  int64_t turn = 0;
  even_parts(a.rows, a.panel_rows, [&](int64_t first, int64_t count) {
    rows.base = space + turn * a.panel_rows * rows.row_bytes;
    turn ^= 1;
    team.split(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) prepare_row(in, first + row, rows, row, true);
    });
    team.barrier();
    f(rows, first, count);
  });
}

// Multiplies this thread's blocks; threads without workspace have none.
template <class A>
PHL_INLINE void multiply(const A& a, const Team& team, int size, const Rows& rows, int64_t count, const Output& out,
                         int64_t first) {
  if (team.thread >= size) return;
  uint8_t* tile = a.workspace + team.thread * a.tile_bytes;
  own_blocks(a.segments, a.segment_count, team.thread, size, [&](const Segment& s, int64_t begin, int64_t end) {
    run_blocks(s, begin, end, rows, count, out, first, tile);
  });
}

void linear(const LinearArgs& a, Team& team) {
  const int size = static_cast<int>(smaller(team.size, a.threads));
  const Input in{a.x, a.addend, a.norm, a.sum, a.inputs, a.x_stride, a.addend_stride, a.sum_stride, float(a.eps)};
  const Output out{a.out, a.bias, a.residual, a.out_stride, a.residual_stride, a.epilogue, nullptr, nullptr};
  over_panels(a, a.segment_count, team, in, a.workspace + size * a.tile_bytes, [&](const Rows& rows, int64_t first, int64_t count) {
    multiply(a, team, size, rows, count, out, first);
  });
}
PHL_FIELDS(LinearArgs, x, addend, norm, sum, segments, bias, residual, out, workspace, rows, inputs, x_stride,
           addend_stride, sum_stride, out_stride, residual_stride, segment_count, kinds, padded_inputs, panel_rows,
           tile_bytes, alone, threads, epilogue, eps);
PHL_OP(linear, LinearArgs);

// What the size of the workspace follows from: see native_linear.py.
constexpr int64_t kMostTileChunk = kTileChunk<Q2K>;  // of an unpacked block, per 32 inputs
static_assert(kMostTileChunk >= kTileChunk<Q3K> && kMostTileChunk >= kTileChunk<Q6K>);
static_assert(kMostTileChunk >= kTileChunk<Q4K> && kMostTileChunk >= kTileChunk<Q4M>);
constexpr int64_t kLine = sizeof(Activation);
PHL_CONSTANT(linear, kMostTileChunk);
PHL_CONSTANT(linear, kLine);
PHL_CONSTANT(linear, kInt8);
PHL_CONSTANT(linear, kHalf);
PHL_CONSTANT(linear, kSingle);
PHL_CONSTANT(linear, kExact);
PHL_CONSTANT(linear, kStore);
PHL_CONSTANT(linear, kSiluMul);
PHL_CONSTANT(linear, kGeluMul);
PHL_CONSTANT(linear, kScreenRows);
constexpr int64_t kTopColumns = kTopChunk * kBlock, kTopStateBytes = 4 * kTopState;
PHL_CONSTANT(linear, kTopColumns);
PHL_CONSTANT(linear, kTopStateBytes);

// The head with arg-max: the token of the largest logit (the first of equals), and that logit.
struct LinearArgmaxArgs {
  const float *x, *addend, *norm;
  float* sum;
  const Segment* segments;
  const float* bias;
  int32_t* token;
  float* logit;  // or null
  uint8_t* workspace;
  int64_t rows, inputs, x_stride, addend_stride, sum_stride;
  int64_t segment_count, kinds, padded_inputs, panel_rows, tile_bytes, best_bytes;
  int64_t alone, threads;
  double eps;
};

// Best of all threads and lanes for one row of a panel.
PHL_INLINE void best_of(const uint8_t* best, int64_t best_bytes, int64_t panel_rows, int threads, int64_t row,
                        int32_t* token, float* logit) {
  float value = -__builtin_inff();
  int32_t index = 0;
  for (int t = 0; t < threads; ++t) {
    const auto* values = reinterpret_cast<const float*>(best + t * best_bytes);
    const auto* indices = reinterpret_cast<const int32_t*>(values + panel_rows * kBlock);
    for (int64_t i = row * kBlock; i < (row + 1) * kBlock; ++i) {
      if (values[i] > value || (values[i] == value && indices[i] < index)) value = values[i], index = indices[i];
    }
  }
  *token = index;
  if (logit != nullptr) *logit = value;
}

void linear_argmax(const LinearArgmaxArgs& a, Team& team) {
  const int size = static_cast<int>(smaller(team.size, a.threads));
  uint8_t* best = a.workspace + size * a.tile_bytes;
  const Input in{a.x, a.addend, a.norm, a.sum, a.inputs, a.x_stride, a.addend_stride, a.sum_stride, float(a.eps)};
  auto* values = reinterpret_cast<float*>(best + team.thread * a.best_bytes);
  auto* indices = reinterpret_cast<int32_t*>(values + a.panel_rows * kBlock);
  const Output out{nullptr, a.bias, nullptr, 0, 0, kBest, values, indices};
  over_panels(a, a.segment_count, team, in, best + size * a.best_bytes, [&](const Rows& rows, int64_t first, int64_t count) {
    if (team.thread < size) {
      for (int64_t i = 0; i < count * kBlock; ++i) values[i] = -__builtin_inff(), indices[i] = INT32_MAX;
    }
    multiply(a, team, size, rows, count, out, 0);
    team.barrier();
    team.split(count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        best_of(best, a.best_bytes, a.panel_rows, size, r, a.token + first + r,
                a.logit == nullptr ? nullptr : a.logit + first + r);
      }
    });
    if (first + count < a.rows) team.barrier();
  });
}
PHL_FIELDS(LinearArgmaxArgs, x, addend, norm, sum, segments, bias, token, logit, workspace, rows, inputs, x_stride,
           addend_stride, sum_stride, segment_count, kinds, padded_inputs, panel_rows, tile_bytes, best_bytes, alone,
           threads, eps);
PHL_OP(linear_argmax, LinearArgmaxArgs);

// The same for a few rows of a large head of one segment, most of which a screen of four bits rules out.
struct LinearScreenedArgs {
  const float* x;
  const Segment* segments;
  const uint8_t* screen;  // by linear_screen; of a split head, its own data
  int32_t* token;
  uint8_t* workspace;
  int64_t rows, inputs, x_stride, kinds, padded_inputs, panel_rows, tile_bytes, best_bytes, alone, threads;
};

void linear_argmax_screened(const LinearScreenedArgs& a, Team& team) {
  const int size = static_cast<int>(smaller(team.size, a.threads));
  const Segment& s = a.segments[0];
  uint8_t* best = a.workspace + size * a.tile_bytes;
  const Screen screen{a.screen, reinterpret_cast<float*>(best + size * a.best_bytes), s.blocks,
                      s.layout == kQ8P};
  // Of each thread: the best logits by lane and their columns, the best of its first blocks, energies.
  const auto values_of = [&](int thread) { return reinterpret_cast<float*>(best + thread * a.best_bytes); };
  float* values = values_of(team.thread);
  auto* indices = reinterpret_cast<int32_t*>(values + a.panel_rows * kBlock);
  const int64_t sums = 2 * a.panel_rows * kBlock;
  const Output out{nullptr, nullptr, nullptr, 0, 0, kBest, values, indices};
  const Input in{a.x, nullptr, nullptr, nullptr, a.inputs, a.x_stride, 0, 0, 0.0f};
  uint8_t* space = best + size * a.best_bytes + (a.rows * s.blocks * 4 + 63) / 64 * 64;
  over_panels(a, 1, team, in, space, [&](const Rows& rows, int64_t, int64_t count) {
    const auto whole = [&](int64_t block) {
      run_blocks(s, block, block + 1, rows, count, out, 0, a.workspace + team.thread * a.tile_bytes);
    };
    const int64_t from = s.blocks * team.thread / size, to = s.blocks * (team.thread + 1) / size;
    if (team.thread < size) {
      for (int64_t i = 0; i < count * kBlock; ++i) values[i] = -__builtin_inff(), indices[i] = INT32_MAX;
      int64_t first[kScreenRows];
      if (from < to) screen.pass(from, to, rows, count, values + sums + kScreenRows, first);
      for (int64_t r = 0; from < to && r < count; ++r) whole(first[r]);
      for (int64_t r = 0; r < count; ++r) {
        float* top = values + sums + r;
        *top = -__builtin_inff();
        for (int i = 0; i < kBlock; ++i) *top = values[r * kBlock + i] > *top ? values[r * kBlock + i] : *top;
      }
    }
    team.barrier();
    if (team.thread < size) {
      float least[kScreenRows];
      for (int64_t r = 0; r < count; ++r) {
        least[r] = values_of(0)[sums + r];
        for (int t = 1; t < size; ++t) least[r] = values_of(t)[sums + r] > least[r] ? values_of(t)[sums + r] : least[r];
      }
      for (int64_t block = team.thread; block < s.blocks; block += size) {
        if (screen.keeps(block, count, least)) whole(block);
      }
    }
    team.barrier();
    team.split(count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        best_of(best, a.best_bytes, a.panel_rows, size, r, a.token + r, nullptr);
      }
    });
  });
}
PHL_FIELDS(LinearScreenedArgs, x, segments, screen, token, workspace, rows, inputs, x_stride, kinds, padded_inputs,
           panel_rows, tile_bytes, best_bytes, alone, threads);
PHL_OP(linear_argmax_screened, LinearScreenedArgs);

// The head with what sampling needs: of each row the k largest logits, best first (the lowest id first of equals), and
// the log-sum-exp of the logits times each of its scales. One segment.
struct LinearTopkArgs {
  const float* x;
  const Segment* segments;
  const float *bias, *scale;  // scale [rows, norms], or null
  float* values;              // [rows, k]
  int32_t* ids;               // [rows, k]
  float* lse;                 // [rows, norms]
  uint8_t* workspace;         // tiles, then each thread's candidates, then the sums, then activations
  int64_t rows, inputs, x_stride, kinds, padded_inputs, panel_rows, tile_bytes, alone, threads;
  int64_t k, norms, capacity, row_bytes;  // bytes of one thread's candidates of a row
  double cap;
};

// The best of all threads' candidates for one row of a panel, in the space of thread 0's.
PHL_INLINE void merge_top(const LinearTopkArgs& a, const TopRows& first, int threads, int64_t row, int64_t to) {
  const int64_t step = a.panel_rows * a.row_bytes / 8;
  uint64_t* keys = first.keys + row * a.capacity;
  first.shrink(row);
  int64_t found = first.count[row];
  for (int t = 1; t < threads; ++t) {
    const uint64_t* theirs = first.keys + t * step + row * a.capacity;
    const int64_t count = first.count[t * step + row];
    for (int64_t i = 0; i < count; ++i) {
      if (found == a.capacity) found = best_keys(keys, found, a.k, 0.0, false).count;
      keys[found++] = theirs[i];
    }
  }
  if (found > a.k) found = best_keys(keys, found, a.k, 0.0, false).count;
  sort_descending(keys, found);
  for (int64_t i = 0; i < a.k; ++i) {
    a.ids[to * a.k + i] = i < found ? id_of(keys[i]) : 0;
    a.values[to * a.k + i] = i < found ? value_of(keys[i]) : -__builtin_inff();
  }
  for (int64_t n = 0; n < a.norms; ++n) a.lse[to * a.norms + n] = first.log_sum_exp(n, row);
}

void linear_topk(const LinearTopkArgs& a, Team& team) {
  const int size = static_cast<int>(smaller(team.size, a.threads));
  const Segment& s = a.segments[0];
  const int64_t chunks = (s.blocks + kTopChunk - 1) / kTopChunk;
  uint8_t* own = a.workspace + size * a.tile_bytes;
  uint8_t* states = own + size * a.panel_rows * a.row_bytes;
  const int64_t state_bytes = a.norms * a.panel_rows * chunks * kTopState * 4;
  const auto of_thread = [&](int thread) {
    auto* keys = reinterpret_cast<uint64_t*>(own + thread * a.panel_rows * a.row_bytes);
    auto* count = reinterpret_cast<int64_t*>(keys + a.panel_rows * a.capacity);
    return TopRows{keys, count, reinterpret_cast<float*>(count + a.panel_rows), reinterpret_cast<float*>(states),
                   nullptr, a.capacity, a.k, a.panel_rows, chunks, a.norms, float(a.cap)};
  };
  const Input in{a.x, nullptr, nullptr, nullptr, a.inputs, a.x_stride, 0, 0, 0.0f};
  over_panels(a, 1, team, in, states + state_bytes, [&](const Rows& rows, int64_t first, int64_t count) {
    if (team.thread < size) {
      TopRows top = of_thread(team.thread);
      top.scale = a.scale == nullptr ? nullptr : a.scale + first * a.norms;
      top.start(count);
      // Whole chunks, so that a chunk's sums are made by one thread.
      const int64_t from = chunks * team.thread / size, to = chunks * (team.thread + 1) / size;
      for (int64_t n = 0; n < a.norms; ++n) {
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t c = from; c < to; ++c) {
            float* state = top.state(n, r, c);
            for (int i = 0; i < kBlock; ++i) state[i] = 0.0f;
            state[kBlock] = -__builtin_inff();
          }
        }
      }
      Output out{nullptr, a.bias, nullptr, 0, 0, kTop, nullptr, nullptr};
      out.top = &top;
      run_blocks(s, from * kTopChunk, smaller(to * kTopChunk, s.blocks), rows, count, out, 0,
                 a.workspace + team.thread * a.tile_bytes);
      for (int64_t r = 0; r < count; ++r) top.shrink(r);
    }
    team.barrier();
    team.split(count, 4, [&](int64_t begin, int64_t end) {
      const TopRows all = of_thread(0);
      for (int64_t r = begin; r < end; ++r) merge_top(a, all, size, r, first + r);
    });
    if (first + count < a.rows) team.barrier();
  });
}
PHL_FIELDS(LinearTopkArgs, x, segments, bias, scale, values, ids, lse, workspace, rows, inputs, x_stride, kinds,
           padded_inputs, panel_rows, tile_bytes, alone, threads, k, norms, capacity, row_bytes, cap);
PHL_OP(linear_topk, LinearTopkArgs);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
