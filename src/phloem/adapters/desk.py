"""Lends adapters to requests: which are known, which are in memory, and who gives way when that is full.

An adapter is *registered* (its name and path are known), then *read* in a thread of its own, then *placed* between two
steps; a request waits for that as for anything late. One that nobody uses gives its place to another, the one unused
for longest first, and is read again when it is asked for; pinned ones stay. Each load is a version of its own: whoever
has begun with one ends with it, also when its name has gone or means another by then.

Used in the scheduler's thread alone, but for the reading.
"""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phloem.adapters._fit import fit
from phloem.adapters._own import split
from phloem.adapters._peft import AdapterFile, assembled, check_config, content, read
from phloem.core.adapters import Lender, Sent
from phloem.core.errors import BadRequest, PhloemError
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from phloem.adapters._fits import Fit
    from phloem.adapters._sites import Sites
    from phloem.adapters._worn import Own
    from phloem.core.adapters import Lent
    from phloem.core.batch import Pending

    Between = Callable[[Callable[[], Any]], Pending[Any]]
    Unpacked = Callable[[Sequence[bytes], str | None, int], Iterable[tuple[str, Tensor]]]

_log = log.get("adapters")

LONGEST_NAME = 500  # characters
SLACK = 64 << 20  # bytes
PATIENCE = 5.0  # seconds that an adapter waits for a place until requests of others wait for it


@dataclass(frozen=True, slots=True)
class Read:
    """An adapter as it was read: what each site keeps of it, and what it has of its own."""

    fits: dict[int, Fit]
    own: Own | None

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.fits.values()) + (0 if self.own is None else self.own.nbytes)


class Version:
    """One load of an adapter."""

    def __init__(
        self, desk: Desk, name: str, path: str, order: int, pinned: bool, sent: Sent | AdapterFile | None = None
    ) -> None:
        self.name, self.path, self.pinned = name, path, pinned
        self.uid, self.order = f"{name}@{order}", order  # `order`: that in which loads were asked for
        self.sent = sent  # what came without a folder; as it was read, once it was
        self.entry = 0  # 0: it has no place
        self.users = 0  # requests that compute with it
        self.waiters = 0  # requests that wait for it
        self.nbytes = 0
        self.tokens = 0  # token ids that it knows, once it was read; 0: those of the base
        self.owns = False  # some of its weights are computed in passes of their own
        self.used = 0  # when it was lent last, by the desk's count
        self.retired = False  # its name has gone
        self.error: PhloemError | None = None
        self.crowded_since = 0.0  # 0: it does not wait for a place
        # Of tensors that came without a folder nobody else can know: they are like no others.
        self._content = "" if sent is None else secrets.token_hex(16)
        self._desk = desk
        self._reading: Future[Read] | None = None
        self._placing: tuple[int, Pending[Any]] | None = None
        self._rebased = False  # the base's weights have changed while it was read
        self.era = desk.era  # of the base's weights: those that it was read beside
        self.successor: Version | None = None  # the same, of later weights of the base

    def advance(self) -> bool:
        """Whether it is in its place, or failed; goes on towards that."""
        if self.entry or self.error is not None:
            return True
        try:
            return self._advance()
        except PhloemError as error:
            self._fail(error)
        except Exception as error:
            _log.exception("adapter %s could not be loaded", self.name)
            self._fail(BadRequest(f"adapter {self.path}: {type(error).__name__}: {error}", param="lora_path"))
        return True

    def _advance(self) -> bool:
        desk = self._desk
        if self._placing is not None:
            entry, pending = self._placing
            if not pending.done():
                return False
            pending.result()
            self.entry, self._placing = entry, None
            return True
        if self._reading is None:
            self._read()
            return False
        if not self._reading.done():
            return False
        read = self._reading.result()
        if self._rebased:
            self._rebased = False
            if desk.follows_base(self):
                self._read()
                return False
        self.nbytes, self.owns = read.nbytes, read.own is not None
        self.tokens = 0 if read.own is None else read.own.tokens
        entry = desk.place_for(self)
        if not entry:
            self.crowded_since = self.crowded_since or time.monotonic()
            return False
        self._reading, self.crowded_since = None, 0.0
        self._placing = entry, desk.put(entry, self, read)
        return False

    def _read(self) -> None:
        self.era = self._desk.era
        self._reading = self._desk.read(self)

    def wait(self) -> None:
        """Until what is under way has ended, well or not: `advance` goes on then."""
        pending = self._reading if self._placing is None else self._placing[1]
        if pending is not None:
            with suppress(Exception):  # `advance` tells
                pending.result()

    def _fail(self, error: PhloemError) -> None:
        if self._placing is not None:
            self._desk.free(self._placing[0], self.owns)
        self._reading, self._placing, self.error, self.crowded_since = None, None, error, 0.0

    def content(self) -> str:
        if not self._content:
            try:
                self._content = content(Path(self.path))
            except (PhloemError, OSError):
                return secrets.token_hex(16)  # it will not be loaded, or another one is by then
        return self._content

    def confirm(self, found: str) -> None:
        """Its prompts' pages are known by its uid: what is read again must be what was read before.

        Raises:
            BadRequest: its folder has another adapter by now.
        """
        if self._content and found != self._content:
            why = "is another one than was loaded: load it again, so that it gets pages of its own"
            raise BadRequest(f"adapter {self.name}: what is in {self.path} {why}", param="lora_path")
        self._content = found

    @property
    def idle(self) -> bool:
        return not self.users and not self.waiters

    @property
    def follows_base(self) -> bool:
        """Whether other weights of the base make it another one; also where that is not known yet."""
        return self._reading is not None or self._desk.follows_base(self)

    def rebase(self) -> None:
        """Nobody computes with it yet: what was read of the base's old weights is read again."""
        if self._reading is not None:
            self._rebased = True  # what it depends on is known when it has been read
        elif self._desk.follows_base(self):
            self.forget()

    def forget(self) -> None:
        """Give back its place, or what was read for it."""
        place = self.entry or (0 if self._placing is None else self._placing[0])
        if place:
            self._desk.free(place, self.owns)  # whoever gets it is placed behind what is under way
        self.entry, self._reading, self._placing, self.crowded_since = 0, None, None, 0.0


