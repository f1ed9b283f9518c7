"""Spans: what a collector is sent of requests through a gateway and a server, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Server

from phloem.core.errors import ConfigError
from phloem.testing.checkpoints import tiny_checkpoint
from phloem.utils import tracing
from phloem.utils.tracing import Tracer, check

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'phloem[trace]'")
TRACE, ABOVE = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        spans = self.spans = list[dict[str, Any]]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    data = gzip.decompress(data)
                for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                    service = next(
                        x.value.string_value for x in resource.resource.attributes if x.key == "service.name"
                    )
                    for scope in resource.scope_spans:
                        spans.extend(told(service, span) for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"127.0.0.1:{self.server.server_port}"

    def of(self, trace: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["trace"] == trace]


def told(service: str, span: Any) -> dict[str, Any]:
    values = {x.key: getattr(x.value, x.value.WhichOneof("value")) for x in span.attributes}
    return {
        "service": service,
        "name": span.name,
        "trace": span.trace_id.hex(),
        "id": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "begun": span.start_time_unix_nano,
        "ended": span.end_time_unix_nano,
        "failed": span.status.code == 2,
        **values,
    }


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.server.shutdown()


@pytest.mark.slow
def test_a_request_through_a_gateway_is_one_tree_of_spans(collector: Collector, tmp_path: Path) -> None:
    options = ("--otlp-traces-endpoint", collector.address, "--served-model-name", "tiny")
    server = Server(tiny_checkpoint("llama", tmp_path), *options).wait_ready()
    command = [sys.executable, "-m", "phloem", "router", "--port", "0", "--worker-urls", server.url]
    command += ["--otlp-traces-endpoint", f"http://{collector.address}"]
    router = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert router.stdout is not None
        url = next(line for line in router.stdout if "Routing" in line).split()[-1]
        began = time.time_ns()
        head = {"traceparent": f"00-{TRACE}-{ABOVE}-01"}
        body = {"model": "tiny", "prompt": "a b c", "max_tokens": 5, "ignore_eos": True, "stream": True, "n": 2}
        answer = httpx.post(url + "/v1/completions", json=body, headers=head, timeout=60)
        assert answer.status_code == 200, answer.text
        bad = httpx.post(url + "/v1/completions", json={**body, "n": 0}, headers=head, timeout=60)
        assert bad.status_code == 400
        httpx.get(url + "/health", headers=head, timeout=60)
    finally:
        router.terminate()
        server.process.terminate()  # both send what they still have
        router.wait(20)
        server.process.wait(20)
    spans = collector.of(TRACE)
    first = [span for span in spans if span["parent"] == ABOVE]
    assert [(span["service"], span["http.response.status_code"]) for span in first] == [
        ("phloem-router", 200), ("phloem-router", 400),
    ]  # fmt: skip
    attempts = [span for span in spans if span["name"] == "attempt"]
    assert [(one["parent"], one["http.response.status_code"], one["server.address"]) for one in attempts] == [
        (first[0]["id"], 200, server.url), (first[1]["id"], 400, server.url),
    ]  # fmt: skip
    below = [[span for span in spans if span["parent"] == above["id"] and span not in attempts] for above in first]
    assert [[(one["service"], one["http.response.status_code"], one["failed"]) for one in part] for part in below] == [
        [("phloem", 200, False)], [("phloem", 400, False)],
    ]  # fmt: skip
    choices = [span for span in spans if span["parent"] == below[0][0]["id"]]
    assert [span["name"] for span in choices] == ["llm_request"] * 2
    for choice in choices:
        assert choice["gen_ai.usage.output_tokens"] == 5 and choice["gen_ai.usage.input_tokens"] > 0
        assert choice["gen_ai.latency.time_to_first_token"] > 0
        parts = [span for span in spans if span["parent"] == choice["id"]]
        assert [part["name"] for part in parts] == ["queue", "prefill", "decode"]
        ends = [(part["begun"], part["ended"]) for part in parts]
        chunks = [span for span in spans if span["parent"] == parts[1]["id"]]
        assert chunks and {chunk["name"] for chunk in chunks} == {"prefill_chunk"}
        computed = choice["gen_ai.usage.input_tokens"] - choice["phloem.cached_tokens"]
        assert sum(chunk["phloem.tokens"] for chunk in chunks) == computed
        assert began - 10**9 < ends[0][0] <= ends[0][1] == ends[1][0] <= ends[1][1] == ends[2][0] <= ends[2][1]
    assert not [span for span in spans if not span["parent"]]
    assert len([span for span in spans if span["name"] != "prefill_chunk"]) == 2 + 2 + 2 + 2 + 6


@pytest.mark.parametrize("text", ["ftp://here", "http://", "http://a:99999", "host:0", "http://[::1"])
def test_what_is_no_collector_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither HOST:PORT nor an http URL"):
        check(text)


def test_without_its_packages_the_start_says_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'phloem\[trace\]'"):
        check("here:4318")


def test_addresses_are_completed() -> None:
    assert check("here:4318") == "http://here:4318/v1/traces"
    assert check("https://here/otlp") == "https://here/otlp"


@pytest.mark.slow
def test_a_collector_that_is_not_there_holds_nobody_up() -> None:
    tracer = Tracer("127.0.0.1:9", "test")
    scope: Any = {"method": "GET", "path": "/x", "headers": [(b"traceparent", b"nonsense"), (b"a", b"b")]}
    span = tracer.begin(scope)
    span.end(200)
    span.end(500)
    names = [name for name, _ in scope["headers"]]
    assert names == [b"a", b"traceparent"] and scope["headers"][1][1] != b"nonsense"
    tracer.close()
