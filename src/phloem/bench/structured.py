"""What structured output costs, and what jump-forward gains.

Cost: the same prompts and output lengths, free and under a grammar, in turns on one server. Gain: one schema with long
fixed keys, on a server that jumps and on one that does not, in turns; decode steps are read from the servers.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from phloem.bench._client import Client, Result, Target
from phloem.bench._http import run
from phloem.bench._own_server import own_server
from phloem.bench._report import context, write_line
from phloem.bench._text import Texts
from phloem.bench.serving import load_encoder
from phloem.cli._options import parse_own
from phloem.core.config import opt
from phloem.core.errors import PhloemError

# Never complete within the benchmark, and hardly anything in it is forced: what is measured is the masks.
ENDLESS = {"type": "array", "items": {"type": "string", "minLength": 8}, "minItems": 5000}

_KEYS = (
    *("customer_identification_number", "preferred_delivery_address_country", "estimated_delivery_duration_in_days"),
    *("requires_signature_on_delivery", "payment_authorisation_status", "number_of_packages_in_this_shipment"),
    *("insurance_coverage_included", "carbon_neutral_shipping_selected"),
)
_VALUES: tuple[dict[str, Any], ...] = (
    *({"type": "integer", "minimum": 100, "maximum": 999}, {"enum": ["Austria", "Brazil", "Canada"]}),
    *({"type": "integer", "minimum": 1, "maximum": 30}, {"type": "boolean"}, {"enum": ["pending", "granted"]}),
    *({"type": "integer", "minimum": 1, "maximum": 9}, {"type": "boolean"}, {"type": "boolean"}),
)
FIXED_KEYS = {
    "type": "object",
    "properties": dict(zip(_KEYS, _VALUES, strict=True)),
    "required": list(_KEYS),
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Options:
    url: str | None = opt(None, "Server to measure; default: one of our own.")
    url_without_jump: str | None = opt(None, "The same server with --disable-jump-forward, to compare with.")
    model: str = opt("demo", "Model name to ask for; without --url also the model that is served.")
    tokenizer: str = opt("demo", "Model path whose tokenizer measures the prompts.")
    api_key: str | None = opt(None, "Bearer token to send.")
    concurrency: int = opt(16, "Requests in flight.")
    input_len: int = opt(64, "Prompt length in tokens.")
    output_len: int = opt(128, "Output length in tokens of the cost measurement.")
    rounds: int = opt(3, "Turns of each side.")
    seed: int = opt(1, "Seed of the prompts.")
    server_args: str = opt("", "Further arguments for our own servers, as one string.")
    output: str | None = opt(None, "File to append JSON lines to.")


@dataclass
class Sample:
    """One turn of one side."""

    seconds: float
    tokens: int
    steps: int | None


def main(argv: list[str]) -> int:
    options = parse_own("bench structured", argv, Options, __doc__ or "")
    texts = Texts(load_encoder(options.tokenizer), options.seed)
    with ExitStack() as stack:
        url, plain = options.url, options.url_without_jump
        if url is None:
            arguments = [options.model, "--log-level", "warning", *options.server_args.split()]
            url, _ = stack.enter_context(own_server(arguments))
            plain, _ = stack.enter_context(own_server([*arguments, "--disable-jump-forward"]))
        records = run(_measure(options, texts, url, plain))
    for record in records:
        print(_line(record))
        print(json.dumps(record))
        if options.output:
            write_line(Path(options.output), record)
    return 0


async def _measure(options: Options, texts: Texts, url: str, plain: str | None) -> list[dict[str, Any]]:
    free = {"temperature": 0.0}
    endless = {**free, "json_schema": json.dumps(ENDLESS)}
    fixed = {"ignore_eos": False, "json_schema": json.dumps(FIXED_KEYS)}
    records = [await _compare(options, texts, "cost", {"free": (url, free), "constrained": (url, endless)})]
    if plain is not None:
        sides = {"free": (plain, free), "constrained": (plain, endless)}
        records.append(await _compare(options, texts, "cost without jump-forward", sides))
        sides = {"stepping": (plain, fixed), "jumping": (url, fixed)}
        records.append(await _compare(options, texts, "jump-forward", sides))
    return records


async def _compare(
    options: Options, texts: Texts, name: str, sides: dict[str, tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Two sides in turns, the same prompts for both in each turn; the second is compared with the first."""
    clients = {
        side: Client(Target(url.rstrip("/"), options.model, "completions", options.api_key, extra))
        for side, (url, extra) in sides.items()
    }
    samples: dict[str, list[Sample]] = {side: [] for side in sides}
    length = options.output_len if name.startswith("cost") else 512
    try:
        for client in clients.values():
            await _turn(client, [texts.draw(16)], 4 if name.startswith("cost") else length)  # compiles the grammar
        for turn in range(options.rounds):
            prompts = [texts.draw(options.input_len) for _ in range(options.concurrency)]
            order = list(sides) if turn % 2 == 0 else list(sides)[::-1]
            for side in order:
                await clients[side].post("/flush_cache")
                samples[side].append(await _turn(clients[side], prompts, length))
    finally:
        for client in clients.values():
            await client.close()
    return _record(options, name, samples)


