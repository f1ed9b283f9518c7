"""What passing streams on costs at least: the gateway beside relays that only copy bytes, under one load.

    python benchmarks/relay_floor.py [--rate 500] [--seconds 6] [--turns 2] [--profile FILE]

`c` is a loop over epoll in C, `uvloop` two protocols on uvloop that write what they read: neither parses, chooses,
counts or checks anything, and each connection of a client has one of its own to a server. What is told of each is
its processor time for a request, in user and system mode, as `phloem bench router --parts cost` tells the gateway's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import cast

import psutil

from phloem.bench._http import run
from phloem.bench._report import percentile
from phloem.bench.router import Options, _load, _process, _until_well  # pyright: ignore[reportPrivateUsage]

C_RELAY = r"""
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int peer_of[65536];

static void add(int poll, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
}

int main(int count, char **ports) {
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, there = here;
    socklen_t size = sizeof here;
    int listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0), turn = 0;
    if (bind(listener, (struct sockaddr *)&here, size) || listen(listener, 1024)) return 1;
    getsockname(listener, (struct sockaddr *)&here, &size);
    printf("%d\n", ntohs(here.sin_port));
    fflush(stdout);
    add(poll, listener);
    static char buffer[65536];
    struct epoll_event events[256];
    for (;;) {
        int ready = epoll_wait(poll, events, 256, -1);
        for (int at = 0; at < ready; at++) {
            int fd = events[at].data.fd;
            if (fd == listener) {
                int client = accept(listener, 0, 0), server = socket(AF_INET, SOCK_STREAM, 0);
                if (client < 0) continue;
                there.sin_port = htons(atoi(ports[1 + turn++ % (count - 1)]));
                if (connect(server, (struct sockaddr *)&there, sizeof there)) return 1;
                peer_of[client] = server;
                peer_of[server] = client;
                add(poll, client);
                add(poll, server);
                continue;
            }
            ssize_t got = recv(fd, buffer, sizeof buffer, 0);
            if (got > 0) {
                if (send(peer_of[fd], buffer, got, MSG_NOSIGNAL) == got) continue;
            }
            if (peer_of[fd]) {
                int other = peer_of[fd];
                peer_of[fd] = peer_of[other] = 0;
                close(other);
                close(fd);
            }
        }
    }
}
"""


class Half(asyncio.Protocol):
    """One of two connections; what it reads is written to the other."""

    def __init__(self, turns: itertools.cycle[int] | None, other: Half | None = None) -> None:
        self._turns, self.other = turns, other
        self.transport: asyncio.Transport | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._turns is not None:
            asyncio.get_running_loop().create_task(self._connect(next(self._turns)))

    async def _connect(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        _, self.other = await loop.create_connection(lambda: Half(None, self), "127.0.0.1", port)
        for data in self._early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        other = self.other
        if other is None:
            self._early.append(data)
        elif other.transport is not None:
            other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


async def relay(ports: list[int]) -> None:
    turns, loop = itertools.cycle(ports), asyncio.get_running_loop()
    server = await loop.create_server(lambda: Half(turns), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def started(command: list[str]) -> Generator[tuple[int, int]]:
    """A process that prints its port as its first line; gives its id and the port."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def gateway(ports: list[int], policy: str, profile: str | None) -> Generator[tuple[int, int]]:
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    args = ["phloem", "router", "--port", "0", "--log-level", "warning", "--policy", policy, "--worker-urls", *urls]
    before = ["cProfile", "-o", profile, "-m"] if profile else []
    with _process(*before, *args) as found:
        run(_until_well(found[1], len(ports)))
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--policy", default="cache_aware")
    parser.add_argument("--kinds", default="gateway,uvloop,c")
    parser.add_argument("--profile", help="let the gateway run under cProfile, which makes it slower, and write this")
    parser.add_argument("--relay", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.relay:
        run(relay(args.relay))
        return
    options = Options(rate=args.rate, seconds=args.seconds, policy=args.policy)
    with contextlib.ExitStack() as stack:
        paced = [str(options.events), str(options.pause)]
        ports = [stack.enter_context(_process("phloem.bench._paced", "0", *paced))[1] for _ in range(options.workers)]
        names = [str(port) for port in ports]
        doors: dict[str, tuple[int, int]] = {}
        for kind in args.kinds.split(","):
            if kind == "gateway":
                doors[kind] = stack.enter_context(gateway(ports, args.policy, args.profile))
            elif kind == "uvloop":
                command = [sys.executable, str(Path(__file__).resolve()), "--relay", *names]
                doors[kind] = stack.enter_context(started(command))
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                (folder / "relay.c").write_text(C_RELAY)
                subprocess.run(["cc", "-O2", "-o", folder / "relay", folder / "relay.c"], check=True)
                doors[kind] = stack.enter_context(started([str(folder / "relay"), *names]))
        seen = {kind: [0.0, 0.0, 0.0, 0.0] for kind in doors}  # user, system, wall, requests
        firsts: dict[str, list[float]] = {kind: [] for kind in ("direct", *doors)}
        for _, port in doors.values():
            run(_load([port], options, 1.0))
        for _ in range(args.turns):
            firsts["direct"] += run(_load(ports, options, options.seconds))[0]
            for kind, (pid, port) in doors.items():
                process = psutil.Process(pid)
                before, begun = process.cpu_times(), time.monotonic()
                times, failed = run(_load([port], options, options.seconds))
                after = process.cpu_times()
                if failed:
                    raise SystemExit(f"{kind}: {failed} requests failed")
                more = (after.user - before.user, after.system - before.system, time.monotonic() - begun, len(times))
                seen[kind] = [old + new for old, new in zip(seen[kind], more, strict=True)]
                firsts[kind] += times
        direct = percentile(firsts["direct"], 0.5)
        print(json.dumps({"direct_p50_ms": round(direct * 1e3, 3)}))
        for kind, (user, system, wall, requests) in seen.items():
            told = {
                "core_share": round((user + system) / wall, 3),
                "user_us": round(user / requests * 1e6),
                "system_us": round(system / requests * 1e6),
                "added_p50_ms": round((percentile(firsts[kind], 0.5) - direct) * 1e3, 3),
                "requests_per_s": round(requests / wall, 1),
            }
            print(json.dumps({kind: told}), flush=True)


if __name__ == "__main__":
    main()
