"""Texts to learn from: JSONL to token ids, with a mask over what the assistant said."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from phloem.core.errors import BadRequest, PhloemError
from phloem.training.seeing import has_pictures

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.multimodal._reader import Source
    from phloem.text.template import ChatTemplate
    from phloem.text.tokenizer import Tokenizer
    from phloem.training.seeing import Eyes, Seen

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
TEXT_PROMPT = 32  # tokens of a plain text that stand as a prompt where the model writes on


class BadData(PhloemError):
    """Text that nothing can be learned from; the message names file and line."""


@dataclass(frozen=True)
class Row:
    """One line: a conversation, a plain text, or token ids as an engine gave them; these with the conversation that
    they answer where it has pictures."""

    line: int
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Token ids, and which of them were the assistant's; and the pictures whose placeholders are among them."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    media: tuple[Media, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What the model is given to answer. `length`: tokens, with those of its pictures."""

    ids: list[int]  # with a mark for each picture
    length: int
    pictures: tuple[Source, ...] = ()


def read_rows(path: Path) -> list[Row]:
    """Every line that is not blank.

    Raises:
        BadData: the file cannot be read, has no rows, or a line is not what it should be (with its number).
    """
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_row(line, number, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadData(f"{path} cannot be read: {reason}") from None
    if not rows:
        raise BadData(f"{path}: there is nothing in it")
    return rows


def _row(line: str, number: int, where: str) -> Row:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{where}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadData(f"{where}: expected an object with messages, conversations or text")
    row = cast("dict[str, Any]", found)
    if "output_ids" in row:
        messages = tuple(_messages(row["messages"], f"{where}: messages")) if row.get("messages") else ()
        messages = messages if has_pictures(messages) else ()
        ids = _ids(row.get("input_ids"), where), _ids(row["output_ids"], where)
        return Row(number, messages, prompt_ids=ids[0], output_ids=ids[1])
    for key in ("messages", "conversations"):
        if key in row:
            return Row(number, messages=tuple(_messages(row[key], f"{where}: {key}")))
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise BadData(f"{where}: expected messages, conversations or a text that is not empty")
    return Row(number, text=text)


def _ids(value: Any, where: str) -> tuple[int, ...]:
    ids = cast("list[Any]", value) if isinstance(value, list) else []
    if not ids or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise BadData(f"{where}: input_ids and output_ids: expected lists of token ids")
    return tuple(ids)


def _messages(value: Any, where: str) -> Iterable[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadData(f"{where}: expected a list that is not empty")
    for at, item in enumerate(cast("list[Any]", value)):
        message = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str | list):
            raise BadData(f"{where}[{at}]: expected role and content (or from and value)")
        more = {key: message[key] for key in ("reasoning_content", "tool_calls") if message.get(key)}
        yield {**more, "role": ROLES.get(role, role), "content": content}


@dataclass
class Reader:
    """Rows to samples, for one model."""

    tokenizer: Tokenizer
    template: ChatTemplate
    max_length: int
    vocab_size: int
    last_turn: bool = False
    eyes: Eyes | None = None  # of a model that takes pictures
    left_out: Counter[str] = field(default_factory=Counter[str])  # why rows gave nothing

    def samples(self, rows: Sequence[Row], where: str) -> list[Sample]:
        """Those with something to learn from; reasons of the others are counted in `left_out`.

        Raises:
            BadData: the template refuses a row (with its line), or nothing is left.
        """
        found: list[Sample] = []
        for row in rows:
            with _told(row, where):
                sample = self._sample(row)
            # The head tells the token after next: a mask that has only the last two places teaches nothing.
            if any(sample.mask[:-2]):
                found.append(sample)
            elif any(sample.mask):
                self.left_out["an answer too short"] += 1
            else:
                self.left_out["no words of the assistant within max_length"] += 1
        if not found:
            reasons = ", ".join(f"{count} rows with {why}" for why, count in self.left_out.items())
            raise BadData(f"{where}: there is nothing to learn from: {reasons}")
        return found

    def prompts(self, rows: Sequence[Row], where: str) -> list[Asked]:
        """What the model is given to answer: a conversation up to its last answer, or the beginning of a text.

        Raises:
            BadData: a row has no question, the template refuses it, or a picture cannot be had.
        """
        found: list[Asked] = []
        for row in rows:
            with _told(row, where):
                found.append(self._prompt(row))
        return found

    def whole(self, row: Row) -> Sample:
        """A row of token ids as it is, all of it the assistant's, however long. Raises BadRequest."""
        if row.messages:
            asked, _, media = self._asked(self._seeing().see(list(row.messages)))
            ids = [*asked, *row.output_ids]
        else:
            ids, media = [*row.prompt_ids, *row.output_ids], []
        return Sample(tuple(ids), (True,) * len(ids), tuple(media))

    def _given(self, row: Row) -> list[int]:
        ids = [*row.prompt_ids, *row.output_ids]
        if max(ids) >= self.vocab_size:  # memory behind the embedding would be read
            raise BadRequest(f"token id {max(ids)} is not in [0, {self.vocab_size})")
        return ids

    def _sample(self, row: Row) -> Sample:
        media: list[Media] = []
        if row.output_ids:
            ids, asked = self._given(row), list(row.prompt_ids)
            if row.messages:
                seen = self._seeing().see(list(row.messages))
                asked, _, media = self._asked(seen)
                ids = [*asked, *row.output_ids]
            mask = [False] * len(asked) + [True] * len(row.output_ids)
        elif row.text:
            ids = self.tokenizer.encode(row.text)
            mask = [True] * len(ids)
        elif has_pictures(row.messages):
            ids, mask, media = self._pictured(list(row.messages))
        else:
            ids, mask = self._conversation(list(row.messages))
        if any(item.end > self.max_length for item in media):  # a part of a picture is none
            ids, mask, media = [], [], []
        return Sample(tuple(ids[: self.max_length]), tuple(mask[: self.max_length]), tuple(media))

    def _pictured(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool], list[Media]]:
        eyes = self._seeing()
        seen = eyes.see(messages)
        ids, mask = self._conversation(seen.messages, lambda text: eyes.placed(text, seen.made)[0])
        return eyes.grown(ids, mask, eyes.placed(self.template.render(seen.messages, None, False), seen.made)[1])

    def _asked(self, seen: Seen) -> tuple[list[int], list[bool], list[Media]]:
        """A prompt with its pictures."""
        eyes = self._seeing()
        text, made = eyes.placed(self.template.render(seen.messages), seen.made)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return eyes.grown(ids, [False] * len(ids), made)

    def _seeing(self) -> Eyes:
        if self.eyes is None:
            raise BadRequest("it has pictures, and the model takes none")
        return self.eyes

    def _conversation(
        self, messages: list[dict[str, Any]], placed: Callable[[str], str] = str
    ) -> tuple[list[int], list[bool]]:
        """The mask is over each answer, its end-of-turn token included and its header not.

        Where an answer begins and ends is found by rendering what comes before it, so that any template serves; one
        that rewrites earlier turns (drops their reasoning) gives those no mask. `placed`: puts in what stands for
        pictures.
        """
        whole = placed(self.template.render(messages, add_generation_prompt=False))
        ids = self.tokenizer.encode(whole, add_special_tokens=False)
        mask = [False] * len(ids)
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        for at in turns[-1:] if self.last_turn else turns:
            if at == 0:
                continue  # nothing was asked
            before = placed(self.template.render(messages[:at], add_generation_prompt=True))
            until = whole if at == len(messages) - 1 else placed(self.template.render(messages[: at + 1], None, False))
            if whole.startswith(before) and whole.startswith(until):
                first, last = (_shared(self.tokenizer.encode(text, False), ids) for text in (before, until))
                mask[first:last] = [True] * (last - first)
        return ids, mask

    def _prompt(self, row: Row) -> Asked:
        if row.output_ids and not row.messages:
            ids = self._given(row)[: len(row.prompt_ids)]
            return Asked(ids, len(ids))
        if row.text:
            ids = self.tokenizer.encode(row.text)[:TEXT_PROMPT]
            return Asked(ids, len(ids))
        messages = question(row)
        if not messages:
            raise BadRequest("there is no question in it")
        if has_pictures(messages):
            seen = self._seeing().see(messages)
            ids = self.tokenizer.encode(self.template.render(seen.messages), add_special_tokens=False)
            return Asked(ids, len(self._asked(seen)[0]), tuple(seen.sources))
        ids = self.tokenizer.encode(self.template.render(messages), add_special_tokens=False)
        return Asked(ids, len(ids))