async def _turn(client: Client, prompts: list[str], length: int) -> Sample:
    before = await _steps(client)
    start = perf_counter()
    results: list[Result] = await asyncio.gather(*(client.ask(prompt, length, True) for prompt in prompts))
    seconds = perf_counter() - start
    errors = sorted({result.error for result in results if result.error})
    if errors:
        raise PhloemError(f"requests failed: {'; '.join(errors)}")
    after = await _steps(client)
    steps = after - before if after is not None and before is not None else None
    return Sample(seconds, sum(result.output_tokens for result in results), steps)


async def _steps(client: Client) -> int | None:
    """Steps that the engine has made since its start; None where the server does not tell."""
    info = await client.get("/server_info")
    states = info.get("internal_states") if isinstance(info, dict) else None
    steps = states[0].get("steps") if states else None
    return int(steps) if steps is not None else None


def _record(options: Options, name: str, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    first, second = samples
    # A turn's neighbours in time are compared with each other: the machine's mood is the same for both.
    pairs = list(zip(samples[first], samples[second], strict=True))
    speeds = [(b.tokens / b.seconds) / (a.tokens / a.seconds) for a, b in pairs]
    record: dict[str, Any] = {
        **context(),
        "benchmark": "structured",
        "what": name,
        "model": options.model,
        "concurrency": options.concurrency,
        "sides": {
            side: {
                "output_tok_per_s": statistics.median(s.tokens / s.seconds for s in taken),
                "seconds": statistics.median(s.seconds for s in taken),
                "tokens": [s.tokens for s in taken],
                "steps": [s.steps for s in taken],
            }
            for side, taken in samples.items()
        },
        "speed_ratio": statistics.median(speeds),
        "speed_ratios": speeds,
        "time_ratio": statistics.median(a.seconds / b.seconds for a, b in pairs),
    }
    if all(s.steps is not None for taken in samples.values() for s in taken):
        record["step_ratio"] = statistics.median((a.steps or 0) / max(1, b.steps or 0) for a, b in pairs)
    return record


def _line(record: dict[str, Any]) -> str:
    sides = ", ".join(
        f"{side} {found['output_tok_per_s']:,.0f} tok/s ({found['seconds']:.2f} s, {found['steps'][-1]} steps)"
        for side, found in record["sides"].items()
    )
    second = list(record["sides"])[1]
    text = f"{record['what']} at {record['concurrency']} in flight: {sides}; {second} has {record['speed_ratio']:.2f}x"
    if record["what"] == "jump-forward":
        fewer = f", {record['step_ratio']:.2f}x fewer steps" if "step_ratio" in record else ""
        return f"{text} the output tok/s, {record['time_ratio']:.2f}x faster{fewer}"
    return f"{text} the output tok/s"
