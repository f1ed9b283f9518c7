"""Adapters as the scheduler sees them: lent by name, held by a request from its beginning to its end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from phloem.core.errors import ConfigError
from phloem.core.late import Late

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.core.batch import Pending


class Lent(Late, Protocol):
    """One version of an adapter, lent to one request, which waits until it is ready."""

    @property
    def uid(self) -> str:
        """A name that no other version has had, of this adapter or another."""
        ...

    def content(self) -> str:
        """What it is, in other processes too, by its files. Where these cannot be read it is like no other."""
        ...

    @property
    def entry(self) -> int:
        """Its number in batches; it has one while it is lent and ready."""
        ...


class Lender(Protocol):
    """Called in the scheduler's thread alone."""

    most: int  # different adapters among the rows of a step

    def lend(self, name: str) -> Lent:
        """Raises BadRequest: no adapter has this name."""
        ...

    def tokens(self, name: str) -> int:
        """How many token ids the adapter of this name knows, [0, tokens); 0: those of the base, or there is none."""
        ...

    def give_back(self, lent: Lent) -> None:
        """The request has ended: no later step has a row with it."""
        ...

    def load(self, name: str, path: str, pinned: bool, sent: Sent | None = None) -> Pending[dict[str, str]]:
        """A new adapter, or a new version of one; requests under way keep theirs. Gives path by name of all.

        `sent`: an adapter without a folder; `path` is then what it is called in lists.

        Raises:
            BadRequest: at once, or of the work: naming what is wrong. Nothing has changed then.
        """
        ...

    def unload(self, name: str) -> tuple[int, dict[str, str]]:
        """The name is gone at once; those that have the adapter keep it to their end: how many these are, and the rest.

        Raises:
            BadRequest: no adapter has this name.
        """
        ...

    def loaded(self) -> dict[str, str]:
        """Path by name."""
        ...

    def rebase(self) -> None:
        """The base's weights have changed: what was computed from them is made anew, for requests to come and for those
        that ask by `renewed`."""
        ...

    def renewed(self, lent: Lent) -> Lent:
        """For a request that computes everything again: its adapter as of the base's weights that there are, in place
        of this one, which is given back if it is another."""
        ...

    def state(self) -> dict[str, Any]: ...


SENT = "__tensor__/"  # in front of its name: the path of an adapter that came without a folder


@dataclass(frozen=True)
class Sent:
    """An adapter that comes without a folder: its adapter_config.json, and tensors as PEFT names them.

    `tensors`: [(name, Tensor)] as they are; None: a payload in `blobs` and `files`, as weights come in. `coming`: such
    tensors, on their way from a trainer's group.
    """

    config: dict[str, Any]
    tensors: Any = None
    blobs: Sequence[bytes] = ()
    files: Sequence[str] = ()
    load_format: str | None = None
    coming: Pending[Any] | None = None


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter that the server starts with."""

    name: str
    path: str
    pinned: bool = False


def adapter_spec(text: str) -> AdapterSpec:
    """From NAME=PATH, PATH (which is then the name too), or JSON: {"lora_name", "lora_path", "pinned"}, or {"name",
    "path"}.

    Raises:
        ConfigError: it is none of these.
    """
    if text.lstrip().startswith("{"):
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"lora_paths: {text!r} is not JSON: {error}", param="lora_paths") from None
        name, path = found.get("lora_name") or found.get("name"), found.get("lora_path") or found.get("path")
        name = name or path
        if not isinstance(name, str) or not isinstance(path, str):
            raise ConfigError(f"lora_paths: {text!r} has no name and path", param="lora_paths")
        return AdapterSpec(name, path, bool(found.get("pinned")))
    name, equals, path = text.partition("=")
    spec = AdapterSpec(name, path) if equals else AdapterSpec(text, text)
    if not spec.name or not spec.path:
        raise ConfigError(f"lora_paths: {text!r} is not NAME=PATH", param="lora_paths")
    return spec
