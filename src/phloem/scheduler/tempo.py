"""How soon and how steadily requests are answered: due times of first tokens, and steps short enough for later ones.

A request is *due* when its first token was promised. Whoever cannot make it any more stands back once, behind those
that still can: of more prompts than can be computed in time, those that are lost must not make the others late too.

Between tokens a request waits for the prompts of the steps that it shares. How many prompt tokens fit the promise is
found from the last steps themselves: how long they were for how many prompt tokens, beyond what steps without any take.
Tokens far inside a long prompt take longer than those of a short one: they count as many as they cost (`chunks.Price`).
No model of the machine is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from phloem.core.batch import Batch
    from phloem.core.targets import Target
    from phloem.scheduler.chunks import Price
    from phloem.scheduler.policies import WaitingQueue
    from phloem.scheduler.state import Request, Slots

USUAL_TTFT = 1.0  # seconds, of requests to which nothing was promised
LATE_SECONDS = 30.0  # by which a request that is late stands back
LOOKS = 32  # requests that are looked at for that in one step
STEPS = 3  # that a first token takes beside its prompt: the one that runs, its own, and what these share with decodes
AIM = 0.9  # of what is promised, as steps are not all alike
LEARNS = 0.25  # weight of the newest step without prompts
KEEPS = 0.95  # of the weight of older steps with prompts, with each
ALIKE = 0.01  # steps whose sizes vary less, relative to their mean and squared, tell no slope
LEAST = 16  # prompt tokens that a step takes in any case: prompts never stand still


def promise(request: Request, target: Target, seconds_a_token: float) -> None:
    """Write down what a request is promised. To one that has no target of its own nothing is due before its prompt can
    have been computed."""
    own = request.num_prompt * seconds_a_token if not target.ttft else 0.0
    request.due = request.received + (target.ttft or USUAL_TTFT) + own
    request.itl = target.itl


def stand_back(queue: WaitingQueue, soonest: float, seconds_a_token: float) -> None:
    """Those in front whose first token would be late if their prompts were begun at once, and that have not given way
    yet. `soonest`: when a prompt without tokens would have its first one."""
    for request in queue.front(LOOKS):
        if request.late or request.admitted >= 0:
            continue
        if soonest + request.num_prompt * seconds_a_token > request.due:
            queue.remove(request)
            request.late = True
            request.key += LATE_SECONDS
            queue.add(request)


@dataclass(slots=True)
class Tempo:
    """Prompt tokens that a step with decoding rows may take, had they nothing before them. `decode`: seconds of a step
    without prompts. The others: weight, tokens, seconds beyond `decode`, and products of these, summed over the last
    steps with prompts."""

    decode: float = 0.0
    mixed: bool = False  # whether a step that also decodes was seen
    largest: float = 0.0  # prompt tokens of one, lately
    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def saw(self, batch: Batch, seconds: float, price: Price) -> None:
        """A batch has run for so long. `price`: of tokens that have others before them."""
        decodes = batch.query_lens == 1
        if batch.drafts is not None:
            decodes |= batch.drafts > 0
        counts, starts = batch.query_lens[~decodes].astype(np.float64), batch.prefix_lens[~decodes].astype(np.float64)
        self.took(price.worth(counts, starts), int(decodes.sum()), seconds)

    def took(self, prompts: float, decodes: int, seconds: float) -> None:
        """A step is done: prompt tokens, rows that decode, and how long it ran."""
        if seconds <= 0:
            return
        if not prompts:
            self.decode += (seconds - self.decode) * (LEARNS if self.decode else 1.0)
            return
        if not decodes and self.mixed:
            return  # a step of prompts alone tells less of one that decodes too
        if decodes and not self.mixed:
            self.mixed, self.weight, self.tokens, self.seconds = True, 0.0, 0.0, 0.0
            self.squares = self.products = 0.0
        more = max(0.0, seconds - self.decode) if decodes else seconds
        self.largest = max(prompts, self.largest * KEEPS)
        self.weight = self.weight * KEEPS + 1
        self.tokens = self.tokens * KEEPS + prompts
        self.seconds = self.seconds * KEEPS + more
        self.squares = self.squares * KEEPS + prompts * prompts
        self.products = self.products * KEEPS + prompts * more

    def prompt_tokens(self, itl: float, most: int) -> int:
        """Of the next step, where rows are promised a token every `itl` seconds; at most `most`.

        Seconds are taken for a straight line over tokens, as the last steps show it: small prompts may cost nothing, in
        the shadow of weights that are read anyway. Nothing is believed of steps twice as large as any of these.
        """
        if not self.weight:
            return most
        mean, each = self.tokens / self.weight, self.seconds / self.tokens
        spread = self.squares / self.weight - mean * mean
        slope = each
        if spread > ALIKE * mean * mean:
            slope = (self.products / self.weight - mean * self.seconds / self.weight) / spread
        slope = max(slope, each / 4, 1e-12)
        room = AIM * itl - self.decode - (self.seconds / self.weight - slope * mean)
        found = min(room / slope, 2 * self.largest, float(most))
        return max(int(found), min(LEAST, most), 1)

    def within(self, slots: Slots, most: int) -> int:
        """The same for the rows that would decode in the next step."""
        active = slots.active()
        decodes = active[slots.length[active] - slots.computed[active] == 1]
        tightest = float(slots.itl[decodes].min(initial=np.inf))
        return most if tightest == np.inf else min(most, self.prompt_tokens(tightest, most))
