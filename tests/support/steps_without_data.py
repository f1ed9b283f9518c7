"""Models without data, and steps of random shapes of them: which kernels do they launch that nobody foretold?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from phloem.attention import sharing_of
from phloem.attention import triton as triton_backend
from phloem.attention._store import unserved
from phloem.checkpoint.describe import Checkpoint, describe, described
from phloem.checkpoint.families import family
from phloem.core.batch import Batch
from phloem.core.config import Config
from phloem.engine.choices.sizing import Need, dummy_settings
from phloem.engine.drafts.beside import part_of
from phloem.engine.forward import run_forward
from phloem.engine.inputs import Step, no_shared_pages
from phloem.engine.ranks.rehearsal import Rehearsed
from phloem.engine.sampling.logprobs import logprob_tensors
from phloem.engine.sampling.sampler import sample
from phloem.engine.transfer import LastTokens
from phloem.engine.wanted import Wanted
from phloem.engine.warmup import ahead, foretold
from phloem.kernels.ops import Ops
from phloem.kernels.triton import ahead as kernels
from phloem.kernels.triton import table
from phloem.kvcache.pool import KVPool
from phloem.layers.context import BuildContext
from phloem.models import build_model
from phloem.testing import checkpoints

LONGEST = 4096


def tiny_config(name: str, folder: Path) -> Checkpoint:
    """A tiny checkpoint of a family without its values: the settings alone, as transformers writes them."""
    import transformers

    tiny = family(name).tiny
    assert tiny is not None
    settings = {**checkpoints._SIZES, **tiny, "around": None}
    settings = {key: value for key, value in settings.items() if value is not None}
    known = name if name in transformers.CONFIG_MAPPING else name.replace("_", "-")
    if tiny.get("around") is None:
        config = transformers.AutoConfig.for_model(known, **settings)
    else:
        config = transformers.AutoConfig.for_model(name, text_config=settings, **tiny["around"])
    config.save_pretrained(folder)
    return describe(str(folder / "config.json"), "dummy")


def plan_of(found: Checkpoint, **changes: Any) -> ahead.Plan:
    """What an engine on a Hopper GPU would be told, of few rows and short chunks."""
    model: Any = build_model(
        found.model_type, found.config, BuildContext(Ops(), torch.bfloat16, torch.device("meta")), LONGEST
    )
    settings: dict[str, Any] = {
        "context": LONGEST, "vocab": found.vocab_size, "ops": "triton", "dtype": "bfloat16", "kv_dtype": "bfloat16",
        "page": None, "running": 24, "chunk": 256, "target": ("cuda", 90, 32), "processors": 132, "cache": "none",
        "processes": 2, "backend": "reference" if unserved(model.attention_specs) else "triton",
    }  # fmt: skip
    return ahead.Plan(model_type=found.model_type, config=found.config, **settings | changes)


def small_plan(**changes: Any) -> ahead.Plan:
    """Of a Llama of two layers whose sizes are multiples of 16."""
    config: dict[str, Any] = {
        "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": LONGEST,
        "hidden_act": "silu", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    settings: dict[str, Any] = {
        "context": LONGEST, "vocab": 384, "ops": "triton", "dtype": "bfloat16", "kv_dtype": "bfloat16", "page": None,
        "running": 24, "chunk": 256, "target": ("cuda", 90, 32), "processors": 132, "cache": "none", "processes": 2,
    }  # fmt: skip
    config |= changes.pop("config", {})
    return ahead.Plan(model_type=str(config["model_type"]), config=config, **settings | changes)


def unforetold(plan: ahead.Plan, drafts: ahead.Drafts | None = None, steps: int = 30) -> list[str]:
    """The kernels that random steps launch, and the process beside the loading would not have compiled."""
    notes, _ = ahead.trace(plan, drafts)
    more = kernels.Notes()
    more.found |= notes.found
    with torch.inference_mode(), kernels.Notes().taken():
        need = ahead.need_of(plan, drafts=drafts)
        pool = ahead.pool_of(need)
    random = np.random.default_rng(0)
    with torch.inference_mode(), more.taken():
        for number in range(steps):
            random_step(need, pool, plan, random, number)
    return [note.name for key, note in more.found.items() if key not in notes.found]


def random_step(need: Need, pool: KVPool, plan: ahead.Plan, random: np.random.Generator, number: int) -> None:
    """Decode, verification of up to 7 drafts a row, mixed, one prompt, and drafts of one token, in turns; every second
    one anywhere in the context, every third with shared pages, adapters and a pass of what drafts."""
    rows = int(random.integers(1, plan.running + 1))
    kind = number % 5
    lens = {
        0: np.ones(rows),
        1: random.integers(1, 9, rows),
        2: random.integers(1, max(2, plan.chunk // rows), rows),
        3: random.integers(1, plan.chunk, 1),
        4: random.integers(1, 3, rows),
    }[kind].astype(np.int32)
    outputs = lens if kind in (1, 4) else np.where(random.random(len(lens)) < 0.7, 1, 0).astype(np.int32)
    outputs[0] = max(1, outputs[0])
    most = plan.context - int(lens.max())
    prefixes = random.integers(0, most, len(lens)) if number % 2 else np.zeros(len(lens))
    wide = plan.context // need.page_size + 1 if number % 4 == 1 else 0
    special = number % 3 == 0
    sizes = lens, prefixes.astype(np.int32), outputs, wide
    shares = sharing_of(need.backend)[0] is not None and not isinstance(need.model, Rehearsed)
    hidden, logits = _step(need, pool, *sizes, shared=special and shares)
    if special and need.adapts:
        _step(need, pool, *sizes, adapted=True)
    if need.leads:
        _choose(need, hidden, logits)
    else:
        need.model.greedy(hidden)
    if need.helper is not None and need.attends is not None:
        model: Any = need.helper.model
        part = part_of(pool, need.helper.first, len(model.memory))
        own = replace(need, model=model, backend=need.attends(model.attention_specs), adapts=False, helper=None)
        hidden, logits = _step(own, part, *sizes)
        model.greedy(hidden)
        sample(logits, dummy_settings(len(logits), plan.vocab), need.ops)


def _step(
    need: Need, pool: KVPool, lens: Any, prefixes: Any, outputs: Any, wide: int, *, shared: bool = False,
    adapted: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rows, width = len(lens), max(wide, int(-(-(lens + prefixes).max() // need.page_size)))
    batch = Batch(
        step=0, slots=np.arange(rows, dtype=np.int32), query_lens=lens, prefix_lens=prefixes,
        input_ids=np.zeros(int(lens.sum()), np.int32),
        tables=tuple(
            np.zeros((rows, width if group.kind == "pages" else 2), np.int32)
            for group in pool.groups if group.kind != "cross"
        ),
        outputs=outputs, adapters=np.ones(rows, np.int32) if adapted else None,
    )  # fmt: skip
    last = LastTokens(1, pool.device, False, None)
    inputs = Step(batch, Wanted.of(batch), pool, last).inputs
    if shared:
        inputs.shared = no_shared_pages(pool, batch.num_tokens, rows)
    if isinstance(need.model, Rehearsed):
        hidden = need.model.run(need.backend, pool, batch, inputs, last)
    else:
        hidden = run_forward(need.model, need.backend, pool, inputs, inputs.logit_index)
    return hidden, need.model.head(hidden)


def _choose(need: Need, hidden: torch.Tensor, logits: torch.Tensor) -> None:
    """Greedy, drawn, with log probabilities of all and of some positions, and with grammars for some."""
    count, vocab = len(logits), need.model.vocab_size
    need.model.greedy(hidden)
    sample(logits, dummy_settings(count, vocab), need.ops)
    some = torch.zeros(max(1, count // 2), dtype=torch.int64, device=logits.device)
    for chosen in (logits, logits[some]):
        tokens = torch.zeros(len(chosen), dtype=torch.int64, device=logits.device)
        logprob_tensors(chosen, tokens, 5, None, need.ops)
    mask = torch.full((len(some), -(-vocab // 32)), -1, dtype=torch.int32, device=logits.device)
    need.ops.mask_tokens_(logits, some.int(), mask)


class Pretended:
    """A platform as a Hopper GPU's, as far as the plan asks."""

    device = torch.device("cuda")
    quantised_kv_dtype = None

    def attention_backends(self) -> list[str]:
        return ["triton", "flashinfer", "flash", "reference"]


def told(
    path: Path, monkeypatch: pytest.MonkeyPatch, ops: str = "triton", **settings: Any
) -> tuple[ahead.Plan, str | None]:
    """What an engine of these settings tells the process, as the process reads it."""
    monkeypatch.setattr(triton_backend, "processors", lambda device: 132)
    config = Config.from_flat({"model_path": str(path), **settings})
    found = described(config.model)
    platform: Any = Pretended()
    own = table.table() if ops == "triton" else table.invariant_table()
    plan, refusal = foretold.plan_of(config, found, platform, own, torch.bfloat16, (8, 128), "")
    whole = plan | {"target": ("cuda", 90, 32), "processors": 132, "cache": "none"}
    return msgspec.json.decode(json.dumps(whole).encode(), type=ahead.Plan), refusal
