"""llama.cpp's own drafting beside ours: every mode is a server, and all answer the same requests, one at a time.

Prompts are token ids, at temperature 0. A prompt is computed before the time is taken, by a request of one token; what
is timed is then decoding, as whoever asks sees it. Servers that are not asked are idle. The order of the servers moves
on with each prompt, so that a busy moment of the machine meets all of them.
"""

from __future__ import annotations

import json
import shlex
import statistics
import urllib.error
import urllib.request
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from phloem.bench._peers import PHLOEM, Peer, llama_cpp, phloem, running
from phloem.core.errors import BadRequest, PhloemError
from phloem.utils import plots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from phloem.bench._spec_texts import Asked

LLAMA = "llama.cpp"
PLAIN = "plain"
DRAFT = "draft"  # the mode in which a model drafts
SECONDS = 300.0  # that one answer may take
# A mode -> arguments of llama-server; `{draft}` is the file of the model that drafts. Lengths of the n-gram modes are
# llama.cpp's defaults, and in `-short` near those that we draft with: tokens that agree, then tokens that are drafted.
LLAMA_MODES: Mapping[str, str] = {
    PLAIN: "",
    "ngram-simple": "--spec-type ngram-simple",
    "ngram-simple-short": "--spec-type ngram-simple --spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 8",
    "ngram-map-k": "--spec-type ngram-map-k",
    "ngram-map-k-short": "--spec-type ngram-map-k --spec-ngram-map-k-size-n 3 --spec-ngram-map-k-size-m 8",
    "ngram-map-k4v": "--spec-type ngram-map-k4v",
    "ngram-mod": "--spec-type ngram-mod",
    "ngram-cache": "--spec-type ngram-cache",
    DRAFT: "--spec-type draft-simple --spec-draft-model {draft}",
}
OUR_MODES: Mapping[str, str] = {
    PLAIN: "--speculative-algorithm none",
    "ngram": "--speculative-algorithm ngram",
    "suffix": "--speculative-algorithm suffix",
    DRAFT: "--speculative-algorithm draft_model --speculative-draft-model-path {draft}",
}


@dataclass(frozen=True)
class Side:
    """One server: an engine in one of its modes."""

    engine: str
    mode: str
    peer: Peer

    @property
    def name(self) -> str:
        return f"{self.engine} {self.mode}"


@dataclass
class Answered:
    """One answer. `steps`: that gave its tokens; `drafted` and `accepted`: tokens."""

    seconds: float
    tokens: list[int]
    steps: int
    drafted: int
    accepted: int


def sides(
    binary: str,
    file: str,
    model: str,
    ours: Sequence[str],
    modes: Sequence[str],
    draft: str | None = None,
    llama_args: str = "",
) -> list[Side]:
    """Ours, then llama.cpp's, plain decoding of each among them.

    Args:
        binary: llama-server.
        file: the GGUF file that it serves.
        model: what we serve.
        ours: names of `OUR_MODES`.
        modes: names of `LLAMA_MODES`, or NAME=ARGUMENTS of llama-server.
        draft: the GGUF file that drafts in both engines; None: each model drafts for itself.
        llama_args: further arguments of llama-server.

    Raises:
        BadRequest: an unknown mode, or one twice.
    """
    unknown = [mode for mode in ours if mode not in OUR_MODES]
    if unknown:
        raise BadRequest(f"there is no mode {unknown[0]!r} here; known: {', '.join(OUR_MODES)}")
    theirs = dict[str, str]()
    for mode in dict.fromkeys((PLAIN, *modes)):
        name, equals, arguments = mode.partition("=")
        if not equals and name not in LLAMA_MODES:
            raise BadRequest(f"llama.cpp has no mode {name!r} here; known: {', '.join(LLAMA_MODES)}, NAME=ARGUMENTS")
        if name in theirs:
            raise BadRequest(f"two modes of llama.cpp are named {name!r}")
        theirs[name] = arguments if equals else LLAMA_MODES[name]
    found = [
        Side(PHLOEM, mode, phloem(model, OUR_MODES[mode].format(draft=shlex.quote(draft or model))))
        for mode in dict.fromkeys((PLAIN, *ours))
    ]
    for name, arguments in theirs.items():
        one = f"{arguments.replace('{draft}', shlex.quote(draft or file))} -np 1 -c 4096 {llama_args}"
        found.append(Side(LLAMA, name, llama_cpp(binary, [file], one)[0]))
    return found


