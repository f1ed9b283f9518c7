"""Show the machine, the libraries, and what would be chosen and why."""

from __future__ import annotations

import importlib.metadata
import platform as python_platform
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem import attention, platforms, quant
from phloem.bench.kernels import level_limits
from phloem.checkpoint.describe import described
from phloem.cli._options import parse
from phloem.core import resolve
from phloem.core.config import opt
from phloem.core.errors import ConfigError, PhloemError
from phloem.distributed.choose import choose
from phloem.engine.ranks import cards
from phloem.engine.ranks.parallel import ranks_of, refuse_device
from phloem.kernels import _native_build, native
from phloem.launch import checkup
from phloem.launch.ranks import decision_of
from phloem.platforms import cpu
from phloem.utils import machine
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from phloem.core.config import Config

DESCRIPTION = "Show the machine, the libraries, and what `phloem serve` would choose with the same options, and why."
_LIBRARIES = (
    "torch",
    "triton",
    "tokenizers",
    "safetensors",
    "gguf",
    "diffusers",
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "msgspec",
    "llguidance",
    "xgrammar",
    "flashinfer-python",
    "jax",
    "torch-npu",
)
_INTERESTING = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


@dataclass(frozen=True)
class Options:
    """What is looked at beside this machine."""

    nodes: bool = opt(
        False, "Meet the other nodes (nnodes, node_rank, dist_init_addr): given on each of them at the same time."
    )


def main(argv: list[str]) -> int:
    config, own = parse("doctor", argv, Options, description=DESCRIPTION)
    print(f"phloem {importlib.metadata.version('phloem')}, Python {python_platform.python_version()}\n")
    _machine()
    _libraries()
    sound = _model(config)
    if own.nodes:
        sound = _nodes(config) and sound
    return 0 if sound else 1


def _line(name: str, value: object) -> None:
    print(f"  {name:<18} {value}")


def _machine() -> None:
    free, total = machine.memory()
    flags = machine.cpu_flags()
    print("Machine")
    _line("processor", machine.cpu_name())
    _line("usable cores", available_cores())
    _line("memory", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    _line("instruction sets", ", ".join(flag for flag in _INTERESTING if flag in flags) or "nothing of use reported")
    _line("native kernels", native_state())
    for level, limits in _levels():
        _line(level, limits)
    _line("C++ compiler", shutil.which("c++") or shutil.which("g++") or "none (only needed to build the kernels)")


def _levels() -> list[tuple[str, str]]:
    """What each instruction set of the native kernels gives here, measured for a moment."""
    try:
        return level_limits(available_cores())
    except native.Unavailable:
        return []


def native_state() -> str:
    """Whether the native CPU kernels are there, of which sources, and what went wrong with their last build."""
    failed = _native_build.failure()
    if failed is not None:
        return f"NOT BUILT: {' '.join(failed.split())}"
    try:
        library = native.runtime().library
    except native.Unavailable as error:
        return str(error)
    old = _native_build.stale(library.built_from())
    return f"STALE: {old}" if old else f"built from {library.built_from()}, best level {library.levels()[-1]}"


def _libraries() -> None:
    print("\nLibraries")
    for name in _LIBRARIES:
        try:
            _line(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            _line(name, "not installed")


def _nodes(config: Config) -> bool:
    """Whether all nodes are there and agree."""
    print("\nNodes", flush=True)
    try:
        if config.nodes.nnodes == 1:
            raise ConfigError("nnodes is 1: there is no other node", param="nnodes")
        for name, told in checkup.look(config):
            _line(name, told)
    except PhloemError as error:
        _line("problem", error.message)
        return False
    return True


def _ranks(config: Config, platform: platforms.Platform) -> list[resolve.Decision]:
    """Of this machine, how many there would be, by what they would meet, and on which cards. Raises ConfigError."""
    cards.refuse(config)
    if ranks_of(config) == 1:
        return []
    refuse_device(config, platform.name, platform.facts)
    return [decision_of(config, *choose(config.runtime.tp_comm, meets=platform.facts.meets))]


def _model(config: Config) -> bool:
    """What would be chosen for this configuration, as far as it can be known without loading weights."""
    print("\nModel")
    model = config.model
    try:
        checkpoint = described(model)
    except PhloemError as error:
        _line("problem", error.message)
        return False
    _line("path", checkpoint.path)
    _line("format, family", f"{checkpoint.format}, {checkpoint.model_type}")
    if checkpoint.pictures is not None:
        _line("task", f"image  ({checkpoint.pictures.class_name}: docs/images.md)")
        return True
    _line("context, vocabulary", f"{checkpoint.context_length}, {checkpoint.vocab_size}")
    _line("model_impl", f"{checkpoint.chosen.impl}  ({checkpoint.chosen.reason})")
    if checkpoint.pooling is not None:
        _line("task", f"{checkpoint.pooling.task}  ({checkpoint.pooling.reason}: {checkpoint.pooling.about})")
    print("\nChoices")
    try:
        threads = resolve.threads(config.runtime.threads, available_cores())
        platform, device = platforms.choose(config.runtime.device, threads.value, compiles=True)
        level = cpu.level(config.runtime.cpu_level) if platform.facts.on_host and not platform.facts.compiles else []
        ops, why = platform.table(config.runtime.ops, float32=config.model.dtype == "float32")
        reader = quant.method_for(model.quantization, checkpoint.stored)
        form = "plain" if reader is None else reader.name
        form = reader.report.method if reader is not None and reader.report is not None else form
        decisions = [
            resolve.context_length(model.context_length, checkpoint.context_length, machine.memory()[1]),
            threads,
            device,
            *level,
            resolve.Decision("ops", ops.name, why),
            resolve.Decision("weights", form, "what stays packed shows when they are loaded"),
            *([] if ops.activations is None else [resolve.Decision("activations", *ops.activations)]),
            *_ranks(config, platform),
        ]
        for decision in decisions:
            _line(decision.name, f"{decision.value}  ({decision.reason})")
        _line("attention", f"one of {', '.join(platform.attention_backends())}, the first that accepts the model")
        _line("known backends", ", ".join(attention.BACKENDS.names()))
    except PhloemError as error:
        _line("problem", error.message)
        return False
    sys.stdout.flush()
    return True