class Loan:
    """A version lent to one request (`core.adapters.Lent`). `after`: one that is to have a place before."""

    def __init__(self, version: Version, after: Version | None) -> None:
        self.version = version
        self.active = False  # it counts among the users
        self._after = after
        version.waiters += 1

    @property
    def uid(self) -> str:
        return self.version.uid

    def content(self) -> str:
        return self.version.content()

    @property
    def entry(self) -> int:
        return self.version.entry

    @property
    def error(self) -> PhloemError | None:
        return self.version.error

    def ready(self) -> bool:
        version, after = self.version, self._after
        if self.active:
            return True
        if after is not None and after.waiters and after.crowded_since:
            return False
        self._after = None
        if not version.advance():
            return False
        if version.error is None:
            self.active = True
            version.waiters -= 1
            version.users += 1
        return True


class Loading:
    """A load that was asked for (`core.batch.Pending`)."""

    def __init__(self, desk: Desk, version: Version) -> None:
        self._desk, self._version = desk, version
        self._ended = False

    def done(self) -> bool:
        version = self._version
        if not self._ended and (version.advance() or version.crowded_since):
            self._ended = True
            self._desk.ended(version)
        return self._ended

    def result(self) -> dict[str, str]:
        while not self.done():
            self._version.wait()
        if self._version.error is not None:
            raise self._version.error
        return self._desk.loaded()


class Placing:
    """Work that gives further work to wait for, so many times (`core.batch.Pending`). Raises what any of it raises."""

    def __init__(self, first: Pending[Any], further: int) -> None:
        self._last, self._further = first, further

    def done(self) -> bool:
        while self._further and self._last.done():
            self._last, self._further = self._last.result(), self._further - 1
        return self._last.done()

    def result(self) -> Any:
        while self._further:
            self._last, self._further = self._last.result(), self._further - 1
        return self._last.result()


