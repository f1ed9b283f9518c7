"""Two agents that talk to each other, trained together against a running server.

    phloem serve MODEL --dtype float32 --enable-deterministic-inference
    python examples/rl/two_agents.py --url http://127.0.0.1:30000 --model MODEL --steps 30

Both read the same opening and take turns. Each has a role of its own in front of what it reads, and reads its own
sampled ids as they were and the other's as they came: nothing is ever tokenised again, and the server finds all but the
last turn in its cache. A program rewards a dialogue by how much of what each says the other has just said: from noise,
they agree on words. The reward is both agents'; the loss of each counts the tokens that it sampled itself.

Weights go to the server after each step, as in `grpo.py`. One set of weights plays both roles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from grpo import arguments, push
from transformers import AutoModelForCausalLM

ROLES = ([5, 6], [7, 8])  # in front of what each agent reads
OPENING = 4  # tokens
WORDS = 6  # tokens of a turn
TURNS = 4


@dataclass
class Step:
    reward: float  # mean over all dialogues
    logprob_diff: float  # mean |server - trainer| over all sampled tokens
    version: str  # of the weights that made them
    cached: float  # share of what agents read that the server had in its cache


@dataclass
class Dialogues:
    """Of D dialogues: what was said, turn by turn, and what the server says of it."""

    opening_DN: list[list[int]]
    turns: list[list[list[int]]]  # [TURNS][D][WORDS]
    logprobs: list[list[list[float]]]
    versions: set[str]
    cached: float


def talk(http: httpx.Client, opening_DN: list[list[int]], seed: int) -> Dialogues:
    """Let the agents speak in turn, all dialogues of a turn in one request."""
    found = Dialogues(opening_DN, [], [], set(), 0.0)
    read = hit = 0
    for turn in range(TURNS):
        role = ROLES[turn % 2]
        heard = [
            role + opening + [word for earlier in found.turns for word in earlier[at]]
            for at, opening in enumerate(opening_DN)
        ]
        usual: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": WORDS, "ignore_eos": True}
        # A seed each: dialogues of one opening are to differ.
        params = [usual | {"sampling_seed": (seed * TURNS + turn) * len(heard) + at} for at in range(len(heard))]
        answer = http.post("/generate", json={"input_ids": heard, "sampling_params": params, "return_logprob": True})
        answer.raise_for_status()
        said = answer.json()
        found.turns.append([one["output_ids"] for one in said])
        found.logprobs.append([[p for p, *_ in one["meta_info"]["output_token_logprobs"]] for one in said])
        found.versions |= {one["meta_info"]["weight_version"] for one in said}
        read += sum(one["meta_info"]["prompt_tokens"] for one in said)
        hit += sum(one["meta_info"]["cached_tokens"] for one in said)
    found.cached = hit / read
    return found


def rewards(turns: list[list[list[int]]]) -> torch.Tensor:
    """[D]: the share of words that the other has said in the turn before, over all turns but the first."""
    shares = [
        [sum(word in before for word in now) / len(now) for before, now in zip(earlier, later, strict=True)]
        for earlier, later in pairwise(turns)
    ]
    return torch.tensor(shares).mean(0)


def logprobs_of(model: torch.nn.Module, agent: int, dialogues: Dialogues) -> tuple[torch.Tensor, torch.Tensor]:
    """(The trainer's, the server's) [D, tokens that this agent sampled], as it read them."""
    count = len(dialogues.opening_DN)
    rows = [
        ROLES[agent] + dialogues.opening_DN[at] + [word for turn in dialogues.turns for word in turn[at]]
        for at in range(count)
    ]
    ids = torch.tensor(rows)
    all_DT = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    begin = len(ROLES[agent]) + OPENING - 1
    own = [turn for turn in range(TURNS) if turn % 2 == agent]
    mine = torch.cat([all_DT[:, begin + turn * WORDS : begin + (turn + 1) * WORDS] for turn in own], 1)
    theirs = torch.cat([torch.tensor(dialogues.logprobs[turn]) for turn in own], 1)
    return mine, theirs


def train(
    url: str,
    path: str,
    steps: int,
    group: int = 16,
    rate: float = 1e-2,
    seed: int = 1,
    tell: Callable[[int, Step], None] | None = None,
) -> list[Step]:
    """Train the checkpoint at `path`, which the server at `url` serves. Gives what each step saw, and tells it then."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    openings = torch.randint(16, model.config.vocab_size, (2, OPENING)).tolist()
    asked = [opening for opening in openings for _ in range(group)]
    found: list[Step] = []
    with httpx.Client(base_url=url, timeout=300) as http:
        push(http, model, "step-0")
        for step in range(steps):
            dialogues = talk(http, asked, step)
            reward_D = rewards(dialogues.turns)
            grouped = reward_D.view(-1, group)
            advantage_D = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1)
            optimizer.zero_grad()
            loss, apart = torch.zeros(()), list[torch.Tensor]()
            for agent in (0, 1):
                new, old = logprobs_of(model, agent, dialogues)
                apart.append((new.detach() - old).abs())
                loss = loss - (advantage_D[:, None] * (new - old).exp()).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            (version,) = dialogues.versions
            found.append(Step(reward_D.mean().item(), torch.cat(apart).mean().item(), version, dialogues.cached))
            push(http, model, f"step-{step + 1}")
            if tell is not None:
                tell(step, found[-1])
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rate", type=float, default=1e-2, help="of learning; 3e-5 for a trained model")
    parser.add_argument("--group", type=int, default=16, help="dialogues of an opening")
    parser.add_argument("--log", default="", help="a file for a line of JSON for each step")
    options = parser.parse_args()
    begun = time.perf_counter()

    def tell(number: int, step: Step) -> None:
        print(
            f"step {number}: reward {step.reward:.3f}, logprob diff {step.logprob_diff:.2e}, weights {step.version}, "
            f"{step.cached:.0%} of what was read came from the cache",
            flush=True,
        )
        if options.log:
            line = {"step": number, **asdict(step), "seconds": round(time.perf_counter() - begun, 2)}
            with Path(options.log).open("a") as file:
                file.write(json.dumps(line) + "\n")

    train(options.url, options.model, options.steps, group=options.group, rate=options.rate, tell=tell)


if __name__ == "__main__":
    main()
