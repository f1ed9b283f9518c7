// Paged attention over ragged rows in one op: rows of one query token are split over the cache (and merged in a fixed
// order), longer ones into blocks of query tokens; both are shared out dynamically. No plan is stored: every thread
// derives the same list of tasks from the lengths, so a recorded step follows them.
#include "../next_cache.h"
#include "attention_block.h"
#include "attention_int8.h"
#include "attention_stream.h"

namespace phl {
namespace PHL_NS {
namespace {

struct RowPlan {
  int64_t token, tokens, length;  // first query token and their number; cached tokens, the new ones included
  Range range;                    // one query token: what it sees
  int64_t splits, blocks;         // tasks per kv head: splits (one token) or blocks (several)
  int64_t block_tokens;
};

PHL_INLINE RowPlan plan_row(const AttentionArgs& a, int64_t row) {
  RowPlan plan{};
  plan.token = a.query_start[row];
  plan.tokens = a.query_start[row + 1] - plan.token;
  plan.length = a.seq_lens[row];
  if (plan.tokens <= 0) return plan;
  plan.splits = 1;
  if (plan.tokens == 1) {
    plan.range = visible(a, plan.length - 1, plan.length - 1, plan.length);
    plan.splits = splits_of(a, plan.range);
    plan.blocks = plan.splits;
    plan.block_tokens = 1;
    return plan;
  }
  const int64_t group = a.heads / a.kv_heads;
  plan.block_tokens = kBlockRows / group > 1 ? kBlockRows / group : 1;
  plan.blocks = (plan.tokens + plan.block_tokens - 1) / plan.block_tokens;
  return plan;
}

template <class E>
PHL_INLINE void run_stream(const AttentionArgs& a, StreamJob& job) {
  switch (a.heads / a.kv_heads) {
    case 1: return stream<1, E>(a, job);
    case 2: return stream<2, E>(a, job);
    case 3: return stream<3, E>(a, job);
    default: return stream<4, E>(a, job);
  }
}

// One token's heads of `count` kv heads over one split, by the streaming path.
template <class E>
void stream_task(const AttentionArgs& a, const RowPlan& plan, const Stretch& own, const Stretch& guess, int64_t count,
                 int64_t split, float* scratch) {
  const int64_t group = a.heads / a.kv_heads, first = own.kv_head * group, row = own.row;
  StreamJob job;
  job.own = own;
  job.guess = guess;
  job.kv_heads = count;
  for (int64_t h = 0; h < count * group; ++h) {
    job.q[h] = a.q + plan.token * a.q_token + (first + h) * a.q_head;
    job.values[h] = plan.splits == 1 ? scratch + h * a.head_size : partial_of(a, row, first + h, split);
  }
  run_stream<E>(a, job);
  for (int64_t h = 0; h < count * group; ++h) {
    if (plan.splits == 1) {
      float* out = a.out + (plan.token * a.heads + first + h) * a.head_size;
      finish_head(a, first + h, job.values[h], job.top[h], job.total[h], out);
    } else {
      job.values[h][a.head_size] = job.top[h];
      job.values[h][a.head_size + 1] = job.total[h];
    }
  }
}

// Which query tokens of its row a part is, and what they see.
template <class Job>
PHL_INLINE void place(const AttentionArgs& a, const RowPlan& plan, const Stretch& at, int64_t part, Job& job) {
  const bool single = plan.tokens == 1;
  const int64_t first = single ? 0 : part * plan.block_tokens;
  job.row = at.row;
  job.kv_head = at.kv_head;
  job.token = plan.token + first;
  job.tokens = plan.tokens - first < plan.block_tokens ? plan.tokens - first : plan.block_tokens;
  job.position = plan.length - plan.tokens + first;
  const int64_t last = job.position + job.tokens - 1;
  job.range = single ? split_range(a, plan.range, plan.splits, part) : visible(a, job.position, last, plan.length);
  job.m = job.tokens * (a.heads / a.kv_heads);
}

// Query row i of kv head `kv_head`, whose results are row `at` of the job's: into the output, or beside the other splits'.
template <class Job>
PHL_INLINE void put(const AttentionArgs& a, const RowPlan& plan, const Job& job, int64_t row, int64_t kv_head, int64_t i,
                    int64_t at, int64_t part) {
  const int64_t group = a.heads / a.kv_heads, head = kv_head * group + i % group;
  const float* values = job.results + at * job.wide;
  const float total = sum(load(job.sums + at * W));
  if (plan.splits == 1) {
    finish_head(a, head, values, job.tops[at], total, a.out + ((job.token + i / group) * a.heads + head) * a.head_size);
  } else {
    float* partial = partial_of(a, row, head, part);
    std::memcpy(partial, values, a.head_size * sizeof(float));
    partial[a.head_size] = job.tops[at];
    partial[a.head_size + 1] = total;
  }
}

template <class E>
void block_task(const AttentionArgs& a, const RowPlan& plan, const Stretch& at, int64_t part, float* scratch) {
  const int64_t group = a.heads / a.kv_heads;
  BlockJob<E> job;
  place(a, plan, at, part, job);
  lay_out(a, job, scratch, kBlockRows > group ? kBlockRows : group);
  block(a, job);
  for (int64_t i = 0; i < job.m; ++i) put(a, plan, job, job.row, job.kv_head, i, i, part);
}

// The rows that share the cached tokens of a split; one row: `rows` is not read.
struct Sharers {
  const int32_t* rows;
  int64_t count;
};

void int8_task(const AttentionArgs& a, const RowPlan& plan, const Stretch& at, const Stretch& guess, int64_t kv_heads,
               int64_t part, const Sharers& sharers, float* scratch) {
  const int64_t group = a.heads / a.kv_heads;
  Int8Job job;
  place(a, plan, at, part, job);
  job.sharers = nullptr;
  if (sharers.count > 1) {
    job.sharers = sharers.rows;
    job.m = sharers.count * group;
  }
  job.kv_heads = kv_heads;
  job.guess = guess;
  lay_out(a, job, scratch);
  attend_int8(a, job);
  for (int64_t i = 0; i < job.m * kv_heads; ++i) {
    const int64_t row = job.sharers == nullptr ? job.row : job.sharers[i % job.m / group];
    put(a, plan, job, row, job.kv_head + i / job.m, i % job.m, i, part);
  }
}

// Puts the splits of one head together, in their order.
PHL_INLINE void merge_head(const AttentionArgs& a, const RowPlan& plan, int64_t row, int64_t head) {
  const int64_t size = a.head_size;
  float* into = partial_of(a, row, head, 0);
  float top = into[size], total = into[size + 1];
  for (int64_t split = 1; split < plan.splits; ++split) {
    const float* from = partial_of(a, row, head, split);
    const float highest = from[size] > top ? from[size] : top;
    const float keep = exp2<6>(splat(top - highest))[0], take = exp2<6>(splat(from[size] - highest))[0];
    int64_t d = 0;
    for (; d + W <= size; d += W) store(into + d, load(into + d) * keep + load(from + d) * take);
    for (; d < size; ++d) into[d] = into[d] * keep + from[d] * take;
    total = total * keep + from[size + 1] * take;
    top = highest;
  }
  finish_head(a, head, into, top, total, a.out + (plan.token * a.heads + head) * size);
}

// Rows of one query token that begin with the same pages: a split of them all is one task, for which its keys and values
// are read once. A row's result is the same, as every row is cut at the same places whether it shares them or not.
struct Sharing {
  static constexpr int64_t kMost = 256;  // rows among which is looked
  int32_t leader[kMost], parts[kMost];   // the first row of those pages; how many splits are in them
  int64_t rows = 0;

