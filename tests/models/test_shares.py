"""What each rank of a mesh reads and keeps: the same slices as of the whole model, and no more bytes than those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import CPU
from share_support import HEADS_OF_EIGHT, SIZES, checkpoint

from phloem.checkpoint.describe import describe
from phloem.core.errors import ModelLoadError
from phloem.distributed.mesh import Mesh
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.layers.weight import Weight
from phloem.models import FAMILIES
from phloem.models._index import open_sources
from phloem.testing.checkpoints import families, tiny_checkpoint, tiny_gguf


def load(path: Path, mesh: Mesh) -> tuple[Any, int]:
    """A rank's model, and the bytes that it took from the files."""
    found = describe(str(path))
    build = FAMILIES.module(found.model_type).build
    model = build(found.config, BuildContext(Ops(), torch.float32, CPU, mesh=mesh), 64)
    sources, unused = open_sources(found, model.index, model.checkpoint_name)
    assert not unused
    model.index.pull(sources, "here", None)
    return model, sum(source.bytes_read for source in sources.values())


def wanted(whole: Weight, share: Weight, number: int) -> torch.Tensor:
    """A part of the whole model's weight, cut as the share's slot says. Parts are found by name and place."""
    keys = [(name, whole.part(place)) for place, name in enumerate(whole.names)]
    place = keys.index((share.names[number], share.part(number)))
    values = whole.value[whole.rows(place)]
    return values[tuple(slice(first, last) for first, last in share.spans(number))]


