"""A small model of the same vocabulary that drafts for a large one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from phloem import models
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.core.resolve import Decision
from phloem.engine.drafts.drafting import Loaded, extend
from phloem.models._common import Decoder
from phloem.quant import method_for
from phloem.speculation.drafters._base import Loader as Base
from phloem.speculation.drafters._files import PARAM, decoder_of, draft_of
from phloem.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.speculation import Wanted
    from phloem.layers.context import BuildContext
    from phloem.models import Model


def check_vocabulary(draft: Checkpoint, target: Checkpoint) -> str:
    """That both have the same tokens; what was compared. Raises ConfigError with the first difference."""
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"{draft.path}: a vocabulary of {draft.vocab_size} tokens, and the model's has {target.vocab_size}",
            param=PARAM,
        )
    try:
        ours, theirs = (load_tokenizer(one) for one in (target, draft))
    except (ConfigError, ModelLoadError) as error:
        return f"vocabularies of one size, whose tokens could not be compared ({error.message})"
    counts = ours.vocab_size, theirs.vocab_size
    for token in range(min(*counts, target.vocab_size)):
        mine, other = ours.token_text(token), theirs.token_text(token)
        if mine != other:
            raise ConfigError(
                f"{draft.path}: token {token} is {other!r}, and {mine!r} in the model's vocabulary: it would draft "
                "other texts than it means",
                param=PARAM,
            )
    if counts[0] != counts[1]:
        raise ConfigError(f"{draft.path}: {counts[1]} tokens have a text, and {counts[0]} of the model's", param=PARAM)
    return "the same vocabulary, token by token"


class Drafter(Base):
    shift = 0

    def __init__(self, wanted: Wanted, target: Checkpoint) -> None:
        self.draft = draft_of(wanted)
        if any(part in name for part in ("Eagle", "DFlash", "DSpark") for name in self.draft.architectures):
            raise ConfigError(
                f"{self.draft.path}: {self.draft.architectures[0]} is a head, not a model: speculative_algorithm "
                "EAGLE, EAGLE3 or DFLASH runs it",
                param="speculative_algorithm",
            )
        if self.draft.chosen.impl != "phloem":
            raise ConfigError(f"{self.draft.path}: a model that drafts runs by our own code alone", param=PARAM)
        self.compared = check_vocabulary(self.draft, target)

    def load(self, model: Model, ctx: BuildContext, positions: int) -> Loaded:
        target = decoder_of(model)
        # Tables of positions as long as the texts: what it was not trained for it may still guess.
        draft = replace(self.draft, context_length=positions)
        own = models.load_model(draft, replace(ctx, quant=method_for(None, draft.stored)))
        if not isinstance(own, Decoder):
            raise ConfigError(f"{draft.path}: a model that drafts runs by our own code alone", param=PARAM)
        first = extend(target.memory, own.memory)
        short = draft.context_length > self.draft.context_length
        more = f"; trained for {self.draft.context_length} positions of {positions}" if short else ""
        decision = Decision("speculative_draft", "draft_model", f"{draft.name}: {self.compared}{more}")
        return Loaded(own, first, False, decision)
