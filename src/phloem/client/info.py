"""What the door knows about the model it serves, before and beside the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.core.request import recommended
from phloem.text.formats import OFF, thinking_choice, tool_choice

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.checkpoint.pooling import Pooling
    from phloem.core.config import Config
    from phloem.multimodal._speech import Speech


# Where a client finds what a model is for.
ROUTES = {
    "generate": "/v1/chat/completions, /v1/completions or /generate",
    "embed": "/v1/embeddings, /v1/rerank, /v1/score or /encode",
    "score": "/v1/rerank, /v1/score, /classify or /encode",
    "classify": "/classify, /v1/score or /encode",
    "tokens": "/classify or /encode",
    "image": "/v1/images/generations, /v1/images/edits or /v1/videos",
    "transcribe": "/v1/audio/transcriptions or /v1/audio/translations",
    "encode_media": "a server of language_only, which asks this one at /encode_media",
}


class Duty:
    """The part that a server has among those that share prompts and answers: as configured, until it is changed."""

    def __init__(self, configured: str) -> None:
        self.configured = self.now = configured


@dataclass(frozen=True)
class ModelInfo:
    """Facts for validation and for the information routes.

    `features` names what exists beyond plain generation (`grammar`, `tools`, `reasoning`, ...): request fields of a
    feature that is not listed answer 400 `not supported yet`.
    """

    model_path: str
    served_model_name: str
    vocab_size: int
    context_length: int
    tokenizer_path: str = ""
    eos_ids: tuple[int, ...] = ()
    model_type: str = ""
    architectures: tuple[str, ...] = ()
    generation_config: dict[str, Any] = field(default_factory=dict)  # what it recommends, checked
    weight_version: str = "default"
    features: frozenset[str] = frozenset()
    tool_parser: str | None = None  # file in text/tools
    explain_tools: bool = False  # the chat template shows no tools: the prompt tells of them
    spell_calls: bool = False  # it knows no calls and results either: those of earlier turns become text
    reasoning_parser: str | None = None  # file in text/thinking
    pooling: Pooling | None = None  # of a model that does not generate
    draws: bool = False  # pictures, and nothing else
    encodes: bool = False  # media for other servers, and nothing else
    speech: Speech | None = None  # of a model that writes down what it hears
    decisions: tuple[tuple[str, Any, str], ...] = ()  # name, value, reason: the door's own choices
    duty: Duty = field(default_factory=lambda: Duty("null"))
    replicas: int = 1  # engines behind this door
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def of(checkpoint: Checkpoint, config: Config, features: frozenset[str] = frozenset()) -> ModelInfo:
        """From a described checkpoint and a resolved configuration."""
        return ModelInfo(
            model_path=config.model.model_path,
            served_model_name=config.model.served_model_name or config.model.model_path,
            vocab_size=checkpoint.vocab_size,
            context_length=config.model.context_length or checkpoint.context_length,
            tokenizer_path=str(config.model.tokenizer_path or checkpoint.tokenizer_path),
            eos_ids=checkpoint.eos_ids,
            model_type=checkpoint.model_type,
            weight_version=config.model.weight_version,
            duty=Duty(config.disagg.disaggregation_mode),
            architectures=checkpoint.architectures,
            generation_config=recommended(
                checkpoint.generation_config, checkpoint.vocab_size, f"{checkpoint.path}/generation_config.json"
            ),
            features=features,
            pooling=checkpoint.pooling,
            draws=checkpoint.pictures is not None,
            encodes=config.disagg.encoder_only,
            replicas=config.runtime.dp_size,
        )

    @property
    def role(self) -> str:
        """prefill or decode, where prompts and answers are computed by different servers; else null."""
        return self.duty.now

    @property
    def task(self) -> str:
        if self.draws or self.encodes:
            return "image" if self.draws else "encode_media"
        if self.speech is not None:
            return "transcribe"
        return "generate" if self.pooling is None else self.pooling.task

    def check_pooled(self, pooled: bool, heard: bool = False) -> None:
        """Whether such requests are for this model. Raises BadRequest, with the routes that are."""
        other = self.draws or self.encodes
        if other or pooled != (self.pooling is not None) or heard != (self.speech is not None):
            raise self.wrong_task()

    def check_draws(self) -> None:
        """Whether pictures can be asked for. Raises BadRequest, with the routes that are for this model."""
        if not self.draws:
            raise self.wrong_task()

    def check_encodes(self) -> None:
        """Whether embeddings of media can be asked for. Raises BadRequest, with the routes that are for this model."""
        if not self.encodes:
            raise self.wrong_task()

    def wrong_task(self) -> BadRequest:
        """What a client is told that asks for what the model is not for."""
        what = "generates text" if self.pooling is None else f"does not generate: its task is {self.task}"
        what = "writes down speech" if self.speech is not None else what
        if self.draws:
            what = "draws pictures, and does nothing else"
        if self.encodes:
            what = "is served by its towers alone (encoder_only)"
        what = f"{what}, and not this" if self.pooling is not None and self.task != "embed" else what
        return BadRequest(
            f"{self.served_model_name!r:.200} {what}: use {ROUTES[self.task]}", param="model", code="wrong_task"
        )

    def answers_to(self, name: str | None) -> bool:
        """Whether a request for this model name is for us; unset, empty and `default` always are."""
        return not name or name in (self.served_model_name, self.model_path, "default")


def with_formats(info: ModelInfo, template: str | None, tools: str | None, reasoning: str | None) -> ModelInfo:
    """The model's facts with the formats that its answers are read by.

    Raises:
        ConfigError: as `tool_choice`.
    """
    tool, thinking = tool_choice(template, tools), thinking_choice(template, reasoning)
    decisions = (
        ("tool_call_parser", tool.name or OFF, tool.reason),
        ("reasoning_parser", thinking.name or OFF, thinking.reason),
    )
    # Only with a known format can be told where the reasoning ends and a constraint begins.
    known = frozenset({"require_reasoning"}) if thinking.name is not None else frozenset[str]()
    return replace(
        info,
        features=info.features | {"tools", "reasoning"} | known,
        tool_parser=tool.name,
        explain_tools=tool.explained,
        spell_calls=tool.spelled,
        reasoning_parser=thinking.name,
        decisions=(*info.decisions, *decisions),
    )


def version() -> str:
    """The installed version of Phloem."""
    try:
        return metadata.version("phloem")
    except metadata.PackageNotFoundError:
        return "unknown"
