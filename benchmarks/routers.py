"""Our gateway's choice of a server beside Dynamo's KV router, on one trace of Mooncake's form.

    python benchmarks/trace_of.py trace.jsonl --rate 12 --seconds 120
    python benchmarks/routers.py trace.jsonl --replicas 4 [--replay] [--output FILE]

Needs `ai-dynamo-runtime` (1.6) and pyzmq. `dynamo` is Dynamo's own selection core in place of our policy, with all else
alike: the same replicas, steps and caches of `phloem bench simulate`. It hears of what replicas cache by their
events over ZeroMQ, of which none is left behind when a request is chosen for, books each request, and is told of first
tokens and ends. `--replay` adds Dynamo's own simulator with its own engines and step times: round robin and its router.

Told of each: reuse (cached tokens over prompt tokens), times to the first token, and how evenly the work lies: of
prompt tokens that each replica computed, and of the time that it was busy, the fullest over the mean and the deviation.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from phloem.bench._report import context, write_line
from phloem.router.ask import Ask
from phloem.router.cached import Cached
from phloem.router.policies._base import Chosen
from phloem.router.settings import Settings
from phloem.router.worker import Load, Worker
from phloem.simulation.clockwork import Measured
from phloem.simulation.fleet import Fleet
from phloem.simulation.replica import Size
from phloem.simulation.traces import BLOCK, read_trace

MODEL = "model"
OURS = {"round_robin": False, "cache_aware": False, "cache_aware+events": True}  # name -> follows cache events
BEACON = 1 << 30  # from which on tokens are of pages that only say: everything before has arrived
PATIENCE = 300.0  # seconds for events to arrive


class Dynamo(Cached):
    """Dynamo's selection service as a policy of ours, and as the one who hears of the replicas' caches."""

    def __init__(self, size: Size, replicas: int) -> None:
        super().__init__()
        import zmq
        from dynamo._core import SelectionService  # pyright: ignore[reportMissingImports]

        self._loop = asyncio.new_event_loop()
        self._service: Any = self._run(SelectionService, indexer_threads=1)
        self._page = size.page_size
        self._sockets: list[Any] = []
        self._sent, self._names, self._beacons = [0] * replicas, count(), count(BEACON)
        self._stale: set[int] = set()  # replicas some of whose events may be on their way
        self.booked: deque[str] = deque()
        network = zmq.Context.instance()
        for number in range(replicas):
            socket = network.socket(zmq.PUB)
            socket.set_hwm(0)
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            self._sockets.append(socket)
            self._run(self._service.upsert_worker, {
                "worker_id": number, "model_name": MODEL, "block_size": size.page_size,
                "endpoint": f"http://127.0.0.1:{number + 1}", "kv_events_endpoint": f"tcp://127.0.0.1:{port}",
                "total_kv_blocks": size.kv_tokens // size.page_size, "max_num_batched_tokens": size.chunk,
            })  # fmt: skip
        self._stale = set(range(replicas))
        time.sleep(1.0)  # until it listens
        self._settle()

    def _run(self, call: Any, *given: Any, **named: Any) -> Any:
        async def work() -> Any:
            found = call(*given, **named)  # it wants a loop that runs
            return await found if inspect.isawaitable(found) else found

        return self._loop.run_until_complete(work())

    # what replicas say of their caches

    def take(self, bit: int, events: Sequence[Any]) -> None:
        self._tell(bit, events)
        self._stale.add(bit)

    def _tell(self, bit: int, events: Sequence[Any]) -> None:
        body = msgspec.msgpack.encode([time.time(), events, 0])
        self._sockets[bit].send_multipart([b"", self._sent[bit].to_bytes(8, "big"), body])
        self._sent[bit] += 1

    def _settle(self) -> None:
        """Until all that was told has arrived: a page that nobody else has is told behind it and looked for."""
        if not self._stale:
            return
        beacon = next(self._beacons)
        tokens = [beacon] * self._page
        stored = {"type": "BlockStored", "block_hashes": [beacon], "parent_block_hash": None, "token_ids": tokens,
                  "block_size": self._page, "lora_id": None, "medium": "GPU"}  # fmt: skip
        for bit in self._stale:
            self._tell(bit, [stored])
        until = time.monotonic() + PATIENCE
        missing = set(self._stale)
        while missing:
            told = self._run(self._service.overlap_scores, {"model_name": MODEL, "token_ids": tokens})
            missing -= {one["worker_id"] for one in told["workers"] if one["device_blocks"]}
            if time.monotonic() > until:
                raise RuntimeError(f"Dynamo has not heard of what replicas {sorted(missing)} cache")
        for bit in self._stale:
            self._tell(bit, [{"type": "BlockRemoved", "block_hashes": [beacon], "medium": "GPU"}])
        self._stale.clear()

    # as a policy

    def choose(self, ask: Ask, workers: Sequence[Worker]) -> Chosen:
        self._settle()
        name = str(next(self._names))
        asked = {"model_name": MODEL, "token_ids": ask.ids, "selection_id": name}
        told = self._run(self._service.select_and_reserve, asked)
        self.booked.append(name)
        return Chosen(workers[told["worker_id"]], "Dynamo", ask.tokens - told["effective_prefill_tokens"])

    def sent(self, ask: Ask, worker: Worker) -> None:
        pass

    def began(self, name: str) -> None:
        self._run(self._service.prefill_complete, name)

    def ended(self, name: str) -> None:
        self._run(self._service.free_reservation, name)

    def close(self) -> None:
        self._service.shutdown()
        for socket in self._sockets:
            socket.close(0)


class Booked(Load):
    """What Dynamo is to hear of a request."""

    def __init__(self, plain: Load, dynamo: Dynamo) -> None:
        super().__init__(plain.worker, plain.prompt, plain.output, plain.cached)
        self._dynamo, self._name = dynamo, dynamo.booked.popleft()

    def first(self) -> None:
        if not self.began and not self.ended:
            self._dynamo.began(self._name)
        super().first()

    def end(self) -> None:
        done = self.ended
        super().end()
        if not done:
            self._dynamo.ended(self._name)


def fleet_of(name: str, size: Size, replicas: int) -> Fleet:
    """Of a gateway's name."""
    if name in OURS:
        return Fleet(size, Measured(), replicas, name.partition("+")[0], events=OURS[name])
    dynamo = Dynamo(size, replicas)

    class Account(Worker):
        def take(self, prompt: float, output: float, cached: float) -> Load:
            return Booked(super().take(prompt, output, cached), dynamo)

    def account(number: int, settings: Settings) -> Worker:
        made = Worker.at(f"http://replica-{number}:80", settings, number)
        return Account(made.url, made.host, made.port, settings, number, made.pool, made.breaker)

    found = Fleet(size, Measured(), replicas, "round_robin", events=True, cached=dynamo, accounts=account)
    found.gateway = dynamo  # pyright: ignore[reportAttributeAccessIssue]
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    mean = float(np.mean(values)) or 1.0
    return {"max_over_mean": round(max(values) / mean, 3), "cv": round(float(np.std(values)) / mean, 3)}


