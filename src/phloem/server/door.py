"""What every route needs, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from phloem.core.errors import BadRequest, NotFound
from phloem.protocol.answers import Answer
from phloem.protocol.body import Body, Parser
from phloem.server.responses.store import ResponseStore
from phloem.server.stream import collect, encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from phloem.client.client import EngineClient
    from phloem.client.continuation import Continuation
    from phloem.client.info import ModelInfo
    from phloem.client.request import GenerateRequest
    from phloem.core.config import Config
    from phloem.server.health import Health
    from phloem.server.metrics import Metrics
    from phloem.server.videos.store import VideoStore

T = TypeVar("T", bound=Body)
MAX_N = 128  # continuations of one prompt, as `SamplingParams.validate` has it


@dataclass(frozen=True)
class Door:
    """The state of one app."""

    client: EngineClient
    config: Config
    info: ModelInfo
    health: Health
    metrics: Metrics
    videos: VideoStore
    responses: ResponseStore = field(default_factory=ResponseStore)

    async def read(self, request: Request, parser: Parser[T], empty: bytes = b"") -> T:
        """The request's body; `empty` stands for a body of no bytes where a route allows that."""
        parts = [part async for part in request.stream()]  # not `body()`: that keeps it for as long as the answer takes
        if parser.kind.pooled is not None:
            self.info.check_pooled(parser.kind.pooled)
        body = parts.pop() if len(parts) == 1 else b"".join(parts)
        return parser.parse(body or empty, self.info.features)

    @property
    def adapters(self) -> dict[str, str]:
        """Path by name, as the engine said last."""
        return self.client.adapters

    def check_model(self, name: str | None) -> str:
        """The adapter that a model's name asks for: its own name, or behind the base's and a colon; "": the base alone.

        Raises:
            NotFound: there is no such model.
        """
        if self.info.answers_to(name) or name is None:
            return ""
        if name in self.adapters:
            return name
        for base in (self.info.served_model_name, self.info.model_path, "default"):
            if name.startswith(f"{base}:") and name[len(base) + 1 :] in self.adapters:
                return name[len(base) + 1 :]
        known = "".join(f", {adapter!r}" for adapter in list(self.adapters)[:20])
        raise NotFound(
            f"there is no model {name!r:.200}; this server serves {self.info.served_model_name!r}{known}",
            param="model",
            code="model_not_found",
        )

    def adapt(self, request: GenerateRequest, model: str | None, lora_path: str | None = None) -> str:
        """Give every item the adapter that its model's name or `lora_path` asks for; gives the model's name to answer
        with.

        Raises:
            NotFound: there is no such model.
            BadRequest: the two ask for different ones.
        """
        adapter = self.check_model(model)
        if adapter and lora_path and adapter != lora_path:
            raise BadRequest(f"model asks for adapter {adapter!r}, lora_path for {lora_path!r:.200}", param="lora_path")
        for item in request.items:
            item.adapter = adapter or lora_path or ""
        return model if adapter and model is not None else self.info.served_model_name

    def collector(self, request: Request) -> Callable[[GenerateRequest], Awaitable[list[Continuation]]]:
        """Submits what is asked for and waits for its end, or for the client's."""

        async def run(asked: GenerateRequest) -> list[Continuation]:
            self.check_batch(asked)
            return await collect(request, await self.client.submit(asked))

        return run

    def check_batch(self, request: GenerateRequest) -> None:
        """The number of continuations asked for; an `n` beyond its range is for the client to refuse, by its name."""
        count = sum(min(item.sampling.n, MAX_N) for item in request.items)
        limit = self.config.server.max_prompts_per_request
        if count > limit:
            raise BadRequest(f"{count} prompts in one request (n counts), at most {limit} are allowed", param="prompt")


def door_of(request: Request) -> Door:
    return request.app.state.door


def json_response(answer: Answer | dict[str, Any] | list[Any] | str, status: int = 200) -> Response:
    return Response(encode(answer), status, media_type="application/json")
