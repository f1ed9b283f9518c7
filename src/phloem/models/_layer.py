"""What a decoder's layer is made of: a mixer, a feed-forward block, and where their norms stand.

A `LayerKind` holds makers. The usual ones are here; a family may hand over its own, as long as what they make has the
two interfaces below. Legend: T packed tokens, N hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar, runtime_checkable

from phloem.core.errors import ModelLoadError
from phloem.layers.attention import AttentionOptions, SelfAttention
from phloem.layers.context import AttentionSpec
from phloem.layers.dispatch import Dispatched
from phloem.layers.grouped import Gathered, Resting
from phloem.layers.latent import Indexer, IndexSizes, LatentAttention, LatentSizes
from phloem.layers.mlp import GatedMLP, PlainMLP
from phloem.layers.moe import SharedExperts, SparseMLP
from phloem.layers.norm import AnyNorm, BareLayerNorm, LayerNorm, RMSNorm
from phloem.layers.rope import Rope, RopeSpec
from phloem.layers.weight import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.memory import MemorySpec
    from phloem.layers.attention import QGrowth
    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.layers.moe import ExpertsConfig


Sizes = TypeVar("Sizes")

# rms: root mean square; layer: layer norm with a bias; layer-without-bias; layer-weightless: with neither.
NormKind = Literal["rms", "layer", "layer-without-bias", "layer-weightless"]


@dataclass
class Place:
    """What a maker is told of the decoder that its layer stands in."""

    hidden_size: int
    eps: float  # of norms
    norm_shift: float
    max_positions: int
    pool: int = 0  # the pool index that a layer's memory gets, if it keeps any
    norms: NormKind = "rms"
    ropes: dict[RopeSpec, Rope] = field(default_factory=dict)
    indexer: Indexer | None = None  # of the last layer that has one

    def norm(self, ctx: BuildContext) -> AnyNorm:
        """A norm of hidden states."""
        if self.norms == "rms":
            return RMSNorm(ctx, self.hidden_size, self.eps, self.norm_shift)
        if self.norms == "layer-weightless":
            return BareLayerNorm(ctx, self.hidden_size, self.eps)
        return LayerNorm(ctx, self.hidden_size, self.eps, self.norm_shift, bias=self.norms == "layer")

    def rope(self, ctx: BuildContext, spec: RopeSpec) -> Rope:
        """The table of a rotation, shared by all layers that turn alike."""
        if spec not in self.ropes:
            self.ropes[spec] = Rope(ctx, spec, self.max_positions)
        return self.ropes[spec]


class Output(Protocol):
    """The projection behind a mixer: x W^T, with `add` plus the residual, as `Linear` gives it."""

    def __call__(self, x_TN: Tensor, /, *, add: Tensor | None = None) -> tuple[Tensor, Tensor | None]: ...


class Mixer(Protocol):
    """What mixes tokens with those before them: attention, or a recurrent layer."""

    @property
    def out(self) -> Output: ...

    @property
    def memory(self) -> MemorySpec | tuple[MemorySpec, ...] | None:
        """What it keeps of its tokens: of the pool index that it was given, and with several of those behind it. None:
        nothing, or it reads what another layer keeps."""
        ...

    def attend(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch, /
    ) -> tuple[Tensor, Tensor]:
        """Everything before the output projection, of norm(x + residual): ([T, features], x + residual)."""
        ...


@runtime_checkable
class Attends(Protocol):
    """A mixer that attends over keys and values."""

    spec: AttentionSpec


class Feed(Protocol):
    """A feed-forward block, row by row."""

    def __call__(
        self, norm: AnyNorm | None, x_TN: Tensor, residual_TN: Tensor | None, /, *, add: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The block of norm(x + residual), and x + residual; with `add` perhaps already summed: (sum, None). Without
        norm there is no residual either: the block of x, and x."""
        ...


MakeMixer = Callable[["BuildContext", Place], Mixer]
MakeFeed = Callable[["BuildContext", Place], Feed]


