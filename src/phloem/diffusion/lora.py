"""Adapters (LoRA) of models that draw: what a file says, in the names of our transformer's layers.

diffusers' own readers translate what trainers write (kohya, ai-toolkit, xlabs, PEFT); what they give is checked against
the layers. A layer's output gains scale * (x A^T) B^T.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.quant._source import LARGEST

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

PATH = "lora_path"
PREFIX = "transformer."
NOT_READ = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}
MOST_NAMED = 3
MOST_REPEATS = 2  # in a pattern for names of modules, so that no file can keep the engine matching


@dataclass(frozen=True)
class Layer:
    """`a_RI`, `b_OR`: rank, inputs and outputs of the layer. `bias_O`: what the layer gains without any input."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    bias_O: Tensor | None = None

    def at(self, device: torch.device, dtype: torch.dtype) -> Layer:
        bias = None if self.bias_O is None else self.bias_O.to(device, dtype)
        return Layer(self.a_RI.to(device, dtype), self.b_OR.to(device, dtype), self.scale, bias)

    def added(self, x: Tensor, weight: float) -> Tensor:
        made = torch.nn.functional.linear(x, self.a_RI)
        return torch.nn.functional.linear(made, self.b_OR, self.bias_O) * (self.scale * weight)


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter in memory; requests that have begun with it hold it until they end."""

    name: str
    path: str
    layers: dict[str, Layer]

    def at(self, device: torch.device, dtype: torch.dtype) -> Lora:
        """The same where it is used."""
        return Lora(self.name, self.path, {name: layer.at(device, dtype) for name, layer in self.layers.items()})

    @property
    def nbytes(self) -> int:
        return sum(layer.a_RI.nbytes + layer.b_OR.nbytes for layer in self.layers.values())


Worn = tuple[tuple[Lora, float], ...]  # of a row, with how much of each


def read(name: str, path: str, pipe: Any, transformer: torch.nn.Module) -> Lora:
    """An adapter from a safetensors file, or from a folder that has one.

    Raises:
        BadRequest: there is no such file, it is no adapter, or not of this model.
    """
    file = _file(path)
    state, metadata, alphas = _converted(file, pipe)
    state = _of_transformer(state)
    names = sorted({key.split(".lora_")[0] for key in state})
    try:
        scale_of = _scales(state, metadata, alphas)
        layers = {one: _layer(one, state, scale_of(one), transformer) for one in names}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _refused(f"{file.name} has settings that make no sense: {type(error).__name__}: {error!s:.200}") from None
    return Lora(name, path, layers)


def _refused(text: str) -> BadRequest:
    return BadRequest(f"{PATH}: {text}", param=PATH)


def _file(path: str) -> Path:
    try:
        found = Path(path).expanduser()
        if found.is_dir():
            inside = sorted(found.glob("*.safetensors"))
            if len(inside) != 1:
                raise _refused(f"{path} has {len(inside)} safetensors files, one is needed: name the file")
            found = inside[0]
        there = found.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home that nobody has, no permission
        raise _refused(f"{path:.200} cannot be looked up: {error!s:.200}") from None
    if not there:
        raise _refused(f"there is no {path:.200}")
    if found.suffix != ".safetensors":
        raise _refused(f"{path} is no safetensors file")
    return found


def _converted(file: Path, pipe: Any) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any] | None]:
    """(tensors by diffusers' names; what PEFT's settings were; alphas), by the reader of this kind of pipeline."""
    import inspect

    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from safetensors import SafetensorError, safe_open

    reader = getattr(pipe, "lora_state_dict", None)
    if reader is None:
        raise _refused(f"diffusers has no reader of adapters for {type(pipe).__name__}")
    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise _refused(f"{file.name} cannot be read: {error!s:.200}") from None
    for mark, kind in NOT_READ.items():
        if any(mark in key for key in keys):
            raise _refused(f"{file.name} is {kind}, only LoRA is served")
    options: dict[str, Any] = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
    options |= {"return_lora_metadata": True}
    with_alphas = "return_alphas" in inspect.signature(reader).parameters
    if with_alphas:
        options["return_alphas"] = True
    try:
        found = reader(str(file.parent), **options)
        state, *more = found
        if state and "lora_A" not in next(iter(state)):
            state = convert_unet_state_dict_to_peft(state)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, OSError) as error:
        raise _refused(
            f"{file.name} is no adapter that diffusers reads: {type(error).__name__}: {error!s:.200}"
        ) from None
    alphas, metadata = (more[0], more[1]) if with_alphas else (None, more[0])
    return state, metadata, alphas or None


def _of_transformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of its modules. Raises BadRequest for what is of other parts."""
    if any(key.startswith("text_encoder") for key in state):
        raise _refused("the adapter changes a text encoder: only the transformer's layers take adapters")
    kept = re.compile(r"\.lora_[AB]\.(weight|bias)$")
    others = [key for key in state if not key.startswith(PREFIX) or not kept.search(key)]
    if others or not state:
        what = _listed(others) if others else "nothing"
        raise _refused(f"the adapter has {what}, expected matrices of the transformer")
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def _scales(
    state: dict[str, Tensor], metadata: dict[str, Any] | None, alphas: dict[str, Any] | None
) -> Callable[[str], float]:
    """alpha / rank of a module, as PEFT has it: settings may name modules by patterns."""
    from diffusers.utils.peft_utils import get_peft_kwargs

    ranks = {f"^{key}": value.shape[1] for key, value in state.items() if ".lora_B.weight" in key and value.ndim > 1}
    if not ranks:
        raise _refused("the adapter has no matrices")
    if metadata:
        settings = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    else:
        plain = {key.removeprefix(PREFIX): value for key, value in (alphas or {}).items()}
        settings = get_peft_kwargs(ranks, plain or None, state)
    if settings.get("use_dora"):
        raise _refused("the adapter is DoRA, only LoRA is served")

    patterns = [(_pattern(one), float(value)) for one, value in (settings.get("alpha_pattern") or {}).items()]

    def scale(module: str) -> float:
        rank = state[f"{module}.lora_A.weight"].shape[0] if f"{module}.lora_A.weight" in state else 0
        usual = settings.get("lora_alpha", rank)
        alpha = next((value for found, value in patterns if found.match(module)), None)
        alpha = float(usual) if alpha is None else alpha
        return alpha / max(1, rank) ** (0.5 if settings.get("use_rslora") else 1.0)

    return scale