  PHL_INLINE static bool cut(const RowPlan& plan) { return plan.tokens == 1 && plan.splits > 1; }

  PHL_INLINE void look(const AttentionArgs& a) {
    if (a.window > 0 || a.rows > kMost || a.max_splits < 2) return;
    rows = a.rows;
    for (int64_t row = 0; row < rows; ++row) {
      leader[row] = int32_t(row);
      parts[row] = 0;
      const RowPlan plan = plan_row(a, row);
      if (!cut(plan)) continue;
      const int32_t* pages = a.page_table + row * a.pages_per_row;
      for (int64_t other = 0; other < row; ++other) {
        const int32_t* theirs = a.page_table + other * a.pages_per_row;
        if (theirs[0] != pages[0] || leader[other] != other) continue;
        const RowPlan first = plan_row(a, other);
        if (!cut(first) || split_tokens(a, first.range) != split_tokens(a, plan.range)) continue;
        parts[row] = int32_t(whole_splits(a, pages, theirs, plan.range, first.range));
        if (parts[row] > 0) leader[row] = int32_t(other);
        break;
      }
    }
  }

  // Splits that are whole in both ranges and whose pages are the same.
  PHL_INLINE int64_t whole_splits(const AttentionArgs& a, const int32_t* x, const int32_t* y, Range one, Range two) const {
    const int64_t part = split_tokens(a, one), end = one.end < two.end ? one.end : two.end;
    int64_t page = 0;
    while (page * a.page_size < end && x[page] == y[page]) ++page;
    const int64_t same = page * a.page_size < end ? page * a.page_size : end;
    return same / part;
  }

