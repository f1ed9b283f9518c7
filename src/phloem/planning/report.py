"""Plans for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from phloem.planning.machines import GIB

if TYPE_CHECKING:
    from phloem.planning.machines import Machine
    from phloem.planning.plan import Answer, Load, Price
    from phloem.planning.shape import Shape
    from phloem.planning.steps import Terms

_HEAD = (
    "tp",
    "pp",
    "ep",
    "attn dp",
    "dp",
    "weights",
    "KV GiB",
    "rows",
    "ITL ms",
    "TTFT ms",
    "out tok/s",
    "a GPU",
    "bound",
)


def described(shape: Shape) -> dict[str, Any]:
    """A model's sizes, as JSON."""
    return {
        "name": shape.name,
        "family": shape.family,
        "parameters": round(shape.parameters),
        "active_parameters": round(shape.active),
        "weight_bytes": round(shape.weight_bytes),
        "stored_bytes": shape.stored_bytes or None,
        "formats": {
            "matrix": shape.formats.matrix.name, "expert": shape.formats.expert.name, "other": shape.formats.other.name
        },
        "kv_cache_dtype": shape.kv_type,
        "kv_bytes_per_token": round(shape.kv_bytes()),
        "state_bytes_per_request": round(shape.state_bytes),
    }  # fmt: skip


def as_json(shape: Shape, machine: Machine, gpus: int, load: Load, answer: Answer, top: int) -> dict[str, Any]:
    """Everything that was found, the best first."""
    return {
        "model": described(shape),
        "machine": asdict(machine),
        "gpus": gpus,
        "load": asdict(load),
        "layouts": [item.told() for item in answer.prices[:top]],
        "fitting": len(answer.prices),
        "refused": len(answer.refused),
    }


def as_text(shape: Shape, machine: Machine, gpus: int, load: Load, answer: Answer, top: int) -> str:
    """A table, and the best layout's terms."""
    lines = [*_model_lines(shape, load), ""]
    lines += [f"{gpus} x {machine.name}: {machine.memory_gib:g} GiB at {machine.bandwidth:g} GB/s, "
              f"{machine.bf16:g} TFLOPS bf16, {machine.fp8:g} fp8, links {machine.link:g} GB/s among {machine.domain}, "
              f"{machine.net:g} GB/s beyond"]  # fmt: skip
    lines += [f"{load.prompt} tokens in ({load.hit:.0%} cached), {load.output} out, room for {load.longest}", ""]
    rows = [_HEAD, *(_row(item) for item in answer.prices[:top])]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEAD))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += ["", f"{len(answer.prices)} layouts fit, {len(answer.refused)} do not."]
    best = answer.prices[0]
    lines += ["", f"The first one, {best.layout}:"]
    lines += [_terms("a decode step", best.decode), _terms(f"a prefill step of {load.chunk} tokens", best.prefill)]
    lines += [f"  memory of a GPU: weights {best.memory.weights / GIB:.1f}, work {best.memory.work / GIB:.1f}, "
              f"KV {best.memory.kv / GIB:.1f} GiB = {best.memory.rows} requests of {load.longest} tokens"]  # fmt: skip
    apart = [
        f"{rate / gpus:,.0f} {what}" for rate, what in ((best.prefill_rate, "prompt"), (best.decode_rate, "output"))
    ]
    lines += [f"  apart: {' and '.join(apart)} tok/s a GPU; prefill to decode GPUs for this load {_ratio(best, load)}"]
    return "\n".join(lines)


def _model_lines(shape: Shape, load: Load) -> list[str]:
    forms = shape.formats
    kinds = forms.matrix.name if forms.matrix == forms.expert else f"{forms.matrix.name}, experts {forms.expert.name}"
    text = (
        f"{shape.name} ({shape.family}): {shape.parameters / 1e9:.2f} B parameters, {shape.active / 1e9:.2f} B active"
    )
    lines = [f"{text}, {shape.weight_bytes / GIB:.1f} GiB as {kinds}"]
    if shape.stored_bytes:
        lines.append(f"  its files hold {shape.stored_bytes / GIB:.1f} GiB")
    kept = shape.kv_bytes(load.longest) + shape.state_bytes
    each = f"{kept / 2**20:.1f} MiB a request of {load.longest}"
    lines.append(f"  KV {shape.kv_bytes():,.0f} bytes a token ({shape.kv_type}); {each}")
    return lines


def _row(item: Price) -> tuple[str, ...]:
    at = item.layout
    return (
        *(str(size) for size in (at.tp, at.pp, at.ep, at.attn_dp, at.dp)),
        f"{item.memory.weights / GIB:.1f}",
        f"{item.memory.kv / GIB:.1f}",
        str(item.rows),
        f"{item.itl * 1e3:.1f}",
        f"{item.ttft * 1e3:.0f}",
        f"{item.output_rate:,.0f}",
        f"{item.output_rate / item.gpus:,.0f}",
        item.decode.largest,
    )


def _terms(what: str, terms: Terms) -> str:
    parts = [f"{name} {value * 1e3:.2f} ({terms.bounds[name]})" for name, value in terms.seconds.items()]
    return f"  {what}, {terms.total * 1e3:.2f} ms: {', '.join(parts)}"


def _ratio(best: Price, load: Load) -> str:
    prefill = load.prompt * (1 - load.hit) / best.prefill_rate
    decode = load.output / best.decode_rate
    return f"{prefill / decode:.2f} : 1"
