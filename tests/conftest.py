"""What every test begins with."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes side by side: more threads of torch than one in each spin in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


FAST = "not slow"  # the expression of marks by which the fast tier is chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="all cases where usually some of them stand for all")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == FAST:
        gc.disable()  # what collection makes stays to the end: no looking for garbage while it is made, nor in it later


def pytest_collection_finish() -> None:
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain of what is left behind


# So many cases of one test are in the fast tier, evenly spaced; the others are `slow`.
CASES = 3
WHOLE = ("contract/", "test_house.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file whose tests are all slow imports libraries that the fast tier does not need."""
    if config.option.markexpr != FAST or collection_path.suffix != ".py":
        return None
    return (
        re.search(r"^pytestmark = .*\bmark\.slow\b", collection_path.read_text("utf-8"), re.MULTILINE) is not None
        or None
    )


def _spaced(count: int, of: int) -> set[int]:
    """So many places among so many, evenly spaced, the first and the last among them."""
    return {round(at * (of - 1) / max(1, count - 1)) for at in range(count)}


def leave_some(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `some(n)`, n of its cases are run; all of them with --every, and where a case is named."""
    if config.getoption("--every") or any("[" in argument for argument in config.args):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("some") is not None:
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    left: set[pytest.Item] = set()
    for each in cases.values():
        marker = each[0].get_closest_marker("some")
        assert marker is not None
        kept = _spaced(marker.args[0], len(each))
        left |= {item for at, item in enumerate(each) if at not in kept}
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_some(config, items)
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        where = item.nodeid.split("tests/", 1)[-1]
        if item.get_closest_marker("slow") is None and not where.startswith(WHOLE):
            cases.setdefault((where.split("::")[0], item.nodeid.split("[")[0]), []).append(item)
    for each in cases.values():
        kept = _spaced(CASES, len(each)) if len(each) > CASES else None
        for at, item in enumerate(each):
            if kept is not None and at not in kept:
                item.add_marker("slow")


@pytest.fixture(autouse=True)
def log_is_as_it_was() -> Iterator[None]:
    """An engine in this process configures the product's log: the next test must not find it so."""
    log = logging.getLogger("phloem")
    before = log.propagate, log.level, list(log.handlers)
    log.propagate = True
    # Engines of a whole module or session leave theirs: what is quieter than usual would hide warnings.
    log.setLevel(min(before[1], logging.WARNING))
    yield
    log.propagate, log.level = before[0], before[1]
    log.handlers[:] = before[2]
