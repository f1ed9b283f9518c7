"""Forcing an instruction set of the native CPU kernels: option, environment, what is refused, what is said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from phloem.core.config import Config, cpu_level
from phloem.core.errors import ConfigError
from phloem.kernels import native
from phloem.platforms import cpu
from phloem.utils import machine


@pytest.fixture(autouse=True)
def levels(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    monkeypatch.delenv("PHLOEM_CPU_LEVEL", raising=False)
    try:
        rt = native.runtime()
    except native.Unavailable as error:
        pytest.skip(str(error))
    yield rt.library.levels()
    native.use_level(None)
    rt.library.set_level(None)


def test_the_best_level_serves_unless_another_is_asked_for(levels: tuple[str, ...]) -> None:
    (decision,) = cpu.level("auto")
    assert (decision.value, decision.reason) == (levels[-1], "the best that this processor runs")
    native.table(1)
    assert native.runtime().library.level() == levels[-1]


def test_a_forced_level_serves_every_table_and_says_so(levels: tuple[str, ...]) -> None:
    (decision,) = cpu.level("portable")
    assert decision.value == "portable"
    assert decision.reason.startswith("as asked; this processor also runs")
    _, why = cpu.Platform(1).table(None)
    assert native.runtime().library.level() == "portable"
    assert "at this level (portable instructions" in why


def test_the_environment_asks_where_no_option_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHLOEM_CPU_LEVEL", "portable")
    (decision,) = cpu.level("auto")
    assert decision.value == "portable"
    assert "PHLOEM_CPU_LEVEL" in decision.reason
    assert cpu_level("avx2") == ("avx2", "as asked")
    monkeypatch.setenv("PHLOEM_CPU_LEVEL", "sse9")
    with pytest.raises(ConfigError, match=r"PHLOEM_CPU_LEVEL: 'sse9' is not one of auto, portable, avx2"):
        cpu.level("auto")


def test_a_level_that_the_processor_lacks_is_refused(levels: tuple[str, ...]) -> None:
    missing = next((name for name in ("amx", "avxvnni", "avx512", "avx2") if name not in levels), None)
    if missing is None:
        pytest.skip("this processor runs every level")
    with pytest.raises(ConfigError, match=f"this processor runs portable.*, not {missing}"):
        native.use_level(missing)


def test_a_level_that_no_library_can_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str | None) -> tuple[str, ...]:
        raise native.Unavailable("no compiler was found")

    with monkeypatch.context() as patch:
        patch.setattr(native, "use_level", missing)
        assert cpu.level("auto") == []
        with pytest.raises(ConfigError, match="cpu_level 'avx2' cannot be used: no compiler was found"):
            cpu.level("avx2")


def test_a_forced_level_takes_the_type_that_its_processors_take(
    levels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    assert cpu.Platform(1).dtype("bfloat16")[0] == torch.bfloat16
    cpu.level("portable")
    dtype, why = cpu.Platform(1).dtype("bfloat16")
    assert dtype == torch.float32
    assert "portable" in why


def test_the_option_is_checked_like_every_other() -> None:
    assert Config.from_flat({"cpu_level": "avx2"}).runtime.cpu_level == "avx2"
    with pytest.raises(ConfigError, match="did you mean 'avx512'"):
        Config.from_flat({"cpu_level": "avx51"})


def test_avx_vnni_is_found_where_the_processor_tells_of_it(levels: tuple[str, ...]) -> None:
    units = {name: fields for name, level, _, fields in native.runtime().library.ops() if level == "avxvnni"}
    assert ("avxvnni" in levels) == (bool(units) and "avx_vnni" in machine.cpu_flags())
    if not units:
        pytest.skip("the library was built by a compiler that does not know AVX-VNNI")
    assert {"linear", "linear_argmax", "linear_topk", "moe", "attention_int8", "limit_int8"} <= set(units)
    below = {name: fields for name, level, _, fields in native.runtime().library.ops() if level == "avx2"}
    assert units.items() <= below.items()


@pytest.mark.parametrize("level", ["avx2", "avxvnni"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q8_0"])
def test_a_row_has_the_same_bits_alone_and_among_many_with_avx2(kind: str, level: str, levels: tuple[str, ...]) -> None:
    """Sums of products are exact: all kernels of a level give the same, also at the largest magnitudes."""
    if level not in levels:
        pytest.skip(f"needs {level}")
    gguf = pytest.importorskip("gguf")
    ops = native.table(1, level)
    quants = getattr(gguf.GGMLQuantizationType, kind)
    weight = torch.randn(40, 256).sign() if kind != "Q6_K" else torch.randn(40, 256)
    if kind == "Q6_K":
        raw = torch.randint(0, 256, (40, 210), dtype=torch.uint8)
        raw[:, 209] = 0x20
        data = raw.numpy()
    else:
        data = gguf.quants.quantize(weight.numpy(), quants)

    class Source:
        name = "weight"
        shape = (40, 256)

        def __init__(self) -> None:
            self.kind = kind

        def raw(self) -> object:
            return data

    packed = ops.prepare_linear([Source()], torch.float32, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    x = torch.randn(70, 256)
    x[3] = weight[0].sign()  # all of one magnitude: the words are as full as they can be
    x[4] = -x[3]
    whole, _ = ops.linear(x, packed)
    for count in (1, 2, 3, 5, 17, 33):
        assert torch.equal(ops.linear(x[:count], packed)[0], whole[:count]), count
    exact = torch.from_numpy(gguf.quants.dequantize(data, quants)).float()
    error = (whole - x @ exact.T).abs().max() / whole.abs().max()
    assert error < 2e-2
