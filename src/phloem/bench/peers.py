"""Phloem and other engines, the same workloads on the same model, in turns: A B A B, never two servers at once.

Peers: llama.cpp's llama-server, OpenVINO GenAI, vLLM on CPU, and with --other any server of the OpenAI API. Each turn
starts the server anew. Prints the medians over the turns and Phloem's ratio to each peer; writes a folder.
"""

from __future__ import annotations

import compileall
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phloem.bench._client import Client, Result, Target
from phloem.bench._http import run
from phloem.bench._peers import (
    Peer,
    children,
    end_children,
    found_program,
    llama_cpp,
    openvino,
    other,
    phloem,
    running,
    vllm,
)
from phloem.bench._peers_report import WORKLOAD_NAMES, draw, print_summary, summary
from phloem.bench._report import write_line
from phloem.bench._text import Encoder, Texts
from phloem.bench._workloads import WORKLOADS, Session, Sizes, Turn, Workload
from phloem.bench.serving import load_encoder, measure
from phloem.checkpoint.describe import describe
from phloem.cli._options import parse_own
from phloem.core.config import opt
from phloem.core.errors import BadRequest, PhloemError

# Every part is bounded, so that an engine that keeps to the schema ends by itself.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Vienna", "Lima", "Osaka", "Nairobi", "Oslo"]},
        "member": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "city", "member", "tags"],
    "additionalProperties": False,
}
_QUICK: dict[str, Sizes] = {
    "single": Sizes(requests=1, input_tokens=32, output_tokens=32),
    "prefill": Sizes(requests=2, input_tokens=256),
    "throughput": Sizes(requests=6, concurrency=3, input_tokens=64, output_tokens=16),
    "shared-prefix": Sizes(requests=2, concurrency=4, input_tokens=128, output_tokens=8, groups=2),
    "conversations": Sizes(requests=2, concurrency=2, input_tokens=16, output_tokens=8, turns=2),
    "structured": Sizes(requests=2, concurrency=2),
}


@dataclass(frozen=True)
class Options:
    model: str = opt("demo", "Model that Phloem serves; a peer without a model option of its own serves the same.")
    workload: str = opt("all", f"One of {', '.join(WORKLOAD_NAMES)}; several with commas; or all.")
    rounds: int = opt(3, "Turns of each server.")
    quick: bool = opt(False, "Tiny workloads: to see that everything works, not to measure.")
    output: str = opt("peers", "Folder for runs.jsonl, summary.jsonl, peers.png and the servers' logs.")
    seed: int = opt(1, "Seed of the prompts.")
    server_args: str = opt("", "Further arguments for Phloem, as one string.")
    llama_server: str | None = opt(None, "llama.cpp's llama-server (default: the one on PATH).")
    llama_model: tuple[str, ...] = opt((), "GGUF files for llama.cpp, each a peer (default: the model's own).")
    llama_args: str = opt("", "Further arguments for llama-server, as one string.")
    openvino_python: str | None = opt(None, "Python of an environment with openvino-genai.")
    openvino_model: str | None = opt(None, "GGUF file or OpenVINO directory (default: the model's own).")
    openvino_args: str = opt("", "Further arguments for the wrapper around OpenVINO, as one string.")
    vllm_python: str | None = opt(None, "Python of an environment with vLLM for CPU.")
    vllm_model: str | None = opt(None, "Directory of the dense model for vLLM.")
    vllm_args: str = opt("", "Further arguments for vLLM, as one string.")
    other: tuple[str, ...] = opt((), "Another server of the OpenAI API: NAME=COMMAND with {port} in the command.")
    patience: float = opt(600.0, "Seconds that a server may take until it is ready.")


