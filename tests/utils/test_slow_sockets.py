"""What is sent to a peer that takes it slowly."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from phloem.launch.wire import Stream
from phloem.utils.ipc import frame


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends over TCP whose buffers hold little."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        one.connect(door.getsockname())
        two, _ = door.accept()
    two.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    return one, two


@pytest.mark.slow
def test_a_node_that_takes_what_is_sent_slowly_but_steadily_is_not_lost() -> None:
    one, two = pair()
    stream, taken = Stream(one), bytearray()
    stream.trust(0.4)
    sent = frame(bytes(1 << 22))

    def take() -> None:
        while len(taken) < len(sent):
            taken.extend(two.recv(1 << 18))
            time.sleep(0.05)

    taker = threading.Thread(target=take)
    taker.start()
    stream.send_raw(sent)
    taker.join(30)
    assert taken == sent
    with pytest.raises(TimeoutError):
        stream.send_raw(sent)  # nobody takes it
    stream.close()
    two.close()
