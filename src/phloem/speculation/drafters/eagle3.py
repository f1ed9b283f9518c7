"""EAGLE-3 heads, as chains: one layer over the next token's embedding and three states from within the model.

`d2t` holds distances: token = own id + d2t[own id]. Layer ids in `eagle_config` are those of the layers' outputs, as
trainers count them, unless they can only be inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.engine.drafts.drafting import Loaded, extend
from phloem.models._draft import AuxTap, Eagle3, Eagle3Facts, Shared
from phloem.speculation.capture import aux_layers
from phloem.speculation.drafters._base import Loader as Base
from phloem.speculation.drafters._files import (
    PARAM,
    check_head,
    check_layers,
    check_no_block,
    decoder_of,
    draft_of,
    head_context,
    ids_of,
    shapes_of,
)

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.speculation import Wanted
    from phloem.layers.context import BuildContext
    from phloem.models import Model

_OLD_NORMS = {f"aux_norm_{what}.weight": f"fc_norm.{at}.weight" for at, what in enumerate(("low", "mid", "high"))}
_MAPS = ("d2t", "t2d")


def layers_read(config: dict[str, Any], count: int) -> tuple[tuple[int, ...], str]:
    """(The layers whose input is read, where that is known from), for a model of `count` layers. Raises ConfigError."""
    said: Any = config.get("eagle_config") or {}
    if not isinstance(said, dict):
        raise ConfigError(f"eagle_config is {said!r:.60}, expected an object", param=PARAM)
    if said.get("use_aux_hidden_state") is False:
        raise ConfigError("eagle_config: a head that reads no auxiliary states is not an EAGLE-3 head", param=PARAM)
    ids = said.get("eagle_aux_hidden_state_layer_ids") or config.get("eagle_aux_hidden_state_layer_ids")
    if not ids:
        return aux_layers(count), "the usual ones"
    if not isinstance(ids, list | tuple) or not all(type(number) is int for number in ids):
        raise ConfigError(f"eagle_aux_hidden_state_layer_ids is {ids!r:.60}, expected a list of layers", param=PARAM)
    found = tuple(ids)
    inputs = found == aux_layers(count) or max(found) >= count
    layers = found if inputs else tuple(number + 1 for number in found)
    if len(layers) != 3 or not all(0 <= number < count for number in layers):
        raise ConfigError(f"eagle_aux_hidden_state_layer_ids {list(ids)} of a model of {count} layers", param=PARAM)
    return layers, f"eagle_aux_hidden_state_layer_ids {list(ids)}, taken for {'inputs' if inputs else 'outputs'}"


class Drafter(Base):
    shift = 1

    def __init__(self, wanted: Wanted, target: Checkpoint) -> None:
        self.draft, self.target, self.vocab = draft_of(wanted), target, target.vocab_size
        self.shapes = {_OLD_NORMS.get(name, name): shape for name, shape in shapes_of(self.draft).items()}
        check_no_block(self.shapes, self.draft)
        check_head(self.shapes, self.draft, target, 3, "EAGLE-3")
        check_layers(self.shapes, self.draft)
        self.layers, self.why = layers_read(self.draft.config, int(target.config["num_hidden_layers"]))
        self.facts = self._facts()

    def _facts(self) -> Eagle3Facts:
        config, shapes, path = self.draft.config, self.shapes, self.draft.path
        for name in ("norm_before_fc", "norm_before_residual"):
            if config.get(name) or (name == "norm_before_fc" and "input_norm.weight" in shapes):
                raise ConfigError(f"{path}: {name} is not known here", param=PARAM)
        own = shapes["lm_head.weight"][0] if "lm_head.weight" in shapes else 0
        said = config.get("draft_vocab_size")
        if said and own and said != own:
            raise ConfigError(f"{path}: draft_vocab_size is {said}, but lm_head has {own} rows", param=PARAM)
        if said and not own and said != self.vocab:
            raise ConfigError(f"{path}: draft_vocab_size is {said}, but there is no lm_head", param=PARAM)
        if own and own != self.vocab and shapes.get("d2t") != (own,):
            raise ConfigError(
                f"{path}: {own} tokens of its own for the {self.vocab} of the model, and no d2t of that length",
                param=PARAM,
            )
        for known in (int(config.get("vocab_size", self.vocab)), shapes.get("t2d", (self.vocab,))[0]):
            if known != self.vocab:
                raise ConfigError(f"{path}: it was made for a vocabulary of {known}, not of {self.vocab}", param=PARAM)
        norms, carry = "fc_norm.0.weight" in shapes, bool(config.get("norm_output")) and "fc_norm.0.weight" in shapes
        return Eagle3Facts(own, "embed_tokens.weight" in shapes, norms, "fc.bias" in shapes, carry)

    def load(self, model: Model, ctx: BuildContext, positions: int) -> Loaded:
        target = decoder_of(model)
        own = head_context(ctx, self.target)
        head = Eagle3(own, Shared(target, positions), self.draft.config, self.facts)
        head.load(self.draft, own, _name)
        if "d2t" in self.shapes and self.facts.vocab:
            head.ids_D = ids_of(self.draft, self.facts.vocab, self.vocab).to(ctx.device)
        first = extend(target.memory, head.memory)
        target.tap = AuxTap(first, self.layers, head.fuse)
        said = f"{self.facts.vocab} of {self.vocab} tokens" if self.facts.vocab else "the model's own head"
        why = f"{self.draft.name}: reads what enters layers {', '.join(map(str, self.layers))} ({self.why}); {said}"
        return Loaded(head, first, True, Decision("speculative_draft", "eagle3", why))


def _name(name: str) -> str | None:
    bare = name.removeprefix("model.")
    bare = _OLD_NORMS.get(bare, bare)
    if bare.startswith("layers.0."):
        bare = "midlayer." + bare.removeprefix("layers.0.")
    return None if bare in _MAPS else bare
