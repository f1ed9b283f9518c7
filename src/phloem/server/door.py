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
    responses: ResponseStore = field(default_factory=ResponseStore)

    async def read(self, request: Request, parser: Parser[T], empty: bytes = b"") -> T:
        """The request's body; `empty` stands for a body of no bytes where a route allows that."""
        parts = [part async for part in request.stream()]  # not `body()`: that keeps it for as long as the answer takes
        if parser.kind.pooled is not None:
            self.info.check_pooled(parser.kind.pooled)
        body = parts.pop() if len(parts) == 1 else b"".join(parts)
        return parser.parse(body or empty, self.info.features)

    def check_model(self, name: str | None) -> None:
        if not self.info.answers_to(name):
            raise NotFound(
                f"there is no model {name!r:.200}; this server serves {self.info.served_model_name!r}",
                param="model",
                code="model_not_found",
            )

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
