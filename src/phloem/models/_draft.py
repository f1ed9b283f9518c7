"""Heads that draft for a model: one layer over the embedding of the next token and a state of the model itself.

At position t a head reads the state that the model had there and the embedding of token t + 1, and so tells token
t + 2. Of states that the model has not computed yet its own results take the place: what a pass gives is what the next
one reads there, and what is told is made of it. Embedding and head are the model's where the file has none.

Legend: T packed tokens, N hidden size, L positions whose next token is wanted, V vocabulary, D the head's own one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.core.memory import Kept
from phloem.layers.embed import Embedding, Head
from phloem.layers.linear import Linear
from phloem.layers.norm import RMSNorm
from phloem.layers.weight import Cut, Layer, Weight
from phloem.models._common import usual_attention, usual_mlp
from phloem.models._index import WeightIndex, open_sources
from phloem.models._layer import LayerKind, Place, Recurrent
from phloem.models._sources import TensorSource
from phloem.models._stored import some

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.memory import MemorySpec
    from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch
    from phloem.models._common import Decoder


class _Index(WeightIndex):
    """Of a head, which may have no embedding that tells the activations' type."""

    def __init__(self, head: Layer, ctx: BuildContext, kind: torch.dtype) -> None:
        super().__init__(head.weights(), ctx, "embed_tokens.weight")
        self._kind = kind

    def _settle_biases(self) -> None:
        for weight in self.weights:
            if weight.role == "bias":
                weight.value = weight.value.to(self._kind)


@dataclass(frozen=True)
class Shared:
    """What a head has in common with its model. (No `Layer`: these weights are not the head's.)"""

    target: Decoder
    positions: int  # of a text, at most

    @property
    def kind(self) -> torch.dtype:
        """The activations' type."""
        ids = torch.zeros(1, dtype=torch.int64, device=self.target.index.ctx.device)
        return self.target.embed(ids).dtype


