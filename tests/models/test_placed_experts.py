"""Routed experts on two machines: the same logits as on one, whatever lies where; deferral as a plain model defers."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_cases import needs_native
from model_support import LIMIT, PROMPT, Engine

from phloem.distributed.experts import Move, place
from phloem.kernels import native
from phloem.kernels.ops import Ops
from phloem.layers.aside import Aside
from phloem.testing.checkpoints import tiny_checkpoint

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


def checkpoint(folder: Path, family: str) -> Path:
    path = folder / family
    return path if path.exists() else tiny_checkpoint(family, path)


def two(path: Path, each: int, host: Ops | None = None, strategy: Any = "uniform", **options: Any) -> Engine:
    """Plain torch as the device, and beside it another table with the experts."""
    aside = Aside(host or Ops(), **options)
    engine = Engine(path, aside=aside)
    aside.put(place(strategy, *aside.counts.shape, each))
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_one_place_for_every_split(folder: Path, family: str) -> None:
    path = checkpoint(folder, family)
    want = Engine(path).whole(PROMPT)
    experts = two(path, 0).model.aside.counts.shape[1]
    for each in range(experts + 1):
        engine = two(path, each)
        got = engine.whole(PROMPT)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        # One table, one place for all of them: nothing is summed otherwise.
        assert each not in (0, experts) or torch.equal(got, want)
        assert engine.model.aside.table.sum() == each * len(engine.model.aside.layers)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma4_text", "granitemoe", "jamba", "llama4_text", "nemotron_h", "qwen3_next"])
def test_other_routers_and_experts(tmp_path: Path, family: str) -> None:
    sparse = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    path = tiny_checkpoint(family, tmp_path / family, **(sparse if family == "gemma4_text" else {}))
    engine = two(path, 2)
    torch.testing.assert_close(engine.whole(PROMPT), Engine(path).whole(PROMPT), atol=2e-5, rtol=0)
    assert engine.model.aside.counts.sum(1).all()


@needs_native
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_native_experts_beside_a_device_of_plain_torch(folder: Path, family: str) -> None:
    path = checkpoint(folder, family)
    want, table = Engine(path).whole(PROMPT), native.table(2, float32=True)
    for each in (0, 3):
        torch.testing.assert_close(two(path, each, table).whole(PROMPT), want, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("strategy", ["front-loading", "random"])
def test_strategies_and_steps_of_chunks_give_the_same_tokens(folder: Path, strategy: str) -> None:
    path = checkpoint(folder, "qwen3_moe")
    assert two(path, 2, strategy=strategy).greedy(PROMPT, 12) == Engine(path).greedy(PROMPT, 12)
    engine = two(path, 2, strategy=strategy)
    pages, whole = engine.pages(len(PROMPT)), engine.whole(PROMPT)
    engine.step([(PROMPT[:9], pages, 0)])
    torch.testing.assert_close(engine.step([(PROMPT[9:], pages, 9)])[0], whole[-1], atol=2e-5, rtol=0)


def test_an_expert_that_moves_takes_the_place_of_another(folder: Path) -> None:
    path = checkpoint(folder, "qwen3_moe")
    engine = two(path, 2)
    aside = engine.model.aside
    want = engine.whole(PROMPT)
    aside.move([Move(0, 5, 0), Move(1, 4, 1)])
    assert aside.table[0].nonzero()[0].tolist() == [1, 5] and aside.table[1].nonzero()[0].tolist() == [0, 4]
    torch.testing.assert_close(engine.whole(PROMPT), want, atol=2e-5, rtol=0)
    k = engine.checkpoint.config["num_experts_per_tok"]
    assert (aside.counts.sum(1) == 2 * len(PROMPT) * k).all()


def test_weights_that_are_pushed_reach_the_copies_on_the_device(folder: Path) -> None:
    path = checkpoint(folder, "qwen3_moe")
    engine, one = two(path, 3), Engine(path)
    names = [name for name in one.model.weight_names() if ".experts." in name]
    new = {name: one.model.get_weight(name).flip(0).contiguous() for name in names}
    for other in (engine, one):
        other.model.update_weights(new.items())
    torch.testing.assert_close(engine.whole(PROMPT), one.whole(PROMPT), atol=2e-5, rtol=0)
    assert torch.equal(engine.model.get_weight(names[0]), new[names[0]])


@pytest.mark.parametrize("each", [0, 2])
def test_long_steps_have_all_experts_on_the_device(folder: Path, each: int) -> None:
    path = checkpoint(folder, "deepseek_v3")
    far: list[int] = []

    def chosen(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *matrices: Any) -> torch.Tensor:
        far.append(len(x))
        return Ops().chosen_experts(x, ids, weights, *matrices)

    engine = two(path, each, dataclasses.replace(Ops(), chosen_experts=chosen), streams_from=10)
    torch.testing.assert_close(engine.whole(PROMPT), Engine(path).whole(PROMPT), atol=2e-5, rtol=0)
    assert not far
    assert engine.greedy(PROMPT, 6) == Engine(path).greedy(PROMPT, 6)
    assert far and max(far) == 1


class Deferring:
    """A plain model that defers, made of the layers of an ordinary one."""

    def __init__(self, path: Path, count: int) -> None:
        self.engine = Engine(path)
        late: list[torch.Tensor] = []
        sparse = [layer.mlp for layer in self.engine.model.layers if hasattr(layer.mlp, "router")]

        def of(block: Any, last: bool) -> Any:
            def chosen(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
                scores, ids = logits.float().softmax(-1).topk(block.config.router.top_k)
                if block.config.router.renormalise:
                    scores = scores / scores.sum(-1, keepdim=True)
                up, down = (w.value.unflatten(0, (block.config.count, -1)) for w in (block.gate_up, block.down))
                found = torch.zeros(*ids.shape, x.shape[1])
                for token, row in enumerate(ids.tolist()):
                    for choice, expert in enumerate(row):
                        gate, other = (up[expert] @ x[token]).chunk(2)
                        found[token, choice] = down[expert] @ (torch.nn.functional.silu(gate) * other)
                found = found * scores[..., None]
                before = late.pop() if late else torch.zeros_like(x)
                if last:
                    return found.sum(1) + before
                late.append(found[:, -count:].sum(1))
                return found[:, :-count].sum(1) + before

            return chosen

        for block in sparse:
            block._chosen = of(block, block is sparse[-1])


@pytest.mark.parametrize("each", [0, 2, 6])
def test_deferred_experts_are_added_one_layer_later(folder: Path, each: int) -> None:
    path = checkpoint(folder, "qwen3_moe")
    want = Deferring(path, 1).engine.whole(PROMPT)
    engine = two(path, each, deferred=1)
    torch.testing.assert_close(engine.whole(PROMPT), want, atol=2e-5, rtol=0)
    assert not torch.allclose(want, Engine(path).whole(PROMPT), atol=1e-3)
    # A step that wants the last token alone goes on with its row of what was deferred.
    last = engine.step([(PROMPT, engine.pages(len(PROMPT)), 0), (PROMPT[:7], engine.pages(7), 0)])
    torch.testing.assert_close(last[0], want[-1], atol=2e-5, rtol=0)


def test_deferring_none_is_not_to_defer(folder: Path) -> None:
    path = checkpoint(folder, "qwen3_moe")
    assert torch.equal(two(path, 2, deferred=0).whole(PROMPT), two(path, 2).whole(PROMPT))


def test_the_host_computes_while_the_device_does(folder: Path) -> None:
    """The device's part of each layer ends when the host's has ended, which began behind the router."""
    path = checkpoint(folder, "deepseek_v3")
    ended, seen = threading.Semaphore(0), list[str]()

    def chosen(*args: Any) -> torch.Tensor:
        time.sleep(0.02)
        found = Ops().chosen_experts(*args)
        seen.append("host")
        ended.release()
        return found

    engine = two(path, 2, dataclasses.replace(Ops(), chosen_experts=chosen))
    shared = [layer.mlp for layer in engine.model.layers if hasattr(layer.mlp, "sparse")]

    def waiting(dense: Any) -> Any:
        def slow(*args: Any, **options: Any) -> Any:
            assert ended.acquire(timeout=30)
            seen.append("device")
            return dense(*args, **options)

        return slow

    for block in shared:
        block.dense = waiting(block.dense)
    engine.whole(PROMPT)
    assert shared and seen == ["host", "device"] * len(shared)
    assert engine.model.aside.hidden_share > 0.8


def test_a_failing_host_fails_the_step_and_the_next_one_is_right(folder: Path) -> None:
    path = checkpoint(folder, "qwen3_moe")
    fail = [True]

    def chosen(*args: Any) -> torch.Tensor:
        if fail[0]:
            raise MemoryError("no memory")
        return Ops().chosen_experts(*args)

    engine = two(path, 2, dataclasses.replace(Ops(), chosen_experts=chosen), deferred=1)
    with pytest.raises(MemoryError):
        engine.whole(PROMPT)
    fail[0] = False
    assert torch.equal(engine.whole(PROMPT), two(path, 2, deferred=1).whole(PROMPT))
    assert np.isfinite(engine.model.aside.hidden_share)
