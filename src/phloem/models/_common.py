"""The usual decoder, made of the layers that a family's file says. Defaults are read from config.json by `usual`.

Legend: T packed tokens, N hidden size, L rows whose next token is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.core.memory import State
from phloem.layers.attention import AttentionOptions
from phloem.layers.embed import Embedding, Head, Positions
from phloem.layers.rope import rope_spec
from phloem.layers.weight import Layer
from phloem.models._index import WeightIndex, open_sources
from phloem.models._layer import MLP, Attention, LayerKind, Place
from phloem.models._push import Push
from phloem.models._stage import stage_of
from phloem.models._stored import check_surplus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.memory import MemorySpec
    from phloem.distributed.mesh import Axis
    from phloem.layers.context import Adapted, AttentionSpec, BuildContext, ForwardBatch, Tap
    from phloem.layers.rows import Rows
    from phloem.layers.weight import Weight
    from phloem.models import Tower
    from phloem.models._index import Progress
    from phloem.models._layer import NormKind
    from phloem.models._stage import Stage


@dataclass(frozen=True)
class DecoderConfig:
    """What stands around the layers, and the layers."""

    vocab_size: int
    hidden_size: int
    eps: float
    layers: tuple[LayerKind, ...]
    tied: bool = False  # the head is the embedding
    norm_shift: float = 0.0
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    norms: NormKind = "rms"
    norm_name: str = "norm"  # of the last one
    head_bias: bool = False
    positions: tuple[int, int] | None = None  # a learned table of positions: its rows, and that of position 0


def usual(config: dict[str, Any], **differences: Any) -> DecoderConfig:
    """A `DecoderConfig` from config.json, with what the family says otherwise; all layers usual unless it says them."""
    base = DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        eps=float(config.get("rms_norm_eps", 1e-6)),
        layers=(),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
    if "layers" not in differences:
        differences["layers"] = (usual_layer(config),) * config["num_hidden_layers"]
    return replace(base, **differences)


def usual_layer(config: dict[str, Any], **differences: Any) -> LayerKind:
    """Attention and a gated MLP as config.json describes them. `differences` are those of `usual_attention`."""
    return LayerKind(usual_attention(config, **differences), usual_mlp(config))


def usual_attention(config: dict[str, Any], **differences: Any) -> Attention:
    """An `Attention` from config.json; fields of `Attention` and of `AttentionOptions` say what differs."""
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    bias = bool(config.get("attention_bias", False))
    own = {name: differences.pop(name) for name in list(differences) if name in _ATTENTION}
    options = AttentionOptions(
        qkv_bias=bias,
        out_bias=bool(config.get("attention_out_bias", bias)),
        eps=float(config.get("rms_norm_eps", 1e-6)),
    )
    rope = own.pop("rope") if "rope" in own else rope_spec(config, head_size)
    kv_heads = config.get("num_key_value_heads") or heads
    base = Attention(heads, kv_heads, head_size, rope, options=replace(options, **differences))
    return replace(base, **own)


def usual_mlp(config: dict[str, Any], **differences: Any) -> MLP:
    """An `MLP` from config.json."""
    inner = differences["inner_size"] if "inner_size" in differences else config["intermediate_size"]
    base = MLP(inner, config.get("hidden_act", "silu"), bool(config.get("mlp_bias", False)))
    return replace(base, **differences)


_ATTENTION = tuple(Attention.__dataclass_fields__)


def each_layer(config: dict[str, Any], make: Callable[[int], LayerKind]) -> tuple[LayerKind, ...]:
    """One kind for each layer's number; equal kinds are made once."""
    return tuple(make(number) for number in range(config["num_hidden_layers"]))


def layer_types(config: dict[str, Any], sliding: list[bool]) -> list[bool]:
    """Whether each layer attends in a window: from `layer_types` if the checkpoint has it, else `sliding`."""
    named = config.get("layer_types")
    if not named:
        return sliding
    if not isinstance(named, list) or not all(isinstance(kind, str) for kind in named):
        raise ModelLoadError(f"layer_types is {named!r:.60}, expected a list of names")
    unknown = sorted(set(named) - {"sliding_attention", "full_attention"})
    if unknown or len(named) != len(sliding):
        raise ModelLoadError(f"layer_types: {len(named)} entries for {len(sliding)} layers, unknown: {unknown}")
    return [kind == "sliding_attention" for kind in named]


def renamed(name: str, prefixes: dict[str, str]) -> str | None:
    """`name` with the first of `prefixes` that it begins with replaced; None: it begins with none of them."""
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


_TOWERS = (
    *("vision_tower.", "vision_model.", "visual.", "audio_tower."),
    *("multi_modal_projector.", "connector.", "embed_vision.", "embed_audio.", "aligner."),
)


