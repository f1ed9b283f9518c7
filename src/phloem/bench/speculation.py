"""What speculation gains: tokens a step, speed beside plain decoding, and whether the answers are the same.

Two engines in this process answer the same requests in turns, one with drafts and one without, and the one without
once more: its two times beside each other (`plain`), and the standard error of the turns' ratios, say how far a ratio
can be trusted, and its two answers whether plain decoding is the same each time. As many requests run at a time as
--batch says: where one has ended, the next begins, as in a server that is kept busy. Prompts are in the prefix cache
before the time is taken, so decoding is what is measured; every round has prompts of its own, so no answer was seen
before.
The table also has what a draft costs and how long steps of n rows took.

With --llama-server, llama.cpp's own modes answer the same prompts beside ours instead: servers, each asked one request
at a time at temperature 0.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import statistics
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import phloem
from phloem.bench import _spec_peers
from phloem.bench._peers import children, end_children, found_program
from phloem.bench._report import context, write_line
from phloem.bench._spec_texts import KINDS, Asked, Writer, aligned, draw
from phloem.checkpoint.describe import describe
from phloem.cli._options import parse
from phloem.core.config import opt
from phloem.core.errors import BadRequest
from phloem.core.speculation import MODELS, wanted
from phloem.speculation.drafters import DRAFTERS, of_texts
from phloem.speculation.texts import Text
from phloem.utils import plots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.core.config import Config


@dataclass(frozen=True)
class Options:
    workload: str = opt(",".join(KINDS), "Which, with commas.")
    batch: str = opt("1,4,16", "Requests at a time, with commas.")
    rounds: int = opt(3, "Turns of each side.")
    output_len: int = opt(128, "Output length in tokens.")
    seed: int = opt(1, "Seed of the prompts.")
    output: str | None = opt(None, "File to append JSON lines to.")
    plot: str | None = opt(None, "PNG to draw.")
    llama_server: str | None = opt(None, "llama.cpp's llama-server: compare with its own drafting, at one request.")
    llama_model: str | None = opt(None, "GGUF file for llama.cpp (default: the model's own).")
    llama_modes: str = opt(
        ",".join(_spec_peers.LLAMA_MODES), "Of llama.cpp, with commas; also NAME=ARGUMENTS of llama-server."
    )
    our_modes: str = opt(",".join(_spec_peers.OUR_MODES), "Ours beside them, with commas.")
    llama_args: str = opt("", "Further arguments for llama-server, as one string.")
    draft: str | None = opt(None, "GGUF file that drafts in both (default: each model for itself).")
    prompts: int = opt(3, "Prompts of a round and workload, at least.")
    waves: int = opt(4, "Prompts of a round for each request at a time, at least: the last ones run beside fewer.")
    logs: str = opt("speculation-logs", "Folder for the logs of the servers beside llama.cpp.")


@dataclass
class Turn:
    """One side's answers to the requests of one round."""

    seconds: float
    answers: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        return sum(len(answer["output_ids"]) for answer in self.answers)

    def total(self, field: str) -> int:
        return sum(answer["meta_info"].get(field, 0) for answer in self.answers)

    @property
    def ids(self) -> list[list[int]]:
        return [answer["output_ids"] for answer in self.answers]


@dataclass
class Turns:
    """What the same requests took and gave: plainly, with drafts, plainly again."""

    plain: Turn
    drafting: Turn
    again: Turn


def main(argv: list[str]) -> int:
    config, options = parse("bench speculation", argv, Options, skip=("server",), description=__doc__ or "")
    names = options.workload.split(",")
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise BadRequest(f"unknown workload {unknown[0]!r}; known here: {', '.join(KINDS)}")
    if options.llama_server is not None:
        return _beside_llama(config, options, names, argv)
    sizes = [int(size) for size in options.batch.split(",")]
    settings = {**config.flat(), "log_level": "warning"}
    off = {name: None for name in settings if name.startswith("speculative_") and "threshold" not in name}
    with (
        phloem.Engine(**{**settings, **off, "speculative_algorithm": "none"}) as plain,
        phloem.Engine(**settings) as drafting,
    ):
        records = _measure(plain, drafting, names, sizes, options)
        steps = drafting.get_server_info()["internal_states"][0]["prepared"].get("speculation", {})
        decision = [one for one in drafting.ready["decisions"] if one[0] == "speculative_algorithm"]
    print(f"{decision[0][1]}: {decision[0][2]}")
    cost = draft_microseconds(config)
    _table(records)
    print(f"a draft: {cost:.1f} us; steps of n rows, ms: {json.dumps(steps.get('step_ms', {}))}")
    head = _head(config, argv)
    for record in [*records, {"what": "steps", "draft_us": cost, **steps}]:
        if options.output:
            write_line(Path(options.output), {**head, **record})
    if options.plot:
        plot(records, Path(options.plot))
    return 0 if all(record["same"] or record["plain_other_answers"] for record in records) else 1


