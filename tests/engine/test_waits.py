"""Steps on a device wait for it nowhere but where their tokens are read, whatever is asked of them. The device here has
no data at all: who asks for a value fails. Copies are counted, those too that go beside the pinned buffers; on a real
device each of these waits for all work that was given to it before."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from steps_without_data import plan_of, random_step, small_plan, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phloem.core.batch import FROM_DEVICE, Admission, Batch
from phloem.core.request import SamplingParams
from phloem.engine.runner import ModelRunner
from phloem.engine.warmup import ahead
from phloem.kernels import shapes_only
from phloem.kernels.triton import ahead as kernels
from phloem.kernels.triton import table
from phloem.kvcache.pool import KVPool
from phloem.platforms._facts import StepFacts
from phloem.testing.checkpoints import families

META = torch.device("meta")
ROWS, STEPS = 3, 6


class Without:
    """Streams to and from memory that has no data: what comes down is zeros."""

    check = None

    def __init__(self) -> None:
        self.copies: Counter[str] = Counter()

    def up(self, arrays: Any) -> Any:
        self.copies["up"] += 1
        kinds = [torch.from_numpy(np.zeros(0, array.dtype)).dtype for array in arrays]
        return [torch.empty(one.shape, dtype=kind, device=META) for one, kind in zip(arrays, kinds, strict=True)]

    def into(self, target: Any, parts: Any) -> None:
        self.copies["up"] += 1

    def down(self, tensors: Any) -> Any:
        self.copies["down"] += len(tensors)
        return SimpleNamespace(
            done=lambda: True, wait=lambda: [torch.zeros(one.shape, dtype=one.dtype).numpy() for one in tensors]
        )


class Watch(TorchDispatchMode):
    """Notes what goes between host and device beside the streams: tensors of both in one op, and `torch.tensor`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        plain = torch.tensor

        def tensor(*given: Any, device: Any = None, **more: Any) -> Any:
            if device is not None and torch.device(device) == META:
                self.found["torch.tensor"] += 1
            return plain(*given, device=device, **more)

        monkeypatch.setattr(torch, "tensor", tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)]
        # A number of the host's may stand in an op of the device.
        kinds = {one.device for one in tensors if one.dim() or one is result}
        if len(kinds) > 1:
            self.found[func._schema.name] += 1
        return result


def asked(slot: int, known: np.ndarray[Any, Any], params: SamplingParams, **more: Any) -> Admission:
    return Admission(slot, f"r{slot}", params, 7 + slot, known, len(known), eos_ids=(1, 2), **more)


class Follower:
    def masks(self, sampled: Any, drafts: Any) -> Any:
        return [np.full(128, -1, np.int32)] * (1 + len(drafts))


