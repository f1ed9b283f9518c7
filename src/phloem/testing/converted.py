"""What llama.cpp's converter makes of recurrent and other odd families, for `tiny_gguf`: metadata, and tensors that it
renames, splits or computes. Names that are left are those of gguf's own table."""

from __future__ import annotations

import re
from statistics import NormalDist
from typing import Any

import numpy as np

MAMBA1, MAMBA2 = ("mamba", "falcon_mamba", "jamba"), ("mamba2", "falcon_h1", "granitemoehybrid", "nemotron_h", "bamba")
DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


PADDED = ("roberta", "xlm_roberta")  # whose positions begin behind the padding's row
ENCODERS = ("bert", "modernbert", "nomic_bert", "distilbert", *PADDED)


def architecture(config: dict[str, Any], usual: str) -> str:
    """Some have two."""
    sparse = config["model_type"] == "nemotron_h" and "moe" in config["layers_block_type"]
    return "nemotron_h_moe" if sparse else usual


def attending(config: dict[str, Any]) -> list[bool] | None:
    """Which layers attend; None: all of them, or none."""
    if config["model_type"] == "jamba":
        period, offset = config["attn_layer_period"], config["attn_layer_offset"]
        return [n % period == offset for n in range(config["num_hidden_layers"])]
    if config["model_type"] == "bamba":
        return [n in config["attn_layer_indices"] for n in range(config["num_hidden_layers"])]
    kinds = config.get("layers_block_type") or config.get("layer_types") or []
    hybrid = config["model_type"] in ("granitemoehybrid", "nemotron_h", "kimi_linear")
    return [kind in ("attention", "full_attention") for kind in kinds] if hybrid else None


