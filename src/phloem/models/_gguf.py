"""The tensors of a GGUF file by the names that a checkpoint of Hugging Face would give them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

import torch

from phloem.checkpoint.families import family
from phloem.core.errors import ModelLoadError
from phloem.models._sources import FormedSource, GGUFSource, SplitLatentSource, TensorSource

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phloem.checkpoint.describe import Checkpoint
    from phloem.checkpoint.gguf_reader import GGUFTensor
    from phloem.layers.weight import Weight
    from phloem.quant._report import Report
    from phloem.quant._source import Source

# Names in a layer that most families share; a family's GGUF facts (`names`) say what differs. `{}`: an expert's number.
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.{}.gate_proj": "ffn_gate_exps",
    "mlp.experts.{}.up_proj": "ffn_up_exps",
    "mlp.experts.{}.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.norm.bias": "output_norm.bias",
    "model.final_layernorm.weight": "output_norm.weight",
    "model.norm_f.weight": "output_norm.weight",
    "model.final_layernorm.bias": "output_norm.bias",
    "lm_head.bias": "output.bias",
    "model.embed_positions.weight": "position_embd.weight",
    "model.embedding_norm.weight": "token_embd_norm.weight",
}
# Of recurrent layers, whose block has any name.
RECURRENT = {
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "x_proj": "ssm_x",
    "dt_proj": "ssm_dt",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "norm": "ssm_norm",
    "dt_layernorm": "ssm_dt_norm",
    "b_layernorm": "ssm_b_norm",
    "c_layernorm": "ssm_c_norm",
    "out_proj": "ssm_out",
}
_LAYER = re.compile(r"(?:model\.layers|encoder\.layer|layers)\.(\d+)\.(.+?)(\.weight|\.bias)?")
# Experts' gate and up, which some converters leave in one tensor, gate first.
_BOTH = re.compile(r"(?<=\.)ffn_(gate|up)_exps(?=\.)")
# Queries, keys and values, which some leave in one tensor, in this order.
_THREE = re.compile(r"(?<=\.)attn_([qkv])(?=\.(?:weight|bias)$)")
_EXPERT = re.compile(r"(?<=\.)\d+(?=\.)")


def gguf_name(name: str, renamed: Mapping[str, str]) -> tuple[str, int | None]:
    """A checkpoint tensor's name in a GGUF file, and which expert it is of the stacked tensor of that name."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return _stacked(name, {**_OUTER_NAMES, **renamed}) or (name, None)
    number, inner, kind = match.groups()
    block, _, leaf = inner.rpartition(".")
    recurrent = {inner: RECURRENT[leaf]} if block and leaf in RECURRENT else {}
    if kind and inner + kind in renamed:  # the file leaves out the kind
        return f"blk.{number}.{renamed[inner + kind]}", None
    stored, expert = _stacked(inner, {**_NAMES, **recurrent, **renamed}) or (inner, None)
    return f"blk.{number}.{stored}{kind or ''}", expert


def _stacked(name: str, names: Mapping[str, str]) -> tuple[str, int | None] | None:
    """The name in the file, perhaps of a tensor in which several are stacked, and which of them; None: not known."""
    if name in names:
        return names[name], None
    number = _EXPERT.search(name)
    found = number and names.get(name[: number.start()] + "{}" + name[number.end() :])
    return (found, int(number[0])) if number and found else None


