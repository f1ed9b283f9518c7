"""What speculates around a runner, by the drafter that `engine.drafts.drafted` has decided on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError
from phloem.core.speculation import AUTO, MODELS, NONE
from phloem.engine.drafts.branches import TreeShape
from phloem.engine.drafts.drafted import MOST_ROWS, NAME, most_rows
from phloem.speculation.controller import Controller
from phloem.speculation.drafters import DRAFTERS, loader, of_texts
from phloem.speculation.modelled import ModelledRunner
from phloem.speculation.runner import SpeculativeRunner

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.batch import Runner
    from phloem.core.speculation import Wanted
    from phloem.engine.drafts.drafting import Beside, Loaded
    from phloem.engine.runner import ModelRunner
    from phloem.layers.context import BuildContext
    from phloem.models import Model


def check(wanted: Wanted) -> None:
    """What can be refused before anything is loaded. Raises ConfigError."""
    if wanted.algorithm not in (AUTO, NONE):
        try:
            DRAFTERS.check(wanted.algorithm)
        except ConfigError as error:
            known = ", ".join([AUTO, NONE, *DRAFTERS.names()])
            message = error.message.split("; known:")[0]
            raise ConfigError(f"{message}; known: {known}", param=NAME) from None


def beside(wanted: Wanted, checkpoint: Checkpoint) -> Beside | None:
    """What loads the model that drafts, if one was asked for.

    Raises:
        ConfigError: it does not fit the model of this checkpoint, as far as the files' headers tell.
        ModelLoadError: its checkpoint is missing something or is corrupt.
    """
    if wanted.algorithm not in MODELS:
        return None
    load = loader(wanted.algorithm)(wanted, checkpoint).load
    if wanted.topk == 1:
        return load
    shape = TreeShape(wanted.topk, wanted.steps, wanted.drafts, max(1 + wanted.drafts, MOST_ROWS))

    def branching(model: Model, ctx: BuildContext, positions: int) -> Loaded:
        return replace(load(model, ctx, positions), tree=shape)

    return branching


def around(wanted: Wanted, runner: ModelRunner, name: str, inner: Runner | None = None) -> Runner:
    """The runner, speculating with the drafter of that name. `inner`: of several ranks, the one around it that tells
    the others of each batch, with its drafts."""
    inner = runner if inner is None else inner
    if name == NONE:
        return inner
    loaded = runner.drafts
    if loaded is not None:
        share = loaded.model.weight_bytes / max(1, runner.model.weight_bytes)
        drafts = wanted.drafts if loaded.block is None else min(wanted.drafts, loaded.block.most)
        controller = Controller(drafts, most_rows(wanted, runner.row_bits), wanted.adaptive, share)
        group = runner.pool.group_of[loaded.first]
        return ModelledRunner(
            runner, name, loader(name).shift, group, controller, drafts, loaded.tree, once=loaded.block is not None
        )
    drafter = of_texts(name)(wanted)
    controller = Controller(wanted.drafts, most_rows(wanted, runner.row_bits), wanted.adaptive)
    return SpeculativeRunner(inner, drafter, controller, wanted.drafts)
