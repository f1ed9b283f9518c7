"""One picture over several ranks: each holds a part of the latents' tokens between attentions, and in them some heads.

A pass begins and ends alike on every rank. Where the blocks begin, a rank keeps its part of the tokens; in each
attention queries, keys and values are exchanged so that it has all tokens of its own heads, and what these make goes
back to the tokens' ranks (Ulysses, arXiv 2309.14509); behind the last block all tokens are put together. Texts, which
are short, are whole on every rank, all but their heads. Parts and heads need not divide.

Attentions of diffusers' models end in torch's `scaled_dot_product_attention`, which is where the exchange stands.

Legend: B rows, H heads, S tokens of texts, L those of latents, D a head's width.
"""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from phloem.core.errors import BadRequest, EngineDead, PhloemError
from phloem.diffusion.step_cache import TEXTS
from phloem.diffusion.twin import Twin
from phloem.distributed.comm import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.core.caching import StepCaching
    from phloem.diffusion.family import Family, Row
    from phloem.diffusion.request import Job
    from phloem.distributed.comm import Comm

ATTENTION: Any = torch.nn.functional.scaled_dot_product_attention
SECONDS = 600.0  # that a rank waits for the others: a step of a long film takes minutes


def parts_of(count: int, size: int) -> list[tuple[int, int]]:
    """(first, end) of each rank's part: the first ones have one more where they do not divide."""
    each, more = divmod(count, size)
    ends = [each * (rank + 1) + min(rank + 1, more) for rank in range(size)]
    return list(zip([0, *ends], ends, strict=False))


