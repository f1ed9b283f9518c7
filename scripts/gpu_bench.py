"""Measurements for scripts/gpu_check.py: the machine's floors, decode, prefill, serving, and transformers beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import gpu_card
import numpy as np
import torch
from gpu_models import Dummy, decode_work, prefill_flops
from torch import Tensor

from phloem.core.batch import FROM_DEVICE, Batch
from phloem.engine.forward import run_forward
from phloem.engine.inputs import StepInputs

TRACED_STEPS = 24
STEP_BYTES = 6 << 30  # for activations, graphs and libraries


def timed(device: torch.device, run: Callable[[], Any], least: int, seconds: float) -> list[float]:
    """Seconds of single runs on the process's card (`gpu_card.timed`)."""
    return gpu_card.timed(run, least, seconds)


def _sync(device: torch.device) -> None:
    gpu_card.here().wait()


@dataclass
class Floors:
    """What the machine gave to plain torch."""

    bytes_per_second: float  # of a large copy, read plus written
    flops_16: float  # of a large bf16 product of random matrices
    flops_8: float | None  # of a float8 one

    def flops(self, float8: bool) -> float:
        return self.flops_8 if float8 and self.flops_8 else self.flops_16


def _time_copy(device: torch.device, size: int) -> float:
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return statistics.median(timed(device, lambda: target.copy_(source), 10, 0.3))


def measure_floors(device: torch.device, tiny: bool, float8: torch.dtype) -> Floors:
    size, n = (1 << 20, 256) if tiny else (1 << 32, 8192)
    copy = _time_copy(device, size)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    product = statistics.median(timed(device, lambda: a @ b, 5, 0.5))
    flops_8 = None
    try:
        a8, b8 = a.to(float8), b.t().contiguous().to(float8).t()
        one = torch.ones((), device=device)
        run8 = lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)  # noqa: E731
        flops_8 = 2 * n**3 / statistics.median(timed(device, run8, 5, 0.5))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        print(f"  no float8 product here: {error}")
    return Floors(2 * size / copy, 2 * n**3 / product, flops_8)


def decode_step(dummy: Dummy, inputs: StepInputs) -> Callable[[], Tensor]:
    """Forward, head and arg-max of one decode step over fixed inputs; the token feeds the next step."""

    def run() -> Tensor:
        hidden = run_forward(dummy.model, dummy.backend, dummy.pool, inputs, None)  # every row, without a gather
        token = dummy.ops.argmax(dummy.model.head(hidden))
        inputs.input_ids.copy_(token)
        return token

    return run


def bench_decode(
    dummy: Dummy, floors: Floors, rows: int, context: int, weight_size: float, float8: bool, seconds: float
) -> dict[str, Any]:
    """Time of a captured decode step on the device against its floor."""
    inputs = dummy.inputs([1] * rows, [context] * rows)
    run = decode_step(dummy, inputs)
    begun = time.perf_counter()
    graph, _ = dummy.recorder().record(run)
    capture = time.perf_counter() - begun
    times = timed(dummy.device, graph.replay, 5, seconds)
    best = statistics.median(times)
    work = decode_work(dummy.config, rows, context, weight_size, dummy.pool.dtype.itemsize)
    floor = work.floor(floors.bytes_per_second, floors.flops(float8))
    return {
        "rows": rows,
        "context": context,
        "step_ms": best * 1e3,
        "spread_ms": (max(times) - min(times)) * 1e3,
        "tok_per_s": rows / best,
        "floor_ms": floor * 1e3,
        "of_floor": floor / best,
        "capture_s": capture,
    }


def bench_prefill(dummy: Dummy, floors: Floors, tokens: int, float8: bool, seconds: float) -> dict[str, Any]:
    """One prompt in one eager step."""
    inputs = dummy.inputs([tokens], [tokens])
    times = timed(dummy.device, lambda: dummy.model.head(dummy.forward(inputs)), 3, seconds)
    best = statistics.median(times)
    rate = prefill_flops(dummy.config, tokens) / best
    return {
        "tokens": tokens,
        "step_ms": best * 1e3,
        "tok_per_s": tokens / best,
        "tflops": rate / 1e12,
        "of_matmul_rate": rate / floors.flops(float8),
    }


def bench_pieces(dummy: Dummy, counts: list[int], seconds: float) -> list[dict[str, Any]]:
    """Prefill steps of one prompt, up to the hidden states, eagerly and in recorded pieces: host time included."""
    rows: list[dict[str, Any]] = []
    for tokens in counts:
        step = dummy.step([tokens], [tokens])
        inputs = step.inputs
        eager = statistics.median(timed(dummy.device, lambda inputs=inputs: dummy.forward(inputs), 5, seconds))
        pieces = dummy.pieces(tokens)
        pieces.graphs.sizes[:] = [tokens]
        begun = time.perf_counter()
        pieces.graphs.record_all()
        row: dict[str, Any] = {"tokens": tokens, "eager_ms": eager * 1e3, "record_s": time.perf_counter() - begun}
        refusal = pieces.graphs.refusal(tokens)
        if refusal is None:
            ran = statistics.median(timed(dummy.device, lambda p=pieces, s=step: p.run(s, lambda: None), 5, seconds))
            row |= {"pieces_ms": ran * 1e3, "memory_mib": pieces.nbytes / 2**20}
        else:
            row |= {"pieces_ms": None, "refused": refusal}
        rows.append(row)
    return rows