@dataclass(frozen=True)
class Attention:
    """Makes a `SelfAttention`. Sizes are the whole model's."""

    heads: int
    kv_heads: int
    head_size: int
    rope: RopeSpec | None
    window: int = 0  # 0: full attention
    scale: float = 0.0  # of attention logits; 0: head_size ** -0.5
    softcap: float = 0.0
    value_size: int = 0
    options: AttentionOptions = field(default_factory=AttentionOptions)
    name: str = "self_attn"
    causal: bool = True
    chunk: int = 0  # attends only inside its own chunk of so many positions; 0: no chunks
    block: int = 0  # sees to the end of its own block of so many positions; 0: up to itself
    source: int | None = None  # the pool index of the layer whose keys and values it reads; it has none of its own

    def __call__(self, ctx: BuildContext, place: Place) -> SelfAttention:
        spec = AttentionSpec(
            pool=place.pool if self.source is None else self.source,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            scale=self.scale or self.head_size**-0.5,
            window=self.window,
            softcap=self.softcap,
            sinks=bool(self.options.sinks),
            value_size=self.value_size,
            writes=self.source is None,
            causal=self.causal,
            # Where no text is longer than a chunk, the layer is a plain one, which every backend serves.
            chunk=self.chunk if self.chunk < place.max_positions else 0,
            block=self.block,
        )
        rope = None if self.rope is None else place.rope(ctx, self.rope)
        own = ctx.child(self.name) if self.name else ctx
        layer = SelfAttention(own, spec, place.hidden_size, rope, self.options)
        if self.options.q_growth is not None:
            layer.growth = self.options.q_growth.table(place.max_positions).to(ctx.device)
        return layer


@dataclass(frozen=True)
class Latents:
    """Makes a `LatentAttention`."""

    sizes: LatentSizes
    rope: RopeSpec | None
    scale: float
    name: str = "self_attn"
    index: IndexSizes | None = None  # a layer that chooses what it attends to
    index_rope: RopeSpec | None = None
    borrows: bool = False  # the choice of the last layer before it that made one
    q_growth: QGrowth | None = None

    def __call__(self, ctx: BuildContext, place: Place) -> LatentAttention:
        rope, own = None if self.rope is None else place.rope(ctx, self.rope), ctx.child(self.name)
        layer = LatentAttention(own, place.hidden_size, self.sizes, place.pool, self.scale, rope)
        if self.q_growth is not None:
            layer.growth = self.q_growth.table(place.max_positions).to(ctx.device)
        if self.borrows:
            if place.indexer is None:
                raise ModelLoadError("indexer_types: a layer takes over a choice, but none before it makes one")
            layer.lender = place.indexer
        elif self.index is not None and self.index_rope is not None:
            ranks = place.hidden_size, self.sizes.q_rank
            turned = place.rope(ctx, self.index_rope)
            layer.indexer = Indexer(own.child("indexer"), *ranks, self.index, place.pool + 1, turned)
            place.indexer = layer.indexer
        return layer


@dataclass(frozen=True)
class Recurrent(Generic[Sizes]):
    """Makes a mixer of `layers/recurrent.py` of its sizes."""

    kind: Callable[[BuildContext, int, int, Sizes], Mixer]  # context, hidden size, pool index, sizes
    sizes: Sizes
    name: str

    def __call__(self, ctx: BuildContext, place: Place) -> Mixer:
        return self.kind(ctx.child(self.name), place.hidden_size, place.pool, self.sizes)


@dataclass(frozen=True)
class MLP:
    """Makes a `GatedMLP`."""

    inner_size: int
    activation: str = "silu"
    bias: bool = False
    fused: str = ""  # the tensor that a checkpoint keeps gate and up in
    name: str = "mlp"
    down: str = "down_proj"
    up_first: bool = False  # in that tensor
    down_bias: bool | None = None  # None: as the others

    def __call__(self, ctx: BuildContext, place: Place) -> GatedMLP:
        return GatedMLP(
            ctx.child(self.name),
            place.hidden_size,
            self.inner_size,
            self.activation,
            bias=self.bias,
            fused=self.fused,
            down=self.down,
            up_first=self.up_first,
            down_bias=self.down_bias,
        )


