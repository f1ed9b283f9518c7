// A sparse layer in one op: routing, gate and up of the chosen experts with SiLU, down, the weighted sum.
//
// Each expert's weights are read once per panel of tokens, and only where some token chose it. Gate and up are shared
// out as (expert, part of its blocks); down by output columns, so that a column has one owner who adds the experts in
// ascending order: the result depends neither on threads nor on the tokens beside a token.
#include "moe_route.h"

#include "../op.h"

namespace phl {
namespace PHL_NS {
namespace {

struct MoeArgs {
  const float *x, *logits;
  const int32_t* ids;    // [T, k] experts that were chosen elsewhere, or null: `logits` choose them. Ids that are no
  const float* weights;  // expert's here add nothing. [T, k]
  const Segment *gate_up, *down;         // of all experts, one after another
  const int64_t *gate_up_at, *down_at;   // [E + 1] where an expert's segments begin
  float* out;
  uint8_t* workspace;  // 64-byte aligned; see _native_moe.py for its size
  int64_t tokens, inputs, inner, experts, choices, renormalise, x_stride, logits_stride;
  int64_t up_kinds, up_padded, down_kinds, down_padded;
  int64_t paired;         // gate and up alternate block by block, so that they are combined where they are made
  int64_t hidden_stride;  // floats per slot between up and down
  int64_t panel_tokens, tile_bytes;
  int64_t alone;    // each thread routes and prepares all rows for itself, cheaper than barriers when they are few;
                    // only with `paired`, as gate and up made apart are combined in place
  int64_t threads;  // that the workspace has room for; more of them wait
};

constexpr int64_t kPanelBytes = 768 << 10;  // activations that a tile of weights meets: within a second-level cache
constexpr int64_t kTasks = 16;              // for each thread

PHL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

PHL_INLINE int64_t panel_rows(const Rows& rows) {
  const int64_t most = kPanelBytes / rows.row_bytes;
  return most < 48 ? 48 : most > 512 ? 512 : most;
}

// One thread's (or the team's) view of the workspace, and what to do with it.
struct Sparse {
  const MoeArgs& a;
  int64_t first, count, slots;  // the panel: tokens [first, first + count)
  uint8_t* tile;                // this thread's
  float* hidden;                // [slots, hidden_stride]
  Tables tables;
  Rows tokens, rows, inner;  // inputs by token and by slot, hidden by slot

  Sparse(const MoeArgs& a, int64_t first, int64_t count, int thread, int size)
      : a(a), first(first), count(count), slots(count * a.choices), tile(a.workspace + thread * a.tile_bytes),
        tables(nullptr, 0, 0), tokens(nullptr, a.up_padded, a.up_kinds), rows(tokens),
        inner(nullptr, a.down_padded, a.down_kinds) {
    const int64_t most = smaller(a.tokens, a.panel_tokens), most_slots = most * a.choices;
    const int64_t table_bytes = Tables::bytes(most_slots, a.experts);
    const int64_t token_bytes = most * tokens.row_bytes, row_bytes = a.tokens == 1 ? 0 : most_slots * rows.row_bytes;
    uint8_t* at = a.workspace + size * a.tile_bytes;
    hidden = reinterpret_cast<float*>(at);
    at += up64(4 * most_slots * a.hidden_stride);
    if (a.alone) at += thread * (table_bytes + token_bytes + row_bytes + most_slots * inner.row_bytes);
    tables = Tables(at, most_slots, a.experts);
    tokens.base = at + table_bytes;
    rows.base = tokens.base + token_bytes;
    inner.base = rows.base + row_bytes;
  }

  PHL_INLINE int64_t active() const { return active_end()->id; }

  PHL_INLINE const Active* active_end() const {
    const Active* at = tables.active;
    while (at->count > 0) ++at;
    return at;
  }

  // Slots whose expert is here; they stand first.
  PHL_INLINE int64_t filled() const { return active_end()->first; }

