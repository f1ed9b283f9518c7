"""Vectors and labels of texts: a body without its language head, pooling, and what stands behind it.

Legend: T packed tokens, R texts, N hidden size, D numbers of a result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from phloem.core.errors import ConfigError, ModelLoadError
from phloem.layers.linear import Linear
from phloem.layers.norm import LayerNorm
from phloem.layers.weight import Layer
from phloem.models import FAMILIES
from phloem.models._common import Decoder
from phloem.models._encoder import Encoder
from phloem.models._index import WeightIndex, open_sources
from phloem.models._sources import GGUFSource
from phloem.models._stored import ALL_HEADS, MASKED_HEADS, check_surplus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.checkpoint.gguf_reader import GGUFFile
    from phloem.checkpoint.pooling import Dense, Judge, Pooling
    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.models._encoder import HeadKind
    from phloem.models._index import Progress

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}


def _act(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTS:
        raise ModelLoadError(f"pooler_hidden_act: {name!r} is not served; known: {', '.join(_ACTS)}")
    return _ACTS[name]


class SequenceHead(Layer):
    """A classifier of texts: perhaps a dense layer, then a number for each label. `kind` None: a decoder's."""

    def __init__(
        self, ctx: BuildContext, size: int, labels: int, kind: HeadKind | None, config: dict[str, Any]
    ) -> None:
        self.dense: Linear | None = None
        self.norm: LayerNorm | None = None
        self.act = torch.tanh
        if kind in ("pooler", "context"):
            self.dense = Linear(ctx, size, {"pooler.dense": size}, bias=True)
            self.act = _act(str(config.get("pooler_hidden_act", "gelu"))) if kind == "context" else torch.tanh
        elif kind == "dense":
            self.dense = Linear(ctx, size, {"classifier.dense": size}, bias=True)
        elif kind == "pre":
            self.dense, self.act = Linear(ctx, size, {"pre_classifier": size}, bias=True), F.relu
        elif kind == "norm":
            self.dense = Linear(ctx, size, {"head.dense": size}, bias=bool(config.get("classifier_bias", False)))
            self.act = _ACTS[str(config.get("classifier_activation", "gelu"))]
            shift = bool(config.get("norm_bias", False))
            self.norm = LayerNorm(ctx.child("head.norm"), size, float(config.get("norm_eps", 1e-5)), bias=shift)
        name = {None: "score", "dense": "classifier.out_proj"}.get(kind, "classifier")
        self.out = Linear(ctx, size, {name: labels}, bias=kind is not None)

    def __call__(self, x_RN: Tensor) -> Tensor:
        """[R, N] -> float32 [R, labels]."""
        if self.dense is not None:
            x_RN = self.act(self.dense(x_RN)[0])
        if self.norm is not None:
            x_RN = self.norm(x_RN)
        return self.out(x_RN)[0].float()


class TokenHead(Layer):
    """A classifier over every token's state."""

    def __init__(
        self, ctx: BuildContext, size: int, labels: int, kind: HeadKind | None, config: dict[str, Any]
    ) -> None:
        self.inner = SequenceHead(ctx, size, labels, kind, config) if kind == "norm" else None
        name = "score" if kind is None else "classifier"
        self.out = Linear(ctx, size, {name: labels}, bias=True) if self.inner is None else None

    def __call__(self, x_TN: Tensor) -> Tensor:
        """[T, N] -> float32 [T, labels]."""
        if self.inner is not None:
            return self.inner(x_TN)
        assert self.out is not None  # one of the two
        return self.out(x_TN)[0].float()