def _head(config: Config, argv: list[str]) -> dict[str, Any]:
    command = "phloem bench speculation " + " ".join(argv)
    model = config.model.model_path
    return {**context(), "commit": commit(), "benchmark": "speculation", "command": command, "model": model}


def _beside_llama(config: Config, options: Options, names: Sequence[str], argv: list[str]) -> int:
    """llama.cpp's modes and ours. Raises BadRequest where there is no file for llama.cpp, or what `sides` raises."""
    model, binary = config.model.model_path, found_program(options.llama_server)
    checkpoint = describe(model)
    file = options.llama_model or (str(checkpoint.path) if checkpoint.format == "gguf" else None)
    if file is None or binary is None:
        raise BadRequest("llama.cpp serves GGUF files, and this model is none: name one by --llama-model")
    modes = [mode for mode in options.llama_modes.split(",") if mode]
    ours = [mode for mode in options.our_modes.split(",") if mode]
    found = _spec_peers.sides(binary, file, model, ours, modes, options.draft, options.llama_args)
    writer, rng = Writer(model), random.Random(options.seed)
    rounds = [
        {name: draw(name, options.prompts, writer, rng, options.output_len) for name in names}
        for _ in range(options.rounds)
    ]
    others, before = children(), signal.signal(signal.SIGTERM, _leave)  # else the servers would outlive us
    try:
        records = _spec_peers.compare(found, rounds, Path(options.logs))
    finally:
        signal.signal(signal.SIGTERM, before)
        end_children(others)
    _spec_peers.table(records)
    head = {**_head(config, argv), "beside": version_of(binary), "llama_model": Path(file).name}
    for record in records:
        if options.output:
            write_line(Path(options.output), {**head, **record})
    if options.plot:
        _spec_peers.plot(records, Path(options.plot))
    return 0


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def version_of(binary: str) -> str:
    """What a llama-server says of itself."""
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=60)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
    return lines[0] if lines else ""


