"""What a step gave, request by request: stops, logprobs, failures, and one `Tokens` message for all of them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from phloem.core.errors import BadRequest, PhloemError
from phloem.core.messages import Chunk, Tokens
from phloem.core.request import FinishReason, RequestStatus
from phloem.scheduler.state import STEP, pack_logprobs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from phloem.core.adapters import Lender
    from phloem.core.batch import PositionLogprobs, StepOutput
    from phloem.core.messages import FromEngine
    from phloem.scheduler.plan import Plan
    from phloem.scheduler.policies import WaitingQueue
    from phloem.scheduler.state import Request, Slots

log = logging.getLogger(__name__)

MIN_HOLD = 3  # forced tokens from which sitting out one step is repaid


class Results:
    """Ends requests and collects their chunks. `live` is the scheduler's table of requests by id.

    `release(request, keep)` takes slot and pages from a running request; `lender` gets its adapter back.
    """

    def __init__(
        self,
        live: dict[str, Request],
        slots: Slots,
        queue: WaitingQueue,
        release: Callable[[Request, bool], None],
        stream_interval: int,
        lender: Lender | None = None,
    ) -> None:
        self.live = live
        self.slots = slots
        self.queue = queue
        self.release = release
        self.lender = lender
        self.stream_interval = max(1, stream_interval)
        self.output_tokens = 0
        self.jumped_tokens = 0  # of these, those that a grammar forced: they took no decode step
        self.speculates = False
        self.drafted = self.accepted = self.verify_calls = 0  # drafts verified, those that were right, rows with drafts
        self.passes = 0  # of canvases
        self.on_end: Callable[[Request, FinishReason], None] | None = None  # before its last chunk is made
        self._chunks: list[Chunk] = []
        self._rows: list[str] = []  # requests of which only a token is told, and those tokens
        self._plain: list[int] = []
        self._told: list[str] = []  # the rows that the other side knows
        self._message = 0

    def commit(self, plan: Plan, output: StepOutput) -> None:
        """Take in a step. Rows whose request has ended since the launch are dropped."""
        tokens: list[int] = output.tokens.tolist()
        rows = plan.rows
        one_each = len(tokens) == len(rows) and plan.batch.drafts is None and plan.batch.canvas is None
        ends: Sequence[int] = range(1, len(rows) + 1) if one_each else np.cumsum(output.counts).tolist()
        rest: Sequence[int] = range(len(rows))
        if one_each and self.stream_interval == 1:
            rest = [row for row, token in enumerate(tokens) if not self._only_token(rows[row], token)]
        for row in rest:
            request, begin = rows[row], ends[row - 1] if row else 0
            if request.status is RequestStatus.FINISHED:
                continue
            try:
                if request.plain and ends[row] - begin == 1 and plan.batch.canvas is None:
                    self._tokens(request, tokens[begin : ends[row]])
                else:
                    self._row(plan, output, row, tokens[begin : ends[row]])
            except BadRequest as error:  # its grammar
                self.fail(request, error.message, error.status, error.param, error.code)
            except Exception as error:
                log.exception("request %s: its result could not be taken", request.id)
                self.fail(request, f"{type(error).__name__}: {error}", 500)

    def verified(self, plan: Plan, output: StepOutput) -> None:
        """Count the drafts that a step verified, before its tokens are taken in."""
        assert output.verified is not None
        for row in np.flatnonzero(output.verified).tolist():
            count, right, request = int(output.verified[row]), max(0, int(output.counts[row]) - 1), plan.rows[row]
            self.verify_calls += 1
            self.drafted += count
            self.accepted += right
            request.drafted += count
            request.right += [0] * (right + 1 - len(request.right))
            request.right[right] += 1

    def drafts(self) -> dict[str, float]:
        """Fields of `Stats`."""
        if self.passes:
            return {"dllm_passes": self.passes, "dllm_tokens_per_forward": self.output_tokens / self.passes}
        if not self.speculates:
            return {}
        steps = self.output_tokens - self.jumped_tokens - self.accepted
        return {
            "spec_verify_calls": self.verify_calls,
            "spec_drafted": self.drafted,
            "spec_accepted": self.accepted,
            "spec_accept_length": (steps + self.accepted) / steps if steps > 0 else 0.0,
            "spec_accept_rate": self.accepted / self.drafted if self.drafted else 0.0,
        }

    def _row(self, plan: Plan, output: StepOutput, row: int, tokens: Sequence[int]) -> None:
        """A row of which there may be more to take than one token."""
        request, batch = plan.rows[row], plan.batch
        if row in output.failed:
            self.fail(request, output.failed[row], 400 if row in output.refused else 500)
            return
        if request.routed is not None and row in output.routed:
            request.routed.take(*output.routed[row])
        if batch.canvas is not None:
            if batch.canvas[row]:
                self._canvas(request, tokens, output.logprobs.get(row, ()))
            return
        request.prompt_logprobs += tuple(output.prompt_logprobs.get(row, ()))
        if not batch.outputs[row]:
            if row in plan.scored:
                if request.submit.pooled or request.submit.align is not None:
                    request.pooled = output.pooled[row].astype("<f4", copy=False).tobytes()
                self.finish(request, FinishReason("length", length=0))
            return
        room = 0 if batch.drafts is None else int(batch.drafts[row])
        if not 1 <= len(tokens) <= 1 + room:
            raise ValueError(f"the step gave {len(tokens) or 'no'} tokens, with room for {room} drafts")
        logprobs, hidden = output.logprobs.get(row, ()), output.hidden.get(row, ())
        if request.submit.return_logprob and len(logprobs) != len(tokens):
            raise ValueError(f"the step gave {len(logprobs) or 'no'} logprobs for {len(tokens)} tokens")
        if request.submit.return_hidden and len(hidden) != len(tokens):
            raise ValueError(f"the step gave {len(hidden) or 'no'} hidden states for {len(tokens)} tokens")
        self._tokens(request, tokens, logprobs, hidden)

    def _canvas(self, request: Request, tokens: Sequence[int], logprobs: Sequence[PositionLogprobs]) -> None:
        """A pass over a request's canvas; where that is done, it gave tokens, which the next step computes."""
        request.passes += 1
        self.passes += 1
        if not tokens:
            request.inflight -= 1
            return
        if request.submit.return_logprob and len(logprobs) != len(tokens):
            raise ValueError(f"the step gave {len(logprobs) or 'no'} logprobs for {len(tokens)} tokens")
        self._tokens(request, tokens, logprobs)
        if request.slot >= 0:
            self.slots.extend(request, len(tokens))

    def _tokens(
        self,
        request: Request,
        tokens: Sequence[int],
        logprobs: Sequence[PositionLogprobs] = (),
        hidden: Sequence[NDArray[np.float32]] | NDArray[np.float32] = (),
    ) -> None:
        """What a step has chosen for a request: taken up to where it ends, and told."""
        count, reason = 0, None
        request.inflight -= 1
        for token in tokens:
            request.output.append(token)
            request.fresh.append(token)
            count += 1
            reason = self._reason(request)
            if reason is not None:
                break
        self.output_tokens += count
        if not request.plain:
            self._extras(request, logprobs[:count], hidden[:count])
        if not request.inflight and request.slot >= 0:
            self.slots.next_token[request.slot] = request.output[-1]
        if reason is not None:
            self.finish(request, reason)
            return
        if request.constraint is not None and request.constraint.can_jump and self.jump(request):
            return
        if not request.sent or len(request.fresh) >= self.stream_interval:
            self._chunks.append(self._chunk(request, None))

    def take_first(
        self, request: Request, token: int, logprobs: Sequence[PositionLogprobs], hidden: Sequence[bytes]
    ) -> None:
        """The first token of a request without a slot, which another server has drawn."""
        request.inflight += 1
        request.fresh_hidden += tuple(hidden)
        self._tokens(request, [token], logprobs)

    def _only_token(self, request: Request, token: int) -> bool:
        """As `_tokens` where a token is all there is to do and tell; False, and nothing is changed, where it is not.

        Most rows of most steps go this way: it saves a chunk, and calls.
        """
        out = request.output
        if token in request.stops or request.num_prompt + len(out) + 1 >= request.limit or not request.plain:
            return False
        if request.fresh or request.message == self._message or not request.sent:
            return False
        if request.status is RequestStatus.FINISHED:
            return False
        request.inflight -= 1
        out.append(token)
        self.output_tokens += 1
        if not request.inflight and request.slot >= 0:
            self.slots.next_token[request.slot] = token
        self._rows.append(request.id)
        self._plain.append(token)
        return True

    def _extras(
        self,
        request: Request,
        logprobs: Sequence[PositionLogprobs],
        hidden: Sequence[NDArray[np.float32]] | NDArray[np.float32],
    ) -> None:
        if request.submit.return_logprob:
            request.fresh_logprobs += tuple(logprobs)
        if request.submit.return_hidden:
            request.fresh_hidden += tuple(state.astype("<f4", copy=False).tobytes() for state in hidden)

    def _reason(self, request: Request) -> FinishReason | None:
        """Why the request ends with its last token; None where it goes on."""
        token, count = request.output[-1], len(request.output)
        if token in request.stops and count >= request.params.min_new_tokens:
            return FinishReason("stop", matched=token)
        if request.num_prompt + count >= request.limit:
            return FinishReason("length", length=count)
        return None

    def _ends(self, request: Request) -> bool:
        """End the request if its last token says so."""
        reason = self._reason(request)
        if reason is not None:
            self.finish(request, reason)
        return reason is not None

    def jump(self, request: Request) -> bool:
        """Append the tokens that the grammar forces: the next step computes them as one chunk. True if that ends it.

        With a step of the request in flight nothing can be appended, as that step samples after the known output. A
        long forced text is then worth sitting out the next one (`Slots.hold`); its rest is appended after this one.
        """
        constraint = request.constraint
        # What is appended at the end is never computed: nobody could tell its experts.
        forced = [] if constraint is None or request.routed is not None else constraint.jump(request.output)
        if request.inflight:
            if len(forced) == 1 and forced[0] in request.stops:
                self._append(request, forced[0])  # the text is complete: what is in flight can only say so too
                return self._ends(request)
            if len(forced) >= MIN_HOLD and request.slot >= 0:
                self.slots.hold(request.slot, STEP)
            return False
        for token in forced:
            self._append(request, token)
            if self._ends(request):
                return True
        if forced and constraint is not None:
            constraint.advance(request.output)
            if request.slot >= 0:
                self.slots.extend(request, len(forced))
        return False

    def _append(self, request: Request, token: int) -> None:
        request.output.append(token)
        request.fresh.append(token)
        request.jumped += 1
        self.output_tokens += 1
        self.jumped_tokens += 1

    def finish(self, request: Request, reason: FinishReason, answer: bool = True, keep: bool = True) -> None:
        """End a request wherever it stands; its pages are free afterwards. `answer` sends its last chunk."""
        if request.status is RequestStatus.FINISHED:
            return
        if request.slot >= 0:
            self.release(request, keep)
        elif request.status is RequestStatus.WAITING:
            self.queue.remove(request)
        request.status = RequestStatus.FINISHED
        if self.on_end is not None:
            self.on_end(request, reason)
        self.live.pop(request.id, None)
        self.queue.ended(request)
        if request.adapter is not None and self.lender is not None:
            self.lender.give_back(request.adapter)
        if answer:
            self._chunks.append(self._chunk(request, reason))

    def fail(
        self, request: Request, message: str, status_code: int, param: str | None = None, code: str | None = None
    ) -> None:
        """End a request that went wrong, alone. What only it computed is not kept for others."""
        level = logging.ERROR if status_code >= 500 else logging.WARNING
        log.log(level, "request %s failed (%d): %s", request.id, status_code, message)
        reason = FinishReason("abort", message=message, status_code=status_code, param=param, code=code)
        self.finish(request, reason, answer=False, keep=False)
        try:
            chunk = self._chunk(request, reason)
        except Exception:
            log.exception("request %s: what it had made so far is lost", request.id)
            chunk = Chunk(id=request.id, finish=reason)
        self._chunks.append(chunk)

    def refuse(self, request_id: str, error: PhloemError) -> None:
        """Answer a request that never came in."""
        message, status_code = error.message, error.status
        log.log(
            logging.WARNING if status_code < 500 or status_code == 503 else logging.ERROR,
            "request %s refused (%d): %s",
            request_id,
            status_code,
            message,
        )
        reason = FinishReason(
            "abort",
            message=message,
            status_code=status_code,
            param=error.param,
            retry_after=error.retry_after,
            code=error.code,
        )
        self._chunks.append(Chunk(id=request_id, finish=reason))

    def tell_all(self) -> None:
        """What has been chosen and not told yet, whatever the interval."""
        for request in self.live.values():
            if request.fresh:
                self._chunks.append(self._chunk(request, None))

    def _chunk(self, request: Request, finish: FinishReason | None) -> Chunk:
        submit = request.submit
        chunk = Chunk(id=request.id, tokens=request.fresh, finish=finish)
        if not request.sent or finish is not None:
            chunk.cached_tokens = request.cached_tokens
            chunk.cached_host, chunk.cached_storage = request.cached_host, request.cached_storage
            chunk.queue_seconds = max(0.0, request.admitted - request.received)
            chunk.passes = request.passes
            if self.speculates:
                chunk.drafts = [request.jumped, request.drafted, *request.right]
        if submit.return_logprob:
            chunk.logprobs = pack_logprobs(request.fresh_logprobs, submit)
            request.fresh_logprobs = ()
            if not request.sent and request.wants_prompt:
                chunk.prompt_logprobs = pack_logprobs(request.prompt_logprobs, submit)
        if request.fresh_hidden:
            chunk.hidden, request.fresh_hidden = list(request.fresh_hidden), ()
        if request.routed is not None:
            chunk.routed = request.routed.news(request.num_prompt + len(request.output) - 1)
        chunk.pooled = request.pooled
        if request.did:
            chunk.did, request.did = request.did, []
        request.fresh = []
        request.sent, request.message = True, self._message
        return chunk

    def state(self) -> dict[str, Any]:
        return {"output_tokens": self.output_tokens, "jumped_tokens": self.jumped_tokens, **self.drafts()}

    def flush(self, send: Callable[[FromEngine], None]) -> None:
        """Send what has collected, as one message."""
        if not self._chunks and not self._rows:
            return
        message = Tokens(chunks=self._chunks, plain=self._plain)
        if self._rows != self._told:
            message.rows = self._rows
        # Behind a chunk the same ids may mean other requests: one has begun, or ended.
        self._told = [] if self._chunks else self._rows
        self._chunks, self._rows, self._plain = [], [], []
        self._message += 1
        send(message)
