"""Heads on disk: in the published layout, which servers load, and beside it what a training goes on from."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from phloem.core.errors import ModelLoadError, PhloemError
from phloem.speculation.token_map import read_token_map
from phloem.training.low_rank import whole_weights
from phloem.training.states import NoSpace, check_space

if TYPE_CHECKING:
    from torch import Tensor, nn

STATE = "training_state.pt"
WEIGHTS = "model.safetensors"
_NAME = re.compile(r"epoch_(\d+)_step_(\d+)")


@dataclass
class Map:
    """A draft vocabulary."""

    d2t_D: Tensor  # int64: added to a draft id it is the model's
    t2d_V: Tensor  # bool

    @property
    def ids_D(self) -> Tensor:
        return self.d2t_D + torch.arange(len(self.d2t_D), device=self.d2t_D.device)


def write_head(folder: Path, head: nn.Module, config: dict[str, Any], words: Map | None, dtype: str) -> None:
    """config.json and model.safetensors, as SGLang and Phloem read them. `words` None: the model's vocabulary."""
    kind: torch.dtype = getattr(torch, dtype)
    tensors = {name: value.detach().to("cpu", kind).contiguous() for name, value in whole_weights(head).items()}
    if words is not None:
        tensors |= {"d2t": words.d2t_D.cpu().contiguous(), "t2d": words.t2d_V.cpu().contiguous()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=2) + "\n")


def save(
    output: Path,
    name: str,
    head: nn.Module,
    config: dict[str, Any],
    words: Map | None,
    dtype: str,
    state: dict[str, Any],
) -> Path:
    """A checkpoint, all of it or nothing.

    Raises:
        NoSpace: it does not fit on the disk, or cannot be written.
    """
    folder, part = output / name, output / f".{name}.part"
    values = sum(one.numel() for one in head.parameters())
    check_space(output, values * (4 + 12) + (16 << 20), "a checkpoint")  # weights, masters, two moments
    for left in output.glob(".epoch_*.part"):  # of a training that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir()
        write_head(part, head, config, words, dtype)
        torch.save({**state, "head": head.state_dict()}, part / STATE)
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise NoSpace(f"{folder} cannot be written: {error}") from None
    return folder


def found_in(output: Path) -> list[Path]:
    """Checkpoints that can be gone on from, the latest last."""
    folders = [one for one in output.glob("epoch_*_step_*") if _NAME.fullmatch(one.name) and (one / STATE).is_file()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    matched = _NAME.fullmatch(folder.name)
    return int(matched[2]) if matched is not None else -1


def keep_last(output: Path, count: int) -> None:
    for folder in found_in(output)[:-count]:
        shutil.rmtree(folder, ignore_errors=True)


def load_state(folder: Path) -> dict[str, Any]:
    """What `save` was given, and the head's weights. Raises ModelLoadError."""
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelLoadError(f"{folder / STATE} cannot be read: {error}") from None


def begin_from(head: nn.Module, folder: Path) -> None:
    """Weights of a head's file. Raises ModelLoadError where they are not this head's."""
    try:
        found = {name.removeprefix("model."): one for name, one in load_file(folder / WEIGHTS).items()}
        wanted = {name: found.get(name) for name in head.state_dict()}
        missing = [name for name, one in wanted.items() if one is None]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        head.load_state_dict({name: one.float() for name, one in wanted.items() if one is not None})
    except Exception as error:
        raise ModelLoadError(f"draft_model_path: {folder / WEIGHTS}: {error}") from None


def read_map(path: Path, vocab_size: int) -> Map:
    """A head's vocabulary from `d2t` (or from a list of token ids, as --speculative-token-map has it).

    Raises:
        ConfigError: it cannot be read, or leads to tokens that are not there.
    """
    ids_D = read_token_map(path, vocab_size, "vocab_mapping_path")
    t2d_V = torch.zeros(vocab_size, dtype=torch.bool)
    t2d_V[ids_D] = True
    return Map(ids_D - torch.arange(len(ids_D)), t2d_V)


def read_config(path: str) -> dict[str, Any]:
    """A head's config.json that sizes are taken from. Raises PhloemError."""
    place = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        found: Any = json.loads(place.read_text())
    except (OSError, ValueError) as error:
        raise PhloemError(f"draft_model_config: {place} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise PhloemError(f"draft_model_config: {place}: expected an object")
    return dict(found)