def language_part(name: str) -> str | None:
    """The name that a tensor of a language model among towers has by itself; None: it is a tower's."""
    bare = name.removeprefix("model.")
    if bare.startswith(_TOWERS):
        return None
    # `model.language_model.` and `language_model.model.` are two ages of the same files.
    for inner in ("language_model.", "text_model."):
        if bare != name and bare.startswith(inner):
            return "model." + bare.removeprefix(inner)
    return name.removeprefix("language_model.")


def layer_number(name: str) -> int:
    """Of which layer a tensor is, by its name in a file; -1: of none."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit() else -1


class Decoder(Layer):
    """A causal language model over the op table of its context."""

    tower: Tower | None = None  # what makes embeddings of pictures
    bytes_read = 0  # of the checkpoint's files
    adapted: Adapted | None = None  # what layers with adapters look at; None: none are served
    tap: Tap | None = None  # what else reads hidden states
    late_residual = False  # as `models.CutModel`

    def __init__(self, ctx: BuildContext, config: DecoderConfig, max_positions: int) -> None:
        self.config = config
        self.stage: Stage | None = None  # of several: what this rank has
        self.ops, self.aside, self.rows = ctx.ops, ctx.aside, ctx.rows
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        sizes = config.hidden_size, config.eps, config.norm_shift, max_positions
        body, place = ctx.child("model"), Place(*sizes, norms=config.norms)
        self.embed = Embedding(body.child("embed_tokens"), config.vocab_size, config.hidden_size, config.embed_scale)
        self.positions: Positions | None = None
        if config.positions is not None:
            self.positions = Positions(body.child("embed_positions"), config.hidden_size, *config.positions)
        self.layers = []
        self.memory: list[MemorySpec] = []
        self.pools: list[range] = []  # of each layer: the pool indexes of what it keeps
        for number, kind in enumerate(config.layers):
            place.pool = len(self.memory)
            layer = kind.make(body.child("layers").child(number), place)
            self.memory += layer.memory
            self.pools.append(range(place.pool, len(self.memory)))
            self.layers.append(layer)
        specs = [layer.attention for layer in self.layers]
        self.attention_specs: list[AttentionSpec] = [spec for spec in specs if spec is not None]
        self.norm = place.norm(body.child(config.norm_name))
        self.head = Head(
            ctx.child("lm_head"),
            config.vocab_size,
            config.hidden_size,
            self.embed if config.tied else None,
            config.logit_softcap,
            config.logit_scale,
            bias=config.head_bias,
        )
        own = type(self)
        if self.rows is not None and (own.trunk is not Decoder.trunk or own.finish is not Decoder.finish):
            why = "layers of this model read more than what the one before gives"
            raise ModelLoadError(f"{self.rows.option}: {why}")
        if self.rows is not None and self.rows.context:
            self._refuse_in_parts(self.rows)
        if ctx.mesh.pp.size > 1:
            self.stage = self._stage(ctx.mesh.pp, self.pools)
        elsewhere = () if self.stage is None else self.stage.elsewhere
        self.index = WeightIndex(self.weights(), ctx, self.embed.weight.names[0], elsewhere)

    def _refuse_in_parts(self, rows: Rows) -> None:
        """Raises ModelLoadError where tokens of one prompt cannot be computed by different ranks at the same time."""
        specs = self.attention_specs
        reasons = {
            "recurrent layers take the tokens of a prompt in one after the other": any(
                isinstance(one, State) for one in self.memory
            ),
            "tokens attend to later ones": any(spec.block or not spec.causal for spec in specs),
        }
        why = next((reason for reason, found in reasons.items() if found), "")
        if why:
            raise ModelLoadError(f"{rows.option}: {why}")

    def _stage(self, axis: Axis, pools: list[range]) -> Stage:
        own = type(self)
        if own.trunk is not Decoder.trunk or own.finish is not Decoder.finish or own.forward is not Decoder.forward:
            raise ModelLoadError(f"pp_size {axis.size}: every layer of this model reads what the first stage makes")
        return stage_of(self, axis, pools)

    def weights(self) -> Iterator[Weight]:
        """Every slot that this rank has."""
        stage = self.stage
        return (slot for slot in super().weights() if stage is None or id(slot) not in stage.away)

    def forward(self, step: ForwardBatch) -> Tensor:
        """Hidden states [L, hidden_size] of the rows `step.logit_index`, final norm applied; `head` takes them."""
        return self.conclude(step, *self.trunk(step))

    def conclude(self, step: ForwardBatch, out: Tensor, residual_TN: Tensor) -> Tensor:
        """What `forward` gives, from what `trunk` gave."""
        self.adapt(step, wanted=True)
        if self.tap is None or not self.tap.last:
            return self.finish(out, residual_TN, step.logit_index)
        hidden_TN = self.finish(out, residual_TN, None)
        self.tap.behind(step, hidden_TN)
        # Once more for the rows that are wanted: a product of fewer rows may have other bits.
        return hidden_TN if step.logit_index is None else self.finish(out, residual_TN, step.logit_index)

    def trunk(self, step: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Up to and with the last layer's mixer: (its output [T, features], residual [T, N])."""
        x_TN, residual_TN = self.enter(step), None
        seen: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layers[:-1]):
            self._look(seen, number, x_TN, residual_TN)
            # In two calls under the same names: what a layer was given is not kept through its MLP, the largest part.
            x_TN, residual_TN = layer.attend(x_TN, residual_TN, step)
            x_TN, residual_TN = layer.feed(x_TN, residual_TN)
            if step.deep is not None and step.embeds is not None and number < len(step.deep):
                x_TN.index_add_(0, step.embeds[0], step.deep[number].to(x_TN.dtype))
        self._look(seen, len(self.layers) - 1, x_TN, residual_TN)
        if self.tap is not None and self.tap.layers:
            self.tap.before(step, [seen[number] for number in self.tap.layers])
        return self.layers[-1].attend(x_TN, residual_TN, step)

    def _look(self, seen: dict[int, Tensor], number: int, x_TN: Tensor, residual_TN: Tensor | None) -> None:
        """Keep the residual stream before this layer, where somebody reads it."""
        if self.tap is not None and number in self.tap.layers:
            seen[number] = x_TN if residual_TN is None else self.ops.add(x_TN, residual_TN)

    def adapt(self, step: ForwardBatch, *, wanted: bool = False) -> None:
        """From here on layers with adapters look at those of the step's tokens, or of its wanted rows."""
        if self.adapted is not None:
            self.adapted.index = None if step.adapters is None else step.adapters[wanted]

    def enter(self, step: ForwardBatch) -> Tensor:
        """What the first layer is given, [T, N]."""
        self.adapt(step)
        x_TN = self.embed(step.input_ids)
        if step.embeds is not None:  # torch arithmetic: such a step is never recorded
            index, rows = step.embeds
            x_TN.index_copy_(0, index, rows.to(x_TN.dtype))
        return x_TN if self.positions is None else self.positions.add(x_TN, step.positions)

    def finish(self, out: Tensor, residual_TN: Tensor, keep_L: Tensor | None) -> Tensor:
        """Hidden states of the rows `keep_L` alone (None: all), from what `trunk` gave."""
        if keep_L is not None:
            out, residual_TN = self.ops.select_rows(out, keep_L), self.ops.select_rows(residual_TN, keep_L)
        if self.rows is not None and keep_L is not None:
            self.rows.narrow()
        if self.aside is not None:
            self.aside.keep(keep_L)
        return self.norm.add(*self.layers[-1].feed(out, residual_TN))[0]

    def greedy(self, hidden_LD: Tensor) -> Tensor:
        """The most likely token of each row, integer [L]."""
        return self.head.argmax(hidden_LD)

    def best(
        self, hidden_LD: Tensor, k: int, scale_LJ: Tensor | None, norms: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The k largest logits of each row, their ids and log-sum-exps; see `Head.best`."""
        return self.head.best(hidden_LD, k, scale_LJ, norms)

    @property
    def weight_bytes(self) -> int:
        return self.index.nbytes

    def weight_names(self) -> list[str]:
        """Checkpoint names of every tensor that `update_weights` takes."""
        return self.index.names()

    def get_weight(self, name: str, rows: int | None = None) -> Tensor:
        """The tensor as a checkpoint would hold it, or its first rows; out of a packed weight, dequantised.

        Raises:
            ModelLoadError: if there is no tensor of that name.
        """
        return self.index.get(name, rows)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        """Replace tensors by checkpoint name, between steps. True if a weight moved in memory, so that recorded
        steps are stale.

        Raises:
            ModelLoadError: for an unknown name or a wrong shape; nothing has been changed then.
        """
        push = Push(self.index, self.checkpoint_name)
        push.add(tensors)
        push.prepare()
        moved = push.install()
        self.settle()
        return moved

    def settle(self) -> None:
        """Weights have changed: make again what is made of them. Most models keep nothing of the kind."""

    def checkpoint_name(self, name: str) -> str | None:
        """Our name of a tensor in a safetensors file; None: knowingly left out. A family with other names overrides."""
        return language_part(name)

    def load(self, checkpoint: Checkpoint, progress: Progress | None) -> None:
        """Read every weight. Raises ModelLoadError."""
        sources, unused = open_sources(checkpoint, self.index, self.checkpoint_name)
        check_surplus(checkpoint, unused)
        self.index.pull(sources, str(checkpoint.path), progress)
        self.bytes_read = sum(source.bytes_read for source in sources.values())
        if checkpoint.gguf is not None:
            checkpoint.gguf.release()  # the weights are packed: a second copy of them would stay resident


class Trunk(Decoder):
    """A decoder whose files may hold layers behind its last one, which draft and are not used here."""

    def checkpoint_name(self, name: str) -> str | None:
        found = language_part(name)
        return None if found is None or layer_number(found) >= len(self.layers) else found