def gguf_sources(
    checkpoint: Checkpoint, slots: Mapping[str, Iterable[tuple[Weight, int]]], report: Report | None = None
) -> tuple[dict[str, Source], list[str]]:
    """Every tensor of a GGUF file by our name, and the names in it that the model does not use."""
    assert checkpoint.gguf is not None
    facts = family(checkpoint.model_type).gguf
    if facts is None:
        raise ModelLoadError(f"{checkpoint.path}: GGUF files of {checkpoint.model_type} are not known")
    tensors = checkpoint.gguf.tensors
    heads = checkpoint.config.get("num_attention_heads") or 0
    kv_heads = checkpoint.config.get("num_key_value_heads") or heads
    found: dict[str, Source] = {}
    used = {"rope_freqs.weight", *_drafting(checkpoint)}
    places = {name: gguf_name(name, facts.names) for name in slots}
    pieces = Counter(stored for stored, _ in places.values())
    for name, (stored, piece) in places.items():
        joined = stored if stored in tensors else _THREE.sub("attn_qkv", _BOTH.sub("ffn_gate_up_exps", stored))
        used.add(joined)
        if joined in tensors:
            weight, number = next(iter(slots[name]))
            part = name.split(".")[-2]
            turned = (heads if part.startswith("q") else kv_heads) if part in facts.turned else 0
            tensor = tensors[joined]
            if piece is not None:
                tensor = _piece_of(tensor, piece, _pieces(weight) or pieces[stored], checkpoint)
            if joined != stored:
                tensor = _share_of(tensor, stored, places, slots, checkpoint)
            kind = "dense" if tensor.kind in ("F32", "F64") else tensor.kind
            # The converter has already added the shift to the norms that have one.
            shifted, decay = weight.role == "norm", name.endswith(".A_log")
            shape = _form(tensor, weight, number, checkpoint)
            if shape != tensor.shape or decay:
                found[name] = FormedSource(name, shape, "dense", shifted, tensor=tensor, decay=decay)
                continue
            found[name] = GGUFSource(name, tensor.shape, kind, shifted, tensor=tensor, heads=turned, report=report)
        elif name.endswith(".kv_b_proj.weight"):
            keys, values = (stored.replace("attn_kv_b", half) for half in ("attn_k_b", "attn_v_b"))
            if keys in tensors and values in tensors:
                found[name] = _joined(name, tensors[keys], tensors[values], heads, checkpoint)
    found |= _told(checkpoint, facts.numbers, slots)
    # Some files have both forms of what makes keys and values: the one is enough.
    used |= {
        name
        for name in tensors
        if re.fullmatch(r"blk\.\d+\.attn_[kv]_b\.weight", name) and "attn_kv_b" in facts.names.values()
    }
    return found, sorted(set(tensors) - used - _of_others(checkpoint))


def _told(checkpoint: Checkpoint, numbers: Mapping[str, str], slots: Iterable[str]) -> dict[str, Source]:
    """Tensors of one number, which the metadata has for each layer."""
    assert checkpoint.gguf is not None
    count, found = checkpoint.config["num_hidden_layers"], dict[str, "Source"]()
    for name in slots if numbers else ():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        key = numbers.get(match[2]) if match else None
        if match is None or key is None:
            continue
        value, where = checkpoint.gguf.metadata.get(key), f"{checkpoint.path}: {key}"
        if value is None:
            raise ModelLoadError(f"{checkpoint.path}: its metadata has no {key}")
        values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value] * count
        if len(values) != count:
            raise ModelLoadError(f"{where} has {len(values)} numbers for {count} layers")
        number = values[int(match[1])]
        if isinstance(number, str | bool) or not math.isfinite(number):
            raise ModelLoadError(f"{where} holds {number!r}, expected numbers")
        found[name] = TensorSource(name, (1,), tensor=torch.tensor([float(number)]))
    return found


def _joined(name: str, keys: GGUFTensor, values: GGUFTensor, heads: int, checkpoint: Checkpoint) -> SplitLatentSource:
    """`kv_b_proj` of its two halves by head: keys [heads, latent, key], values [heads, value, latent]."""
    fits = len(keys.shape) == len(values.shape) == 3 and keys.shape[0] == values.shape[0] == heads
    if not fits or keys.shape[1] != values.shape[2]:
        raise ModelLoadError(
            f"{checkpoint.path}: {keys.name} is {list(keys.shape)} and {values.name} {list(values.shape)}, expected "
            f"[{heads}, latent, key] and [{heads}, value, latent]"
        )
    rank, size = keys.shape[1], keys.shape[2] + values.shape[1]
    flat = [
        GGUFSource(half.name, (half.shape[0] * half.shape[1], half.shape[2]), half.kind, tensor=half)
        for half in (keys, values)
    ]
    return SplitLatentSource(name, (heads * size, rank), keys=flat[0], values=flat[1], heads=heads)


