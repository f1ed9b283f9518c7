"""Ranks that share a model out compute what one rank computes: every family, by threads of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_support import LIMIT, PAGE, PROMPT, Engine
from share_support import checkpoint, engine_of, together

from phloem.core.errors import ModelLoadError
from phloem.distributed.comm import Comm
from phloem.testing.checkpoints import families, tiny_checkpoint

FEW = ("llama", "gpt_oss")  # plain, and with experts, biases and sinks
OUTPUTS = 8


def compare(path: Path, size: int, whole: torch.Tensor, tokens: list[int]) -> None:
    """A whole prompt, the same in chunks with a prefix hit, a mixed step, and greedy tokens, on rank 0."""

    def run(comm: Comm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        engine = engine_of(path, comm)
        logits = engine.whole(PROMPT)
        pages = engine.pages(len(PROMPT))
        spans = ((0, 3), (3, 8), (8, 17), (17, len(PROMPT)))
        chunks = [engine.step([(PROMPT[a:b], pages, a)], every=True) for a, b in spans]
        shared = pages[:2] + engine.pages(len(PROMPT) - 2 * PAGE)
        mixed = engine.step([(PROMPT[2 * PAGE :], shared, 2 * PAGE), (PROMPT[:11], engine.pages(11), 0)])
        own, found = engine.pages(len(PROMPT) + OUTPUTS), list[int]()
        # Rank 0 chooses; the others are told what it must have chosen.
        for at in range(OUTPUTS):
            row = (PROMPT, own, 0) if at == 0 else (tokens[at - 1 : at], own, len(PROMPT) + at - 1)
            found.append(int(engine.step([row]).argmax()))
        return logits, torch.cat(chunks), mixed, found

    logits, chunks, mixed, found = together(size, run)[0]
    assert (logits - whole).abs().max() <= LIMIT
    assert (chunks - whole).abs().max() <= LIMIT
    assert (mixed - whole[[len(PROMPT) - 1, 10]]).abs().max() <= LIMIT
    assert found == tokens


@pytest.mark.some(23)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in families()]
)
def test_ranks_give_the_logits_and_tokens_of_one(name: str, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    one = Engine(path)
    whole, tokens = one.whole(PROMPT), one.greedy(PROMPT, OUTPUTS)
    assert whole.abs().max() > 0.1
    for size in (2, 4):
        compare(path, size, whole, tokens)


def test_the_ranks_hidden_states_have_the_same_bits(tmp_path: Path) -> None:
    path = checkpoint("qwen3", tmp_path)
    seen: dict[int, torch.Tensor] = {}

    def run(comm: Comm) -> None:
        engine = engine_of(path, comm)
        forward = engine.model.forward

        def kept(step: object) -> torch.Tensor:
            seen[comm.rank] = forward(step)  # pyright: ignore[reportArgumentType]
            return seen[comm.rank]

        engine.model.forward = kept  # pyright: ignore[reportAttributeAccessIssue]
        engine.whole(PROMPT)

    together(4, run)
    assert seen[0].abs().max() > 0.1
    assert all(torch.equal(seen[0], seen[rank]) for rank in range(1, 4))


def test_the_most_likely_token_is_found_among_all_ranks(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    expected = Engine(path).model.greedy(hidden)
    found = together(4, lambda comm: engine_of(path, comm).model.greedy(hidden))[0]
    assert torch.equal(found, expected.long())
    assert len({int(token) // 96 for token in found}) == 4, "every rank has some of them"


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path, hidden_size=64, num_attention_heads=64, vocab_size=385)
    with pytest.raises(ModelLoadError, match="tp_size 64: a vocabulary of 385"):
        together(64, lambda comm: engine_of(path, comm))
