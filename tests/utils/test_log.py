"""Log lines as text and as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime

import pytest

from phloem.core.config import log_format
from phloem.core.errors import ConfigError
from phloem.utils import log

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger("phloem")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


def test_a_line_of_json_has_what_a_request_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHLOEM_LOG_FORMAT", "json")
    log.configure("info", "engine", log_format())
    log.get("router").info("request %s: done\nand over", "a", extra=log.fields(request_id="a", status=200, why=None))
    try:
        raise ValueError("odd")
    except ValueError:
        log.get("tiers").exception("it failed")
    log.get("tiers").debug("not said")
    first, second = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert datetime.fromisoformat(first.pop("time")).utcoffset() is not None
    assert first == {
        "level": "info", "logger": "phloem.router", "process": "engine", "message": "request a: done\nand over",
        "request_id": "a", "status": 200, "why": None,
    }  # fmt: skip
    assert second["level"] == "error" and "ValueError: odd" in second["exception"] and "request_id" not in second


def test_lines_are_text_unless_asked_otherwise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHLOEM_LOG_FORMAT", raising=False)
    log.configure("warning", form=log_format())
    log.get("router").warning("a %s", "word", extra=log.fields(status=1))
    assert capsys.readouterr().err.endswith("WARNING phloem.router: a word\n")
    monkeypatch.setenv("PHLOEM_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="PHLOEM_LOG_FORMAT: 'xml' is not one of text, json"):
        log_format()
