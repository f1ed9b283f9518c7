"""The process that compiles kernels beside the loading (`engine.warmup.ahead`), for an engine whose drafts may come
from a model: that model's kernels are among them.

    python -m phloem.speculation.ahead < plan.json
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.core.resolve import Decision
from phloem.core.speculation import Wanted
from phloem.engine.drafts.drafting import Loaded, extend
from phloem.engine.warmup import ahead
from phloem.models import build_model
from phloem.models._narrowed import load_forms
from phloem.quant import method_for
from phloem.speculation.capture import aux_layers
from phloem.speculation.drafters import loader
from phloem.speculation.drafters._files import decoder_of
from phloem.speculation.drafters.draft_model import Drafter as DraftModel
from phloem.speculation.drafters.eagle3 import Drafter as Eagle3

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.layers.context import BuildContext
    from phloem.models import Model


def drafts(plan: ahead.Plan, checkpoint: Checkpoint, model: Model, ctx: BuildContext) -> Loaded | None:
    """The model that drafts, by the headers of its files and without its values."""
    if plan.drafting is None:
        return None
    wanted = Wanted(**plan.drafting)
    whole = replace(checkpoint, config=plan.config, format="safetensors" if plan.files else "dummy")
    made: Any = loader(wanted.algorithm)(wanted, whole)
    if isinstance(made, DraftModel) and made.draft.stored is not None:
        return _narrow(made.draft, model, ctx, plan.context)
    made.draft = replace(made.draft, format="dummy", gguf=None, stored=None)
    if isinstance(made, Eagle3):  # reads three layers of the model, which may have fewer here
        try:
            made.layers = aux_layers(int(checkpoint.config["num_hidden_layers"]))
        except ValueError as error:
            raise ModelLoadError(str(error)) from None
    return made.load(model, ctx, plan.context)


def _narrow(draft: Checkpoint, model: Model, ctx: BuildContext, positions: int) -> Loaded:
    """A quantised model that drafts, in the forms in which the table keeps its weights."""
    target, narrow = decoder_of(model), replace(ctx, quant=method_for(None, draft.stored))
    own = decoder_of(build_model(draft.model_type, draft.config, narrow, positions))
    load_forms(own, draft)
    first = extend(target.memory, own.memory)
    # pyrefly: ignore[bad-argument-type] - a head is callable
    return Loaded(own, first, False, Decision("speculative_draft", "draft_model", "narrow"))


if __name__ == "__main__":
    sys.exit(ahead.main(drafts))