def _of_others(checkpoint: Checkpoint) -> set[str]:
    """Tensors that layers have which read another one's keys and values, and do not use."""
    assert checkpoint.gguf is not None
    last, shared = checkpoint.config["num_hidden_layers"], int(checkpoint.config.get("num_kv_shared_layers") or 0)
    names = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
    return {f"blk.{number}.{name}" for number in range(last - shared, last) for name in names}


def _drafting(checkpoint: Checkpoint) -> set[str]:
    """Tensors of layers behind the last one, where the file says that there are any: they draft."""
    assert checkpoint.gguf is not None
    first, more = checkpoint.config["num_hidden_layers"], int(checkpoint.config.get("num_nextn_predict_layers") or 0)
    behind = tuple(f"blk.{number}." for number in range(first, first + more))
    return {name for name in checkpoint.gguf.tensors if behind and name.startswith(behind)}


def _pieces(weight: Weight) -> int:
    """How many experts are stacked where this slot's lie; 0: it has none."""
    return weight.experts + len(weight.elsewhere) * weight.experts // max(1, len(weight.names))


def _piece_of(stacked: GGUFTensor, piece: int, count: int, checkpoint: Checkpoint) -> GGUFTensor:
    if len(stacked.shape) != 3 or stacked.shape[0] != count:
        raise ModelLoadError(
            f"{checkpoint.path}: {stacked.name} is {list(stacked.shape)}, expected {count} stacked matrices"
        )
    return stacked.part(piece)


def _share_of(
    joined: GGUFTensor,
    stored: str,
    places: Mapping[str, tuple[str, int | None]],
    slots: Mapping[str, Iterable[tuple[Weight, int]]],
    checkpoint: Checkpoint,
) -> GGUFTensor:
    """What is called `stored` elsewhere, of a tensor in which it lies beside others: gate of gate and up, or keys."""
    part = _THREE.search(stored)
    try:
        if part is None:
            return joined.half("ffn_up_exps" in stored)
        siblings = {letter: stored[: part.start(1)] + letter + stored[part.end(1) :] for letter in "qkv"}
        named = {found: name for name, (found, _) in places.items() if found in siblings.values()}
        sizes = {letter: _rows(slots, named.get(found)) for letter, found in siblings.items()}
        if sum(sizes.values()) != joined.shape[0]:
            said = " + ".join(str(size) for size in sizes.values())
            raise ModelLoadError(f"{checkpoint.path}: {joined.name} is {list(joined.shape)}, expected {said} rows")
        first = sum(size for letter, size in sizes.items() if "qkv".index(letter) < "qkv".index(part[1]))
        return joined.cut(first, sizes[part[1]])
    except IndexError as error:
        wanted = ": expected gate and up" if part is None else ""
        raise ModelLoadError(f"{checkpoint.path}: {error}{wanted}") from None


def _rows(slots: Mapping[str, Iterable[tuple[Weight, int]]], name: str | None) -> int:
    """How many rows a tensor of ours has; 0: the model has none of that name."""
    if name is None:
        return 0
    weight, number = next(iter(slots[name]))
    return weight.shapes[number][0]


def _form(tensor: GGUFTensor, weight: Weight, number: int, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape that a vector's slot gives to its numbers: files have some in other axes."""
    wanted = weight.shapes[number]
    if weight.role != "norm":
        return tensor.shape
    axes = len(tensor.shape)
    wide = [size for size in tensor.shape if axes < 3 or size > 1]
    if len(wanted) == 3 and len(wide) == 2:  # filters, of which files leave out the axis of one, or have it twice
        return (wide[0], 1, wide[1])
    fits = prod(wanted) == prod(tensor.shape)
    if len(wanted) > 1:  # a table: numbers of another order are not its own
        fits = [size for size in wanted if size > 1] == [size for size in tensor.shape if size > 1]
    elif sum(size > 1 for size in tensor.shape) > 1:  # a vector by groups, one in each row
        assert checkpoint.gguf is not None
        metadata = checkpoint.gguf.metadata
        fits = fits and tensor.shape[0] == metadata.get(f"{metadata.get('general.architecture')}.ssm.group_count")
    return wanted if len(weight.names) == 1 and fits else tensor.shape
