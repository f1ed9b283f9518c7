"""Accept lengths that follow from how model and head were made: a model that walks in a circle, and a head whose layer
does what the model does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_support import write_head
from safetensors.torch import load_file, save_file
from torch import Tensor

import phloem
from phloem.testing.checkpoints import tiny_checkpoint

SIZE, HEADS, WIDE = 32, 4, 16  # two of the heads' keys and values
FIRST = 10  # the circle's first token
DRAFTS, CIRCLES = 4, 3


def embeddings() -> Tensor:
    """[V, N]: rows of mean square 1, their last number the same, otherwise as far from one another as chance has it."""
    found = torch.randn(384, SIZE, generator=torch.Generator().manual_seed(3))
    found = found / found[:, :-1].norm(dim=1, keepdim=True) * math.sqrt(SIZE - 1)
    found[:, -1] = 1.0
    return found


def walk(length: int) -> Tensor:
    """[V, N]: the head of a model that says, behind each token of the circle, the next one."""
    table, found = embeddings(), torch.zeros(384, SIZE)
    for place in range(length):
        found[FIRST + (place + 1) % length] = table[FIRST + place]
    return found


def model(folder: Path, length: int) -> Path:
    """One whose layers add nothing, so that what it says follows from the last token alone."""
    path = tiny_checkpoint("llama", folder, num_hidden_layers=6)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif name.endswith("norm.weight"):
            tensor.fill_(1.0)
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embeddings(), walk(length)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def head(folder: Path, length: int, missing: bool) -> Path:
    """Its attention sees the position itself alone and hands on the token there, in place of whatever the head carried:
    so it says what the model says. `missing`: all but the circle's first token."""
    loud = torch.zeros(HEADS * WIDE, 2 * SIZE)
    loud[:, SIZE - 1] = 20.0  # the number that all tokens share: scores then follow from the distance, by the rotation
    value = torch.cat([torch.eye(SIZE), -torch.eye(SIZE)], 1)  # the token's, without what the layer adds itself to
    out = torch.zeros(SIZE, HEADS * WIDE)
    for half, of_head in ((0, 0), (1, 2)):
        out[half * WIDE :, of_head * WIDE :][:WIDE, :WIDE] = torch.eye(WIDE)
    ids = torch.arange(FIRST + missing, FIRST + length)
    ones = {name: torch.ones(SIZE) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    tensors = {
        "fc.weight": torch.zeros(SIZE, 3 * SIZE),
        "midlayer.self_attn.q_proj.weight": loud,
        "midlayer.self_attn.k_proj.weight": loud[:SIZE].clone(),
        "midlayer.self_attn.v_proj.weight": value,
        "midlayer.self_attn.o_proj.weight": out,
        "midlayer.mlp.gate_proj.weight": torch.zeros(48, SIZE),
        "midlayer.mlp.up_proj.weight": torch.zeros(48, SIZE),
        "midlayer.mlp.down_proj.weight": torch.zeros(SIZE, 48),
        **{f"midlayer.{name}.weight": one for name, one in ones.items()},
        "norm.weight": torch.ones(SIZE),
        "lm_head.weight": walk(length)[ids],
        "d2t": ids - torch.arange(len(ids)),
        "t2d": torch.zeros(384, dtype=torch.bool).index_fill_(0, ids, True),
    }
    return write_head(folder, tensors, architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=len(ids))


@pytest.mark.slow
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("length", [4, 6, 8, 11])
def test_a_head_that_does_what_the_model_does_is_refused_where_it_has_no_word(
    length: int, missing: bool, tmp_path: Path
) -> None:
    """With all words every step gives its drafts and one token. Without one of a circle's L, a step ends at that word
    at the latest, so the circle takes ceil(L / (drafts + 1)) steps."""
    settings: dict[str, Any] = {
        "ops": "reference",
        "dtype": "float32",
        "max_total_tokens": 400,
        "max_running_requests": 1,
        "disable_speculative_adaptive": True,
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": str(head(tmp_path / "head", length, missing)),
        "speculative_num_steps": DRAFTS,
    }
    count = CIRCLES * (DRAFTS + 1) * length
    with phloem.Engine(model_path=str(model(tmp_path / "model", length)), **settings) as engine:
        prompt = [40, 50, FIRST + length - 1]  # so that the answer's first token is the circle's
        params = {"max_new_tokens": 1 + count, "temperature": 0.0, "ignore_eos": True}
        answer: Any = engine.generate(input_ids=prompt, sampling_params=params)
    assert answer["output_ids"] == [FIRST + place % length for place in range(1 + count)]
    each = math.ceil(length / (DRAFTS + 1)) / length if missing else 1 / (DRAFTS + 1)  # steps a token
    meta = answer["meta_info"]
    assert meta["spec_verify_ct"] == 1 + round(count * each)  # the prompt's own step gives one token
    assert meta["spec_num_correct_drafts"] == count - round(count * each)
