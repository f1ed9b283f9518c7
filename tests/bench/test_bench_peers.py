"""`phloem bench peers` against tiny servers: what is started, measured, compared and written, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from phloem.bench import _openvino_server, peers
from phloem.bench._client import Client, Result, Target
from phloem.bench._peers import Peer, children, end_children, found_program, llama_cpp, openvino, other, running, vllm
from phloem.bench._peers_report import SERVER, draw, print_summary, summary
from phloem.core.errors import BadRequest, PhloemError
from phloem.testing.checkpoints import tiny_checkpoint

# A server of the OpenAI API that knows no model. argv: port, mode, seconds per token.
SERVER_CODE = """
import json, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, mode, pace = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
if mode == "dies":
    sys.exit("no weights here")
if mode == "family":
    code = "import time; x = bytearray(40_000_000); print(1, flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code])
VALID = '{"name": "Ada", "age": 36, "city": "Lima", "member": true, "tags": ["a"]}'

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def event(self, body):
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\\n\\n"); self.wfile.flush()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if mode == "refuses" and body["max_tokens"] != 8:
            self.send_response(500); self.end_headers(); self.wfile.write(b"out of pages"); return
        self.send_response(200); self.end_headers()
        count = body["max_tokens"]
        if "response_format" in body or "json_schema" in body:
            assert body["ignore_eos"] is False
            texts = list(VALID if mode != "invalid" else VALID[:-9])
        else:
            assert body["ignore_eos"] is True
            texts = ["x "] * count
        for text in texts:
            time.sleep(pace)
            self.event({"choices": [{"index": 0, "text": text}]})
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": len(texts)}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\\n\\n")

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "server.py"
    path.write_text(SERVER_CODE)
    return str(path)


def fake(script: str, name: str, mode: str = "good", pace: float = 0.001) -> Peer:
    return Peer(name, (sys.executable, script, "{port}", mode, str(pace)))


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.words = text.split()
        return list(range(len(self.words)))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(self.words[: len(ids)])


def options(tmp_path: Path, **changes: Any) -> peers.Options:
    return peers.Options(output=str(tmp_path / "out"), quick=True, **{"rounds": 2, "patience": 30.0, **changes})


@pytest.mark.slow
def test_turns_alternate_and_the_slower_peer_shows(script: str, tmp_path: Path) -> None:
    servers = [fake(script, "fast"), fake(script, "slow", pace=0.012)]
    records, broken = peers.compare(servers, ["structured", "single"], Words(), options(tmp_path))
    assert broken == []
    order = [(record["round"], record["peer"], record["workload"]) for record in records]
    assert order == [
        (turn, peer, load) for turn in (1, 2) for peer in ("fast", "slow") for load in ("single", "structured")
    ]
    written = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert written == records
    assert all(0 < record["ready_s"] < 30 and record["peak_bytes"] > 4e6 for record in records)
    assert all(record["valid"] == record["requests"] == 2 for record in records if record["workload"] == "structured")
    lines = {(line["workload"], line["metric"], line["peer"]): line for line in summary(records, "fast")}
    speed = lines["single", "output_tok_per_s", "slow"]
    assert len(speed["values"]) == 2 and speed["ratio"] > 1.5  # 12 ms against 1 ms per token, on any machine
    assert lines["single", "ttft_mean_ms", "slow"]["ratio"] < 1
    assert lines["single", "output_tok_per_s", "fast"]["ratio"] == 1
    assert lines["structured", "valid_share", "slow"]["median"] == 1
    assert lines[SERVER, "peak_gb", "slow"]["median"] > 0.004


@pytest.mark.slow
def test_answers_that_break_the_schema_are_counted(script: str, tmp_path: Path) -> None:
    servers = [fake(script, "good"), fake(script, "bad", "invalid")]
    records, _ = peers.compare(servers, ["structured"], Words(), options(tmp_path, rounds=1))
    assert [record["valid"] for record in records] == [2, 0]
    assert peers.validity([Result(0.0, text="[1]"), Result(0.0, text="{}"), Result(0.0, text="not JSON")]) == 0


@pytest.mark.slow
def test_a_peer_that_does_not_start_is_left_out(script: str, tmp_path: Path) -> None:
    servers = [fake(script, "good"), fake(script, "broken", "dies")]
    records, broken = peers.compare(servers, ["single"], Words(), options(tmp_path))
    assert [record["peer"] for record in records] == ["good", "good"]
    assert len(broken) == 1 and "broken ended with status 1" in broken[0] and "no weights here" in broken[0]
    with pytest.raises(PhloemError, match="no weights here"):
        peers.compare(servers[::-1], ["single"], Words(), options(tmp_path))


