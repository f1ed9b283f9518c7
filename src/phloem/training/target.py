"""The model that the head drafts for: its states at each token of a text, its embedding, and its head's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from phloem import platforms
from phloem.checkpoint.describe import describe
from phloem.core import resolve
from phloem.core.errors import ConfigError
from phloem.core.speculation import MOST_DRAFTS
from phloem.speculation.capture import aux_layers, capture, open_target
from phloem.training.block import RANGE
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.checkpoint.describe import Checkpoint
    from phloem.models._common import Decoder
    from phloem.training.data import Sample
    from phloem.training.options import Options
    from phloem.training.remote import Remote

LEAST_STATES = 3  # that a drafter of blocks reads, however few layers it has
CHUNK = 512  # tokens whose logits over the whole vocabulary are there at once
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
# Of a drafter's file, and from where on they may be.
_NUMBERS = {
    **{"num_hidden_layers": 1, "block_size": 0, "mask_token_id": 0, "markov_rank": 0},
    **{"sliding_window": 0, "max_window_layers": 0},
}
_SAME = ("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id")


@dataclass
class States:
    """Of one text of S tokens, on the host."""

    ids_S: Tensor  # int64
    mask_S: Tensor  # bool
    aux_SA: Tensor
    last_SN: Tensor
    best_S: Tensor  # int64: the model's most likely next token
    sum_S: Tensor  # float32: log-sum-exp of its logits

    @property
    def nbytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in vars(self).values())


class Target:
    """Raises ConfigError for a model that gives no states, ModelLoadError for a broken one."""

    def __init__(self, path: str, device: str, threads: int | None, layers: tuple[int, ...] = ()) -> None:
        """`layers`: whose input is read; (): those of an EAGLE-3 head."""
        self.path, self.checkpoint = path, described(path)
        self.model: Decoder = open_target(path, device=device, threads=threads)
        self.device = self.model.index.ctx.device
        platform, _ = platforms.choose(device, resolve.threads(threads, available_cores()).value)
        kind, _ = platform.dtype("bfloat16")
        self.fast = kind if kind == torch.bfloat16 else torch.float32  # of a head's products
        self.layers = layers or aux_layers(len(self.model.layers))
        names = self.model.embed.weight.names[0], self.model.head.weight.names[0]
        self._embed_VN = self.model.get_weight(names[0])
        self._head_VN = self._embed_VN if names[0] == names[1] else self.model.get_weight(names[1])
        self._rows: tuple[Tensor, Tensor | None] | None = None
        self.remote: Remote | None = None  # which captures in place of the model here

    def embed(self, ids: Tensor) -> Tensor:
        """float32 [..., N], as the table has them."""
        return self._embed_VN[ids].float()

    def norm(self) -> Tensor | None:
        """The last norm's weight, where it is one."""
        weights = list(self.model.norm.weights())
        if len(weights) != 1 or self.model.config.norms != "rms":
            return None
        return self.model.get_weight(weights[0].names[0]).float() + self.model.config.norm_shift

    def choose(self, ids_D: Tensor) -> Tensor:
        """Take the head's rows of these tokens, [D, N] float32, for `says`."""
        bias, rows_DN = self.model.head.bias, self._head_VN[ids_D].float()
        own_D = None if bias is None else self.model.get_weight(bias.names[0])[ids_D].float()
        self._rows = rows_DN, own_D
        return rows_DN

    def says(self, last_nN: Tensor) -> Tensor:
        """The model's float32 logits of the chosen tokens, [n, N] -> [n, D]."""
        assert self._rows is not None, "no tokens were chosen"
        head = self.model.head
        logits_nD = torch.nn.functional.linear(last_nN.float(), *self._rows) * head.scale
        return (logits_nD / head.softcap).tanh() * head.softcap if head.softcap else logits_nD

    def states(self, samples: Sequence[Sample]) -> list[States]:
        """Of whole texts, by the engine's own layers."""
        found: list[States] = []
        with torch.no_grad():
            texts = [one.ids for one in samples]
            media = [one.media for one in samples]
            if self.remote is None:
                captured = capture(self.model, texts, self.layers, media=media)
            elif any(media):
                raise ConfigError("capture_url: states of pictures are computed here alone: leave it out")
            else:
                captured = self.remote.capture(texts)
            for sample, got in zip(samples, captured, strict=True):
                best, sums = list[Tensor](), list[Tensor]()
                for part_nN in got.last_TN.to(self.device).split(CHUNK):
                    logits_nV = self.model.head(part_nN)
                    best.append(logits_nV.argmax(-1).cpu())
                    sums.append(logits_nV.logsumexp(-1).cpu())
                ids_S, mask_S = torch.tensor(sample.ids), torch.tensor(sample.mask)
                # A copy: a view would hold the states of the whole batch.
                own = [one.cpu().clone() for one in (got.aux_TA, got.last_TN)]
                found.append(States(ids_S, mask_S, own[0], own[1], torch.cat(best), torch.cat(sums).float()))
        return found


