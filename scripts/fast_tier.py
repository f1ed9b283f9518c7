"""Runs the fast tests, tells their seconds, and fails where they have become slow.

    python scripts/fast_tier.py [pytest's arguments]

The ceiling is in seconds of computing, of which two cores have 240 in two minutes, and style and types take 15: it does
not depend on what else the machine does. What goes over it is listed by pytest as slowest: make it shorter, or mark it
`slow`. Three processes keep two cores busy while one of them waits for a server or a time-out.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from time import perf_counter

CEILING = 220.0
COMMAND = ["-m", "pytest", "-m", "not slow", "-n", "3", "--dist", "loadfile", "--durations=20"]
COMMAND += ["-p", "no:schemathesis"]  # every process would import it, for slow tests alone


def main() -> int:
    begun = perf_counter()
    status = subprocess.run([sys.executable, *COMMAND, *sys.argv[1:]], check=False).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    print(
        f"fast tier: {perf_counter() - begun:.0f} s, {seconds:.0f} s of computing, of which {CEILING:.0f} are allowed"
    )
    if status == 0 and seconds > CEILING:
        print("the fast tier has become too slow: see its slowest tests above")
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