def compare(sides: Sequence[Side], rounds: Sequence[Mapping[str, Asked]], folder: Path) -> list[dict[str, Any]]:
    """Start all servers, have them answer each round's prompts of each workload, and sum up; logs go to `folder`.

    Raises:
        PhloemError: a server does not start or does not answer.
    """
    found: dict[tuple[str, Side], list[list[Answered]]] = defaultdict(list)
    with ExitStack() as stack:
        urls = {side: stack.enter_context(running(side.peer, _log(side, folder))).url for side in sides}
        for side, url in urls.items():  # recordings, and memory that is touched for the first time
            _ask(side, url, list(range(300, 332)), {"max_new_tokens": 24, "ignore_eos": True})
        print(f"{len(urls)} servers are ready", flush=True)
        turn = 0
        for number, workloads in enumerate(rounds):
            for name, asked in workloads.items():
                answers: dict[Side, list[Answered]] = {side: [] for side in sides}
                for ids, params in zip(asked.prompts, asked.params, strict=True):
                    first, turn = turn % len(sides), turn + 1
                    for side in (*sides[first:], *sides[:first]):
                        answers[side].append(_timed(side, urls[side], ids, params))
                for side in sides:
                    found[name, side].append(answers[side])
                print(f"round {number + 1}, {name}: " + _glance(answers), flush=True)
    return [record(name, side, turns, found[name, _plain_of(side, sides)]) for (name, side), turns in found.items()]


def _log(side: Side, folder: Path) -> Path:
    return folder / f"{side.name.replace(' ', '-').replace('/', '-')}.log"


def _plain_of(side: Side, sides: Sequence[Side]) -> Side:
    return next(one for one in sides if one.engine == side.engine and one.mode == PLAIN)


def _glance(answers: Mapping[Side, list[Answered]]) -> str:
    return ", ".join(f"{side.name} {_speed(some):.0f}" for side, some in answers.items()) + " tok/s"


def _speed(answers: Sequence[Answered]) -> float:
    return sum(len(one.tokens) for one in answers) / sum(one.seconds for one in answers)


def record(
    name: str, side: Side, turns: Sequence[Sequence[Answered]], plain: Sequence[Sequence[Answered]]
) -> dict[str, Any]:
    """A workload's figures of one server, beside those of its engine's plain decoding: medians over the rounds."""
    all_answers = [one for turn in turns for one in turn]
    all_plain = [one for turn in plain for one in turn]
    speeds = [_speed(turn) for turn in turns]
    ratios = [speed / _speed(before) for speed, before in zip(speeds, plain, strict=True)]
    drafted, accepted = (sum(getattr(one, field) for one in all_answers) for field in ("drafted", "accepted"))
    return {
        "workload": name,
        "engine": side.engine,
        "mode": side.mode,
        "tok_per_s": statistics.median(speeds),
        "rounds_tok_per_s": [round(speed, 1) for speed in speeds],
        "speed_up": statistics.median(ratios),
        "accept_length": sum(len(one.tokens) for one in all_answers) / sum(one.steps for one in all_answers),
        "accept_rate": accepted / drafted if drafted else None,
        "drafted": drafted,
        "same_as_plain": sum(a.tokens == b.tokens for a, b in zip(all_answers, all_plain, strict=True)),
        "answers": len(all_answers),
        "tokens": sum(len(one.tokens) for one in all_answers),
    }


def _timed(side: Side, url: str, ids: list[int], params: Mapping[str, Any]) -> Answered:
    _ask(side, url, ids, {"max_new_tokens": 1, "ignore_eos": True})
    return _ask(side, url, ids, params)


