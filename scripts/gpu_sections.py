"""The sections of scripts/gpu_check.py that measure. Each runs in a process of its own (gpu_child.py), tells what it
has found as soon as it has, and returns all of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_card
import gpu_models
import gpu_watch
import torch

from phloem.platforms._facts import own_float8

HERE = Path(__file__).resolve().parent
BATCHES = (1, 8, 32, 128, 256)
PIECES = [16, 64, 256, 1024, 2048]  # tokens of a prefill step, eagerly and in recorded pieces
# Served rounds with the switches of the environment, the most worth knowing first.
SWITCHES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("llama", "as set", {}),
    ("llama", "PHLOEM_PDL=off", {"PHLOEM_PDL": "off"}),
    ("qwen", "as set", {}),
    ("qwen", "PHLOEM_MOE_TRIAL=off", {"PHLOEM_MOE_TRIAL": "off"}),
    ("qwen", "PHLOEM_PDL=off", {"PHLOEM_PDL": "off"}),
)
Tell = Callable[[dict[str, Any]], None]


class Sections:
    """One process's run: its card, its clock, and to whom it tells."""

    def __init__(self, args: argparse.Namespace, tell: Tell) -> None:
        self.args, self.tiny = args, bool(args.tiny)
        self.card = gpu_card.use(gpu_card.Pretended(args.pretend_gib) if self.tiny else gpu_card.Card())
        self.device = self.card.device
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.float8 = own_float8()
        self.until = float(args.until)
        self._tell = tell

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def found(self, found: Any) -> None:
        """This much is found by now."""
        self._tell({"found": found})

    def floors(self) -> dict[str, Any]:
        import gpu_bench

        found = gpu_bench.measure_floors(self.device, self.tiny, self.float8)
        eight = f", float8 {found.flops_8 / 1e12:.0f}" if found.flops_8 else ""
        print(f"  copy {found.bytes_per_second / 1e12:.2f} TB/s, bf16 {found.flops_16 / 1e12:.0f}{eight} TFLOP/s")
        return {"bytes_per_second": found.bytes_per_second, "flops_16": found.flops_16, "flops_8": found.flops_8}

    def llama(self) -> dict[str, Any]:
        return self._model(self._llama(), False, True)

    def llama_fp8(self) -> dict[str, Any]:
        return self._model(self._llama(), True, False)

    def qwen(self) -> dict[str, Any]:
        return self._model(self._qwen(), False, True)

    def qwen_fp8(self) -> dict[str, Any]:
        return self._model(self._qwen(), True, False)

    def _llama(self) -> dict[str, Any]:
        return gpu_models.TINY_LLAMA if self.tiny else gpu_models.LLAMA_8B

    def _qwen(self) -> dict[str, Any]:
        return gpu_models.TINY_MOE if self.tiny else gpu_models.QWEN3_30B_A3B

    def _batches(self, config: dict[str, Any], size: float, context: int) -> tuple[int, ...]:
        """Of the true shapes, in a dry run too: as many rows as the card's memory takes."""
        import gpu_bench

        shapes = gpu_models.QWEN3_30B_A3B if "num_experts" in config else gpu_models.LLAMA_8B
        free, kv = self.card.free(), 2
        rows = tuple(gpu_bench.fitting(shapes, free, size, BATCHES, context, kv))
        if not rows:
            raise MemoryError(f"{free / 2**30:.0f} GiB are free: not enough for these weights and one row")
        return (1, 2) if self.tiny else rows

    def _model(self, config: dict[str, Any], float8: bool, serve: bool) -> dict[str, Any]:
        """Decode, prefill, pieces; with `serve` also through the runner and the scheduler."""
        import gpu_bench

        told = json.loads(self.args.floors) if self.args.floors else None
        floors = gpu_bench.Floors(**told) if told else gpu_bench.measure_floors(self.device, self.tiny, self.float8)
        context, prompt, seconds = (40, 48, 0.01) if self.tiny else (1024, 4096, 0.5)
        size = 1 if float8 else 2
        batches = self._batches(config, size, 1024)
        begin, page = time.perf_counter(), 16
        pages = max(batches) * -(-(context + 192) // page) + prompt // page + 64
        with torch.inference_mode():
            # A dry run measures the reference table: the interpreter would take minutes.
            ops = gpu_models.Ops() if self.tiny else self.ops()
            wide = self.float8 if float8 else None
            dummy = gpu_models.Dummy(config, ops, self.device, self.dtype, pages, wide, triton=not self.tiny)
            dummy.fill_cache()
            built = time.perf_counter() - begin
            found: dict[str, Any] = {"weight_gib": dummy.model.weight_bytes / 2**30, "build_s": built}
            found |= {"decode": [], "runner": []}
            for rows in batches:
                found["decode"].append(self._decode(dummy, floors, rows, context, size, float8, seconds))
                self.found(found)
            prefill = found["prefill"] = gpu_bench.bench_prefill(dummy, floors, prompt, float8, seconds)
            print(f"  prefill {prompt}: {prefill['tok_per_s']:.0f} tok/s, {prefill['of_matmul_rate']:.2f} of matmul")
            self.found(found)
            if serve:
                found["pieces"] = gpu_bench.bench_pieces(dummy, [16, 40] if self.tiny else PIECES, seconds / 2)
                for row in found["pieces"]:
                    ran = row["refused"] if row["pieces_ms"] is None else f"{row['pieces_ms']:.2f} ms"
                    print(f"  prefill {row['tokens']:4}: eager {row['eager_ms']:.2f} ms, in pieces {ran}")
                self.found(found)
        if serve:
            self._serve(dummy, found, context)
        return found

    def _decode(
        self, dummy: Any, floors: Any, rows: int, context: int, size: int, float8: bool, seconds: float
    ) -> dict[str, Any]:
        import gpu_bench
        import gpu_experts

        row = gpu_bench.bench_decode(dummy, floors, rows, context, size, float8, seconds)
        with gpu_experts.late():
            after = gpu_bench.bench_decode(dummy, floors, rows, context, size, float8, seconds)
        row["late_ms"] = after["step_ms"]
        rate = f"{row['step_ms']:.2f} ms ({row['late_ms']:.2f} without early launches), {row['tok_per_s']:.0f} tok/s"
        print(f"  decode {rows:3}: {rate}, {row['of_floor']:.2f} of floor", flush=True)
        return row

    def _serve(self, dummy: Any, found: dict[str, Any], context: int) -> None:
        import gpu_bench

        for row in found["decode"]:
            steps = 6 if self.tiny else 120
            one = gpu_bench.bench_runner(dummy, row["rows"], context, steps, row["step_ms"])
            found["runner"].append(one)
            print(f"  runner {one['rows']:3}: {one['wall_ms']:.2f} ms a step, GPU idle {one['gpu_idle']:.1%}")
            self.found(found)
        most = max(row["rows"] for row in found["decode"])  # what the card's memory allows
        how = (50.0, 0.1, 20, 4, 4) if self.tiny else (16.0, 12.0, 512, 128, most)
        found["serving"] = gpu_bench.bench_serving(dummy, *how)
        print(f"  serving: {found['serving']}")

    def ops(self) -> Any:
        from phloem.kernels.triton import table

        return table.table()

    def experts(self) -> dict[str, Any]:
        """Each kernel that may multiply many rows of experts."""
        import gpu_experts

        config = {**gpu_models.TINY_MOE, "num_experts": 2} if self.tiny else gpu_models.QWEN3_30B_A3B
        found: dict[str, Any] = {}
        for name, float8 in ((str(self.dtype).removeprefix("torch."), None), ("float8", self.float8)):
            seconds = 0.01 if self.tiny else 0.2
            found[name] = gpu_experts.bench_experts(config, self.device, self.dtype, float8, seconds)
            self.found(found)
        print("\n".join(f"  {line}" for line in gpu_experts.lines(found)))
        return found

    def transformers(self) -> list[dict[str, Any]]:
        import gpu_bench

        batches, context, seconds = ([2], 40, 0.01) if self.tiny else ([1, 32], 1024, 0.5)
        rows: list[dict[str, Any]] = []
        for batch in batches:
            rows += gpu_bench.bench_transformers(self._llama(), self.device, self.dtype, [batch], context, seconds)
            print(f"  transformers {batch:3}: {rows[-1]['step_ms']:.2f} ms, {rows[-1]['tok_per_s']:.0f} tok/s")
            self.found(rows)
        return rows

    # those that start processes

    def _child(self, script: str, *arguments: str, **environment: str) -> dict[str, Any]:
        """Run a script of these; what its last line says. It is ended when this section's time is over."""
        command = [sys.executable, str(HERE / script), *arguments]
        before = {key: value for key, value in os.environ.items() if key != "TRITON_CACHE_DIR"}
        limit, part = max(20.0, self.left - 5.0), f"{os.getpid()}-{time.monotonic_ns()}"
        environment[gpu_watch.PART] = part
        # By files, not pipes: what the script itself started could keep a pipe open when it has gone.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            done = subprocess.Popen(command, env=before | environment, stdout=out, stderr=err, text=True)
            try:
                code: int | None = done.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
                done.send_signal(signal.SIGUSR1)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    done.wait(0.3)
            finally:
                # With what it started: an engine would keep the memory that the next one is to have.
                gpu_watch.end(part, 1.0, gpu_watch.PART)
                done.wait()
            out.seek(0)
            err.seek(0)
            lines, told = out.read().strip().splitlines(), " | ".join(err.read().strip().splitlines())[-700:]
        if code is None:
            raise RuntimeError(f"{script}: not done after {limit:.0f} s; {told}")
        if code < 0:
            raise RuntimeError(f"{script}: killed by {signal.Signals(-code).name}; {told}")
        if code or not lines:
            raise RuntimeError(f"{script}: exit status {code}; {told}")
        return json.loads(lines[-1])

    def _engine(self) -> list[str]:
        return ["--device", self.args.engine_device] if self.args.engine_device else []

    def _cold(self, config: dict[str, Any], folder: str, **environment: str) -> dict[str, Any]:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**config, "architectures": []}))
        less = ["--requests", "6", "--flight", "3", "--prompt", "20", "--output", "4"] if self.tiny else []
        return self._child("gpu_cold.py", str(path), *less, *self._engine(), **environment)

    def cold(self) -> dict[str, Any]:
        """A first start without any cache of kernels, and one with it, each in a process of its own."""
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in ("first start", "second start"):
                one = found[name] = self._cold(self._llama(), folder, XDG_CACHE_HOME=folder)
                first, last = one["rounds"][0], one["rounds"][-1]
                print(
                    f"  {name}: ready in {one['ready_s']:.1f} s; {first['output_tok_per_s']:.0f} tok/s, then "
                    f"{last['output_tok_per_s']:.0f}: {one['cold_over_warm']:.2f}; longest TTFT "
                    f"{first['ttft_ms_max']:.0f} ms, longest gap {first['longest_gap_ms']:.0f} ms"
                )
                self.found(found)
        return found

    def switches(self) -> list[dict[str, Any]]:
        """The same rounds with a switch of the environment set, each in a process of its own."""
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            for name, what, environment in SWITCHES:
                config = self._qwen() if name == "qwen" else self._llama()
                row: dict[str, Any] = {"model": name, "what": what}
                if name == "qwen" and self.card.free() < 66 << 30:
                    row["error"] = f"needs 66 GiB, {self.card.free() / 2**30:.0f} are free"
                else:
                    try:
                        row |= self._cold(config, folder, **environment)
                    except RuntimeError as error:
                        row["error"] = str(error)
                rows.append(row)
                rate = row.get("error") or f"{row['rounds'][-1]['output_tok_per_s']:.0f} tok/s"
                print(f"  {name}, {what}: {rate}", flush=True)
                self.found(rows)
        return rows

    def ranks(self) -> dict[str, Any]:
        """The way of several ranks on one card, against one rank; and two ranks, where there are two cards."""
        shape = gpu_models.TINY_LLAMA if self.tiny else {**gpu_models.LLAMA_8B, "num_hidden_layers": 8}
        less = ["--turns", "1", "--tokens", "6"] if self.tiny else []
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps({**shape, "architectures": []}))
            for what, where in (("one", path), ("two", Path(folder))):
                one = found[what] = self._child("gpu_ranks.py", what, str(where), *less, *self._engine())
                print(f"  {what}: { ({key: value for key, value in one.items() if key != 'turns'}) }")
                self.found(found)
        if not found["two"].get("same_tokens", True):
            self._tell({"error": "two ranks answer otherwise than one"})
        return found

    def shared(self) -> dict[str, Any]:
        """Requests that share a prefix: pages read once a step, and for every row."""
        return self._servers(("phloem", "phloem-apart"), ("shared",))

    def peers(self) -> dict[str, Any]:
        """This engine and those that are installed, under the same requests; goals, by them or by another run."""
        import gpu_goals
        import gpu_peers

        there = [name for name in ("vllm", "sglang") if gpu_peers.installed(name)]
        found = self._servers(("phloem", *there), tuple(gpu_peers.LOADS))
        if not there:
            found["earlier"] = gpu_goals.earlier(self.card.name())
        print("\n".join(f"  {line}" for line in gpu_goals.page(found)))
        return found

    def _servers(self, engines: tuple[str, ...], workloads: tuple[str, ...]) -> dict[str, Any]:
        import gpu_peers

        shape = self._llama()
        config = {**shape, "architectures": ["LlamaForCausalLM"]}
        loads = gpu_peers.TINY if self.tiny else gpu_peers.LOADS
        gib = (self.card.free() / 2**30, self.card.total() / 2**30)
        chosen = [loads[one] for one in workloads]
        found = gpu_peers.compare(
            config, engines, chosen, self.left - 25.0, self.args.engine_device, gib, lambda found: self.found(found)
        )
        print("\n".join(f"  {line}" for line in gpu_peers.table(found)))
        if mine := [why for engine, why in found["skipped"].items() if engine.startswith("phloem")]:
            self._tell({"error": mine[0]})
        return found
