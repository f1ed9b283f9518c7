"""The smallest engine there is, and transformers' answer to compare it with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pools import pool_for

from phloem.attention import AttentionNeed, StateRows, begin, choose
from phloem.checkpoint.describe import describe
from phloem.core.memory import Group
from phloem.distributed.comm import Comm
from phloem.distributed.mesh import Mesh
from phloem.kernels.ops import Ops, PagedBatch
from phloem.layers.aside import Aside
from phloem.layers.context import BuildContext, ForwardBatch
from phloem.layers.rows import Rows
from phloem.layers.spread import Spread
from phloem.models import load_model

CPU = torch.device("cpu")
ALONE = Mesh()
PAGE = 4
LIMIT = 1e-4
PROMPT = [5, 17, 200, 301, 44, 9, 9, 80, 123, 7, 260, 31, 64, 99, 2, 18, 350, 12, 77, 140, 201, 33, 8]


class Engine:
    """The smallest runner there is: steps over rows of (tokens, pages, how many are computed)."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        ops: Ops | None = None,
        kv_dtype: torch.dtype | None = None,
        mesh: Mesh = ALONE,
        comm: Comm | None = None,
        aside: Aside | None = None,
        spread: Spread | None = None,
        rows: Rows | None = None,
        **options: Any,
    ) -> None:
        self.ops = ops or Ops()
        self.checkpoint = describe(str(path), **options)
        ctx = BuildContext(self.ops, dtype, CPU, mesh=mesh, comm=comm, aside=aside, spread=spread, rows=rows)
        self.model = load_model(self.checkpoint, ctx)
        kept = kv_dtype or dtype
        self.pool = pool_for(self.model.memory, 256, PAGE, kept, CPU)
        need = AttentionNeed(self.model.attention_specs, kept, CPU)
        self.attention = choose(["cpu", "reference"], need, self.ops).backend
        self.free = list(range(1, 256))
        self.states: dict[tuple[int, int], int] = {}  # by a text's first page and its length; 0 is scratch

    def pages(self, tokens: int) -> list[int]:
        """In falling order and with holes, so that nobody can mistake a page number for a position."""
        return [self.free.pop(-1 - (number % 2)) for number in range(-(-tokens // PAGE))]

    def step(
        self, rows: list[tuple[list[int], list[int], int]], every: bool = False, none: bool = False
    ) -> torch.Tensor:
        """rows: (new tokens, pages, prefix length) -> logits of each row's last token, or of every token. `none`: no
        logits, but the hidden states of no row."""
        ids, positions, slots, starts = [], [], [], [0]
        for tokens, pages, prefix in rows:
            span = range(prefix, prefix + len(tokens))
            ids += tokens
            positions += span
            slots += [pages[p // PAGE] * PAGE + p % PAGE for p in span]
            starts.append(len(ids))
        lengths = [prefix + len(tokens) for tokens, _, prefix in rows]
        batches = [
            PagedBatch(
                query_start=torch.tensor(starts, dtype=torch.int32),
                seq_lens=torch.tensor(lengths, dtype=torch.int32),
                page_table=self.table(rows, group),
                token_slots=torch.tensor(slots, dtype=torch.int32),
                max_query_len=max(len(tokens) for tokens, _, _ in rows),
                max_seq_len=max(lengths),
            )
            if group.kind == "pages"
            else self.state_rows(rows, starts)
            for group in self.pool.groups
        ]
        index = None if every else torch.tensor([] if none else starts[1:], dtype=torch.int64) - 1
        step = ForwardBatch(
            torch.tensor(ids), torch.tensor(positions), begin(self.attention, batches, self.pool), index
        )
        with torch.inference_mode():
            hidden = self.model.forward(step)
            return hidden if none else self.model.head(hidden)

    def state_rows(self, rows: list[tuple[list[int], list[int], int]], starts: list[int]) -> StateRows:
        """States stay as they are, one for each length that a text has had."""
        begins = [(pages[0], prefix) for _, pages, prefix in rows]
        ends = [(pages[0], prefix + len(tokens)) for tokens, pages, prefix in rows]
        reads = [self.states[begin] if begin[1] else 0 for begin in begins]
        for end in ends:
            self.states.setdefault(end, len(self.states) + 1)
        prefixes = [prefix for _, _, prefix in rows]
        return StateRows(
            reads=torch.tensor(reads),
            writes=torch.tensor([self.states[end] for end in ends]),
            fresh=torch.tensor([prefix == 0 for prefix in prefixes]),
            query_start=torch.tensor(starts, dtype=torch.int32),
            prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
            max_query_len=max(len(tokens) for tokens, _, _ in rows),
        )

    def table(self, rows: list[tuple[list[int], list[int], int]], group: Group) -> torch.Tensor:
        """A group's page table: pages that lie wholly behind its window have been given back."""
        table = torch.zeros(len(rows), max(len(pages) for _, pages, _ in rows), dtype=torch.int32)
        for row, (_, pages, prefix) in enumerate(rows):
            first = group.first_needed(prefix) // PAGE
            table[row, first : len(pages)] = torch.tensor(pages[first:], dtype=torch.int32)
        return table

    def whole(self, tokens: list[int]) -> torch.Tensor:
        return self.step([(tokens, self.pages(len(tokens)), 0)], every=True)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        pages = self.pages(len(prompt) + count)
        out = [int(self.step([(prompt, pages, 0)]).argmax())]
        while len(out) < count:
            out.append(int(self.step([(out[-1:], pages, len(prompt) + len(out) - 1)]).argmax()))
        return out


def edited(path: Path, target: Path, tensors: Any = None, **config: Any) -> Path:
    """A copy of a checkpoint with other tensors, or other keys in its config.json."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    stored = load_file(path / "model.safetensors")
    save_file(tensors(stored) if tensors else stored, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **config}))
    return target


def reference(path: Path, tokens: list[int]) -> torch.Tensor:
    return their_logits(path)(tokens)


def their_greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """What transformers writes, with full passes alone: no cache that could be wrong the same way."""
    logits, tokens = their_logits(path), list(prompt)
    for _ in range(count):
        tokens.append(int(logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def their_logits(path: Path) -> Callable[[list[int]], torch.Tensor]:
    """Logits of all tokens of a text by transformers' own class."""
    import transformers

    config = json.loads((path / "config.json").read_text())
    sees = "text_config" in config
    loader = transformers.AutoModelForMultimodalLM if sees else transformers.AutoModelForCausalLM
    if config["model_type"] == "mistral4":  # which AutoModelForCausalLM does not know
        loader = transformers.Mistral4ForCausalLM
    # Its Gemma 3 has this setting and forgets to hand it to its own attention function, which understands it.
    cap = config.get("attn_logit_softcapping") if config["model_type"].startswith("gemma3") else None
    model = loader.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    options = {"softcap": cap} if cap else {}

    @torch.inference_mode()
    def logits(tokens: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([tokens]), use_cache=False, **options).logits[0]

    return logits


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert theirs.abs().max() > 0.1  # a comparison of zeros would prove nothing
    assert (ours - theirs).abs().max().item() <= LIMIT


def check_modes(path: Path, theirs: torch.Tensor, kind: type[Engine] = Engine, **options: Any) -> None:
    """Whole prompt, prefill in chunks, decode, a prefix hit and a mixed batch, all against the same reference."""
    engine = kind(path, **options)
    count = len(PROMPT)
    close(engine.whole(PROMPT), theirs)

    pages = engine.pages(count)
    chunks = [
        engine.step([(PROMPT[a:b], pages, a)], every=True) for a, b in ((0, 3), (3, 8), (8, 9), (9, 17), (17, 20))
    ]
    close(torch.cat(chunks), theirs[:20])
    decoded = [engine.step([(PROMPT[at : at + 1], pages, at)]) for at in range(20, count)]
    close(torch.cat(decoded), theirs[20:])

    # A second request over the first two pages of the first one, beside rows that decode and prefill.
    shared = pages[:2] + engine.pages(count - 2 * PAGE)
    close(engine.step([(PROMPT[2 * PAGE :], shared, 2 * PAGE)], every=True), theirs[2 * PAGE :])
    fresh = engine.pages(11)
    mixed = engine.step(
        [(PROMPT[-1:], shared, count - 1), (PROMPT[:11], fresh, 0), (PROMPT[9:15], pages, 9), (PROMPT[3:4], pages, 3)]
    )
    close(mixed, theirs[[count - 1, 10, 14, 3]])
