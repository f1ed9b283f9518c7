"""What several engines say, put together into what one would have said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.core.messages import Control, ControlReply, Stats

if TYPE_CHECKING:
    from collections.abc import Sequence

# Calls that each engine can be asked for by itself; all others change weights, and must reach every one.
_SINGLE = frozenset(
    [
        "flush_cache",
        "clear_hicache_storage",
        "state",
        "pause",
        "resume",
        "abort_all",
        "cache_tree",
        "kv_events",
        "expert_distribution",
        "get_weights_by_name",
        "load_lora_adapter",
        "unload_lora_adapter",
        "check_weights",
        "capture",
    ]
)
# Means, and of how many each is one.
_MEANS = {"spec_accept_length": "spec_verify_calls", "dllm_tokens_per_forward": "dllm_passes"}
_RATES = ("cache_hit_rate", "outside_forward", "spec_accept_rate")  # shares: of those that have anything
_LISTS = ("grammar_seconds", "step_seconds")


@dataclass
class Asked:
    """An administrative call on its way to several engines."""

    control: Control
    waiting: set[int]
    replies: dict[int, ControlReply] = field(default_factory=dict[int, ControlReply])

    @property
    def of_weights(self) -> bool:
        return self.control.name not in _SINGLE

    @property
    def differ(self) -> bool:
        """Whether some have done it and some have not."""
        return len({reply.ok for reply in self.replies.values()}) > 1

    def for_rank(self, rank: int) -> Control:
        """The call as this engine is asked for it: in a trainer's group each has a place of its own."""
        if self.control.name != "init_group":
            return self.control
        args = {**self.control.args, "rank": self.control.args["rank"] + rank}
        return Control(id=self.control.id, name=self.control.name, args=args)

    def take(self, rank: int, reply: ControlReply) -> bool:
        """Whether that was the last of those that are waited for."""
        if rank not in self.waiting:
            return False
        self.waiting.discard(rank)
        self.replies[rank] = reply
        return not self.waiting

    def answer(self) -> ControlReply:
        """That of the first engine; `ok` where all are, and otherwise with what the first that is not has said."""
        ranks = sorted(self.replies)
        first = self.replies[ranks[0]]
        failed = [rank for rank in ranks if not self.replies[rank].ok]
        text = first.message
        if failed:
            told = self.replies[failed[0]].message
            text = told if len(failed) == len(ranks) else f"data parallel rank {failed[0]}: {told}"
        data: dict[str, Any] = dict(first.data)
        if self.control.name == "state":
            data["ranks"] = [{"dp_rank": rank, **self.replies[rank].data} for rank in ranks]
        if "logical_count" in first.data and not failed:
            data["logical_count"] = _sum([self.replies[rank].data["logical_count"] for rank in ranks])
        return ControlReply(id=self.control.id, ok=not failed, message=text, data=data)


def _sum(tables: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def summed(parts: Sequence[Stats], news: Stats) -> Stats:
    """The account of all engines; what is told once, and not again, is that of `news` alone."""
    values: dict[str, Any] = {}
    for name in Stats.__struct_fields__:
        each = [getattr(part, name) for part in parts]
        if name in _LISTS:
            values[name] = getattr(news, name)
        elif name in _RATES:
            some = [value for value in each if value]
            values[name] = sum(some) / len(some) if some else 0.0
        elif name in _MEANS:
            calls = [getattr(part, _MEANS[name]) for part in parts]
            weighed = sum(value * count for value, count in zip(each, calls, strict=True))
            values[name] = weighed / sum(calls) if any(calls) else 0.0
        elif name == "tiers":
            values[name] = {
                key: sum(part.get(key, 0.0) for part in each) for key in {key for part in each for key in part}
            }
        else:
            values[name] = sum(each)
    return msgspec.convert(values, Stats)