def _ask(side: Side, url: str, ids: list[int], params: Mapping[str, Any]) -> Answered:
    ask = _ask_phloem if side.engine == PHLOEM else _ask_llama
    try:
        return ask(url, ids, params)
    except (OSError, ValueError, KeyError, urllib.error.HTTPError) as error:
        told = error.read().decode(errors="replace")[:500] if isinstance(error, urllib.error.HTTPError) else str(error)
        raise PhloemError(f"{side.name} does not answer: {told or type(error).__name__}") from None


def _ask_phloem(url: str, ids: list[int], params: Mapping[str, Any]) -> Answered:
    seconds, found = _post(f"{url}/generate", {"input_ids": ids, "sampling_params": {**params, "temperature": 0.0}})
    meta = found["meta_info"]
    drafted, accepted = (int(meta.get(f"spec_num_{kind}_drafts", 0)) for kind in ("proposed", "correct"))
    tokens = list(found["output_ids"])
    return Answered(seconds, tokens, int(meta.get("spec_verify_ct", 0)) or len(tokens), drafted, accepted)


def _ask_llama(url: str, ids: list[int], params: Mapping[str, Any]) -> Answered:
    body = {
        "prompt": ids,
        "n_predict": params["max_new_tokens"],
        "ignore_eos": params.get("ignore_eos", False),
        "temperature": 0.0,
        "cache_prompt": True,
        "return_tokens": True,
    }
    if "json_schema" in params:
        body["json_schema"] = json.loads(params["json_schema"])
    seconds, found = _post(f"{url}/completion", body)
    timings, tokens = found["timings"], list(found["tokens"])
    accepted = int(timings.get("draft_n_accepted", 0))
    return Answered(seconds, tokens, max(1, len(tokens) - accepted), int(timings.get("draft_n", 0)), accepted)


def _post(url: str, body: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """(Seconds until the whole answer was there, the answer)."""
    # Straight to the port: a proxy that is set for this user must not come between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    start = perf_counter()
    with opener.open(request, timeout=SECONDS) as answer:
        text = answer.read()
    return perf_counter() - start, json.loads(text)


def table(records: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'workload':>12} {'':<28} {'tok/s':>6} {'x plain':>8} {'accept':>7} {'rate':>5}  same as plain")
    for one in records:
        rate = "-" if one["accept_rate"] is None else f"{one['accept_rate']:.2f}"
        print(
            f"{one['workload']:>12} {one['engine'] + ' ' + one['mode']:<28} {one['tok_per_s']:>6,.0f} "
            f"{one['speed_up']:>7.2f}x {one['accept_length']:>7.2f} {rate:>5}  "
            f"{one['same_as_plain']} of {one['answers']}"
        )


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens a second by workload and server, as a PNG."""
    pyplot = plots.pyplot()

    workloads = list(dict.fromkeys(one["workload"] for one in records))
    servers = list(dict.fromkeys((one["engine"], one["mode"]) for one in records))
    figure, axes = pyplot.subplots(figsize=(13, 4.8))
    width = 0.85 / len(servers)
    ours = [server for server in servers if server[0] == PHLOEM]
    for place, server in enumerate(servers):
        of_server = {one["workload"]: one["tok_per_s"] for one in records if (one["engine"], one["mode"]) == server}
        mine = server in ours
        among = ours if mine else [one for one in servers if one not in ours]
        shade = 0.35 + 0.6 * (among.index(server) + 1) / len(among)
        colour = (pyplot.cm.Blues if mine else pyplot.cm.Oranges)(shade)
        at = [number + place * width for number in range(len(workloads))]
        axes.bar(at, [of_server[name] for name in workloads], width, label=" ".join(server), color=colour)
    axes.set_xticks([number + 0.425 - width / 2 for number in range(len(workloads))], workloads)
    axes.set_ylabel("tokens/s, one request")
    axes.set_title("one request at temperature 0, the prompt computed before: plain decoding, lookup, draft model")
    axes.legend(ncols=2, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
