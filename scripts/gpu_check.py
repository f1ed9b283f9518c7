"""One command for a machine with a GPU: is every kernel right on it, and how fast is the engine against its floors?

    python scripts/gpu_check.py                      everything; results under benchmarks/results/
    python scripts/gpu_check.py --only kernels       correctness of the kernels alone
    python scripts/gpu_check.py --dry-run --out DIR  on a CPU, tiny: shows that the script works, and nothing else

It needs torch, Triton and numpy, for serving msgspec as well, for the comparison transformers; what is missing is
said and left out. Weights are random, nothing is downloaded. Exit status: 0 all right, 1 something is wrong, 2 no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
SECTIONS = ("kernels", "models", "floors", "llama", "llama-fp8", "qwen", "qwen-fp8", "transformers")
BATCHES = (1, 8, 32, 128, 256)
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
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

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
        import gpu_models
        import torch

        floors = self.report.get("_floors") or gpu_bench.measure_floors(self.device, self.tiny, self.float8)
        batches, context, prompt = ((1, 2), 40, 48) if self.tiny else (BATCHES, 1024, 4096)
        seconds = 0.01 if self.tiny else 0.5
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
            size = 1 if float8 else self.dtype.itemsize
            for rows in batches:
                row = gpu_bench.bench_decode(dummy, floors, rows, context, size, float8, seconds)
                found["decode"].append(row)
                rate = f"{row['step_ms']:.2f} ms, {row['tok_per_s']:.0f} tok/s"
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
            how = (50.0, 0.1, 20, 4, 4) if self.tiny else (16.0, 12.0, 512, 128, 256)
            found["serving"] = gpu_bench.bench_serving(dummy, *how)
            print(f"  serving: {found['serving']}")
        except ImportError as error:
            self.report["skipped"]["serving"] = f"missing: {error}"
            print(f"  serving skipped: {error}")

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
        self.section("llama", 60, lambda: self.benchmark(llama, False, True))
        self.section("llama-fp8", 45, lambda: self.benchmark(llama, True, False))
        self.section("qwen", 60, lambda: self.benchmark(qwen, False, True))
        self.section("qwen-fp8", 60, lambda: self.benchmark(qwen, True, False))
        self.section("transformers", 90, self.transformers)
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
    check.run()
    args.out.mkdir(parents=True, exist_ok=True)
    name = "dry-run" if args.dry_run else check.report["machine"]["gpu"].lower().replace(" ", "-")
    stem = args.out / f"gpu-check-{name}-{time.strftime('%Y%m%d-%H%M', time.gmtime())}"
    stem.with_suffix(".json").write_text(json.dumps(check.report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(check.report))
    print(markdown(check.report))
    wrong = failures(check.report)
    print(f"{stem}.json, .md; " + (f"{len(wrong)} WRONG" if wrong else "all right"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
