"""One file per kind of machine.

Each module has `is_available() -> (bool, reason)` and a class `Platform(threads: int | None)` with the face below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from phloem.kernels.ops import Ops
    from phloem.platforms._compiled import Compiled
    from phloem.platforms._facts import StepFacts
    from phloem.platforms._staging import Stager
    from phloem.platforms._streams import Streams

PREFERENCE = ("cuda", "rocm", "xpu", "npu", "tpu", "cpu")


class Platform(Protocol):
    """What the engine asks of a machine."""

    name: str
    device: torch.device
    default_memory_fraction: float  # of free memory, for weights and KV pool together
    default_running_requests: int
    default_chunk: int  # tokens of one step
    default_mixed_chunk: int  # prompt tokens of a step that also decodes
    worthwhile_chunk: int  # prompt tokens from which on more make a step no more efficient
    facts: ClassVar[StepFacts]

    @property
    def quantised_kv_dtype(self) -> torch.dtype | None:
        """The type of the KV cache beside quantised weights; None: the model's."""
        ...

    @property
    def streams(self) -> Streams | None:
        """Copies beside the computation, or None where there is no such thing."""
        ...

    @property
    def compiled(self) -> Compiled | None:
        """Kernels that are compiled at their first launch; None where there are no such, or they cannot be early."""
        ...

    def stager(self) -> Stager | None:
        """What brings weights from files to the device, to be closed when they are there; None: nothing special."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
        ...

    def reserve(self) -> int:
        """Bytes of the device's memory that are left alone, where `measure` measures."""
        ...

    def measure(self, work: Callable[[], None]) -> int | None:
        """Run `work`; bytes of the device's own memory that it took at most beyond what was taken before.

        None, without a run, where the memory is shared with everything else on the machine.
        """
        ...

    def empty_cache(self) -> None:
        """Give back what the allocator keeps without using it, so that it can be cut anew."""
        ...

    def begin_steps(self) -> None:
        """Called once in the thread that will run every step, before the first."""
        ...

    def table(self, requested: str | None, *, float32: bool = False) -> tuple[Ops, str]:
        """The op table, and why this one. `requested` names one; a named one that cannot serve is a ConfigError.

        `float32`: somebody asked for this type, so that no faster one may stand in for it.
        """
        ...

    def attention_backends(self) -> list[str]:
        """Names in order of preference."""
        ...

    def dtype(self, checkpoint: str | None) -> tuple[torch.dtype, str]:
        """The type for weights and KV when the user leaves it to us, and why; `checkpoint` is the stored type."""
        ...


class Kind(Protocol):
    """What makes a platform: its class."""

    facts: StepFacts

    def __call__(self, threads: int | None, /) -> Platform: ...


class Cards(Protocol):
    """Of platforms whose devices ranks have one each of (`StepFacts.meets`)."""

    @staticmethod
    def cards() -> int:
        """How many this process sees."""
        ...

    @staticmethod
    def take(card: int, /) -> torch.device:
        """The device of that number, which is the calling thread's from now on."""
        ...


AVAILABLE: Registry[Callable[[], tuple[bool, str]]] = Registry("phloem.platforms", "device", "is_available")
PLATFORMS: Registry[Kind] = Registry("phloem.platforms", "device", "Platform")


def _in_order() -> list[str]:
    names = PLATFORMS.names()
    return [*(n for n in PREFERENCE if n in names), *(n for n in names if n not in PREFERENCE)]


def compiles(requested: str) -> bool:
    """Whether steps are compiled whole on the device of that name, or on the one that `choose` would take.

    Raises:
        ConfigError: if there is none of that name.
    """
    return facts_of(named(requested)).compiles


def named(requested: str) -> str:
    """The device of that name, or the one that `choose` would take.

    Raises:
        ConfigError: if there is none of that name, or none at all.
    """
    if requested != "auto":
        PLATFORMS.check(requested)
        return requested
    found = next((name for name in _in_order() if AVAILABLE.get(name)()[0]), "")
    if not found:
        raise ConfigError("no device is available", param="device")
    return found


def facts_of(name: str) -> StepFacts:
    """How steps run on the devices of that name. Raises ConfigError if there are none."""
    return PLATFORMS.get(name).facts


def cards_of(name: str) -> Cards | None:
    """How ranks take devices of that name; None: they have none each. Raises ConfigError if there are none."""
    kind = PLATFORMS.get(name)
    return cast("Cards", kind) if kind.facts.meets else None


def choose(requested: str, threads: int | None, *, compiles: bool = False) -> tuple[Platform, Decision]:
    """The platform to run on: the one that is named, or the first in order of preference that is available.

    `compiles`: the caller takes one whose steps are compiled whole (`StepFacts.compiles`).

    Raises:
        ConfigError: if the named one is unknown or not available, with its reason.
    """
    if requested != "auto":
        available, reason = AVAILABLE.get(requested)()
        if not available:
            raise ConfigError(f"device {requested!r} is not available: {reason}", param="device")
        platform = PLATFORMS.get(requested)(threads)
        if platform.facts.compiles and not compiles:
            why = "steps are compiled whole there, and this runs op by op"
            raise ConfigError(f"device {requested!r}: {why}", param="device")
        return platform, Decision("device", requested, "as asked")
    declined: list[str] = []
    for name in _in_order():
        available, reason = AVAILABLE.get(name)()
        if available:
            why = "; ".join([reason, *declined])
            platform = PLATFORMS.get(name)(threads)
            if compiles or not platform.facts.compiles:
                return platform, Decision("device", name, why)
            reason = "steps are compiled whole there"
        declined.append(f"not {name}: {reason}")
    raise ConfigError("no device is available: " + "; ".join(declined), param="device")
