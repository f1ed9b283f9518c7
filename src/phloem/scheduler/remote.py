"""A prompt computed by one server and its answer by another (`disagg/`), as the scheduler sees it.

A prefill server computes a prompt and one token, and offers what it has; a decode server lets a request wait for that,
and then goes on behind the first token as if it had drawn it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.batch import PositionLogprobs
from phloem.core.errors import BadRequest
from phloem.disagg.wire import Done, Position

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.core.request import FinishReason
    from phloem.disagg.arrivals import Arrivals
    from phloem.disagg.rooms import Rooms
    from phloem.scheduler.plan import Plan
    from phloem.scheduler.results import Results
    from phloem.scheduler.state import Request


class Remote:
    """Of a prefill server (`rooms`) or of a decode server (`arrivals`). `weights`: as both servers know them."""

    def __init__(self, rooms: Rooms | None, arrivals: Arrivals | None) -> None:
        self.rooms, self.arrivals = rooms, arrivals

    @property
    def busy(self) -> bool:
        return self.rooms is not None and self.rooms.busy

    def accept(self, request: Request) -> None:
        """A request has come in. Raises BadRequest: it asks for what is not carried over, or its room is taken."""
        submit = request.submit
        if not submit.room or request.scores_only:
            return
        if submit.return_routed:
            text = "experts of tokens are not carried over: leave bootstrap_room out"
            raise BadRequest(text, param="return_routed_experts", code="not_supported")
        adapter = "" if request.adapter is None else request.adapter.content()
        if self.rooms is not None:
            self.rooms.accept(request.id, submit.room, request.prompt, adapter)
            request.limit = min(request.limit, request.num_prompt + 1)
        elif self.arrivals is not None:
            host, port = submit.prefill_host, submit.prefill_port
            name, prompt = request.namespace, request.prompt
            late = self.arrivals.expect(request.id, submit.room, host, port, name, prompt, adapter)
            request.waits += (late,)

    def forces(self, request: Request) -> bool:
        """Whether what a grammar forces at the beginning may be written here: prefill draws one token, as any other."""
        return self.rooms is None or not request.submit.room

    def arrived(self, request: Request, results: Results) -> bool:
        """What the request waited for is there, or will not come. False: it has ended by its first token."""
        if self.arrivals is None or not request.submit.room or request.handed:
            return True
        first = self.arrivals.first(request.id, request.did)
        if first is None:
            return True
        request.handed = True
        request.cached_tokens = first.cached
        if request.wants_prompt:
            request.prompt_logprobs = _positions(first.prompt_logprobs)
            request.targets_from = request.num_prompt
        results.take_first(request, first.token, _positions(first.logprobs), first.hidden)
        return not request.finished

    def computed(self, plan: Plan) -> None:
        """A step is committed: what it computed of prompts is offered."""
        if self.rooms is None:
            return
        first = len(plan.rows) - len(plan.prefills)
        for row, request in enumerate(plan.prefills, start=first):
            if request.submit.room and not request.finished:
                done = int(plan.batch.prefix_lens[row] + plan.batch.query_lens[row])
                self.rooms.computed(request.id, request.namespace, request.known, min(done, request.num_prompt))

    def ended(self, request: Request, reason: FinishReason) -> None:
        """Its last chunk has not been made yet."""
        if self.rooms is None or not request.submit.room:
            return
        if reason.type == "abort" or not request.output:
            self.rooms.failed(request.id, reason.message or "the request was ended")
            return
        self.rooms.finished(
            request.id,
            Done(
                token=request.output[0],
                weights=self.rooms.weights,
                cached=request.cached_tokens,
                logprobs=_told(request.fresh_logprobs[:1]),
                prompt_logprobs=_told(request.prompt_logprobs),
                hidden=list(request.fresh_hidden[:1]),
            ),
        )

    def turn(self) -> None:
        if self.rooms is not None:
            self.rooms.turn()

    def state(self) -> dict[str, Any]:
        if self.rooms is not None:
            return {"mode": "prefill", **self.rooms.state()}
        return {"mode": "decode", **({} if self.arrivals is None else self.arrivals.state())}


def _told(items: Sequence[PositionLogprobs]) -> list[Position]:
    return [Position(item.token, item.top, item.chosen) for item in items]


def _positions(items: Sequence[Position]) -> tuple[PositionLogprobs, ...]:
    return tuple(PositionLogprobs(item.token, item.top, item.chosen) for item in items)
