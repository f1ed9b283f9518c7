"""A section of scripts/gpu_check.py in a process of its own, or a worker that checks one kernel or model at a time.

    python scripts/gpu_child.py SECTION [--until T] [--tiny]      runs one section of gpu_sections.py
    python scripts/gpu_child.py worker KIND [--tiny]              a question a line: {"kind", "name", "dtype", "tiny"}

What it finds goes to standard output as it is found, one JSON object a line behind `@@ `. A worker whose device no
longer answers (an illegal access ends all work of a process on a device) says so and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

from gpu_plan import SECTIONS  # noqa: E402
from gpu_watch import DATA  # noqa: E402

LEFT_BYTES = 64 << 20  # workspaces of libraries stay
MOST_TEXT = 1000


def tell(what: dict[str, Any]) -> None:
    sys.stdout.write(DATA + json.dumps(what) + "\n")
    sys.stdout.flush()


def absent(packages: tuple[str, ...]) -> list[str]:
    """Which of these cannot be imported."""
    found: list[str] = []
    for name in packages:
        there = False
        with contextlib.suppress(ImportError, ValueError):
            there = importlib.util.find_spec(name) is not None
        found += [] if there else [name]
    return found


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MOST_TEXT]


def section(args: argparse.Namespace) -> int:
    """Run it; a missing package, or too little memory, is told as that, other errors with their traceback."""
    if missing := absent(SECTIONS[args.what].packages):
        tell({"skipped": f"missing: {', '.join(missing)}"})
        tell({"left_mib": 0.0})
        return 0
    from gpu_sections import Sections

    run = Sections(args, tell)
    tell({"free_gib": run.card.free() / 2**30})
    try:
        found = getattr(run, args.what.replace("-", "_"))()
    except ImportError as error:
        tell({"skipped": f"missing: {error}"})
    except MemoryError as error:
        tell({"skipped": str(error)})
    except Exception as error:
        traceback.print_exc()
        out = "out of memory: " if type(error).__name__ == "OutOfMemoryError" else ""
        tell({"error": out + describe(error)})
    else:
        tell({"found": found, "done": True})
    leave_nothing(run)
    return 0


def leave_nothing(run: Any) -> None:
    """What a section's objects still hold on the device, once they are gone, hangs in a circle; in an engine it would
    be memory that is lost."""
    gc.collect()
    try:
        run.card.empty()
        left = run.card.allocated()
    except Exception as error:  # an illegal access ends all work on the device; what led to it has been told
        tell({"error": describe(error), "of": "ended its device"})
        tell({"left_mib": 0.0})
        return
    if left > LEFT_BYTES:
        tell({"error": f"memory stays allocated: {left / 2**20:.0f} MiB", "of": "left memory behind"})
    tell({"left_mib": left / 2**20})


def worker(args: argparse.Namespace) -> int:
    """Answer questions until there are no more."""
    try:
        import gpu_kernels
        import gpu_models
        import torch

        from phloem.kernels.triton import table
    except ImportError as error:
        tell({"missing": str(error)})
        return 0
    device = torch.device("cpu" if args.tiny else "cuda")
    tell({"ready": gpu_kernels.names() if args.kind == "kernels" else list(gpu_models.TINY)})
    for line in sys.stdin:
        question = json.loads(line)
        dtype = getattr(torch, question["dtype"])
        begun = time.perf_counter()
        try:
            if question["kind"] == "kernels":
                found = gpu_kernels.run(device, dtype, question["tiny"], question["name"])
            else:
                found = gpu_models.check_models(device, dtype, table.table(), question["name"])
            answer: dict[str, Any] = {"outcomes": gpu_kernels.as_dicts(found)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": describe(error)}
        answer["seconds"] = time.perf_counter() - begun
        if why := broken(device):
            tell({**answer, "dead": why})
            os._exit(0)  # nothing that is torn down now would come to an end in order
        tell(answer)
    return 0


def broken(device: Any) -> str:
    """Why the device does no more work for this process; "" if it does."""
    import torch

    try:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        total = float((torch.ones(64, device=device) + 1).sum())
    except Exception as error:
        return describe(error)
    return "" if total == 128 else f"64 times 2 is {total} on it"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("worker", *SECTIONS))
    parser.add_argument(
        "kind", nargs="?", choices=("kernels", "models"), default="kernels", help="of a worker's questions"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--until", type=float, default=time.monotonic() + 600.0, help="by time.monotonic()")
    parser.add_argument("--floors", default="", help="JSON of those that were measured")
    parser.add_argument("--engine-device", default="", help="of the engines that a section starts")
    parser.add_argument(
        "--pretend-gib", type=float, default=141.0, help="memory of the card that a tiny run stands for"
    )
    args = parser.parse_args()
    with contextlib.suppress(AttributeError, ValueError):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    if args.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    return worker(args) if args.what == "worker" else section(args)


if __name__ == "__main__":
    sys.exit(main())
