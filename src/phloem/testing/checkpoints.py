"""Tiny checkpoints with random weights and a real tokenizer, in the formats that are served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.checkpoint.describe import describe
from phloem.checkpoint.families import FAMILIES, GGUFFacts, family, gguf_families
from phloem.checkpoint.gguf_config import KEYS
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import build_model
from phloem.models.lfm2 import inner_size
from phloem.testing.converted import MAMBA1, MAMBA2, architecture, attending, prepared, write_metadata, write_numbers

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 384  # 256 bytes, the special tokens, and merges learned from CORPUS
SPECIAL = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
# Of models that see, behind those: their ids are 4, 5, ...
SEEING = ["<|vision_start|>", "<|vision_end|>", "<image>", "<fake_token_around_image>", "<global-img>"]
# Of models that see videos: the id is one that they have no other use for.
WATCHING = [*SEEING[:3], "<video>", SEEING[4], SEEING[3]]
# Of models that hear.
HEARING = [*WATCHING[:4], "<sound>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "A serving engine answers many requests at once; each request has its own page table.",
    "Sap moves through the phloem of a tree, from the leaves to wherever sugar is needed.",
    "What is the capital of France? The capital of France is Paris.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WATCHED = "{% elif part['type'] == 'video' %}<|vision_start|><video><|vision_end|>"
SEEING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "" + WATCHED + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


def families() -> list[str]:
    """Families that generate of which tiny checkpoints can be made: those whose file says how (`TINY`)."""
    made = [family(name) for name in FAMILIES.names()]
    rest = [one for one in made if one.tiny is not None and one.encoder is None and one.audio is None]
    return [one.name for one in rest if one.diffusion is None]


def denoisers() -> list[str]:
    """Families that write by diffusion and that transformers does not have."""
    made = [family(name) for name in FAMILIES.names()]
    return [
        one.name for one in made if one.tiny is not None and one.diffusion is not None and "fills" not in one.diffusion
    ]


def listeners() -> list[str]:
    """Families that hear, of which tiny checkpoints can be made."""
    return [name for name in FAMILIES.names() if family(name).tiny is not None and family(name).audio is not None]


def encoders() -> list[str]:
    """Families that do not generate of which tiny checkpoints can be made."""
    return [name for name in FAMILIES.names() if family(name).tiny is not None and family(name).encoder is not None]


def tiny_checkpoint(
    model_type: str, path: Path, *, seed: int = 0, shards: int = 1, head: str = "", **overrides: Any
) -> Path:
    """Write a random checkpoint of a family, with a tokenizer and a chat template; the same bytes for the same seed.

    Args:
        model_type: one of `families()` or `encoders()`.
        path: a directory, made if need be.
        seed: of the weights.
        shards: how many safetensors files, about.
        head: of the class (`ForSequenceClassification`, `Model`); "": the family's usual one.
        overrides: keys of the family's config class (of its text model).

    Returns:
        `path`. Needs `transformers`.
    """
    if model_type in denoisers():
        return _written(model_type, path, seed, overrides)
    model = _filled(lambda: _model(model_type, overrides, head), seed, shifted=_shifted(model_type))
    path.mkdir(parents=True, exist_ok=True)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    model.save_pretrained(path, max_shard_size=f"{max(1, size // shards // 1000 + 1)}KB" if shards > 1 else "5GB")
    known = family(model_type).vision if model_type in FAMILIES.names() else None
    write_tokenizer(path, model.config.get_text_config().vocab_size, takes=() if known is None else tuple(known))
    return path


def random_checkpoint(model_type: str, path: Path, settings: dict[str, Any], seed: int = 0) -> Path:
    """A random checkpoint of any class of transformers that generates, with all its settings given; and a tokenizer."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **{k: v for k, v in settings.items() if v is not None})
    make = transformers.AutoModelForCausalLM.from_config
    _filled(lambda: make(config).eval(), seed, shifted=_shifted(model_type)).save_pretrained(path)
    write_tokenizer(path, config.get_text_config().vocab_size)
    return path


def _written(model_type: str, path: Path, seed: int, overrides: dict[str, Any]) -> Path:
    """A random checkpoint of a family that transformers does not have, by the names and shapes of our own model."""
    import json

    from safetensors.torch import save_file

    facts = family(model_type)
    own: dict[str, Any] = {**facts.defaults, **(facts.tiny or {})}
    settings: dict[str, Any] = {**_SIZES, **own, **overrides, "model_type": model_type}
    other: dict[str, str] = settings.pop("written", {})
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    config = describe(str(path / "config.json"), "dummy").config
    model: Any = build_model(model_type, config, BuildContext(Ops(), torch.float32, torch.device("meta")), 64)
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for name, shape in ((name, model.index.stored_shape(name)) for name in sorted(model.index.names())):
        wide, centre = (1.0 / shape[-1] ** 0.5, 0.0) if len(shape) > 1 else (0.2, float("norm" in name))
        for ours, theirs in other.items():
            name = name.replace(ours, theirs)
        tensors[name] = torch.randn(shape, generator=generator) * wide + centre
    save_file(tensors, path / "model.safetensors")
    write_tokenizer(path, settings["vocab_size"])
    return path