def commit() -> str:
    """Of the source that runs; empty where it is no checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return done.stdout.strip()


def _measure(
    plain: Any, drafting: Any, names: Sequence[str], sizes: Sequence[int], options: Options
) -> list[dict[str, Any]]:
    rng, page = random.Random(options.seed), plain.ready["page_size"]
    found: dict[tuple[str, int], list[Turns]] = defaultdict(list)
    for engine in (plain, drafting):
        for size in sizes:  # recordings, and memory that is touched for the first time
            engine.generate(["once upon a time"] * size, {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True})
    for number in range(options.rounds):
        for name in names:
            for size in sizes:
                count = max(options.prompts, (options.waves if size > 1 else 1) * size)
                asked = aligned(draw(name, count, plain, rng, options.output_len), page)
                turns = found[name, size]
                turns.append(_turns(plain, drafting, asked, size, len(turns)))
                one = _record(name, size, turns)
                print(f"round {number + 1}, {name}, {size}: {one['speed_up']:.2f}x so far", flush=True)
    return [_record(name, size, turns) for (name, size), turns in found.items()]


def _turns(plain: Any, drafting: Any, asked: Asked, size: int, number: int) -> Turns:
    """Drafts between the two plain sides, before them and after them in turns: each place is as warm as the others."""
    order = [(0, plain), (2, plain)]
    order.insert((1, 0, 2)[number % 3], (1, drafting))
    done = {place: _turn(engine, asked, size) for place, engine in order}
    return Turns(done[0], done[1], done[2])


def _turn(engine: Any, asked: Asked, size: int) -> Turn:
    engine.flush_cache(timeout=10.0)
    engine.generate(input_ids=asked.prompts, sampling_params={"max_new_tokens": 1, "temperature": 0.0})
    start = perf_counter()
    answers = asyncio.run(in_flight(engine, asked, size))
    return Turn(perf_counter() - start, answers)


async def in_flight(engine: Any, asked: Asked, size: int) -> list[dict[str, Any]]:
    """The answers, in the order of the prompts; `size` requests at a time."""
    free = asyncio.Semaphore(size)

    async def answer(prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        async with free:
            return await engine.async_generate(input_ids=prompt, sampling_params=dict(params))

    return await asyncio.gather(*map(answer, asked.prompts, asked.params))


def _pace(turns: Sequence[Turn]) -> float:
    """Seconds a token."""
    return sum(turn.seconds for turn in turns) / sum(turn.tokens for turn in turns)


def _record(name: str, size: int, turns: Sequence[Turns]) -> dict[str, Any]:
    plain, again, drafting = ([getattr(one, side) for one in turns] for side in ("plain", "again", "drafting"))
    steps = sum(turn.total("spec_verify_ct") for turn in drafting)
    right, drafts = (
        sum(turn.total(f"spec_num_{kind}_drafts") for turn in drafting) for kind in ("correct", "proposed")
    )
    other, own = (
        sum(x != y for one in turns for x, y in zip(one.plain.ids, getattr(one, side).ids, strict=True))
        for side in ("drafting", "again")
    )
    ratios = [_pace([one.plain, one.again]) / _pace([one.drafting]) for one in turns]
    return {
        "workload": name,
        "batch": size,
        "plain_tok_per_s": 1 / _pace([*plain, *again]),
        "tok_per_s": 1 / _pace(drafting),
        "speed_up": _pace([*plain, *again]) / _pace(drafting),
        "speed_ups": [round(ratio, 3) for ratio in ratios],
        "error": statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None,
        "plain_beside_plain": _pace(plain) / _pace(again),
        "accept_length": (steps + right) / steps if steps else 1.0,
        "accept_rate": right / drafts if drafts else None,
        "same": not other,
        "other_answers": other,
        "plain_other_answers": own,
        "answers": sum(len(one.plain.answers) for one in turns),
    }


def draft_microseconds(config: Config, tokens: int = 2000) -> float:
    """Median of a draft behind one more token of a text that repeats itself, its index included."""
    asked = wanted(config)
    name = asked.algorithm if asked.algorithm in DRAFTERS.names() and asked.algorithm not in MODELS else "suffix"
    drafter, rng = of_texts(name)(asked), random.Random(1)
    base = [rng.randrange(3000) for _ in range(tokens)]
    text, took = Text("bench", "", [*base, *base[:50]], tokens, easy=True), list[float]()
    drafter.draft(text, asked.drafts)
    for token in base[50:650]:
        text.tokens.append(token)
        start = perf_counter()
        drafter.draft(text, asked.drafts)
        took.append(perf_counter() - start)
    return 1e6 * statistics.median(took)


def _table(records: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'workload':>12} {'batch':>5} {'plain tok/s':>12} {'tok/s':>8} {'speed-up':>13} {'plain':>6} {'accept':>7} "
        f"{'rate':>6} same"
    )
    for one in records:
        error = "" if one["error"] is None else f"+-{one['error']:.2f}"
        rate = "-" if one["accept_rate"] is None else f"{one['accept_rate']:.2f}"
        same = f"NO: {one['other_answers']} of {one['answers']}, plain {one['plain_other_answers']}"
        print(
            f"{one['workload']:>12} {one['batch']:>5} {one['plain_tok_per_s']:>12,.0f} "
            f"{one['tok_per_s']:>8,.0f} {one['speed_up']:>7.2f}x{error:>6} {one['plain_beside_plain']:>5.2f} "
            f"{one['accept_length']:>7.2f} {rate:>6}  {'yes' if one['same'] else same}"
        )
    if any(record["plain_other_answers"] for record in records):
        print(
            "plain decoding was not the same twice: steps of prompts, and of more than 24 rows, have other last bits;"
        )
        print("with --enable-deterministic-inference every answer is the same")


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed beside plain decoding by workload and batch, as a PNG."""
    pyplot = plots.pyplot()

    names = list(dict.fromkeys(record["workload"] for record in records))
    sizes = sorted({record["batch"] for record in records})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5))
    width = 0.8 / len(sizes)
    for place, size in enumerate(sizes):
        of_size = {record["workload"]: record for record in records if record["batch"] == size}
        at = [number + place * width for number in range(len(names))]
        left.bar(at, [of_size[name]["speed_up"] for name in names], width, label=f"{size} at a time")
        right.bar(at, [of_size[name]["accept_length"] for name in names], width)
    for axes, title in ((left, "speed beside plain decoding"), (right, "tokens a step of a request")):
        axes.set_xticks([number + 0.4 - width / 2 for number in range(len(names))], names)
        axes.set_title(title)
        axes.axhline(1, color="black", linewidth=0.8)
    left.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
