"""Requests for `bench speculation`: kinds of text that repeat themselves, or do not."""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from dataclasses import dataclass
from typing import Any

from phloem.bench._text import sentences
from phloem.checkpoint.describe import describe
from phloem.text.template import load_template
from phloem.text.tokenizer import load_tokenizer

KINDS = ("free", "json", "code", "quote", "multi-turn", "group", "random")

_TOPICS = (
    *("how trees carry sugar", "the history of clocks", "why the sea is salty", "how bread rises", "life in a desert"),
    *("how bridges stand", "what makes a good friend", "the uses of copper", "how birds find their way", "old maps"),
    *("winter in the mountains", "how glass is made", "the first railways", "sleep", "learning to swim", "volcanoes"),
)
_NAMES = ("Ana", "Boris", "Clara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Luis")
_CITIES = ("Lisbon", "Vienna", "Oslo", "Porto", "Gdansk", "Turin", "Graz", "Malaga", "Tartu", "Bergen")
_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "city": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 18, "maximum": 99},
            "status": {"enum": ["active", "inactive", "suspended"]},
        },
        "required": ["name", "city", "age", "status"],
        "additionalProperties": False,
    },
    "minItems": 6,
    "maxItems": 12,
}


@dataclass
class Asked:
    """Prompts as token ids, and what each asks for."""

    prompts: list[list[int]]
    params: list[dict[str, Any]]


class Writer:
    """What `draw` asks of an engine, where none runs in this process."""

    def __init__(self, model_path: str) -> None:
        checkpoint = describe(model_path)
        self._tokenizer = load_tokenizer(checkpoint)
        self._template = load_template(checkpoint, None, self._tokenizer)
        self.ready = {"vocab_size": self._tokenizer.vocab_size}

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self._tokenizer.encode(self._template.render(messages), add_special_tokens=False)


def draw(kind: str, count: int, engine: Any, rng: random.Random, length: int) -> Asked:
    """`count` requests of a kind, for an engine's tokenizer and chat template; other ones each time."""
    prompts, params = list[list[int]](), list[dict[str, Any]]()
    shared = engine.encode_chat(_conversation("free", rng)) if kind == "group" else []
    for _ in range(count):
        more: dict[str, Any] = {"max_new_tokens": length, "temperature": 0.0, "sampling_seed": rng.randrange(1 << 30)}
        if kind == "random":
            vocabulary = engine.ready["vocab_size"]
            prompts.append([rng.randrange(100, vocabulary) for _ in range(64)])
            params.append({**more, "temperature": 2.0, "ignore_eos": True})
            continue
        if kind == "group":  # as reinforcement learning asks: samples of one prompt
            prompts.append(shared)
            params.append({**more, "temperature": 1.0, "ignore_eos": True})
            continue
        prompts.append(engine.encode_chat(_conversation(kind, rng)))
        if kind == "free":
            more |= {"temperature": 0.7, "top_p": 0.9, "ignore_eos": True}
        elif kind == "json":
            more["json_schema"] = json.dumps(_SCHEMA)
        else:
            more["ignore_eos"] = kind == "multi-turn"
        params.append(more)
    return Asked(prompts, params)


def aligned(asked: Asked, page: int) -> Asked:
    """The same without a few tokens near the prompts' beginnings (of the template's system message): of each, whole
    pages and one token are left. With the pages in the cache a request then enters as one row, so that 16 of them never
    make a step of more rows than have one row's bits, whatever enters with what."""
    prompts = [
        prompt[:2] + prompt[2 + (len(prompt) - 1) % page :] if len(prompt) > page else prompt
        for prompt in asked.prompts
    ]
    return Asked(prompts, asked.params)


def _conversation(kind: str, rng: random.Random) -> list[dict[str, str]]:
    if kind == "free":
        return [_user(f"Write a short essay, number {rng.randrange(1000)}, about {rng.choice(_TOPICS)}.")]
    if kind == "json":
        people = [
            f"{rng.choice(_NAMES)} from {rng.choice(_CITIES)}, {rng.randrange(18, 99)} years, "
            f"{rng.choice(('active', 'inactive', 'suspended'))}"
            for _ in range(8)
        ]
        return [_user("Write these people as a JSON list:\n" + "\n".join(people))]
    if kind == "code":
        source = rng.choice((textwrap.dedent, textwrap.indent, inspect.cleandoc, inspect.getdoc, json.dumps, json.dump))
        lines = inspect.getsource(source).splitlines()
        body = "\n".join(line for line in lines if line.strip())[:900]
        name = f"{source.__name__}_{rng.randrange(1000)}"
        return [_user(f"Write this Python function again, named {name}:\n```python\n{body}\n```")]
    text = " ".join(rng.sample(sentences(), 6))
    if kind == "quote":
        old = max(text.split(), key=len)
        return [_user(f"Repeat this text word for word, with {old!r} in capitals:\n\n{text}")]
    return [
        _user(f"Here is a note:\n\n{text}\n\nWhat is it about?"),
        {"role": "assistant", "content": " ".join(rng.sample(sentences(), 1))},
        _user("Now say it again, with the note's own words, and explain each of its sentences."),
    ]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
