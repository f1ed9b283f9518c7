"""EAGLE and EAGLE-2 heads, as chains: one layer over the next token's embedding and the model's last state.

The model's embedding and its head serve; a copy of the embedding in the file is not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.core.resolve import Decision
from phloem.engine.drafting import Loaded, extend
from phloem.models._draft import Eagle, LastTap, Shared
from phloem.speculation.drafters._base import Loader as Base
from phloem.speculation.drafters._files import check_head, check_layers, decoder_of, draft_of, head_context, shapes_of

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.speculation import Wanted
    from phloem.layers.context import BuildContext
    from phloem.models import Model


def _name(name: str) -> str | None:
    bare = name.removeprefix("model.")
    return None if bare in ("embed_tokens.weight", "lm_head.weight") else bare


class Drafter(Base):
    shift = 1

    def __init__(self, wanted: Wanted, target: Checkpoint) -> None:
        self.draft, self.target = draft_of(wanted), target
        self.shapes = shapes_of(self.draft)
        check_head(self.shapes, self.draft, target, 2, "EAGLE")
        check_layers(self.shapes, self.draft)

    def load(self, model: Model, ctx: BuildContext, positions: int) -> Loaded:
        target = decoder_of(model)
        own = head_context(ctx, self.target)
        head = Eagle(own, Shared(target, positions), self.draft.config, bias="fc.bias" in self.shapes)
        head.load(self.draft, own, _name)
        first = extend(target.memory, head.memory)
        target.tap = LastTap(first)
        why = f"{self.draft.name}: reads what the model's head reads, and shares its embedding and head"
        return Loaded(head, first, lambda: head.carried, Decision("speculative_draft", "eagle", why))
