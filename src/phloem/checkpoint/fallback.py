"""Models without a file in models/: whether transformers' own code can be run in their place, told without running it.

What classes there are is read from transformers' source text, so that the process that checks a model path imports
neither it nor torch. What only the built model shows is refused where it is built (`models/_transformers.py`).
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Sequence

Impl = Literal["phloem", "transformers"]
_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_FLAG = "_supports_attention_backend = True"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_UNKNOWN_LENGTH = 2048
_ATTENDING = ("full_attention", "sliding_attention", "attention", "sliding_window", "global", "local")
# The factors of these follow the longest text of a step, so that one request would turn another's keys.
_BY_LENGTH = ("dynamic", "longrope")


# Families whose towers are transformers' own before a language model of ours: which processor of ours reads pictures as
# theirs does (`multimodal/`), and what stands for a picture's tokens where config.json says nothing.
TOWERS: dict[str, tuple[str, int]] = {
    "aya_vision": ("aya_vision", 255036),
    "deepseek_vl": ("deepseek_vl", 100015),
    "vipllava": ("llava", 32000),
}


@dataclass(frozen=True)
class Seen:
    """What sees for a language model. `config`: the whole config.json, with `image_token_id`."""

    model_type: str
    processor: str
    config: dict[str, Any]

    @property
    def token(self) -> int:
        """The placeholder of a picture's tokens."""
        return int(self.config["image_token_id"])


def tower(whole: dict[str, Any], model_type: str) -> Seen | None:
    """The tower of a checkpoint whose language model alone has a file here; None: nobody here can read its pictures."""
    if model_type not in TOWERS or not causal_classes() or not isinstance(whole.get("vision_config"), dict):
        return None
    processor, usual = TOWERS[model_type]
    token = whole.get("image_token_id", whole.get("image_token_index", usual))
    return Seen(model_type, processor, {**whole, "image_token_id": token}) if isinstance(token, int) else None


@dataclass(frozen=True)
class Chosen:
    """Whose code runs a model, and why."""

    impl: Impl = "phloem"
    reason: str = ""


def _sources() -> Path | None:
    """The folder of transformers' models."""
    spec = importlib.util.find_spec("transformers")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return Path(folder) / "models"
    return None


@cache
def causal_classes() -> dict[str, str]:
    """model_type -> the class that generates, of the installed transformers; {} where there is none."""
    folder = _sources()
    if folder is not None:
        path = folder / "auto" / "modeling_auto.py"
        for node in ast.parse(path.read_text("utf-8")).body if path.exists() else []:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(node, ast.Assign) and isinstance(target, ast.Name) and target.id == _TABLE:
                pairs = node.value.args[0] if isinstance(node.value, ast.Call) else node.value
                return dict(cast("list[tuple[str, str]]", ast.literal_eval(pairs)))
    return {}


def version() -> str:
    """Of transformers; "": it is not installed."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return ""


def choose(model_type: str, own: Sequence[str], asked: str, whole: dict[str, Any], where: str, trust: bool) -> Chosen:
    """Which code runs a model.

    Args:
        model_type: as our files are called, with underscores.
        own: the families that have a file.
        asked: of `--model-impl`: auto, phloem or transformers.
        whole: config.json.
        where: for messages.
        trust: whether code that comes with the checkpoint may be run.

    Raises:
        ModelLoadError: neither can, or the one that is asked for cannot; with the reason.
    """
    unknown, known = f"{where}: unknown model type {model_type!r}", f"known: {', '.join(own)}"
    if asked != "transformers" and model_type in own:
        return Chosen("phloem", f"models/{model_type}.py{', as asked' if asked == 'phloem' else ''}")
    if asked == "phloem":
        raise ModelLoadError(f"{unknown} (model_impl is phloem); {known}", param="model_impl")
    brought = _brought_code(whole)
    classes = causal_classes()
    name = classes.get(model_type) or classes.get(model_type.replace("_", "-"))
    if not classes:
        raise ModelLoadError(f"{unknown}; others need the package transformers, which is not installed; {known}")
    if name is None and not (brought and trust):
        why = "the checkpoint brings code of its own, which is run with --trust-remote-code alone"
        raise ModelLoadError(
            f"{unknown}; {why if brought else f'transformers {version()} has no class of it for text'}; {known}"
        )
    why = refusal(whole) or (None if name is None else _keeps_its_attention(model_type))
    if why is not None:
        first = unknown if model_type not in own else f"{where}: model_impl is transformers"
        last = f"; {known}" if model_type not in own else ""
        raise ModelLoadError(
            f"{first}; transformers' {name or 'code'} cannot be served here: {why}{last}", param="model_impl"
        )
    reason = "as asked" if asked == "transformers" else f"no file models/{model_type}.py"
    return Chosen("transformers", f"{reason}: {name or brought} of {'the checkpoint' if name is None else version()}")


def _brought_code(whole: dict[str, Any]) -> str:
    """The class for text in a checkpoint's own code; "": it brings none."""
    found = whole.get("auto_map")
    return str(cast("dict[str, Any]", found).get("AutoModelForCausalLM") or "") if isinstance(found, dict) else ""


def refusal(whole: dict[str, Any]) -> str | None:
    """Why a configuration cannot be served by transformers' code over our pages, or None."""
    names = whole.get("architectures") or []
    if names and not str(names[0]).endswith(("ForCausalLM", "LMHeadModel")):
        return f"it is a {names[0]}; only models for text that generate (*ForCausalLM) are"
    if whole.get("is_encoder_decoder"):
        return "it has an encoder beside its decoder"
    text = whole.get("text_config")
    config = {**whole, **cast("dict[str, Any]", text)} if isinstance(text, dict) else whole
    kinds = config.get("layer_types") or config.get("layers_block_type") or []
    others = sorted({str(kind) for kind in kinds} - set(_ATTENDING))
    if others:
        return f"its layers keep more than keys and values, or attend in another way: {', '.join(others)}"
    for key in ("rope_parameters", "rope_scaling"):
        kind = _by_length(config.get(key))
        if kind:
            return f"{key} {kind!r} turns all texts of a step by the longest one"
    return None


def _keeps_its_attention(model_type: str) -> str | None:
    """Why no other attention can be put into a family's classes, or None: there can, or it shows when one is built."""
    folder = _sources()
    path = folder / model_type / f"modeling_{model_type}.py" if folder is not None else None
    if path is None or not path.exists() or _FLAG in path.read_text("utf-8"):
        return None
    return "its classes take no attention from elsewhere (AttentionInterface)"


def _by_length(rope: Any) -> str:
    if not isinstance(rope, dict):
        return ""
    found = cast("dict[str, Any]", rope)
    kind = found.get("rope_type") or found.get("type")
    if kind in _BY_LENGTH:
        return str(kind)
    return next((inner for value in found.values() if (inner := _by_length(value))), "")


def settings(text: dict[str, Any], where: str) -> dict[str, Any]:
    """What everybody here reads of config.json, of a family whose spelling nobody knows.

    Raises:
        ModelLoadError: no size of the vocabulary.
    """
    found = dict(text)
    found.setdefault("dtype", found.get("torch_dtype"))
    length = next((found[key] for key in _POSITIONS if isinstance(found.get(key), int)), _UNKNOWN_LENGTH)
    found["max_position_embeddings"] = length
    if not isinstance(found.get("vocab_size"), int) or found["vocab_size"] <= 0:
        raise ModelLoadError(f"{where}: vocab_size is {found.get('vocab_size')!r}, expected a whole number above 0")
    return {key: value for key, value in found.items() if value is not None}
