"""Write a checkpoint with weights of 4 or 8 bits, which this and other engines load."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import torch

from phloem.checkpoint.describe import describe, read_safetensors_header
from phloem.cli._options import parse_own
from phloem.core.config import opt
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import FAMILIES
from phloem.models._common import Decoder
from phloem.models._index import open_sources
from phloem.models._stored import as_base
from phloem.quant._writers import WRITERS, scheme

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint

DESCRIPTION = (
    "phloem quantize MODEL OUT --to int4|int8|fp8: write a checkpoint in the layout of compressed-tensors. MODEL is a "
    "directory of safetensors with 16- or 32-bit weights, or a hub id; OUT is a new directory. No data are needed: "
    "weights are rounded to the nearest. Embedding, head and the routers of experts stay as they are. "
    "`phloem bench accuracy` tells what it costs."
)
_LEFT_OUT = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".index.json")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_TABLES = ("wte", "wpe")  # read by row, as whatever is called an embedding
_POSITIONS = 64  # tables of positions are not used here


@dataclass(frozen=True)
class Options:
    model: str = opt("", "Directory or hub id to read; may stand first without its name.")
    out: str = opt("", "Directory to write; may stand second without its name.")
    to: Literal["int4", "int8", "fp8"] = opt(
        "int4",
        "int4: groups of inputs with a scale and a zero point; int8, fp8: a scale per output, and activations in 8 "
        "bits where an engine does that.",
    )
    group_size: int = opt(128, "Inputs of a group of int4: 32, 64 or 128. Smaller ones are nearer and take more room.")
    keep: tuple[str, ...] = opt((), "Modules that stay as they are, with * and ?: 'model.layers.0.*' '*.down_proj'.")
    revision: str | None = opt(None, "Branch, tag or commit of a hub id.")


def main(argv: list[str]) -> int:
    options = parse_own("quantize", _named(argv), Options, DESCRIPTION)
    if not options.model or not options.out:
        raise ConfigError("a model and a directory to write are needed: phloem quantize MODEL OUT --to int4")
    if options.group_size not in (32, 64, 128):
        raise ConfigError(f"group_size: {options.group_size} is not one of 32, 64, 128", param="group_size")
    out = Path(options.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; name a new directory", param="out")
    checkpoint = describe(options.model, "auto", options.revision)
    _check(checkpoint, out)
    _Writer(checkpoint, out, options).write()
    return 0


def _named(argv: list[str]) -> list[str]:
    """The first arguments without a dash are the model and the directory."""
    found = list(argv)
    for place, name in enumerate(("--model", "--out")):
        at = 2 * place
        if len(found) <= at or found[at].startswith("-"):
            break
        found[at : at + 1] = [name, found[at]]
    return found


def _check(checkpoint: Checkpoint, out: Path) -> None:
    """Raises ModelLoadError for what cannot be written so, and where the disk is too small."""
    if checkpoint.format != "safetensors":
        raise ModelLoadError(f"{checkpoint.path}: quantize reads safetensors, and this is {checkpoint.format}")
    if checkpoint.stored is not None:
        raise ModelLoadError(f"{checkpoint.path} is quantised already ({checkpoint.stored.method}): take the original")
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    size, free = sum(file.stat().st_size for file in checkpoint.files), shutil.disk_usage(there).free
    if free < size:
        raise ModelLoadError(f"{out}: {free >> 20} MiB are free on this disk, up to {size >> 20} MiB are needed")


class _Writer:
    """One run. config.json is written last: a directory of a run that ended early is no checkpoint."""

    def __init__(self, checkpoint: Checkpoint, out: Path, options: Options) -> None:
        self.checkpoint, self.out, self.options = checkpoint, out, options
        self.headers = {file: read_safetensors_header(file) for file in checkpoint.files}
        self.chosen = self._choose()
        spans = [entry["data_offsets"] for header in self.headers.values() for entry in header.values()]
        self.bar = _Bar(sum(stop - start for start, stop in spans))
        self.wrong = self.whole = 0.0  # squares of errors and of values

    def _choose(self) -> set[str]:
        """Names in the files of the matrices that are quantised."""
        checkpoint = self.checkpoint
        ctx = BuildContext(Ops(), torch.float32, torch.device("cpu"))
        model = FAMILIES.get(checkpoint.model_type)(checkpoint.config, replace(ctx, name=""), _POSITIONS)
        if not isinstance(model, Decoder):
            raise ModelLoadError(f"{checkpoint.path}: quantize does not know the layers of {checkpoint.model_type}")
        sources, _ = open_sources(checkpoint, model.index, model.checkpoint_name)
        model.index.check(sources, str(checkpoint.path))  # what could not be served would not be told before
        names = [name for header in self.headers.values() for name in header]
        rename = as_base(model.checkpoint_name, names, model.index.embedding)
        linear: set[str] = set()
        for name, places in model.index.slots.items():
            weight, number = places[0]
            part = weight.part(number)
            plain = part is None or (part.expert is None and not part.transposed)
            if weight.role == "matrix" and plain and not weight.names[0].startswith(("lm_head", model.index.embedding)):
                linear.add(name)
        chosen = {name for name in names if rename(name) in linear and self._wanted(name)}
        if not chosen:
            group = self.options.group_size
            whole = f" whose inputs are whole groups of {group} (--group-size)" if self.options.to == "int4" else ""
            raise ModelLoadError(f"{checkpoint.path}: no matrix of its own in a tensor{whole} is left to be quantised")
        return chosen

    def _wanted(self, name: str) -> bool:
        module, _, last = name.rpartition(".")
        router = any(part in _ROUTERS for part in module.split(".")[-2:])
        own = module.rpartition(".")[2]
        table = own in _TABLES or "embed" in own
        kept = any(fnmatch.fnmatchcase(module, pattern) for pattern in self.options.keep)
        entry = next(header[name] for header in self.headers.values() if name in header)
        fits = self.options.to != "int4" or entry["shape"][-1] % self.options.group_size == 0
        floats = entry["dtype"] in ("F32", "F16", "BF16") and len(entry["shape"]) == 2
        return last == "weight" and floats and fits and not (router or kept or table)

    def write(self) -> None:
        begun, out = perf_counter(), self.out
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.checkpoint.path.iterdir()):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(_LEFT_OUT):
                shutil.copyfile(file, out / file.name)
        where = {name: file.name for file in self.checkpoint.files for name in self._write_file(file)}
        after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        if len(self.checkpoint.files) > 1:
            index = {"metadata": {"total_size": after}, "weight_map": where}
            (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config = json.loads((self.checkpoint.path / "config.json").read_text())
        config["quantization_config"] = scheme(self.options.to, self.options.group_size, self._ignored())
        (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        self.bar.end()
        before, error = self.bar.total, (self.wrong / max(self.whole, 1e-30)) ** 0.5
        print(
            f"{out}: {len(self.chosen)} matrices in {self.options.to}, {before / 1e9:.2f} -> {after / 1e9:.2f} GB in "
            f"{perf_counter() - begun:.0f} s; weights are off by {100 * error:.2f} %. Serve it: phloem serve {out}"
        )

    def _write_file(self, file: Path) -> list[str]:
        """One file of the result beside one of the source; the names in it."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        with safe_open(str(file), framework="pt", device="cpu") as source:
            for name, entry in self.headers[file].items():
                tensor = source.get_tensor(name)
                tensors |= self._written(name, tensor) if name in self.chosen else {name: tensor}
                start, stop = entry["data_offsets"]
                self.bar.advance(stop - start, name)
        save_file(tensors, self.out / file.name, metadata={"format": "pt"})
        return list(tensors)

    def _written(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not bool(torch.isfinite(tensor).all()):
            raise ModelLoadError(f"{name} has numbers that are none (infinite or NaN)")
        parts, values = WRITERS[self.options.to](tensor, self.options.group_size)
        wide = tensor.float()
        self.wrong += float((values - wide).square().sum())
        self.whole += float(wide.square().sum())
        stem = name.removesuffix("weight")
        return {stem + part: found.contiguous() for part, found in parts.items()}

    def _ignored(self) -> list[str]:
        """Modules with a matrix that stays as it is, for engines that go by names."""
        matrices = [
            name for header in self.headers.values() for name, entry in header.items() if len(entry["shape"]) > 1
        ]
        plain = {name.rpartition(".")[0] for name in matrices if name not in self.chosen and name.endswith(".weight")}
        return sorted(plain | {"lm_head"})


class _Bar:
    """Progress on standard error: a bar that is drawn over on a terminal, a line for each tenth elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begun, self.tenth = total, 0, perf_counter(), 0
        self.drawn = sys.stderr.isatty()

    def advance(self, size: int, name: str) -> None:
        self.done += size
        share = min(1.0, self.done / max(1, self.total))
        rate = self.done / 1e6 / max(1e-6, perf_counter() - self.begun)
        if self.drawn:
            bar = ("#" * round(30 * share)).ljust(30)
            print(f"\r[{bar}] {share:4.0%} {rate:6.0f} MB/s  {name[-48:]:<48}", end="", file=sys.stderr, flush=True)
        elif int(10 * share) > self.tenth:
            self.tenth = int(10 * share)
            print(f"{share:4.0%} {rate:.0f} MB/s", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.drawn:
            print(file=sys.stderr)
