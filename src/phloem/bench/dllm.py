"""Measure a language model of diffusion: requests one after the other, then several in flight at once.

The same prompts, seeds and lengths both times. Told are tokens per second, tokens per forward (of a request's canvas),
the ratio, and whether the answers were the same ones. For sizes alone, weights may be random: `--shape llada2_mini
--layers 4`, or `--model-path FOLDER/config.json --load-format dummy --skip-tokenizer-init`. `--profile` says where a
pass spends its time.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import phloem
from phloem.bench._dllm_profile import SHAPES, Profile, evenly, profiled, write_shape
from phloem.bench._report import context, write_line
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest


@dataclass(frozen=True)
class Options:
    requests: int = opt(16, "How many requests.")
    in_flight: int = opt(8, "Requests in flight at once, in the second part.")
    prompt_tokens: int = opt(48, "Tokens of each prompt.")
    tokens: int = opt(64, "Tokens of each answer.")
    temperature: float = opt(0.0, "Temperature of the draws.")
    shape: str | None = opt(None, f"A model of random weights instead of the given one: {', '.join(SHAPES)}.")
    layers: int = opt(4, "Layers of that shape.")
    even: bool = opt(False, "Masked places read tokens that differ, so that experts are chosen evenly.")
    profile: bool = opt(False, "Time the parts of a pass.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench dllm", argv, Options, skip=("server",), description=__doc__ or "")
    if min(options.requests, options.in_flight, options.prompt_tokens, options.tokens) < 1:
        raise BadRequest("requests, in_flight, prompt_tokens and tokens must be at least 1")
    settings = {**config.flat(), "log_level": "warning", "disable_radix_cache": True}
    with ExitStack() as stack:
        if options.shape is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            path = write_shape(options.shape, options.layers, folder)
            settings |= {"model_path": str(path), "load_format": "dummy", "skip_tokenizer_init": True}
        engine = stack.enter_context(phloem.Engine(**settings))
        record = measure(engine, options)
    named = str(config.model.model_path) if options.shape is None else f"{options.shape}, {options.layers} layers"
    record["model"] = named
    record["quantization"] = config.model.quantization
    if options.output:
        write_line(Path(options.output), record)
    return 0


def measure(engine: phloem.Engine, options: Options) -> dict[str, Any]:
    """Print what was found, and give it as a record. Raises BadRequest."""
    room = engine.info.context_length
    if options.prompt_tokens + options.tokens > room:
        raise BadRequest(f"prompts and answers of {options.prompt_tokens} + {options.tokens} tokens: {room} fit")
    made = np.random.default_rng(1)
    low, high = 3, min(engine.info.vocab_size, 150_000)
    prompts = made.integers(low, high, (options.requests, options.prompt_tokens)).tolist()
    size = options.in_flight
    with evenly(high) if options.even else nullcontext():
        engine.generate(input_ids=prompts[:size], sampling_params=_sampling(options, 8))
        alone = _measured(engine, [[prompt] for prompt in prompts], options)
        together = _measured(engine, [prompts[at : at + size] for at in range(0, len(prompts), size)], options)
    same = sum(one == two for one, two in zip(alone["answers"], together["answers"], strict=True))
    record = {
        "benchmark": "dllm",
        "requests": options.requests,
        "in_flight": size,
        "tokens": options.tokens,
        "even": options.even,
        "alone_tokens_per_s": alone["rate"],
        "together_tokens_per_s": together["rate"],
        "ratio": together["rate"] / alone["rate"],
        "tokens_per_forward": alone["per_forward"],
        "same_answers": same,
        **context(),
    }
    print(f"one at a time: {alone['rate']:.1f} tokens/s, {alone['per_forward']:.2f} tokens per forward")
    print(f"{size} in flight: {together['rate']:.1f} tokens/s: {record['ratio']:.2f} times as many")
    print(f"same answers: {same} of {options.requests}")
    if options.profile:
        record |= {"alone_ms": alone["ms"], "together_ms": together["ms"], "eager": [alone["eager"], together["eager"]]}
        print(_table(alone, together))
    return record


def _table(alone: dict[str, Any], together: dict[str, Any]) -> str:
    """What a pass of one and of several spends where, and how many times as much of that a pass of several gives."""
    each = together["passes"] and alone["passes"] / together["passes"]  # requests of a pass
    lines = [f"| of a pass, ms | one | {each:.1f} in flight | gain |", "| --- | --- | --- | --- |"]
    for name, took in together["ms"].items():
        one = alone["ms"].get(name, 0.0)
        lines.append(f"| {name} | {one:.2f} | {took:.2f} | {each * one / took if took else 0.0:.2f} |")
    return "\n".join(lines)


def _sampling(options: Options, tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "temperature": options.temperature, "ignore_eos": True, "sampling_seed": 1}


def _measured(engine: phloem.Engine, groups: list[list[list[int]]], options: Options) -> dict[str, Any]:
    """Each group of prompts at once, one group after the other."""
    answers = list[list[int]]()
    passes, profile = 0, Profile()
    with ExitStack() as stack:
        if options.profile:
            profile = stack.enter_context(profiled())
        begun = perf_counter()
        for group in groups:
            found: Any = engine.generate(input_ids=group, sampling_params=_sampling(options, options.tokens))
            answers += [one["output_ids"] for one in found]
            passes += sum(one["meta_info"].get("dllm_passes", one["meta_info"]["completion_tokens"]) for one in found)
        seconds, tokens = perf_counter() - begun, sum(map(len, answers))
    return {
        "rate": tokens / seconds,
        "per_forward": tokens / passes,
        "answers": answers,
        "ms": profile.per_pass(seconds),
        "passes": profile.passes,
        "eager": profile.eager,
    }