def described(path: str) -> Checkpoint:
    """The checkpoint, where a head can be trained for it.

    Raises:
        ConfigError: it does not generate text, its code is not ours, or it has too few layers.
    """
    checkpoint = describe(path)
    if checkpoint.pictures is not None or checkpoint.pooling is not None or checkpoint.chosen.impl != "phloem":
        why = "it does not generate text" if checkpoint.chosen.impl == "phloem" else "its code is not ours"
        raise ConfigError(f"{path}: no head can be trained for it: {why}", param="target_model_path")
    layers = checkpoint.config.get("num_hidden_layers", 0)
    if layers < 4:
        raise ConfigError(f"{path}: a model of {layers} layers has no three states for a head: it needs 4 or more")
    return checkpoint


def head_config(checkpoint: Checkpoint, draft_vocab_size: int, given: dict[str, Any]) -> dict[str, Any]:
    """A published head's config.json for this model. `given`: sizes that are asked for.

    Raises:
        ConfigError: sizes of the model that are not told, or that do not fit it.
    """
    own = checkpoint.config
    layers, vocab = own["num_hidden_layers"], checkpoint.vocab_size
    sizes = {name: given.get(name, own.get(name)) for name in _SIZES}
    missing = [name for name, value in sizes.items() if not isinstance(value, int)]
    if missing:
        raise ConfigError(f"the model's configuration lacks {', '.join(missing)}: name it in --draft-model-config")
    for name, theirs in (("hidden_size", own["hidden_size"]), ("vocab_size", vocab)):
        if given.get(name, theirs) != theirs:
            message = f"draft_model_config: {name} is {given[name]}, and the model's is {theirs}"
            raise ConfigError(message, param="draft_model_config")
    if given.get("num_hidden_layers", 1) != 1:
        raise ConfigError("draft_model_config: such heads have one layer", param="draft_model_config")
    more = {name: given.get(name, own.get(name)) for name in _SAME}
    more |= {name: _unturned(more[name]) for name in ("rope_scaling", "rope_parameters")}
    more["rope_theta"] = more["rope_theta"] or (more["rope_parameters"] or {}).get("rope_theta", 10000.0)
    low, middle, high = aux_layers(layers)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **{name: value for name, value in more.items() if value is not None},
        **sizes,
        "vocab_size": vocab,
        "draft_vocab_size": min(given.get("draft_vocab_size", draft_vocab_size), vocab),
        "num_hidden_layers": 1,
        "rms_norm_eps": given.get("rms_norm_eps", own.get("rms_norm_eps", 1e-6)),
        "hidden_act": given.get("hidden_act", "silu"),
        "max_position_embeddings": given.get("max_position_embeddings", own.get("max_position_embeddings", 2048)),
        "eos_token_id": checkpoint.eos_ids[0] if checkpoint.eos_ids else None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [low - 1, middle - 1, high - 1],
            "use_aux_hidden_state": True,
        },
    }