@pytest.mark.slow
def test_failed_requests_are_no_part_of_a_median(script: str, tmp_path: Path) -> None:
    servers = [fake(script, "good"), fake(script, "full", "refuses")]
    records, broken = peers.compare(servers, ["single"], Words(), options(tmp_path, rounds=1))
    assert len(broken) == 1 and "full, single, round 1: 1 requests: HTTP 500: out of pages" in broken[0]
    line = next(x for x in summary(records, "good") if x["peer"] == "full" and x["workload"] == "single")
    assert line["median"] is None and line["ratio"] is None and line["failed_runs"] == 1
    draw(summary(records, "good"), tmp_path / "chart.png", "failed")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_memory_counts_the_family_and_nobody_is_left(script: str, tmp_path: Path) -> None:
    with running(fake(script, "family", "family"), tmp_path / "log.txt", 30) as server:
        deadline = 200
        while "1" not in (tmp_path / "log.txt").read_text() and deadline:
            deadline -= 1
            psutil.Process().cpu_percent(0.05)
        family = [p for p in psutil.Process().children(recursive=True) if "bytearray" in " ".join(p.cmdline())]
        assert len(family) == 1
    assert server.peak_bytes > 50e6 and server.ready_s > 0
    assert not family[0].is_running() or family[0].status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_ended_in_the_middle_it_leaves_no_server(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "phloem", "bench", "peers", "--model", str(model), "--output", str(tmp_path)]
    bench = subprocess.Popen([*command, "--workload", "single"], stdout=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    until = time.monotonic() + 60
    while not children and time.monotonic() < until:
        time.sleep(0.05)
        children = psutil.Process(bench.pid).children(recursive=True)
    assert children
    bench.terminate()
    assert bench.wait(60) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_only_what_was_started_since_is_ended() -> None:
    def sleeping() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    library = sleeping()
    try:
        before = children()
        server = sleeping()
        end_children(before)
        assert not psutil.pid_exists(server.pid) and library.poll() is None
    finally:
        library.kill()
        library.wait()


@pytest.mark.slow
def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    silent = Peer("silent", (sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"))
    with pytest.raises(PhloemError, match="silent was not ready in time"), running(silent, tmp_path / "log", 1.0):
        pass
    with pytest.raises(PhloemError, match="could not be started"), running(Peer("x", ("/no/such",)), tmp_path / "log"):
        pass


def test_commands() -> None:
    one = llama_cpp("llama-server", ["a.gguf"], "--jinja")
    two = llama_cpp("llama-server", ["dir/a.gguf", "b.gguf"], "")
    assert [peer.name for peer in (*one, *two)] == ["llama.cpp", "llama.cpp a", "llama.cpp b"]
    assert "--jinja" in one[0].command and one[0].command[-2:] == ("--port", "{port}")
    assert one[0].schema_fields({"type": "object"}) == {"json_schema": {"type": "object"}}
    form = openvino("python", "m.gguf", "").schema_fields({"type": "object"})["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == {"type": "object"}
    assert Path(openvino("python", "m.gguf", "").command[1]).is_file()
    found = vllm("python", "dir", "--seed 1")
    assert found.command[0] == "env" and found.model == "dir" and found.command[-6:-4] == ("--seed", "1")
    named = other("sg=python -m server --port={port}")
    assert named.name == "sg" and named.command[-1] == "--port={port}"
    for wrong in ("server --port 1", "=x {port}", "name=server"):
        with pytest.raises(BadRequest, match="NAME=COMMAND"):
            other(wrong)
    with pytest.raises(BadRequest, match="is not a program"):
        found_program("/no/such/llama-server", "llama-server")
    assert found_program(sys.executable, "") == sys.executable and found_program(None, "no-such-program") is None


def test_peers_that_are_not_there_are_named(model: Path) -> None:
    found, skipped = peers.find_peers(peers.Options(model=str(model), llama_server=sys.executable))
    assert [peer.name for peer in found] == ["phloem"]
    assert [line.split(":")[0] for line in skipped] == ["llama.cpp", "OpenVINO GenAI", "vLLM"]
    everything = peers.Options(
        model=str(model),
        llama_server=sys.executable,
        llama_model=("x.gguf",),
        openvino_python=sys.executable,
        vllm_python=sys.executable,
        other=("own=server {port}",),
    )
    found, skipped = peers.find_peers(everything)
    assert [peer.name for peer in found] == ["phloem", "llama.cpp", "openvino-genai", "vllm", "own"] and not skipped
    with pytest.raises(BadRequest, match="one name"):
        peers.find_peers(peers.Options(model=str(model), other=("phloem=x {port}",)))


def test_wrong_options(model: Path) -> None:
    with pytest.raises(BadRequest, match="unknown workload 'rate'"):
        peers.main(["--model", str(model), "--workload", "rate"])
    with pytest.raises(BadRequest, match="at least 1"):
        peers.main(["--model", str(model), "--rounds", "0"])


@pytest.mark.slow
def test_loads_differ_by_workload_and_by_round() -> None:
    names = ["structured", "throughput", "conversations"]
    loads = peers.workloads(names, Words(), 1, True)
    assert [load.name for load in loads] == ["throughput", "conversations", "structured"]
    other_round = peers.workloads(names, Words(), 1001, True)
    first = {session.turns[0].text for load in (*loads, *other_round) for session in load.sessions}
    assert len(first) == 2 * (6 + 2 + 2)
    assert loads[-1].extra == {"ignore_eos": False}
    full = peers.workloads(names, Words(), 1, False)
    assert [(len(load.sessions), load.concurrency) for load in full] == [(64, 32), (8, 8), (16, 8)]


def test_print_summary_marks_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    record: dict[str, Any] = {
        **{"workload": "single", "peer": "a", "round": 1, "failed": 0, "requests": 1, "ready_s": 1.0},
        **{"peak_bytes": 2e9, "output_tok_per_s": 300.0, "prefill_tok_per_s": 9.0, "requests_per_s": 1.0},
        "ttft_ms": {"mean": 5.0},
    }
    slower = {**record, "peer": "b", "output_tok_per_s": 150.0}
    lost = {**record, "peer": "c", "failed": 1}
    print_summary(summary([record, slower, lost], "a"), "a")
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "output tok/s" in line)
    assert "300" in row and "150 (2.00x)" in row and "failed" in row


@pytest.mark.slow
def test_phloem_itself(model: Path, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"own={sys.executable} {script} {{port}} good 0.001"
    arguments = ["--quick", "--rounds", "1", "--workload", "single,prefill,structured", "--other", own]
    status = peers.main(["--model", str(model), "--output", str(tmp_path / "out"), *arguments])
    out = capsys.readouterr().out
    assert status == 0 and "skipped: OpenVINO GenAI" in out and "W6 structured" in out
    lines = [json.loads(line) for line in (tmp_path / "out" / "summary.jsonl").read_text().splitlines()]
    assert {line["peer"] for line in lines} == {"phloem", "own"}
    assert next(x for x in lines if x["metric"] == "valid_share" and x["peer"] == "phloem")["median"] == 1
    assert (tmp_path / "out" / "peers.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "logs" / "phloem-1.log").exists()


class FakePipeline:
    """Stands for OpenVINO's: tokens are bytes; every step gives each request the next byte of one text."""

    TEXT = ("Grüße, 世界! " * 12).encode()

    def __init__(self) -> None:
        self.running: list[Any] = []

    def get_tokenizer(self) -> Any:
        def encode(prompt: str) -> Any:
            if not isinstance(prompt, str):
                raise TypeError("encode() takes a text")
            return SimpleNamespace(input_ids=SimpleNamespace(shape=(1, len(prompt.encode()))))

        def decode(batch: list[list[int]]) -> list[str]:
            return [bytes(ids).decode(errors="replace") for ids in batch]

        return SimpleNamespace(encode=encode, decode=decode, get_eos_token_id=lambda: 0)

    def add_request(self, number: int, ids: Any, config: Any) -> Any:
        if config.max_new_tokens > 1000:
            raise RuntimeError("no blocks left")
        made: list[int] = []
        state = SimpleNamespace(made=made, unread=0, limit=config.max_new_tokens)

        def read() -> dict[int, Any]:
            ids = made[len(made) - state.unread :]
            state.unread = 0
            reason = SimpleNamespace(name="LENGTH" if len(made) == state.limit else "NONE")
            return {0: SimpleNamespace(generated_ids=ids, finish_reason=reason)}

        def status() -> Any:
            return SimpleNamespace(name="FINISHED" if len(made) == state.limit else "RUNNING")

        self.running.append(state)
        return SimpleNamespace(can_read=lambda: state.unread > 0, read=read, get_status=status)

    def has_non_finished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> None:
        for state in list(self.running):
            state.made.append(self.TEXT[len(state.made)])
            state.unread += 1
            if len(state.made) == state.limit:
                self.running.remove(state)


async def test_the_wrapper_around_openvino_streams_whole_characters() -> None:
    genai = SimpleNamespace(GenerationConfig=SimpleNamespace, StructuredOutputConfig=SimpleNamespace)
    wrapper = _openvino_server.Server(genai, FakePipeline(), asyncio.get_running_loop())
    listening = await asyncio.start_server(wrapper.connection, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    client = Client(Target(f"http://127.0.0.1:{port}", "any"), fresh=True)
    total = len(FakePipeline.TEXT)
    async with listening:
        assert await client.get("/health") == {} and await client.post("/nowhere") == 404
        results = await asyncio.gather(*(client.ask("Hällo", count, True) for count in (1, 19, total)))
        refused = await client.ask("x", 2000, True)
        wrong = await client.ask(5, 4, True)  # type: ignore[arg-type]
        await client.close()
    assert [item.error for item in results] == ["", "", ""]
    assert [item.output_tokens for item in results] == [1, 19, total] and results[0].input_tokens == 6
    assert results[2].text.encode() == FakePipeline.TEXT and "\ufffd" not in results[2].text
    assert results[1].text.encode() == FakePipeline.TEXT[:19] and len(results[1].gaps) > 5
    assert "no blocks left" in refused.error and "HTTP 400" in wrong.error
    schema = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}}
    config = wrapper._config({"max_tokens": 5, "temperature": 0.0, **schema})
    assert config.structured_output_config.json_schema == '{"type": "object"}'
    assert config.do_sample is False and config.ignore_eos is False and config.max_new_tokens == 5
