"""Whisper against transformers in float32: the encoder, the decoder through our pages, several audios at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_support import CPU, PROMPT, close

from phloem.attention import BACKENDS, begin
from phloem.checkpoint.describe import describe
from phloem.core.batch import Admission
from phloem.core.memory import Cross, groups_of
from phloem.core.request import Align, SamplingParams
from phloem.engine.inputs import cross_arrays
from phloem.engine.towers.hearing import Ears
from phloem.kernels.ops import Ops, PagedBatch
from phloem.kvcache.pool import KVPool, fewest_pages
from phloem.layers.context import BuildContext, ForwardBatch
from phloem.models import load_model
from phloem.multimodal._speech import TICK
from phloem.protocol.audio.words import begins
from phloem.testing.checkpoints import tiny_checkpoint

PAGE, SLOTS = 4, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """(checkpoint, features of three audios, transformers' logits of the prompt with each of them)."""
    from transformers import WhisperForConditionalGeneration

    path = tiny_checkpoint("whisper", tmp_path_factory.mktemp("tiny"))
    mel = torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(3))
    model: Any = WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.tensor([PROMPT] * 3)
        return path, mel, model(input_features=mel, decoder_input_ids=ids, use_cache=False).logits


class Small:
    """The smallest runner of a model that hears."""

    def __init__(self, path: Path, ops: Ops | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.ops = ops or Ops()
        self.model: Any = load_model(describe(str(path)), BuildContext(self.ops, torch.float32, CPU))
        groups = groups_of(self.model.memory)
        pages = [1 + SLOTS * g.pages_each(PAGE) if g.kind == "cross" else 256 for g in groups]
        self.pool = KVPool(self.model.memory, pages, PAGE, dtype, CPU)
        self.backend = BACKENDS.module("cpu").Backend(self.ops, self.model.attention_specs, CPU, dtype)
        self.ears = Ears(self.model, self.pool, self.backend.ops, SLOTS)

    def hear(self, *slots: tuple[int, torch.Tensor]) -> None:
        self.ears.admit([admission(slot, mel) for slot, mel in slots])

    def step(self, rows: list[tuple[int, list[int], list[int], int]]) -> torch.Tensor:
        """rows: (slot, new tokens, pages, prefix length) -> logits of every token."""
        ids, positions, places, starts, slots = [], [], [], [0], []
        for slot, tokens, pages, prefix in rows:
            span = range(prefix, prefix + len(tokens))
            ids += tokens
            positions += span
            slots += [slot] * len(tokens)
            places += [pages[p // PAGE] * PAGE + p % PAGE for p in span]
            starts.append(len(ids))
        lengths = [prefix + len(tokens) for _, tokens, _, prefix in rows]
        table = torch.zeros(len(rows), max(len(pages) for _, _, pages, _ in rows), dtype=torch.int32)
        for row, (_, _, pages, _) in enumerate(rows):
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        whole, cross = self.pool.groups
        longest = max(len(tokens) for _, tokens, _, _ in rows)
        each, seen, crossed = map(
            torch.from_numpy, cross_arrays(torch.tensor(slots, dtype=torch.int32).numpy(), cross, PAGE)
        )
        assert whole.kind == "pages" and cross.kind == "cross"
        short = torch.int32
        batches = [
            PagedBatch(
                torch.tensor(starts, dtype=short), torch.tensor(lengths, dtype=short), table,
                torch.tensor(places, dtype=short), longest, max(lengths),
            ),
            PagedBatch(each, seen, crossed, seen, 1, cross.tokens),
        ]  # fmt: skip
        memory = begin(self.backend, batches, self.pool)
        with torch.inference_mode():
            step = ForwardBatch(torch.tensor(ids), torch.tensor(positions), memory, None)
            return self.model.head(self.model.forward(step))


def admission(slot: int, mel: torch.Tensor) -> Admission:
    data = mel.contiguous().numpy().tobytes()
    empty: Any = torch.zeros(0, dtype=torch.int32).numpy()
    return Admission(slot, f"r{slot}", SamplingParams(), 0, empty, 0, audio=data)


def test_logits_of_whole_prompts_chunks_and_decodes(made: Any) -> None:
    path, mel, theirs = made
    small = Small(path)
    assert sum(isinstance(spec, Cross) for spec in small.model.memory) == 3
    small.hear((0, mel[0]), (2, mel[1]), (3, mel[2]))
    pages = [list(range(1 + 20 * row, 21 + 20 * row)) for row in range(3)]
    whole = small.step([(0, PROMPT, pages[0], 0)])
    close(whole, theirs[0])
    # Others in the same step, with audio of their own; in chunks, then token by token.
    mixed = small.step([(2, PROMPT[:9], pages[1], 0), (3, PROMPT[:17], pages[2], 0), (0, PROMPT[-1:], pages[0], 22)])
    close(mixed, torch.cat([theirs[1, :9], theirs[2, :17], theirs[0, 22:]]))
    for at in range(17, 20):
        both = small.step([(2, PROMPT[at - 8 : at - 7], pages[1], at - 8), (3, PROMPT[at : at + 1], pages[2], at)])
        close(both, torch.stack([theirs[1, at - 8], theirs[2, at]]))
    close(small.step([(2, PROMPT[12:], pages[1], 12)]), theirs[1, 12:])


def test_audio_that_lies_in_a_slot_is_not_encoded_again(made: Any) -> None:
    path, mel, theirs = made
    small = Small(path)
    small.hear((1, mel[0]), (2, mel[1]))
    assert small.ears.encoded == 2
    small.hear((1, mel[0]))  # as after a preemption
    small.hear((0, mel[1]), (3, mel[1]))  # from another slot
    assert (small.ears.encoded, small.ears.found) == (2, 3)
    close(small.step([(3, PROMPT, list(range(1, 20)), 0)]), theirs[1])
    small.hear((2, mel[0]), (1, mel[1]))  # each in the place of the other
    both = small.step([(2, PROMPT, list(range(1, 20)), 0), (1, PROMPT, list(range(20, 40)), 0)])
    close(both, theirs[:2].flatten(0, 1))


def native_table() -> Ops:
    from phloem.kernels import native

    try:
        return native.table(1)
    except native.Unavailable as reason:
        pytest.skip(str(reason))


def test_the_native_table_is_near(made: Any) -> None:
    ops = native_table()
    path, mel, theirs = made
    small = Small(path, ops, torch.bfloat16)
    small.hear((3, mel[2]))
    found = small.step([(3, PROMPT, list(range(1, 20)), 0)])
    assert (found - theirs[2]).abs().max() < 0.05 * theirs[2].abs().max()


def test_a_weight_that_is_pushed_is_heard(made: Any) -> None:
    path, mel, theirs = made
    small = Small(path)
    names = small.model.weight_names()
    assert "model.encoder.conv1.weight" in names
    assert not any(name.endswith("k_proj.bias") for name in names)
    old = small.model.get_weight("model.encoder.conv1.weight")
    small.model.update_weights([("model.encoder.conv1.weight", old * 2)])
    small.hear((0, mel[0]))
    assert (small.step([(0, PROMPT, list(range(1, 20)), 0)]) - theirs[0]).abs().max() > 0.01
    small.model.update_weights([("model.encoder.conv1.weight", old)])
    small.hear((0, mel[1]))
    close(small.step([(0, PROMPT, list(range(1, 20)), 0)]), theirs[1])


@pytest.mark.parametrize(("frames", "dtype"), [(100, torch.float32), (61, torch.float32), (100, torch.int8)])
def test_tokens_have_the_times_that_transformers_gives_them(made: Any, frames: int, dtype: torch.dtype) -> None:
    from transformers import WhisperForConditionalGeneration
    from transformers.modeling_outputs import Seq2SeqLMOutput

    path, mel, _ = made
    heads, start, tokens = [(1, 0), (1, 3), (2, 2), (2, 1)], 4, PROMPT * 2
    theirs: Any = WhisperForConditionalGeneration.from_pretrained(path, attn_implementation="eager").eval()
    small = Small(path, native_table() if dtype == torch.int8 else None, dtype)
    for number in range(3):
        with torch.inference_mode():
            ids = torch.tensor([tokens])
            given: Any = {"input_features": mel[number, None], "decoder_input_ids": ids[:, :-1], "use_cache": False}
            out = theirs(**given, output_attentions=True)
        told: Any = Seq2SeqLMOutput(cross_attentions=(out.cross_attentions,))  # pyright: ignore[reportArgumentType]
        told["sequences"] = ids
        times = theirs._extract_token_timestamps(told, heads, num_frames=frames, num_input_ids=start)[0]
        asked = replace(admission(number, mel[number]), align=Align(start, frames // 2, heads))
        asked.tokens = np.array(tokens, np.int32)
        small.ears.admit([asked])
        found = begins(-small.ears.aligned[number]) * TICK
        assert found.shape == (len(tokens) - 1 - start,) and len(set(found.tolist())) > 3
        assert np.abs(found - times[start:-1].numpy()).max() <= 0.02 + 1e-6
    small.hear((2, mel[0]))
    assert list(small.ears.aligned) == [0, 1]  # who enters the slot has not asked


def test_a_pool_for_dummy_steps_has_the_pages_of_one_slot(made: Any) -> None:
    path, _, _ = made
    memory = Small(path).model.memory
    assert fewest_pages(memory, 16) == [2, 1 + 4]
