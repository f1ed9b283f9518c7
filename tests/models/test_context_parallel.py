"""Ranks that share out the tokens of a step give the logits of one rank: every family, by threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_support import CPU, LIMIT, PAGE, PROMPT, Engine
from share_support import checkpoint, staged_groups

from phloem.core.batch import Batch
from phloem.core.errors import ModelLoadError
from phloem.core.memory import State
from phloem.distributed.groups import Groups
from phloem.distributed.mesh import Mesh
from phloem.engine.ranks.contexts import run_rows
from phloem.engine.ranks.stages import Together
from phloem.engine.transfer import LastTokens
from phloem.layers.rows import Rows
from phloem.models._common import Decoder
from phloem.testing.checkpoints import families

FEW = ("llama", "gemma3_text", "qwen3_moe", "deepseek_v3")
REFUSED = ("gemma3n_text", "gemma4_text")  # each layer has an input of its own, beside what the one before gives
OUTPUTS = 4
Text = tuple[list[int], list[int], int]  # new tokens, pages, how many are computed


class Sharer:
    """One rank, as an engine runs it."""

    def __init__(self, groups: Groups, path: Path, cp: int, tp: int, ep: int, pp: int = 1, a2a: bool = False) -> None:
        assert groups.tp is not None
        mesh = Mesh.of(groups.rank, pp=pp, cp=cp, tp=tp, ep=ep)
        self.rows = Rows(groups.tp, mesh.cp, a2a, context=True)
        self.engine = Engine(path, mesh=mesh, comm=groups.attn, rows=self.rows)
        self.whole = Together(self.engine.model, groups)
        self.last = LastTokens(8, CPU, True, None, self.engine.ops)

    def step(self, texts: list[Text], every: bool = False) -> torch.Tensor:
        """Logits of each row's last token, and then with `every` of all tokens."""
        lens = [len(tokens) for tokens, _, _ in texts]
        batch = Batch(
            step=1,
            slots=np.arange(len(texts), dtype=np.int32),
            query_lens=np.array(lens, np.int32),
            prefix_lens=np.array([prefix for _, _, prefix in texts], np.int32),
            input_ids=np.array([token for tokens, _, _ in texts for token in tokens], np.int32),
            tables=tuple(self.engine.table(texts, group).numpy() for group in self.engine.pool.groups),
            outputs=np.ones(len(texts), np.int32),
            prompt_targets={row: np.zeros(count, np.int32) for row, count in enumerate(lens)} if every else {},
        )
        engine = self.engine
        with torch.inference_mode():
            hidden = run_rows(self.whole, self.rows, engine.attention, engine.pool, batch, self.last)
            return self.whole.chosen(hidden, "logits")


def steps(rank: Sharer, tokens: list[int]) -> list[torch.Tensor]:
    """A whole prompt beside a short one, in one step; another in chunks, of which the last one begins behind pages of
    the first; tokens of both that follow."""
    engine = rank.engine
    pages, few = engine.pages(len(PROMPT) + OUTPUTS), engine.pages(len(PROMPT))
    found = [rank.step([(PROMPT, pages, 0), (PROMPT[:2], few, 0)], every=True)]
    found.append(rank.step([(PROMPT[2:9], few, 2)], every=True))
    shared = pages[:2] + engine.pages(len(PROMPT) - 2 * PAGE)
    found.append(rank.step([(PROMPT[2 * PAGE :], shared, 2 * PAGE)], every=True))
    for at in range(OUTPUTS - 1):
        found.append(rank.step([(tokens[at : at + 1], pages, len(PROMPT) + at)]))
    found.append(rank.step([(PROMPT[9:10], few, 9), (tokens[-1:], pages, len(PROMPT) + OUTPUTS - 1)]))
    return found


def compare(name: str, path: Path, cp: int, tp: int = 1, ep: int = 1, a2a: bool = False) -> None:
    one = Engine(path)
    whole, tokens = one.whole(PROMPT), one.greedy(PROMPT, OUTPUTS)
    after = one.whole([*PROMPT, *tokens])[-1]
    made = staged_groups(cp, tp, lambda groups: steps(Sharer(groups, path, cp, tp, ep, a2a=a2a), tokens))
    both, chunk, hit, *decodes, last = made[0]
    assert both.shape[0] == 2 + len(PROMPT) + 2
    for found, expected in (
        (both[2 : 2 + len(PROMPT)], whole),
        (both[2 + len(PROMPT) :], whole[:2]),
        (both[:2], whole[[-1, 1]]),
        (chunk, whole[[8, *range(2, 9)]]),
        (hit, whole[[-1, *range(2 * PAGE, len(PROMPT))]]),
        (last, torch.stack((whole[9], after))),
    ):
        assert found.shape == expected.shape and (found - expected).abs().max() <= LIMIT, name
    assert [int(whole[-1].argmax()), *(int(row.argmax()) for row in decodes)] == tokens


@pytest.mark.some(23)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in families()]
)
def test_shared_tokens_give_the_logits_and_tokens_of_one_rank(name: str, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    model = Engine(path).model
    if any(isinstance(memory, State) for memory in model.memory):
        with pytest.raises(ModelLoadError, match="attn_cp_size 2: recurrent layers take"):
            compare(name, path, 2)
        return
    assert isinstance(model, Decoder)
    if any(spec.block or not spec.causal for spec in model.attention_specs):
        with pytest.raises(ModelLoadError, match="attn_cp_size 2: tokens attend to later ones"):
            compare(name, path, 2)
        return
    if name in REFUSED:
        with pytest.raises(ModelLoadError, match="attn_cp_size 2: layers of this model read more"):
            compare(name, path, 2)
        return
    compare(name, path, 2)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("qwen3", (4, 1, 1), marks=pytest.mark.slow),
        ("llama", (2, 2, 1)),
        pytest.param("qwen3_moe", (2, 2, 4), marks=pytest.mark.slow),
        pytest.param("deepseek_v32", (4, 1, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_rank_of_a_share_may_have_heads_of_its_own(name: str, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    compare(name, checkpoint(name, tmp_path), *sizes)


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_tokens_go_to_the_ranks_of_their_experts(name: str, tmp_path: Path) -> None:
    compare(name, checkpoint(name, tmp_path), 2, 1, 2, a2a=True)
