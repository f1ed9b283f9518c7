"""Weights in buckets, as checkpoint-engine hands them over: its sender lends one piece of memory, and says over a
socket of ZeroMQ, bucket by bucket, which tensors lie where in it.

The sender asks and this engine answers, an empty answer for yes, any other for what is wrong:

1. the handle of the memory, as torch makes it (`torch.multiprocessing.reductions.reduce_tensor`);
2. for each bucket, when it lies in the memory, a list of {name, dtype, shape, offset}; the answer lends it back;
3. None, when there are no more, and the memory is free; from checkpoint-engine 0.3 on, None once more.

Source: https://github.com/MoonshotAI/checkpoint-engine, `worker.py`. Messages are pickles there; here they are read as
records (`rl._records`), and nothing of one is ever executed.
"""

from __future__ import annotations

import re
from contextlib import suppress
from math import prod
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from phloem.core.errors import BadRequest, PhloemError
from phloem.platforms._lent import HOST, Lent, name_of
from phloem.rl._records import Made, Named, count_in, records, shape_in
from phloem.rl._shared import ON_DEVICE, Shared, device_handle, place_of
from phloem.rl.payload import dtype_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from threading import Event

    import torch

    from phloem.rl.payload import Tensors

SECONDS = 300.0  # for a sender's next message
CONNECT_SECONDS = 30.0
LAST_SECONDS, MOST_LAST = 60.0, 8  # for what a sender says behind its last bucket, and how often it does
STEP_MS = 100
LINGER_MS = 1000
MOST_MESSAGE = 64 << 20  # bytes
_ADDRESS = re.compile(r"ipc://(@[\w.:\-]{1,100}|/[^\x00]{1,100})")


class Memory(Protocol):
    """What a sender lends."""

    size: int

    def read(self, start: int, size: int) -> torch.Tensor:
        """A copy of these bytes."""
        ...

    def settle(self) -> None:
        """Wait until what was read is there."""
        ...

    def close(self) -> None: ...


def address_for(handles: Mapping[str, str], device: torch.device) -> str:
    """The socket that is meant for this device. On the host the only one is, whatever it is called.

    Raises:
        BadRequest: there is none, or it is no socket of this machine.
    """
    own = name_of(device)
    found = handles.get(own)
    if found is None and own == HOST and len(handles) == 1:
        found = next(iter(handles.values()))
    if found is None:
        named = ", ".join(handles)[:200] or "nothing"
        raise BadRequest(f"zmq_handles has no socket for {own or device}; it names {named}", param="zmq_handles")
    if not _ADDRESS.fullmatch(found):
        raise BadRequest(
            f"{found[:200]!r} is no socket of this machine: ipc://@name or ipc:///path", param="zmq_handles"
        )
    return found


def lent_memory(message: bytes, device: torch.device) -> Memory:
    """What the first message lends: one row of bytes. Raises BadRequest, with the remedy where there is one."""
    found = records(message)
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Named) and isinstance(found[1], tuple):
        found = Made(found[0].name, found[1])  # as `reduce_tensor` gives it: the function, and its arguments
    if isinstance(found, Made) and found.name in ON_DEVICE:
        handle = device_handle(found)
        _check_row(handle.dtype, handle.shape, handle.stride)
        return Lent(handle, device)
    place = place_of(found)
    _check_row(place.dtype, place.shape, place.stride)
    if place.offset or place.shape != (place.size,):
        raise BadRequest("the memory that is lent is part of another one: lend the whole of a tensor's")
    return Shared(place)


