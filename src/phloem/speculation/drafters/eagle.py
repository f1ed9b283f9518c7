"""EAGLE and EAGLE-2 heads, as chains: one layer over the next token's embedding and the model's last state.

The model's embedding and its head serve; a copy of the embedding in the file is not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.engine.drafts.drafting import Loaded, extend
from phloem.models._draft import Eagle, LastTap, Shared
from phloem.speculation.drafters._base import Loader as Base
from phloem.speculation.drafters._files import (
    check_head,
    check_layers,
    check_no_block,
    decoder_of,
    draft_of,
    head_context,
    shapes_of,
)
from phloem.speculation.token_map import read_token_map

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.speculation import Wanted
    from phloem.layers.context import BuildContext
    from phloem.models import Model

MAP = "speculative_token_map"


def _name(name: str) -> str | None:
    bare = name.removeprefix("model.")
    return None if bare in ("embed_tokens.weight", "lm_head.weight") else bare


class Drafter(Base):
    shift = 1

    def __init__(self, wanted: Wanted, target: Checkpoint) -> None:
        self.draft, self.target = draft_of(wanted), target
        self.shapes = shapes_of(self.draft)
        check_no_block(self.shapes, self.draft)
        check_head(self.shapes, self.draft, target, 2, "EAGLE")
        check_layers(self.shapes, self.draft)
        given = wanted.token_map
        self.ids_D = None if given is None else read_token_map(Path(given), target.vocab_size, MAP)

    def load(self, model: Model, ctx: BuildContext, positions: int) -> Loaded:
        target = decoder_of(model)
        own = head_context(ctx, self.target)
        made, hot = dict[str, Tensor](), 0
        if self.ids_D is not None:
            if target.head.bias is not None:
                raise ConfigError(f"{MAP}: the model's head has a bias, which is not cut", param=MAP)
            made, hot = {"lm_head.weight": target.get_weight(target.head.weight.names[0])[self.ids_D]}, len(self.ids_D)
        head = Eagle(own, Shared(target, positions), self.draft.config, bias="fc.bias" in self.shapes, hot=hot)
        head.load(self.draft, own, _name, made)
        head.ids_D = None if self.ids_D is None else self.ids_D.to(ctx.device)
        first = extend(target.memory, head.memory)
        target.tap = LastTap(first)
        why = f"{self.draft.name}: reads what the model's head reads, and shares its embedding and head"
        if self.ids_D is not None:
            why += f"; says {len(self.ids_D)} of {target.vocab_size} tokens"
        return Loaded(head, first, True, Decision("speculative_draft", "eagle", why))
