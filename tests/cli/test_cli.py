"""The command line: help, errors, YAML, and the offline commands on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phloem import cli
from phloem.cli._options import parse
from phloem.core.errors import ConfigError
from phloem.testing.checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


def phloem(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "phloem", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS.names():
        assert f"  {name.replace('_', '-')} " in text


def test_a_wrong_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["srve"]) == 2
    assert "did you mean 'serve'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--distributed-executor-backend", "--enable-expert-parallel"])
def test_parallelism_that_is_not_there_is_refused_by_name(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"{flag.split('=')[0].strip('-')}: there is no .*docs/parallel.md"):
        parse("serve", ["model", flag, "2"])


def test_ranks_have_the_flags_of_other_engines() -> None:
    for flag in ("--tp-size", "--tp", "--tensor-parallel-size"):
        assert parse("serve", ["model", flag, "2"])[0].runtime.tp_size == 2
    for size, flags in {
        "pp_size": ("--pp-size", "--pp", "--pipeline-parallel-size"),
        "ep_size": ("--ep-size", "--ep", "--expert-parallel-size"),
        "dp_size": ("--dp-size", "--dp", "--data-parallel-size"),
    }.items():
        for flag in flags:
            ranks = ["--tp-size", "2"] if size == "ep_size" else []  # that experts are shared out among
            assert parse("serve", ["model", flag, "2", *ranks])[0].flat()[size] == 2
    assert parse("serve", ["model", "--tp-size", "2", "--attn-dp-size", "2"])[0].runtime.attn_dp_size == 2


def test_every_setting_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("serve", ["--help"])
    text = capsys.readouterr().out
    for flag in ("--host", "--port", "--dtype", "--context-length", "--max-running-requests", "--max-total-tokens",
                 "--mem-fraction-static", "--chunked-prefill-size", "--page-size", "--schedule-policy",
                 "--disable-radix-cache", "--served-model-name", "--api-key", "--load-format", "--quantization",
                 "--log-level"):  # fmt: skip
        assert flag in text


def test_flags_win_over_the_file_and_the_first_word_is_the_model(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 4000\npage-size: 32\nmodel_path: from-file\n")
    config, _ = parse("serve", ["mine", "--config", str(file), "--page-size", "8"])
    assert (config.server.port, config.cache.page_size, config.model.model_path) == (4000, 8, "mine")
    config, _ = parse("serve", [f"--config={file}"])
    assert config.model.model_path == "from-file"


@pytest.mark.parametrize(
    ("text", "message"), [("prot: 1", "did you mean 'port'"), ("- 1", "must map"), ("a: [", "not YAML")]
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse("serve", ["--config", str(file)])


@pytest.mark.slow
def test_run_answers_in_order_and_keeps_going_past_a_bad_prompt(model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"prompt": "hello"},
        {"input_ids": [999999]},
        {"messages": [{"role": "user", "content": "hi"}], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}},
    ]
    lines += [{"messages": []}, {"messages": "hi"}]
    source.write_text("\n".join(json.dumps(line) for line in lines) + "\nplain text\n")
    done = phloem("run", str(model), "--input", str(source), "--output", str(target), "--max-new-tokens", "5",
                  "--dtype", "float32", "--max-total-tokens", "2048")  # fmt: skip
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(answers) == 6 and done.returncode == 1
    assert "at least one" in answers[3]["error"] and "a role each" in answers[4]["error"]
    assert "token id" in answers[1]["error"]
    assert answers[2]["meta_info"]["completion_tokens"] == 3
    assert "tok/s" in done.stderr


@pytest.mark.slow
def test_chat_streams_and_remembers(model: Path) -> None:
    done = phloem("chat", str(model), "--dtype", "float32", "--max-total-tokens", "2048", "--max-new-tokens", "4",
                  stdin="hello\n/clear\nagain\n/exit\n")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" s)") == 2 and "a new conversation" in done.stdout


@pytest.mark.slow
def test_doctor_shows_machine_libraries_and_choices(model: Path) -> None:
    done = phloem("doctor", str(model))
    assert done.returncode == 0, done.stderr
    for word in ("usable cores", "torch", "family", "llama", "ops", "context"):
        assert word in done.stdout
    bad = phloem("doctor", "/nowhere/at/all")
    assert bad.returncode == 1 and "nowhere" in bad.stdout


FULL = Path("/dev/full")


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"], ["doctor"]])
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with FULL.open("w") as out:
        command = [sys.executable, "-m", "phloem", *arguments]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("output cannot be written: No space left on device\n")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
def test_answers_that_cannot_be_written_are_one_line(model: Path) -> None:
    done = phloem("run", str(model), "--prompt", "a", "--max-new-tokens", "2", "--output", str(FULL))
    assert done.returncode == 1 and "output cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize(
    ("limit", "option"), [("-n 20", "ulimit -n"), ("-v 150000", "ulimit -v"), ("-v 500000", "ulimit -v")]
)
def test_limits_of_the_system_are_told_with_what_helps(model: Path, limit: str, option: str) -> None:
    command = f"ulimit {limit}; exec {sys.executable} -m phloem serve {model} --port 0 --max-total-tokens 4096"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("phloem serve: ") and option in last
    assert "Traceback" not in done.stderr
