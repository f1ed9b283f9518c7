"""The model's states of the training texts: kept in files, as far as they may grow, or computed anew for each batch."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from phloem.core.errors import ConfigError, PhloemError
from phloem.training.target import States

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.training.data import Sample
    from phloem.training.target import Target

SHARD = 64 << 20  # bytes of a file, about
MANIFEST = "manifest.json"
TOKENS = 1024  # that the model reads at once
SPARE = 256 << 20  # bytes that stay free on the disk
# Names in the files; the first four are SpecForge's.
KEYS = {
    "input_ids": "ids_S",
    "loss_mask": "mask_S",
    "aux_hidden_state": "aux_SA",
    "hidden_state": "last_SN",
    "target_token": "best_S",
    "target_logsumexp": "sum_S",
}


class NoSpace(PhloemError):
    """A disk is full; what was written before it stays."""


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises NoSpace where `folder`'s disk has less than that."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(f"{folder}: {what} takes {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")


class Library:
    """States by a sample's number. `folder` None: nothing is kept."""

    def __init__(self, target: Target, samples: Sequence[Sample], folder: Path | None, most: int, dtype: str) -> None:
        self._target, self._samples, self._folder = target, samples, folder
        self._most, self._dtype = most, getattr(torch, dtype)
        self._places: dict[int, str] = {}  # the file of each sample
        self._open: dict[str, Any] = {}

    @property
    def kept(self) -> int:
        """Samples that are in files."""
        return len(self._places)

    def fill(self, told: Callable[[int, int], None]) -> None:
        """Compute what is not in the files yet, until they are as large as they may become. `told`: done, of all.

        Raises:
            ConfigError: the folder holds states of something else.
            NoSpace: the disk is full.
        """
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"hidden_states_dir: {self._folder}: {error.strerror}"
            raise ConfigError(message, param="hidden_states_dir") from None
        used = self._read_manifest()
        waiting: dict[int, States] = {}
        size = 0
        begin = self.kept  # samples are kept in their order
        for numbers in batches_of([len(one.ids) for one in self._samples], begin):
            for number, states in zip(numbers, self._compute(numbers), strict=True):
                states.aux_SA, states.last_SN = states.aux_SA.to(self._dtype), states.last_SN.to(self._dtype)
                if used + size + states.nbytes > self._most:
                    self._write(waiting, size)
                    return
                waiting[number] = states
                size += states.nbytes
            if size >= SHARD:
                self._write(waiting, size)
                used, size, waiting = used + size, 0, {}
            told(self.kept + len(waiting), len(self._samples))
        self._write(waiting, size)

    def get(self, numbers: Sequence[int]) -> list[States]:
        missing = [number for number in numbers if number not in self._places]
        computed = dict(zip(missing, self._compute(missing), strict=True)) if missing else {}
        return [computed[number] if number in computed else self._load(number) for number in numbers]

    def _compute(self, numbers: Sequence[int]) -> list[States]:
        return self._target.states([self._samples[number] for number in numbers])

    def _load(self, number: int) -> States:
        assert self._folder is not None
        name = self._places[number]
        try:
            if name not in self._open:
                self._open[name] = safe_open(self._folder / name, "pt")
            found = {ours: self._open[name].get_tensor(f"{number}.{theirs}") for theirs, ours in KEYS.items()}
        except Exception as error:
            raise PhloemError(f"{self._folder / name} cannot be read: {error}; remove the folder") from None
        return States(**found)

    def _write(self, waiting: dict[int, States], size: int) -> None:
        if not waiting or self._folder is None:
            return
        check_space(self._folder, size + SPARE, "the next file of hidden states")
        tensors: dict[str, Tensor] = {}
        for number, states in waiting.items():
            tensors |= {f"{number}.{theirs}": vars(states)[ours].contiguous() for theirs, ours in KEYS.items()}
        name = f"states-{min(waiting):06d}.safetensors"
        part = self._folder / f".{name}.part"
        try:
            save_file(tensors, part)
            part.replace(self._folder / name)
            self._places |= dict.fromkeys(waiting, name)
            manifest = self._folder / f".{MANIFEST}.part"
            manifest.write_text(json.dumps({"of": self._facts(), "places": self._places}))
            manifest.replace(self._folder / MANIFEST)
        except Exception as error:
            part.unlink(missing_ok=True)
            raise NoSpace(f"{self._folder}: hidden states cannot be written: {error}") from None

    def _facts(self) -> dict[str, Any]:
        """What makes states useless for another training."""
        texts = hashlib.sha256()
        for one in self._samples:
            texts.update(repr((one.ids, one.mask)).encode())
            texts.update(b"".join(item.digest for item in one.media))
        target = self._target
        return {
            "target": str(target.checkpoint.path),
            "layers": list(target.layers),
            "hidden_size": target.model.hidden_size,
            "dtype": str(self._dtype),
            "texts": texts.hexdigest(),
        }

    def _read_manifest(self) -> int:
        """Bytes that are there already."""
        assert self._folder is not None
        path = self._folder / MANIFEST
        if not path.exists():
            return 0
        try:
            found: Any = json.loads(path.read_text())
            facts, places = found["of"], {int(number): str(name) for number, name in found["places"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path} is broken: remove the folder", param="hidden_states_dir") from None
        if differs := sorted(key for key, value in self._facts().items() if facts.get(key) != value):
            message = f"{self._folder} holds states of other {', '.join(differs)}: remove it, or name another folder"
            raise ConfigError(message, param="hidden_states_dir")
        gone = {name for name in places.values() if not (self._folder / name).is_file()}
        self._places = {number: name for number, name in places.items() if name not in gone}
        if gone:  # they are kept in their order, so what stands behind a gap is written anew
            first = min(number for number, name in places.items() if name in gone)
            self._places = {number: name for number, name in self._places.items() if number < first}
        return sum((self._folder / name).stat().st_size for name in set(self._places.values()))


def batches_of(lengths: Sequence[int], begin: int = 0) -> list[list[int]]:
    """Numbers of texts from `begin` on, in order, in lists of about TOKENS tokens."""
    found: list[list[int]] = []
    room = 0
    for number in range(begin, len(lengths)):
        if lengths[number] > room or not found:
            found.append([])
            room = TOKENS
        found[-1].append(number)
        room -= lengths[number]
    return found