def _runner(dummy: Dummy, rows: int, context: int, sizes: list[int]) -> tuple[Any, dict[str, Any]]:
    """A runner whose decode steps of these sizes are recorded by now (on a card it would record in pauses, of which a
    measurement has none), and what became of the recordings."""
    from phloem.engine.runner import ModelRunner
    from phloem.platforms._facts import StepFacts

    streams = gpu_card.here().streams()
    facts = StepFacts(records_idle=streams is not None)
    way = dummy.graphs(rows, context)
    way.graphs.sizes[:] = sizes
    with torch.inference_mode():
        way.graphs.record_all()
    told = {"recorded": [size for size in sizes if way.graphs.refusal(size) is None]}
    told |= {"given_up": dict(way.graphs.given_up)} if way.graphs.given_up else {}
    whole = dummy.model, dummy.backend, dummy.pool, dummy.ops
    return ModelRunner(*whole, rows, facts=facts, recorded=[way], streams=streams), told


def bench_runner(dummy: Dummy, rows: int, context: int, steps: int, device_ms: float) -> dict[str, Any]:
    """Decode steps through the engine's runner, the next one launched before the last one's tokens are read.

    The idle share is that of `phloem bench step`: the time between kernels in a trace of some more steps. Where the
    trace shows none it is what of the wall time `device_ms` does not fill.
    """
    from phloem.bench._timeline import device_figures
    from phloem.core.batch import Admission
    from phloem.core.request import SamplingParams

    runner, graphs = _runner(dummy, rows, context + steps + 64, [rows])
    width = -(-(context + steps + 8) // dummy.page_size)
    table = (np.arange(rows * width) % (dummy.pool.num_pages[0] - 1) + 1).reshape(rows, width).astype(np.int32)
    slots, ones = np.arange(rows, dtype=np.int32), np.ones(rows, np.int32)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=steps + 8)
    prompt = np.ones(context, np.int32)

    def batch(number: int) -> Batch:
        first = number == 0
        return Batch(
            step=number,
            slots=slots,
            query_lens=ones,
            prefix_lens=np.full(rows, context + number, np.int32),
            input_ids=np.full(rows, 1 if first else FROM_DEVICE, np.int32),
            tables=(table,) * len(dummy.pool.groups),
            outputs=ones,
            admissions=[Admission(int(s), f"r{s}", greedy, 1, prompt, context) for s in slots] if first else [],
        )

    def run(begin: int, end: int) -> float:
        """Seconds for these steps, the next one always launched before the last one's end is waited for."""
        begun, pending = time.perf_counter(), runner.launch(batch(begin))
        for number in range(begin + 1, end):
            following = runner.launch(batch(number))
            pending.result()
            pending = following
        pending.result()
        return time.perf_counter() - begun

    try:
        warm = min(8, steps // 2)
        run(0, warm)
        wall = run(warm, steps) / (steps - warm)
        last = min(steps, warm + TRACED_STEPS)
        seen = device_figures(gpu_card.here().trace(lambda: run(warm, last)), last - warm, top=5)
    finally:
        runner.close()
    found = {"rows": rows, "context": context, "wall_ms": wall * 1e3, "tok_per_s": rows / wall, "graphs": graphs}
    if seen is None:
        return {**found, "gpu_idle": max(0.0, 1 - device_ms / 1e3 / wall)}
    return {**found, "gpu_idle": seen["device_idle"], "launches": seen["launches"], "top_kernels": seen["top"]}


class Plain:
    """Whose the plain tokens of `Tokens` messages are: the requests are named only where they change."""

    def __init__(self) -> None:
        self._rows: list[str] = []

    def names(self, message: Any) -> list[str]:
        """One name for each plain token of the message."""
        if message.rows is not None:
            self._rows = message.rows
        return self._rows[: len(message.plain)]


def fitting(
    config: dict[str, Any], free: int, weight_size: float, batches: Sequence[int], context: int, kv_size: int
) -> list[int]:
    """Of the batches those whose KV fits beside the weights in so many free bytes, with room for steps and graphs."""
    layers, kv_heads, head = config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]
    one = 2 * layers * kv_heads * head * kv_size
    weights = decode_work(config, 1 << 30, 0, weight_size, kv_size).weight_bytes + config["vocab_size"] * (
        config["hidden_size"] * 2
    )
    left = free - weights - STEP_BYTES
    return [rows for rows in batches if rows * (context + 192) * one <= left]