class Desk(Lender):
    """`core.adapters.Lender` over the sites of one model.

    Args:
        between: runs work between two steps.
        base: a weight of the model by its checkpoint's name; KeyError: there is none. Called between two steps.
        most: different adapters among the rows of a step.
        memory: bytes that all adapters in memory may take; None: as many as there are places.
        unpacked: tensors of a payload: of blobs, their format, and the most bytes that they may take.
    """

    def __init__(
        self,
        sites: Sites,
        between: Between,
        base: Callable[[str], Tensor],
        most: int | None,
        memory: int | None,
        unpacked: Unpacked | None = None,
    ) -> None:
        self.sites, self.between = sites, between
        self.most = min(most or sites.entries, sites.entries)
        self.evictions = self.era = 0  # the latter: how often the base's weights have changed
        self._base, self._memory, self._unpacked = base, memory, unpacked
        self._names: dict[str, Version] = {}
        self._based: set[str] = set()  # adapters that the base's weights are part of, by folder or by version
        self._held: list[Version | None] = [None] * (sites.entries + 1)
        self._coming: list[Version] = []  # loads that were asked for, and have not ended
        self._count = 0  # of versions, and of loans
        self._worker = ThreadPoolExecutor(1, "phloem-adapters", one_thread)
        # Not behind a file that is slow to read.
        self._filler = ThreadPoolExecutor(1, "phloem-adapters-placed", one_thread)

    # for the scheduler

    def lend(self, name: str) -> Loan:
        version = self._known(name)
        if version.error is not None:
            version.error = None  # its folder may be there by now
        self._count += 1
        version.used = self._count
        return Loan(version, self._starving(version))

    def tokens(self, name: str) -> int:
        version = self._names.get(name)
        return 0 if version is None else version.tokens

    def give_back(self, lent: Lent) -> None:
        assert isinstance(lent, Loan)
        version = lent.version
        if lent.active:
            version.users -= 1
        else:
            version.waiters -= 1
        self._settle(version)

    def load(self, name: str, path: str, pinned: bool, sent: Sent | None = None) -> Loading:
        if not name or not path:
            raise BadRequest("lora_name and lora_path are needed", param="lora_path" if name else "lora_name")
        if not name.isprintable() or not name.strip() or len(name) > LONGEST_NAME:
            message = f"lora_name: at most {LONGEST_NAME} printable characters, got {name!r:.80}"
            raise BadRequest(message, param="lora_name")
        others = len({v.name for v in (*self._names.values(), *self._coming) if v.pinned and v.name != name})
        if pinned and others + 1 >= self.sites.entries:
            raise BadRequest(
                f"{others} of {self.sites.entries} places have pinned adapters: one must stay free", param="pinned"
            )
        if sent is not None:
            check_config(Path(path), sent.config)
        self._count += 1
        version = Version(self, name, path, self._count, pinned, sent)
        self._coming.append(version)
        return Loading(self, version)

    def unload(self, name: str) -> tuple[int, dict[str, str]]:
        version = self._known(name)
        del self._names[name]
        self._retire(version)
        return version.users + version.waiters, self.loaded()

    def loaded(self) -> dict[str, str]:
        return {name: version.path for name, version in self._names.items()}

    def rebase(self) -> None:
        """Magnitudes and biases are of the base that there was: such versions are read again when asked for."""
        self.era += 1
        for name, old in list(self._names.items()):
            if old.follows_base:
                self._names[name] = self._succeed(old)
                self._retire(old)
                if not old.users:
                    old.rebase()  # for those that wait for it
        for version in self._coming:
            version.rebase()

    def renewed(self, lent: Lent) -> Lent:
        assert isinstance(lent, Loan)
        version = lent.version
        if version.era == self.era or not version.follows_base:
            return lent
        while version.era != self.era:
            version = version.successor or self._succeed(version)
        self._count += 1
        version.used = self._count
        found = Loan(version, self._starving(version))
        self.give_back(lent)
        return found

    def _succeed(self, old: Version) -> Version:
        """The same adapter of the base's weights that there are. Its name may mean another one by now."""
        self._count += 1
        new = old.successor = Version(self, old.name, old.path, self._count, old.pinned, old.sent)
        new.order = old.order  # a load that was asked for since is a later one
        new.tokens, new.retired = old.tokens, old.retired
        return new

    def state(self) -> dict[str, Any]:
        held = [version for version in self._held if version is not None]
        return {
            "loras_registered": len(self._names),
            "loras_loaded": len(held),
            "lora_bytes": sum(version.nbytes for version in held),
            "lora_evictions": self.evictions,
        }

    def close(self) -> None:
        for worker in (self._worker, self._filler):
            worker.shutdown(wait=False, cancel_futures=True)

    # for versions

    def follows_base(self, version: Version) -> bool:
        """Whether something of the base's weights is in what was read for it."""
        return _source(version) in self._based

    def read(self, version: Version) -> Future[Read]:
        return self._worker.submit(self._fitted, version)

    def put(self, entry: int, version: Version, read: Read) -> Pending[Any]:
        """Where stacks are in the host's memory they are filled beside running steps, none of which looks there: behind
        those that may have rows of an adapter that was there before."""
        sites = self.sites
        if not sites.beside:
            return self.between(lambda: sites.put(entry, read.fits, read.own))

        def there() -> bool:
            return self._held[entry] is version  # it has not been forgotten meanwhile

        def filled() -> Pending[Any]:
            if there():
                sites.fill(entry, read.fits)
            return self.between(lambda: sites.show(entry, read.fits, read.own) if there() else None)

        if not sites.used(entry):
            return Placing(self._filler.submit(filled), 1)
        return Placing(self.between(lambda: self._filler.submit(filled)), 2)

    def place_for(self, version: Version) -> int:
        """An entry, for which others may have to give way; 0: all that could are in use.

        Raises:
            BadRequest: it never fits into the memory for adapters.
        """
        held = [other for other in self._held if other is not None]
        if self._memory is not None and version.nbytes > self._memory:
            raise BadRequest(
                f"adapter {version.path} takes {version.nbytes} bytes, all may take {self._memory} (lora_memory)",
                param="lora_path",
            )
        # Whoever has waited takes the place of one that is only waited for, too: each would wait for the other.
        going = sorted(
            (v for v in held if not v.pinned and (v.idle or (not v.users and v.entry and version.crowded_since))),
            key=lambda v: v.used,
        )
        taken, free = sum(v.nbytes for v in held), len(self._held) - 1 - len(held)
        victims: list[Version] = []
        while not free or (self._memory is not None and taken + version.nbytes > self._memory):
            if not going:
                return 0
            victim = going.pop(0)
            victims.append(victim)
            taken, free = taken - victim.nbytes, free + 1
        for victim in victims:
            _log.info("adapter %s gives its place to %s", victim.name, version.name)
            victim.forget()
            self.evictions += 1
        entry = self._held.index(None, 1)
        self._held[entry] = version
        return entry

    def free(self, entry: int, owns: bool) -> None:
        """`owns`: it has weights of its own, whose memory is given back behind what is under way."""
        self._held[entry] = None
        if owns:
            self.between(lambda: self.sites.clear(entry))

    def ended(self, version: Version) -> None:
        """A load: it is in its place, waits for one, or failed."""
        self._coming.remove(version)
        old = self._names.get(version.name)
        if version.error is None and old is not None and old.order > version.order:
            self._retire(version)  # its name has been loaded again meanwhile, which was faster
        elif version.error is None:
            self.register(version)

    def register(self, version: Version) -> None:
        """It can be asked for by its name from now on."""
        old = self._names.get(version.name)
        self._names[version.name] = version
        if old is not None:
            self._retire(old)
        where = f"in place {version.entry}" if version.entry else "to be read when it is asked for: no place is free"
        _log.info("adapter %s is loaded from %s, %s", version.name, version.path, where)
        if version.owns:
            _log.info("adapter %s has weights of its own: its rows are passes of their own, op by op", version.name)
        if not version.entry:
            version.forget()
        self._count += 1
        version.used = self._count
        if version.sent is not None:
            self._forget_sent(version)

    def _known(self, name: str) -> Version:
        version = self._names.get(name)
        if version is None:
            known = ", ".join(sorted(self._names)[:20]) or "none is loaded"
            raise BadRequest(
                f"there is no adapter {name!r:.200}; known: {known}", param="lora_path", code="adapter_not_found"
            )
        return version

    def _starving(self, version: Version) -> Version | None:
        """An adapter that has waited so long for a place that requests of others must wait too."""
        late = time.monotonic() - PATIENCE
        waiting = [v for v in self._names.values() if v.waiters and 0 < v.crowded_since < late and v is not version]
        return min(waiting, key=lambda v: v.crowded_since, default=None)

    def _retire(self, version: Version) -> None:
        version.retired = True
        self._settle(version)

    def _settle(self, version: Version) -> None:
        if version.retired and version.idle:
            version.forget()

    def _forget_sent(self, new: Version) -> None:
        """What came without a folder is kept here, and no more of it than there are places: the one unused for longest
        is forgotten."""
        sent = [version for version in self._names.values() if version.sent is not None]
        if len(sent) > self.sites.entries:
            going = min((v for v in sent if not v.pinned and v is not new), key=lambda v: v.used)  # not all are pinned
            _log.info("adapter %s, which came as tensors, is forgotten for %s", going.name, new.name)
            self.unload(going.name)

    def _fitted(self, version: Version) -> Read:
        def base(name: str) -> Tensor:
            found = self.between(lambda: self._base(name)).result()
            self._based.add(_source(version))
            return found

        if isinstance(version.sent, Sent):
            version.sent = self._taken(Path(version.path), version.sent)
        found = version.sent if version.sent is not None else read(Path(version.path))
        rest, own = split(found, self.sites, base, lambda work: self.between(work).result())
        made = Read(fit(rest, self.sites, base), own)
        if found.digest is not None:
            version.confirm(found.content)
        return made

    def _taken(self, path: Path, sent: Sent) -> AdapterFile:
        """Copies of the tensors that were sent: whoever sent them may write over them."""
        tensors = sent.tensors if sent.coming is None else sent.coming.result()
        if tensors is None:
            blobs = [*sent.blobs, *(Path(file).read_bytes() for file in sent.files)]
            assert self._unpacked is not None
            return assembled(path, sent.config, self._unpacked(blobs, sent.load_format, self._largest()))
        pairs = list(tensors)
        if not all(
            isinstance(one, list | tuple) and len(one) == 2 and isinstance(one[1], torch.Tensor) for one in pairs
        ):
            raise BadRequest("tensors: a list of (name, tensor) is needed, or a dict of them", param="tensors")
        return assembled(path, sent.config, ((str(name), tensor.detach().cpu().clone()) for name, tensor in pairs))

    def _largest(self) -> int:
        """Bytes that the tensors of one adapter may take: twice those of the highest rank and of two matrices of the
        vocabulary, in float32."""
        rows, hidden = self.sites.table
        values = sum(len(site.sizes) * site.inputs + site.outputs for site in self.sites.sites)
        values += sum(block.config.count * 3 * sum(block.down.shapes[0]) for block in self.sites.blocks.values())
        return 8 * (values * self.sites.rank + 2 * rows * hidden) + SLACK


def one_thread() -> None:
    """The calling thread has none of torch's beside it from now on: they would take the cores that steps compute on."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    # That sets the calling thread, and what threads that come later begin with: the latter is set back by one of them.
    other = threading.Thread(target=torch.set_num_threads, args=(usual,), name="phloem-threads")
    other.start()
    other.join()


def _source(version: Version) -> str:
    return version.uid if version.sent is not None else str(Path(version.path))