def main(argv: list[str]) -> int:
    options = parse_own("bench peers", argv, Options, __doc__ or "")
    names: list[str] = list(WORKLOAD_NAMES) if options.workload == "all" else options.workload.split(",")
    unknown = [name for name in names if name not in WORKLOAD_NAMES]
    if unknown:
        raise BadRequest(f"unknown workload {unknown[0]!r}; known: {', '.join(WORKLOAD_NAMES)}")
    if options.rounds < 1:
        raise BadRequest("--rounds must be at least 1")
    if "structured" in names:
        validity([])  # says at once that a package is missing
    peers, skipped = find_peers(options)
    for line in skipped:
        print(f"skipped: {line}")
    folder = Path(options.output)
    keep_compiled()
    others = children()
    before = signal.signal(signal.SIGTERM, _leave)  # else the server of the moment would outlive us
    try:
        records, broken = compare(peers, names, load_encoder(options.model), options)
    finally:
        signal.signal(signal.SIGTERM, before)
        end_children(others)  # a signal may come between the start of a server and the place where its end is seen to
    lines = summary(records, peers[0].name)
    (folder / "summary.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print_summary(lines, peers[0].name)
    draw(lines, folder / "peers.png", f"{options.model}, medians of {options.rounds}")
    for line in broken:
        print(f"failed: {line}")
    return 1 if broken else 0


def keep_compiled() -> None:
    """Let Phloem start from what Python has compiled, as an installation leaves it and every other engine has it: a
    working tree may have nothing of that, and where PYTHONDONTWRITEBYTECODE is set every start compiles it anew."""
    compileall.compile_dir(Path(__file__).parents[1], quiet=2)


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def find_peers(options: Options) -> tuple[list[Peer], list[str]]:
    """Phloem first, then every peer that is there; and why the others are not."""
    checkpoint = describe(options.model)
    model = str(checkpoint.path)
    peers, skipped = [phloem(options.model, options.server_args)], list[str]()
    binary = found_program(options.llama_server, "llama-server", "llama-cpp-server")
    files = options.llama_model or ((model,) if checkpoint.format == "gguf" else ())
    if binary is None:
        skipped.append("llama.cpp: no --llama-server, none on PATH")
    elif not files:
        skipped.append("llama.cpp: the model is not a GGUF file, and there is no --llama-model")
    else:
        peers += llama_cpp(binary, files, options.llama_args)
    if options.openvino_python is None:
        skipped.append("OpenVINO GenAI: no --openvino-python")
    else:
        python = found_program(options.openvino_python) or ""
        peers.append(openvino(python, options.openvino_model or model, options.openvino_args))
    if options.vllm_python is None:
        skipped.append("vLLM: no --vllm-python")
    elif options.vllm_model is None and checkpoint.format == "gguf":
        skipped.append("vLLM: the model is a GGUF file, and there is no --vllm-model with a dense one")
    else:
        python = found_program(options.vllm_python) or ""
        peers.append(vllm(python, options.vllm_model or model, options.vllm_args))
    peers += [other(text) for text in options.other]
    if len({peer.name for peer in peers}) < len(peers):
        raise BadRequest("two peers have one name")
    return peers, skipped


def structured(texts: Texts, sizes: Sizes) -> Workload:
    """Answers that keep to one JSON schema (W6); each ends by itself when its object is complete."""
    prompts = [f"{texts.draw(48)}\nA person, as JSON:\n" for _ in range(sizes.requests or 16)]
    sessions = [Session([Turn(prompt, sizes.output_tokens or 256)]) for prompt in prompts]
    return Workload("structured", sessions, sizes.concurrency or 8, extra={"ignore_eos": False})


def workloads(names: list[str], encoder: Encoder, seed: int, quick: bool) -> list[Workload]:
    """The loads of one round; every peer of the round gets the same ones. Nothing is shared between two of them."""
    made: list[Workload] = []
    for place, name in enumerate(WORKLOAD_NAMES):
        if name in names:
            build = structured if name == "structured" else WORKLOADS[name]
            made.append(build(Texts(encoder, seed + place), _QUICK[name] if quick else Sizes()))
    return made


def validity(results: list[Result]) -> int:
    """How many answers are JSON that keeps to SCHEMA.

    Raises:
        PhloemError: if jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise PhloemError("the workload 'structured' needs jsonschema: pip install jsonschema") from None
    check: Any = Draft202012Validator(SCHEMA)
    count = 0
    for result in results:
        try:
            count += not result.error and bool(check.is_valid(json.loads(result.text)))
        except json.JSONDecodeError:
            continue
    return count


def compare(
    peers: list[Peer], names: list[str], encoder: Encoder, options: Options
) -> tuple[list[dict[str, Any]], list[str]]:
    """All rounds. Gives a record per round, peer and workload, and what went wrong.

    A peer that does not start is left out of later rounds. If it is the first one (Phloem), the comparison ends.

    Raises:
        PhloemError: if the first peer does not start.
    """
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "runs.jsonl"
    lines.unlink(missing_ok=True)
    records: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    for turn in range(options.rounds):
        loads = workloads(names, encoder, options.seed + 1000 * turn, options.quick)
        warm = Texts(encoder, options.seed + 1000 * turn + 999).draw(32)
        for peer in peers:
            if peer.name in broken:
                continue
            log = folder / "logs" / f"{peer.name.replace(' ', '-').replace('/', '-')}-{turn + 1}.log"
            try:
                found = _turn(peer, loads, warm, log, options.patience)
            except PhloemError as error:
                if peer is peers[0]:
                    raise
                broken[peer.name] = str(error)
                print(f"round {turn + 1}: {error}")
                continue
            for record in found:
                record |= {"peer": peer.name, "round": turn + 1, "quick": options.quick}
                write_line(lines, record)
            records += found
            print(f"round {turn + 1}: {peer.name} ready after {found[0]['ready_s']:.2f} s, {_glance(found)}")
    failed = [
        f"{record['peer']}, {record['workload']}, round {record['round']}: {record['failed']} requests: "
        + "; ".join(record["errors"])
        for record in records
        if record["failed"]
    ]
    return records, [*broken.values(), *failed]


def _glance(records: list[dict[str, Any]]) -> str:
    key = {"prefill": "prefill_tok_per_s"}
    speeds = [(record["workload"], record[key.get(record["workload"], "output_tok_per_s")]) for record in records]
    return ", ".join(f"{name} {speed:,.0f} tok/s" for name, speed in speeds)


def _turn(peer: Peer, loads: list[Workload], warm: str, log: Path, patience: float) -> list[dict[str, Any]]:
    with running(peer, log, patience) as server:
        records = run(_measure(peer, server.url, loads, warm))
    for record in records:
        record |= {"ready_s": server.ready_s, "peak_bytes": server.peak_bytes}
    return records


async def _measure(peer: Peer, url: str, loads: list[Workload], warm: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for place, load in enumerate(loads):
        constrained = load.name == "structured"
        extra = {**load.extra, **(peer.schema_fields(SCHEMA) if constrained else {})}
        client = Client(Target(url, peer.model, "completions", None, extra), fresh=True)
        plain = Client(Target(url, peer.model), fresh=True)
        try:
            if place == 0:
                first = await plain.ask(warm, 8, True)
                if first.error:
                    raise PhloemError(f"{peer.name} does not answer: {first.error}")
            results, record = await measure(client, load)
        finally:
            await client.close()
            await plain.close()
        if constrained:
            record["valid"] = validity(results)
        records.append(record)
    return records
