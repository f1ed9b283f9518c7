"""Measure a language model of diffusion: requests one after the other, then several in flight at once.

The same prompts, seeds and lengths both times. Told are tokens per second, tokens per forward (of a request's canvas),
the ratio, and whether the answers were the same ones. For sizes alone, weights may be random: `--model-path
FOLDER/config.json --load-format dummy --skip-tokenizer-init`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import phloem
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
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench dllm", argv, Options, skip=("server",), description=__doc__ or "")
    if min(options.requests, options.in_flight, options.prompt_tokens, options.tokens) < 1:
        raise BadRequest("requests, in_flight, prompt_tokens and tokens must be at least 1")
    settings = {**config.flat(), "log_level": "warning", "disable_radix_cache": True}
    with phloem.Engine(**settings) as engine:
        room = engine.info.context_length
        if options.prompt_tokens + options.tokens > room:
            raise BadRequest(f"prompts and answers of {options.prompt_tokens} + {options.tokens} tokens: {room} fit")
        made = np.random.default_rng(1)
        low, high = 3, min(engine.info.vocab_size, 150_000)
        prompts = made.integers(low, high, (options.requests, options.prompt_tokens)).tolist()
        engine.generate(input_ids=prompts[: options.in_flight], sampling_params=_sampling(options, 8))
        alone = _measured(engine, [[prompt] for prompt in prompts], options)
        size = options.in_flight
        together = _measured(engine, [prompts[at : at + size] for at in range(0, len(prompts), size)], options)
    same = sum(one == two for one, two in zip(alone["answers"], together["answers"], strict=True))
    record = {
        "benchmark": "dllm",
        "model": str(settings["model_path"]),
        "requests": options.requests,
        "in_flight": size,
        "tokens": options.tokens,
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
    if options.output:
        write_line(Path(options.output), record)
    return 0


def _sampling(options: Options, tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "temperature": options.temperature, "ignore_eos": True, "sampling_seed": 1}


def _measured(engine: phloem.Engine, groups: list[list[list[int]]], options: Options) -> dict[str, Any]:
    """Each group of prompts at once, one group after the other."""
    begun, answers = perf_counter(), list[list[int]]()
    passes = 0
    for group in groups:
        found: Any = engine.generate(input_ids=group, sampling_params=_sampling(options, options.tokens))
        answers += [one["output_ids"] for one in found]
        passes += sum(one["meta_info"].get("dllm_passes", one["meta_info"]["completion_tokens"]) for one in found)
    seconds, tokens = perf_counter() - begun, sum(map(len, answers))
    return {"rate": tokens / seconds, "per_forward": tokens / passes, "answers": answers}
