"""Measure a conversation about one picture: how long each turn's first token takes, and what was found again."""

from __future__ import annotations

import io
import json
import statistics
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

QUESTION = "What is in the picture, and where?"


@dataclass(frozen=True)
class Options:
    turns: int = opt(5, "Questions about the picture, each with the whole conversation before it.")
    width: int = opt(448, "Of the picture, in pixels.")
    height: int = opt(448, "Of the picture, in pixels.")
    output_len: int = opt(8, "Tokens of an answer.")
    rounds: int = opt(5, "Conversations, each about a picture of its own; medians are told.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench pictures", argv, Options, skip=("server",), description=__doc__ or "")
    if min(options.turns, options.width, options.height, options.output_len, options.rounds) < 1:
        raise BadRequest("turns, width, height, output_len and rounds must be above 0")
    with phloem.Engine(**{**config.flat(), "log_level": "warning"}) as engine:
        record = {**context(), "model": config.model.model_path, **measure(engine, options)}
    _show(record)
    if options.output:
        write_line(Path(options.output), record)
    return 0


def measure(engine: Any, options: Options) -> dict[str, Any]:
    """Milliseconds to the first token of each turn, medians; tokens of the prompts, and how many were cached."""
    conversation(engine, options, 0)  # steps are recorded, kernels and threads woken
    found = [conversation(engine, options, number) for number in range(1, options.rounds + 1)]
    state = engine.get_server_info()["internal_states"][0]
    times = [statistics.median(each[0] for each in turn) * 1e3 for turn in zip(*found, strict=True)]
    return {
        "picture": [options.width, options.height],
        "ttft_ms": times,
        "prompt_tokens": [turn[1] for turn in found[-1]],
        "cached_tokens": [turn[2] for turn in found[-1]],
        "later_by_first": max(times[1:]) / times[0] if times[1:] else None,
        "pictures_encoded": state["pictures_encoded"],
        "pictures_found": state["pictures_found"],
    }


def conversation(engine: Any, options: Options, number: int) -> list[tuple[float, int, int]]:
    """Of each turn: seconds to the first token, prompt tokens, cached ones."""
    picture = draw(number, options.width, options.height)
    messages: list[dict[str, Any]] = []
    found: list[tuple[float, int, int]] = []
    params = {"max_new_tokens": options.output_len, "temperature": 0.0, "ignore_eos": True}
    for turn in range(options.turns):
        image = [] if turn else [{"type": "image", "image": picture}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": QUESTION}]})
        begun, first, answer = perf_counter(), 0.0, dict[str, Any]()
        ids, pictures = engine.encode_chat(messages), engine.pictures_of(messages)
        for event in engine.generate(input_ids=ids, image_data=pictures, sampling_params=params, stream=True):
            first, answer = first or perf_counter() - begun, event
        messages.append({"role": "assistant", "content": answer["text"]})
        meta = answer["meta_info"]
        found.append((first, meta["prompt_tokens"], meta["cached_tokens"]))
    return found


def draw(seed: int, width: int, height: int) -> bytes:
    """A PNG of smooth colours, with as much noise as a photograph."""
    from PIL import Image

    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + random.integers(-6, 7, smooth.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _show(record: dict[str, Any]) -> None:
    turns = zip(record["ttft_ms"], record["prompt_tokens"], record["cached_tokens"], strict=True)
    for number, (ttft, prompt, cached) in enumerate(turns, 1):
        print(f"turn {number}: {ttft:8.1f} ms to the first token, {cached} of {prompt} prompt tokens cached")
    if record["later_by_first"] is not None:
        print(f"later turns take at most {record['later_by_first']:.3f} of the first")
    print(f"{record['pictures_encoded']} pictures encoded, {record['pictures_found']} found in the encoder cache")
    print(json.dumps(record))