def bench_serving(dummy: Dummy, rate: float, seconds: float, prompt: int, output: int, running: int) -> dict[str, Any]:
    """Requests arriving at random (Poisson) through scheduler and runner, without HTTP: rates and latencies."""
    from phloem.core.messages import Submit, Tokens, pack_ids
    from phloem.core.request import SamplingParams
    from phloem.kvcache.manager import CacheManager
    from phloem.scheduler.scheduler import Scheduler, ScheduleSettings

    vocab, context = dummy.config["vocab_size"], prompt + output + 64
    sizes = [1 << power for power in range(running.bit_length()) if 1 << power < running]
    runner, graphs = _runner(dummy, running, context, [*sizes, running])
    came: dict[str, float] = {}
    seen: dict[str, list[float]] = {}
    failures: list[str] = []

    counted = Plain()

    def send(message: Any) -> None:
        if isinstance(message, Tokens):
            now = time.perf_counter()
            for name in counted.names(message):
                seen.setdefault(name, []).append(now)
            for chunk in message.chunks:
                seen.setdefault(chunk.id, []).extend([now] * len(chunk.tokens))
                if chunk.finish is not None and chunk.finish.type == "abort":
                    failures.append(str(chunk.finish.message))

    settings = ScheduleSettings(running, context, vocab, chunked_prefill_size=max(2048, running))
    scheduler = Scheduler(
        runner, settings, CacheManager(dummy.pool.groups, dummy.pool.num_pages, dummy.page_size), send
    )
    random = np.random.default_rng(1)
    arrivals = np.cumsum(random.exponential(1 / rate, max(1, int(rate * seconds))))
    params = SamplingParams(temperature=0.0, max_new_tokens=output, ignore_eos=True)
    begun, next_one = time.perf_counter(), 0
    try:
        while next_one < len(arrivals) or scheduler.live:
            now = time.perf_counter() - begun
            while next_one < len(arrivals) and arrivals[next_one] <= now:
                name, ids = f"r{next_one}", random.integers(0, vocab, prompt).tolist()
                came[name] = begun + arrivals[next_one]
                scheduler.receive(Submit(id=name, input_ids=pack_ids(ids), sampling=params))
                next_one += 1
            if not scheduler.step():
                time.sleep(0.0005)
        wall = time.perf_counter() - begun
    finally:
        runner.close()
    first = [times[0] - came[name] for name, times in seen.items() if times]
    gaps = [b - a for times in seen.values() for a, b in pairwise(times)]
    return {
        "rate": rate,
        "graphs": graphs,
        "requests": len(arrivals),
        "failed": len(failures),
        "failures": sorted(set(failures))[:3],
        "prompt": prompt,
        "output": output,
        "output_tok_per_s": sum(map(len, seen.values())) / wall,
        "ttft_ms_p50": float(np.percentile(first, 50)) * 1e3 if first else None,
        "ttft_ms_p99": float(np.percentile(first, 99)) * 1e3 if first else None,
        "itl_ms_p50": float(np.percentile(gaps, 50)) * 1e3 if gaps else None,
        "itl_ms_p99": float(np.percentile(gaps, 99)) * 1e3 if gaps else None,
    }


def bench_transformers(
    config: dict[str, Any], device: torch.device, dtype: torch.dtype, batches: list[int], context: int, seconds: float
) -> list[dict[str, Any]]:
    """Decode with transformers' static cache, compiled where there is a GPU, on the same shapes."""
    import transformers

    settings = {key: value for key, value in config.items() if key != "model_type"}
    model_config = transformers.AutoConfig.for_model(config["model_type"], **settings)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype).eval()
    forward = model.forward
    if not gpu_card.here().pretended:
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=False)
    results: list[dict[str, Any]] = []
    for rows in batches:
        torch.compiler.reset()
        cache = transformers.StaticCache(config=model_config, max_cache_len=context + 256)
        ids = torch.randint(0, config["vocab_size"], (rows, context), device=device)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1, use_cache=True)
            step = _transformers_step(forward, cache, ids, context)
            begun = time.perf_counter()
            for _ in range(3):
                step()
            _sync(device)
            warm = time.perf_counter() - begun
            best = statistics.median(timed(device, step, 5, seconds))
        results.append({"rows": rows, "step_ms": best * 1e3, "tok_per_s": rows / best, "warm_s": warm})
    return results


def _transformers_step(forward: Any, cache: Any, ids: Tensor, context: int) -> Callable[[], Tensor]:
    """One decode step behind `context` tokens, always at the same position."""
    token, place = ids[:, :1].contiguous(), torch.tensor([context], device=ids.device)
    position = place.expand(len(ids), 1).contiguous()
    arguments = {"position_ids": position, "cache_position": place, "past_key_values": cache, "use_cache": True}

    def step() -> Tensor:
        return forward(input_ids=token, **arguments).logits[:, -1].argmax(-1)

    return step
