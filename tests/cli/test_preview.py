"""Pictures on their way in a terminal: which ones show them, how large, and the command under a terminal of its own."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from phloem.cli._preview import COUNT, HALF, WIDEST, Preview
from phloem.core.messages import Painted

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits" / "model"


def told(pixels: np.ndarray, preview: int = 0) -> Painted:
    height, width, _ = pixels.shape
    return Painted(id="a", height=height, width=width, pixels=pixels.astype(np.uint8).tobytes(), preview=preview)


def shown(preview: Preview, width: int = 80, height: int = 40) -> str:
    to = io.StringIO()
    Console(file=to, force_terminal=True, color_system="truecolor", width=width, height=height).print(preview)
    return to.getvalue()


def colourful() -> Preview:
    return Preview(Console(file=io.StringIO(), force_terminal=True, color_system="truecolor"))


def test_two_pixels_are_a_character_and_their_colours_are_the_picture() -> None:
    pixels = np.zeros((2, 2, 3))
    pixels[0, 0], pixels[1, 0], pixels[0, 1] = (255, 0, 0), (0, 0, 255), (1, 2, 3)
    preview = colourful()
    assert shown(preview).strip() == ""
    preview.take(told(pixels))
    assert f"\x1b[38;2;255;0;0;48;2;0;0;255m{HALF}" in shown(preview)
    assert f"\x1b[38;2;1;2;3;48;2;0;0;0m{HALF}" in shown(preview)
    preview.take(told(np.full((2, 2, 3), 9), preview=-1))  # no preview: a frame of a film, or news of a step
    assert "38;2;255;0;0" in shown(preview)


@pytest.mark.parametrize(
    ("size", "room", "expected"),
    [((100, 100), (80, 40), (48, 24)), ((400, 100), (80, 40), (18, 36)), ((20, 300), (30, 40), (30, 1)),
     ((1, 1), (80, 40), (1, 1)), ((4000, 10), (80, 24), (1, 20))],
)  # fmt: skip
def test_a_picture_keeps_its_shape_in_the_room_that_there_is(
    size: tuple[int, int], room: tuple[int, int], expected: tuple[int, int]
) -> None:
    preview = colourful()
    preview.take(told(np.full((*size, 3), 200)))
    lines = [line.count(HALF) for line in shown(preview, *room).splitlines() if HALF in line]
    assert (lines[0], len(lines)) == expected and len(set(lines)) == 1 and lines[0] <= WIDEST


def test_terminals_without_colours_are_not_asked_to() -> None:
    for console in (
        Console(file=io.StringIO()),
        Console(file=io.StringIO(), force_terminal=True, no_color=True, color_system=None),
        Console(file=io.StringIO(), force_terminal=True, color_system="standard"),
    ):
        preview = Preview(console)
        preview.take(told(np.full((2, 2, 3), 200)))
        assert preview.count == 0 and HALF not in shown(preview)
    assert colourful().count == COUNT


@pytest.mark.slow
def test_the_command_shows_what_it_draws(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "phloem", "generate", str(DIGITS), "--prompt", "draw a seven", "--seed", "3"]
    command += ["--guidance-scale", "3", "--num-inference-steps", "200", "--output", str(tmp_path / "seven.png")]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80", "LINES": "40"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, stdin=theirs, env=environment) as running:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other end has gone
                break
            if not part:
                break
            seen += part
        assert running.wait(100) == 0, seen
    os.close(ours)
    text = seen.decode(errors="replace")
    assert text.count(HALF) >= 8 * 16 and re.search(r"38;2;\d+;\d+;\d+;48;2;", text), text[-2000:]
    assert (tmp_path / "seven.png").read_bytes().startswith(b"\x89PNG")
