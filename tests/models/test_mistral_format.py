"""Folders in Mistral's own format, written here of tiny checkpoints, against transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import PROMPT, Engine, close
from safetensors.torch import load_file, save_file

from phloem.checkpoint.describe import describe
from phloem.checkpoint.mistral_format import as_config
from phloem.core.errors import ModelLoadError

NAMES = [
    (r"model\.embed_tokens\.", "tok_embeddings."),
    (r"lm_head\.", "output."),
    (r"model\.norm\.", "norm."),
    (r"^model\.layers", "layers"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.kv_a_proj_with_mqa", "attention.wkv_a_with_mqa"),
    (r"self_attn\.kv_b_proj", "attention.wkv_b"),
    (r"self_attn\.(q|kv)_a_layernorm", r"attention.\1_a_norm"),
    (r"self_attn\.(q_a|q_b|[qkvo])_proj", r"attention.w\1"),
    (r"mlp\.(experts\.\d+|shared_experts)\.", r"\1."),
    (r"mlp\.gate\.", "gate."),
    (r"mlp\.", "feed_forward."),
    (r"gate_proj", "w1"),
    (r"up_proj", "w3"),
    (r"down_proj", "w2"),
]

YARN = {"factor": 4.0, "beta": 32.0, "alpha": 1.0, "original_max_position_embeddings": 64}


def params_of(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    said = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"], "hidden_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"], "rope_theta": rope["rope_theta"], "vocab_size": config["vocab_size"],
        "head_dim": config.get("head_dim"), "max_position_embeddings": config["max_position_embeddings"],
        "tied_embeddings": False, "model_parallel": 1,
    }  # fmt: skip
    if rope.get("rope_type") == "yarn":
        length = rope["original_max_position_embeddings"]
        said["yarn"] = {
            "original_max_position_embeddings": length, "factor": rope["factor"], "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"], "apply_scale": "kv_lora_rank" in config,
        }  # fmt: skip
        said["llama_4_scaling"] = {"original_max_position_embeddings": length, "beta": rope["llama_4_scaling_beta"]}
    if "kv_lora_rank" in config:
        latent = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        said |= {key: config[key] for key in latent}
        said["moe"] = {
            "num_experts": config["n_routed_experts"], "num_experts_per_tok": config["num_experts_per_tok"],
            "expert_hidden_dim": config["moe_intermediate_size"], "num_shared_experts": config["n_shared_experts"],
            "first_k_dense_replace": config["first_k_dense_replace"], "route_every_n": 1, "routed_scale": 1.0,
            "num_expert_groups": 1, "num_expert_groups_per_tok": 1,
        }  # fmt: skip
    return said


def written(source: Path, target: Path, shards: int = 1, **changes: Any) -> Path:
    """The folder as Mistral would publish it: rows of q and k for neighbours, each expert by itself."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for name, values in load_file(source / "model.safetensors").items():
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
            values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        pieces = {name: values}
        if name.endswith("experts.gate_up_proj"):
            block, half = name.removesuffix("gate_up_proj"), values.shape[1] // 2
            pieces = {f"{block}{e}.gate_proj.weight": values[e, :half] for e in range(len(values))}
            pieces |= {f"{block}{e}.up_proj.weight": values[e, half:] for e in range(len(values))}
        elif name.endswith("experts.down_proj"):
            pieces = {name.replace("down_proj", f"{e}.down_proj.weight"): values[e] for e in range(len(values))}
        for key, piece in pieces.items():
            for pattern, plain in NAMES:
                key = re.sub(pattern, plain, key)
            found[key] = piece.contiguous()
    found["vision_encoder.patch_conv.weight"] = torch.ones(2, 2)
    names = sorted(found)
    if shards == 1:
        save_file(found, target / "consolidated.safetensors")
    else:
        files = [f"consolidated-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
        for number, file in enumerate(files):
            save_file({name: found[name] for name in names[number::shards]}, target / file)
        index = {name: files[place % shards] for place, name in enumerate(names)}
        (target / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (target / "params.json").write_text(json.dumps({**params_of(config), **changes}))
    return target


@pytest.mark.parametrize(("name", "shards"), [("mistral-no-window", 1), ("ministral3", 2), ("mistral4", 2)])
def test_logits_are_those_of_transformers(name: str, shards: int, made: Any, tmp_path: Path) -> None:
    path, theirs = made(name)
    engine = Engine(written(path, tmp_path / "own", shards))
    assert engine.checkpoint.model_type == name.partition("-")[0]
    close(engine.whole(PROMPT), theirs)


def test_a_config_json_beside_it_counts(made: Any, tmp_path: Path) -> None:
    path, _ = made("mistral-no-window")
    folder = written(path, tmp_path / "own", dim=77)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((path / name).read_bytes())
    found = describe(str(folder))
    assert [file.name for file in found.files] == ["model.safetensors"]
    assert found.config["hidden_size"] == 32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim": None}, "hidden_size"),
        ({"n_layers": -1}, "num_hidden_layers is -1"),
        ({"n_layers": 2**40}, "num_hidden_layers is 1099511627776, expected at most 10000"),
        ({"dim": "wide"}, "hidden_size is 'wide'"),
        ({"model_type": "mamba"}, "params.json: asks for what is not supported: .*model_type = 'mamba'"),
        ({"causal": False}, "asks for what is not supported: causal = False"),
        ({"lora": {"rank": 8}}, r"asks for what is not supported: lora = \{'rank': 8\}"),
        ({"yarn": {"factor": 4.0}}, "yarn has no number beta"),
        ({"norm_eps": "small"}, "rms_norm_eps is 'small', expected a number from 0"),
        ({"norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number from 0"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*, expected a number above 0"),
        (
            {"max_position_embeddings": 10**400},
            "max_position_embeddings is 1000.*, expected a whole number above 0 and",
        ),
        ({"activation": ["silu"]}, r"unknown activation \['silu'\]"),
        ({"sliding_window": "s"}, "sliding_window is 's', expected a whole number"),
        ({"yarn": {**YARN, "factor": float("inf")}}, "yarn has no number factor: it is inf"),
        ({"yarn": {**YARN, "alpha": 0}}, "yarn has no number alpha: it is 0, expected more than 0"),
        ({"yarn": {**YARN, "original_max_position_embeddings": 10**400}}, "no number original_max_position_embeddings"),
        ({"yarn": YARN, "rope_theta": 1}, "rope scaling 'yarn' .* a wrong one: float division by zero"),
        (
            {"llama_4_scaling": {"beta": float("nan"), "original_max_position_embeddings": 64}},
            "expected a length and beta",
        ),
        ({"yarn": 4}, "yarn is 4, expected an object"),
        ({"moe": {"num_experts": 4}}, "moe and kv_lora_rank go together"),
        ({"sliding_window": [4, None]}, r"sliding_window is \[4, None\], expected one size that repeats over 3 layers"),
        ({"sliding_window": ["a", {}, None]}, "expected one size that repeats"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling is .*: expected a length and beta"),
        ({"quantization": {"qformat_weight": "nvfp4"}}, "weights are read as fp8_e4m3 alone"),
        ({"head_dim": 24}, r"q_proj.weight"),
    ],
)
def test_what_params_json_asks_in_vain_is_named(changes: dict[str, Any], said: str, made: Any, tmp_path: Path) -> None:
    folder = written(made("mistral-no-window")[0], tmp_path / "own", **changes)
    with pytest.raises(ModelLoadError, match=said):
        Engine(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_lora_rank": "s"}, "json: kv_lora_rank is 's', expected a whole number from 1"),
        ({"v_head_dim": None}, "json: lacks v_head_dim"),
        ({"moe": {"num_experts": 4, "num_experts_per_tok": 2}}, "moe: lacks expert_hidden_dim"),
        ({"moe": {"num_experts": 4, "num_experts_per_tok": 1.5, "expert_hidden_dim": 8}}, "per_tok is 1.5, expected a"),
        ({"moe": {"num_experts": 4, "routed_scale": "a"}}, "moe: routed_scale is 'a', expected more than 0"),
    ],
)
def test_sizes_of_latents_and_experts_are_whole_and_there(changes: dict[str, Any], said: str) -> None:
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    with pytest.raises(ModelLoadError, match=said):
        as_config({**latent, "moe": {"num_experts": 4}, **changes}, Path("params.json"))


def test_a_file_nested_deeper_than_any_is_named(made: Any, tmp_path: Path) -> None:
    folder = written(made("mistral-no-window")[0], tmp_path / "own")
    (folder / "params.json").write_text("[" * 100_000)
    with pytest.raises(ModelLoadError, match=r"params.json: not readable as JSON"):
        describe(str(folder))


def test_fp8_matrices_with_their_scales(made: Any, tmp_path: Path) -> None:
    path, _ = made("ministral3")
    folder = written(path, tmp_path / "own", quantization={"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"})
    stored = load_file(folder / "consolidated.safetensors")
    plain = dict(stored)
    for name, values in list(stored.items()):
        if re.search(r"\.w\w*\.weight$", name):
            scale = values.abs().max() / 448
            stored[name] = (values / scale).to(torch.float8_e4m3fn)
            plain[name] = stored[name].float() * scale
            stem = name.removesuffix("weight")
            stored |= {f"{stem}qscale_weight": scale.clone(), f"{stem}qscale_act": torch.tensor(0.5)}
    save_file(stored, folder / "consolidated.safetensors")
    ours = Engine(folder).whole(PROMPT)
    save_file(plain, folder / "consolidated.safetensors")
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "quantization": None}))
    close(ours, Engine(folder).whole(PROMPT))
