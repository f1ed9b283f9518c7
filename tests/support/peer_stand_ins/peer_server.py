"""A server for streamed completions of token ids that answers at once with made-up words: what stands in for other
engines in tests of the comparison with them.

`PEER_TOKENS`: tokens of one event. `PEER_FAULT=vllm:die` (or `refuse`, `hang`, `error`, `stop`): what that one does: it
does not start; after some answers it is killed, answers no more, tells an error in the middle, or is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EVENT = int(os.environ.get("PEER_TOKENS", "3"))
AFTER = 3  # answers before a fault


def serve(engine: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", "--model-path", required=True)
    args, _ = parser.parse_known_args()
    assert os.path.exists(os.path.join(args.model, "config.json"))
    who, _, fault = os.environ.get("PEER_FAULT", "").partition(":")
    fault = fault if who == engine else ""
    if fault == "refuse":
        sys.exit(f"{engine} finds no device")
    answered = [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answered[0] += 1
            broken = fault if answered[0] > AFTER else ""
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            left = asked["max_tokens"]
            while left > 0:
                count = min(EVENT, left)
                left -= count
                self._event({"choices": [{"index": 0, "text": " w7" * count}]})
                _break(broken)
                if broken == "error":
                    self._event({"error": {"message": "out of pages"}})
            self._event({"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")

        def _event(self, what: dict[str, Any]) -> None:
            self._chunk(b"data: " + json.dumps(what).encode() + b"\n\n")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    while True:
        time.sleep(3600)


def _break(fault: str) -> None:
    if fault in ("die", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault == "die" else signal.SIGSTOP)
    if fault == "hang":
        time.sleep(3600)
