"""A link between two ranks that drops everything and closes nothing is found within seconds, by both of them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from phloem.utils.sockets import GIVEN_UP, notice_cuts

RANK = """
import sys, time, torch
from phloem.core.errors import EngineDead
from phloem.distributed.comm import Board, Gloo
rank, mode = int(sys.argv[1]), sys.argv[2]
here, listening = ("10.9.0.1", "10.9.0.2")[rank], None
if not rank:
    import socket
    listening = socket.create_server((here, 7700))
board = Board("10.9.0.1", 7700, 60.0, listening)
group = Gloo(rank, 2, board.part("a"), 300.0, here)
assert float(group.all_reduce(torch.ones(1))) == 2.0
print("there", flush=True)
sys.stdin.readline()
began = time.monotonic()
try:
    if mode == "one waits" and rank:
        time.sleep(10000)
    group.all_reduce(torch.ones(1 << 20))
    print("reduced", flush=True)
except EngineDead as error:
    print("lost", round(time.monotonic() - began, 1), error, flush=True)
"""


def in_two_spaces() -> bool:
    """Whether this machine lets us have networks of our own."""
    if sys.platform != "linux" or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    made = subprocess.run(
        ["unshare", "-n", "ip", "link", "add", "v0", "type", "veth"], capture_output=True, check=False
    )
    return made.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not in_two_spaces(), reason="needs networks of its own: root, or the right to make namespaces")
@pytest.mark.parametrize("mode", ["both send", "one waits"])
def test_ranks_do_not_wait_for_minutes_behind_a_link_that_is_cut(mode: str) -> None:
    spaces = [subprocess.Popen(["unshare", "-n", "sleep", "300"]) for _ in range(2)]
    ranks: list[subprocess.Popen[str]] = []

    def inside(number: int, *command: str) -> list[str]:
        return ["nsenter", "-n", "-t", str(spaces[number].pid), *command]

    def run(number: int, *command: str) -> None:
        subprocess.run(inside(number, *command), check=True, capture_output=True)

    try:
        time.sleep(0.5)  # `unshare` has made them by then
        run(0, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", str(spaces[1].pid))
        for number in range(2):
            run(number, "ip", "addr", "add", f"10.9.0.{number + 1}/24", "dev", f"v{number}")
            run(number, "ip", "link", "set", "lo", "up")
            run(number, "ip", "link", "set", f"v{number}", "up")
        for number in range(2):
            command = inside(number, sys.executable, "-c", RANK, str(number), mode)
            ranks.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        outputs = [rank.stdout for rank in ranks]
        assert all(output is not None and output.readline() == "there\n" for output in outputs)
        for number in range(2):  # nothing is told of it: whatever is sent goes nowhere
            run(number, "ip", "route", "replace", "blackhole", f"10.9.0.{2 - number}/32")
            run(number, "ip", "neigh", "flush", "all")
        run(0, "ip", "link", "set", "v0", "down")
        begun = time.monotonic()
        for rank in ranks if mode == "both send" else ranks[:1]:
            assert rank.stdin is not None and rank.stdout is not None
            rank.stdin.write("go\n")
            rank.stdin.flush()
        for rank in ranks if mode == "both send" else ranks[:1]:
            assert rank.stdout is not None
            timer = threading.Timer(4 * GIVEN_UP, rank.kill)  # it would wait for its 300 s
            timer.start()
            said = rank.stdout.readline()
            timer.cancel()
            assert said.startswith("lost"), said
        assert time.monotonic() - begun < 4 * GIVEN_UP
    finally:
        for process in (*ranks, *spaces):
            process.kill()
            process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux")
def test_connections_alone_are_given_up() -> None:
    """Sockets that listen, datagrams and pairs of this machine are left as they are."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        one, other = socket.socketpair()
        with socket.create_connection(listening.getsockname()) as near, listening.accept()[0] as far, one, other:
            given = {sock.fileno() for sock in (listening, datagrams, near, far, one, other)}
            assert notice_cuts(given) == 2
            for sock in (near, far):
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == GIVEN_UP * 1000
            assert near.send(b"x") == 1 and far.recv(1) == b"x"