class Share:
    """One rank's part in the passes of a family: stands in the blocks of its transformers.

    Args:
        painter: a family whose blocks are known (`sequences`), before any adapter stands in its transformers.
        comm: this rank's end of the group.
    """

    def __init__(self, painter: Family, comm: Comm) -> None:
        self.comm, self._painter = comm, painter
        self._tokens = self._texts = 0  # L and S of the pass
        for model in painter.transformers():
            blocks: list[Any] = [block for name in painter.sequences for block in model.get_submodule(name)]
            for at, block in enumerate(blocks):
                self._wrap_block(block, first=at == 0, last=at + 1 == len(blocks))
                for name, module in block.named_children():
                    if name in painter.attentions:
                        self._wrap_attention(module)

    def _wrap_block(self, block: Any, *, first: bool, last: bool) -> None:
        forward, signature = block.forward, inspect.signature(block.forward)

        def run(*args: Any, **options: Any) -> Any:
            given = self._mine(signature, args, options, first)
            made = forward(**given)
            return self._put_together(made) if last else made

        block.forward = run

    def _mine(self, signature: inspect.Signature, args: Any, options: Any, first: bool) -> dict[str, Any]:
        """A block's arguments, with this rank's part of what has a place for each token."""
        given = signature.bind(*args, **options).arguments
        more = given.pop("kwargs", {})
        given = {**given, **more}
        given.pop("args", None)
        painter = self._painter
        if first:
            self._tokens = given[painter.states].shape[1]
            texts = given.get(TEXTS) if painter.joint_texts else None
            self._texts = 0 if texts is None else texts.shape[1]
            if self._tokens < self.comm.size:
                raise PhloemError(f"{self._tokens} tokens cannot be shared out among {self.comm.size} ranks")
        low, high = parts_of(self._tokens, self.comm.size)[self.comm.rank]

        def part(x: Tensor, dim: int) -> Tensor:
            """Of what has a place for each token, or for each of texts and tokens."""
            extra = x.shape[dim] - self._tokens
            if extra == 0:
                return x.narrow(dim, low, high - low)
            if extra != self._texts or not painter.texts_first:
                return x
            return torch.cat([x.narrow(dim, 0, extra), x.narrow(dim, extra + low, high - low)], dim)

        if first:
            given[painter.states] = part(given[painter.states], 1)
        return painter.by_token(given, part, self._tokens)

    def _put_together(self, made: Any) -> Any:
        """What the last block gives, with the tokens of all ranks."""
        painter = self._painter
        if isinstance(made, tuple):
            place = 0 if painter.states_first else 1
            return (*made[:place], self._gathered(made[place]), *made[place + 1 :])
        low, high = parts_of(self._tokens, self.comm.size)[self.comm.rank]
        texts = made.shape[1] - (high - low)  # of blocks that have both in one
        return torch.cat([made[:, :texts], self._gathered(made[:, texts:])], 1) if texts else self._gathered(made)

    def _gathered(self, mine: Tensor) -> Tensor:
        B, _, C = mine.shape
        size = self.comm.size
        flat, spans = mine.reshape(-1), parts_of(self._tokens, size)
        found = self.comm.all_to_all([flat] * size) if self._tokens % size else self.comm.all_gather(flat)
        pieces = [one.to(mine.device).view(B, high - low, C) for one, (low, high) in zip(found, spans, strict=True)]
        return torch.cat(pieces, 1)

    def _wrap_attention(self, module: Any) -> None:
        forward = module.forward

        def run(*args: Any, **options: Any) -> Any:
            mode = _Exchanged(self._attend)
            with mode:
                made = forward(*args, **options)
            if not mode.calls:
                raise PhloemError(
                    f"{type(module).__name__} does not attend by torch: its tokens cannot be shared out among ranks"
                )
            return made

        module.forward = run

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """[B, H, S + L, D] of all tokens by all ranks, each with some of the heads; given and made are parts of L."""
        comm, heads, spans = self.comm, query.shape[1], parts_of(self._tokens, self.comm.size)
        if not key.shape[1] == value.shape[1] == heads:
            raise PhloemError("attentions with fewer heads of keys than of queries cannot be shared out among ranks")
        if heads < comm.size:
            raise PhloemError(f"{heads} heads cannot be shared out among {comm.size} ranks")
        low, high = spans[comm.rank]
        texts, shares = query.shape[2] - (high - low), parts_of(heads, comm.size)
        first, end = shares[comm.rank]
        given = [self._split(x, texts) for x in (query, key, value)]
        mine = torch.stack([of_latents for _, of_latents in given])  # [3, B, H, part of L, D]
        found = comm.all_to_all([mine[:, :, start:stop].reshape(-1) for start, stop in shares])
        size = (3, mine.shape[1], end - first)
        pieces = [
            one.to(mine.device).view(*size, stop - start, mine.shape[-1])
            for one, (start, stop) in zip(found, spans, strict=True)
        ]
        whole = torch.cat(pieces, 3)
        if texts:
            of_texts = torch.stack([x[:, first:end] for x, _ in given])
            whole = torch.cat([of_texts, whole] if self._painter.texts_first else [whole, of_texts], 3)
        mask = options.pop("attn_mask", None)
        made = ATTENTION(*whole, attn_mask=self._masked(mask, texts, first, end), **options)
        return self._returned(made, texts, mine.shape, shares)

    def _masked(self, mask: Tensor | None, texts: int, first: int, end: int) -> Tensor | None:
        """Of all keys, for this rank's heads. A mask that was made of a rank's part has the texts' padding, and sees
        all of the latents. It must be the same for all queries."""
        if mask is None:
            return None
        low, high = parts_of(self._tokens, self.comm.size)[self.comm.rank]
        if mask.shape[-1] == texts + high - low:
            of_texts = mask[..., :texts] if self._painter.texts_first else mask[..., high - low :]
            seen = mask.new_full((*mask.shape[:-1], self._tokens), mask.dtype == torch.bool)
            mask = torch.cat([of_texts, seen] if self._painter.texts_first else [seen, of_texts], -1)
        if mask.shape[-1] != texts + self._tokens or mask.shape[-2] != 1:
            raise PhloemError(f"a mask of {tuple(mask.shape)} cannot be shared out among ranks")
        return mask[:, first:end] if mask.ndim == 4 and mask.shape[1] > 1 else mask

    def _returned(self, made: Tensor, texts: int, shape: torch.Size, shares: list[tuple[int, int]]) -> Tensor:
        """From all tokens of some heads to some tokens of all heads; texts go to every rank."""
        _, B, _, tokens, D = shape
        of_texts, of_latents = self._split(made, texts)
        sent = [
            torch.cat([of_texts.reshape(-1), of_latents[:, :, low:high].reshape(-1)])
            for low, high in parts_of(self._tokens, self.comm.size)
        ]
        pieces: list[tuple[Tensor, Tensor]] = []
        for one, (first, end) in zip(self.comm.all_to_all(sent), shares, strict=True):
            at = B * (end - first) * texts * D
            one = one.to(made.device)
            pieces.append((one[:at].view(B, end - first, texts, D), one[at:].view(B, end - first, tokens, D)))
        whole = [torch.cat(list(parts), 1) for parts in zip(*pieces, strict=True)]
        return torch.cat(whole if self._painter.texts_first else whole[::-1], 2)

    def _split(self, x: Tensor, texts: int) -> tuple[Tensor, Tensor]:
        """(of texts, of latents) along the tokens of [B, H, tokens, D]."""
        if self._painter.texts_first:
            return x[:, :, :texts], x[:, :, texts:]
        at = x.shape[2] - texts
        return x[:, :, at:], x[:, :, :at]


