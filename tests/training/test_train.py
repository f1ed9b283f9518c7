"""A whole training of a tiny head, its checkpoints, and how it ends and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import phloem
from phloem.cli import main
from phloem.core.errors import ConfigError
from phloem.testing.checkpoints import CORPUS, tiny_checkpoint
from phloem.training import checkpoints, states
from phloem.training.answers import Answerer
from phloem.training.checkpoints import Map
from phloem.training.data import Sample
from phloem.training.options import Options
from phloem.training.report import Bars, read_metrics
from phloem.training.run import _held_out, _texts, train  # pyright: ignore[reportPrivateUsage]
from phloem.training.states import Library, NoSpace
from phloem.training.target import Target, head_config
from phloem.training.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "draft_vocab_size": 160,
    "generate": 40,
    "generate_tokens": 40,
    "generate_temperature": 0.0,
    "eval_prompts": 6,
    "eval_tokens": 40,
    "eval_interval": 30,
    "ttt_length": 3,
    "num_epochs": 8,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "log_interval": 1,
    "threads": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and questions to it."""
    folder = tmp_path_factory.mktemp("training")
    tiny_checkpoint("llama", folder / "model", num_hidden_layers=6)
    words = " ".join(CORPUS).split()
    asked = [" ".join(words[at : at + 3]) for at in range(46)]
    lines = [json.dumps({"messages": [{"role": "user", "content": one}]}) for one in asked]
    (folder / "asked.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def options(place: Path, output: str, **settings: Any) -> Options:
    paths = {"target_model_path": str(place / "model"), "train_data_path": str(place / "asked.jsonl")}
    values: dict[str, Any] = {**SETTINGS, **paths, "output_dir": str(place / output), **settings}
    return Options(**values)


def argv(given: Options) -> list[str]:
    names = [*SETTINGS, "train_data_path", "output_dir"]
    flags = [word for name in names for word in (f"--{name.replace('_', '-')}", str(vars(given)[name]))]
    return ["train-draft", given.target_model_path, *flags]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    given = options(place, "trained")
    assert main(argv(given)) == 0
    return Path(given.output_dir)


def looked(place: Path, head: dict[str, torch.Tensor], **settings: Any) -> float:
    """Accept length of these weights on the held-out answers of the training."""
    given = options(place, "trained", **settings)
    with Bars() as bars:
        texts = _texts(given, place / "trained", bars)
    target = Target(given.target_model_path, "cpu", 1)
    words = Map(head["d2t"], head["t2d"])
    sizes = head_config(target.checkpoint, len(head["d2t"]), {})
    trainer = Trainer(given, target, Library(target, texts.samples, None, 0, "float32"), 1, words, sizes)
    trainer.head.load_state_dict({name: value for name, value in head.items() if name not in ("d2t", "t2d")})
    return trainer.look(_held_out(target, texts)).length


@pytest.mark.slow
def test_a_trained_head_gives_more_tokens_a_step(place: Path, trained: Path) -> None:
    lines = [line["accept_length"] for line in read_metrics(trained) if "accept_length" in line]
    folder = checkpoints.found_in(trained)[-1]
    head = load_file(folder / checkpoints.WEIGHTS)
    right_at = [line["accepted_at"] for line in read_metrics(trained) if "accepted_at" in line][-1]
    assert len(right_at) == 3 and sorted(right_at, reverse=True) == right_at
    assert lines[-1] > max(1.5, lines[0] + 0.4), lines
    right = [line["accuracy"][0] for line in read_metrics(trained) if "accuracy" in line]
    assert sum(right[-8:]) > 1.3 * sum(right[:8]) and sum(losses(trained)[-8:]) < sum(losses(trained)[:8])
    assert looked(place, head) == pytest.approx(lines[-1])  # what is on the disk is what was looked at
    shuffled = torch.randperm(len(head["d2t"]), generator=torch.Generator().manual_seed(0))
    ids_D = Map(head["d2t"], head["t2d"]).ids_D[shuffled]
    assert looked(place, {**head, "d2t": ids_D - torch.arange(len(ids_D))}) < 1.1  # the same head with wrong words
    assert (trained / "training.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_server_accepts_what_the_trainer_said(place: Path, trained: Path) -> None:
    """The same answers, with drafts of the head's file by the engine."""
    rows = [json.loads(line) for line in (trained / "held_out.jsonl").read_text().splitlines()]
    settings = {
        "model_path": str(place / "model"),
        "threads": 1,
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": str(checkpoints.found_in(trained)[-1]),
        "speculative_num_steps": 3,
        "disable_speculative_adaptive": True,
    }
    tokens = steps = 0
    with phloem.Engine(**settings) as engine:
        for row in rows:
            answer: Any = engine.generate(
                input_ids=row["input_ids"],
                sampling_params={"temperature": 0, "max_new_tokens": SETTINGS["eval_tokens"]},
            )
            assert answer["output_ids"] == row["output_ids"]
            steps += answer["meta_info"]["spec_verify_ct"] - 1
            tokens += len(row["output_ids"]) - 1  # the first one is the prompt's
    said = [line for line in read_metrics(trained) if "accept_length" in line][-1]
    assert said["tokens"] == tokens
    # The engine keeps what the head reads as bfloat16: one draft in a hundred may be another.
    assert tokens / steps == pytest.approx(said["accept_length"], rel=0.02), (tokens, steps, said)


@pytest.mark.slow
def test_a_checkpoint_has_the_published_layout(trained: Path) -> None:
    folder = checkpoints.found_in(trained)[-1]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["num_hidden_layers"] == 1
    assert (config["vocab_size"], config["draft_vocab_size"], config["hidden_size"]) == (384, 160, 32)
    wanted = {"eagle_aux_hidden_state_layer_ids": [1, 2, 2], "use_aux_hidden_state": True}
    assert config["eagle_config"] == wanted  # outputs of layers: inputs of 2, 3 and 3
    head = load_file(folder / "model.safetensors")
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layer += ["hidden_norm", "input_layernorm", "post_attention_layernorm"]
    names = {f"midlayer.{name}.weight" for name in layer} | {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert set(head) == names
    assert head["fc.weight"].shape == (32, 96) and head["lm_head.weight"].shape == (160, 32)
    assert head["midlayer.self_attn.q_proj.weight"].shape == (64, 64)
    assert head["d2t"].dtype == torch.int64 and head["t2d"].dtype == torch.bool
    assert torch.equal((head["d2t"] + torch.arange(160)), head["t2d"].nonzero().flatten())


@pytest.mark.slow
def test_a_training_that_goes_on_does_what_one_without_a_pause_does(place: Path, trained: Path) -> None:
    whole, given = losses(trained), options(place, "paused", max_num_steps=0)
    output = Path(given.output_dir)
    output.mkdir()
    for name in ("generated.jsonl", "held_out.jsonl"):
        shutil.copy(trained / name, output / name)
    seen = list[int]()

    class Stopping(Bars):
        """Ctrl-C comes while step 25 runs."""

        def begin(self, name: str) -> Any:
            def told(done: int, total: int, words: str = "") -> None:
                del total, words
                if name == "training":
                    seen.append(done)
                    if done == 25:
                        os.kill(os.getpid(), signal.SIGINT)

            return told

    with Stopping() as bars:
        assert train(given, bars) == 130
    assert seen == list(range(1, 26)) and [checkpoints.step_of(one) for one in checkpoints.found_in(output)] == [25]
    assert losses(output) == whole[:25]
    # Lines of steps behind the checkpoint, as a crash would leave them, are written again.
    with (output / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 26, "loss": 1.0}) + "\n" + '{"step": 27, "lo')
    with pytest.raises(ConfigError, match=r"has checkpoints: --resume goes on from epoch_\d_step_25"), Bars() as bars:
        train(given, bars)
    with pytest.raises(ConfigError, match=r"other settings: learning_rate was 0\.003"), Bars() as bars:
        train(options(place, "paused", learning_rate=1e-3, resume=True), bars)
    with Bars() as bars:
        assert train(options(place, "paused", resume=True), bars) == 0
    assert losses(output) == whole and len(whole) > 50  # to the bit
    before = (output / "metrics.jsonl").read_text()
    with Bars() as bars:
        assert train(options(place, "paused", resume=True), bars) == 0  # nothing is left to do
    assert (output / "metrics.jsonl").read_text() == before
    ended = [load_file(checkpoints.found_in(one)[-1] / "model.safetensors") for one in (trained, output)]
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_states_in_files_are_those_that_are_computed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(str(place / "model"), "cpu", 1)
    monkeypatch.setattr(states, "SHARD", 12_000)
    monkeypatch.setattr(states, "TOKENS", 20)
    samples = [Sample(tuple(range(5, 5 + n)), tuple(at % 2 == 1 for at in range(n))) for n in (9, 14, 11, 7, 16)]
    folder, told = place / "states", list[int]()
    size = target.states(samples[:1])[0].nbytes / 9 * 42
    library = Library(target, samples, folder, int(size), "float32")
    library.fill(lambda done, _: told.append(done))
    assert library.kept == 4 and told[-1] <= 4, "the last one is beyond the bytes"
    assert sum(one.stat().st_size for one in folder.glob("*.safetensors")) < size + 4000
    again = Library(target, samples, folder, int(size), "float32")
    again.fill(lambda done, _: None)
    assert again.kept == 4
    plain = Library(target, samples, None, 0, "float32")
    for number in range(5):
        (kept,), (computed,) = again.get([number]), plain.get([number])
        for name, value in vars(kept).items():
            assert torch.allclose(value.float(), vars(computed)[name].float(), atol=1e-5), name
        logits = target.model.head(computed.last_SN)
        assert torch.equal(computed.best_S, logits.argmax(-1))
        target.choose(torch.tensor([3, 300]))
        assert torch.allclose(target.says(computed.last_SN), logits[:, [3, 300]], atol=1e-4)
    other = Library(target, samples[:4], folder, 10**9, "bfloat16")
    with pytest.raises(ConfigError, match="states of other dtype, texts"):
        other.fill(lambda done, _: None)
    sorted(folder.glob("*.safetensors"))[0].unlink()
    again = Library(target, samples, folder, 10**9, "float32")
    again.fill(lambda done, _: None)
    assert again.kept == 5


def test_a_full_disk_is_told_and_leaves_nothing_half_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(str(place / "model"), "cpu", 1)
    library = Library(target, [Sample((5, 6, 7), (True,) * 3)], place / "full", 10**9, "float32")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(states, "save_file", full)
        with pytest.raises(NoSpace, match="No space left"):
            library.fill(lambda done, _: None)
    assert list((place / "full").iterdir()) == []
    usage = shutil.disk_usage(place)._replace(free=1 << 20)
    monkeypatch.setattr(states.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NoSpace, match="1 MB are free"):
        library.fill(lambda done, _: None)
    words = Map(torch.zeros(8, dtype=torch.int64), torch.zeros(384, dtype=torch.bool))
    sizes = head_config(target.checkpoint, 8, {})
    trainer = Trainer(options(place, "none"), target, library, 1, words, sizes)
    with pytest.raises(NoSpace, match="a checkpoint takes"):
        trainer.save(place / "full", {})
    assert not list((place / "full").glob("epoch_*"))
    with pytest.raises(ConfigError, match=r"hidden_states_dir: .*/asked.jsonl/states: Not a directory"):
        Library(target, [], place / "asked.jsonl" / "states", 10**9, "float32").fill(lambda done, _: None)


def test_a_training_killed_while_it_writes_leaves_the_checkpoint_before(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(str(place / "model"), "cpu", 1)
    words = Map(torch.zeros(8, dtype=torch.int64), torch.zeros(384, dtype=torch.bool))
    library = Library(target, [Sample((5, 6, 7), (True,) * 3)], None, 0, "float32")
    trainer = Trainer(options(place, "none"), target, library, 1, words, head_config(target.checkpoint, 8, {}))
    first = trainer.save(tmp_path, {})

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    trainer.step = 1
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoints.torch, "save", killed)
        trainer.save(tmp_path, {})
    assert checkpoints.found_in(tmp_path) == [first] and checkpoints.load_state(first)["step"] == 0
    assert [one.name for one in tmp_path.glob(".epoch_*")] == [".epoch_1_step_1.part"]
    trainer.step = 2
    assert trainer.save(tmp_path, {}) in checkpoints.found_in(tmp_path)
    assert not list(tmp_path.glob(".epoch_*"))


def test_ctrl_c_before_the_first_step_says_what_is_lost(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "write", interrupted)
    assert main(argv(options(place, "interrupted"))) == 130
    assert "what was under way is lost; whole files in" in capsys.readouterr().err


def test_errors_come_before_any_work(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = argv(options(place, "errors"))
    assert main([*given, "--resume"]) == 1
    assert "there is no checkpoint in" in capsys.readouterr().err
    sizes = place / "sizes.json"
    for text, told in (('{"hidden_size": 48}', "hidden_size is 48, and the model's is 32"), ("{", "cannot be read")):
        sizes.write_text(text)
        assert main([*given, "--draft-model-config", str(sizes)]) == 1
        assert told in capsys.readouterr().err
    (place / "a.yaml").write_text("training:\n  steps: 3\n")
    assert main([*given, "--config", str(place / "a.yaml")]) == 1
    assert "unknown setting 'steps'" in capsys.readouterr().err
    with contextlib.suppress(SystemExit):
        main(["train-draft", "--help"])
    assert "--ttt-length" in capsys.readouterr().out
