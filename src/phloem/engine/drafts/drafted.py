"""Whether an engine drafts, and by what: decided once, of a model that is there and before its steps are sized.

Who drafts how is `speculation`'s business; here is only what the engine's side of it makes possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.memory import groups_of
from phloem.core.resolve import Decision
from phloem.core.speculation import AUTO, NONE, cannot, wanted
from phloem.engine.choices.unserved import undrafted
from phloem.engine.runner import cuts_back, stands_apart
from phloem.platforms._facts import in_host_memory

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.core.speculation import Wanted
    from phloem.engine.drafts.drafting import Loaded
    from phloem.kernels.ops import Ops
    from phloem.models import Model
    from phloem.platforms import Platform

NAME = "speculative_algorithm"
# A step of more rows on the CPU multiplies some weights in another form, and so in other bits.
MOST_ROWS = 24
USUAL = "suffix"  # unasked, where nothing is lost by it


@dataclass(frozen=True)
class Place:
    """Where drafts would be verified.

    on_host: in the host's memory.
    cuts_back: memory of refused drafts can be taken back.
    row_bits: a token's row has the same bits in steps of 1 to `MOST_ROWS` rows.
    alone: the engine has one rank, and prefills and decodes.
    why: what else is served makes it impossible; "": nothing.
    block: drafts that a model which drafts makes in one pass; 0: one after another.
    """

    on_host: bool = True
    cuts_back: bool = True
    row_bits: bool = True
    alone: bool = True
    why: str = ""
    block: int = 0


@dataclass(frozen=True)
class Drafted:
    """`drafter`: its name, or `none`. `rows`: of one token, that a step of a single request may have."""

    drafter: str
    rows: int
    decision: Decision


def place(
    config: Config, checkpoint: Checkpoint, platform: Platform, ops: Ops, model: Model, helper: Loaded | None = None,
    *, several: bool, fills: bool,
) -> Place:  # fmt: skip
    """Of a model that generates. `helper`: the one that drafts for it. `several`: it is shared out among ranks.
    `fills`: it writes by diffusion."""
    on_host, groups = platform.facts.on_host, groups_of(model.memory)
    recurrent = any(group.kind == "state" for group in groups)
    return Place(
        on_host=in_host_memory(platform.device),
        cuts_back=cuts_back(groups, on_host=on_host),
        row_bits=ops.row_bits and stands_apart(model, groups, on_host=on_host),
        alone=not several and config.disagg.disaggregation_mode == "null",
        why=undrafted(config, checkpoint, several=several, recurrent=recurrent, fills=fills),
        block=0 if helper is None or helper.block is None else helper.block.most,
    )


def decide(config: Config, where: Place) -> Drafted:
    """Raises ConfigError where the drafter that was asked for cannot serve this model."""
    asked = wanted(config)
    drafter, decision = _decide(asked, where)
    return Drafted(drafter, 1 if drafter == NONE else asked.rows, decision)


def _decide(asked: Wanted, where: Place) -> tuple[str, Decision]:
    if asked.algorithm == NONE:
        return NONE, Decision(NAME, NONE, "as asked")
    why = where.why
    if not where.cuts_back:
        why = "recurrent state is cut back to the tokens that were accepted on the host alone"
    if why:
        return NONE, without(asked, why)
    if asked.algorithm == AUTO:
        return _unasked(asked, where)
    if where.block:
        what = f"as asked, up to {min(asked.drafts, where.block)} drafts in one pass; {_how(asked, where.row_bits)}"
        return asked.algorithm, Decision(NAME, asked.algorithm, what)
    what = "drafts" if asked.topk == 1 else f"drafts as a tree, {asked.topk} wide and {asked.steps} deep"
    name = asked.algorithm
    return name, Decision(NAME, name, f"as asked, up to {asked.drafts} {what}; {_how(asked, where.row_bits)}")


def _unasked(asked: Wanted, where: Place) -> tuple[str, Decision]:
    """Where nobody said anything: only what changes no token, and was measured to cost nothing."""
    why = ""
    if not where.on_host:
        why = "not measured to pay on a device of its own"
    elif not where.row_bits:
        why = "the number of rows may change the last bits here"
    elif not where.alone:
        why = "not measured to pay with several ranks, or with prefill and decode in two servers"
    elif not asked.adaptive:
        why = "drafts that are verified always are asked for by name"
    if why:
        return NONE, Decision(NAME, NONE, f"{why}; asked for: {USUAL}")
    what = f"repeated text comes several tokens a step, up to {asked.drafts} drafts, with few requests at a time"
    how = _how(asked, where.row_bits)
    return USUAL, Decision(NAME, USUAL, f"{what}; {how}; --speculative-algorithm none does without")


def without(asked: Wanted, why: str) -> Decision:
    """That nothing is drafted. Raises ConfigError where a drafter was asked for."""
    if asked.algorithm not in (AUTO, NONE):
        raise cannot(asked, why)
    return Decision(NAME, NONE, why)


def _how(asked: Wanted, row_bits: bool) -> str:
    said = (
        f"tokens and hidden states are those of plain decoding, to the bit, and log probabilities to 1e-5, in steps of "
        f"up to {most_rows(asked, row_bits)} rows"
        if row_bits
        else "the same tokens as plain decoding but where two are as likely to the last bits, which the number of rows "
        "may change here"
    )
    return f"{said}; {'by measured times' if asked.adaptive else 'always, as asked'}"


def most_rows(asked: Wanted, row_bits: bool) -> int:
    """Rows of one token in a step that verifies."""
    return MOST_ROWS if row_bits else max(1 + asked.drafts, MOST_ROWS)