def question(row: Row) -> list[dict[str, Any]]:
    """A conversation without the answers at its end."""
    messages = list(row.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


@contextmanager
def _told(row: Row, where: str) -> Generator[None]:
    """What is wrong with a row is told with its line."""
    try:
        yield
    except BadRequest as error:
        raise BadData(f"{where}, line {row.line}: {error.message}") from None


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for at, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return at
    return min(len(first), len(second))


def coverage(samples: Sequence[Sample], t2d_V: Tensor) -> float:
    """Share of the assistant's words that a draft vocabulary has."""
    said = torch.tensor([token for one in samples for token, its in zip(one.ids, one.mask, strict=True) if its])
    return float(t2d_V[said].float().mean()) if len(said) else 0.0


def draft_vocabulary(samples: Sequence[Sample], size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(d2t [D] int64: what is added to a draft id to make it the model's; t2d [V] bool).

    The most frequent tokens of the assistant's words; of equals the smaller id; unused ids where there are too few.
    """
    counts = Counter(token for one in samples for token, said in zip(one.ids, one.mask, strict=True) if said)
    size = min(size, vocab_size)
    ids = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]]
    taken = set(ids)
    unused = (token for token in range(vocab_size) if token not in taken)
    ids = sorted([*ids, *(token for token, _ in zip(unused, range(size - len(ids)), strict=False))])
    chosen_D = torch.tensor(ids, dtype=torch.int64)
    t2d_V = torch.zeros(vocab_size, dtype=torch.bool)
    t2d_V[chosen_D] = True
    return chosen_D - torch.arange(len(ids)), t2d_V