  PHL_INLINE int64_t of(int64_t row) const { return uint64_t(row) < uint64_t(rows) ? parts[row] : 0; }

  // The first of a row's tokens that no row before it has as well.
  PHL_INLINE int64_t own_from(const AttentionArgs& a, int64_t row, const RowPlan& plan) const {
    return of(row) > 0 ? of(row) * split_tokens(a, plan.range) : 0;
  }

  // Those that share split `part` of `row`, itself the first of them.
  PHL_INLINE int64_t sharers(int64_t row, int64_t part, int32_t* found) const {
    int64_t count = 0;
    found[count++] = int32_t(row);
    for (int64_t other = row + 1; other < rows; ++other) {
      if (leader[other] == row && parts[other] > part) found[count++] = int32_t(other);
    }
    return count;
  }
};

// From a task to its row: tasks come to a thread in rising order.
struct TaskCursor {
  const AttentionArgs& a;
  const Sharing& sharing;
  int64_t heads;  // kv heads of a task for a single token; of a block's, one
  int64_t row = 0, before = 0, set = 0, part = 0;
  RowPlan plan;

  PHL_INLINE TaskCursor(const AttentionArgs& a, const Sharing& sharing, int64_t heads)
      : a(a), sharing(sharing), heads(heads), plan(a.rows > 0 ? plan_row(a, 0) : RowPlan{}) {}

  PHL_INLINE int64_t heads_of_task() const { return plan.tokens == 1 ? heads : 1; }
  PHL_INLINE int64_t tasks() const { return (plan.blocks - sharing.of(row)) * (a.kv_heads / heads_of_task()); }