class _Exchanged(TorchFunctionMode):
    """In this thread, for one attention: torch's own is computed by all ranks."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self._attend = attend
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not ATTENTION:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        if given.get("is_causal") or given.pop("enable_gqa", False):
            raise PhloemError("attentions that are causal or grouped cannot be shared out among ranks")
        return self._attend(given.pop("query"), given.pop("key"), given.pop("value"), given)


def check_ranks(painter: Family, size: int) -> None:
    """Raises PhloemError: this family's tokens cannot be shared out, or not among so many."""
    if not painter.sequences:
        raise PhloemError(f"the tokens of {painter.facts.family} cannot be shared out among ranks")
    if painter.heads < size:
        raise PhloemError(f"its {painter.heads} heads cannot be shared out among {size} ranks")


def refuse_cache(rule: StepCaching) -> None:
    """Raises BadRequest: what a step cache compares would be a part alone."""
    if rule.threshold > 0:
        raise BadRequest(
            "cache: there is none where several ranks draw a picture (tp_size)", param="cache", code="not_supported"
        )


class SequenceParallel:
    """The ranks of one model in this process: a thread and a device each. The first is the painter's own.

    Args:
        painter: before any adapter or step cache stands in its transformers.
        devices: of the other ranks; where one is the painter's, the weights are shared.

    Raises:
        PhloemError: this family's tokens cannot be shared out, or not among so many.
    """

    def __init__(self, painter: Family, devices: Sequence[torch.device]) -> None:
        size = len(devices) + 1
        check_ranks(painter, size)
        self._painter = painter
        self.twins = [Twin(painter, device) for device in devices]
        comms = Threads.group(size, SECONDS)
        painters = [painter, *(twin.painter for twin in self.twins)]
        self.shares = [Share(one, comm) for one, comm in zip(painters, comms, strict=True)]
        self._pool = ThreadPoolExecutor(size - 1, "ranks")

    def close(self) -> None:
        self._pool.shutdown()

    def take(self, job: Job, rule: StepCaching) -> None:
        """Raises BadRequest."""
        refuse_cache(rule)

    def forward(self, rows: Sequence[Row], negative: Sequence[bool]) -> list[Tensor]:
        """v of each row. Raises what any rank raises, once none computes any more."""
        calls = [self._painter.forward, *(twin.forward for twin in self.twins)]
        others = [self._pool.submit(self._ran, rank, call, rows) for rank, call in enumerate(calls) if rank]
        errors: list[BaseException] = []
        found: list[Tensor] = []
        try:
            found = self._ran(0, calls[0], rows)
        except Exception as error:
            errors.append(error)
        errors += [error for error in (one.exception() for one in others) if error is not None]
        if errors:
            self._meet_anew()
            raise next((one for one in errors if not isinstance(one, EngineDead)), errors[0])
        return found

    def _ran(self, rank: int, call: Callable[[Sequence[Row]], list[Tensor]], rows: Sequence[Row]) -> list[Tensor]:
        try:
            return call(rows)
        except BaseException:
            self.shares[rank].comm.abort()  # the others would wait for this one
            raise

    def _meet_anew(self) -> None:
        for share, comm in zip(self.shares, Threads.group(len(self.shares), SECONDS), strict=True):
            share.comm = comm
