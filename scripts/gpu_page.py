"""The page of scripts/gpu_check.py's report. What is missing in it, because a section ended early, is left out."""

from __future__ import annotations

from typing import Any

_SERVED = ("rate", "requests", "failed", "output_tok_per_s", "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99")


def failures(report: dict[str, Any]) -> list[str]:
    wrong = [row["name"] for part in ("kernels", "models") for row in report.get(part, []) if not row["ok"]]
    return wrong + [f"{name}: {text}" for name, text in report["errors"].items()]


def short(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    info = report["machine"]
    card = info.get("gpu", "no card")
    title = "Dry run on a CPU: the numbers mean nothing" if report["dry_run"] else f"GPU check on {card}"
    lines = [f"# {title}", "", ", ".join(f"{key} {short(value)}" for key, value in info.items()), ""]
    lines += _checks(report)
    if floors := report.get("floors"):
        eight = f", float8 {floors['flops_8'] / 1e12:.0f} TFLOP/s" if floors["flops_8"] else ""
        rate = f"matmul bf16 {floors['flops_16'] / 1e12:.0f} TFLOP/s{eight}"
        lines += [f"Floors: copy {floors['bytes_per_second'] / 1e12:.2f} TB/s, {rate}.", ""]
    baseline = {row["rows"]: row for row in report.get("transformers", [])}
    for name in ("llama", "qwen", "llama-fp8", "qwen-fp8"):
        if found := report.get(name):
            lines += _model(name, found, baseline if name == "llama" else {})
    if experts := report.get("experts"):
        lines += ["## Many rows of experts (Qwen3-30B-A3B shapes)", "", *_experts(experts), ""]
    if cold := report.get("cold"):
        lines += ["## Cold start (Llama-8B shapes, 32 in flight)", "", *_starts(list(cold.items())), ""]
    if switches := report.get("switches"):
        rows = [(f"{row['model']}, {row['what']}", row) for row in switches]
        lines += ["## Switches of the environment (32 in flight)", "", *_starts(rows), ""]
    for name, what in (("peers", "Beside other engines"), ("shared", "A shared prefix of 2,048 tokens")):
        if found := report.get(name):
            import gpu_goals
            import gpu_peers

            lines += [f"## {what} (Llama-8B shapes)", "", *gpu_peers.table(found), ""]
            if name == "peers":
                lines += [*gpu_goals.page(found), ""]
    if ranks := report.get("ranks"):
        lines += _ranks(ranks)
    if left := report.get("left"):
        lines += ["## Left behind, and removed", "", *(f"- {name}: {what}" for name, what in left.items()), ""]
    lines += [f"- skipped: {name} ({why})" for name, why in report["skipped"].items()]
    if seconds := report.get("section_s"):
        lines += ["", "Seconds: " + ", ".join(f"{name} {took:.0f}" for name, took in seconds.items()) + "."]
    return "\n".join(lines).rstrip() + "\n"


def _checks(report: dict[str, Any]) -> list[str]:
    checked = [row for part in ("kernels", "models") for row in report.get(part, [])]
    lines = [f"{len(checked)} checks, {sum(row['ok'] for row in checked)} right.", ""] if checked else []
    wrong = [f"{row['name']} ({' '.join(row['message'].split())[:300]})" for row in checked if not row["ok"]]
    wrong += [f"{name}: {' '.join(text.split())}" for name, text in report["errors"].items()]
    return lines + [f"- WRONG: {text}" for text in wrong] + ([""] if wrong else [])


def _experts(found: dict[str, Any]) -> list[str]:
    out = ["| weights | rows an expert | kernel | ms | TFLOP/s |", "| --- | ---: | --- | ---: | ---: |"]
    for kind, rows in found.items():
        for row in rows:
            for name, one in row["kernels"].items():
                numbers = f"{one['ms']:.3f} | {one['tflops']:.0f}" if "ms" in one else f"{one['refused']} |"
                out.append(f"| {kind} | {row['each']:.0f} | {name} | {numbers} |")
    return out


def _starts(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    lines = ["| | ready s | first round tok/s | later tok/s | ratio | longest TTFT ms | compiled late |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, one in rows:
        if "rounds" not in one:
            lines.append(f"| {name} | {' '.join(one['error'].split())[:200]} | | | | | |")
            continue
        first, last = one["rounds"][0], one["rounds"][-1]
        late = len((one["kernels"] or {}).get("late", []))
        rates = f"{first['output_tok_per_s']:.0f} | {last['output_tok_per_s']:.0f} | {one['cold_over_warm']:.2f}"
        lines.append(f"| {name} | {one['ready_s']:.1f} | {rates} | {first['ttft_ms_max']:.0f} | {late} |")
    return lines


def _ranks(ranks: dict[str, Any]) -> list[str]:
    lines = ["## Several ranks", ""]
    if one := ranks.get("one"):
        step = f"A decode step of {one['rows']} rows takes {one['ms']['alone']:.3f} ms alone"
        lines += [f"{step}, as one of several ranks would run it {one['ratio']:.3f} times that."]
    if two := ranks.get("two"):
        lines += ["Two ranks: " + ", ".join(f"{key} {value}" for key, value in two.items())]
    return [*lines, ""]


def _model(name: str, found: dict[str, Any], baseline: dict[int, Any]) -> list[str]:
    lines = [f"## {name} ({found['weight_gib']:.1f} GiB of random weights)", ""]
    lines += ["| rows | step ms | late ms | tok/s | floor ms | of floor | runner ms | GPU idle | transformers tok/s |"]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    runner = {row["rows"]: row for row in found["runner"]}
    for row in found["decode"]:
        ran, other = runner.get(row["rows"]), baseline.get(row["rows"])
        wall, idle = (f"{ran['wall_ms']:.2f}", f"{ran['gpu_idle']:.1%}") if ran else ("", "")
        theirs = f"{other['tok_per_s']:.0f}" if other else ""
        times = f"{row['step_ms']:.2f} | {row['late_ms']:.2f}"
        numbers = f"{times} | {row['tok_per_s']:.0f} | {row['floor_ms']:.2f} | {row['of_floor']:.2f}"
        lines.append(f"| {row['rows']} | {numbers} | {wall} | {idle} | {theirs} |")
    lines += ["", "late: without early launches (`PHLOEM_PDL=off`)."]
    if prefill := found.get("prefill"):
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
        lines += ["", "Serving: " + ", ".join(f"{key} {short(serving[key])}" for key in _SERVED) + "."]
    return [*lines, ""]
