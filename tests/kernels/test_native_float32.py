"""Whoever asks for float32 gets float32: activations that are not rounded, whatever the weights are stored in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import FIELDS, GGUF_TYPES, Source, cases, make_source, needs_native

from phloem.core.config import Config
from phloem.engine import worker
from phloem.kernels import native
from phloem.kernels import reference_experts as ref
from phloem.kernels.ops import Ops
from phloem.quant import int4

pytestmark = needs_native
CPU = torch.device("cpu")
KINDS = [*GGUF_TYPES, "BF16", "F16", "F32"]


@pytest.fixture(params=cases(1, 3))
def level(request: Any) -> Any:
    yield request.param
    native.table(2, None)


def stored(kind: str, rows: int, inputs: int, seed: int) -> Source:
    """A weight in one of KINDS."""
    if kind in FIELDS:
        return make_source(kind, rows, inputs // FIELDS[kind][1], seed)
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    values = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(types[kind])
    return Source("w", (rows, inputs), kind, values.view(torch.uint8).numpy(), values)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def error(ours: torch.Tensor, want: torch.Tensor) -> float:
    return ((ours.double() - want).norm() / want.norm()).item()


@pytest.mark.some(210)
@pytest.mark.slow
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_linear_layers_round_nothing(level: Any, kind: str, rows: int, invariant: bool) -> None:
    source, x = stored(kind, 48, 256, 1), random(rows, 256)
    ops = native.table(level[1], level[0], invariant=invariant, float32=True)
    packed = ops.prepare_linear([source], torch.float32, CPU)
    want = x.double() @ packed.dense().double().T
    assert error(ops.linear(x, packed)[0], want) < 2e-6
    ops = native.table(level[1], level[0], invariant=invariant)
    rounded = error(ops.linear(x, ops.prepare_linear([source], torch.float32, CPU))[0], want)
    assert (rounded > 1e-4) == (kind not in ("F16", "F32"))  # what the default costs


def test_heads_are_read_whole(level: Any) -> None:
    source, x = stored("Q8_0", 20000, 64, 1), random(2, 64)
    ops = native.table(level[1], level[0], float32=True)
    packed = ops.prepare_linear([source], torch.float32, CPU)
    logits = ops.linear(x, packed)[0]
    assert torch.equal(ops.linear_argmax(x, packed).long(), logits.argmax(-1))
    assert packed.screen is None and not packed.split


def test_experts_round_nothing(level: Any) -> None:
    experts, n, inner = 4, 64, 32
    ops = native.table(level[1], level[0], float32=True)
    gates = [stored("Q8_0", inner, n, seed) for seed in range(2 * experts)]
    downs = [stored("Q8_0", n, inner, 50 + seed) for seed in range(experts)]
    packed = [ops.prepare_experts(parts, torch.float32, CPU, experts) for parts in (gates, downs)]
    x, logits = random(7, n), random(7, experts)
    plain = [part.dense() for part in packed]
    want = ref.moe(x, logits, *plain, 2, True).double()
    assert error(ops.moe(x, logits, packed[0], packed[1], 2, True), want) < 5e-6


def test_weights_that_are_quantised_at_load_keep_their_values() -> None:
    source = int4.wrap(stored("F32", 32, 64, 1))
    packed = native.table(2, float32=True).prepare_linear([source], torch.float32, CPU)
    assert torch.equal(packed.dense(), source.dense(torch.float32))
    assert packed.kinds == ("F32",)


@pytest.mark.parametrize(("dtype", "value"), [("auto", "by weight"), ("float32", "float32")])
def test_the_choice_is_told(dtype: str, value: str, tmp_path: Any) -> None:
    from phloem.checkpoint.describe import describe
    from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf

    file = tiny_gguf(tiny_checkpoint("llama", tmp_path / "hf"), tmp_path / "tiny.gguf", "Q8_0")
    settings = {"max_total_tokens": 256, "disable_step_graph": True, "dtype": dtype, "device": "cpu", "ops": "native"}
    built = worker.build(Config.from_flat(settings), describe(str(file)), lambda name, seconds: None)
    told = next(item for item in built.decisions if item.name == "activations")
    assert told.value == value
    assert ("unpacked to float32" in told.reason) == (dtype == "float32")
    assert Ops().activations is None  # plain torch computes in the type it is given


@pytest.mark.slow
def test_greedy_text_of_a_quantised_model_is_that_of_float32() -> None:
    from model_support import Engine

    from phloem.checkpoint.describe import demo_path
    from phloem.core.errors import ModelLoadError

    try:
        file = demo_path()
    except ModelLoadError:
        pytest.skip("the default model is not installed")
    prompt = [504, 3575, 282, 4649, 314]
    plain, ours = Engine(file), Engine(file, ops=native.table(2, float32=True))
    assert (plain.whole(prompt) - ours.whole(prompt)).abs().max() < 2e-3
    assert plain.greedy(prompt, 12) == ours.greedy(prompt, 12)


@pytest.mark.slow
def test_steps_of_a_dense_model_are_recorded_and_have_the_same_bits_with_any_threads(tmp_path: Any) -> None:
    """Attention over float32 pages is native: a prompt in chunks, decodes alone and together; near plain torch."""
    from phloem import Engine
    from phloem.testing.checkpoints import tiny_checkpoint

    path = str(tiny_checkpoint("llama", tmp_path))
    prompts = [[(7 * i + 3) % 300 + 5 for i in range(count)] for count in (90, 3, 41)]
    found: list[list[tuple[int, float]]] = []
    for ops, threads in (("native", 1), ("native", 3), ("reference", 2)):
        settings: dict[str, Any] = {"dtype": "float32", "ops": ops, "threads": threads, "chunked_prefill_size": 64}
        with Engine(model_path=path, max_total_tokens=2048, log_level="warning", **settings) as engine:
            told = {name: value for name, value, _ in engine.get_server_info()["decisions"]}
            assert told["step_graphs"] == ("off" if ops == "reference" else "on")
            params = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
            answers = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
        assert isinstance(answers, list)
        pairs = [pair for answer in answers for pair in answer["meta_info"]["output_token_logprobs"]]
        found.append([(token, value) for value, token, *_ in pairs])
    one, three, plain = found
    assert len(one) == 36 and one == three
    assert [token for token, _ in one] == [token for token, _ in plain]
    assert max(abs(x - y) for (_, x), (_, y) in zip(one, plain, strict=True)) < 1e-4