def _shifted(model_type: str) -> bool:
    """Whether its norms are stored as their distance from 1."""
    return "gemma" in model_type and not model_type.startswith(("gemma3n", "gemma4", "diffusion_gemma"))


def _filled(make: Callable[[], Any], seed: int, *, shifted: bool) -> Any:
    """A model with random weights, biases and norms too: one whose norms are all 1 hides mistakes."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = 1.0 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
            centre = 1.0 if parameter.ndim == 1 and name.lower().endswith("norm.weight") and not shifted else 0.0
            parameter.normal_(centre, wide)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "layer_scalar")):
                buffer.normal_(float(name.endswith("layer_scalar")), 0.2)
    return model


def _model(model_type: str, overrides: dict[str, Any], head: str) -> Any:
    import transformers

    tiny = family(model_type).tiny if model_type in FAMILIES.names() else None
    if tiny is None:
        raise ValueError(f"no tiny checkpoint for {model_type!r}; known: {', '.join(families())}")
    around = overrides.get("around", tiny.get("around"))
    settings = {**_SIZES, **tiny, **overrides, "around": None}
    settings = {key: value for key, value in settings.items() if value is not None}
    if model_type == "diffusion_gemma":
        return _diffusion_gemma(settings)
    if around is None:
        known = model_type if model_type in transformers.CONFIG_MAPPING else model_type.replace("_", "-")
        config = transformers.AutoConfig.for_model(known, **settings)
        if head or family(model_type).encoder is not None:
            suffix = "" if head in ("", "Model") else head
            return getattr(transformers, f"AutoModel{suffix}").from_config(config).eval()
        if family(model_type).audio is not None:
            return transformers.AutoModelForSpeechSeq2Seq.from_config(config).eval()
        if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            return transformers.AutoModelForCausalLM.from_config(config).eval()
        # A class that the table of its kind lacks.
        return getattr(transformers, type(config).__name__.replace("Config", "ForCausalLM"))(config).eval()
    config = transformers.AutoConfig.for_model(model_type, text_config=settings, **around)
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText.from_config(config).eval()
    return transformers.AutoModelForMultimodalLM.from_config(config).eval()


def _diffusion_gemma(settings: dict[str, Any]) -> Any:
    """It has a tower whatever its config says."""
    import transformers

    canvas = settings.pop("canvas_length")
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    config = transformers.DiffusionGemmaConfig(
        text_config=settings, vision_config=vision, canvas_length=canvas, boi_token_id=4, eoi_token_id=5,
        image_token_id=6,
    )  # fmt: skip
    return transformers.DiffusionGemmaForBlockDiffusion(config).eval()


def write_tokenizer(path: Path, vocab_size: int = VOCAB, *, takes: tuple[str, ...] = ()) -> None:
    """A byte-level BPE tokenizer trained on CORPUS, with a chat template, as Hugging Face files. `takes`: media."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=min(vocab_size, VOCAB),
        special_tokens=SPECIAL + _places(takes),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[3]
    )
    fast.chat_template = _template(takes)
    fast.save_pretrained(path)


def _places(takes: tuple[str, ...]) -> list[str]:
    return HEARING if "audio" in takes else WATCHING if "video" in takes else SEEING if takes else []


def _template(takes: tuple[str, ...]) -> str:
    if not takes:
        return CHAT_TEMPLATE
    heard = "{% elif part['type'] == 'audio' %}<sound>" if "audio" in takes else ""
    return SEEING_TEMPLATE.replace(WATCHED, (WATCHED if "video" in takes else "") + heard)