@dataclass(frozen=True)
class Plain:
    """Makes a `PlainMLP`."""

    inner_size: int
    activation: str
    bias: bool = False
    names: tuple[str, str] = ("up_proj", "down_proj")
    transposed: bool = False
    name: str = "mlp"

    def __call__(self, ctx: BuildContext, place: Place) -> PlainMLP:
        sizes = place.hidden_size, self.inner_size
        own = ctx.child(self.name) if self.name else ctx
        return PlainMLP(own, *sizes, self.activation, bias=self.bias, names=self.names, transposed=self.transposed)


@dataclass(frozen=True)
class Experts:
    """Makes a `SparseMLP`, or with `shared` a `SharedExperts`, whose dense part lies below the block's name."""

    config: ExpertsConfig
    name: str = "mlp"
    shared: MLP | Plain | None = None
    shared_gate: str = ""

    def __call__(self, ctx: BuildContext, place: Place) -> SparseMLP | SharedExperts:
        sparse, ctx = self.sparse(ctx, place), ctx.child(self.name)
        if self.shared is None:
            return sparse
        return SharedExperts(ctx, place.hidden_size, sparse, self.shared(ctx, place), self.shared_gate)

    def sparse(self, ctx: BuildContext, place: Place) -> SparseMLP:
        """The sparse block alone."""
        return SparseMLP(ctx.child(self.name), place.hidden_size, self.config)


# pre: before attention and before the MLP. post: behind both, before the residual is added (OLMo 2). sandwich: before
# and behind both (Gemma). sum: of the sums with the residual, which go on normalised (BERT). parallel: one norm, of
# which attention and MLP both read (Cohere), or one for each (GPT-NeoX). alone: a layer is a mixer or a feed-forward
# block, behind one norm (Mamba, Nemotron H).
Norms = Literal["pre", "post", "sandwich", "sum", "parallel", "alone"]
_NORM_NAMES: dict[Norms, tuple[str, ...]] = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
    "sum": ("attention_norm", "output_norm"),
    "parallel": ("input_layernorm",),
    "alone": ("norm",),
}  # fmt: skip


@dataclass(frozen=True)
class LayerKind:
    """What one layer is made of; where its norms are `alone`, of a mixer or of a feed-forward block."""

    mixer: MakeMixer | None
    feed: MakeFeed | None
    norms: Norms = "pre"
    norm_names: tuple[str, ...] = ()  # where a checkpoint calls them otherwise; the first "": there is none
    residual_scale: float = 1.0  # of what mixer and feed-forward add to the residual

    def make(self, ctx: BuildContext, place: Place) -> DecoderLayer:
        if self.mixer is None:
            return FeedAlone(ctx, self, place)
        return MixerAlone(ctx, self, place) if self.feed is None else _LAYERS[self.norms](ctx, self, place)


def _mixer(ctx: BuildContext, make: MakeMixer, place: Place) -> Mixer:
    """A mixer, which may have no rows where groups of ranks attend to their own."""
    mixer = make(ctx, place)
    return mixer if ctx.rows is None else Resting(mixer, place.hidden_size)


def feed_of(ctx: BuildContext, make: MakeFeed, place: Place) -> Feed:
    """A feed-forward block, of all ranks wherever each attends to rows of its own."""
    block = make(ctx.everywhere(), place)
    if ctx.rows is None:
        return block
    if ctx.rows.dispatch and isinstance(block, SharedExperts) and isinstance(block.sparse, SparseMLP):
        # Experts and what stands beside them meet in rows of this rank.
        block.sparse, block.dense = Dispatched(ctx.rows, block.sparse), Gathered(ctx.rows, block.dense)
        return block
    if ctx.rows.dispatch and isinstance(block, SparseMLP):
        return Dispatched(ctx.rows, block)
    return Gathered(ctx.rows, block)