def _pattern(text: str) -> re.Pattern[str]:
    """For the names of modules, as PEFT matches them. Raises BadRequest: it might be matched for ever, or is none."""
    repeats = re.findall(r"(?<!\\)[*+?{]", text)
    if len(repeats) > MOST_REPEATS or re.search(r"\)[*+?{]", text) or len(text) > 500:
        raise _refused(f"alpha_pattern {text!r:.100} is too involved: at most {MOST_REPEATS} repeats, none of a group")
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise _refused(f"alpha_pattern {text!r:.100} is no pattern: {error!s:.100}") from None


def _layer(name: str, state: dict[str, Tensor], scale: float, transformer: torch.nn.Module) -> Layer:
    """Raises BadRequest: the model has no such layer, or one of another size."""
    a, b = state.get(f"{name}.lora_A.weight"), state.get(f"{name}.lora_B.weight")
    if a is None or b is None or f"{name}.lora_A.bias" in state:
        raise _refused(f"{name} needs the two matrices lora_A and lora_B")
    try:
        linear = transformer.get_submodule(name)
    except AttributeError:
        raise _refused(f"this model has no layer {name}") from None
    if not isinstance(linear, torch.nn.Linear):
        raise _refused(f"{name} is a {type(linear).__name__}: only linear layers take adapters")
    inputs, outputs = linear.in_features, linear.out_features
    bias = state.get(f"{name}.lora_B.bias")
    fits = a.ndim == b.ndim == 2 and 0 < len(a) == b.shape[1] and a.shape[1] == inputs and b.shape[0] == outputs
    if not fits or (bias is not None and bias.shape != (outputs,)):
        raise _refused(
            f"{name} has matrices of {_size(a)} and {_size(b)}, this model's layer takes {inputs} and gives {outputs}"
        )
    given = [one for one in (a, b, bias) if one is not None]
    sane = all(one.is_floating_point() and bool((one.abs() <= LARGEST).all()) for one in given)  # NaN is not
    if not sane or not abs(scale) < 1e6:
        raise _refused(f"{name} has values that are no finite numbers, or beyond {LARGEST:g}")
    return Layer(a, b, scale, bias)


def _size(found: Tensor) -> str:
    return "x".join(map(str, found.shape))


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(f"{name:.80}" for name in names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
