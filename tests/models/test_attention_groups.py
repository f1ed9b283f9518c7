"""Groups of ranks that attend to rows of their own give the logits of one rank: every family, by threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import LIMIT, PAGE, PROMPT, Engine
from share_support import checkpoint, staged_groups

from phloem.core.errors import ModelLoadError
from phloem.distributed.groups import Groups
from phloem.distributed.mesh import Mesh
from phloem.layers.context import ForwardBatch
from phloem.layers.rows import Rows
from phloem.testing.checkpoints import families

FEW = ("llama", "qwen3_moe", "deepseek_v3")
REFUSED = ("gemma3n_text", "gemma4_text")  # each layer has an input of its own, beside what the one before gives
OUTPUTS = 4


class Grouped:
    """One rank's model, with the head's rows of all groups, called on all ranks together."""

    def __init__(self, model: Any, rows: Rows) -> None:
        self.model, self.rows = model, rows

    def forward(self, step: ForwardBatch) -> torch.Tensor:
        return self.rows.gather(self.model.forward(step))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.head(hidden)


def steps(groups: Groups, path: Path, dp: int, tp: int, ep: int, tokens: list[int]) -> list[torch.Tensor]:
    """A whole prompt beside a short one; a chunk beside the end of another; greedy tokens while the others have none.
    What the first group's rows give comes first."""
    assert groups.tp is not None
    mesh = Mesh.of(groups.rank, dp=dp, tp=tp, ep=ep)
    rows = Rows(groups.tp, mesh.dp)
    engine = Engine(path, mesh=mesh, comm=groups.attn, rows=rows)
    inner, own, first = engine.model, Grouped(engine.model, rows), mesh.dp.rank == 0
    engine.model = own  # pyright: ignore[reportAttributeAccessIssue]

    def run(each: list[list[tuple[list[int], list[int], int]]], every: bool = False) -> torch.Tensor:
        each += [[]] * (dp - len(each))
        counts = [sum(len(row[0]) for row in part) for part in each]
        rows.begin(counts, counts if every else [len(part) for part in each])
        if each[mesh.dp.rank]:
            return engine.step(each[mesh.dp.rank], every)
        none = torch.zeros(0, dtype=torch.int64)
        memory: Any = None  # a step without rows asks for none
        with torch.inference_mode():
            return own.head(own.forward(ForwardBatch(none, none, memory, None if every else none)))

    pages, few = engine.pages(len(PROMPT) + OUTPUTS), engine.pages(len(PROMPT))
    found = [run([[(PROMPT, pages, 0)], [(PROMPT[: 2 * PAGE], few, 0)]], every=True)]
    shared = few[:2] + engine.pages(len(PROMPT) - 2 * PAGE)
    found.append(run([[(PROMPT[:5], engine.pages(5), 0)], [(PROMPT[2 * PAGE :], shared, 2 * PAGE)]]))
    for at in range(OUTPUTS - 1):
        found.append(run([[(tokens[at : at + 1], pages, len(PROMPT) + at)]]))
    alone = engine.pages(len(PROMPT))
    found.append(run([[], [(PROMPT, alone, 0)]]))
    if first:
        assert inner.rows is rows
    return found


def compare(name: str, path: Path, dp: int, tp: int, ep: int = 1) -> None:
    one = Engine(path)
    whole, tokens = one.whole(PROMPT), one.greedy(PROMPT, OUTPUTS)
    found = staged_groups(dp, tp, lambda groups: steps(groups, path, dp, tp, ep, tokens))[0]
    both, chunk, *decodes, alone = found
    assert both.shape[0] == len(PROMPT) + 2 * PAGE
    assert (both[: len(PROMPT)] - whole).abs().max() <= LIMIT, name
    assert (both[len(PROMPT) :] - whole[: 2 * PAGE]).abs().max() <= LIMIT, name
    assert (chunk - whole[[4, -1]]).abs().max() <= LIMIT, name
    assert [int(whole[-1].argmax()), *(int(row.argmax()) for row in decodes)] == tokens
    assert (alone - whole[-1:]).abs().max() <= LIMIT, name


@pytest.mark.some(23)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in families()]
)
def test_groups_give_the_logits_and_tokens_of_one_rank(name: str, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    if name in REFUSED:
        with pytest.raises(ModelLoadError, match="attn_dp_size 2: layers of this model read more"):
            compare(name, path, 2, 1)
        return
    compare(name, path, 2, 1)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_groups_of_several_ranks_cut_their_heads(name: str, tmp_path: Path) -> None:
    compare(name, checkpoint(name, tmp_path), 2, 2, 1 if name == "llama" else 2)
