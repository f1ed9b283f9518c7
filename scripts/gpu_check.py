"""One command for a machine with a GPU: is every kernel right on it, and how fast is the engine against its floors?

    python scripts/gpu_check.py                      everything; results under benchmarks/results/
    python scripts/gpu_check.py --only kernels       correctness of the kernels alone
    python scripts/gpu_check.py --dry-run --out DIR  on a CPU, tiny: shows that the script works, and nothing else

It needs torch, Triton and numpy, for serving msgspec as well, for the comparison transformers; what is missing is
said and left out. Weights are random, nothing is downloaded. Exit status: 0 all right, 1 something is wrong, 2 no GPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
SECTIONS = ("kernels", "models", "floors", "cold", "shared", "llama", "llama-fp8", "qwen", "qwen-fp8", "transformers")
SECTIONS += ("peers", "experts", "ranks")
BATCHES = (1, 8, 32, 128, 256)
GRACE = 40.0  # seconds that the last section may take beyond the limit
LEFT_BYTES = 64 << 20  # workspaces of libraries stay
PIECES = [16, 64, 256, 1024, 2048]  # tokens of a prefill step, eagerly and in recorded pieces


class Check:
    """The run: its device, its clock and what it found."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from phloem.platforms._facts import own_float8

        self.args = args
        self.tiny: bool = args.dry_run
        self.device = torch.device("cpu" if self.tiny else "cuda")
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.float8 = own_float8()
        self.begun = time.perf_counter()
        self.report: dict[str, Any] = {"machine": machine(self.tiny), "dry_run": self.tiny, "skipped": {}, "errors": {}}
        self.report["left_mib"] = {}

    @property
    def left(self) -> float:
        return self.args.seconds - (time.perf_counter() - self.begun)

    def section(self, name: str, needs: float, run: Callable[[], Any]) -> None:
        """Run one section if it is wanted and time is left; an error is noted and the next section runs."""
        if self.args.only and not any(name.startswith(only) for only in self.args.only.split(",")):
            return
        if self.left < needs and not self.tiny:
            self.report["skipped"][name] = f"{self.left:.0f} s were left, it needs about {needs:.0f}"
            print(f"== {name}: skipped, {self.report['skipped'][name]}", flush=True)
            return
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        try:
            found = run()
        except ImportError as error:
            self.report["skipped"][name] = f"missing: {error}"
            print(f"  skipped: {error}")
        except Exception as error:
            # What another engine cannot do here is no fault of ours.
            where = "skipped" if name == "transformers" else "errors"
            self.report[where][name] = f"{type(error).__name__}: {error}"[:1000]
            traceback.print_exc()
        else:
            self.report[name] = found
        print(f"  {time.perf_counter() - begin:.1f} s", flush=True)
        self._leave_nothing(name)

    def _leave_nothing(self, name: str) -> None:
        """What a section still holds would be missing from the next one; that it holds something is an error."""
        gc.collect()
        if self.device.type != "cuda":
            return
        import torch

        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated(self.device)
        self.report["left_mib"][name] = left / 2**20
        if left > LEFT_BYTES:
            self.report["errors"][f"{name} left memory behind"] = f"{left / 2**20:.0f} MiB are still allocated"

    # sections

    def kernels(self) -> list[dict[str, Any]]:
        import gpu_kernels
        import torch

        found = gpu_kernels.run(self.device, self.dtype, self.tiny, self.args.checks)
        if not self.tiny:
            # float32 shows an error of logic that the rounding of bf16 might hide.
            found += gpu_kernels.run(self.device, torch.float32, True, self.args.checks)
        for outcome in found:
            verdict = "ok" if outcome.ok else "WRONG"
            error = f"error {outcome.error:.2g} (limit {outcome.limit:.2g})"
            print(f"  {verdict:5} {outcome.name:26} {error} {outcome.message}")
        return gpu_kernels.as_dicts(found)

    def models(self) -> list[dict[str, Any]]:
        import gpu_kernels
        import gpu_models
        import torch

        found = []
        for dtype in (torch.float32,) if self.tiny else (torch.float32, torch.bfloat16):
            found += gpu_models.check_models(self.device, dtype, self.ops())
        for outcome in found:
            print(
                f"  {'ok' if outcome.ok else 'WRONG':5} {outcome.name:44} error {outcome.error:.2g} {outcome.message}"
            )
        return gpu_kernels.as_dicts(found)

    def ops(self) -> Any:
        from phloem.kernels.triton import table

        return table.table()

    def floors(self) -> dict[str, Any]:
        import gpu_bench

        found = gpu_bench.measure_floors(self.device, self.tiny, self.float8)
        self.report["_floors"] = found
        eight = f", float8 {found.flops_8 / 1e12:.0f}" if found.flops_8 else ""
        print(
            f"  copy {found.bytes_per_second / 1e12:.2f} TB/s, matmul bf16 {found.flops_16 / 1e12:.0f}{eight} TFLOP/s"
        )
        return {"bytes_per_second": found.bytes_per_second, "flops_16": found.flops_16, "flops_8": found.flops_8}

    def benchmark(self, config: dict[str, Any], float8: bool, serve: bool) -> dict[str, Any]:
        import gpu_bench
        import gpu_experts
        import gpu_models
        import torch

        floors = self.report.get("_floors") or gpu_bench.measure_floors(self.device, self.tiny, self.float8)
        batches, context, prompt = ((1, 2), 40, 48) if self.tiny else (BATCHES, 1024, 4096)
        seconds = 0.01 if self.tiny else 0.5
        size = 1 if float8 else self.dtype.itemsize
        if not self.tiny:
            free = torch.cuda.mem_get_info(self.device)[0]
            batches = tuple(gpu_bench.fitting(config, free, size, BATCHES, context, self.dtype.itemsize))
            if not batches:
                raise MemoryError(f"{free / 2**30:.0f} GiB are free: not enough for these weights and one row")
        begin = time.perf_counter()
        page = 16
        pages = max(batches) * -(-(context + 192) // page) + prompt // page + 64
        with torch.inference_mode():
            # A dry run measures the reference table: the interpreter would take minutes.
            ops = gpu_models.Ops() if self.tiny else self.ops()
            wide = self.float8 if float8 else None
            dummy = gpu_models.Dummy(config, ops, self.device, self.dtype, pages, wide, triton=not self.tiny)
            dummy.fill_cache()
            found: dict[str, Any] = {
                "weight_gib": dummy.model.weight_bytes / 2**30,
                "build_s": time.perf_counter() - begin,
                "decode": [],
                "runner": [],
            }
            for rows in batches:
                row = gpu_bench.bench_decode(dummy, floors, rows, context, size, float8, seconds)
                found["decode"].append(row)
                rate = f"{row['step_ms']:.2f} ms, {row['tok_per_s']:.0f} tok/s"
                if not self.tiny:
                    with gpu_experts.late():
                        after = gpu_bench.bench_decode(dummy, floors, rows, context, size, float8, seconds)
                    row["late_ms"] = after["step_ms"]
                    rate += f" ({row['late_ms']:.2f} ms without early launches)"
                print(f"  decode {rows:3}: {rate}, {row['of_floor']:.2f} of floor", flush=True)
            prefill = found["prefill"] = gpu_bench.bench_prefill(dummy, floors, prompt, float8, seconds)
            print(f"  prefill {prompt}: {prefill['tok_per_s']:.0f} tok/s, {prefill['of_matmul_rate']:.2f} of matmul")
            if serve:
                found["pieces"] = gpu_bench.bench_pieces(dummy, [16, 40] if self.tiny else PIECES, seconds / 2)
                for row in found["pieces"]:
                    ran = row["refused"] if row["pieces_ms"] is None else f"{row['pieces_ms']:.2f} ms"
                    print(f"  prefill {row['tokens']:4}: eager {row['eager_ms']:.2f} ms, in pieces {ran}")
        if serve:
            self._serve(dummy, found, context)
        return found

    def _serve(self, dummy: Any, found: dict[str, Any], context: int) -> None:
        import gpu_bench

        try:
            for row in found["decode"]:
                steps = 6 if self.tiny else 120
                one = gpu_bench.bench_runner(dummy, row["rows"], context, steps, row["step_ms"])
                found["runner"].append(one)
                print(f"  runner {one['rows']:3}: {one['wall_ms']:.2f} ms a step, GPU idle {one['gpu_idle']:.1%}")
            most = max(row["rows"] for row in found["decode"])  # what the card's memory allows
            how = (50.0, 0.1, 20, 4, 4) if self.tiny else (16.0, 12.0, 512, 128, most)
            found["serving"] = gpu_bench.bench_serving(dummy, *how)
            print(f"  serving: {found['serving']}")
        except ImportError as error:
            self.report["skipped"]["serving"] = f"missing: {error}"
            print(f"  serving skipped: {error}")

    def experts(self) -> dict[str, Any]:
        """Each kernel that may multiply many rows of experts."""
        import gpu_experts
        import gpu_models

        config = {**gpu_models.TINY_MOE, "num_experts": 2} if self.tiny else gpu_models.QWEN3_30B_A3B
        found: dict[str, Any] = {}
        for name, float8 in ((str(self.dtype).removeprefix("torch."), None), ("float8", self.float8)):
            seconds = 0.01 if self.tiny else 0.2
            found[name] = gpu_experts.bench_experts(config, self.device, self.dtype, float8, seconds)
        print("\n".join(f"  {line}" for line in gpu_experts.lines(found)))
        return found

    def cold(self) -> dict[str, Any]:
        """A first start without any cache of kernels, and one with it, each in a process of its own."""
        import gpu_models

        config = {**(gpu_models.TINY_LLAMA if self.tiny else gpu_models.LLAMA_8B), "architectures": []}
        less = ["--requests", "6", "--flight", "3", "--prompt", "20", "--output", "4", "--device", "cpu"]
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(config))
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_CACHE_DIR"}
            environment |= {"XDG_CACHE_HOME": folder}
            for name in ("first start", "second start"):
                command = [sys.executable, str(HERE / "gpu_cold.py"), str(path), *(less if self.tiny else [])]
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=max(30.0, self.left)
                )
                if done.returncode != 0:
                    raise RuntimeError(f"{name}: {done.stderr.strip()[-800:]}")
                one = found[name] = json.loads(done.stdout.strip().splitlines()[-1])
                first, last = one["rounds"][0], one["rounds"][-1]
                print(
                    f"  {name}: ready in {one['ready_s']:.1f} s; {first['output_tok_per_s']:.0f} tok/s, then "
                    f"{last['output_tok_per_s']:.0f}: {one['cold_over_warm']:.2f}; longest TTFT "
                    f"{first['ttft_ms_max']:.0f} ms, longest gap {first['longest_gap_ms']:.0f} ms"
                )
        return found

    def ranks(self) -> dict[str, Any]:
        """The way of several ranks on one card, against one rank; and two ranks, where there are two cards."""
        import gpu_models

        shape = gpu_models.TINY_LLAMA if self.tiny else {**gpu_models.LLAMA_8B, "num_hidden_layers": 8}
        less = ["--device", "cpu", "--turns", "1"] if self.tiny else []
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps({**shape, "architectures": []}))
            for what, where in (("one", path), ("two", Path(folder))):
                command = [sys.executable, str(HERE / "gpu_ranks.py"), what, str(where), *less]
                done = subprocess.run(command, capture_output=True, text=True, timeout=max(30.0, self.left))
                if done.returncode != 0:
                    raise RuntimeError(f"{what}: {done.stderr.strip()[-800:]}")
                one = found[what] = json.loads(done.stdout.strip().splitlines()[-1])
                print(f"  {what}: { ({key: value for key, value in one.items() if key != 'turns'}) }")
        if not found["two"].get("same_tokens", True):
            self.report["errors"]["ranks"] = "two ranks answer otherwise than one"
        return found

    def shared(self) -> dict[str, Any]:
        """Requests that share a prefix: pages read once a step, and for every row."""
        return self._servers("shared", ("phloem", "phloem-apart"), ("shared",))

    def peers(self) -> dict[str, Any]:
        """This engine and those that are installed beside it, under the same requests."""
        import gpu_peers

        there = [name for name in ("vllm", "sglang") if importlib.util.find_spec(name) is not None]
        if not there and not self.tiny:
            raise ImportError("neither vllm nor sglang is installed")
        return self._servers("peers", ("phloem", *there), tuple(gpu_peers.LOADS))

    def _servers(self, name: str, engines: tuple[str, ...], workloads: tuple[str, ...]) -> dict[str, Any]:
        import gpu_models
        import gpu_peers

        shape = gpu_models.TINY_LLAMA if self.tiny else gpu_models.LLAMA_8B
        config = {**shape, "architectures": ["LlamaForCausalLM"]}
        loads = gpu_peers.TINY if self.tiny else gpu_peers.LOADS
        seconds = 120.0 if self.tiny else max(30.0, self.left)
        device = "cpu" if self.tiny else ""
        found = gpu_peers.compare(config, engines, [loads[one] for one in workloads], seconds, device)
        print("\n".join(f"  {line}" for line in gpu_peers.table(found)))
        if mine := [why for engine, why in found["skipped"].items() if engine.startswith("phloem")]:
            self.report["errors"][name] = mine[0]
        return found

    def transformers(self) -> list[dict[str, Any]]:
        import gpu_bench
        import gpu_models

        config = gpu_models.TINY_LLAMA if self.tiny else gpu_models.LLAMA_8B
        batches, context = ([2], 40) if self.tiny else ([1, 32], 1024)
        found = gpu_bench.bench_transformers(
            config, self.device, self.dtype, batches, context, 0.01 if self.tiny else 0.5
        )
        for row in found:
            print(f"  transformers {row['rows']:3}: {row['step_ms']:.2f} ms, {row['tok_per_s']:.0f} tok/s")
        return found

    def run(self) -> None:
        import gpu_models

        llama = gpu_models.TINY_LLAMA if self.tiny else gpu_models.LLAMA_8B
        qwen = gpu_models.TINY_MOE if self.tiny else gpu_models.QWEN3_30B_A3B
        self.section("kernels", 60, self.kernels)
        self.section("models", 30, self.models)
        self.section("floors", 10, self.floors)
        self.section("experts", 30, self.experts)
        self.section("cold", 120, self.cold)
        self.section("ranks", 90, self.ranks)
        self.section("shared", 120, self.shared)
        self.section("llama", 60, lambda: self.benchmark(llama, False, True))
        self.section("llama-fp8", 45, lambda: self.benchmark(llama, True, False))
        self.section("qwen", 60, lambda: self.benchmark(qwen, False, True))
        self.section("qwen-fp8", 60, lambda: self.benchmark(qwen, True, False))
        self.section("transformers", 90, self.transformers)
        self.section("peers", 240, self.peers)
        self.report.pop("_floors", None)
        self.report["seconds"] = time.perf_counter() - self.begun