def write_metadata(writer: Any, config: dict[str, Any]) -> None:
    """The keys that only such families have."""
    kind = config["model_type"].replace("-", "_")
    if kind in MAMBA1:
        inner = config.get("intermediate_size") if kind != "jamba" else None
        writer.add_ssm_conv_kernel(config.get("conv_kernel") or config["mamba_d_conv"])
        writer.add_ssm_inner_size(inner or config["mamba_expand"] * config["hidden_size"])
        writer.add_ssm_state_size(config.get("state_size") or config["mamba_d_state"])
        writer.add_ssm_time_step_rank(config.get("time_step_rank") or config["mamba_dt_rank"])
    if kind in ("mamba", "falcon_mamba"):
        writer.add_ssm_dt_b_c_rms(kind == "falcon_mamba")
    if kind in MAMBA2:
        heads, size, groups, taps, state = sizes(config)
        writer.add_ssm_conv_kernel(taps)
        writer.add_ssm_inner_size(heads * size)
        writer.add_ssm_state_size(state)
        writer.add_ssm_time_step_rank(heads)
        writer.add_ssm_group_count(groups)
    if kind in DELTA:
        writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
        recurrent = [one == "linear_attention" for one in config["layer_types"]]
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)
    if kind in DELTA[1:]:
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    if kind == "exaone_moe":
        writer.add_expert_shared_feed_forward_length(config["moe_intermediate_size"] * config["num_shared_experts"])
    if kind in ("glm4_moe_lite", "exaone_moe", "glm_moe_dsa"):
        writer.add_leading_dense_block_count(config["mlp_layer_types"].index("sparse"))
    if kind == "bamba":
        writer.add_rope_scaling_finetuned(True)
    if kind == "ministral3":
        rope = config["rope_parameters"]
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if kind == "granitemoehybrid":
        writer.add_rope_scaling_finetuned(config.get("position_embedding_type") == "rope")
    if kind == "nemotron_h":
        plain = config["intermediate_size"]
        writer.add_feed_forward_length([plain * (kind in ("mlp", "moe")) for kind in config["layers_block_type"]])
    if kind == "gemma3n_text":
        shares = config["activation_sparsity_pattern"]
        writer.add_activation_sparsity_scale([NormalDist().inv_cdf(s) if s else float("-inf") for s in shares])
        writer.add_sliding_window_pattern([one == "sliding_attention" for one in config["layer_types"]])
        writer.add_shared_kv_layers(config["num_kv_shared_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    if kind == "llama4_text":
        writer.add_feed_forward_length(config["intermediate_size_mlp"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if kind == "gemma4_text":
        _write_local_heads(writer, config)
    if kind == "mimo_v2_flash":
        _write_two_kinds(writer, config)
    if kind == "mistral4":
        writer.add_attn_temperature_scale(config["rope_parameters"]["llama_4_scaling_beta"])
    if kind in ("olmo3", "exaone_moe"):
        writer.add_sliding_window_pattern([one == "sliding_attention" for one in config["layer_types"]])
    _write_more(writer, config)


def _write_more(writer: Any, config: dict[str, Any]) -> None:
    """Those of encoders, of models of diffusion, and of a few more."""
    kind = config["model_type"].replace("-", "_")
    if kind in ("llada", "dream"):
        writer.add_causal_attention(False)
        writer.add_mask_token_id(config["mask_token_id"])
    if kind == "youtu":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_expert_shared_count(0)
        writer.add_leading_dense_block_count(config["num_hidden_layers"])
    if kind == "kimi_linear":
        writer.add_leading_dense_block_count((config["mlp_layer_types"] or ["sparse"]).index("sparse"))
    if kind in ENCODERS:
        writer.add_causal_attention(False)
    if kind in PADDED:
        writer.add_context_length(config["max_position_embeddings"] - config["pad_token_id"] - 1)
    if kind == "distilbert":
        writer.add_layer_norm_eps(1e-12)
    if kind == "modernbert":
        writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    if kind == "falcon":
        writer.add_head_count_kv(config["num_kv_heads"] if config["new_decoder_architecture"] else 1)
        writer.add_feed_forward_length(4 * config["hidden_size"])
        writer.add_tensor_data_layout("jploski")


def _write_two_kinds(writer: Any, config: dict[str, Any]) -> None:
    """MiMo-V2: local layers have twice as many key heads."""
    sliding = [one == "sliding_attention" for one in config["layer_types"]]
    heads = config["num_key_value_heads"]
    writer.add_head_count_kv([heads * (1 + local) for local in sliding])
    writer.add_sliding_window_pattern(sliding)
    writer.add_value_length(config["v_head_dim"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    if config["attention_value_scale"] is not None:
        writer.add_float32("mimo2.attention.value_scale", config["attention_value_scale"])


def _write_local_heads(writer: Any, config: dict[str, Any]) -> None:
    """Gemma 4: two kinds of heads; where a layer reads another's keys, its block is perhaps twice as wide."""
    each, count = config.get("per_layer_config") or {}, config["num_hidden_layers"]
    local = [one == "sliding_attention" for one in config["layer_types"]]
    own = [each.get(str(n), {}) for n in range(count)]
    whole = next(item["head_dim"] for item in own if "head_dim" in item)
    for size, add in ((whole, ""), (config["head_dim"], "_swa")):
        writer.add_uint32(f"gemma4.attention.key_length{add}", size)
        writer.add_uint32(f"gemma4.attention.value_length{add}", size)
        writer.add_uint32(f"gemma4.rope.dimension_count{add}", size)
    kv_heads = config["num_key_value_heads"]
    writer.add_head_count_kv([item.get("num_key_value_heads", kv_heads) for item in own])
    shared, wide = config["num_kv_shared_layers"], config["use_double_wide_mlp"]
    inner = config["intermediate_size"]
    writer.add_feed_forward_length([inner * (1 + (wide and n >= count - shared)) for n in range(count)])
    writer.add_shared_kv_layers(shared)
    writer.add_sliding_window_pattern(local)
    ropes = config["rope_parameters"]
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    turned = int(whole * ropes["full_attention"]["partial_rotary_factor"] / 2)
    # What does not turn is divided by more than any angle.
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turned + [1e30] * (whole // 2 - turned), np.float32))


def write_numbers(writer: Any, tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Apertus: the numbers of each layer's activation. The tensors come back."""
    if config["model_type"] == "apertus":
        for key in ("alpha_p", "alpha_n", "beta", "eps"):
            layers = range(config["num_hidden_layers"])
            values = [float(tensors[f"model.layers.{n}.mlp.act_fn.{key}"].item()) for n in layers]
            writer.add_array(f"xielu.{key}", values)
    return tensors


def sizes(config: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Of Mamba 2: heads, their size, groups, taps, states."""
    if config["model_type"] in ("mamba2", "nemotron_h"):
        prefix = "mamba_" * (config["model_type"] == "nemotron_h")
        heads, size = config[f"{prefix}num_heads"], config[f"{prefix}head_dim"]
        state = config.get("state_size") or config["ssm_state_size"]
        return heads, size, config["n_groups"], config["conv_kernel"], state
    heads = config["mamba_n_heads"]
    inner = config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"]
    return heads, inner // heads, config["mamba_n_groups"], config["mamba_d_conv"], config["mamba_d_state"]


def prepared(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint with what the converter does to them before it names them."""
    kind = config["model_type"].replace("-", "_")
    if kind == "falcon_h1":
        tensors = {name: values * _factor(name, values, config) for name, values in tensors.items()}
    if kind in MAMBA1 + MAMBA2:
        if kind == "granitemoehybrid" and not config["num_local_experts"]:
            tensors = {k: v for name, values in tensors.items() for k, v in _dense(name, values).items()}
        return dict(_recurrent(name, values, config) for name, values in tensors.items())
    if kind == "kimi_linear":
        return dict(_kimi(name, values) for name, values in tensors.items())
    if kind == "apertus":
        return {name: values for name, values in tensors.items() if ".act_fn." not in name}
    if kind in DELTA:
        return {k: v for name, values in tensors.items() for k, v in _delta(name, values, config).items()}
    if kind in ENCODERS:  # without what makes other things of its states, and rows of positions that no token has
        first = config["pad_token_id"] + 1 if kind in PADDED else 0
        kept = {k.removeprefix("roberta."): v for k, v in tensors.items() if not k.startswith("pooler.")}
        return {k: v[first:] if "position_embeddings" in k else v for k, v in kept.items()}
    if kind == "llama4_text":
        return {k: v for name, values in tensors.items() for k, v in _by_projection(name, values).items()}
    if kind == "lfm2_moe":
        tensors = {name.replace(".expert_bias", ".expert_bias.bias"): values for name, values in tensors.items()}
        return {re.sub(r"^model\.(.*\.experts\.)", r"\1", name): values for name, values in tensors.items()}
    if kind == "gemma3n_text":
        return _streams(tensors, config)
    if kind == "gemma4_text":
        return {k: v for name, values in tensors.items() for k, v in _scaled_experts(name, values).items()}
    if kind == "mistral4":
        return {k: v for name, values in tensors.items() for k, v in _gate_and_up(name, values).items()}
    if kind in ("falcon", "gpt_neox"):
        return {name: _one_after_another(name, values, config) for name, values in tensors.items()}
    return tensors


def _delta(name: str, values: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Gated delta nets: q, k and v in one tensor and z in another, value heads in another order (Qwen3.5)."""
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    size, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
    if name.endswith("in_proj_qkvz.weight"):
        return _gates_apart(name, values, config)
    if "linear_attn." in name and config["model_type"] != "qwen3_next":
        part = name.split(".")[-2] if name.endswith(".weight") else name.rpartition(".")[2]
        if part in ("in_proj_qkv", "conv1d"):
            qk = 2 * keys * size
            values = np.concatenate([values[:qk], _tiled(values[qk:], keys, heads, value)])
        elif part in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias"):
            values = _tiled(values, keys, heads, value if part == "in_proj_z" else 1)
        elif part == "out_proj":
            values = _tiled(values.T, keys, heads, value).T
    if name.endswith(".A_log"):
        values = -np.exp(values)
    if name.endswith("conv1d.weight"):
        values = values.squeeze(1)
    return {name.replace("dt_bias", "dt_proj.bias"): values}


def _kimi(name: str, values: Any) -> tuple[str, Any]:
    """Kimi Linear: filters with two axes of one; of dense layers the names that the published files have."""
    if name.endswith("_conv1d.weight"):
        values = values.reshape(1, len(values), 1, -1)
    elif name.endswith(".A_log"):
        values = -np.exp(values)
    name = re.sub(r"\.block_sparse_moe\.((?:gate|up|down)_proj\.)", r".mlp.\1", name)
    return name.replace(".dt_bias", ".dt_proj.bias"), values


def _gates_apart(name: str, values: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-Next: of each key head q, k, v and z; all q, all k and all v in one tensor, all z in another."""
    keys, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    share = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
    each = values.reshape(keys, 2 * size + 2 * share, -1)
    q, k, v, z = (part.reshape(-1, part.shape[-1]) for part in np.split(each, np.cumsum([size, size, share]), 1))
    return {name.replace("_qkvz", "_qkv"): np.concatenate([q, k, v]), name.replace("_qkvz", "_z"): z}


def _tiled(values: Any, keys: int, heads: int, size: int) -> Any:
    """The n-th value heads of all key heads beside each other, from those of one key head beside each other."""
    return values.reshape(keys, heads // keys, size, -1).swapaxes(0, 1).reshape(values.shape)


def _recurrent(name: str, values: Any, config: dict[str, Any]) -> tuple[str, Any]:
    second = config["model_type"] in MAMBA2
    if name.endswith(".dt_bias"):
        name = name.removesuffix("dt_bias") + "dt_proj.bias"
    elif name.endswith("conv1d.weight"):
        values = values.squeeze(1)
    elif name.endswith(".A_log"):
        values = -np.exp(values.astype(np.float32)).reshape(*values.shape, *[1] * second)
    elif name.endswith(".D"):
        values = values.reshape(*values.shape, *[1] * second)
    elif re.search(r"\.(mixer|mamba)\.norm\.weight", name):
        values = values.reshape(sizes(config)[2], -1)
    if config["model_type"] == "jamba":
        name = name.replace(".feed_forward.experts.", ".mlp.experts.")
    if config["model_type"] == "nemotron_h":
        found = re.fullmatch(r"backbone(\.layers\.\d+)\.mixer(\.experts\..+)", name)
        name = f"model{found[1]}.mlp{found[2]}" if found else name
    return name, values


def _dense(name: str, values: Any) -> dict[str, Any]:
    """Granite without experts: the block beside them is the usual one."""
    if not name.endswith(".shared_mlp.input_linear.weight"):
        return {name.replace(".shared_mlp.output_linear.", ".mlp.down_proj."): values}
    block = name.replace(".shared_mlp.input_linear.weight", ".mlp")
    gate, up = np.split(values, 2)
    return {f"{block}.gate_proj.weight": gate, f"{block}.up_proj.weight": up}


def _factor(name: str, values: Any, config: dict[str, Any]) -> Any:
    """Falcon-H1: what the converter multiplies a tensor by."""
    read, key = config["attention_in_multiplier"], config["key_multiplier"]
    gate, down = config["mlp_multipliers"]
    known = {
        "down_proj": down, "gate_proj": gate, "k_proj": read * key, "q_proj": read, "v_proj": read,
        "o_proj": config["attention_out_multiplier"], "out_proj": config["ssm_out_multiplier"],
        "lm_head": config["lm_head_multiplier"], "embed_tokens": config["embedding_multiplier"],
    }  # fmt: skip
    part = name.split(".")[-2]
    if part != "in_proj":
        return known.get(part, 1.0)
    heads, size, groups, _, state = sizes(config)
    rows = np.repeat(config["ssm_multipliers"], [heads * size, heads * size, groups * state, groups * state, heads])
    return (rows * config["ssm_in_multiplier"]).astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))


def _by_projection(name: str, values: Any) -> dict[str, Any]:
    """Llama 4: experts' matrices the usual way round, gate and up apart."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: values}
    turned, block = np.ascontiguousarray(values.swapaxes(-1, -2)), name.rpartition(".")[0]
    if name.endswith("down_proj"):
        return {f"{block}.down_proj.weight": turned}
    gate, up = np.split(turned, 2, axis=1)
    return {f"{block}.gate_proj.weight": gate, f"{block}.up_proj.weight": up}


def _scaled_experts(name: str, values: Any) -> dict[str, Any]:
    """Gemma 4: the router's scales beside what they scale."""
    layer = re.sub(r"model\.layers\.(\d+)\..+", r"blk.\1.", name)
    if name.endswith(".router.scale"):
        return {f"{layer}ffn_gate_inp.scale": values}
    if name.endswith(".per_expert_scale"):
        return {f"{layer}ffn_down_exps.scale": values}
    if name.endswith(".layer_scalar"):
        return {f"{name}.weight": values}
    return {f"{layer}ffn_{k}": v for k, v in _exps(name, values).items()} or {name: values}


def _gate_and_up(name: str, values: Any) -> dict[str, Any]:
    """Mistral 4: gate and up of all experts in one tensor."""
    layer = re.sub(r"model\.layers\.(\d+)\..+", r"blk.\1.", name)
    return {f"{layer}ffn_{k}": v for k, v in _exps(name, values).items()} or {name: values}


def _exps(name: str, values: Any) -> dict[str, Any]:
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return {}
    return {"gate_up_exps.weight" if "gate_up" in name else "down_exps.weight": values}


def _streams(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3n: what makes streams and what joins them, each in one tensor; zeros up to the vocabulary's end."""
    found: dict[str, Any] = {}
    for name, values in tensors.items():
        if ".embed_tokens" in name:
            values = np.pad(values, ((0, config["vocab_size"] - len(values)), (0, 0)))
        match = re.fullmatch(r"(.*altup_(?:unembed_)?projections)\.(\d+)\.weight", name)
        if match is None:
            found[name + ".weight" * name.endswith("_scale")] = values
        elif match[2] == "0":
            count = sum(other.startswith(f"{match[1]}.") for other in tensors)
            found[f"{match[1]}.weight"] = np.stack([tensors[f"{match[1]}.{n}.weight"] for n in range(count)])
    return found


def _one_after_another(name: str, values: Any, config: dict[str, Any]) -> Any:
    """Falcon and GPT-NeoX: all queries, all keys, all values."""
    if ".query_key_value." not in name:
        return values
    heads = config["num_attention_heads"]
    kv_heads = heads
    if config["model_type"] == "falcon":
        kv_heads = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    each = values.reshape(kv_heads, heads // kv_heads + 2, config["hidden_size"] // heads, *values.shape[1:])
    parts = each[:, :-2], each[:, -2], each[:, -1]
    return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])