def tiny_gguf(
    source: Path, target: Path, kind: str = "F32", part: int = 0, *, whole_latent: bool = False, **metadata: Any
) -> Path:
    """Convert a `tiny_checkpoint` to GGUF, as llama.cpp's converter lays it out.

    Args:
        source: the checkpoint's directory.
        target: the file to write.
        kind: GGUF type of the matrices; a matrix whose rows do not fill its blocks is stored as F32.
        part: tensors of a part; 0: all in one file.
        whole_latent: `kv_b_proj` of latent attention in one, as older converters left it.
        metadata: further keys, with `__` for `.`.

    Returns:
        `target`, or the first of its parts. Needs `gguf` and `transformers`.
    """
    import json

    import gguf
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    facts, spelling = written(config["model_type"]), family(config["model_type"].replace("-", "_")).spelling
    config |= {usual: config[theirs] for usual, theirs in spelling.items() if theirs in config}
    if config["model_type"] == "gpt2":
        config["intermediate_size"] = config.get("n_inner") or 4 * config["hidden_size"]
    config.setdefault("num_hidden_layers", len(config.get("layers_block_type") or ()))
    arch = architecture(config, facts.architecture)
    writer = gguf.GGUFWriter(str(target), arch, split_max_tensors=part)
    write_metadata(writer, config)
    _write_metadata(writer, config, facts)
    _write_vocabulary(writer, source)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        adders: dict[type, Any] = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        adders |= {bool: writer.add_bool, list: writer.add_array}
        adders[type(value)](name, value)
    wanted = gguf.GGMLQuantizationType[kind]
    kind_of = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    # Of an architecture that is younger than the package: the names of one with the same tensors.
    names = gguf.get_tensor_name_map(kind_of.get(arch, kind_of["glm-dsa"]), config["num_hidden_layers"])
    for file in sorted(source.glob("*.safetensors")):
        stored_as = _stacked(prepared(write_numbers(writer, load_file(file), config), config))
        if not whole_latent:
            stored_as = {
                k: v for name, values in stored_as.items() for k, v in _split_latent(name, values, config).items()
            }
        for name, values in stored_as.items():
            rows = _as_converted(name, np.asarray(values, np.float32), config, facts)
            block = gguf.GGML_QUANT_SIZES[wanted][0]
            # The router decides by small differences: converters keep it as it is.
            fits = rows.ndim > 1 and rows.shape[-1] % block == 0 and not name.endswith("mlp.gate.weight")
            raw_dtype = wanted if fits else gguf.GGMLQuantizationType.F32
            stored = rows if raw_dtype == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(rows, raw_dtype)
            writer.add_tensor(_renamed(name, names), stored, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}-00001-of-*.gguf"))[0] if part else target


def _renamed(name: str, names: Any) -> Any:
    if name.startswith("blk."):  # the converter names it itself
        return name
    known = name.replace("e_score_correction_bias", "e_score_correction.bias")
    known = known.replace("_proj_bias", "_proj.bias").replace(".sinks", ".sinks.weight")
    known = known.replace("attention_sink_bias", "attention_sink_bias.weight")
    return names.get_name(known, try_suffixes=(".weight", ".bias"))


def written(model_type: str) -> GGUFFacts:
    """The facts of the architecture that converters write for a family."""
    model_type = model_type.replace("-", "_")
    facts = family(family(model_type).gguf_family or model_type).gguf
    other = gguf_families().get(facts.written_as) if facts is not None else None
    facts = other.gguf if other is not None else facts
    if facts is None:
        raise ValueError(f"no GGUF files of {model_type!r} are known")
    return facts