def simulated(name: str, args: argparse.Namespace) -> dict[str, Any]:
    size = Size(kv_tokens=args.kv_tokens, context=args.context)
    fleet = fleet_of(name, size, args.replicas)
    begun = time.monotonic()
    told = fleet.run(read_trace(args.trace, args.speed)).told()
    planners = [replica.scheduler.planner for replica in fleet.members]
    if isinstance(fleet.cached, Dynamo):
        fleet.cached.close()
    return {
        "gateway": name, "engines": "ours", "requests": told["requests"], "failed": told["failed"],
        "reuse": told["hit_rate"], "ttft_ms": told["ttft_ms"], "itl_ms": told["itl_ms"],
        "output_tok_per_s": told["output_tok_per_s"],
        "computed": spread([planner.prompt_tokens - planner.cached_tokens for planner in planners]),
        "busy": spread([replica.runner.busy for replica in fleet.members]),
        "sent": spread(fleet.seen.sent), "wall_s": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def replayed(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Dynamo's own simulator of its own engines (those like vLLM, its default step times)."""
    from dynamo._core import KvRouterConfig, run_mocker_trace_replay  # pyright: ignore[reportMissingImports]

    page = Size.page_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.jsonl"
        begun = time.monotonic()
        run_mocker_trace_replay(
            [args.trace], extra_engine_args={"engine": {"num_gpu_blocks": args.kv_tokens // page, "block_size": page}},
            router_mode=mode, router_config=KvRouterConfig() if mode == "kv_router" else None,
            num_workers=args.replicas, trace_block_size=BLOCK, arrival_speedup_ratio=args.speed,
            report_jsonl_path=path,
        )  # fmt: skip
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    computed, sent = [0.0] * args.replicas, [0.0] * args.replicas
    for line in lines:
        computed[line["decode_worker_idx"]] += line["input_length"] - line["reused_input_tokens"]
        sent[line["decode_worker_idx"]] += 1
    first = np.array([line["ttft_ms"] for line in lines])
    prompt = sum(line["input_length"] for line in lines)
    end = max(line["last_token_ms"] for line in lines) / 1e3
    return {
        "gateway": f"dynamo replay, {mode}", "engines": "Dynamo's", "requests": len(lines),
        "reuse": round(1 - sum(computed) / prompt, 4),
        "ttft_ms": {"mean": round(float(first.mean()), 2),
                    **{f"p{share}": round(float(np.percentile(first, share)), 2) for share in (50, 90, 99)}},
        "output_tok_per_s": round(sum(line["output_length"] for line in lines) / end, 1),
        "computed": spread(computed), "sent": spread(sent), "wall_s": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--kv-tokens", type=int, default=1 << 20, help="of a replica")
    parser.add_argument("--context", type=int, default=1 << 17)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--gateways", default=",".join([*OURS, "dynamo"]))
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("DYN_LOG", "error")  # a line for each choice else
    names = [name for name in args.gateways.split(",") if name]
    runs: list[tuple[Any, str]] = [(simulated, name) for name in names]
    if args.replay:
        runs += [(replayed, "round_robin"), (replayed, "kv_router")]
    for work, name in runs:
        record = {"bench": "routers", "replicas": args.replicas, "kv_tokens": args.kv_tokens, "speed": args.speed,
                  **work(name, args)}  # fmt: skip
        print(json.dumps(record), flush=True)
        if args.output:
            write_line(args.output, {**context(), **record})


if __name__ == "__main__":
    main()
