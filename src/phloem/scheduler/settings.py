"""What a scheduler is told once, and what it refuses by that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core import denoising
from phloem.core.errors import BadRequest
from phloem.core.media import FIRST, misfit, reach
from phloem.core.targets import Fair, Targets
from phloem.scheduler.chunks import Price
from phloem.scheduler.fairness import FairQueue
from phloem.scheduler.plan import Pace
from phloem.scheduler.policies import WaitingQueue

if TYPE_CHECKING:
    from phloem.core.adapters import Lender
    from phloem.kvcache.manager import CacheManager
    from phloem.scheduler.state import Request


@dataclass(frozen=True)
class ScheduleSettings:
    """`chunked_prefill_size` is the token budget of one step, decodes included; `mixed_prefill_size` bounds the prompt
    tokens of a step that also decodes, and from `worthwhile_prefill` on no further prompt enters a step (both default
    to the whole budget)."""

    max_running_requests: int
    context_length: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    max_queued_requests: int = 4096
    max_queue_seconds: float = 0.0  # beyond such a predicted wait for the first token a request is refused; 0: any
    chunked_prefill_size: int = 2048
    mixed_prefill_size: int | None = None
    worthwhile_prefill: int | None = None
    schedule_policy: str = "fcfs"
    stream_interval: int = 1
    random_seed: int | None = None
    overlap: bool = True
    debug_invariants: bool = False
    whole_prompts: bool = False  # every prompt is computed in one step
    sees: bool = False  # the model takes pictures
    whole_pictures: bool = False  # and one step computes all tokens of one
    speculates: bool = False  # answers tell how many drafts were accepted
    forced_tokens: int = 0  # see `Pace.forced`
    block: int = 0  # of a model of diffusion: known tokens that are computed together
    canvas: int = 0  # and places of a canvas
    targets: Targets = Targets()  # of requests that say none of their own
    fair: Fair = "none"  # by what the queue tells clients apart, of whom each gets its part; none: it does not
    waves: int = 1  # see `Pace.waves`
    dynamic_chunks: bool = False  # chunks of a prompt take equal time (`chunks.py`), which is found while serving

    @property
    def queue(self) -> WaitingQueue:
        """A new one."""
        return WaitingQueue() if self.fair == "none" else FairQueue(self.fair)

    def pace(self, slots: int, draft_room: int) -> Pace:
        # With every slot decoding there must be a token for each, or the last ones would starve.
        budget = max(self.chunked_prefill_size, slots * max(1, 2 * (self.canvas % denoising.WHOLE)))
        mixed, worthwhile = self.mixed_prefill_size or budget, self.worthwhile_prefill or budget
        waves = self.waves if self.overlap else 1
        price = Price() if self.dynamic_chunks else None
        return Pace(budget, mixed, worthwhile, draft_room, self.whole_prompts, self.forced_tokens, waves, price)


def check(
    request: Request, settings: ScheduleSettings, cache: CacheManager, most_tokens: int, lender: Lender | None = None
) -> None:
    """Raise BadRequest for what can never be served; `most_tokens`: of a text, prompt and answer; `lender`: knows how
    many tokens the request's adapter does."""
    count, params, adapter = request.num_prompt, request.params, request.submit.adapter
    vocab_size = max(settings.vocab_size, 0 if lender is None or not adapter else lender.tokens(adapter))
    if count == 0:
        raise BadRequest("the prompt is empty", param="input_ids")
    media = request.submit.media
    known = request.prompt[request.prompt < FIRST] if media else request.prompt
    low, high = int(known.min(initial=0)), int(known.max(initial=0))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise BadRequest(f"token id {wrong} is not in [0, {vocab_size})", param="input_ids")
    if media and (why := misfit(media, request.prompt, settings.vocab_size)):
        raise BadRequest(f"the request has {why}", param="image_data")
    if media and not settings.sees:
        raise BadRequest("this model takes no pictures", param="image_data")
    params.validate(vocab_size)
    if settings.block:
        denoising.check(request.submit)
    needed = reach(media, count) + (not request.scores_only)
    if settings.canvas > settings.block:
        needed = count + settings.canvas  # a canvas begins where the text ends, and is never shorter
    most = most_tokens if settings.block else settings.context_length
    if needed > most:
        raise BadRequest(f"the prompt of {count} tokens leaves no room in the context of {most}", param="input_ids")
    if cache.pages_for(count) > cache.most_pages:
        most = cache.most_pages * cache.page_size
        raise BadRequest(f"the prompt of {count} tokens exceeds the KV cache of {most} tokens", param="input_ids")
