"""Measure pictures that are asked for at random times: Phloem's shared steps beside diffusers, one after another, and
beside diffusers with whole requests in batches: all that wait when a batch begins, and none while it runs.

All draw the same prompts with the same seeds, asked for at the same moments, from the same folder, with the same
threads. Without a folder, a tiny one with random weights is made: its figures say what sharing steps does to overhead
and waiting on this machine, and nothing of real models.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import tempfile
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import torch

from phloem.bench._report import context, percentile, write_line
from phloem.bench._step_caches import compare
from phloem.cli._options import parse
from phloem.client.start import make_client
from phloem.core.caching import StepCaching, parsed
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.core.messages import Draw
from phloem.launch.door import EngineDoor, beginning
from phloem.launch.thread import EngineThread
from phloem.testing.pictures import KINDS, tiny_pictures
from phloem.utils import log, plots
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from phloem.client.client import EngineClient
    from phloem.core.config import Config

PROMPTS = (
    "draw a red cat",
    "a small house on the river",
    "a large tree with a leaf",
    "a blue dog",
    "the root of a tree",
)


@dataclass(frozen=True)
class Options:
    requests: int = opt(32, "How many pictures.")
    rate: float = opt(8.0, "Pictures a second that are asked for, at random moments; 0: all at once.")
    size: str = opt("64x64", "WIDTHxHEIGHT of each.")
    steps: int = opt(20, "Denoising steps of each.")
    family: str = opt("flux", "Which tiny folder is made where none is named.")
    rounds: int = opt(1, "Rounds of all, in turn.")
    batch: int = opt(8, "Most pictures of a batch of whole requests.")
    plot: str | None = opt(None, "PNG file to draw, of the last round.")
    step_caches: str | None = opt(None, "Instead: what step caches cost and save, such as 0.08,teacache:0.4,dbcache.")
    output: str | None = opt(None, "File to append JSON lines to.")


def main(argv: list[str]) -> int:
    config, options = parse("bench images", argv, Options, skip=("server",), description=__doc__ or "")
    _check(options)
    log.configure("warning")
    with tempfile.TemporaryDirectory() as folder:
        named = config.model.model_path != "demo"
        if not named:
            if options.family not in KINDS:
                raise BadRequest(f"family: {options.family!r} is not one of {', '.join(KINDS)}")
            sides = [int(side) for side in options.size.split("x")]
            defaults = json.dumps({"size": options.size, "max_pixels": sides[0] * sides[1], "steps": options.steps})
            made = tiny_pictures(Path(folder), options.family)
            config = config.with_(model_path=str(made), image_defaults=config.images.image_defaults or defaults)
        if options.step_caches:
            compare(config, _draws(options), _rules(options), options.output)
            return 0
        for _ in range(options.rounds):
            found = [
                _ours(config, options),
                *(_theirs(config, options, most) for most in dict.fromkeys((1, options.batch))),
            ]
            what = config.model.model_path if named else f"a tiny {options.family} with random weights"
            print(f"{options.requests} pictures of {options.size}, {options.steps} steps, {options.rate:g}/s, {what}")
            for record in found:
                _show(record)
                if options.output:
                    write_line(Path(options.output), {**record, **context(), "model": what})
            if options.plot:
                _plot(found, f"{options.requests} pictures of {options.size}, {options.rate:g} a second", options.plot)
    return 0


def _rules(options: Options) -> list[StepCaching]:
    """Commas part them, except in JSON, of which there may be one alone. Raises BadRequest."""
    text = options.step_caches or ""
    return [parsed(one, "step_caches") for one in ([text] if text.startswith("{") else text.split(","))]


def _check(options: Options) -> None:
    """Raises BadRequest."""
    if re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", options.size) is None:
        raise BadRequest(f"size: {options.size!r} is not WIDTHxHEIGHT, such as 64x64")
    if options.step_caches and any(rule.threshold == 0 for rule in _rules(options)):
        raise BadRequest(f"step_caches: {options.step_caches!r} has a threshold that is not above 0")
    for name, value in (
        ("requests", options.requests),
        ("steps", options.steps),
        ("rounds", options.rounds),
        ("batch", options.batch),
    ):
        if value < 1:
            raise BadRequest(f"{name}: {value} must be above 0")
    if not 0 <= options.rate < inf:
        raise BadRequest(f"rate: {options.rate} is not 0 or above")


def arrivals(options: Options) -> list[float]:
    """Seconds from the start at which pictures are asked for: the same in every run."""
    chance, at, found = random.Random(1), 0.0, list[float]()
    for _ in range(options.requests):
        found.append(at)
        at += chance.expovariate(options.rate) if options.rate > 0 else 0.0
    return found


def _draws(options: Options) -> list[Draw]:
    width, height = (int(side) for side in options.size.split("x"))
    return [
        Draw(
            id=str(at), prompt=PROMPTS[at % len(PROMPTS)], seed=at, width=width, height=height, steps=options.steps,
        )
        for at in range(options.requests)
    ]  # fmt: skip


def _ours(config: Config, options: Options) -> dict[str, Any]:
    with beginning():
        client, info, checkpoint = make_client(config)
        info.check_draws()
        link = EngineThread(config, checkpoint)
        door = EngineDoor(client, link)

    async def run() -> tuple[list[float], float]:
        client.attach(link)
        client.start()
        await client.wait_ready()
        await client.draw([Draw(id="warm", prompt=PROMPTS[0], seed=0, width=draws[0].width, height=draws[0].height,
                                steps=1)]).pictures()  # fmt: skip
        begun = perf_counter()
        found = await asyncio.gather(*(_one(client, draw, begun + at) for draw, at in zip(draws, times, strict=True)))
        return found, perf_counter() - begun

    draws, times = _draws(options), arrivals(options)
    work: Coroutine[Any, Any, tuple[list[float], float]] = run()
    try:
        latencies, seconds = door.run(work)
        step = (client.connection.ready or {})["decisions"]
    finally:
        door.end("done")
    budget = next(f"{value} ({why})" for name, value, why in step if name == "image_step_tokens")
    return {**_record("phloem", latencies, seconds, options), "image_step_tokens": budget}


async def _one(client: EngineClient, draw: Draw, at: float) -> float:
    """Seconds from the moment at which it is asked for."""
    await asyncio.sleep(max(0.0, at - perf_counter()))
    await client.draw([draw]).pictures()
    return perf_counter() - at


def _theirs(config: Config, options: Options, most: int) -> dict[str, Any]:
    """The pipeline's own loop over `most` pictures at once; what is asked for while it runs waits for its end."""
    import diffusers

    torch.set_num_threads(config.runtime.threads or available_cores())
    library: Any = diffusers
    pipe = library.DiffusionPipeline.from_pretrained(config.model.model_path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw(several: list[Draw], steps: int) -> None:
        generators = [torch.Generator().manual_seed(one.seed) for one in several]
        width, height = several[0].width, several[0].height
        prompts = [one.prompt for one in several]
        pipe(prompt=prompts, width=width, height=height, num_inference_steps=steps, generator=generators)

    draws, times, latencies = _draws(options), arrivals(options), list[float]()
    draw(draws[:1], 1)
    begun = perf_counter()
    while len(latencies) < len(draws):
        first = len(latencies)
        sleep(max(0.0, begun + times[first] - perf_counter()))
        now = perf_counter() - begun
        count = max(1, sum(at <= now for at in times[first : first + most]))
        draw(draws[first : first + count], options.steps)
        latencies += [perf_counter() - begun - at for at in times[first : first + count]]
    name = "diffusers, one by one" if most == 1 else f"diffusers, up to {most} whole requests"
    return _record(name, latencies, perf_counter() - begun, options)


def _record(name: str, latencies: list[float], seconds: float, options: Options) -> dict[str, Any]:
    width, height = (int(side) for side in options.size.split("x"))
    return {
        "engine": name,
        "requests": options.requests,
        "rate": options.rate,
        "size": options.size,
        "steps": options.steps,
        "seconds": seconds,
        "latency_p50_s": percentile(latencies, 0.5),
        "latency_p99_s": percentile(latencies, 0.99),
        "pixels_per_s": len(latencies) * width * height / seconds,
        "latencies_s": [round(one, 4) for one in sorted(latencies)],
    }


def _plot(records: list[dict[str, Any]], title: str, path: str) -> None:
    """How many pictures are there after how long, and how many pixels a second. Raises PhloemError."""
    pyplot = plots.pyplot()

    pyplot.rcParams["font.size"] = 10
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1))
    for at, record in enumerate(records):
        waits = record["latencies_s"]
        left.step(
            waits, [(place + 1) / len(waits) for place in range(len(waits))], where="post", label=record["engine"]
        )
        right.barh(at, record["pixels_per_s"] / 1e3)
    left.set(title=title, xlabel="seconds from the moment at which it was asked for", ylabel="share of pictures")
    left.legend(loc="lower right")
    right.set(title="thousand pixels a second", yticks=range(len(records)))
    right.set_yticklabels([record["engine"] for record in records])
    right.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _show(record: dict[str, Any]) -> None:
    print(
        f"{record['engine']:<34} latency p50 {record['latency_p50_s']:7.3f} s, p99 {record['latency_p99_s']:7.3f} s, "
        f"{record['pixels_per_s']:12,.0f} pixels/s"
    )
    print(json.dumps({name: value for name, value in record.items() if name != "latencies_s"}), flush=True)