def served(
    monkeypatch: pytest.MonkeyPatch,
    params: SamplingParams,
    kind: str = "decode",
    plan: Any = None,
    follows: bool = False,
    mode: Any = "raw",
    **more: Any,
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Copies by the streams of the steps behind the first; those beside them, in the first step, which admits, and in
    the others."""
    if plan is None:
        plan = small_plan(running=ROWS, chunk=32, vocab=4096, config={"vocab_size": 4096}, adapters=(2, 16))
    with torch.inference_mode(), kernels.Notes().taken():
        need = ahead.need_of(plan)
        streams: Any = Without()
        memory = need.model.memory
        pool = KVPool(memory, [40] * len(ahead.pool_of(need).groups), need.page_size, need.kv_dtype, META)
        watch = Watch(monkeypatch)
        begin = watch.__enter__  # in the thread of the steps, for good
        model: Any = need.model
        runner = ModelRunner(
            model, need.backend, pool, need.ops, ROWS, facts=StepFacts(), streams=streams, logprobs=mode,
            begin=lambda: begin() and None,
        )  # fmt: skip
        slots, ones = np.arange(ROWS, dtype=np.int32), np.ones(ROWS, np.int32)
        first: Counter[str] = Counter()
        for number in range(STEPS):
            lens = ones * (3 if kind in ("verify", "prompt") and number else 1)
            outputs = lens if kind == "verify" else ones
            ids = np.full(lens.sum(), FROM_DEVICE if number and kind == "decode" else 5, np.int32)
            tables = tuple(
                np.tile(np.arange(1, 5, dtype=np.int32), (ROWS, 1)) for group in pool.groups if group.kind != "cross"
            )
            targets = {0: np.array([5, 6, 7][: lens[0]], np.int32)} if kind == "prompt" else {}
            batch = Batch(number, slots, lens, ones * 4 * number, ids, tables, outputs, prompt_targets=targets)
            batch.adapters = ones if kind == "adapters" else None
            if number == 0:
                batch.admissions = [asked(int(s), ids[:1], params, constrained=follows, **more) for s in slots]
                for slot in slots if follows else ():
                    runner.constrain(int(slot), Follower())
            runner.launch(batch).result()
            if number == 0:
                first = Counter(watch.found)
                watch.found.clear()
                streams.copies.clear()
        runner.close()
    return streams.copies, first, watch.found


GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.7, top_k=9, top_p=0.9, min_p=0.05, sampling_seed=5)
NUCLEUS = SamplingParams(temperature=0.7, top_p=0.9)
# (What is asked, copies up and down of each step behind the first). Docs: docs/gpu.md, "Between host and device".
WAYS: dict[str, tuple[SamplingParams, dict[str, Any], int, int]] = {
    "greedy": (GREEDY, {}, 1, 1),
    "drawn": (DRAWN, {}, 2, 1),
    "adapters": (DRAWN, {"kind": "adapters"}, 3, 1),
    "log probabilities": (GREEDY, {"return_logprob": True}, 2, 2),
    "of many tokens": (DRAWN, {"return_logprob": True, "top_logprobs": 300}, 3, 4),
    "of chosen tokens": (DRAWN, {"return_logprob": True, "token_ids_logprob": (3, 4, 5)}, 3, 3),
    "at a temperature": (DRAWN, {"return_logprob": True, "mode": "temperature"}, 3, 2),
    "processed": (DRAWN, {"return_logprob": True, "mode": "processed"}, 4, 2),
    "processed nucleus": (NUCLEUS, {"return_logprob": True, "mode": "processed"}, 4, 2),
    "hidden states": (DRAWN, {"return_hidden": True}, 2, 1 + ROWS),
    "a grammar": (DRAWN, {"follows": True}, 3, 1),
    "a grammar, greedy": (GREEDY, {"follows": True}, 2, 1),
    "penalties": (
        SamplingParams(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.2), {}, 2, 1,
    ),
    "penalties of drafts": (  # each position by itself
        SamplingParams(temperature=0.0, presence_penalty=0.1), {"kind": "verify"}, 4 + 2 * ROWS, 2,
    ),
    "a bias": (SamplingParams(temperature=0.7, logit_bias={"3": 1.0, "4": -1.0}), {}, 2, 1),
    "a least number of tokens": (SamplingParams(temperature=0.7, min_new_tokens=50), {}, 2, 1),
    "drafts": (GREEDY, {"kind": "verify"}, 3, 2),
    "drafts, drawn": (DRAWN, {"kind": "verify"}, 4, 2),
    "prompts": (GREEDY, {"kind": "prompt", "return_logprob": True}, 3, 3),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_step_makes_so_many_copies_and_waits_for_nothing_but_its_tokens(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, more, up, down = WAYS[way]
    copies, first, beside = served(monkeypatch, params, **more)
    steps = STEPS - 1
    assert (copies["up"] / steps, copies["down"] / steps) == (up, down)
    assert not beside and not first


# Ops that are plain torch code on a GPU and read values there, by the family that needs them: its steps wait, and are
# not recorded. What gets a kernel of its own is taken out of here.
READING: dict[str, set[str]] = {
    # Chunks of a text, and sinks beside values of another width: no backend of a GPU attends by these.
    "paged_attention": {"llama4_text", "mimo_v2_flash"},
}


class Launches(kernels.Notes):
    """How many there were."""

    count = 0

    def add(self, *given: Any) -> None:
        self.count += 1


def _under(watch: Watch, work: Any, step: Any) -> Any:
    with watch:
        return work(step)


@pytest.mark.slow
@pytest.mark.some(12)
@pytest.mark.parametrize("name", families())
def test_no_op_of_any_family_reads_values_but_for_those_that_are_known(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ops without data fail where values are read, but for those whose shapes alone are known: these are noted, and
    experts that launch nothing."""
    pytest.importorskip("transformers")
    noted, launches = set[str](), Launches()

    def noting(op: str, form: Any) -> Any:
        return lambda *given: (noted.add(op), form(*given))[1]

    def experts(*given: Any, **more: Any) -> Any:
        before = launches.count
        found = own.experts(*given, **more)
        if launches.count == before:
            noted.add("experts")
        return found

    own = table.table()
    forms = {op: noting(op, form) for op, form in shapes_only._FORMS.items()}
    monkeypatch.setattr(shapes_only, "_FORMS", forms)
    monkeypatch.setattr(table, "table", lambda: replace(own, experts=experts))
    plan = plan_of(tiny_config(name, tmp_path), running=8, chunk=128)
    random = np.random.default_rng(0)
    with torch.inference_mode(), launches.taken():
        need = ahead.need_of(plan)
        pool = ahead.pool_of(need)
        noted.clear()
        model: Any = need.model
        watch, forward = Watch(monkeypatch), model.forward
        model.forward = lambda step: _under(watch, forward, step)
        for number in range(10):
            random_step(need, pool, plan, random, number)
    assert noted == {op for op, those in READING.items() if name in those}
    assert not watch.found, "what forward passes copy"