@pytest.mark.some(69)
@pytest.mark.slow
@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("options", [{"tp": 2}, {"tp": 4}, {"tp": 4, "ep": 2}], ids=["tp2", "tp4", "ep2"])
def test_a_share_that_is_loaded_is_a_share_of_what_is_loaded(name: str, options: Any, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    whole, all_bytes = load(path, Mesh())
    by_name = {(n, weight.role): weight for weight in whole.weights() for n in weight.names}
    ranks = options["tp"]
    # Every rank has the whole tower.
    tower = sum(weight.value.nbytes for weight in whole.weights() if "vis" in weight.names[0].split("layers")[0])
    covered: dict[str, int] = dict.fromkeys((n for weight in whole.weights() for n in weight.names), 0)
    for rank in range(ranks):
        model, read = load(path, Mesh.of(rank, **options))
        kept = 0
        for share in model.weights():
            assert isinstance(share.value, torch.Tensor)
            for number, tensor in enumerate(share.names):
                expected = wanted(by_name[tensor, share.role], share, number)
                assert torch.equal(share.value[share.rows(number)], expected), tensor
                covered[tensor] += expected.numel()
            kept += share.value.nbytes
        assert read <= kept * 1.05
        assert kept - tower < (all_bytes - tower) * (1 / ranks + 0.25)
    for weight in whole.weights():
        for number, tensor in enumerate(weight.names):
            assert covered[tensor] >= weight.value[weight.rows(number)].numel(), tensor


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss", "mixtral"])
def test_a_whole_model_reads_each_byte_once(name: str, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    model, read = load(path, Mesh())
    assert read == model.weight_bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_shares_of_gguf_files(kind: str, tmp_path: Path) -> None:
    """Columns begin within a block of 32 for tp 4: those are dequantised, with the whole blocks around them."""
    path = checkpoint("llama", tmp_path / "hf")
    file = tiny_gguf(path, tmp_path / "tiny.gguf", kind)
    whole, _ = load(file, Mesh())
    by_name = {n: weight for weight in whole.weights() for n in weight.names}
    for rank in range(4):
        model, read = load(file, Mesh.of(rank, tp=4))
        for share in model.weights():
            for number, tensor in enumerate(share.names):
                torch.testing.assert_close(share.value[share.rows(number)], wanted(by_name[tensor], share, number))
        assert 0 < read < model.weight_bytes * 1.5


def test_fewer_kv_heads_than_ranks_are_kept_by_several(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    models = [load(path, Mesh.of(rank, tp=4))[0] for rank in range(4)]
    name = "model.layers.0.self_attn.k_proj.weight"
    shares = [model.get_weight(name) for model in models]
    assert torch.equal(shares[0], shares[1])
    assert torch.equal(shares[2], shares[3])
    assert not torch.equal(shares[0], shares[2])
    assert [model.attention_specs[0].kv_heads for model in models] == [1] * 4
    assert [model.attention_specs[0].heads for model in models] == [2] * 4


def test_vocabulary_is_shared_out(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    models = [load(path, Mesh.of(rank, tp=4))[0] for rank in range(4)]
    assert [model.embed.span for model in models] == [(0, 96), (96, 192), (192, 288), (288, 384)]
    whole = load(path, Mesh())[0].get_weight("lm_head.weight")
    assert torch.equal(torch.cat([model.get_weight("lm_head.weight") for model in models]), whole)


@pytest.mark.parametrize("name", ["phi3", "gpt_oss"])
def test_names_are_the_files_names_on_every_rank(name: str, tmp_path: Path) -> None:
    """A fused or stacked tensor comes back as one: the share of each of its parts, in the file's order."""
    from safetensors.torch import load_file

    path = checkpoint(name, tmp_path)
    stored = load_file(path / "model.safetensors")
    whole, _ = load(path, Mesh())
    assert sorted(whole.weight_names()) == sorted(stored)
    for tensor, values in stored.items():
        torch.testing.assert_close(whole.get_weight(tensor), values, atol=0, rtol=0)
    share, _ = load(path, Mesh.of(1, tp=2))
    if name == "phi3":
        qkv = stored["model.layers.0.self_attn.qkv_proj.weight"]
        q, k, v = qkv.split([64, 16, 16])
        expected = torch.cat((q[32:], k[8:], v[8:]))
        assert torch.equal(share.get_weight("model.layers.0.self_attn.qkv_proj.weight"), expected)
    else:
        experts = stored["model.layers.0.mlp.experts.gate_up_proj"]
        assert torch.equal(share.get_weight("model.layers.0.mlp.experts.gate_up_proj"), experts[:, :, 24:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss"])
def test_each_rank_keeps_its_share_of_what_is_pushed(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path, other = checkpoint(name, tmp_path / "a"), tmp_path / "b"
    model, _ = load(path, Mesh.of(1, tp=2))
    sizes = {**SIZES, "head_dim": None, "hidden_size": 64} if name in HEADS_OF_EIGHT else SIZES
    sizes = {"n_head": 8, "n_embd": 64} if name == "gpt2" else sizes
    sizes = {**SIZES, "head_dim": 8, "hidden_size": 64} if name == "helium" else sizes
    experts = {"num_local_experts": 8} if name == "gpt_oss" else {}
    tiny_checkpoint(name, other, seed=5, **sizes, **experts)
    pointers = [weight.value.data_ptr() for weight in model.weights()]
    assert not model.update_weights(load_file(other / "model.safetensors").items())
    expected, _ = load(other, Mesh.of(1, tp=2))
    for mine, theirs in zip(model.weights(), expected.weights(), strict=True):
        assert torch.equal(mine.value, theirs.value), mine.names[0]
    assert [weight.value.data_ptr() for weight in model.weights()] == pointers


def test_sizes_that_cannot_be_shared_out_are_refused_with_those_that_can(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "a", num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    with pytest.raises(ModelLoadError, match=r"tp_size 2: 9 attention heads and 3 kv heads .* valid: 1, 3, 9"):
        load(path, Mesh.of(0, tp=2))
    path = tiny_checkpoint("llama", tmp_path / "b", intermediate_size=63)
    with pytest.raises(ModelLoadError, match=r"tp_size 2: intermediate_size 63 .* valid: 1, 3, 7, 9, 21, 63"):
        load(path, Mesh.of(0, tp=2))
    path = tiny_checkpoint("qwen3_moe", tmp_path / "c")
    with pytest.raises(ModelLoadError, match=r"ep_size 4: experts 6 .* valid: 1, 2, 3, 6"):
        load(path, Mesh.of(0, tp=4, ep=4))
