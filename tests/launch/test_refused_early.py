"""What does not go together is refused before any rank is started and any weight read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import plain_adapter
from safetensors.torch import load_file, save_file
from share_support import checkpoint

from phloem.checkpoint.describe import describe
from phloem.checkpoint.families import family
from phloem.core.config import Config
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.launch import core
from phloem.models import qwen3_moe
from phloem.models._common import Decoder
from phloem.testing.checkpoints import families, tiny_checkpoint

SUFFIX, SEVERAL = {"speculative_algorithm": "suffix"}, {"pp_size": 2}
DRAFT = {"speculative_algorithm": "standalone", "speculative_draft_model_path": "MODEL"}
CAPTURE = {"enable_spec_capture": True, "spec_capture_dir": "here"}


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("ranks were started")

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(core, "RankProcesses", started)
    monkeypatch.setattr(Decoder, "load", read)


def refusal(path: Path | str, **options: Any) -> str:
    settings = {name: str(path) if value == "MODEL" else value for name, value in options.items()}
    config = Config.from_flat({"model_path": str(path), **settings})
    with pytest.raises(ConfigError) as caught:
        core.serve(config, describe(str(path)), lambda message: None, lambda _: [])
    return caught.value.message


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({**SUFFIX, "enable_lora": True}, "suffix cannot serve this model: beside adapters"),
        ({**SUFFIX, **SEVERAL, "enable_lora": True}, "suffix cannot serve this model: beside adapters"),
        (
            {**DRAFT, **SEVERAL},
            "draft_model cannot serve this model: a model that drafts runs on one rank, and pp_size",
        ),
        ({**DRAFT, "tp_size": 2}, "a model that drafts runs on one rank, and tp_size is 2"),
        ({"speculative_algorithm": "mtp", **SEVERAL}, "a model that drafts runs on one rank, and pp_size is 2"),
        ({**CAPTURE, **SEVERAL}, "enable_spec_capture: states are captured by one engine on one rank"),
        ({**CAPTURE, "dp_size": 2}, "enable_spec_capture: states are captured by one engine on one rank"),
        ({"spec_capture_dir": "here"}, "enable_spec_capture must be given with it"),
        ({"speculative_algorithm": "sufix"}, "known: auto, none"),
        ({"disaggregation_mode": "prefill", **SEVERAL}, r"each of several ranks has a part of every page (pp_size 2)"),
        ({"kt_num_gpu_experts": 1, **SEVERAL}, "kt_num_gpu_experts: not with pp_size above 1"),
        ({"kt_num_gpu_experts": 1}, "kt_num_gpu_experts: this model has no routed experts"),
        ({"enable_return_routed_experts": True, "tp_size": 2}, "enable_return_routed_experts: not with tp_size above"),
        ({"enable_return_routed_experts": True}, "enable_return_routed_experts: llama has no experts"),
        ({"enable_eplb": True, "tp_size": 2, "ep_size": 2}, "enable_eplb: llama has no routed experts"),
        ({"expert_distribution_recorder_mode": "stat"}, "llama has no routed experts"),
        ({"lora_paths": ["nowhere=/nowhere"]}, "adapter /nowhere"),
    ],
)
def test_of_a_model_without_experts(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    assert why in refusal(checkpoint("llama", tmp_path), **options)


def test_of_a_model_with_states(tmp_path: Path) -> None:
    path = checkpoint("qwen3_next", tmp_path)
    assert "states without refused drafts are made anew on one rank, and pp_size" in refusal(path, **SUFFIX, **SEVERAL)


def test_ranks_on_a_device_that_is_no_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one; it is not looked at."""
    monkeypatch.setattr("phloem.platforms.named", lambda requested: requested)
    monkeypatch.setattr("phloem.platforms.compiles", lambda requested: False)
    why = "tp_size 2: ranks run on processors, or on graphics cards that meet by NCCL, not on xpu"
    assert why in refusal(checkpoint("llama", tmp_path), tp_size=2, device="xpu")


def test_adapters_that_ranks_do_not_share_out(tmp_path: Path) -> None:
    path, adapter = checkpoint("llama", tmp_path / "model"), tmp_path / "adapter"
    plain_adapter(path, adapter)
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    low = refusal(path, lora_paths=[f"a={adapter}"], max_lora_rank=rank - 1)
    assert f"its rank is {rank}, at most {rank - 1} is served (max_lora_rank)" in low
    file = adapter / "adapter_model.safetensors"
    name = "base_model.model.lm_head.modules_to_save.weight"
    save_file({**load_file(file), name: torch.zeros(4, 4)}, file)
    why = refusal(path, lora_paths=[f"a={adapter}"], tp_size=2)
    assert name in why and "served by one rank alone" in why


@pytest.mark.parametrize(
    "options", [{"enable_lora": True, "max_lora_rank": 4}, {"expert_distribution_recorder_mode": "stat"}]
)
def test_a_model_is_built_once(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is asked what it lacks is the one whose weights are read."""
    path, built, read = str(checkpoint("qwen3_moe", tmp_path)), list[Any](), list[Any]()
    real = qwen3_moe.build

    def build(*args: Any) -> Any:
        built.append(real(*args))
        return built[-1]

    def load(model: Any, *_: Any) -> None:
        read.append(model)
        raise ModelLoadError("far enough")

    monkeypatch.setattr(qwen3_moe, "build", build)
    monkeypatch.setattr(Decoder, "load", load)
    config = Config.from_flat({"model_path": path, **options})
    with pytest.raises(ModelLoadError, match="far enough"):
        core.serve(config, describe(path), lambda message: None, lambda _: [])
    assert len(built) == 1 and read == built


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_of_no_family_that_is_served_with_adapters(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None lacks what adapters need: all get as far as their weights."""
    path = str(tiny_checkpoint(name, tmp_path))
    found = describe(path)
    if found.pooling is not None or family(name).diffusion is not None:
        pytest.skip("served otherwise")
    config = Config.from_flat({"model_path": path, "enable_lora": True})
    with pytest.raises(AssertionError, match="weights were read"):
        core.serve(config, found, lambda message: None, lambda _: [])