def _check_row(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    if dtype != "uint8" or len(shape) != 1 or stride != (1,) or not shape[0]:
        raise BadRequest(f"the memory that is lent is one row of bytes, not {list(shape)} of {dtype}")


def tensors_in(found: Any, memory: Memory, room: int) -> Tensors:
    """Copies of a bucket's tensors.

    Args:
        found: the message, as records.
        room: bytes that they may take.

    Raises:
        BadRequest: naming what is wrong.
    """
    if not isinstance(found, list):
        raise BadRequest("a bucket is a list of tensors, and None stands behind the last one")
    tensors: Tensors = []
    for one in found:
        given = one if isinstance(one, dict) else {}
        if missing := [name for name in ("name", "dtype", "shape", "offset") if name not in given]:
            raise BadRequest(f"a tensor of the bucket lacks {', '.join(missing)}")
        name, shape, dtype, start = one["name"], shape_in(one["shape"]), dtype_in(one["dtype"]), count_in(one["offset"])
        size = prod(shape) * dtype.itemsize
        if not isinstance(name, str) or start + size > memory.size:
            raise BadRequest(f"{str(name)[:200]} lies outside of the memory that is lent")
        room -= size
        if room < 0:
            raise BadRequest("the tensors take more than this model's weights may take")
        tensors.append((name, memory.read(start, size).view(dtype).reshape(shape)))
    memory.settle()
    return tensors


def receive(
    address: str, device: torch.device, check: Callable[[Tensors], None], limit: int, stopped: Event
) -> Tensors:
    """All tensors of a sender.

    Args:
        check: raises for a bucket's tensors that the model has no use for; the sender is told so.
        limit: bytes that all of them together may take.
        stopped: the engine ends, and so does this.

    Raises:
        PhloemError: the sender is not there, goes away, or sends what cannot be read.
    """
    talk = Talk(address, stopped)
    try:
        found = _received(talk, device, check, limit)
    except BaseException as error:
        talk.leave(error.message if isinstance(error, PhloemError) else f"{type(error).__name__}: {error}"[:1000])
        raise
    talk.leave()
    return found


def _received(talk: Talk, device: torch.device, check: Callable[[Tensors], None], limit: int) -> Tensors:
    found: Tensors = []
    memory = lent_memory(talk.hear(), device)
    try:
        talk.say()
        while (bucket := records(talk.hear())) is not None:
            tensors = tensors_in(bucket, memory, limit)
            check(tensors)
            limit -= sum(tensor.nbytes for _, tensor in tensors)
            found += tensors
            talk.say()
    finally:
        memory.close()
    return found


class Talk:
    """The conversation. It knows when the other side goes away, which a socket of ZeroMQ does not say by itself."""

    def __init__(self, address: str, stopped: Event) -> None:
        try:
            import zmq
            from zmq.utils.monitor import recv_monitor_message
        except ImportError:
            text = "update_weights_from_ipc needs pyzmq: pip install 'phloem[events]'"
            raise BadRequest(text, code="not_supported") from None
        self._zmq: Any = zmq
        self._event = recv_monitor_message
        self._address, self._stopped = address, stopped
        self._context: Any = zmq.Context()
        self._socket: Any = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MOST_MESSAGE)
        self._monitor: Any = self._socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        self._poller: Any = zmq.Poller()
        for one in (self._socket, self._monitor):
            self._poller.register(one, zmq.POLLIN)
        self._here = self._gone = False
        self._asked = False  # whether the sender waits for an answer
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise BadRequest(f"{address}: {error}", param="zmq_handles") from None

    def hear(self, seconds: float = SECONDS) -> bytes:
        """The sender's next message. Raises BadRequest: none comes."""
        begun = monotonic()
        while True:
            ready = dict(self._poller.poll(STEP_MS))
            if self._socket in ready:
                self._asked = True
                return self._socket.recv()
            if self._monitor in ready:
                self._note(self._event(self._monitor)["event"])
                continue
            waited = monotonic() - begun
            if self._gone:
                raise BadRequest("the sender has gone in the middle of an update; nothing was changed")
            if self._stopped.is_set():
                raise BadRequest("not done: the engine stops")
            if not self._here and waited > CONNECT_SECONDS:
                raise BadRequest(f"nobody listens at {self._address}", param="zmq_handles")
            if waited > seconds:
                raise BadRequest(f"the sender has said nothing for {seconds:g} s; nothing was changed")

    def _note(self, event: int) -> None:
        self._here = self._here or event == self._zmq.EVENT_CONNECTED
        self._gone = event == self._zmq.EVENT_DISCONNECTED

    def say(self, wrong: str = "") -> None:
        """Yes, or what is wrong, to what was heard last."""
        self._asked = False
        self._socket.send_string(wrong)

    def leave(self, wrong: str = "") -> None:
        """Say it, and go on saying it to what may still come, beside whoever goes on: a sender says None twice or once,
        and one that was told of an error in its last bucket says so too."""
        Thread(target=self._last, args=(wrong,), name="phloem-ipc-end", daemon=True).start()

    def _last(self, wrong: str) -> None:
        try:
            with suppress(BadRequest):
                for _ in range(MOST_LAST):
                    if not self._asked:
                        self.hear(LAST_SECONDS)
                    self.say(wrong)
        finally:
            self.close()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()