def machine(dry: bool) -> dict[str, Any]:
    import torch
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    if not dry:
        props = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": props.name,
            "memory_gib": props.total_memory / 2**30,
            "processors": props.multi_processor_count,
        }
    return found


def failures(report: dict[str, Any]) -> list[str]:
    wrong = [row["name"] for part in ("kernels", "models") for row in report.get(part, []) if not row["ok"]]
    return wrong + [f"{name}: {text}" for name, text in report["errors"].items()]


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    info = report["machine"]
    title = "Dry run on a CPU: the numbers mean nothing" if report["dry_run"] else f"GPU check on {info['gpu']}"
    lines = [f"# {title}", "", ", ".join(f"{key} {value}" for key, value in info.items()), ""]
    checked = [row for part in ("kernels", "models") for row in report.get(part, [])]
    if checked:
        wrong = failures(report)
        lines += [f"{len(checked)} checks, {sum(row['ok'] for row in checked)} right.", ""]
        lines += [f"- WRONG: {text}" for text in wrong] + ([""] if wrong else [])
    if floors := report.get("floors"):
        eight = f", float8 {floors['flops_8'] / 1e12:.0f} TFLOP/s" if floors["flops_8"] else ""
        rate = f"matmul bf16 {floors['flops_16'] / 1e12:.0f} TFLOP/s{eight}"
        lines += [f"Floors: copy {floors['bytes_per_second'] / 1e12:.2f} TB/s, {rate}.", ""]
    if cold := report.get("cold"):
        lines += ["## Cold start (Llama-8B shapes, 32 in flight)", ""]
        lines += ["| | ready s | first round tok/s | later tok/s | ratio | longest TTFT ms | compiled late |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for name, one in cold.items():
            first, last = one["rounds"][0], one["rounds"][-1]
            late = len((one["kernels"] or {}).get("late", []))
            rates = f"{first['output_tok_per_s']:.0f} | {last['output_tok_per_s']:.0f} | {one['cold_over_warm']:.2f}"
            lines.append(f"| {name} | {one['ready_s']:.1f} | {rates} | {first['ttft_ms_max']:.0f} | {late} |")
        lines.append("")
    if experts := report.get("experts"):
        import gpu_experts

        lines += ["## Many rows of experts (Qwen3-30B-A3B shapes)", "", *gpu_experts.lines(experts), ""]

    if ranks := report.get("ranks"):
        one, two = ranks["one"], ranks["two"]
        lines += ["## Several ranks", ""]
        step = f"A decode step of {one['rows']} rows takes {one['ms']['alone']:.3f} ms alone"
        lines += [f"{step}, as one of several ranks would run it {one['ratio']:.3f} times that. Two ranks:"]
        lines += [", ".join(f"{key} {value}" for key, value in two.items()), ""]
    for name, title in (("shared", "A shared prefix of 2,048 tokens"), ("peers", "Beside other engines")):
        if found := report.get(name):
            import gpu_peers

            lines += [f"## {title} (Llama-8B shapes)", "", *gpu_peers.table(found), ""]
    baseline = {row["rows"]: row for row in report.get("transformers", [])}
    for name in ("llama", "llama-fp8", "qwen", "qwen-fp8"):
        if found := report.get(name):
            lines += _model_lines(name, found, baseline if name == "llama" else {})
    lines += [f"- skipped: {name} ({why})" for name, why in report["skipped"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _model_lines(name: str, found: dict[str, Any], baseline: dict[int, Any]) -> list[str]:
    lines = [f"## {name} ({found['weight_gib']:.1f} GiB of random weights)", ""]
    lines += ["| rows | step ms | tok/s | floor ms | of floor | runner ms | GPU idle | transformers tok/s |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    runner = {row["rows"]: row for row in found["runner"]}
    for row in found["decode"]:
        ran, other = runner.get(row["rows"]), baseline.get(row["rows"])
        wall, idle = (f"{ran['wall_ms']:.2f}", f"{ran['gpu_idle']:.1%}") if ran else ("", "")
        theirs = f"{other['tok_per_s']:.0f}" if other else ""
        numbers = f"{row['step_ms']:.2f} | {row['tok_per_s']:.0f} | {row['floor_ms']:.2f} | {row['of_floor']:.2f}"
        lines.append(f"| {row['rows']} | {numbers} | {wall} | {idle} | {theirs} |")
    prefill = found["prefill"]
    lines += ["", f"Prefill of {prefill['tokens']} tokens: {prefill['tok_per_s']:.0f} tok/s, "]
    lines[-1] += f"{prefill['tflops']:.0f} TFLOP/s, {prefill['of_matmul_rate']:.2f} of the matmul rate."
    if found.get("pieces"):
        lines += ["", "| prefill tokens | eager ms | in pieces ms | recording s | MiB |"]
        lines += ["| ---: | ---: | ---: | ---: | ---: |"]
        for row in found["pieces"]:
            ran = row.get("refused") or f"{row['pieces_ms']:.2f}"
            took = f"{row['record_s']:.1f} | {row.get('memory_mib', 0):.0f}"
            lines.append(f"| {row['tokens']} | {row['eager_ms']:.2f} | {ran} | {took} |")
    if serving := found.get("serving"):
        kept = (
            "rate",
            "requests",
            "failed",
            "output_tok_per_s",
            "ttft_ms_p50",
            "ttft_ms_p99",
            "itl_ms_p50",
            "itl_ms_p99",
        )
        lines += ["", "Serving: " + ", ".join(f"{key} {_short(serving[key])}" for key in kept) + "."]
    return [*lines, ""]


def _short(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, under Triton's interpreter")
    parser.add_argument("--only", default="", help=f"sections by prefix, with commas: {', '.join(SECTIONS)}")
    parser.add_argument("--checks", default="", help="of the kernels, only these, with commas")
    parser.add_argument("--seconds", type=float, default=520.0, help="no section begins that would not end by then")
    parser.add_argument("--out", type=Path, default=HERE.parent / "benchmarks" / "results")
    args = parser.parse_args(argv)
    if args.dry_run:
        if args.out == parser.get_default("out"):
            parser.error("a dry run needs --out: its numbers must not stand among results")
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} finds no device; --dry-run --out DIR tries the script on a CPU")
        return 2
    try:
        import triton  # noqa: F401
    except ImportError:
        print("Triton is not installed: there are no kernels to check")
        return 2
    check = Check(args)
    if not args.dry_run:
        watch = threading.Timer(args.seconds + GRACE, out_of_time, (check,))
        watch.daemon = True
        watch.start()
    check.run()
    wrong = failures(check.report)
    stem = write(check)
    print(markdown(check.report))
    print(f"{stem}.json, .md; " + (f"{len(wrong)} WRONG" if wrong else "all right"))
    return 1 if wrong else 0


def write(check: Check) -> Path:
    """The report, in two files of this name."""
    args, report = check.args, {key: value for key, value in check.report.items() if not key.startswith("_")}
    args.out.mkdir(parents=True, exist_ok=True)
    name = "dry-run" if args.dry_run else report["machine"]["gpu"].lower().replace(" ", "-")
    stem = args.out / f"gpu-check-{name}-{time.strftime('%Y%m%d-%H%M', time.gmtime())}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    return stem


def out_of_time(check: Check) -> None:
    """Something hangs: what there is by now is written, and the process ends."""
    check.report["errors"]["time"] = f"not done {GRACE:.0f} s after the {check.args.seconds:.0f} s it was given"
    print(f"out of time; {write(check)}.json, .md", flush=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
