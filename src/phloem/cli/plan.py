"""Which layouts of a model fit on so many GPUs, and how fast each would be."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields

from phloem.cli._options import parse_own
from phloem.core.config import opt
from phloem.core.errors import ConfigError
from phloem.planning import report
from phloem.planning.layouts import Layout
from phloem.planning.machines import MACHINES, machine
from phloem.planning.plan import Load, plan
from phloem.planning.shape import read_shape
from phloem.planning.steps import Efficiency

DESCRIPTION = """Layouts (tp, pp, ep, attention dp, dp) that fit, their memory, step times and throughput, best first.

Nothing is loaded and no GPU is needed: it is arithmetic, by the formulae of docs/planning.md. The model may also be
given as the first argument: a config.json, a model's directory, one of the hub's cache, a GGUF file, a hub id."""


@dataclass(frozen=True)
class Options:
    model: str = opt("", "The model: only its configuration is read.")
    gpus: int = opt(1, "How many GPUs.")
    gpu: str = opt("h100", f"Which: {', '.join(MACHINES)}, or custom.")
    prompt: int = opt(2048, "Tokens of a prompt.")
    output: int = opt(256, "Tokens of an answer.")
    context: int = opt(0, "Tokens that there is to be room for, of each request; default: prompt and output.")
    batch: int = opt(0, "Requests that run at a time, on all GPUs together; default: as many as fit.")
    hit: float = opt(0.0, "Share of prompts that is found in the cache.")
    itl_ms: float = opt(0.0, "Longest time between two tokens of a request; 0: any.")
    chunk: int = opt(8192, "Prompt tokens of one step.")
    quantization: str | None = opt(
        None, "Format of weights, instead of the checkpoint's: bf16, fp8, int8, int4, mxfp4, nvfp4."
    )
    expert_quantization: str | None = opt(None, "And of routed experts alone.")
    kv_cache_dtype: str = opt("auto", "Type of the KV cache: auto (bf16), fp8, int8.")
    redundant_experts: int = opt(0, "Experts that are held twice, where they lie over several ranks.")
    mem_fraction: float = opt(0.92, "Share of a GPU's memory that may be taken.")
    layout: str | None = opt(None, "Only this one, as tp=8,ep=8,attn_dp=8.")
    memory_gib: float | None = opt(None, "Instead of the GPU's own figure: memory,")
    bandwidth: float | None = opt(None, "its bandwidth in GB/s,")
    bf16: float | None = opt(None, "dense TFLOPS of bf16,")
    fp8: float | None = opt(None, "of fp8,")
    fp4: float | None = opt(None, "of fp4,")
    link: float | None = opt(None, "GB/s of links between GPUs of one domain, in each direction,")
    domain: int | None = opt(None, "GPUs of a domain,")
    net: float | None = opt(None, "and GB/s of each GPU to other domains.")
    overlap: float = opt(0.0, "Share of the exchange between experts that is hidden behind products.")
    top: int = opt(10, "Layouts to print.")
    json: bool = opt(False, "Print JSON.")


_ABOVE = ("gpus", "prompt", "output", "chunk", "top")  # the numbers that are at least 1
MOST_GPUS = 1_000_000  # whose divisors are tried one by one
_SHARES = {"hit": "[0, 1)", "mem_fraction": "(0, 1]", "overlap": "[0, 1]"}


def _check(options: Options) -> None:
    """Raises ConfigError for a number that is none, or that makes no sense there, by the option's name."""
    for name in (field.name for field in fields(options)):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ConfigError(f"{name}: {value} is not a number to count with", param=name)
        if value < (name in _ABOVE):
            raise ConfigError(f"{name}: {value:g} must be {'above 0' if name in _ABOVE else '0 or more'}", param=name)
        if name == "gpus" and value > MOST_GPUS:
            raise ConfigError(f"gpus: {value} are more than plans are made for, {MOST_GPUS:,}", param=name)
        span = _SHARES.get(name)
        inside = {None: True, "[0, 1]": value <= 1, "[0, 1)": value < 1, "(0, 1]": 0 < value <= 1}
        if not inside[span]:
            raise ConfigError(f"{name}: {value:g} must be in {span}", param=name)


def main(argv: list[str]) -> int:
    argv = ["--model", *argv] if argv and not argv[0].startswith("-") else argv
    options = parse_own("plan", argv, Options, DESCRIPTION)
    if not options.model:
        raise ConfigError("which model? phloem plan MODEL --gpus N", param="model")
    _check(options)
    found = machine(
        options.gpu, memory_gib=options.memory_gib, bandwidth=options.bandwidth, bf16=options.bf16, fp8=options.fp8,
        fp4=options.fp4, link=options.link, domain=options.domain, net=options.net,
    )  # fmt: skip
    load = Load(
        options.prompt, options.output, options.context, options.batch, options.hit, options.itl_ms / 1e3,
        options.chunk, options.redundant_experts, options.mem_fraction,
    ).checked()  # fmt: skip
    shape = read_shape(options.model, options.kv_cache_dtype, options.quantization, options.expert_quantization)
    only = None if options.layout is None else Layout.parse(options.layout)
    answer = plan(shape, found, options.gpus, load, Efficiency(overlap=options.overlap), only)
    if options.json:
        print(json.dumps(report.as_json(shape, found, options.gpus, load, answer, options.top)))
    else:
        print(report.as_text(shape, found, options.gpus, load, answer, options.top))
    return 0
