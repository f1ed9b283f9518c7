"""Adapters of a model that ranks share out: each keeps its share of every matrix, and answers are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import logprobs, ours, write_adapter
from native_support import built
from share_support import checkpoint

from phloem import Engine
from phloem.core.errors import BadRequest, PhloemError
from phloem.testing.checkpoints import VOCAB

TOKENS = [7, 99, 31, 250, 12, 12, 301, 44, 5, 180]
SMALL: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 2048, "max_lora_rank": 16, "log_level": "warning"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes", "ops"),
    [
        ("llama", {"tp_size": 2}, "reference"),
        ("qwen2", {"tp_size": 2}, None),
        ("qwen3", {"tp_size": 4}, "reference"),
        ("qwen2", {"pp_size": 2}, None),
    ],
    ids=["llama", "qwen2-native", "qwen3", "qwen2-stages"],
)
def test_logits_are_those_of_peft(family: str, sizes: dict[str, int], ops: str | None, tmp_path: Path) -> None:
    """Of an adapter from the start and of one that comes while they serve, beside rows without; and of none again."""
    pytest.importorskip("peft", reason="PEFT says what is right")
    if ops is None and not built():
        pytest.skip("the native library is not built (no C++ compiler?)")
    base = checkpoint(family, tmp_path / "base")
    early = write_adapter(base, tmp_path / "early")
    late = write_adapter(base, tmp_path / "late", seed=2, target_modules=["q_proj", "v_proj", "down_proj"], r=7)
    plain = logprobs(base, None, TOKENS)[:-1]
    with Engine(model_path=str(base), ops=ops, lora_paths=[f"early={early}"], **sizes, **SMALL) as engine:
        engine.load_lora_adapter("late", str(late))
        for name, folder in (("early", early), ("late", late)):
            want = logprobs(base, folder, TOKENS)[:-1]
            assert (want - plain).abs().max() > 0.05
            torch.testing.assert_close(ours(engine, TOKENS, VOCAB, lora_path=name), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(engine, TOKENS, VOCAB), plain, rtol=1e-4, atol=1e-4)
        ask = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
        found = engine.generate(["hello"] * 3, ask, lora_path=["late", None, "early"])
        alone = [engine.generate("hello", ask, lora_path=name)["output_ids"] for name in ("late", None, "early")]
        assert [one["output_ids"] for one in found] == alone and len({str(ids) for ids in alone}) == 3
        engine.unload_lora_adapter("late")
        with pytest.raises(BadRequest, match="no adapter 'late'"):
            engine.generate("hello", ask, lora_path="late")


@pytest.mark.slow
def test_what_needs_whole_weights_of_the_base_is_refused_with_the_reason(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT writes the adapter")
    base = checkpoint("llama", tmp_path / "base")
    folder = write_adapter(base, tmp_path / "dora", use_dora=True)
    with Engine(model_path=str(base), ops="reference", enable_lora=True, tp_size=2, **SMALL) as engine:
        with pytest.raises(PhloemError, match="weights are shared out among 2 ranks"):
            engine.load_lora_adapter("dora", str(folder))
        assert len(engine.generate("hello", {"max_new_tokens": 4, "ignore_eos": True})["output_ids"]) == 4
