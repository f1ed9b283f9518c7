"""The op table: everything that a model's forward pass computes, as functions that a platform may replace one by one.

Rules for callers: a forward pass consists of these ops and of views (`view`, slicing along the last axis, `unflatten`),
never of torch arithmetic, so that a table can record the ops into a graph. Inputs may be strided views as long as the
last axis is contiguous. Ops return new tensors (or views of buffers that a graph owns); `write_kv`, `rope_`,
`rope_write_kv`, `write_latent` and `write_states` alone change their inputs.

Legend: T tokens, H query heads, K kv heads, D head size, N features, V vocabulary, R rows (requests), P pages per row,
S page size. Caches are `[pages, K, S, D]`: a head's page is one contiguous block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from phloem.kernels import compose
from phloem.kernels import reference as ref
from phloem.kernels import reference_attention as attention
from phloem.kernels import reference_experts as experts
from phloem.kernels import reference_models as models
from phloem.kernels import reference_scan as scan
from phloem.kernels import reference_streams as streams
from phloem.kernels.calls import (
    Adapters,
    AttentionCall,
    Draw,
    IndexCall,
    LatentCall,
    LinearOp,
    Norm,
    PagedBatch,
    PrepareExperts,
    PrepareLinear,
    Rotation,
    SharedPages,
    WeightSource,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from phloem.kernels.calls import Cache
    from phloem.kernels.graph import GraphRecorder, StepCompiler
    from phloem.kernels.specs import ExpertSpec, RouterSpec

__all__ = ["Adapters", "AttentionCall", "Draw", "LatentCall", "LinearOp", "Norm", "Ops", "PagedBatch", "PrepareExperts"]
__all__ += ["PrepareLinear", "Rotation", "SharedPages", "WeightSource"]


class AttentionOp(Protocol):
    """q[T, H, D] over the pages of a batch's rows -> [T, H, value size]. Raises `ValueError` for a call that the table
    does not serve: all but the reference serve `AttentionCall.plain`, and values of the keys' size."""

    def __call__(self, q: Tensor, cache: Cache, batch: PagedBatch, call: AttentionCall, /) -> Tensor: ...