  PHL_INLINE void take_token(int64_t t) const {
    const Input in{a.x, nullptr, nullptr, nullptr, a.inputs, a.x_stride, 0, 0, 0.0f};
    prepare_row(in, first + t, tokens, t, false);
    int32_t* ids = tables.ids + t * a.choices;
    float* chosen = tables.chosen + t * a.choices;
    if (a.ids == nullptr) {
      route(a.logits + (first + t) * a.logits_stride, a.experts, a.choices, a.renormalise != 0, ids, chosen);
      return;
    }
    std::memcpy(ids, a.ids + (first + t) * a.choices, sizeof(int32_t) * a.choices);
    std::memcpy(chosen, a.weights + (first + t) * a.choices, sizeof(float) * a.choices);
  }

  PHL_INLINE void sort(int size) const {
    sort_slots(tables, slots, a.experts, a.choices);
    int64_t bytes = 0, pairs = 0;  // of the first expert; the others are like it
    for (int64_t i = a.gate_up_at[0]; i < a.gate_up_at[1]; ++i) {
      const Segment& s = a.gate_up[i];
      bytes += s.blocks * (a.up_padded / unit_inputs(s.layout)) * unit_size(s.layout);
      pairs += (s.blocks + 1) / 2;
    }
    number_tasks(tables, active(), bytes, 2 * a.inner * a.inputs / 16, pairs, kTasks * size);
  }

  PHL_INLINE void gather(int64_t begin, int64_t end) const {
    if (a.tokens == 1) return;
    for (int64_t slot = begin; slot < end; ++slot) {
      std::memcpy(rows.base + slot * rows.row_bytes, tokens.base + tables.token[slot] * tokens.row_bytes,
                  static_cast<size_t>(rows.row_bytes));
    }
  }

  // Rows of the slots from `slot`; a lone token serves all its experts.
  PHL_INLINE Rows inputs_from(int64_t slot) const {
    Rows from = a.tokens == 1 ? tokens : rows;
    if (a.tokens > 1) from.base += slot * from.row_bytes;
    return from;
  }

  // Part `part` of `parts` of gate and up of one expert, for all its slots.
  PHL_INLINE void up(const Active& e, int64_t part, int64_t parts) const {
    const Output out{hidden, nullptr, nullptr, a.hidden_stride, 0, a.paired ? kSiluMul : kStore, nullptr, nullptr};
    const Segment* segments = a.gate_up + a.gate_up_at[e.id];
    even_parts(e.count, panel_rows(rows), [&](int64_t at, int64_t n) {
      Rows from = inputs_from(e.first + at);
      from.many = e.count > kFewForBytes;
      own_blocks(segments, a.gate_up_at[e.id + 1] - a.gate_up_at[e.id], static_cast<int>(part),
                 static_cast<int>(parts), [&](const Segment& s, int64_t begin, int64_t end) {
                   Segment local = s;
                   local.first_column -= 2 * a.inner * e.id;
                   run_blocks(local, begin, end, from, n, out, e.first + at, tile);
                 });
    });
  }

  // silu(gate) * up where they were made apart.
  PHL_INLINE void combine(float* gate) const {
    for (int64_t i = 0; i < a.inner; i += kBlock) {
      const int64_t n = smaller(kBlock, a.inner - i);
      float g[kBlock] = {}, u[kBlock] = {};
      std::memcpy(g, gate + i, sizeof(float) * n);
      std::memcpy(u, gate + a.inner + i, sizeof(float) * n);
      Vec::storef(g, Vec::mul(silu(Vec::loadf(g)), Vec::loadf(u)));
      std::memcpy(gate + i, g, sizeof(float) * n);
    }
  }

  PHL_INLINE void take_hidden(int64_t begin, int64_t end) const {
    const Input in{hidden, nullptr, nullptr, nullptr, a.inner, a.hidden_stride, 0, 0, 0.0f};
    for (int64_t slot = begin; slot < end; ++slot) {
      if (!a.paired) combine(hidden + slot * a.hidden_stride);
      prepare_row(in, slot, inner, slot, false);
    }
  }

