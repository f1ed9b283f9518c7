"""Calls to an engine of pictures that fail in ways nobody foresaw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phloem import platforms
from phloem.checkpoint.describe import described
from phloem.client.start import make_client
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.core.messages import Control, ControlReply
from phloem.launch.pictures import PictureCore, refuse_ranks
from phloem.testing.checkpoints import tiny_checkpoint
from phloem.testing.pictures import tiny_pictures


class Broken:
    def use(self, args: dict[str, Any]) -> None:
        raise OverflowError("int too large")


def test_a_call_that_fails_is_answered_and_does_not_end_the_engine() -> None:
    told: list[ControlReply] = []
    core: Any = PictureCore.__new__(PictureCore)
    core._send, core.studio = told.append, SimpleNamespace(wardrobe=Broken(), jobs={})
    core._control(Control(id="1", name="set_lora"))
    assert [(reply.id, reply.ok, reply.message) for reply in told] == [("1", False, "OverflowError: int too large")]


@pytest.mark.parametrize("asked", [{"image_step_cache": "magic"}, {"enable_cfg_parallel": True}, {"offload": True}])
def test_a_model_of_text_refuses_what_only_models_that_draw_read(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="models that draw") as error:
        make_client(Config.from_flat({"model_path": str(path), **asked}))
    assert error.value.param == next(iter(asked))


@pytest.mark.slow
def test_a_step_cache_that_leaves_no_block_out_is_refused_before_the_server_is_ready(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
    settings = {"model_path": str(tiny_pictures(tmp_path, "flux")), "device": "cpu"}
    config = Config.from_flat({**settings, "image_step_cache": '{"kind": "dbcache", "fn_compute_blocks": 64}'})
    with pytest.raises(ConfigError, match=r"image_step_cache: .*2 blocks, and 64 first") as error:
        PictureCore(config, described(config.model), lambda _: None)
    assert error.value.param == "image_step_cache"


@pytest.mark.parametrize(
    ("more", "why"),
    [({}, "a second device, and 1 is there"), ({"offload": True}, "offload none")],
    ids=["one device", "offload"],
)
def test_two_devices_are_refused_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], why: str
) -> None:
    """A processor stands for an accelerator, of which there is one."""
    pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
    chosen, reason = platforms.choose("cpu", None)
    monkeypatch.setattr(chosen, "facts", dataclasses.replace(chosen.facts, on_host=False))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    monkeypatch.setattr(platforms, "choose", lambda *_: (chosen, reason))
    settings = {"model_path": str(tiny_pictures(tmp_path, "flux")), "device": "cpu", "enable_cfg_parallel": True}
    config = Config.from_flat({**settings, **more})
    with pytest.raises(ConfigError, match=why) as error:
        PictureCore(config, described(config.model), lambda _: None)
    assert error.value.param == "enable_cfg_parallel"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"enable_cfg_parallel": True}, "enable_cfg_parallel"),
        ({"offload": True}, "tp_size"),
        ({"image_step_cache": "0.1"}, "image_step_cache"),
        ({"tp_size": 3}, "tp_size"),  # of two heads
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.slow
def test_ranks_of_pictures_are_refused_beside_what_they_do_not_go_with(
    tmp_path: Path, more: dict[str, Any], param: str
) -> None:
    pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
    settings = {"model_path": str(tiny_pictures(tmp_path, "flux")), "device": "cpu", "ulysses_degree": 2}
    if "tp_size" in more:
        del settings["ulysses_degree"]
    config = Config.from_flat({**settings, **more})
    with pytest.raises(ConfigError) as error:
        PictureCore(config, described(config.model), lambda _: None)
    assert error.value.param == param


@pytest.mark.parametrize(
    "asked", [{"pp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"tp_size": 2, "attn_dp_size": 2}], ids=str
)
def test_ranks_of_other_kinds_are_refused_of_models_that_draw(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="model that draws") as error:
        refuse_ranks(Config.from_flat(asked))
    assert error.value.param in asked