class DraftHead(Layer):
    """What all heads have. Its first memory is the state that it reads, written by the model's own steps."""

    shift = 1  # at a position it reads the token behind it
    late_residual = False  # as `models.CutModel`

    def __init__(self, ctx: BuildContext, shared: Shared) -> None:
        target = shared.target
        self.ops, self.shared, self.vocab_size = ctx.ops, shared, target.vocab_size
        self.hidden_size = target.hidden_size
        if self.hidden_size % 2:
            raise ModelLoadError(f"a hidden size of {self.hidden_size} is odd: its states cannot be kept by page")
        kept = "bfloat16" if ctx.ops.kv_dtypes is not None else str(ctx.dtype).removeprefix("torch.")
        self.memory: list[MemorySpec] = [Kept(self.hidden_size, kept)]
        self.attention_specs: list[AttentionSpec] = []
        self.embed: Embedding | None = None  # its own
        self.own_head: Head | None = None
        self.ids_D: Tensor | None = None  # the token of each of its own ids
        self.index: WeightIndex | None = None

    @property
    def weight_bytes(self) -> int:
        return 0 if self.index is None else self.index.nbytes

    def forward(self, step: ForwardBatch) -> Tensor:
        """What stands for the model's state at the next positions [L, N]; `head` reads it."""
        return self.conclude(step, *self.trunk(step))

    def trunk(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        """As `models.CutModel`."""
        raise NotImplementedError

    def conclude(self, step: ForwardBatch, out: Tensor, rest_TN: Tensor) -> Tensor:
        """As `models.CutModel`: what `forward` gives, from what `trunk` gave."""
        raise NotImplementedError

    def spoken(self, passed_LN: Tensor) -> Tensor:
        """What the weights of the head are multiplied with, of what a pass gave."""
        return passed_LN

    def inputs(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of the tokens and the states at their positions, [T, N] each."""
        embed_TN = (self.embed or self.shared.target.embed)(step.input_ids)
        return embed_TN, torch.cat(step.memory.kept(0), -1).to(embed_TN.dtype)

    def selected(self, step: ForwardBatch, *states: Tensor) -> tuple[Tensor, ...]:
        """The rows of the wanted positions."""
        keep_L = step.logit_index
        return states if keep_L is None else tuple(self.ops.select_rows(x_TN, keep_L) for x_TN in states)

    def head(self, hidden_LN: Tensor) -> Tensor:
        """float32 logits [L, V], -inf for tokens that it cannot say; of what a pass gave."""
        hidden_LN = self.spoken(hidden_LN)
        if self.own_head is None:
            return self.shared.target.head(hidden_LN)
        return self.spread(self.own_head(hidden_LN))

    def spread(self, logits_LD: Tensor) -> Tensor:
        """Logits of its own tokens over the model's [L, V]."""
        if self.ids_D is None:
            return logits_LD
        logits_LV = logits_LD.new_full((len(logits_LD), self.vocab_size), float("-inf"))
        return logits_LV.index_copy_(1, self.ids_D, logits_LD)

    def greedy(self, hidden_LN: Tensor) -> Tensor:
        """The most likely token of each row, int64 [L]; of what a pass gave."""
        best_L = (self.own_head or self.shared.target.head).argmax(self.spoken(hidden_LN)).long()
        return best_L if self.ids_D is None else self.ids_D[best_L]

    def load(
        self,
        checkpoint: Checkpoint,
        ctx: BuildContext,
        rename: Callable[[str], str | None],
        made: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Read every weight. `rename`: our name of a tensor in the file; None: knowingly left out. `made`: weights that
        come from elsewhere.

        Raises:
            ModelLoadError: naming tensors that are missing, of another shape, or not known here.
        """
        index = self.index = _Index(self, ctx, self.shared.kind)
        sources, unused = open_sources(checkpoint, index, rename)
        if unused:
            raise ModelLoadError(f"{checkpoint.path}: {len(unused)} tensors that no such head has: {some(unused)}")
        sources |= {name: TensorSource(name, tuple(one.shape), tensor=one) for name, one in (made or {}).items()}
        index.pull(sources, str(checkpoint.path), None)


class LastTap:
    """A `layers.context.Tap`: keeps what the model's head reads."""

    layers: tuple[int, ...] = ()
    last = True

    def __init__(self, pool: int) -> None:
        self._pool = pool

    def before(self, step: ForwardBatch, states: list[Tensor], /) -> None:
        """Nothing is asked for."""

    def behind(self, step: ForwardBatch, hidden_TN: Tensor, /) -> None:
        step.memory.keep(self._pool, hidden_TN)


class AuxTap:
    """A `layers.context.Tap`: keeps what a head makes of several layers' inputs."""

    last = False

    def __init__(self, pool: int, layers: tuple[int, ...], fuse: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self._pool, self.layers, self._fuse = pool, layers, fuse

    def before(self, step: ForwardBatch, states: list[Tensor], /) -> None:
        step.memory.keep(self._pool, self._fuse(states))

    def behind(self, step: ForwardBatch, hidden_TN: Tensor, /) -> None:
        """Nothing is asked for."""


class Eagle(DraftHead):
    """EAGLE and EAGLE-2 (Li et al. 2024): fc([embedding, state]) through a layer whose input is not normalised."""

    def __init__(self, ctx: BuildContext, shared: Shared, config: dict[str, Any], *, bias: bool, hot: int = 0) -> None:
        """`hot`: tokens that it says (FR-Spec, 2025), whose rows of the model's head it has; 0: all."""
        super().__init__(ctx, shared)
        size, target = self.hidden_size, shared.target
        if hot:
            self.own_head = Head(ctx.child("lm_head"), hot, size, None, target.head.softcap, target.head.scale)
        self.fc = Linear(ctx, 2 * size, {"fc": size}, bias=bias)
        kind = LayerKind(usual_attention(config), usual_mlp(config), norm_names=("", "post_attention_layernorm"))
        place = Place(size, float(config.get("rms_norm_eps", target.config.eps)), 0.0, shared.positions, pool=1)
        self.layer = kind.make(ctx.child("layers").child(0), place)
        self.memory += self.layer.memory
        self.attention_specs += [spec for spec in (self.layer.attention,) if spec is not None]

    def trunk(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        x_TN, _ = self.fc(self.ops.join(*self.inputs(step)))
        return self.layer.attend(x_TN, None, step)

    def conclude(self, step: ForwardBatch, out: Tensor, rest_TN: Tensor) -> Tensor:
        out, rest = self.layer.feed(*self.selected(step, out, rest_TN))
        return out if rest is None else self.ops.add(out, rest)


class Fuse(Layer):
    """fc([low, ..., high]) [T, m N] -> [T, N], each of the m states by itself; perhaps behind a norm of each."""

    def __init__(self, ctx: BuildContext, size: int, eps: float, *, norms: bool, bias: bool, count: int = 3) -> None:
        self.ops = ctx.ops
        self.parts = [
            Weight(("fc.weight",), ((size, count * size),), "matrix", cuts=((Cut(1, part, count),),))
            for part in range(count)
        ]
        self.bias = Weight(("fc.bias",), ((size,),), "bias") if bias else None
        self.norms = [RMSNorm(ctx.child(f"fc_norm.{part}"), size, eps) for part in range(count if norms else 0)]

    def __call__(self, states: Sequence[Tensor]) -> Tensor:
        if self.norms:
            states = [norm(x_TN) for norm, x_TN in zip(self.norms, states, strict=True)]
        total_TN = None
        for weight, x_TN in zip(self.parts, states, strict=True):
            bias = self.bias.value if self.bias is not None and total_TN is None else None
            out_TN, rest_TN = self.ops.linear(x_TN, weight.value, bias, add=total_TN)
            total_TN = out_TN if rest_TN is None else self.ops.add(out_TN, rest_TN)
        assert total_TN is not None
        return total_TN


@dataclass(frozen=True)
class Eagle3Facts:
    """What an EAGLE-3 file has."""

    vocab: int  # its own vocabulary; 0: the model's head is used
    embedding: bool  # its own
    norms: bool  # of the three states
    bias: bool  # of fc
    carry_norm: bool  # its normalised result goes on to the next position, not what the norm reads


class Eagle3(DraftHead):
    """EAGLE-3 (Li et al. 2025): attention over [norm(embedding), norm(g)], g = fc of three layers' inputs; the residual
    is g itself."""

    def __init__(self, ctx: BuildContext, shared: Shared, config: dict[str, Any], facts: Eagle3Facts) -> None:
        super().__init__(ctx, shared)
        size, eps = self.hidden_size, float(config.get("rms_norm_eps", 1e-6))
        body = ctx.child("midlayer")
        self.fuse = Fuse(ctx, size, eps, norms=facts.norms, bias=facts.bias)
        kind = usual_attention(config)
        self.mixer = kind(body, Place(2 * size, eps, 0.0, shared.positions, pool=1))
        width = kind.heads * kind.head_size
        self.mixer.out = Linear(body.child(kind.name), width, {"o_proj": size}, bias=kind.options.out_bias)
        place = Place(size, eps, 0.0, shared.positions)
        names = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
        self.norms = [place.norm(body.child(name)) for name in names]
        self.mlp = usual_mlp(config)(body, place)
        self.norm = place.norm(ctx.child("norm"))
        self.carry_norm = facts.carry_norm
        if self.mixer.memory is not None:
            self.memory.append(self.mixer.memory)
        self.attention_specs.append(self.mixer.spec)
        if facts.embedding:
            self.embed = Embedding(ctx.child("embed_tokens"), self.vocab_size, size)
        if facts.vocab:
            self.own_head = Head(ctx.child("lm_head"), facts.vocab, size, None)

    def trunk(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        hidden, first, _ = self.norms
        embed_TN, g_TN = self.inputs(step)
        out, _ = self.mixer.attend(None, self.ops.join(first(embed_TN), hidden(g_TN)), None, step)
        return out, g_TN

    def conclude(self, step: ForwardBatch, out: Tensor, rest_TN: Tensor) -> Tensor:
        out, g_LN = self.selected(step, out, rest_TN)
        out, rest = self.mixer.out(out, add=g_LN)
        out, rest = self.mlp(self.norms[-1], out, rest, add=True)
        if self.carry_norm:
            return self.norm.add(out, rest)[0]
        return out if rest is None else self.ops.add(out, rest)

    def spoken(self, passed_LN: Tensor) -> Tensor:
        return passed_LN if self.carry_norm else self.norm(passed_LN)


@dataclass(frozen=True)
class MTPNames:
    """How a family calls the parts of its multi-token-prediction layer, and what it joins in which order."""

    prefix: str  # of the layer, with `{n}` for the number of the model's layers
    embed_norm: str
    hidden_norm: str
    fuse: str
    norm: str  # of what the head reads
    embed_first: bool = True
    blind_start: bool = False  # the embedding counts as zeros at position 0
    layer: str = ""  # where the layer lies below the prefix, if not beside the others


def attending(layers: Sequence[LayerKind]) -> LayerKind:
    """The last kind that attends: such a layer keeps no recurrent state."""
    found = [kind for kind in layers if not isinstance(kind.mixer, Recurrent)]
    if not found:
        raise ModelLoadError("no layer of the model attends, and one that drafts does")
    return found[-1]


class MTP(DraftHead):
    """The layer that a checkpoint brings beside those of its model: fuse([norm(embedding), norm(state)]) through one
    more of them (DeepSeek-V3, 2024). Its own normalised result stands for the next state."""

    def __init__(self, ctx: BuildContext, shared: Shared, names: MTPNames) -> None:
        super().__init__(ctx, shared)
        config, size = shared.target.config, self.hidden_size
        own = ctx.child(names.prefix.format(n=len(config.layers)))
        place = Place(size, config.eps, config.norm_shift, shared.positions, pool=1, norms=config.norms)
        self.names = names
        self.enorm, self.hnorm = place.norm(own.child(names.embed_norm)), place.norm(own.child(names.hidden_norm))
        self.fuse = Linear(own, 2 * size, {names.fuse: size})
        body = own
        for part in names.layer.split(".") if names.layer else ():
            body = body.child(part)
        self.layer = attending(config.layers).make(body, place)
        self.norm = place.norm(own.child(names.norm))
        self.memory += self.layer.memory
        self.attention_specs += [spec for spec in (self.layer.attention,) if spec is not None]

    def trunk(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        embed_TN, state_TN = self.inputs(step)
        if self.names.blind_start:
            embed_TN = embed_TN.masked_fill((step.positions == 0).unsqueeze(-1), 0.0)
        both = self.enorm(embed_TN), self.hnorm(state_TN)
        x_TN, _ = self.fuse(self.ops.join(*(both if self.names.embed_first else both[::-1])))
        return self.layer.attend(x_TN, None, step)

    def conclude(self, step: ForwardBatch, out: Tensor, rest_TN: Tensor) -> Tensor:
        return self.norm.add(*self.layer.feed(*self.selected(step, out, rest_TN)))[0]
