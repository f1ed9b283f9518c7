"""Models out of GGUF files: the same logits, the same bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import PROMPT, Engine, close, reference

from phloem.checkpoint.describe import describe
from phloem.checkpoint.families import FAMILIES, family
from phloem.core.errors import ModelLoadError
from phloem.kernels.ops import Ops
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf

pytestmark = pytest.mark.slow
KNOWN = [
    name
    for name in FAMILIES.names()
    if (family(name).gguf is not None or family(name).gguf_family)
    and family(name).encoder is None
    and family(name).diffusion is None
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.some(18)
@pytest.mark.parametrize("name", KNOWN)
def test_gguf_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """F32 tensors, so that only names, permutation, norms and the translated configuration are at stake."""
    overrides = {"query_pre_attn_scalar": 16} if name == "gemma3_text" else {}
    if name == "llama4_text":  # what no file says
        overrides |= {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
    overrides |= {"router_jitter_noise": 0.01} if name == "phimoe" else {}  # nor this
    overrides |= {"sliding_window": None} if name in ("mistral", "mixtral", "starcoder2") else {}
    path = tiny_checkpoint(name, tmp_path / "hf", **overrides)
    file = tiny_gguf(path, tmp_path / "tiny.gguf")
    close(Engine(file).whole(PROMPT), reference(path, PROMPT))


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek_v2-groups", "deepseek_v2-yarn", "deepseek_v3-yarn", "lfm2-conv-alone", "granitemoeshared-alone"),
        *("mamba-bias", "mamba-untied", "jamba-bias", "jamba-dense", "falcon_h1-gate", "granitemoehybrid-still"),
        *("granitemoehybrid-dense", "nemotron_h-bias", "nemotron_h-latent"),
        *("falcon-new", "falcon-new-one-norm", "gpt_neox-serial", "lfm2_moe-plain", "olmo3-yarn"),
        *("gemma4_text-experts", "gemma4_text-plain", "mistral4-groups", "mistral4-plain"),
        *("bamba-bias", "qwen3_next-one-head-each", "qwen3_5_text-tied", "apertus-bias"),
        *("kimi_linear-groups", "kimi_linear-dense", "deepseek_v32-all", "glm_moe_dsa-each"),
        *("glm-no-bias", "granitemoe-tied", "internlm3-bias"),
    ],
)
def test_variants_give_the_same_logits(name: str, made: Any, tmp_path: Path) -> None:
    path, theirs = made(name)
    close(Engine(tiny_gguf(path, tmp_path / "tiny.gguf")).whole(PROMPT), theirs)


def test_older_files_of_qwen3_next_have_gates_beside_what_they_gate(made: Any, tmp_path: Path) -> None:
    from phloem.testing import converted

    path, theirs = made("qwen3_next")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converted, "_gates_apart", lambda name, values, config: {name: values})
        file = tiny_gguf(path, tmp_path / "tiny.gguf")
    close(Engine(file).whole(PROMPT), theirs)


def test_what_makes_keys_and_values_of_latents_in_one_or_in_halves_of_some_type(made: Any, tmp_path: Path) -> None:
    """Halves of another type than F32 are dequantised before they are turned and joined."""
    path, theirs = made("deepseek_v3")
    old = Engine(tiny_gguf(path, tmp_path / "old.gguf", whole_latent=True))
    close(old.whole(PROMPT), theirs)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    new = Engine(tiny_gguf(path, tmp_path / "half.gguf", "F16")).model.get_weight(name)
    whole = old.model.get_weight(name)
    torch.testing.assert_close(new, whole.half().float())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention__key_length_mla", 8, "deepseek2.attention.key_length 8 leaves nothing beside .*dimension_count 8"),
        ("rope__scaling__yarn_log_multiplier", 0.1, "yarn_log_multiplier = 0.1"),
    ],
)
def test_sizes_of_latents_that_do_not_fit_are_named(key: str, value: Any, said: str, made: Any, tmp_path: Path) -> None:
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_key_length_mla", lambda writer, size: None)
        keys = {"deepseek2__attention__key_length_mla": 20} | {f"deepseek2__{key}": value}
        file = tiny_gguf(made("deepseek_v3")[0], tmp_path / "tiny.gguf", **keys)
    with pytest.raises(ModelLoadError, match=said):
        describe(str(file))


def test_halves_of_other_sizes_are_named(made: Any, tmp_path: Path) -> None:
    import gguf

    add = gguf.GGUFWriter.add_tensor

    def shorter(writer: Any, name: str, tensor: Any, **rest: Any) -> None:
        add(writer, name, tensor[:3].copy() if "attn_v_b" in name else tensor, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", shorter)
        file = tiny_gguf(made("deepseek_v3")[0], tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=r"blk.0.attn_v_b.weight \[3, 10, 16\], expected \[4, latent, key\]"):
        Engine(file)


def test_llama3_rope_comes_as_a_tensor_in_gguf(made: Any, tmp_path: Path) -> None:
    import gguf

    from phloem.layers.rope import inverse_frequencies, rope_spec

    path, theirs = made("llama", rope_parameters=LLAMA3_ROPE)
    scaled = inverse_frequencies(rope_spec(json.loads((path / "config.json").read_text()), 16))[0]
    divisors = inverse_frequencies(rope_spec({"rope_theta": 500000.0}, 16))[0] / scaled
    add = gguf.GGUFWriter.write_header_to_file

    def with_divisors(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
        add(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_divisors)
        file = tiny_gguf(path, tmp_path / "tiny.gguf")
    close(Engine(file).whole(PROMPT), theirs)


@pytest.mark.parametrize(("extra", "read"), [("blk.3.nextn.eh_proj.weight", True), ("blk.1.surplus.weight", False)])
def test_layers_that_draft_are_left_out_and_other_tensors_that_nothing_reads_refused(
    tmp_path: Path, extra: str, read: bool
) -> None:
    import gguf
    import numpy as np

    path = tiny_checkpoint("glm4_moe", tmp_path / "hf")
    add = gguf.GGUFWriter.write_header_to_file

    def with_more(writer: Any) -> None:
        writer.add_tensor(extra, np.ones((2, 2), np.float32))
        add(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_more)
        file = tiny_gguf(path, tmp_path / "tiny.gguf")
    if read:
        close(Engine(file).whole(PROMPT), reference(path, PROMPT))
    else:
        with pytest.raises(ModelLoadError, match=f"1 tensors are read by no layer of glm4_moe: {extra}"):
            Engine(file)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_gguf(kind: str, tmp_path: Path) -> None:
    """Our dequantised rows equal gguf's of the permuted original; raw bytes reach `prepare_linear` untouched."""
    import gguf
    from gguf.quants import dequantize, quantize
    from safetensors.torch import load_file

    path = tiny_checkpoint("llama", tmp_path / "hf")
    seen: dict[str, tuple[str, Any]] = {}

    def prepare(parts: Any, dtype: torch.dtype, device: torch.device) -> Any:
        for part in parts:
            seen[part.name] = part.kind, None if part.kind == "dense" else part.raw()
        return Ops().prepare_linear(parts, dtype, device)

    ops = dataclasses.replace(Ops(), prepare_linear=prepare)
    engine = Engine(tiny_gguf(path, tmp_path / "tiny.gguf", kind), ops=ops)
    dense = load_file(path / "model.safetensors")
    wanted = gguf.GGMLQuantizationType[kind]
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        raw = quantize(dense[name].numpy(), wanted)
        torch.testing.assert_close(engine.model.get_weight(name), torch.from_numpy(dequantize(raw, wanted)))
        stored_kind, stored = seen[name]
        assert stored_kind == kind
        assert (stored == raw.view("u1")).all()


def test_k_quants_and_iq4_nl_dequantise() -> None:
    """Types that gguf can only read: any bytes are a valid tensor."""
    import gguf
    import numpy as np
    from gguf.quants import dequantize

    from phloem.models._sources import GGUFSource

    class Stored:
        def __init__(self, kind: str) -> None:
            self.kind = kind
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            self.bytes = np.random.default_rng(0).integers(0, 60, (6, 512 // block * size), dtype=np.uint8)

        def raw(self) -> Any:
            return self.bytes

    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"):
        tensor: Any = Stored(kind)
        ours = GGUFSource("x", (6, 512), kind, tensor=tensor).take(None, torch.float32)
        theirs = torch.from_numpy(dequantize(tensor.bytes, gguf.GGMLQuantizationType[kind]))
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_model_in_several_parts(made: Any, tmp_path: Path) -> None:
    path, theirs = made("llama")
    close(Engine(tiny_gguf(path, tmp_path / "tiny.gguf", part=7)).whole(PROMPT), theirs)
    close(Engine(tmp_path).whole(PROMPT), theirs)