def state_layers(count: int, states: int) -> list[int]:
    """The layers whose outputs a DFlash drafter reads of a model of `count`, from 0: evenly from the second one on, the
    last two left out."""
    if states == 1:
        return [count // 2]
    return [round(1 + at * (count - 4) / (states - 1)) for at in range(states)]


def drafter_config(checkpoint: Checkpoint, options: Options, given: dict[str, Any]) -> dict[str, Any]:
    """A DFlash drafter's config.json for this model, in the original layout; `mask_token_id` may be None as yet.
    `given`: as `head_config` has it; what it says counts more than options.

    Raises:
        ConfigError: as `head_config`, layers that are not there, or a drafter that is not trained here.
    """
    layers = _layers_checked(given, options.draft_num_hidden_layers)
    head = head_config(checkpoint, checkpoint.vocab_size, {**given, "num_hidden_layers": 1})
    left_out = ("draft_vocab_size", "eagle_config", "mlp_bias")
    said: dict[str, Any] = given.get("dflash_config") or {}
    count = int(checkpoint.config["num_hidden_layers"])
    ids = said.get("target_layer_ids") or state_layers(count, min(max(layers, LEAST_STATES), count - 3))
    if not all(isinstance(one, int) and 0 <= one < count - 1 for one in ids):
        message = f"draft_model_config: target_layer_ids {ids}: expected some of 0 to {count - 2}"
        raise ConfigError(message, param="draft_model_config")
    mask = said.get("mask_token_id")
    mask = mask if mask is not None or options.mask_token_id < 0 else options.mask_token_id
    if mask is not None and not 0 <= mask < checkpoint.vocab_size:
        raise ConfigError(f"mask_token_id {mask} is none of {checkpoint.vocab_size} tokens", param="mask_token_id")
    sizes = (given.get("block_size"), said.get("block_size"), options.block_size)
    size = next(size for size in sizes if size is not None)
    if not 2 <= size <= MOST_DRAFTS + 1:
        raise ConfigError(f"block_size is {size}: expected 2 to {MOST_DRAFTS + 1}", param="block_size")
    heads, kv_heads = head["num_attention_heads"], head.get("num_key_value_heads")
    return {
        **{key: value for key, value in head.items() if key not in left_out},
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": head.get("head_dim") or head["hidden_size"] // heads,
        "num_target_layers": count,
        "block_size": size,
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": list(ids)},
        "layer_types": ["full_attention"] * layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": layers,
        "initializer_range": RANGE,
        **{key: given[key] for key in ("layer_types", "is_causal") if given.get(key)},
    }


def _layers_checked(given: dict[str, Any], usual: int) -> int:
    """How many layers a drafter has, `usual` where its file says nothing, once what the file says is of the kinds that
    it has to be, and trained here. Raises ConfigError."""
    said: Any = given.get("dflash_config") or {}
    if not isinstance(said, dict):
        raise _bad(f"dflash_config is {said!r:.60}, expected an object")
    found = cast("dict[str, Any]", said)
    for name, value in {**given, **found}.items():
        if name not in _NUMBERS or value is None or value is False:
            continue
        if type(value) is not int or value < _NUMBERS[name]:
            raise _bad(f"{name} is {value!r:.60}, expected a whole number from {_NUMBERS[name]}")
    for name in ("target_layer_ids", "layer_types"):
        value = {**given, **found}.get(name)
        if value is not None and not isinstance(value, list):
            raise _bad(f"{name} is {value!r:.60}, expected a list")
    layers: int = given.get("num_hidden_layers") or usual
    if given.get("layer_types") and len(given["layer_types"]) != layers:
        raise _bad(f"layer_types: {len(given['layer_types'])} entries for {layers} layers")
    windows = bool(given.get("use_sliding_window") and given.get("sliding_window")) and not given.get("layer_types")
    if windows and given.get("max_window_layers") is not None and given["max_window_layers"] < layers:
        raise _bad("layers in windows are served, and not trained here")
    if given.get("markov_rank"):
        raise _bad("markov_rank: drafters of DSpark's kind are served, and not trained here")
    return layers


def _bad(why: str) -> ConfigError:
    return ConfigError(f"draft_model_config: {why}", param="draft_model_config")


def free_token(samples: Sequence[Sample], vocab_size: int) -> int:
    """The highest token that none of the texts has, for masks. Raises ConfigError where all are used."""
    used = {token for one in samples for token in one.ids}
    found = next((token for token in reversed(range(vocab_size)) if token not in used), None)
    if found is None:
        raise ConfigError("mask_token_id is needed: the text has all tokens of the model", param="mask_token_id")
    return found


def _unturned(rope: Any) -> Any:
    """Positions of a head are those of the tokens, of pictures too: what the model has beside them in places of height
    and width is left out."""
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return rope
    found = cast("dict[str, Any]", rope)
    kept = {key: value for key, value in found.items() if not key.startswith("mrope")}
    kinds = {key: "default" for key in ("rope_type", "type") if kept.get(key) == "mrope"}
    kept |= kinds
    return kept if set(kept) - {"rope_type", "type"} else None
