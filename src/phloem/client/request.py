"""What is asked of `EngineClient`. Free of HTTP: the in-process engine uses it too."""

from __future__ import annotations

import os
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phloem.core.media import reach

if TYPE_CHECKING:
    from phloem.core.media import Media
    from phloem.core.request import Align, SamplingParams
    from phloem.multimodal._reader import Source


@dataclass(frozen=True, slots=True)
class Caller:
    """What the head of an HTTP request says of whoever sent it: a digest of its key, and targets in seconds."""

    key: str = ""
    ttft: float = 0.0
    itl: float = 0.0


CALLER: ContextVar[Caller] = ContextVar("phloem.caller")
NOBODY = Caller()
FAKE_HOST = "2.2.2.2"  # of gateways that warm a server up: nobody is to be met


def new_id(prefix: str = "") -> str:
    return prefix + os.urandom(16).hex()


@dataclass(frozen=True, slots=True)
class SessionStep:
    """Where a request stands in its session.

    `rid`: the request it goes on from (None: a new beginning). `offset`: how many leading tokens of that one are kept
    (0: all). `replace`: what went on from there before is forgotten. `drop_previous_output`: only its prompt is kept.
    """

    id: str
    rid: str | None = None
    offset: int = 0
    replace: bool = False
    drop_previous_output: bool = False


@dataclass(slots=True)
class Item:
    """One prompt, as text or as token ids, with how to continue it. `sampling.n` continuations are made.

    `logprob_start` is the first prompt position whose logprob is wanted; -1: none of the prompt's.
    """

    sampling: SamplingParams
    text: str | None = None
    ids: list[int] | None = None
    id: str = field(default_factory=new_id)
    add_special_tokens: bool = True
    return_logprob: bool = False
    logprob_start: int = -1
    top_logprobs: int = 0
    token_ids_logprob: list[int] = field(default_factory=list)
    priority: int = 0
    namespace: str = ""
    adapter: str = ""  # its name
    return_hidden: bool = False
    return_routed: bool = False
    routed_start: int = 0  # the first token whose experts are told
    stream_interval: int = 1
    reasons: bool = False  # a reasoning block may come first, and no constraint holds in it
    session: SessionStep | None = None
    room: int = -1  # where prefill and decode servers meet over it; -1: nowhere
    prefill: tuple[str, int] = ("", 0)  # for decode: host and port of the bootstrap server
    dp_rank: int | None = None  # the replica that it must go to
    thinking_budget: int | None = None  # tokens of reasoning
    pooled: bool = False  # for a model that does not generate
    second: int = 0  # token at which the second text of a pair begins
    audio: bytes = b""  # float32 log-mel features, for a model that hears
    align: Align | None = None  # where its tokens attend in the audio, in place of a continuation
    ttft: float = 0.0  # seconds to the first token, and between later ones, that are asked for; 0: as they come
    itl: float = 0.0
    tier: str = ""  # its class, which may have targets of its own
    user: str = ""  # whom the client names
    names: dict[str, str] = field(default_factory=dict)  # of fields that its client calls otherwise, in refusals
    pictures: list[Source] = field(default_factory=list)  # media; of each kind in the order of their places in it


@dataclass(slots=True)
class Prompt:
    """A prompt as token ids, and the pictures, videos and sounds among them."""

    ids: list[int]
    media: list[Media] = field(default_factory=list)

    @property
    def places(self) -> int:
        """Of its context: its tokens, or where its videos are further."""
        return reach(self.media, len(self.ids)) if self.media else len(self.ids)


@dataclass(slots=True)
class GenerateRequest:
    """One call: all items are validated before the first is submitted.

    With `stream` each iteration gives the continuations that have news; without, one iteration gives all, finished.
    `background`: it goes on to its end when the client leaves.
    """

    items: list[Item]
    stream: bool = False
    background: bool = False