class PackedAttentionOp(Protocol):
    """q[T, H, D], k[T, K, D], v[T, K, V] of whole texts one behind the other, each of which sees itself alone ->
    [T, H, V]. `starts` int32 [R + 1], on the host: where each of R texts begins in T, and T; a text may be empty.
    `distances` float32 [H, 2 M - 1], M at least the longest text, or None: added to the score of query i and key j at
    j - i + M - 1. Raises `ValueError` or `TypeError` for what does not fit."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, call: AttentionCall, distances: Tensor | None, /
    ) -> Tensor: ...


class LatentAttentionOp(Protocol):
    """Queries [T, H, N] and their rotated part [T, H, P] over a cache of latents -> [T, H, D]."""

    def __call__(
        self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, batch: PagedBatch, call: LatentCall, /
    ) -> Tensor: ...


@dataclass(frozen=True)
class Ops:
    """One table. `name` says which; every default is plain torch and is the specification of the op."""

    name: str = "reference"

    # Weights. `prepare_linear` turns the parts of one fused linear layer (q, k, v, say), stacked along out_features,
    # into whatever `linear` and `embedding` of the same table understand; the default makes one dense tensor.
    prepare_linear: PrepareLinear = ref.prepare_linear
    linear: LinearOp = compose.reference_linear
    # Heads, where a table has them: the first largest of each row of x W^T, int32 [T], without the row.
    linear_argmax: Callable[[Tensor, Any], Tensor] | None = None
    # x[T, N], weight, k, scale[T, J] float32 (None: 1), J, cap (0: none) -> of each row of x W^T, soft-capped, the k
    # largest (best first, the lowest id first of equals), values and int32 ids [T, k], and the log-sum-exp of the row
    # times each of its scales, float32 [T, J]. As `reference_sampling.linear_topk`.
    linear_topk: Callable[[Tensor, Any, int, Tensor | None, int, float], tuple[Tensor, Tensor, Tensor]] | None = None
    embedding: Callable[[Tensor, Any, float], Tensor] = ref.embedding  # ids[T], weight[V, N], scale -> [T, N]
    # The same of the part of a vocabulary that begins at `first` and ends before `last`, whose rows alone the weight
    # has; those of other ids are 0. ids, weight, scale, first, last. None: by `embedding`, and torch around it.
    embedding_part: Callable[[Tensor, Any, float, int, int], Tensor] | None = None

    # Elementwise and norms. `rms_norm` works on the last axis of [T, N] or [T, H, D].
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = ref.rms_norm  # x, weight, eps
    # x, residual, weight, eps -> (norm(x + residual), x + residual)
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = ref.add_rms_norm
    add: Callable[[Tensor, Tensor], Tensor] = ref.add
    silu_and_mul: Callable[[Tensor], Tensor] = ref.silu_and_mul  # [T, 2N] (gate, up) -> [T, N]
    gelu_tanh_and_mul: Callable[[Tensor], Tensor] = ref.gelu_tanh_and_mul
    softcap: Callable[[Tensor, float], Tensor] = ref.softcap  # cap * tanh(x / cap)
    select_rows: Callable[[Tensor, Tensor], Tensor] = ref.select_rows  # x[T, N], index[L] -> [L, N]

    # Position and attention. `rope_` rotates q[T, H, D] and k[T, K, D] in place, halves paired (NeoX style) or, with
    # `interleaved`, neighbours; cos_sin[positions, 2, rotary / 2] is float32.
    # Arguments: q, k, positions[T], cos_sin, interleaved.
    rope_: Callable[[Tensor, Tensor, Tensor, Tensor, bool], None] = ref.rope_
    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = ref.write_kv  # k, v, k_cache, v_cache, slots
    # q, k, v, rotation, k_cache, v_cache, slots -> q: `rms_norm` of q and k if asked, `rope_` and `write_kv` in one, to
    # the same bits, for the same cache types; q and k are used up. None: one op after the other.
    rope_write_kv: Callable[[Tensor, Tensor, Tensor, Rotation, Tensor, Tensor, Tensor], Tensor] | None = None
    paged_attention: AttentionOp = attention.paged_attention
    # Of models that read a text or a picture once (`attention/_packed.py`, which takes torch's fused attention where a
    # table has none of its own): every `AttentionCall`, values of any size.
    packed_attention: PackedAttentionOp = attention.packed_attention

    # Attention over pages that the backend `pallas` takes instead, of heads that are multiples of so many; None: none.
    page_kernel: AttentionOp | None = None
    page_kernel_heads: int = 1

    # What linear layers make of their inputs, and why; None: they take them in their type.
    activations: tuple[str, str] | None = None

    # The type that stacks of adapters are kept in (`Adapters.down`, `up`); None: the model's.
    adapter_dtype: torch.dtype | None = None
    # `linear` as it computes beside an adapter, where a row without one would have other bits alone; a model whose rows
    # may have adapters takes it for all of them. None: `linear` itself.
    apart: LinearOp | None = None
    # Whether a row's results have the same bits in steps of 1 to 24 rows.
    row_bits: bool = False

    # Whether log probabilities come of whole rows of logits alone: each has the same bits wherever it is computed.
    whole_logprobs: bool = False

    # Types of KV cache that `write_kv` and `paged_attention` take; None: every floating type.
    kv_dtypes: tuple[torch.dtype, ...] | None = None

    # Whether its own `paged_attention` serves blocks of positions (`AttentionCall.block`), without a window.
    block_attention: bool = False
    # Whether it serves every call, and values of any size.
    every_attention: bool = False

    # Latent attention (MLA): a cache of one latent a token, `[pages, 1, S, L + P]`.
    write_latent: Callable[[Tensor, Tensor, Tensor], None] = attention.write_latent  # latents[T, L + P], cache, slots
    latent_attention: LatentAttentionOp = attention.latent_attention
    # Sparse attention over latents: see `reference_attention`. The second is `latent_attention` with positions [T, k].
    choose_keys: Callable[[IndexCall, Tensor, PagedBatch], Tensor] = attention.choose_keys
    chosen_latent_attention: Callable[[Tensor, Tensor, Tensor, PagedBatch, LatentCall, Tensor], Tensor] = (
        attention.latent_attention
    )

    # Mixture of experts: softmax of router logits[T, E], the best k experts of each token (their weights scaled to sum
    # to 1 if asked), their gated MLPs with SiLU, summed by weight. `prepare_experts` stacks expert after expert along
    # out_features: each its gate, then its up projection, [E * 2F, N]; or its down projection, [E * N, F]. The last
    # argument is E.
    prepare_experts: PrepareExperts = experts.prepare_experts
    # x[T, N], logits[T, E], gate_up, down, k, renormalise -> [T, N]
    moe: Callable[[Tensor, Tensor, Any, Any, int, bool], Tensor] = experts.moe
    # The same of experts that were chosen elsewhere: x[T, N], ids int32 [T, k], weights float32 [T, k], gate_up, down
    # -> [T, N]. Ids that no expert here has (-1) add nothing.
    chosen_experts: Callable[[Tensor, Tensor, Tensor, Any, Any], Tensor] = experts.chosen_experts
    # Whether that serves plain experts of any router better than `experts` below.
    chooses_apart: bool = False
    # Whether `experts` takes of such experts what `prepare_experts` makes.
    stacks_alike: bool = False

    # Sampling helpers: logits[L, V] float -> int32/float32.
    argmax: Callable[[Tensor], Tensor] = ref.argmax  # [L]
    logsumexp: Callable[[Tensor], Tensor] = ref.logsumexp  # [L] float32
    # The k best, best first: values and int32 ids [L, k].
    top_k: Callable[[Tensor, int], tuple[Tensor, Tensor]] = ref.top_k
    # logits, rows[M] int32, mask[M, words] int32: in place, -inf where bit i of word w, token 32 w + i, is 0 or missing
    mask_tokens_: Callable[[Tensor, Tensor, Tensor], None] = ref.mask_tokens_
    # Tokens int32 [L], as `engine/sampling/sampler.py` specifies; None: that file's torch code draws.
    sample: Callable[[Tensor, Draw], Tensor] | None = None

    # The tokens that a step begins and ends with; None: torch code (`engine/transfer.py`).
    # ids[T] int64, last[S] int64, slots[T] int64: in place, ids below 0 become last[slots]
    late_tokens_: Callable[[Tensor, Tensor, Tensor], None] | None = None
    # last[S], slots[L], tokens[L], sound[L] float -> int32 [L]: last[slots] = tokens; the token, or -1 - token where
    # sound is NaN
    keep_tokens_: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None

    # Makes step graphs over this table's ops; None: steps run eagerly.
    recorder: Callable[[], GraphRecorder] | None = None

    # Compiles whole steps: the table's ops are functions of arrays that are not torch's. None: they are torch's.
    compiler: Callable[[], StepCompiler] | None = None
    # The same table over so many of its devices, among which compiled steps share out weights and caches. Raises
    # ConfigError where it sees fewer. None: one device alone.
    share: Callable[[int], Ops] | None = None
    # Over several devices: a prepared weight, cut along one of its axes (None: whole on each), in its place.
    place: Callable[[Any, int | None, int], Any] | None = None  # weight, axis, experts

    # Ops that only some families need. Unlike the fused `moe`, any router and any experts, with weights that
    # `stack_experts` prepares as `prepare_experts` does.
    # logits[T, E], correction bias[E] float32 or None, spec -> ids int32 [T, k], weights float32 [T, k]
    route: Callable[[Tensor, Tensor | None, RouterSpec], tuple[Tensor, Tensor]] = models.route
    stack_experts: PrepareExperts = experts.prepare_experts
    # x[T, N], ids, weights, gate_up, down, spec, biases of both or None -> [T, N]
    experts: Callable[[Tensor, Tensor, Tensor, Any, Any, ExpertSpec, tuple[Tensor, Tensor] | None], Tensor] = (
        models.experts
    )
    mul: Callable[[Tensor, Tensor], Tensor] = models.mul
    weights_from: Callable[[Tensor, Tensor, int], Tensor] = models.weights_from  # ids[T, k], weights, first id -> [T]
    join: Callable[[Tensor, Tensor], Tensor] = models.join  # along the last axis
    sigmoid_mul: Callable[[Tensor, Tensor], Tensor] = models.sigmoid_mul  # x, gate[.., 1] or as x -> x * sigmoid(gate)
    gelu: Callable[[Tensor], Tensor] = models.gelu
    gelu_tanh: Callable[[Tensor], Tensor] = models.gelu_tanh
    relu: Callable[[Tensor], Tensor] = models.relu
    relu2: Callable[[Tensor], Tensor] = models.relu2
    xielu: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = models.xielu  # x, alpha_p, alpha_n, beta, eps
    scale: Callable[[Tensor, float], Tensor] = models.scale
    scale_rows: Callable[[Tensor, Tensor], Tensor] = models.scale_rows  # x[T, ...], a number for each row [T], or [1]
    clip: Callable[[Tensor, float], Tensor] = models.clip  # x, limit: at most so far from 0
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = models.layer_norm  # x, weight, bias, eps
    # x, gate, weight, eps, group (0: the whole axis), norm before the gate
    gated_rms_norm: Callable[[Tensor, Tensor, Tensor, float, int, bool], Tensor] = models.gated_rms_norm
    # positions[3, T], cos_sin, sections, interleaved -> positions[T] and cos_sin[T, 2, rotary / 2] for a `Rotation`
    mrope_table: Callable[[Tensor, Tensor, tuple[int, ...], bool], tuple[Tensor, Tensor]] = models.mrope_table
    # Streams of hidden states: see `reference_streams`.
    mix_streams: Callable[[Tensor, Tensor], Tensor] = streams.mix_streams  # x[T, S, N], mix[T, S, S]
    spread_streams: Callable[[Tensor, Tensor, Tensor, float], Tensor] = (
        streams.spread_streams
    )  # x, y[T, N], scale, more
    match_rms: Callable[[Tensor, Tensor], Tensor] = streams.match_rms
    sparsify: Callable[[Tensor, float], Tensor] = streams.sparsify
    # Recurrent mixers: see `reference_scan`. Each gives its result and the rows' states after the step.
    causal_conv: Callable[[Tensor, Tensor, Tensor | None, Any, Tensor, bool], tuple[Tensor, Any]] = scan.causal_conv
    # Whether they take `PooledStates` in place of states, and then give None for those after.
    pooled_states: bool = False
    read_states: Callable[[Tensor, Tensor, Tensor], Tensor] = scan.read_states  # pool, places[R] int64, fresh[R] bool
    write_states: Callable[[Tensor, Tensor, Tensor], None] = scan.write_states  # pool, places, states[R, ...]
    repeat_heads: Callable[[Tensor, int, bool], Tensor] = scan.repeat_heads  # x[T, H, D], times, tiled
    decays: Callable[[Tensor], Tensor] = scan.decays
    step_sizes: Callable[[Tensor, Tensor, float, float], Tensor] = scan.step_sizes
    delta_gates: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = scan.delta_gates
    mamba2_scan: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Any, Tensor], tuple[Tensor, Any]] = (
        scan.mamba2_scan
    )
    selective_scan: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Any, Tensor], tuple[Tensor, Any]] = (
        scan.selective_scan
    )
    gated_delta: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Any, Tensor, float], tuple[Tensor, Any]] = (
        scan.gated_delta
    )
    # Sparse attention's indexer: q[T, H, D], keys[L, D], weights[T, H] -> [T, L]; scores, lengths[T], k -> int32 [T, k]
    index_scores: Callable[[Tensor, Tensor, Tensor], Tensor] = models.index_scores
    topk_indices: Callable[[Tensor, Tensor, int], Tensor] = models.topk_indices

    # Put a weight that was prepared anew into the memory of the old one: True if it is there now, and every recorded
    # step sees it. None: weights that are not tensors move when they are updated.
    refill: Callable[[Any, Any], bool] | None = None
    # weight, parts, type -> what puts new values into the weight's memory in one pass, when it is called; the parts are
    # read at once, and are not to change before. None, or a result of None: prepare it anew, and `refill`.
    rewriting: Callable[[Any, Sequence[WeightSource], torch.dtype], Callable[[], None] | None] | None = None
    # The memory that a prepared weight's values lie in, and nothing else's, as rows of bytes. None: it is a tensor.
    memory: Callable[[Any], list[Tensor]] | None = None
    # Make anew what was kept of a bias in another type: the tensor itself has been overwritten.
    renew: Callable[[Any], None] | None = None