class PooledModel(Layer):
    """What a text becomes: a vector, a number, or numbers for its labels."""

    def __init__(self, body: Decoder | Encoder, pooling: Pooling, ctx: BuildContext, config: dict[str, Any]) -> None:
        self.body, self.pooling, self.device = body, pooling, ctx.device
        kind = body.config.head if isinstance(body, Encoder) else None
        self.head: SequenceHead | TokenHead | None = None
        self.verdict: Tensor | None = None  # [1, N]: how the head's row of "yes" differs from that of "no"
        if pooling.task != "embed" and pooling.judge is None:
            make = TokenHead if pooling.task == "tokens" else SequenceHead
            self.head = make(ctx, body.hidden_size, len(pooling.labels), kind, config)
        self.dense: list[tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]] = []
        unused = {id(slot) for slot in body.head.weights()} if isinstance(body, Decoder) else set[int]()
        unused = unused - {id(body.embed.weight)} if pooling.judge is None else set[int]()
        slots = [slot for slot in self.weights() if id(slot) not in unused]
        self.index = WeightIndex(slots, ctx, body.embed.weight.names[0])

    @property
    def weight_bytes(self) -> int:
        return self.index.nbytes

    def load(self, checkpoint: Checkpoint, progress: Progress | None) -> None:
        """Read every weight. Raises ModelLoadError."""
        sources, unused = open_sources(checkpoint, self.index, self._name)
        behind = {dense.tensor for dense in self.pooling.dense}
        unused = [name for name in unused if name not in behind]
        check_surplus(checkpoint, unused, ALL_HEADS if self.head is None else MASKED_HEADS)
        self.index.pull(sources, str(checkpoint.path), progress)
        if self.pooling.judge is not None:
            self.verdict = self._verdict(self.pooling.judge)
        dummy = checkpoint.format == "dummy"
        self.dense = [_read_dense(dense, self.device, dummy, checkpoint.gguf) for dense in self.pooling.dense]
        if checkpoint.gguf is not None:
            checkpoint.gguf.release()

    def _verdict(self, judge: Judge) -> Tensor:
        body = self.body
        assert isinstance(body, Decoder)
        ids = torch.tensor([judge.yes, judge.no], device=self.device)
        yes, no = body.ops.embedding(ids, body.head.weight.value, 1.0).float()
        return (yes - no)[None] * body.head.scale

    def _name(self, name: str) -> str | None:
        ours = self.body.checkpoint_name(name)
        if self.head is None and ours is not None and ours.startswith("pooler."):
            return None  # BERT's, which no vector of a text is made by
        return ours

    def forward(self, step: ForwardBatch, lengths: Sequence[int]) -> Tensor:
        """float32 [R, D], or [T, D] for labels of tokens; `lengths`: of the R texts, whose tokens are the step's T."""
        kinds = self.pooling.kinds
        if isinstance(self.head, TokenHead):
            return self.head(self.body.forward(replace(step, logit_index=None)))
        if kinds in (("cls",), ("last",)):
            ends = torch.tensor(lengths).cumsum(0)
            at = ends - 1 if kinds == ("last",) else ends - torch.tensor(lengths)
            x_RN = self.body.forward(replace(step, logit_index=at.to(self.device)))
        else:
            x_TN = self.body.forward(replace(step, logit_index=None)).float()
            x_RN = torch.stack([_pooled(part, kinds) for part in x_TN.split(list(lengths))])
        if self.head is not None:
            return self.head(x_RN.to(self._dtype(x_RN)))
        x_RN = x_RN.float()
        if self.verdict is not None:
            return x_RN @ self.verdict.T
        for weight, bias, act in self.dense:
            x_RN = act(F.linear(x_RN, weight, bias))
        return x_RN

    def _dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype if self.pooling.kinds in (("cls",), ("last",)) else self.index.ctx.dtype


def _pooled(x_LN: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """One text's states -> [N], or several joined."""
    found: list[Tensor] = []
    for kind in kinds:
        if kind == "cls":
            found.append(x_LN[0])
        elif kind == "last":
            found.append(x_LN[-1])
        elif kind == "max":
            found.append(x_LN.amax(0))
        elif kind == "mean":
            found.append(x_LN.mean(0))
        elif kind == "mean_sqrt_len":
            found.append(x_LN.sum(0) / len(x_LN) ** 0.5)
        else:
            weights_L = torch.arange(1, len(x_LN) + 1, dtype=x_LN.dtype, device=x_LN.device)
            found.append(weights_L @ x_LN / weights_L.sum())
    return found[0] if len(found) == 1 else torch.cat(found)


def _read_dense(
    dense: Dense, device: torch.device, dummy: bool, gguf: GGUFFile | None
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if dummy:
        return torch.randn(dense.outputs, dense.inputs, device=device), None, _ACTS[dense.activation]
    if gguf is not None and dense.tensor:
        stored = gguf.tensors[dense.tensor]
        source = GGUFSource(dense.tensor, stored.shape, stored.kind, tensor=stored)
        return source.take(None, torch.float32).to(device), None, _ACTS[dense.activation]
    path = dense.folder / "model.safetensors"
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        hint = " (a pickle lies there: convert it to safetensors)" if list(dense.folder.glob("*.bin")) else ""
        raise ModelLoadError(f"{path}: {error}{hint}") from None
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None or tuple(weight.shape) != (dense.outputs, dense.inputs) or (bias is None) == dense.bias:
        raise ModelLoadError(f"{path}: expected linear.weight [{dense.outputs}, {dense.inputs}], bias {dense.bias}")
    moved = weight.float().to(device), None if bias is None else bias.float().to(device)
    return *moved, _ACTS[dense.activation]


def load_pooled(checkpoint: Checkpoint, ctx: BuildContext, progress: Progress | None = None) -> PooledModel:
    """Build the model of a checkpoint that does not generate, and read its weights.

    Raises:
        ConfigError: the family cannot be served so.
        ModelLoadError: naming the file and the tensors that are missing or have another shape.
    """
    assert checkpoint.pooling is not None
    ctx = replace(ctx, name="")
    body: Any = FAMILIES.get(checkpoint.model_type)(checkpoint.config, ctx, checkpoint.context_length)
    if not isinstance(body, Decoder | Encoder):
        raise ConfigError(f"task {checkpoint.pooling.task}: {checkpoint.model_type} is served for generation alone")
    if checkpoint.pooling.judge is not None and isinstance(body, Decoder) and (body.head.softcap or body.head.bias):
        raise ConfigError("task score: a head with a soft cap or a bias is not read for yes and no", param="task")
    model = PooledModel(body, checkpoint.pooling, ctx, checkpoint.config)
    model.load(checkpoint, progress)
    return model