class DecoderLayer(Layer):
    """Blocks with their norms. Takes and gives (what the last block computed, residual), or their sum and None."""

    def __init__(self, ctx: BuildContext, kind: LayerKind, place: Place) -> None:
        self.ops, self.residual_scale = ctx.ops, kind.residual_scale
        names = kind.norm_names or _NORM_NAMES[kind.norms]
        self.norms = [place.norm(ctx.child(name)) for name in names if name]

    @property
    def memory(self) -> tuple[MemorySpec, ...]:
        """What it keeps of its tokens, by pool index."""
        return ()

    @property
    def attention(self) -> AttentionSpec | None:
        """None: it does not attend over keys and values."""
        return None

    def attend(self, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Up to and with the mixer: (its output [T, features], residual)."""
        raise NotImplementedError

    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the mixer's output on, row by row."""
        raise NotImplementedError

    def scaled(self, x_TN: Tensor) -> Tensor:
        return x_TN if self.residual_scale == 1.0 else self.ops.scale(x_TN, self.residual_scale)


class MixerAlone(DecoderLayer):
    """A mixer behind a norm."""

    def __init__(self, ctx: BuildContext, kind: LayerKind, place: Place) -> None:
        super().__init__(ctx, kind, place)
        assert kind.mixer is not None
        self.mixer = _mixer(ctx, kind.mixer, place)

    @property
    def memory(self) -> tuple[MemorySpec, ...]:
        kept = self.mixer.memory
        return kept if isinstance(kept, tuple) else () if kept is None else (kept,)

    @property
    def attention(self) -> AttentionSpec | None:
        mixer = self.mixer.mixer if isinstance(self.mixer, Resting) else self.mixer
        return mixer.spec if isinstance(mixer, Attends) else None

    def attend(self, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        return self.mixer.attend(self.norms[0], x_TN, residual_TN, step)

    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.mixer.out(out, add=residual_TN)


class FeedAlone(DecoderLayer):
    """A feed-forward block behind a norm."""

    def __init__(self, ctx: BuildContext, kind: LayerKind, place: Place) -> None:
        super().__init__(ctx, kind, place)
        assert kind.feed is not None
        self.mlp = feed_of(ctx, kind.feed, place)

    def attend(self, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        total_TN = x_TN if residual_TN is None else self.ops.add(x_TN, residual_TN)
        return total_TN, total_TN

    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.mlp(self.norms[0], residual_TN, None, add=True)


class BlockPair(MixerAlone):
    """Mixer and feed-forward."""

    def __init__(self, ctx: BuildContext, kind: LayerKind, place: Place) -> None:
        super().__init__(ctx, kind, place)
        assert kind.feed is not None
        bare = kind.norms in ("post", "sum") or kind.norm_names[:1] == ("",)
        self.input_norm: AnyNorm | None = None if bare else self.norms[0]
        self.mlp = feed_of(ctx, kind.feed, place)

    def attend(self, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        return self.mixer.attend(self.input_norm, x_TN, residual_TN, step)


class PreNorms(BlockPair):
    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.residual_scale == 1.0:
            out, rest_TN = self.mixer.out(out, add=residual_TN)
            return self.mlp(self.norms[-1], out, rest_TN, add=True)
        out, rest_TN = self.mlp(self.norms[-1], self.scaled(self.mixer.out(out)[0]), residual_TN, add=False)
        return self.scaled(out), rest_TN


class PostNorms(BlockPair):
    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        after, last = self.norms
        total_TN = self.ops.add(self.scaled(after(self.mixer.out(out)[0])), residual_TN)
        out, _ = self.mlp(None, total_TN, None, add=False)
        return self.scaled(last(out)), total_TN


class SumNorms(BlockPair):
    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        attended, last = self.norms
        x_TN, _ = attended.add(*self.mixer.out(out, add=residual_TN))
        return last.add(*self.mlp(None, x_TN, None, add=True))[0], None


class SandwichNorms(BlockPair):
    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        _, after, before, last = self.norms
        out = self.scaled(after(self.mixer.out(out)[0]))
        out, total_TN = self.mlp(before, out, residual_TN, add=False)
        return self.scaled(last(out)), total_TN


class ParallelNorm(BlockPair):
    def feed(self, out: Tensor, residual_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        # The norm is computed once more: the rows that stay are few where it matters, behind the last layer's mixer.
        fed, total_TN = self.mlp(self.norms[-1], residual_TN, None, add=False)
        return self.scaled(self.ops.add(self.mixer.out(out)[0], fed)), total_TN


_LAYERS: dict[Norms, type[BlockPair]] = {
    "pre": PreNorms, "post": PostNorms, "sandwich": SandwichNorms, "sum": SumNorms, "parallel": ParallelNorm
}  # fmt: skip
