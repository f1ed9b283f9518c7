"""`phloem bench images` on a tiny folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

from phloem.bench import images

pytestmark = pytest.mark.slow


def test_all_draw_all_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lines.jsonl"
    argv = ["--requests", "3", "--rate", "0", "--size", "16x16", "--steps", "2", "--image-step-tokens", "64"]
    plot = tmp_path / "plot.png"
    assert images.main([*argv, "--batch", "2", "--output", str(out), "--plot", str(plot)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["phloem", "diffusers, one by one", "diffusers, up to 2 whole requests"]
    assert [record["engine"] for record in found] == names
    assert all(len(record["latencies_s"]) == 3 for record in found)
    assert found[2]["latencies_s"][0] == pytest.approx(found[2]["latencies_s"][1], abs=1e-4)  # they end together
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert all(0 < record["latency_p50_s"] <= record["latency_p99_s"] for record in found)
    assert "random weights" in capsys.readouterr().out


def test_moments_are_random_and_the_same_each_time() -> None:
    times = images.arrivals(images.Options(requests=50, rate=10.0))
    assert times == images.arrivals(images.Options(requests=50, rate=10.0)) == sorted(times)
    assert 2 < times[-1] < 10
    assert images.arrivals(images.Options(requests=3, rate=0.0)) == [0.0, 0.0, 0.0]


DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits" / "model"


def test_a_classifier_says_what_step_caches_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lines.jsonl"
    argv = ["--model-path", str(DIGITS), "--requests", "10", "--size", "16x16", "--steps", "8"]
    argv += ["--image-defaults", '{"guidance_scale": 3}', "--step-caches", "1e-9,1", "--output", str(out)]
    assert images.main(argv) == 0
    never, often = (json.loads(line) for line in out.read_text().splitlines())
    assert never["pictures"] == 10 and never["recognised"] == never["recognised_without"] >= 8
    assert (never["cached_steps"], never["most_pixel_difference"], never["psnr_db"]) == (0, 0.0, float("inf"))
    assert often["steps"] // 4 < often["cached_steps"] <= often["steps"] - 20  # the first of each row is computed
    assert often["mean_pixel_difference"] > 0 and 0 <= often["recognised"] <= 10
    assert often["cpu_seconds"] > 0 and often["cpu_seconds_without"] > 0
    assert "recognised" in capsys.readouterr().out
