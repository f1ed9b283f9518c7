"""What is asked of speculation, read from the settings: SGLang's flags, or the JSON of vLLM's `--speculative-config`.

Pure: which drafter this machine then has, and why, is decided where the engine is put together (`speculation/`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phloem.core.config import Config, SpeculativeConfig

AUTO, NONE = "auto", "none"
MODELS = ("draft_model", "eagle", "eagle3", "mtp", "dflash")  # drafters that are models
BLOCKS = "dflash"  # of them the one whose drafts come all at once
USUAL_CHAIN = 5  # drafts of a model, each of which takes a pass of it
USUAL_BLOCK = 15  # drafts that come all at once: of the published blocks
USUAL_DRAFTS = 7  # with the token before them eight rows: about as many as a step reads weights for at one cost
LONG_DRAFTS = 23  # of texts, where measured times decide how many of them are verified: as many as keep a row's bits
MOST_DRAFTS = 31
MOST_WIDTH = 16  # drafts that may follow one token
LONGEST_MATCH = 32  # tokens that are compared backwards from a candidate
CAPACITY = 1 << 17  # tokens of past answers that drafts may come from

# Other engines' names of a drafter -> ours. Whatever is not here is looked up as it is.
_NAMES = {
    "standalone": "draft_model", "prompt_lookup": "ngram", "nextn": "mtp", "deepseek_mtp": "mtp", "glm4_moe_mtp": "mtp",
    "mimo_mtp": "mtp", "qwen3_next_mtp": "mtp", "qwen3_5_mtp": "mtp", "dspark": "dflash",
}  # fmt: skip
# Methods of vLLM's JSON and the keys that we read there -> the flag that means the same.
_KEYS = {
    "method": "algorithm",
    "num_speculative_tokens": "drafts",
    "prompt_lookup_min": "min_match",
    "prompt_lookup_max": "max_match",
    "suffix_decoding_max_tree_depth": "max_match",
    "model": "draft_model",
}


@dataclass(frozen=True)
class Wanted:
    """What is asked for. `drafts`: in one step behind one token, at most; `capacity`: tokens of past answers. `topk`:
    drafts that may follow the same token, above 1 a tree of up to `steps` behind one another (0: of a chain).
    `counted`: somebody said how many drafts."""

    algorithm: str = AUTO
    drafts: int = USUAL_DRAFTS
    min_match: int = 2
    max_match: int = LONGEST_MATCH
    capacity: int = CAPACITY
    draft_model: str | None = None
    token_map: str | None = None
    topk: int = 1
    steps: int = 0
    adaptive: bool = True
    counted: bool = False

    @property
    def rows(self) -> int:
        """Rows of one token that a step of a single request may have."""
        return 1 if self.algorithm == NONE else 1 + self.drafts


def wanted(config: Config) -> Wanted:
    """Read the settings.

    Raises:
        ConfigError: flags that exclude each other, values out of range, or what would change the answers.
    """
    flags = config.speculative
    _lossless(flags)
    found = _from_json(flags.speculative_config) if flags.speculative_config else {}
    own = {
        "algorithm": flags.speculative_algorithm,
        "drafts": _drafts(flags),
        "draft_model": flags.speculative_draft_model_path,
        "token_map": flags.speculative_token_map,
        "max_match": flags.speculative_ngram_max_trie_depth,
        "capacity": flags.speculative_ngram_capacity,
    }
    said = {name: value for name, value in own.items() if value is not None}
    twice = sorted(said.keys() & found.keys())
    if twice:
        raise ConfigError(
            f"speculative_config and flags both say {', '.join(twice)}: use one of the two", param="speculative_config"
        )
    values: dict[str, Any] = {**found, **said}
    values["algorithm"] = _name(values.get("algorithm", AUTO), values)
    if values.get("token_map") and values["algorithm"] != "eagle":
        raise ConfigError(
            "speculative_token_map: EAGLE heads alone say fewer tokens by it (an EAGLE-3 head brings its own d2t)",
            param="speculative_token_map",
        )
    topk = flags.speculative_eagle_topk
    if topk is not None and topk != 1:
        values |= _tree(flags, values["algorithm"], topk, found.get("drafts", USUAL_CHAIN))
    adaptive = not flags.disable_speculative_adaptive
    values["counted"] = "drafts" in values
    values.setdefault("drafts", _usual(values["algorithm"], adaptive))
    return _checked(Wanted(**values, adaptive=adaptive))


def cannot(wanted: Wanted, why: str) -> ConfigError:
    """That what was asked for is not served."""
    name = "speculative_algorithm"
    return ConfigError(f"{name}: {wanted.algorithm} cannot serve this model: {why}", param=name)


def check_capture(flags: SpeculativeConfig, why: str) -> bool:
    """Whether hidden states are captured. `why`: what makes it impossible here; "": nothing.

    Raises:
        ConfigError: flags that do not go together, or what is impossible was asked for.
    """
    if not flags.enable_spec_capture:
        if flags.spec_capture_dir:
            why = "no states are captured; enable_spec_capture must be given with it"
            raise ConfigError(f"spec_capture_dir: {why}", param="spec_capture_dir")
        return False
    if not flags.spec_capture_dir:
        raise ConfigError("enable_spec_capture needs spec_capture_dir", param="spec_capture_dir")
    if why:
        raise ConfigError(f"enable_spec_capture: {why}", param="enable_spec_capture")
    return True


def _usual(algorithm: str, adaptive: bool) -> int:
    """Drafts where nobody says how many."""
    if algorithm in MODELS:
        return USUAL_BLOCK if algorithm == BLOCKS else USUAL_CHAIN
    return LONG_DRAFTS if adaptive and algorithm != NONE else USUAL_DRAFTS


def _lossless(flags: SpeculativeConfig) -> None:
    for name in ("speculative_accept_threshold_single", "speculative_accept_threshold_acc"):
        value: float = vars(flags)[name]
        if value != 1.0:
            raise ConfigError(
                f"{name}: {value} would accept tokens that plain decoding does not choose; only 1.0 is exact",
                param=name,
            )


def _drafts(flags: SpeculativeConfig) -> int | None:
    """`num_draft_tokens` counts the token before the drafts too, as a chain of `num_steps` drafts has one more row."""
    steps, tokens = flags.speculative_num_steps, flags.speculative_num_draft_tokens
    if flags.speculative_eagle_topk not in (None, 1):
        return None if tokens is None else tokens - 1
    if steps is not None and tokens is not None and tokens != steps + 1:
        raise ConfigError(
            f"speculative_num_draft_tokens: {tokens} with speculative_num_steps {steps}: a chain of {steps} drafts is "
            f"verified as {steps + 1} tokens; leave one of the two out",
            param="speculative_num_draft_tokens",
        )
    return steps if steps is not None else None if tokens is None else tokens - 1


def _tree(flags: SpeculativeConfig, algorithm: str, topk: int, usual: int) -> dict[str, Any]:
    """Of a tree, where `num_steps` is its depth (`usual` where that is not said) and `num_draft_tokens` counts all of
    it, the token before the drafts too."""
    name = "speculative_eagle_topk"
    if algorithm not in MODELS:
        raise ConfigError(
            f"{name}: a tree of drafts comes from a model ({', '.join(MODELS)}), not from {algorithm}; leave it out",
            param=name,
        )
    if algorithm == BLOCKS:
        raise ConfigError(f"{name}: {algorithm} drafts one token for each place of a block; leave it out", param=name)
    steps, tokens = flags.speculative_num_steps, flags.speculative_num_draft_tokens
    steps = usual if steps is None else steps
    if not 2 <= topk <= MOST_WIDTH:
        raise ConfigError(f"{name}: {topk} is not in 1 to {MOST_WIDTH}", param=name)
    if not 1 <= steps <= MOST_DRAFTS:
        raise ConfigError(f"speculative_num_steps: {steps} is not in 1 to {MOST_DRAFTS}", param="speculative_num_steps")
    seen = topk + (steps - 1) * topk * topk
    drafts = min(USUAL_DRAFTS, seen) if tokens is None else tokens - 1
    if drafts > seen:
        raise ConfigError(
            f"speculative_num_draft_tokens: {tokens}, but {steps} steps with {topk} drafts behind each of {topk} "
            f"tokens find {seen} drafts, with the token before them {seen + 1}",
            param="speculative_num_draft_tokens",
        )
    return {"topk": topk, "steps": min(steps, drafts), "drafts": drafts}


def _from_json(text: str) -> dict[str, Any]:
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"speculative_config is not JSON: {error}", param="speculative_config") from None
    if not isinstance(values, dict):
        raise ConfigError(
            'speculative_config must be an object such as {"method": "suffix"}', param="speculative_config"
        )
    read: Mapping[str, Any] = values  # pyright: ignore[reportUnknownVariableType]
    unknown = sorted(set(read) - set(_KEYS))
    if unknown:
        known = ", ".join(_KEYS)
        raise ConfigError(
            f"speculative_config: {', '.join(unknown)} not known here; known: {known}", param="speculative_config"
        )
    found: dict[str, Any] = {}
    for key, value in read.items():
        kind = str if key in ("method", "model") else int
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"speculative_config: {key}: {value!r} is no {kind.__name__}", param="speculative_config")
        found[_KEYS[key]] = value
    if "algorithm" not in found:
        raise ConfigError("speculative_config: 'method' is missing", param="speculative_config")
    return found


def _name(given: str, values: Mapping[str, Any]) -> str:
    name = given.lower().replace("-", "_")
    name = _NAMES.get(name, name)
    if name in MODELS and name != "mtp" and not values.get("draft_model"):
        raise ConfigError(
            f"speculative_algorithm: {given} needs speculative_draft_model_path", param="speculative_draft_model_path"
        )
    if name in ("suffix", "ngram", NONE) and values.get("draft_model"):
        raise ConfigError(
            f"speculative_draft_model_path: {given} drafts without a model; leave one of the two out",
            param="speculative_draft_model_path",
        )
    return "draft_model" if name == AUTO and values.get("draft_model") else name


def _checked(found: Wanted) -> Wanted:
    ranges = (
        ("speculative_num_steps" if found.topk == 1 else "speculative_num_draft_tokens", found.drafts, 1, MOST_DRAFTS),
        ("prompt_lookup_min", found.min_match, 1, 64),
        ("speculative_ngram_max_trie_depth", found.max_match, found.min_match, 256),
        ("speculative_ngram_capacity", found.capacity, 0, 1 << 30),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise ConfigError(f"{name}: {value} is not in {low} to {high}", param=name)
    return found