def _write_metadata(writer: Any, config: dict[str, Any], facts: GGUFFacts) -> None:
    written = {key for part in writer.kv_data for key in part}
    arch = writer.arch

    def add(name: str, value: Any) -> None:
        """What has not been said yet."""
        if f"{arch}.{name}" not in written:
            written.add(f"{arch}.{name}")
            adders: dict[type, Any] = {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
            (writer.add_array if isinstance(value, list) else adders[type(value)])(f"{arch}.{name}", value)

    writer.add_name("Tiny")
    drafting = config.get("num_nextn_predict_layers") or 0 if "num_nextn_predict_layers" in facts.keys else 0
    add("block_count", config["num_hidden_layers"] + drafting)
    add("context_length", config.get("max_position_embeddings") or 2048)
    add("embedding_length", config["hidden_size"])
    heads = config.get("num_attention_heads") or 0
    recurrent = config["model_type"] in MAMBA1 + MAMBA2
    if heads:
        inner = inner_size(config) if "block_auto_adjust_ff_dim" in config else config.get("intermediate_size") or 0
        hybrid = config["model_type"] == "granitemoehybrid" and not config["num_local_experts"]
        add("feed_forward_length", config["shared_intermediate_size"] if hybrid else inner)
    else:
        add("feed_forward_length", 0)
    add("attention.head_count", heads)
    if heads:
        _write_attention(writer, config, facts, add)
    eps = config.get("rms_norm_eps", config.get("norm_eps", config.get("layer_norm_epsilon") if recurrent else None))
    if eps is not None:
        add("attention.layer_norm_rms_epsilon", eps)
    if config.get("sliding_window") and arch != "llama":
        add("attention.sliding_window", config["sliding_window"])
    for key, source in facts.keys.items():
        name = source if isinstance(source, str) else source[0]
        value = config.get(key, config.get("num_local_experts") if key == "num_experts" else None)
        if name not in KEYS.values() and type(value) in (float, int, bool):
            add(name, value)


def _write_attention(writer: Any, config: dict[str, Any], facts: GGUFFacts, add: Callable[[str, Any], None]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    kv_heads, kinds = config.get("num_key_value_heads") or heads, config.get("layer_types") or []
    attends = [kind != "conv" for kind in kinds] if "conv" in kinds else attending(config)
    if "kv_lora_rank" in facts.keys:
        _write_latent(writer, config)
    else:
        add("attention.head_count_kv", kv_heads if attends is None else [kv_heads * one for one in attends])
        add("attention.key_length", head_dim)
        add("attention.value_length", head_dim)
    add("rope.freq_base", float(whole.get("rope_theta", config.get("rope_theta", 10000.0))))
    share = whole.get("partial_rotary_factor", 1.0)
    if share < 1.0:
        add("rope.dimension_count", int(head_dim * share))
    if whole.get("rope_type") == "yarn":
        writer.add_string(f"{facts.architecture}.rope.scaling.type", "yarn")
        writer.add_rope_scaling_factor(whole["factor"])
        writer.add_rope_scaling_orig_ctx_len(whole["original_max_position_embeddings"])


def _write_latent(writer: Any, config: dict[str, Any]) -> None:
    """Sizes of latent attention in its absorbed form: one key head, which is the latent."""
    rope, rank, attends = config["qk_rope_head_dim"], config["kv_lora_rank"], attending(config)
    writer.add_head_count_kv(1 if attends is None else [int(one) for one in attends])
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    grown = (config.get("rope_parameters") or {}).get("mscale_all_dim")
    if grown:
        writer.add_rope_scaling_yarn_log_mul(0.1 * grown)


def _split_latent(name: str, values: Any, config: dict[str, Any]) -> dict[str, Any]:
    """A tensor as today's converters store it: what makes keys and values in two, the one that makes keys turned."""
    if not name.endswith(".kv_b_proj.weight"):
        return {name: values}
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    each = values.reshape(heads, -1, values.shape[-1])
    halves = {"k_b_proj": np.ascontiguousarray(each[:, :nope].swapaxes(1, 2)), "v_b_proj": each[:, nope:].copy()}
    return {name.replace("kv_b_proj", half): part for half, part in halves.items()}


def _write_vocabulary(writer: Any, source: Path) -> None:
    import json

    state = json.loads((source / "tokenizer.json").read_text())
    vocabulary = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def _stacked(tensors: dict[str, Any]) -> dict[str, Any]:
    """Experts' matrices of one layer and projection as one array [experts, out, in], the rest as it is."""
    import re

    found: dict[str, Any] = {}
    experts: dict[str, dict[int, Any]] = {}
    for name, values in tensors.items():
        if name.endswith("input_linear.weight"):  # Granite's gate and up
            block = name.removesuffix("input_linear.weight").replace("block_sparse_moe.", "mlp.experts.")
            block = block.replace("shared_mlp.", "mlp.shared_mlp.")
            for part, half in zip(("gate_proj", "up_proj"), np.split(values, 2, axis=-2), strict=True):
                found[f"{block}{part}.weight"] = half
            continue
        if ".experts.gate_up_proj" in name or name.endswith(".experts.down_proj"):  # gpt-oss
            turned = values if name.endswith("_bias") else np.ascontiguousarray(values.swapaxes(-1, -2))
            kind, block = (".bias" if name.endswith("_bias") else ".weight"), name.rpartition(".")[0]
            parts = {"gate_proj": turned[:, ::2], "up_proj": turned[:, 1::2]}
            parts = parts if "gate_up" in name else {"down_proj": turned}
            found.update({f"{block}.{part}{kind}": half for part, half in parts.items()})
            continue
        match = re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name)
        if match:
            experts.setdefault(match[1] + match[3], {})[int(match[2])] = values
        else:
            found[name] = values
    for name, parts in experts.items():
        found[name] = np.stack([parts[number] for number in range(len(parts))])
    return found


def _as_converted(name: str, values: Any, config: dict[str, Any], facts: GGUFFacts) -> Any:
    """What the converter does to a tensor: rows of q and k for neighbouring pairs, norms with their shift added."""
    part = name.split(".")[-2]
    if part in facts.turned:
        heads = config["num_attention_heads"] if part == "q_proj" else config["num_key_value_heads"]
        values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if name.endswith("conv.conv.weight"):
        values = values.squeeze(1)
    if config["model_type"] == "gpt2" and values.ndim == 2 and part.startswith("c_"):
        values = values.T
    if part == "moe_statics":
        values = values.reshape(-1)
    if facts.norm_shift and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        values = values + facts.norm_shift
    return np.ascontiguousarray(values)
