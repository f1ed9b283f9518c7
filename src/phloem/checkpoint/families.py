"""What a family's file in models/ says of its checkpoints, read and not run.

The file has these facts as literals at its top level: `DEFAULTS`, `SPELLING`, `NEEDS`, `GGUF`, `TINY`, `VARIANTS`,
`ENCODER`, `VISION`, `AUDIO`, `DIFFUSION`, `IGNORED`, `GGUF_FAMILY`. They are taken from the source text, so that the
process that checks a model path imports no layer and no torch, and this room none above it. A fact may also be
imported from another family's file.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from phloem.utils.registry import Registry

FAMILIES: Registry[Any] = Registry("phloem.models", "model type", "build")
FACTS = (
    *("DEFAULTS", "SPELLING", "NEEDS", "GGUF", "TINY", "VARIANTS", "ENCODER", "VISION", "AUDIO"),
    *("DIFFUSION", "IGNORED", "GGUF_FAMILY"),
)
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SPARSE, SIGMOID, NORMED = " with experts", " with sigmoid routing", " with normalised steps"
UNSCALED, GROWN, DENSE = " without multipliers", " with growing queries", " without experts"
MOST_LAYERS = 10_000
_FOLDER = Path(__file__).parents[1] / "models"
_BORROWS = re.compile(r"^from phloem\.models\.\w+ import (\([^)]*|[^(\n]*)\bGGUF\b", re.MULTILINE)


@dataclass(frozen=True)
class GGUFFacts:
    """How a family's checkpoints look in GGUF files, beyond what all families share (`gguf_config`, `models/_gguf`)."""

    architecture: str  # general.architecture
    hf_class: str  # the entry of config.json's `architectures`
    sparse: bool = False  # it serves those files of the architecture that say how many experts there are
    dense: bool = False  # it serves those files that say nothing of experts, of an architecture that has them
    sigmoid: bool = False  # it serves those files whose routers score by a sigmoid
    normed: bool = False  # it serves those files whose recurrent layers normalise what steps are made of
    unscaled: bool = False  # it serves those files whose metadata has no multiplier
    also: tuple[str, ...] = ()  # further architectures that are read in the same way
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)  # what no file of such an architecture says
    written_as: str = ""  # the architecture that today's converters write for it, if another
    # config.json key -> metadata key under the architecture's prefix, which must be there; or (that key, a default).
    keys: dict[str, str | tuple[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # what no file says
    layers_with: dict[str, str] = field(default_factory=dict)  # config.json key -> a tensor: the layers that have it
    flags: dict[str, str] = field(default_factory=dict)  # config.json key -> a tensor that some layer has, or none
    kinds: dict[str, dict[str, str]] = field(default_factory=dict)  # config.json key -> a layer's tensor -> its kind
    lists: dict[str, str] = field(default_factory=dict)  # config.json key -> metadata key of a number for each layer
    # config.json key -> a tensor that has so many rows, or (that tensor, the number where there is none).
    rows: dict[str, str | tuple[str, int]] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)  # the same without rows of zeros at its end, which are padding
    shares: dict[str, tuple[str, str]] = field(default_factory=dict)  # config.json key -> one metadata key by another
    names: dict[str, str] = field(default_factory=dict)  # our tensor name in a layer -> the file's; `{}`: experts
    numbers: dict[str, str] = field(default_factory=dict)  # our tensor in a layer -> metadata key of one number each
    unheeded: tuple[str, ...] = ()  # metadata keys that change nothing for texts
    turned: tuple[str, ...] = ()  # projections whose rows are stored for a rotation of neighbours
    norm_shift: float = 0.0  # what the converter adds to norms


@dataclass(frozen=True)
class Family:
    """A family's facts."""

    name: str
    defaults: dict[str, Any]  # of config.json keys that published checkpoints leave out
    spelling: dict[str, str]  # the usual key -> what the family's config.json calls it
    needs: tuple[str, ...]  # sizes that a config.json must have, by their usual keys
    gguf: GGUFFacts | None
    tiny: dict[str, Any] | None  # how testing/checkpoints.py builds one
    variants: dict[str, dict[str, Any]]  # more tiny checkpoints: what differs, by name
    # It does not generate: `padded_positions` (position 0 stands behind the padding's row), `pooling_key` (what
    # config.json calls the pooling of its classifier). None: a decoder.
    encoder: dict[str, Any] | None = None
    # It takes media: `processor` (a file in multimodal/), and for each kind (`image`, `video`, `audio`) the config.json
    # key of its placeholder.
    vision: dict[str, str] | None = None
    # It hears: what its config.json calls the number of mel `bands` and of the encoder's `states`. None: it does not.
    audio: dict[str, str] | None = None
    # It writes by diffusion: what its config.json calls the size of a `block` and the id of the `mask` token; `sees`
    # "whole": the whole text, not the blocks up to its own; `said` "before": a place's logits are those before it;
    # `fills` "renoise": canvases are drawn anew at every pass, and nothing is a mask.
    diffusion: dict[str, str] | None = None
    # Patterns of tensors, by their names in files, that the model does without: layers that draft, mostly.
    ignored: tuple[str, ...] = ()
    gguf_family: str = ""  # the family as which converters write it, so that its GGUF files are that one's


def facts_of(name: str) -> dict[str, Any]:
    """The literals of a family's file, by name. Raises ValueError for one that is not a literal."""
    found: dict[str, Any] = {}
    path = _FOLDER / f"{name}.py"
    for node in ast.parse(path.read_text("utf-8"), str(path)).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("phloem.models."):
            wanted = [alias for alias in node.names if (alias.asname or alias.name) in FACTS]
            if wanted:
                other = facts_of(node.module.rpartition(".")[2])
                found.update({alias.asname or alias.name: other[alias.name] for alias in wanted})
            continue
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id in FACTS:
            found[target.id] = ast.literal_eval(node.value)
    return found


@cache
def family(name: str) -> Family:
    """The facts of one family. Raises ConfigError for an unknown name, ValueError for a fact that is none."""
    FAMILIES.check(name)
    found = facts_of(name)
    gguf = found.get("GGUF")
    return Family(
        name=name,
        defaults=found.get("DEFAULTS", {}),
        spelling=found.get("SPELLING", {}),
        needs=found.get("NEEDS", SIZES),
        gguf=None if gguf is None else GGUFFacts(**gguf),
        tiny=found.get("TINY"),
        variants=found.get("VARIANTS", {}),
        encoder=found.get("ENCODER"),
        vision=found.get("VISION"),
        audio=found.get("AUDIO"),
        diffusion=found.get("DIFFUSION"),
        ignored=found.get("IGNORED", ()),
        gguf_family=found.get("GGUF_FAMILY", ""),
    )


def _may_know(name: str, architecture: str) -> bool:
    """Whether a family's GGUF facts can name an architecture: it stands in the file, or they are another file's."""
    text = (_FOLDER / f"{name}.py").read_text("utf-8")
    return f'"{architecture}"' in text or _BORROWS.search(text) is not None


def audio_of(name: str) -> dict[str, str] | None:
    """What a family that hears calls its sizes (`Family.audio`); None for others, and for models without a file."""
    return family(name).audio if name in FAMILIES.names() else None


@cache
def gguf_families(architecture: str | None = None) -> dict[str, Family]:
    """Families by GGUF architecture; one that serves some of another's files with `SPARSE` or `SIGMOID` behind it.

    `architecture`: of the others only some are there. Parsing all files takes a third of a second of every start.
    """
    names = FAMILIES.names()
    if architecture is not None:
        names = [name for name in names if _may_know(name, architecture)]
    found = [family(name) for name in names]
    facts = [(item, item.gguf) for item in found if item.gguf is not None]
    return {
        arch
        + SPARSE * own.sparse
        + DENSE * own.dense
        + SIGMOID * own.sigmoid
        + NORMED * own.normed
        + UNSCALED * own.unscaled: item
        for item, own in facts
        for arch in (own.architecture, *own.also)
    }