  // Output columns of blocks [begin, end) of every expert, for all tokens of the panel.
  PHL_INLINE void down(int64_t begin, int64_t end) const {
    const int64_t left = begin * kBlock, width = smaller(end * kBlock, a.inputs) - left;
    float* to = a.out + first * a.inputs;
    for (int64_t t = 0; t < count; ++t) std::memset(to + t * a.inputs + left, 0, sizeof(float) * width);
    Output out{to, nullptr, nullptr, a.inputs, 0, kAddScaled, nullptr, nullptr};
    out.target = tables.token;
    out.scale = tables.weight;
    for (const Active* e = tables.active; e->count > 0; ++e) {
      Segment local = a.down[a.down_at[e->id]];
      local.first_column = 0;
      even_parts(e->count, panel_rows(inner), [&](int64_t at, int64_t n) {
        Rows from = inner;
        from.many = e->count > kFewForBytes;
        from.base += (e->first + at) * inner.row_bytes;
        run_blocks(local, begin, end, from, n, out, e->first + at, tile);
      });
    }
  }
};

// Routing and inputs. Afterwards everything that `up` reads is there for this thread.
PHL_INLINE void take_inputs(const Sparse& p, Team& team, int size, bool mine) {
  if (p.a.alone) {
    if (!mine) return;
    for (int64_t t = 0; t < p.count; ++t) p.take_token(t);
    p.sort(size);
    p.gather(0, p.filled());
    return;
  }
  team.split(p.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) p.take_token(t);
  });
  team.barrier();
  if (team.thread == 0) p.sort(size);
  team.barrier();
  team.split(p.filled(), 8, [&](int64_t begin, int64_t end) { p.gather(begin, end); });
  team.barrier();
}

PHL_INLINE void up_tasks(const Sparse& p, Team& team, bool mine) {
  const Active* e = p.tables.active;  // a thread's tasks ascend
  team.tasks(mine ? p.active_end()->task : 0, [&](int64_t task) {
    while (e[1].task <= task) ++e;
    p.up(*e, task - e->task, e[1].task - e->task);
  });
}

PHL_INLINE void down_tasks(const Sparse& p, Team& team, int size, bool mine) {
  const int64_t blocks = (p.a.inputs + kBlock - 1) / kBlock, pairs = (blocks + 1) / 2;
  const int64_t step = pairs >= 2 * size ? 2 : 1;  // single blocks where pairs would not go round
  const int64_t units = (blocks + step - 1) / step, tasks = smaller(units, kTasks / 2 * size);
  team.tasks(mine ? tasks : 0, [&](int64_t task) {
    p.down(units * task / tasks * step, smaller(units * (task + 1) / tasks * step, blocks));
  });
}

void moe(const MoeArgs& a, Team& team) {
  const int size = static_cast<int>(smaller(team.size, a.threads));
  const bool mine = team.thread < size;
  for (int64_t first = 0; first < a.tokens; first += a.panel_tokens) {
    const Sparse p(a, first, smaller(a.panel_tokens, a.tokens - first), mine ? team.thread : 0, size);
    if (first > 0) team.barrier();  // the last panel's tables and rows have been read
    take_inputs(p, team, size, mine);
    up_tasks(p, team, mine);
    team.barrier();
    if (!a.alone) {
      team.split(p.filled(), 1, [&](int64_t begin, int64_t end) { p.take_hidden(begin, end); });
      team.barrier();
    } else if (mine) {
      p.take_hidden(0, p.filled());
    }
    down_tasks(p, team, size, mine);
  }
}
PHL_FIELDS(MoeArgs, x, logits, ids, weights, gate_up, down, gate_up_at, down_at, out, workspace, tokens, inputs, inner,
           experts, choices, renormalise, x_stride, logits_stride, up_kinds, up_padded, down_kinds, down_padded, paired,
           hidden_stride, panel_tokens, tile_bytes, alone, threads);
PHL_OP(moe, MoeArgs);

constexpr int64_t kActiveBytes = sizeof(Active);
PHL_CONSTANT(moe, kActiveBytes);

}  // namespace
}  // namespace PHL_NS
}  // namespace phl
