"""Decoders whose layers each read an input of their own, made of the tokens and their embeddings (Gemma 3n and 4).

Legend: T packed tokens, N hidden size, H the size of a layer's own input, R rows whose next token is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from phloem.core.errors import ModelLoadError
from phloem.layers.embed import Embedding
from phloem.layers.linear import Linear
from phloem.layers.norm import RMSNorm
from phloem.layers.weight import Layer
from phloem.models._common import Decoder, layer_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.layers.context import BuildContext, ForwardBatch
    from phloem.models._common import DecoderConfig
    from phloem.models._layer import Place


_OWN = ("k_proj", "v_proj", "k_norm", "v_norm")


class OwnInputs(Layer):
    """What each layer is given: rows of a table of the tokens, and a projection of their embeddings, normalised."""

    def __init__(self, ctx: BuildContext, layers: int, size: int, rows: int, vocab_size: int, place: Place) -> None:
        wide, hidden_size = layers * size, place.hidden_size
        self.ops, self.shape, self.last = ctx.ops, (layers, size), rows if rows < vocab_size else 0
        self.table = Embedding(ctx.child("embed_tokens_per_layer"), rows, wide, size**0.5)
        self.projection = Linear(ctx, hidden_size, {"per_layer_model_projection": wide})
        self.norm = RMSNorm(ctx.child("per_layer_projection_norm"), size, place.eps)
        self.scale = hidden_size**-0.5

    def __call__(self, ids_T: Tensor, x_TN: Tensor) -> Tensor:
        """[T, layers, H]."""
        # Only the last tokens of the vocabulary, which stand for other media, have no row.
        ids_T = ids_T.masked_fill(ids_T >= self.last, 0) if self.last else ids_T
        made = self.ops.scale(self.projection(x_TN)[0], self.scale).unflatten(-1, self.shape)
        return self.ops.scale(self.ops.add(self.norm(made), self.table(ids_T).unflatten(-1, self.shape)), 0.5**0.5)


class OwnInput(Layer):
    """What one layer makes of its input: norm(up(gelu(gate(x)) * input))."""

    def __init__(self, ctx: BuildContext, size: int, place: Place) -> None:
        self.ops = ctx.ops
        self.gate = Linear(ctx, place.hidden_size, {"per_layer_input_gate": size})
        self.up = Linear(ctx, size, {"per_layer_projection": place.hidden_size})
        self.norm = RMSNorm(ctx.child("post_per_layer_input_norm"), place.hidden_size, place.eps)

    def __call__(self, x_TN: Tensor, input_TH: Tensor) -> Tensor:
        gated = self.ops.mul(self.ops.gelu_tanh(self.gate(x_TN)[0]), input_TH)
        return self.norm(self.up(gated)[0])


@runtime_checkable
class InputLayer(Protocol):
    """A layer that closes with its own input."""

    def attend(self, x_TN: Tensor, residual_TN: Tensor | None, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        """As `DecoderLayer`."""
        ...

    def close(self, out: Tensor, rest: Tensor, input_TH: Tensor | None) -> Tensor:
        """From what `attend` gave to what the next layer is given."""
        ...


class InputDecoder(Decoder):
    """A decoder of such layers. `size` 0: they have no input of their own."""

    def __init__(
        self, ctx: BuildContext, config: DecoderConfig, max_positions: int, size: int, rows: int, place: Place
    ) -> None:
        # Before the weights are counted.
        self.size, self.late_residual = size, size > 0
        count, vocab = len(config.layers), config.vocab_size
        self.inputs = OwnInputs(ctx.child("model"), count, size, rows, vocab, place) if size else None
        super().__init__(ctx, config, max_positions)
        self.closing = [layer for layer in self.layers if isinstance(layer, InputLayer)]
        assert len(self.closing) == count, "a layer that does not close with its own input"

    def checkpoint_name(self, name: str) -> str | None:
        found = super().checkpoint_name(name)
        if found is None or not any(f".self_attn.{part}." in found for part in _OWN):
            return found
        # Files may still hold what layers that read another's keys do not use.
        number = layer_number(found)
        spec = self.layers[number].attention if 0 <= number < len(self.layers) else None
        return found if spec is None or spec.writes else None

    def begin(self, x_TN: Tensor) -> Tensor:
        """What the first layer is given, of embeddings."""
        return x_TN

    def end(self, x: Tensor) -> Tensor:
        """Hidden states [R, N] before the last norm, of what the last layer gave."""
        return x

    def trunk(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        self.adapt(step)
        x_TN = self.embed(step.input_ids)
        if step.embeds is not None:
            index, rows = step.embeds
            x_TN.index_copy_(0, index, rows.to(x_TN.dtype))
        inputs = None if self.inputs is None else self.inputs(step.input_ids, x_TN)
        x = self.begin(x_TN)
        for number, layer in enumerate(self.closing[:-1]):
            out, rest = layer.attend(x, None, step)
            x = layer.close(out, rest, None if inputs is None else inputs[:, number])
        out, rest = self.closing[-1].attend(x, None, step)
        return out, rest if inputs is None else self.ops.join(rest, inputs[:, -1])

    def finish(self, out: Tensor, residual_TN: Tensor, keep_L: Tensor | None) -> Tensor:
        if keep_L is not None:
            out, residual_TN = self.ops.select_rows(out, keep_L), self.ops.select_rows(residual_TN, keep_L)
        rest, own = (residual_TN[:, : -self.size], residual_TN[:, -self.size :]) if self.size else (residual_TN, None)
        return self.norm(self.end(self.closing[-1].close(out, rest, own)))


def sources(kinds: Sequence[str], shared: int) -> list[int | None]:
    """Of each layer, whose keys and values it reads: the last `shared` ones those of the last layer of their kind
    before them. Raises ModelLoadError where there is none."""
    first = len(kinds) - shared
    found: list[int | None] = [None] * first
    for kind in kinds[first:]:
        before = [number for number in range(first) if kinds[number] == kind]
        if not before:
            raise ModelLoadError(f"num_kv_shared_layers {shared}: no layer before them is of kind {kind!r}")
        found.append(before[-1])
    return found
