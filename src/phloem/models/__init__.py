"""Model families: the file name is the `model_type`.

A family's file has `build(config, ctx, max_positions) -> Model` and facts as literals (`checkpoint/families.py`).
Importing this package imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from phloem.core.errors import ModelLoadError
from phloem.quant import method_for
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.media import Media
    from phloem.core.memory import MemorySpec
    from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch, Pack


class Body(Protocol):
    """What all families make: hidden states of tokens."""

    attention_specs: list[AttentionSpec]
    vocab_size: int
    hidden_size: int

    def forward(self, step: ForwardBatch) -> Tensor:
        """Hidden states [L, hidden_size] of the rows `step.logit_index` (None: all), final norm applied."""
        ...

    def checkpoint_name(self, name: str, /) -> str | None:
        """Our name of a tensor in a safetensors file; None: knowingly left out."""
        ...


class Model(Protocol):
    """What the engine knows of a model that generates."""

    attention_specs: list[AttentionSpec]
    memory: list[MemorySpec]  # by pool index
    vocab_size: int
    hidden_size: int

    @property
    def weight_bytes(self) -> int: ...

    def forward(self, step: ForwardBatch) -> Tensor:
        """Hidden states [L, hidden_size] of the rows `step.logit_index` (None: all), final norm applied."""
        ...

    def head(self, hidden_LD: Tensor, /) -> Tensor:
        """float32 logits [L, vocab_size]."""
        ...

    def greedy(self, hidden_LD: Tensor, /) -> Tensor:
        """The most likely token of each row, integer [L]; no logits are kept."""
        ...

    def best(
        self, hidden_LD: Tensor, k: int, scale_LJ: Tensor | None, norms: int, /
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The k largest logits of each row [L, k], their ids int32, and the log-sum-exp of the row times each scale
        [L, norms], without the rows; None where the device's ops cannot."""
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> bool: ...

    def checkpoint_name(self, name: str, /) -> str | None:
        """Our name of a tensor in a safetensors file; None: knowingly left out."""
        ...

    def weight_names(self) -> list[str]: ...

    def get_weight(self, name: str, rows: int | None = None, /) -> Tensor:
        """A tensor as its checkpoint would hold it, or its first rows (a copy)."""
        ...


class Tower(Protocol):
    """What makes embeddings of pictures, where a model takes any."""

    token: int  # stands for a picture's tokens
    turns: bool  # tokens have places in time, height and width
    whole: bool  # the tokens of a picture see each other both ways, and are computed in one step
    hidden_size: int  # of the model
    parts: int  # of an embedding, each as wide as the model

    def encode(self, items: Sequence[Media], pack: Pack, /) -> list[Tensor]:
        """[tokens, hidden_size] of each picture, or a multiple of it: see `ForwardBatch.deep`."""
        ...


class Loadable(Model, Protocol):
    """A model that reads its weights."""

    def load(self, checkpoint: Checkpoint, progress: Callable[[str, float], None] | None, /) -> None: ...


class Family(Protocol):
    """What a family's file has: how its model is made of a checkpoint's `config.json`, without weights."""

    def __call__(self, config: dict[str, Any], ctx: BuildContext, max_positions: int, /) -> Body: ...


FAMILIES: Registry[Family] = Registry("phloem.models", "model type", "build")


@runtime_checkable
class CutModel(Protocol):
    """A model whose forward pass is `conclude(step, *trunk(step))`, so that the part whose rows differ from step to
    step, behind the last layer's mixer, stands alone."""

    late_residual: bool  # some of the residual is computed behind the last mixer

    def trunk(self, step: ForwardBatch, /) -> tuple[Tensor, Tensor]:
        """(The last mixer's output [T, features], residual [T, hidden_size])."""
        ...

    def conclude(self, step: ForwardBatch, out: Tensor, residual_TN: Tensor, /) -> Tensor:
        """Hidden states [L, hidden_size] of the rows `step.logit_index` (None: all), final norm applied."""
        ...


@runtime_checkable
class Conditioned(Protocol):
    """A model that fills canvases which are drawn anew: what a pass made likely is read by the next one.

    The tokens of a step's `embeds` are those of canvases, whose weights may differ from the text's.
    """

    hidden_size: int

    def condition(self, ids_n: Tensor, soft_nN: Tensor, /) -> Tensor:
        """Embeddings [n, N] of canvases' tokens, with what `soften` gave for them at the pass before, or zeros."""
        ...

    def head(self, hidden_LD: Tensor, /) -> Tensor:
        """As `Model.head`."""
        ...

    def soften(self, weights_nV: Tensor, /) -> Tensor:
        """The mean embedding [n, N] of the tokens with these weights, float32."""
        ...


@runtime_checkable
class HearingModel(Protocol):
    """A model whose tokens attend to what it hears: a layer of `core.memory.Cross` for each entry of `encode`."""

    hears: tuple[int, int]  # mel bands and frames of what it hears at a time

    def encode(self, mel_nBF: Tensor, pack: Pack, /) -> Iterable[tuple[int, Tensor, Tensor]]:
        """Of n audios' features: for each layer its pool index, and its keys and values [n, positions, K, D]."""
        ...

    def forward(self, step: ForwardBatch) -> Tensor:
        """As `Model`."""
        ...


def build_model(model_type: str, config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Loadable:
    """A family's model without its weights; of one that generates. Raises ModelLoadError for a setting that is
    missing."""
    family = FAMILIES.get(model_type)
    try:
        built: Any = family(config, ctx, max_positions)
    except KeyError as error:
        if not isinstance(key := error.args[0], str) or key in config:
            raise
        raise ModelLoadError(f"config.json: {key} is missing or null, which {model_type} needs") from error
    return built


def load_model(
    checkpoint: Checkpoint,
    ctx: BuildContext,
    progress: Callable[[str, float], None] | None = None,
    cut: Callable[[Loadable], None] | None = None,
) -> Model:
    """Build a checkpoint's model and read its weights.

    Args:
        checkpoint: from `utils.checkpoint.describe`; its `context_length` sizes the tables of positions.
        ctx: the op table, the type of the weights, the device, and how quantised weights are read (None: as the
            checkpoint says).
        progress: called with ("weights", share read so far), from the calling thread.
        cut: called with the model before its weights are read: what it leaves out is not. It may raise ConfigError.

    Raises:
        ModelLoadError: naming the file and the tensors that are missing or have another shape.
    """
    if checkpoint.pooling is not None:
        raise ModelLoadError(f"{checkpoint.path}: a model for {checkpoint.pooling.task} does not generate")
    if checkpoint.chosen.impl != "phloem":
        raise ModelLoadError(f"{checkpoint.path}: the code of {checkpoint.model_type} is transformers' (load_foreign)")
    if ctx.quant is None:
        ctx = replace(ctx, quant=method_for(None, checkpoint.stored))
    model = build_model(checkpoint.model_type, checkpoint.config, replace(ctx, name=""), checkpoint.context_length)
    if cut is not None:
        cut(model)
    model.load(checkpoint, progress)
    return model
