"""How large the KV pool may be: on a device with memory of its own, what the largest step leaves.

That step is run once on dummy inputs, every row on page 0: as many new tokens as a step may have, in as many rows as
may run, the head and a sampler with all its filters at that many rows; and the same tokens as one row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.core import resolve
from phloem.core.batch import Batch
from phloem.core.errors import ConfigError
from phloem.core.memory import groups_of
from phloem.core.request import SamplingParams
from phloem.core.resolve import GIB, Decision, MemoryFacts
from phloem.engine.choices.shares import Load, shares
from phloem.engine.forward import run_forward
from phloem.engine.inputs import Step, no_shared_pages
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.engine.ranks.rehearsal import Rehearsed
from phloem.engine.sampling.logprobs import position_logprobs
from phloem.engine.sampling.sampler import SamplingRows, sample
from phloem.engine.transfer import LastTokens
from phloem.engine.wanted import Wanted
from phloem.kvcache.pool import KVPool, fewest_pages
from phloem.models._common import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from phloem.attention import AttentionBackend
    from phloem.core.config import CacheConfig
    from phloem.engine.drafts.drafting import Loaded
    from phloem.engine.towers.media import Pictures
    from phloem.kernels.ops import Ops
    from phloem.layers.context import AttentionSpec
    from phloem.models import Model
    from phloem.models._scales import LayerScales
    from phloem.platforms import Platform


@dataclass(frozen=True)
class Need:
    """What decides how much memory steps take."""

    model: Model | Rehearsed  # the latter: all ranks run what is run
    backend: AttentionBackend
    ops: Ops
    kv_dtype: torch.dtype
    page_size: int
    context: int
    running: int  # rows
    chunk: int  # tokens of a step
    graphs: bool  # whether steps may be recorded
    kv_scales: Mapping[int, LayerScales] = field(default_factory=dict)
    stages: tuple[frozenset[int], ...] = ()  # of a pipeline: the memory of each one's layers, by pool index
    adapts: bool = False  # rows may have adapters
    helper: Loaded | None = None  # what drafts for the model
    attends: Callable[[Sequence[AttentionSpec]], AttentionBackend] | None = None  # makes the backend of its layers

    @property
    def leads(self) -> bool:
        """Whether tokens are chosen here."""
        return not isinstance(self.model, Rehearsed) or self.model.leads


@dataclass(frozen=True)
class Sizing:
    """`tokens` of the first group; `num_pages` of each group, with its scratch page, for the pool.

    `graph_bytes` is what step graphs may take; None: no bound.
    """

    tokens: int
    num_pages: tuple[int, ...]
    facts: MemoryFacts
    graph_bytes: int | None
    decisions: tuple[Decision, ...]


def size_pool(
    cache: CacheConfig,
    platform: Platform,
    need: Need,
    weights: int,
    ranks: int = 1,
    elsewhere: Callable[[], tuple[int, int] | None] = lambda: None,
) -> Sizing:
    """Measure, and divide the memory. `weights`: their bytes on the device, loaded already. `ranks`: all
    processes that take of the same memory. `elsewhere`: asked then, the least (free, all) bytes of other machines with
    ranks, or of other ranks' devices beside what the largest step takes there.

    Raises:
        ConfigError: if the largest step, or one request of the context length, does not fit.
    """
    step = f"steps of {need.chunk} tokens, {min(need.running, need.chunk)} rows"
    try:
        measured = platform.measure(lambda: run_largest_steps(need, platform.device))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = first_line(error)
        free, total = platform.memory()
        raise ConfigError(
            f"{step} do not fit beside {weights / GIB:.2f} GiB of weights ({free / GIB:.2f} of {total / GIB:.2f} GiB "
            f"are free; {why}): lower chunked_prefill_size or max_running_requests",
            param="chunked_prefill_size",
        ) from None
    least, others = platform.memory(), elsewhere()
    if others is not None:
        least = min(least[0], others[0] + (measured or 0)), min(least[1], others[1])
    free, total = (amount // ranks for amount in least)
    facts = MemoryFacts(
        free, total, weights=weights, bytes_per_token=1, default_fraction=platform.default_memory_fraction
    )
    graph_bytes: int | None = None
    if measured is not None:
        graph_bytes = resolve.graph_budget(facts.total) if need.graphs else 0
        reserve = platform.reserve()
        facts = replace(facts, activations=measured, graphs=graph_bytes, reserve=reserve, largest_step=step)
    return _divide(cache, need, facts, graph_bytes)


def _divide(cache: CacheConfig, need: Need, facts: MemoryFacts, graph_bytes: int | None) -> Sizing:
    """The memory that is left, among the groups."""
    memory = need.model.memory
    load = Load(need.running, need.chunk, need.context)
    best: Sizing | None = None
    refused: ConfigError | None = None
    for share in shares(memory, groups_of(memory), need.kv_dtype, need.page_size, load, need.stages):
        own = replace(facts, bytes_per_token=share.bytes_per_token, fixed=share.fixed_bytes)
        try:
            pool = resolve.pool_tokens(cache, own, need.page_size, need.context, need.running)
        except ConfigError as error:
            refused = error
            continue
        if best is None or pool.value > best.tokens:
            decisions = (pool, resolve.memory_parts(own, pool.value), *share.decisions(pool.value))
            best = Sizing(pool.value, share.num_pages(pool.value), own, graph_bytes, decisions)
    if best is None:
        assert refused is not None
        raise refused
    return best


def step_shapes(chunk: int, running: int, context: int) -> list[list[int]]:
    """Query lengths of the steps that are run: the tokens spread over all rows, and in one row."""
    rows = min(running, chunk)
    spread = [min(context, chunk // rows + (row < chunk % rows)) for row in range(rows)]
    return [spread, [min(chunk, context)]]


def run_largest_steps(need: Need, device: torch.device) -> None:
    """Run them, with a pool of two pages in each group that is gone afterwards."""
    with torch.inference_mode():
        memory = need.model.memory
        pages = fewest_pages(memory, need.page_size)
        pool = KVPool(memory, pages, need.page_size, need.kv_dtype, device, need.kv_scales)
        for lengths in step_shapes(need.chunk, need.running, need.context):
            _run(need, pool, lengths)


def run_step(
    need: Need,
    pool: KVPool,
    lengths: list[int],
    *,
    shared: bool = False,
    prefix: int = 0,
    adapted: bool = False,
    pictures: Pictures | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step on dummy inputs, every row on page 0: (hidden states, logits) of the rows' last tokens.

    `shared`: by the kernels of rows that share pages, though none do. `prefix`: tokens of each row before the step.
    `adapted`: every row has the first adapter. `pictures`: tokens of them in the first row, all of whose tokens then
    have places in time, height and width, if any of the model's have.
    """
    rows, model = len(lengths), need.model
    query_lens = np.array(lengths, np.int32)
    width = -(-(prefix + max(lengths)) // need.page_size)
    batch = Batch(
        step=0,
        slots=np.arange(rows, dtype=np.int32) if isinstance(model, Rehearsed) else np.zeros(rows, np.int32),
        query_lens=query_lens,
        prefix_lens=np.full(rows, prefix, np.int32),
        input_ids=np.zeros(int(query_lens.sum()), np.int32),
        tables=tuple(
            np.zeros((rows, width if group.kind == "pages" else 2), np.int32)
            for group in pool.groups
            if group.kind != "cross"
        ),
        outputs=np.ones(rows, np.int32),
        adapters=np.ones(rows, np.int32) if adapted else None,
    )
    tower = model.tower if pictures is not None and isinstance(model, Decoder) else None
    if tower is not None and tower.turns:
        batch = replace(batch, positions=np.zeros((3, batch.num_tokens), np.int64))
    last = LastTokens(1, pool.device, False, None)
    inputs = Step(batch, Wanted.of(batch), pool, last, pictures=pictures).inputs
    if shared:
        inputs.shared = no_shared_pages(pool, batch.num_tokens, rows)
    if isinstance(model, Rehearsed):
        hidden_RN = model.run(need.backend, pool, batch, inputs, last)
    else:
        hidden_RN = run_forward(model, need.backend, pool, inputs, inputs.logit_index)
    return hidden_RN, model.head(hidden_RN)


def dummy_settings(rows: int, vocab: int) -> SamplingRows:
    """Sampling with every filter."""
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01)
    return SamplingRows.of([params] * rows, [0] * rows, [0] * rows, vocab)


def _run(need: Need, pool: KVPool, lengths: list[int]) -> None:
    rows = len(lengths)
    _, logits_RV = run_step(need, pool, lengths)
    if not need.leads:
        return
    raw_RV = logits_RV.clone()  # what a step keeps beside penalised logits where logprobs are wanted
    tokens_R = sample(logits_RV, dummy_settings(rows, need.model.vocab_size), need.ops)
    position_logprobs(raw_RV[:1], tokens_R[:1], 1, (), need.ops)
