"""The door's own half of the start, beside the engine's: what is known of the model, its tokenizer, its template."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from phloem.checkpoint.describe import described
from phloem.checkpoint.families import FAMILIES, audio_of, family
from phloem.client.client import EngineClient
from phloem.client.info import ModelInfo, with_formats
from phloem.core.config import ImagesConfig
from phloem.core.errors import ConfigError
from phloem.multimodal import KINDS, Facts
from phloem.multimodal._fetch import Rules
from phloem.multimodal._reader import MediaReader
from phloem.multimodal._settings import limits_of, settings_in
from phloem.multimodal._speech import speech_of
from phloem.text.template import load_template
from phloem.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config, MediaConfig
    from phloem.text.tokenizer import Tokenizer

LOG = logging.getLogger("phloem.server")


def make_client(config: Config) -> tuple[EngineClient, ModelInfo, Checkpoint]:
    """A client that waits for its engine (`attach`). Neither torch nor weights are touched.

    Raises:
        PhloemError: the configuration or the checkpoint is wrong.
    """
    model = config.model
    checkpoint = described(model)
    if checkpoint.pictures is None:
        _check_text_alone(config.images)
    # Without a tokenizer nothing can follow a text.
    features = frozenset[str]() if model.skip_tokenizer_init else frozenset({"grammar"})
    if config.server.enable_return_hidden_states:
        features |= {"hidden_states"}
    if config.runtime.enable_return_routed_experts:
        features |= {"routed_experts"}
    if config.lora.enable_lora or config.lora.lora_paths:
        features |= {"lora"}
    if config.runtime.dp_size > 1:
        features |= {"data_parallel"}
    if config.speculative.enable_spec_capture:
        features |= {"spec_capture"}
    if config.disagg.disaggregation_mode != "null":
        features |= {"disaggregation"}
    info = _without_penalties(ModelInfo.of(checkpoint, config, features), checkpoint)
    if model.skip_tokenizer_init or info.draws or info.encodes:
        return EngineClient(None, None, info), info, checkpoint
    tokenizer = load_tokenizer(checkpoint)
    hears = audio_of(checkpoint.model_type)
    if hears is not None:
        id_of = tokenizer.backend.token_to_id
        info = replace(info, speech=speech_of(checkpoint.config, hears, checkpoint.generation_config, id_of))
    if info.pooling is not None or hears is not None:
        return EngineClient(tokenizer, None, info), info, checkpoint
    override = Path(model.chat_template) if model.chat_template else None
    template = load_template(checkpoint, override, tokenizer)
    if checkpoint.gguf is not None:
        checkpoint.gguf.release()
    pictures = _pictures(config, checkpoint, tokenizer)
    if pictures is not None:
        takes = {KINDS[kind] for kind in pictures.tokens}
        takes |= {"sounds_in_videos"} if takes >= {"videos", "sounds"} else set()
        info = replace(info, features=info.features | takes)
    info = with_formats(info, template.source, model.tool_call_parser, model.reasoning_parser)
    return EngineClient(tokenizer, template, info, pictures), info, checkpoint


def _check_text_alone(images: ImagesConfig) -> None:
    """Raises ConfigError: a setting that this model would leave unread."""
    usual = asdict(ImagesConfig())
    for name, value in asdict(images).items():
        if value != usual[name]:
            raise ConfigError(f"{name}: it is for models that draw, and this one does not", param=name)


def _without_penalties(info: ModelInfo, checkpoint: Checkpoint) -> ModelInfo:
    """A model of diffusion refuses penalties (`core.denoising.check`): what its file recommends must not fail chats."""
    known = checkpoint.model_type in FAMILIES.names() and family(checkpoint.model_type).diffusion is not None
    value = info.generation_config.get("repetition_penalty", 1.0)
    if not known or value == 1.0:
        return info
    why = f"generation_config.json recommends {value:g}, and a model that writes by diffusion has no penalties"
    LOG.warning("repetition_penalty: left out: %s", why)
    rest = {name: given for name, given in info.generation_config.items() if name != "repetition_penalty"}
    decision = ("repetition_penalty", "left out", why)
    return replace(info, generation_config=rest, decisions=(*info.decisions, decision))


def media_rules(media: MediaConfig) -> Rules:
    """What clients may name. Raises ConfigError."""
    root = None if media.mm_file_root is None else Path(media.mm_file_root)
    if root is not None and not root.expanduser().is_dir():
        raise ConfigError(f"mm_file_root: {root} is no directory", param="mm_file_root")
    return Rules(media.enable_mm_urls, root)


def _pictures(config: Config, checkpoint: Checkpoint, tokenizer: Tokenizer) -> MediaReader | None:
    """What reads pictures, videos and sounds; None for a model that takes none. Raises ConfigError."""
    limits = limits_of(config.media.limit_mm_data_per_request)
    known = checkpoint.model_type in FAMILIES.names() and checkpoint.chosen.impl == "phloem"
    facts = family(checkpoint.model_type).vision if known else None
    whole, seen = checkpoint.config, checkpoint.seen
    if seen is not None:
        whole, facts = seen.config, {"processor": seen.processor, "image": "image_token_id"}
    if facts is None or checkpoint.gguf is not None or not {"vision_config", "audio_config"} & set(whole):
        return None
    settings, more, video = settings_in(checkpoint.path)
    about = Facts(whole, settings, tokenizer.token_text, more, video)
    rules = media_rules(config.media)
    try:
        tokens = {kind: int(whole[facts[kind]]) for kind in KINDS if kind in facts}
        return MediaReader(facts["processor"], about, tokens, rules, limits)
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        where = checkpoint.path / "preprocessor_config.json"
        raise ConfigError(f"{where}: this model's pictures cannot be read by it ({reason})") from None
