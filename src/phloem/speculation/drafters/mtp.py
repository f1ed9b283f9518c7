"""Multi-token prediction: the layer that a checkpoint brings beside its model, as chains (NEXTN).

With one such layer and several drafts it is applied to its own results.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.engine.drafts.drafting import Loaded, extend
from phloem.models._common import language_part
from phloem.models._draft import MTP, LastTap, MTPNames, Shared
from phloem.models._sources import shapes_in
from phloem.quant import method_for
from phloem.speculation.drafters._base import Loader as Base
from phloem.speculation.drafters._files import decoder_of, draft_of

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.speculation import Wanted
    from phloem.layers.context import BuildContext
    from phloem.models import Model

_USUAL = MTPNames("model.layers.{n}", "enorm", "hnorm", "eh_proj", "shared_head.norm")
_MIMO = MTPNames(
    "model.mtp_layers.0", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm",
    embed_first=False, blind_start=True,
)  # fmt: skip
_NEXT = MTPNames(
    "mtp", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm", layer="layers.0",
)  # fmt: skip
# By model type. Where the order of embedding and state differs, a wrong one drafts nothing right, and says nothing.
FAMILIES = {
    **dict.fromkeys(("deepseek_v3", "kimi_k2", "glm4_moe"), _USUAL),
    "mimo": _MIMO,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _NEXT),
}
_COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the model's own


class Drafter(Base):
    shift = 1

    def __init__(self, wanted: Wanted, target: Checkpoint) -> None:
        self.names = FAMILIES.get(target.model_type)
        if self.names is None:
            known = ", ".join(sorted(FAMILIES))
            raise ConfigError(
                f"multi-token prediction of {target.model_type} is not known here; known: {known}",
                param="speculative_algorithm",
            )
        self.draft = target if wanted.draft_model is None else draft_of(wanted)
        self.prefix = self.names.prefix.format(n=int(target.config["num_hidden_layers"])) + "."
        if self.draft.format == "dummy":
            return
        found = {name for path in self.draft.files for name in shapes_in(path)}
        if not any((language_part(name) or "").startswith(self.prefix) for name in found):
            raise ConfigError(
                f"{self.draft.path}: this checkpoint has no MTP layer ({self.prefix}*): converters often leave it out",
                param="speculative_algorithm",
            )

    def load(self, model: Model, ctx: BuildContext, positions: int) -> Loaded:
        target = decoder_of(model)
        assert self.names is not None
        # Who chose which experts is told of the model's own layers.
        own = replace(ctx, quant=method_for(None, self.draft.stored), chosen=None)
        head = MTP(own, Shared(target, positions), self.names)
        head.load(self.draft, own, self._name)
        first = extend(target.memory, head.memory)
        target.tap = LastTap(first)
        order = "embedding, then state" if self.names.embed_first else "state, then embedding"
        why = f"{self.prefix.rstrip('.')} of {self.draft.name}: reads {order}; the model's embedding and head"
        return Loaded(head, first, True, Decision("speculative_draft", "mtp", why))

    def _name(self, name: str) -> str | None:
        found = language_part(name)
        if found is None or not found.startswith(self.prefix) or found.removeprefix(self.prefix) in _COPIES:
            return None
        return found
