"""DFlash drafters: a block of tokens in one pass, from features of the model's own states (`models/_dflash.py`).

Read are files of the original layout (`DFlashDraftModel`: `dflash_config` with `mask_token_id` and `target_layer_ids`,
which name layers by their outputs, from 0) and of vLLM's speculators (`speculators_model_type: dflash`:
`aux_hidden_state_layer_ids`, which count the layers before a state, and so are one more; perhaps a vocabulary of its
own). The model's embedding and head serve.

DSpark's files are read too (`Qwen3DSparkModel`, speculators' kind `dspark`): `markov_head.*` with a term of the token
before. Their `confidence_head`, which tells how many drafts to verify, is left out: measured acceptance tells that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.core.speculation import MOST_DRAFTS
from phloem.engine.drafts.drafting import Block, Loaded, extend
from phloem.models._common import layer_types
from phloem.models._dflash import DFlash, DFlashFacts, Sight
from phloem.models._draft import AuxTap, Shared
from phloem.speculation.drafters._base import Loader as Base
from phloem.speculation.drafters._files import (
    PARAM,
    Shapes,
    decoder_of,
    draft_of,
    head_context,
    ids_of,
    shapes_of,
    whole,
)

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.speculation import Wanted
    from phloem.layers.context import BuildContext
    from phloem.models import Model

BLOCK = 16  # places where a file of the original layout says nothing
# Parts of later drafters of this kind, by which their files are told.
_OTHERS = {
    "candidate_selector.": "DFlash 2",
    "attention_conv.": "DFlash 2",
    "correction_head": "Domino",
    "fusion_weights": "DFlare",
    "pre_fc_norms": "norms of each state",
}
# What `dflash_config` may say beside that: the last two keep the order of tokens, and so the likeliest of them.
_KNOWN = ("mask_token_id", "target_layer_ids", "block_size", "input_embedding_scale")
_KEEPS_ORDER = ("output_multiplier", "final_logit_softcapping")
_PLAIN = {"projector_type": "dflash", "shift_label": False}
_TERM = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
_COPIES = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight", "d2t", "t2d")


@dataclass(frozen=True)
class Said:
    """What a config.json says of a drafter. `layers`: of the model, by their inputs."""

    layers: tuple[int, ...]
    named: str  # how the file names them
    block: Block
    sights: tuple[Sight, ...]
    embed_scale: float


def read(config: dict[str, Any], where: str) -> Said:
    """Raises ConfigError for what no DFlash drafter is, or what is not run here."""
    kind = config.get("speculators_model_type")
    if kind not in (None, "dflash", "dspark"):
        raise ConfigError(f"{where}: a speculator of kind {kind}, not dflash or dspark", param=PARAM)
    said: Any = config.get("dflash_config") or {}
    if not isinstance(said, dict):
        raise ConfigError(f"{where}: dflash_config is {said!r:.60}, expected an object", param=PARAM)
    _check_known(config, said, where)
    found = {**{name: config[name] for name in _KNOWN if name in config}, **said}
    if kind is None:
        ids, named, before = found.get("target_layer_ids"), "target_layer_ids", 1
    else:
        ids, named, before = config.get("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids", 0
    if (
        not isinstance(ids, list)
        or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
        or not ids
    ):
        raise ConfigError(
            f"{where}: no {named}: not a DFlash drafter, or one that does not say what it reads", param=PARAM
        )
    mask, size = found.get("mask_token_id"), found.get("block_size", BLOCK)
    if not isinstance(mask, int) or isinstance(mask, bool):
        raise ConfigError(f"{where}: mask_token_id is {mask!r}, expected a token", param=PARAM)
    anchor = config.get("sample_from_anchor", kind is None and bool(config.get("markov_rank")))
    if kind == "dspark" and "sample_from_anchor" not in config:
        raise ConfigError(f"{where}: it does not say sample_from_anchor", param=PARAM)
    if config.get("markov_head_type", "vanilla") != "vanilla":
        raise ConfigError(f"{where}: markov_head_type {config['markov_head_type']!r}: vanilla is run", param=PARAM)
    anchor = bool(anchor)
    if not isinstance(size, int) or not 2 - anchor <= size <= MOST_DRAFTS + 1 - anchor:
        limits = f"{2 - anchor} to {MOST_DRAFTS + 1 - anchor}"
        raise ConfigError(f"{where}: block_size is {size!r}, expected {limits}", param=PARAM)
    scale = found.get("input_embedding_scale", 1.0)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < math.inf:
        raise ConfigError(f"{where}: input_embedding_scale is {scale!r}, expected a number above 0", param=PARAM)
    layers = tuple(one + before for one in ids)
    return Said(
        layers, f"{named} {ids}", Block(size, mask, anchor), sights(config, kind is not None, where), float(scale)
    )


def _check_known(config: dict[str, Any], said: dict[str, Any], where: str) -> None:
    unknown = sorted(set(said) - {*_KNOWN, *_KEEPS_ORDER, *_PLAIN})
    unknown = [name for name in unknown if said[name] not in (None, False)]
    if unknown:
        raise ConfigError(f"{where}: dflash_config says {', '.join(unknown)}, which is not known here", param=PARAM)
    if config.get("markov_rank") and (changes := [name for name in _KEEPS_ORDER if said.get(name)]):
        raise ConfigError(f"{where}: {changes[0]} beside a term of the token before is not known here", param=PARAM)
    for name, plain in _PLAIN.items():
        value = said.get(name, config.get(name))
        if value not in (None, plain):
            raise ConfigError(f"{where}: {name} is {value!r}: such drafters are not run", param=PARAM)


def sights(config: dict[str, Any], speculators: bool, where: str) -> tuple[Sight, ...]:
    """What each layer sees. A layer in a window sees of its block what stands before a place, unless the file says
    otherwise (`is_causal`, `sliding_window_non_causal`). Raises ConfigError."""
    count = int(config["num_hidden_layers"])
    window = whole(config, "sliding_window", where) if config.get("use_sliding_window", False) else 0
    first = whole(config, "max_window_layers", where) if config.get("max_window_layers") is not None else count
    slides = layer_types(config, [bool(window) and number >= first for number in range(count)])
    causal = config.get("is_causal")
    if speculators:
        ahead = [not slide or bool(config.get("sliding_window_non_causal", False)) for slide in slides]
    else:
        ahead = [not slide if causal is None else not causal for slide in slides]
    return tuple(Sight(window if slide else 0, wide) for slide, wide in zip(slides, ahead, strict=True))


class Drafter(Base):
    shift = 1

    def __init__(self, wanted: Wanted, target: Checkpoint) -> None:
        self.draft, self.target, self.vocab = draft_of(wanted), target, target.vocab_size
        self.shapes, where = shapes_of(self.draft), str(self.draft.path)
        _check_kind(self.shapes, self.draft.config, where)
        self.said = read(self.draft.config, where)
        block = self.said.block
        if wanted.counted and wanted.drafts > block.most:
            raise ConfigError(
                f"{where}: a block of {block.size} places gives {block.most} drafts; {wanted.drafts} were asked for",
                param="speculative_num_steps",
            )
        if block.mask >= self.vocab or block.mask < 0:
            raise ConfigError(
                f"{where}: mask_token_id {block.mask} is none of the model's {self.vocab} tokens", param=PARAM
            )
        self._check_states()
        self.facts = self._facts()

    def _check_states(self) -> None:
        """That the model has the states that it reads. Raises ConfigError."""
        said, path = self.said, self.draft.path
        size, count = int(self.target.config["hidden_size"]), int(self.target.config["num_hidden_layers"])
        if not all(0 <= number < count for number in said.layers):
            why = "the last layer's output is not kept" if max(said.layers) == count else "these layers are not there"
            raise ConfigError(f"{path}: {said.named} of a model of {count} layers: {why}", param=PARAM)
        told = whole(self.draft.config, "num_target_layers", str(path)) or count
        if told != count:
            raise ConfigError(f"{path}: it was made for a model of {told} layers, not of {count}", param=PARAM)
        rows, width = self.shapes["fc.weight"]
        if (rows, width) != (size, len(said.layers) * size):
            raise ConfigError(
                f"{path}: fc.weight is {rows} x {width}, but the model's hidden size is {size}, and {len(said.layers)} "
                f"states of it take {size} x {len(said.layers) * size}: it was made for another model",
                param=PARAM,
            )

    def _facts(self) -> DFlashFacts:
        config, shapes, path = self.draft.config, self.shapes, self.draft.path
        found = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
        count = len(self.said.sights)
        if found != set(map(str, range(count))):
            raise ConfigError(f"{path}: num_hidden_layers is {count}, and it has {len(found)} layers", param=PARAM)
        if int(config["vocab_size"]) != self.vocab:
            raise ConfigError(
                f"{path}: it was made for a vocabulary of {config['vocab_size']}, not of {self.vocab}", param=PARAM
            )
        if "mrope_section" in (config.get("rope_scaling") or config.get("rope_parameters") or {}):
            raise ConfigError(f"{path}: rotation by height and width of pictures is not known here", param=PARAM)
        own = shapes["lm_head.weight"][0] if "lm_head.weight" in shapes else self.vocab
        said = whole(config, "draft_vocab_size", str(path)) or own
        if said != own:
            raise ConfigError(f"{path}: draft_vocab_size is {said}, but lm_head has {own} rows", param=PARAM)
        if own != self.vocab and shapes.get("d2t") != (own,):
            raise ConfigError(
                f"{path}: {own} tokens of its own for the {self.vocab} of the model, and no d2t of that length",
                param=PARAM,
            )
        rank = shapes[_TERM[0]][1] if _TERM[0] in shapes else 0
        lacks = [name for name in _TERM if name not in shapes]
        if len(lacks) == 1:
            raise ConfigError(f"{path}: no tensor {lacks[0]}, which such a term has", param=PARAM)
        if rank != whole(config, "markov_rank", str(path)):
            raise ConfigError(f"{path}: markov_rank {config.get('markov_rank')}, and tensors of {rank}", param=PARAM)
        norms, states = "layers.0.self_attn.q_norm.weight" in shapes, len(self.said.layers)
        vocab = own if own != self.vocab else 0
        return DFlashFacts(states, self.said.sights, vocab, norms, self.said.embed_scale, rank)

    def load(self, model: Model, ctx: BuildContext, positions: int) -> Loaded:
        target, facts = decoder_of(model), self.facts
        if facts.rank and (target.head.scale != 1.0 or target.head.softcap):
            raise ConfigError(f"{self.draft.path}: its term adds to logits that this model scales or caps", param=PARAM)
        own = head_context(ctx, self.target)
        # Masks stand behind a text's last position too.
        shared = Shared(target, positions + self.said.block.size)
        drafter = DFlash(own, shared, self.draft.config, facts)
        drafter.load(self.draft, own, self._name)
        if facts.vocab:
            drafter.ids_D = ids_of(self.draft, facts.vocab, self.vocab).to(ctx.device)
        first = extend(target.memory, drafter.memory)
        target.tap = AuxTap(first, self.said.layers, drafter.feature)
        block, said = (
            self.said.block,
            f"{facts.vocab} of {self.vocab} tokens" if facts.vocab else "the model's own head",
        )
        reads = f"reads what enters layers {', '.join(map(str, self.said.layers))} ({self.said.named})"
        places = f"{block.size} places, mask {block.mask}"
        if block.from_anchor:
            places += ", each tells the token behind it"
        if facts.rank:
            places += f", a term of rank {facts.rank} of the token before"
        why = f"{self.draft.name}: {reads}; {places}; {said}"
        return Loaded(drafter, first, False, Decision("speculative_draft", "dflash", why), block=block)

    def _name(self, name: str) -> str | None:
        bare = name.removeprefix("model.")
        if bare.startswith("confidence_head."):
            return None
        # With the model's whole vocabulary a head in the file is a copy of the model's.
        return None if bare in _COPIES or (bare == "lm_head.weight" and not self.facts.vocab) else bare


def _check_kind(shapes: Shapes, config: dict[str, Any], where: str) -> None:
    """That the tensors are a DFlash drafter's. Raises ConfigError."""
    for name in shapes:
        other = next((kind for part, kind in _OTHERS.items() if part in name), None)
        if other is not None:
            raise ConfigError(
                f"{where}: {name}: of a drafter of {other}, which is not run", param="speculative_algorithm"
            )
    if "fc.weight" in shapes and "hidden_norm.weight" not in shapes and "dflash_config" not in config:
        rows, width = shapes["fc.weight"]
        kind = {2 * rows: "an EAGLE head: speculative_algorithm EAGLE", 3 * rows: "an EAGLE-3 head: EAGLE3"}.get(width)
        if kind is not None:
            raise ConfigError(f"{where}: this is {kind} runs it, not DFLASH", param="speculative_algorithm")
    missing = [name for name in ("fc.weight", "hidden_norm.weight", "norm.weight") if name not in shapes]
    if missing:
        raise ConfigError(f"{where}: no tensor {', '.join(missing)}, which every DFlash drafter has", param=PARAM)
