"""Adapters that rows of a step wear, and the ones that the engine has.

A linear layer that an adapter names gains what the adapter adds, for the rows that wear it: rows of one step may wear
different ones, or none. The model's weights stay as they are.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import torch

from phloem.core.errors import BadRequest, PhloemError
from phloem.diffusion import lora

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor

    from phloem.core.messages import Wear
    from phloem.diffusion.lora import Lora, Worn

    class Row(Protocol):
        """A row of a pass."""

        @property
        def worn(self) -> Worn: ...


class Wearing:
    """Stands before the linear layers of a transformer, those that any adapter has named."""

    def __init__(self, transformer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.transformer, self.device, self.dtype = transformer, device, dtype
        self._wrapped: set[str] = set()
        self._rows: list[Worn] = []
        self._same: Worn | None = None  # where all rows wear the same

    def prepare(self, adapter: Lora) -> None:
        for name in adapter.layers:
            if name not in self._wrapped:
                self._wrapped.add(name)
                self._wrap(self.transformer.get_submodule(name), name)

    @contextlib.contextmanager
    def rows(self, rows: Sequence[Row]) -> Generator[None]:
        """For one pass of these rows."""
        self._rows = [row.worn for row in rows]
        self._same = self._rows[0] if len(set(self._rows)) == 1 else None
        try:
            yield
        finally:
            self._rows, self._same = [], None

    def _wrap(self, linear: Any, name: str) -> None:
        inner = linear.forward

        def run(x: Tensor) -> Tensor:
            made = inner(x)
            if not any(self._rows):
                return made
            if self._same is not None:  # whatever the layer's rows are
                return _with(made, x, name, self._same)
            return self._by_row(made, x, name)

        linear.forward = run

    def _by_row(self, made: Tensor, x: Tensor, name: str) -> Tensor:
        """Raises PhloemError: the layer's rows are not those of the pass; then each picture is drawn alone."""
        if x.shape[0] != len(self._rows):
            raise PhloemError(
                f"{name} has {x.shape[0]} rows in a step of {len(self._rows)}: adapters cannot be told apart"
            )
        for worn in dict.fromkeys(self._rows):
            if any(name in adapter.layers for adapter, _ in worn):
                places = torch.tensor([at for at, one in enumerate(self._rows) if one == worn], device=x.device)
                made = made.index_copy(0, places, _with(made[places], x[places], name, worn))
        return made


def _with(made: Tensor, x: Tensor, name: str, worn: Worn) -> Tensor:
    for adapter, weight in worn:
        layer = adapter.layers.get(name)
        if layer is not None:
            made = made + layer.added(x, weight)
    return made


class Wardrobe:
    """The adapters of one model, by name. Used in the engine's thread alone, between steps.

    Args:
        pipe: of diffusers, which knows how files are read.
        wearing: the transformer's.
        most: adapters, and bytes of all of them; None: no bound.
    """

    def __init__(self, pipe: Any, wearing: Wearing, most: int | None = None, memory: int | None = None) -> None:
        self._pipe, self._wearing, self._most, self._memory = pipe, wearing, most, memory
        self._held: dict[str, Lora] = {}
        self.usual: list[tuple[str, float]] = []  # what requests wear that say nothing
        self.enabled = True  # whether they do

    def loaded(self) -> dict[str, str]:
        """Path by name."""
        return {name: one.path for name, one in self._held.items()}

    def load(self, name: str, path: str) -> None:
        """Take an adapter up, or a new version of one; requests under way keep theirs. Raises BadRequest."""
        if not name or len(name) > 500 or not name.isprintable():
            raise BadRequest("lora_name: it must be 1 to 500 printable characters", param="lora_name")
        others = [one for held, one in self._held.items() if held != name]
        if self._most is not None and len(others) >= self._most:
            raise BadRequest(
                f"lora_name: {len(others)} adapters are loaded, as many as max_loaded_loras allows: unload one",
                param="lora_name",
            )
        try:
            found = lora.read(name, path, self._pipe, self._wearing.transformer).at(
                self._wearing.device, self._wearing.dtype
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise BadRequest(f"{lora.PATH}: there is no memory for {path:.200}", param=lora.PATH) from None
        if self._memory is not None and found.nbytes + sum(one.nbytes for one in others) > self._memory:
            raise BadRequest(f"{lora.PATH}: {path} does not fit into lora_memory: unload another", param=lora.PATH)
        self._wearing.prepare(found)
        self._held[name] = found

    def unload(self, name: str, worn: Sequence[Worn]) -> int:
        """Forget an adapter; gives how many of the pictures that wear these still need it. Raises BadRequest."""
        if name not in self._held:
            raise BadRequest(f"lora_name: no adapter {name!r:.200} is loaded", param="lora_name")
        gone = self._held.pop(name)
        self.usual = [one for one in self.usual if one[0] != name]
        return sum(any(one is gone for one, _ in all_of) for all_of in worn)

    def use(self, args: dict[str, Any]) -> None:
        """What requests wear that say nothing. `adapters`: [name, path or None, scale] each, loaded where a path is
        new; `enabled` turns them off and on, `scale` is that of all. Raises BadRequest: nothing is changed but what is
        loaded.
        """
        wanted: list[tuple[str, float]] = []
        for name, path, scale in args.get("adapters") or []:
            if path is not None and self.loaded().get(name) != path:
                self.load(name, path)
            if name not in self._held:
                raise BadRequest(f"lora_nickname: no adapter {name!r:.200} is loaded, and lora_path names no file")
            wanted.append((name, scale))
        if "adapters" in args:
            self.usual = wanted
        if args.get("scale") is not None:
            self.usual = [(name, args["scale"]) for name, _ in self.usual]
        self.enabled = bool(args.get("enabled", self.enabled))

    def active(self) -> list[list[Any]]:
        """[name, scale, whether requests wear it] each."""
        return [[name, scale, self.enabled] for name, scale in self.usual]

    def worn(self, asked: list[Wear] | None) -> Worn:
        """What a request wears. Raises BadRequest: an adapter is not here."""
        wanted = (self.usual if self.enabled else []) if asked is None else [(one.name, one.scale) for one in asked]
        for name, _ in wanted:
            if name not in self._held:
                known = ", ".join(repr(one) for one in list(self._held)[:20]) or "none"
                raise BadRequest(f"lora: there is no adapter {name!r:.200}, loaded are: {known}", param="lora")
        return tuple((self._held[name], scale) for name, scale in wanted if scale)
