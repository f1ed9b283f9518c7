"""`phloem bench speculation`: its requests, and llama.cpp's modes beside ours against servers that know no model."""

from __future__ import annotations

import json
import random
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from phloem.bench import _spec_peers, speculation
from phloem.bench._peers import Peer
from phloem.bench._spec_peers import Answered, Side, compare, plot, record, sides, table
from phloem.bench._spec_texts import KINDS, Asked, Writer, draw
from phloem.core.errors import BadRequest, PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

# Answers both engines' requests. argv: port, how many drafts of each three are right, what is wrong.
SERVER_CODE = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, right, wrong = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if wrong == "refuses" and len(body.get("prompt", [])) == 3:
            self.send_response(500); self.end_headers(); self.wfile.write(b"no room"); return
        params = body.get("sampling_params", body)
        assert params["temperature"] == 0.0
        count = params.get("max_new_tokens") or params["n_predict"]
        ids = body.get("input_ids") or body["prompt"]
        tokens = [sum(ids) + place for place in range(count)]
        if wrong == "differs" and count > 1: tokens[-1] = 0
        steps = -(-count // (1 + right))
        if self.path == "/generate":
            meta = {"spec_verify_ct": steps, "spec_num_proposed_drafts": 3 * steps}
            meta["spec_num_correct_drafts"] = count - steps
            answer = {"output_ids": tokens, "meta_info": meta if right else {}}
        else:
            assert body.get("json_schema") == ({"type": "object"} if ids == [5] and count > 1 else None)
            timings = {"draft_n": 3 * steps, "draft_n_accepted": count - steps} if right else {}
            answer = {"tokens": tokens, "timings": timings}
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(answer).encode())

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "server.py"
    path.write_text(SERVER_CODE)
    return str(path)


def side(script: str, engine: str, mode: str, right: int = 0, wrong: str = "") -> Side:
    return Side(engine, mode, Peer(f"{engine} {mode}", (sys.executable, script, "{port}", str(right), wrong)))


def asked(*prompts: list[int], **params: Any) -> Asked:
    return Asked(list(prompts), [{"max_new_tokens": 12, **params} for _ in prompts])


def test_every_server_answers_every_prompt_and_is_held_against_its_own_plain_decoding(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        side(script, "phloem", "plain"),
        side(script, "phloem", "suffix", right=3),
        side(script, "llama.cpp", "plain"),
        side(script, "llama.cpp", "ngram-simple", right=1),
        side(script, "llama.cpp", "odd", right=1, wrong="differs"),
    ]
    rounds = [{"quote": asked([1, 2], [7]), "json": asked([5], json_schema='{"type": "object"}')} for _ in range(2)]
    records = compare(found, rounds, tmp_path / "logs")
    assert [(one["workload"], one["engine"], one["mode"]) for one in records] == [
        (name, one.engine, one.mode) for name in ("quote", "json") for one in found
    ]
    by = {(one["workload"], one["engine"], one["mode"]): one for one in records}
    assert [by["quote", "phloem", mode]["accept_length"] for mode in ("plain", "suffix")] == [1, 4]
    llama = by["quote", "llama.cpp", "ngram-simple"]
    assert (llama["accept_length"], llama["accept_rate"], llama["drafted"]) == (2, 1 / 3, 4 * 18)
    assert (llama["answers"], llama["same_as_plain"], llama["tokens"]) == (4, 4, 48)
    assert by["quote", "llama.cpp", "odd"]["same_as_plain"] == 0 and by["json", "phloem", "suffix"]["answers"] == 2
    assert all(one["tok_per_s"] > 0 and len(one["rounds_tok_per_s"]) == 2 for one in records)
    assert {path.name for path in (tmp_path / "logs").iterdir()} >= {"phloem-suffix.log", "llama.cpp-odd.log"}
    table(records)
    assert "llama.cpp ngram-simple" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    plot(records, tmp_path / "beside.png")
    assert (tmp_path / "beside.png").stat().st_size > 1000


def test_speeds_are_medians_over_the_rounds_each_beside_the_same_round_of_plain_decoding() -> None:
    def turn(*seconds: float) -> list[Answered]:
        return [Answered(one, [1] * 10, 5, 10, 5) for one in seconds]

    plain, drafting = [turn(1.0, 1.0), turn(4.0, 4.0), turn(1.0, 3.0)], [turn(0.5, 0.5), turn(1.0, 1.0), turn(1.0, 1.0)]
    found = record("quote", Side("phloem", "suffix", Peer("", ())), drafting, plain)
    assert found["rounds_tok_per_s"] == [20, 10, 10] and found["tok_per_s"] == 10
    assert found["speed_up"] == 2  # of 2, 4 and 2
    assert (found["accept_length"], found["accept_rate"]) == (2, 0.5)


