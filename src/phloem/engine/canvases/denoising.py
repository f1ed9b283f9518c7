"""Whether a model writes by diffusion, how it then fills its blocks, and what that excludes; before it is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from phloem.checkpoint.families import FAMILIES, family
from phloem.core.denoising import PARAM, Denoising, denoising
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.core.renoising import Renoising, renoising
from phloem.core.resolve import Decision
from phloem.core.speculation import AUTO, NONE, wanted

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config


def decide(
    config: Config, checkpoint: Checkpoint, decisions: list[Decision]
) -> tuple[Checkpoint, Denoising | Renoising | None]:
    """(The checkpoint, with the block that was asked for, how it fills blocks; None: it writes from left to right).

    Raises:
        ConfigError: settings that are wrong, or that such a model, or another one, does not serve.
    """
    asked = config.dllm
    names = family(checkpoint.model_type).diffusion if checkpoint.model_type in FAMILIES.names() else None
    if names is None:
        for name in ("dllm_algorithm", "dllm_algorithm_config"):
            if vars(asked)[name] is not None:
                raise ConfigError(f"{name}: {checkpoint.model_type} does not write by diffusion", param=name)
        return checkpoint, None
    settings = _settings(asked.dllm_algorithm_config)
    if names.get("fills") == "renoise":
        return _drawn_anew(config, checkpoint, names["block"], settings, decisions)
    block, mask = (_stored(checkpoint, names[key]) for key in ("block", "mask"))
    whole = names.get("sees") == "whole"
    vocab, shifted = checkpoint.vocab_size, names.get("said") == "before"
    found = denoising(asked.dllm_algorithm, settings, block, mask, vocab, whole=whole, shifted=shifted)
    room = config.model.context_length or checkpoint.context_length
    if not whole and found.block > room:
        why = f"blocks of {found.block} tokens, but the context holds {room}, in whole blocks"
        raise ConfigError(f"{PARAM}: {why}", param=PARAM)
    _refuse(config)
    when = "places that are masked are accepted by " + _how(found)
    when += "; a text is seen whole, so that every pass computes all of it" if whole else ""
    decisions.append(Decision("dllm", f"{found.algorithm}, blocks of {found.block}", when))
    return replace(checkpoint, config={**checkpoint.config, names["block"]: found.block}), found


def _drawn_anew(
    config: Config, checkpoint: Checkpoint, key: str, settings: dict[str, Any], decisions: list[Decision]
) -> tuple[Checkpoint, Renoising]:
    """As `decide`, of a model that draws its canvas anew at every pass."""
    stored = _stored(checkpoint, key)
    found = renoising(config.dllm.dllm_algorithm, settings, stored, checkpoint.generation_config)
    room = config.model.context_length or checkpoint.context_length
    if found.canvas >= room:
        why = f"canvases of {found.canvas} tokens leave no room for a prompt in a context of {room}"
        raise ConfigError(f"{PARAM}: {why}", param=PARAM)
    _refuse(config)
    when = f"the surest places, of entropies up to {found.entropy_bound:g} in all, keep what was drawn there; the "
    when += f"others are drawn anew, in at most {found.max_denoising_steps} passes"
    decisions.append(Decision("dllm", f"{found.algorithm}, canvases of {found.canvas}", when))
    return checkpoint, found


def _stored(checkpoint: Checkpoint, key: str) -> int:
    """A whole number of the checkpoint's own config.json."""
    value = checkpoint.config[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelLoadError(f"{checkpoint.path}: config.json: {key} is {value!r:.100}, expected a whole number")
    return value


def _how(found: Denoising) -> str:
    steps = found.steps or found.block
    least = f"{found.quota(0)} or more in each of at most {steps} passes"
    if found.algorithm == "sequential":
        return f"their order, {least}"
    if found.algorithm == "low_confidence_static":
        return f"confidence, {least}"
    return f"confidence above {found.threshold:g}, {least}"


def _refuse(config: Config) -> None:
    """What a model of diffusion is not served with."""
    runtime = config.runtime
    ranks = {"tp_size": runtime.tp_size, "pp_size": runtime.pp_size, "ep_size": runtime.ep_size}
    for name, size in ranks.items():
        if size > 1:
            raise ConfigError(f"{name} {size}: a model of diffusion runs on one rank", param=name)
    if config.lora.enable_lora or config.lora.lora_paths:
        raise ConfigError("adapters are served beside models that write from left to right", param="enable_lora")
    if runtime.enable_deterministic_inference or runtime.ops == "invariant":
        why = "a place sees those behind it, which rows of one token each do not"
        raise ConfigError(f"enable_deterministic_inference: {why}", param="enable_deterministic_inference")
    if runtime.enable_return_routed_experts:
        why = "a token comes of several passes, each with experts of its own"
        raise ConfigError(f"enable_return_routed_experts: {why}", param="enable_return_routed_experts")
    if wanted(config).algorithm not in (AUTO, NONE):
        why = "a model of diffusion gives several tokens a pass by itself"
        raise ConfigError(f"speculative_algorithm: {why}", param="speculative_algorithm")


def _settings(text: str | None) -> dict[str, Any]:
    """Those of a YAML or JSON file, or of JSON."""
    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{PARAM} is not JSON: {error}", param=PARAM) from None
    else:
        import yaml  # few models have one

        try:
            values = yaml.safe_load(Path(text).expanduser().read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"{PARAM}: {text}: {error.strerror or error}", param=PARAM) from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:  # the first: no UTF-8, or no path
            raise ConfigError(f"{PARAM}: {text} is not readable as YAML: {error}", param=PARAM) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{PARAM} must be a table such as threshold: 0.9", param=PARAM)
    return cast("dict[str, Any]", values)