  PHL_INLINE void seek(int64_t task) {
    while (task - before >= tasks()) {
      before += tasks();
      plan = plan_row(a, ++row);
    }
    const int64_t sets = a.kv_heads / heads_of_task(), at = (task - before) / sets;
    set = (task - before) % sets;
    // The longest first: the last block of a prompt, the first split of a row.
    part = plan.tokens == 1 ? sharing.of(row) + at : plan.blocks - 1 - at;
  }
  PHL_INLINE Stretch stretch() const {
    return {row, set * heads_of_task(), split_range(a, plan.range, plan.splits, part)};
  }
};

// A split of a row, with all who share it: as many at a time as the scratch memory has room for.
PHL_INLINE void share_task(const AttentionArgs& a, const Sharing& sharing, const RowPlan& plan, const Stretch& own,
                           const Stretch& guess, int64_t heads, int64_t part, float* scratch) {
  int32_t rows[Sharing::kMost];
  const bool shared = own.row < sharing.rows && plan.splits > 1;
  const int64_t count = shared ? sharing.sharers(own.row, part, rows) : 1;
  const int64_t room = kBlockRows / (a.heads / a.kv_heads * heads), most = room > 1 ? room : 1;
  for (int64_t from = 0; from < count; from += most) {
    const int64_t left = count - from < most ? count - from : most;
    const bool last = from + left == count;
    if (left == 1 && shared) {  // a row alone reads where it lies
      Stretch alone = own;
      alone.row = rows[from];
      int8_task(a, plan_row(a, alone.row), alone, last ? guess : Stretch{}, heads, part, {nullptr, 1}, scratch);
    } else {
      int8_task(a, plan, own, last ? guess : Stretch{}, heads, part, {rows + from, left}, scratch);
    }
  }
}

// How many kv heads one streaming task takes: several where there are tasks enough, since they lie side by side.
PHL_INLINE int64_t heads_of_task(const AttentionArgs& a, int64_t tasks, int size) {
  const int64_t most = kMaxStreamHeads / (a.heads / a.kv_heads);
  int64_t heads = 1;
  for (int64_t h = 2; h <= a.kv_heads && h <= most; ++h) {
    if (a.kv_heads % h == 0 && tasks * a.kv_heads / h >= 4 * size) heads = h;
  }
  return heads;
}

// Lists what this thread's share of the rows of one token, which compute little, will read in the next layer's cache.
void look_ahead(const AttentionArgs& a, const Sharing& sharing, const Team& team, int64_t page_bytes) {
  NextCache& next = next_cache();
  next.done(a.k_cache, a.v_cache, page_bytes);
  for (int64_t row = team.thread; row < a.rows; row += team.size) {
    const RowPlan plan = plan_row(a, row);
    if (plan.tokens != 1) continue;
    const int64_t first = plan.range.begin > sharing.own_from(a, row, plan) ? plan.range.begin
                                                                          : sharing.own_from(a, row, plan);
    const int32_t* pages = a.page_table + row * a.pages_per_row;
    for (int64_t page = first / a.page_size; page * a.page_size < plan.range.end; ++page) {
      if (!next.add(pages[page], team.size)) return;
    }
  }
}

// E: what the cache holds.
template <class E>
void attend(const AttentionArgs& a, Team& team) {
  constexpr bool kInt8 = std::is_same_v<E, int8_t>;
  int64_t parts = 0, blocks = 0, tokens = 0;  // parts of rows of one token, blocks of others
  bool merge = false;
  Sharing sharing;
  if constexpr (kInt8) sharing.look(a);
  for (int64_t row = 0; row < a.rows; ++row) {
    const RowPlan plan = plan_row(a, row);
    (plan.tokens == 1 ? parts : blocks) += plan.blocks - sharing.of(row);
    merge |= plan.splits > 1;
    tokens += plan.tokens;
  }
  float* scratch = a.scratch + team.thread * a.scratch_stride;
  const bool can_stream = kInt8 || (a.heads / a.kv_heads <= kMaxStreamGroup && a.head_size % W == 0);
  const int64_t heads = can_stream ? heads_of_task(a, parts, team.size) : 1;
  const int64_t tasks = parts * (a.kv_heads / heads) + blocks * a.kv_heads;
  TaskCursor cursor(a, sharing, heads), guess(a, sharing, heads);
  team.tasks(tasks, [&](int64_t task) {
    cursor.seek(task);
    const RowPlan& plan = cursor.plan;
    const Stretch own = cursor.stretch();
    Stretch next{};
    if (plan.tokens == 1 && can_stream && task + team.size < tasks) {
      guess.seek(task + team.size);
      if (guess.plan.tokens == 1) next = guess.stretch();
    }
    if constexpr (kInt8) {
      share_task(a, sharing, plan, own, next, cursor.heads_of_task(), cursor.part, scratch);
    } else if (plan.tokens == 1 && can_stream) {
      stream_task<E>(a, plan, own, next, heads, cursor.part, scratch);
    } else {
      block_task<E>(a, plan, own, cursor.part, scratch);
    }
  });
  // Kernels of other levels do not ask for the list.
  if (PHL_LEVEL >= 1 && tokens > NextCache::kFewRows) look_ahead(a, sharing, team, a.page_stride * int64_t(sizeof(E)));
  if (!merge) return;
  team.barrier();
  team.split(a.rows * a.heads, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowPlan plan_of = plan_row(a, i / a.heads);
      if (plan_of.splits > 1) merge_head(a, plan_of, i / a.heads, i % a.heads);
    }
  });
}

void attention_bf16(const AttentionArgs& a, Team& team) { attend<uint16_t>(a, team); }
PHL_FIELDS(AttentionArgs, q, k_cache, v_cache, out, query_start, seq_lens, page_table, sinks, partial, scratch, rows,
           heads, kv_heads, head_size, page_size, pages_per_row, page_stride, q_token, q_head, max_splits,
           scratch_stride, window, block, scale, softcap);
PHL_OP(attention_bf16, AttentionArgs);

void attention_int8(const AttentionArgs& a, Team& team) { attend<int8_t>(a, team); }
PHL_OP(attention_int8, AttentionArgs);

void attention_f32(const AttentionArgs& a, Team& team) { attend<float>(a, team); }
PHL_OP(attention_f32, AttentionArgs);

// How many floats of scratch memory a thread needs, for Python, which allocates it.
struct AttentionScratchArgs {
  int64_t head_size, group;
  int64_t* floats;
};
void attention_scratch(const AttentionScratchArgs& a, Team& team) {
  if (team.thread == 0) *a.floats = scratch_floats(a.head_size, a.group);
}
PHL_FIELDS(AttentionScratchArgs, head_size, group, floats);
PHL_OP(attention_scratch, AttentionScratchArgs);
PHL_CONSTANT(attention, kSplitTokens);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