def test_a_server_that_does_not_answer_is_named_with_what_it_says(script: str, tmp_path: Path) -> None:
    found = [side(script, "llama.cpp", "plain"), side(script, "llama.cpp", "broken", wrong="refuses")]
    with pytest.raises(PhloemError, match=r"llama\.cpp broken does not answer: no room"):
        compare(found, [{"quote": asked([1, 2, 3])}], tmp_path)


def test_each_mode_is_a_server_and_plain_decoding_is_always_one() -> None:
    theirs = ["ngram-mod", "draft", "odd=--spec-type ngram-map-k"]
    found = sides("llama-server", "m.gguf", "demo", ["ngram", "suffix", "draft"], theirs, None, "-ctk q8_0")
    names = [(one.engine, one.mode) for one in found]
    assert names[:4] == [("phloem", mode) for mode in ("plain", "ngram", "suffix", "draft")]
    assert names[4:] == [("llama.cpp", mode) for mode in ("plain", "ngram-mod", "draft", "odd")]
    commands = [" ".join(one.peer.command) for one in found]
    assert "--speculative-draft-model-path demo" in commands[3] and "--spec-draft-model m.gguf" in commands[6]
    assert commands[7].count("ngram-map-k") == 1 and all("-np 1 -c 4096 -ctk q8_0" in one for one in commands[4:])
    small = sides("llama-server", "m.gguf", "demo", ["draft"], ["draft"], "small.gguf")
    assert [" ".join(one.peer.command).count("small.gguf") for one in small] == [0, 1, 0, 1]
    assert [one.mode for one in sides("llama-server", "m.gguf", "demo", [], [])] == ["plain", "plain"]


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ("suffix", "ngram", "llama.cpp has no mode 'ngram' here; known: plain"),
        ("suffix", "a=-x,a=-y", "two modes"),
        ("eagle3", "ngram-mod", "no mode 'eagle3' here; known: plain, ngram, suffix, draft"),
    ],
)
def test_modes_that_are_not_there_are_refused(ours: str, theirs: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        sides("llama-server", "m.gguf", "demo", [ours], theirs.split(","))


def test_a_model_that_llama_cpp_cannot_serve_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\necho 'version: 7 (abc)' >&2\n")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    assert speculation.version_of(str(binary)) == "version: 7 (abc)"
    model = str(tiny_checkpoint("llama", tmp_path / "model"))
    with pytest.raises(BadRequest, match="--llama-model"):
        speculation.main([model, "--llama-server", str(binary)])
    with pytest.raises(BadRequest, match="is not a program"):
        speculation.main([model, "--llama-server", str(tmp_path / "none")])
    with pytest.raises(BadRequest, match="unknown workload 'prose'"):
        speculation.main([model, "--workload", "prose"])


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_a_kind_follow_from_the_seed(kind: str, tmp_path: Path) -> None:
    writer = Writer(str(tiny_checkpoint("llama", tmp_path)))
    first, again = (draw(kind, 3, writer, random.Random(4), 20) for _ in range(2))
    assert first == again and len(first.prompts) == len(first.params) == 3
    assert all(0 <= token < writer.ready["vocab_size"] for prompt in first.prompts for token in prompt)
    assert len({tuple(prompt) for prompt in first.prompts}) == (1 if kind == "group" else 3)
    seeds = {params["sampling_seed"] for params in first.params}
    assert len(seeds) == 3 and all(params["max_new_tokens"] == 20 for params in first.params)
    if kind == "json":
        assert json.loads(first.params[0]["json_schema"])["type"] == "array"


@pytest.mark.slow
def test_two_engines_answer_the_same_and_what_is_found_is_written(tmp_path: Path) -> None:
    model = str(tiny_checkpoint("llama", tmp_path / "model", max_position_embeddings=2048))
    lines = tmp_path / "lines.jsonl"
    flags = [
        "--workload",
        "quote,group",
        "--batch",
        "1,2",
        "--rounds",
        "1",
        "--output-len",
        "12",
        "--output",
        str(lines),
    ]
    assert speculation.main([model, *flags, "--speculative-algorithm", "suffix", "--max-total-tokens", "4096"]) == 0
    *records, steps = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(one["workload"], one["batch"]) for one in records] == [
        ("quote", 1), ("quote", 2), ("group", 1), ("group", 2),
    ]  # fmt: skip
    assert all(one["same"] and one["tok_per_s"] > 0 and one["accept_length"] >= 1 for one in records)
    assert steps["what"] == "steps" and steps["draft_us"] > 0


def test_our_modes_are_known_algorithms() -> None:
    from phloem.core.speculation import MODELS, NONE
    from phloem.speculation.drafters import DRAFTERS

    named = [arguments.split()[1] for arguments in _spec_peers.OUR_MODES.values()]
    assert set(named) <= {NONE, *DRAFTERS.names()} and set(named) & set(MODELS) == {"draft_model"}
