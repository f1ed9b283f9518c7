"""A rank's share of a model against one that is cut by hand, and what the ranks compute against the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import CPU, Engine

from phloem.checkpoint.describe import describe
from phloem.distributed.mesh import Axis, Mesh
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.quant import Method
from phloem.quant._source import Source, indexed

ROWS = ("embed_tokens", "lm_head", "q_proj", "qkv_proj", "gate_proj", "up_proj", ".w1.", ".w3.", "sinks")
COLS = ("o_proj.weight", "down_proj.weight", "experts.down_proj", ".w2.")
MODELS = ["llama", "phi3", "olmo2", "mixtral", "gpt_oss", "qwen3_moe", "gemma3_text"]
KV_HEADS = 2


def on(path: Path, mesh: Mesh, **more: Any) -> Any:
    return load_model(describe(str(path)), BuildContext(Ops(), torch.float32, CPU, mesh=mesh, **more))


def cut(whole: torch.Tensor, name: str, part: int, family: str, axis: Axis) -> torch.Tensor:
    """Rank's share of one part, by hand: heads and inner sizes are shared out, kv heads repeated where they are few."""
    kv = ".k_proj" in name or ".v_proj" in name or ("qkv_proj" in name and part > 0)
    if family == "olmo2" and "k_norm" in name:
        kv = True
    if kv:
        pieces = min(axis.size, KV_HEADS)
        return whole.chunk(pieces)[axis.rank * pieces // axis.size]
    if any(what in name for what in COLS) and whole.ndim == 2:
        return whole.chunk(axis.size, 1)[axis.rank]
    if any(what in name for what in ROWS) or (family == "olmo2" and "q_norm" in name):
        return whole.chunk(axis.size)[axis.rank]
    return whole


def same_as_cut(whole: Any, own: Any, family: str, axis: Axis) -> int:
    """How many of the rank's parts are smaller than the whole's."""
    smaller = 0
    for all_of_it, slot in zip(whole.weights(), own.weights(), strict=True):
        assert all_of_it.names == slot.names
        for part, name in enumerate(slot.names):
            got, full = slot.value[slot.rows(part)], all_of_it.value[all_of_it.rows(part)]
            want = cut(full, name, part, family, axis)
            assert torch.equal(got, want), f"{name} [{part}]"
            smaller += got.numel() < full.numel()
    return smaller


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", MODELS)
def test_a_share_is_what_one_would_cut_by_hand(made: Any, family: str, size: int) -> None:
    path, _ = made(family)
    whole = on(path, Mesh())
    for rank in range(size):
        mesh = Mesh.of(rank, tp=size)
        assert same_as_cut(whole, on(path, mesh), family, mesh.tp) > 3 * len(whole.layers)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_moe"])
def test_blocks_of_all_ranks_sum_to_the_whole(made: Any, family: str) -> None:
    path, _ = made(family)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    want = on(path, Mesh()).layers[1].mlp(None, x, None, add=False)[0]
    sparse = family in ("mixtral", "qwen3_moe")
    for meshes in [[Mesh.of(r, tp=2) for r in range(2)], [Mesh.of(r, tp=2, ep=2) for r in range(2)]]:
        if meshes[0].ep.size > 1 and not sparse:
            continue
        ranks = [on(path, mesh).layers[1].mlp for mesh in meshes]
        got = sum(mlp(None, x, None, add=False)[0] for mlp in ranks)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# A format that keeps a matrix in several tensors


class Joined(Source):
    """integers [M, N] times a scale for each row."""

    parts: dict[str, Any]

    def take(self, index: Any, dtype: torch.dtype) -> torch.Tensor:
        rows = None if index is None else (index[0],)
        values = self.parts["integers"].take(index, torch.float32)
        return (values * indexed(self.parts["scales"].take(rows, torch.float32), None)[:, None]).to(dtype)


def join(name: str, parts: Any, shape: tuple[int, ...]) -> Source:
    made = Joined(name, parts["integers"].shape)
    made.parts = dict(parts)
    return made


def companions(name: str) -> dict[str, str]:
    stem = name.removesuffix(".weight")
    return {"weight": name, "integers": f"{stem}.integers", "scales": f"{stem}.scales"}


def test_companions_are_named_by_the_method_and_cut_with_the_matrix(made: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = made("llama")
    plain: dict[str, torch.Tensor] = {}
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if "_proj" not in name or "layers.0" in name:  # the first layer stays plain
            plain[name] = packed[name] = tensor
            continue
        scales = tensor.abs().amax(1) / 127
        whole = (tensor / scales[:, None]).round()
        stem = name.removesuffix(".weight")
        packed[f"{stem}.integers"], packed[f"{stem}.scales"] = whole.to(torch.int8), scales
        plain[name] = whole * scales[:, None]
    for folder, tensors in (("plain", plain), ("packed", packed)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text((path / "config.json").read_text())
    method = Method("toy", companions=companions, join=join)
    for mesh in (Mesh(), Mesh.of(1, tp=2)):
        want, got = on(tmp_path / "plain", mesh), on(tmp_path / "packed", mesh, quant=method)
        for one, other in zip(want.weights(), got.weights(), strict=True):
            assert torch.equal(one.value, other.value), one.names


def test_slots_in_tuples_and_dicts_are_seen_once(made: Any) -> None:
    from phloem.layers.weight import Layer, Weight

    class Odd(Layer):
        def __init__(self) -> None:
            self.one = Weight(("a",), ((1,),), "norm")
            self.several = (self.one, Weight(("b",), ((1,),), "norm"))
            self.named = {"c": [Weight(("c",), ((1,),), "norm")], "again": self.one}

    assert [slot.names for slot in Odd().weights()] == [("a",), ("b",), ("c",)]
    whole = Engine(made("gpt_oss")[0]).model
    assert sum("_bias" in slot.names[0] for slot in whole.weights()) == 2 * len(whole.layers)
