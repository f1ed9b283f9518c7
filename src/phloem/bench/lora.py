"""Measure what adapters cost: a batch of decoding requests without one, with one, and each with its own, in turns."""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import phloem
from phloem.bench._report import context, write_line
from phloem.bench._text import Texts
from phloem.checkpoint.describe import describe
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Options:
    adapters: str = opt("0,1,64", "How many adapters the requests have among them; several with commas.")
    batch: int = opt(32, "Requests at a time.")
    rank: int = opt(16, "Rank of the adapters, which are random and of all linear layers.")
    input_len: int = opt(32, "Prompt length in tokens.")
    output_len: int = opt(64, "Output length in tokens.")
    rounds: int = opt(5, "How often each is measured, in turns.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench lora", argv, Options, skip=("server",), description=__doc__ or "")
    counts = [int(count) for count in options.adapters.split(",")]
    if any(count < 0 for count in counts) or options.batch < 1 or options.rank < 1 or options.rounds < 1:
        raise BadRequest("adapters must not be negative; batch, rank and rounds must be above 0")
    settings = {**config.flat(), "log_level": "warning", "enable_lora": True, "disable_radix_cache": True}
    settings["max_loaded_loras"] = max(2, *counts)
    settings["max_lora_rank"] = settings["max_lora_rank"] or options.rank
    settings["max_running_requests"] = max(options.batch, settings["max_running_requests"] or 0)
    with tempfile.TemporaryDirectory() as folder, phloem.Engine(**settings) as engine:
        loads = [_load(engine, number, Path(folder), options) for number in range(max(counts))]
        record = {**context(), "model": settings["model_path"], **measure(engine, counts, options)}
    if loads:
        record["load_ms"] = statistics.median(loads) * 1e3
    _show(record)
    if options.output:
        write_line(Path(options.output), record)
    return 0


def measure(engine: Any, counts: list[int], options: Options) -> dict[str, Any]:
    """Output tokens per second with so many adapters: medians of rounds in which each had its turn."""
    texts = Texts(engine.tokenizer, 1)
    prompts = [texts.draw(options.input_len) for _ in range(options.batch)]
    params = {"max_new_tokens": options.output_len, "temperature": 0.0, "ignore_eos": True}
    found: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(options.rounds + 1):
        for count in counts:
            names = [f"a{at % count}" if count else None for at in range(options.batch)]
            start = perf_counter()
            engine.generate(prompts, params, lora_path=names)
            if turn:  # the first one records steps
                found[count].append(options.batch * options.output_len / (perf_counter() - start))
    base = found.get(0)
    speeds = {count: statistics.median(values) for count, values in found.items()}
    ratios = {
        count: statistics.median(ours / plain for ours, plain in zip(values, base, strict=True))
        for count, values in found.items()
        if base is not None and count
    }
    return {"batch": options.batch, "rank": options.rank, "output_tok_per_s": speeds, "ratios": ratios}


def _load(engine: Any, number: int, folder: Path, options: Options) -> float:
    path = folder / f"a{number}"
    write(path, engine.config.model.model_path, options.rank, number)
    start = perf_counter()
    engine.load_lora_adapter(f"a{number}", str(path))
    return perf_counter() - start


def write(path: Path, base: str, rank: int, seed: int) -> None:
    """A random adapter of all linear layers of a llama-like model, in bfloat16."""
    from safetensors.torch import save_file

    config = describe(base).config
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    q, kv = heads * head, (config.get("num_key_value_heads") or heads) * head
    shapes = dict(zip(TARGETS, [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)], strict=False))
    shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (outputs, inputs) in shapes.items():
            room = "mlp" if name in TARGETS[4:] else "self_attn"
            stem = f"base_model.model.model.layers.{layer}.{room}.{name}"
            down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            up = torch.randn(outputs, rank, generator=generator) * 0.01
            tensors |= {f"{stem}.lora_A.weight": down.bfloat16(), f"{stem}.lora_B.weight": up.bfloat16()}
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS)}
    (path / "adapter_config.json").write_text(json.dumps(settings))


def _show(record: dict[str, Any]) -> None:
    for count, speed in record["output_tok_per_s"].items():
        ratio = record["ratios"].get(count)
        beside = "" if ratio is None else f", {ratio:.3f} of the speed without"
        print(f"{count:3d} adapters of rank {record['rank']}: {speed:,.0f} output tok/s{beside}")
    if "load_ms" in record:
        print(f"an adapter is loaded in {record['load_ms']:.0f} ms")
    print(json.dumps(record))
