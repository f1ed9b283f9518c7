"""Turns as text: what stands around the content of each role, found by rendering a model's chat template once.

A program writes its turns piece by piece, so the whole template can not be rendered for it; it is rendered for a probe,
and cut at the places where the probe's words are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from phloem.core.errors import PhloemError

ROLES = ("system", "user", "assistant")
Render = Callable[[list[dict[str, Any]], bool], str]  # (messages, add_generation_prompt) -> text
_WORDS = {"system": "Qzsystemq", "user": "Qzuserq", "assistant": "Qzassistantq", "again": "Qzagainq"}


@dataclass(frozen=True)
class ChatFormat:
    """`prefixes[(role before, role)]` opens a turn, or `prefixes[(None, role)]`; `suffixes[role]` ends it."""

    name: str
    prefixes: dict[tuple[str | None, str], str]
    suffixes: dict[str, str]
    stop: tuple[str, ...] = ()
    image: str = "<image>"
    extra: dict[str, str] = field(default_factory=dict)

    def mark(self, kind: str) -> str:
        """What stands for a medium of this kind (`image`, `video`)."""
        return self.image if kind == "image" else f"<{kind}>"

    def open(self, before: str | None, role: str) -> str:
        found = self.prefixes.get((before, role))
        return self.prefixes.get((None, role), "") if found is None else found

    def close(self, role: str) -> str:
        return self.suffixes.get(role, "")


def simple(name: str, turns: dict[str, tuple[str, str]], stop: tuple[str, ...] = ()) -> ChatFormat:
    """A format in which a turn does not depend on the one before it."""
    return ChatFormat(
        name,
        {(None, role): turn[0] for role, turn in turns.items()},
        {role: turn[1] for role, turn in turns.items()},
        stop,
    )


FORMATS: dict[str, ChatFormat] = {
    item.name: item
    for item in (
        simple("default", {"system": ("SYSTEM:", "\n"), "user": ("USER:", "\n"), "assistant": ("ASSISTANT:", "\n")}),
        simple(
            "chatml",
            {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ROLES},
            ("<|im_end|>",),
        ),
        simple(
            "llama-3-instruct",
            {role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in ROLES},
            ("<|eot_id|>",),
        ),
    )
}
# For servers that render no template for us: a part of the model's name, and its format.
_BY_NAME = (
    ("llama-3", "llama-3-instruct"),
    ("llama3", "llama-3-instruct"),
    ("qwen", "chatml"),
    ("smollm", "chatml"),
    ("chatml", "chatml"),
)


def by_model_name(path: str) -> ChatFormat:
    """A guess, for servers that do not tell their template."""
    lower = path.lower()
    return FORMATS[next((name for part, name in _BY_NAME if part in lower), "default")]


def derive(render: Render, bos: str = "") -> ChatFormat | None:
    """The format of a chat template, or None where it can not be cut.

    Args:
        render: renders messages; raises PhloemError for a conversation that the template refuses.
        bos: text that the tokenizer puts in front of a prompt by itself; taken off the template's own.
    """

    def message(role: str, word: str | None = None) -> dict[str, Any]:
        return {"role": role, "content": _WORDS[word or role]}

    def text(*messages: dict[str, Any], generate: bool = False) -> str:
        return render(list(messages), generate)

    user, assistant, again = message("user"), message("assistant"), message("user", "again")
    try:
        alone, asked = text(user), text(user, generate=True)
        talk = text(user, assistant)
        longer = text(user, assistant, again)
    except PhloemError:
        return None
    if not asked.startswith(alone):
        return None
    head, user_end = _cut(alone, "user")
    _, reply_end = _cut(talk, "assistant")
    between, _ = _cut(longer.partition(_WORDS["assistant"])[2], "again")
    if head is None or user_end is None or reply_end is None or between is None or not between.startswith(reply_end):
        return None
    begin = asked[len(alone) :]
    prefixes: dict[tuple[str | None, str], str] = {
        (None, "user"): head.removeprefix(bos),
        ("user", "user"): between[len(reply_end) :],
        ("assistant", "user"): between[len(reply_end) :],
        (None, "assistant"): begin,
    }
    suffixes = {"user": user_end, "assistant": reply_end}
    _add_system(text, message, prefixes, suffixes, bos)
    return ChatFormat("template", prefixes, suffixes)


def _add_system(
    text: Callable[..., str],
    message: Callable[..., dict[str, Any]],
    prefixes: dict[tuple[str | None, str], str],
    suffixes: dict[str, str],
    bos: str,
) -> None:
    """Templates without a system turn refuse it (then it is plain text in front) or put it into the user's turn."""
    following = prefixes[("assistant", "user")]
    try:
        head, rest = _cut(text(message("system"), message("user")), "system")
    except PhloemError:
        head = rest = None
    gap = None if rest is None else _cut(rest, "user")[0]
    if head is None or gap is None:
        prefixes[(None, "system")], suffixes["system"] = "", "\n\n"
        return
    prefixes[(None, "system")] = head.removeprefix(bos)
    apart = bool(following) and gap.endswith(following)
    prefixes[("system", "user")] = following if apart else ""
    suffixes["system"] = gap[: len(gap) - len(following)] if apart else gap


def _cut(text: str, word: str) -> tuple[str | None, str | None]:
    before, found, after = text.partition(_WORDS[word])
    return (before, after) if found else (None, None)
