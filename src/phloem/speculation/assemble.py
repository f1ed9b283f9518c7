"""Whether an engine speculates, with what and why; refused before it is ready where it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.core.speculation import AUTO, MODELS, NONE, cannot
from phloem.engine.branches import TreeShape
from phloem.platforms._facts import in_host_memory
from phloem.speculation.controller import Controller
from phloem.speculation.drafters import DRAFTERS, loader, of_texts
from phloem.speculation.modelled import ModelledRunner
from phloem.speculation.runner import SpeculativeRunner

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.batch import Runner
    from phloem.core.speculation import Wanted
    from phloem.engine.drafting import Beside, Loaded
    from phloem.engine.runner import ModelRunner
    from phloem.layers.context import BuildContext
    from phloem.models import Model

NAME = "speculative_algorithm"
# A step of more rows on the CPU multiplies some weights in another form, and so in other bits.
MOST_ROWS = 24
USUAL = "suffix"  # unasked, where nothing is lost by it


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


def decide(wanted: Wanted, runner: ModelRunner, why: str = "", alone: bool = True) -> tuple[str, Decision]:
    """(The drafter's name, or `none`; the decision). `why`: what else is served makes it impossible; "": nothing.
    `alone`: the engine has one rank, and prefills and decodes.

    Raises:
        ConfigError: the drafter that was asked for cannot serve this model.
    """
    asked = wanted.algorithm
    if asked == NONE:
        return NONE, Decision(NAME, NONE, "as asked")
    if not runner.cuts_back:
        why = "recurrent state is cut back to the tokens that were accepted on the host alone"
    if why:
        return NONE, without(wanted, why)
    if asked == AUTO:
        return _unasked(wanted, runner, alone)
    if runner.drafts is not None and (block := runner.drafts.block) is not None:
        drafts = min(wanted.drafts, block.most)
        return asked, Decision(NAME, asked, f"as asked, up to {drafts} drafts in one pass; {_how(wanted, runner)}")
    what = "drafts" if wanted.topk == 1 else f"drafts as a tree, {wanted.topk} wide and {wanted.steps} deep"
    return asked, Decision(NAME, asked, f"as asked, up to {wanted.drafts} {what}; {_how(wanted, runner)}")


def _unasked(wanted: Wanted, runner: ModelRunner, alone: bool) -> tuple[str, Decision]:
    """`decide` where nobody said anything: only what changes no bit, and was measured to cost nothing."""
    why = ""
    if not in_host_memory(runner.pool.device):
        why = "not measured to pay on a device of its own"
    elif not runner.row_bits:
        why = "the number of rows may change the last bits here"
    elif not alone:
        why = "not measured to pay with several ranks, or with prefill and decode in two servers"
    elif not wanted.adaptive:
        why = "drafts that are verified always are asked for by name"
    if why:
        return NONE, Decision(NAME, NONE, f"{why}; asked for: {USUAL}")
    what = f"repeated text comes several tokens a step, up to {wanted.drafts} drafts, with few requests at a time"
    return USUAL, Decision(NAME, USUAL, f"{what}; {_how(wanted, runner)}; --speculative-algorithm none does without")


def without(wanted: Wanted, why: str) -> Decision:
    """That nothing is drafted. Raises ConfigError where a drafter was asked for."""
    if wanted.algorithm not in (AUTO, NONE):
        raise cannot(wanted, why)
    return Decision(NAME, NONE, why)


def _how(wanted: Wanted, runner: ModelRunner) -> str:
    rows = most_rows(wanted, runner)
    bits = (
        f"the answers are those of plain decoding, to the bit, in steps of up to {rows} rows"
        if runner.row_bits
        else "the same tokens as plain decoding but where two are as likely to the last bits, which the number of rows "
        "may change here"
    )
    return f"{bits}; {'by measured times' if wanted.adaptive else 'always, as asked'}"


def most_rows(wanted: Wanted, runner: ModelRunner) -> int:
    """Rows of one token in a step that verifies."""
    return max(1 + wanted.drafts, MOST_ROWS) if not runner.row_bits else MOST_ROWS


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
        controller = Controller(drafts, most_rows(wanted, runner), wanted.adaptive, share)
        group = runner.pool.group_of[loaded.first]
        return ModelledRunner(
            runner, name, loader(name).shift, group, controller, drafts, loaded.tree, once=loaded.block is not None
        )
    drafter = of_texts(name)(wanted)
    controller = Controller(wanted.drafts, most_rows(wanted, runner), wanted.adaptive)
    return SpeculativeRunner(inner, drafter, controller, wanted.drafts)
