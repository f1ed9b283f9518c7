"""A rank's process that says one thing and lives on: `python -m rank_stand_in`, in place of `phloem.launch.rank`."""

from __future__ import annotations

import json
import os
import sys
import time

import msgspec

from phloem.utils.ipc import frame


def main() -> None:
    order = json.loads(sys.stdin.buffer.readline())
    kind, why = order["say"]
    said = msgspec.msgpack.encode({"what": kind, "why": why} if kind else why)
    os.write(order["pipe"], frame(said))
    time.sleep(60)


if __name__ == "__main__":
    main()
