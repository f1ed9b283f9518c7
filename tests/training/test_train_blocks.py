"""Training of a drafter of blocks (DFlash): its forward pass and loss beside plain torch, and a whole training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dflash_support import MASK, block_states, dflash
from safetensors.torch import load_file, save_file

import phloem
from phloem.checkpoint.describe import describe
from phloem.cli._options import read_yaml
from phloem.core.errors import ConfigError
from phloem.speculation.drafters.dflash import read
from phloem.testing.checkpoints import CORPUS, tiny_checkpoint
from phloem.training import checkpoints
from phloem.training.accept import accepted_blocks
from phloem.training.block import BlockDrafter, anchors_of, labels_of, weighted
from phloem.training.head import Packed
from phloem.training.options import Options, from_file
from phloem.training.report import Bars, read_metrics
from phloem.training.run import train
from phloem.training.target import drafter_config, state_layers

SETTINGS: dict[str, Any] = {
    "method": "dflash",
    "block_size": 4,
    "draft_num_hidden_layers": 2,
    "num_anchors": 24,
    "loss_decay_gamma": 4.0,
    "generate": 40,
    "generate_tokens": 40,
    "generate_temperature": 0.0,
    "eval_prompts": 6,
    "eval_tokens": 40,
    "eval_interval": 60,
    "num_epochs": 18,
    "batch_size": 4,
    "learning_rate": 4e-3,
    "log_interval": 1,
    "threads": 1,
}


def loaded(folder: Path) -> BlockDrafter:
    """A drafter of plain weights, by the names that its file has."""
    drafter = BlockDrafter(json.loads((folder / "config.json").read_text()), 200)
    drafter.load_state_dict(load_file(folder / "model.safetensors"))
    return drafter


def packed(*lengths: int, states: int = 3) -> Packed:
    torch.manual_seed(sum(lengths))
    total = sum(lengths)
    return Packed(torch.randint(0, 384, (total,)), torch.randn(total, states * 32), lengths)


def test_its_forward_pass_is_the_reference(tmp_path: Path) -> None:
    """Several blocks of several texts at once are each block by itself."""
    drafter, batch = loaded(dflash(tmp_path)), packed(13, 1, 9)
    embed_VN = torch.randn(384, 32)
    anchors = torch.tensor([2, 5, 11, 15, 22])
    got = drafter(batch, anchors, 6, lambda ids: embed_VN[ids])
    for out, at in zip(got, anchors.tolist(), strict=True):
        start = 0 if at < 13 else 14
        block = embed_VN[[int(batch.ids_T[at]), *[MASK] * 5]]
        want = block_states(tmp_path, batch.aux_TA[start:at], block)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_anchors_and_what_they_learn() -> None:
    batch = packed(8, 5)
    mask_T = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    good = [2, 3, 6, 9, 10, 11]  # another token of the assistant's follows in the same text
    assert anchors_of(batch, mask_T, 99, 0).tolist() == good
    drawn = [anchors_of(batch, mask_T, 2, seed).tolist() for seed in range(20)]
    assert all(len(one) == 4 and set(one) <= set(good) and one == sorted(one) for one in drawn)
    assert len({tuple(one) for one in drawn}) > 3 and drawn[0] == anchors_of(batch, mask_T, 2, 0).tolist()
    labels, learned = labels_of(batch, mask_T, torch.tensor([3, 6, 11]), 4)
    assert learned.tolist() == [[True, False, True], [True, False, False], [True, False, False]]
    assert labels[learned].tolist() == batch.ids_T[[4, 6, 7, 12]].tolist()


def test_places_weigh_less_and_less() -> None:
    loss, place = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0])
    shares = torch.tensor([1.0, torch.e**-0.25, torch.e**-0.5])
    torch.testing.assert_close(weighted(loss, place, 4.0), (loss * shares).sum() / shares.sum())
    torch.testing.assert_close(weighted(loss, place, 0.0), loss.mean())


def test_accept_length_is_that_of_a_walk(tmp_path: Path) -> None:
    """Step by step, as a server would go through the answer, with fewer masks near its end."""
    drafter, batch = loaded(dflash(tmp_path)), packed(30)
    embed_VN, head_VN = torch.randn(384, 32), torch.randn(384, 32)
    model = (lambda ids: embed_VN[ids], lambda x: x @ head_VN.T)
    # An answer of which some drafts are right: what the drafter itself says there, and not all of that.
    for at in (6, 11, 14, 15, 20, 26):
        drafts = model[1](drafter(batch, torch.tensor([at]), 5, model[0])[0, 1:]).argmax(-1)
        batch.ids_T[at + 1 : at + 4] = drafts[: min(3, 29 - at)]
    prompt, limit = 4, 31
    known, steps, tokens = prompt + 1, 0, 0
    with torch.no_grad():
        while known < 30:
            width = min(5, limit - known)
            right = 0
            if width > 1:
                out = drafter(batch, torch.tensor([known - 1]), width, model[0])[0, 1:]
                for draft in model[1](out).argmax(-1).tolist():
                    if known + right >= 29 or draft != int(batch.ids_T[known + right]):
                        break
                    right += 1
            known, steps, tokens = known + right + 1, steps + 1, tokens + right + 1
    found = accepted_blocks(drafter, batch, (prompt, limit), model, 5)
    assert (found.steps, found.tokens) == (steps, tokens) and steps < tokens == 25


def test_layers_that_are_read() -> None:
    assert state_layers(36, 5) == [1, 9, 17, 25, 33]  # of the published drafter of Qwen3-8B
    assert state_layers(30, 1) == [15] and state_layers(6, 2) == [1, 3]


def test_settings_as_specforge_has_them(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model:\n  target_model_path: m\n  draft_model_config: d.json\n"
        "data:\n  train_data_path: t.jsonl\n  max_length: 512\n"
        "training:\n  strategy: dflash\n  num_epochs: 6\n  batch_size: 2\n  learning_rate: 6e-4\n"
        "  warmup_ratio: 0.04\n  max_grad_norm: 1\n  num_anchors: 256\n  loss_decay_gamma: 7\n"
    )
    found = from_file(read_yaml(tmp_path / "run.yaml"), tmp_path / "run.yaml")
    assert (found.method, found.num_anchors, found.loss_decay_gamma) == ("dflash", 256, 7.0)
    found.check()
    for bad, why in (
        ({"block_size": 1}, "block_size is 1: expected 2"),
        ({"mask_token_id": 400}, "mask_token_id 400 is none of 384"),
        ({"lora_rank": 2, "draft_model_path": "d"}, "lora_rank: not with method dflash"),
        ({"capture_url": "http://h", "capture_dir": "d"}, "capture_url: not with method dflash"),
    ):
        with pytest.raises(ConfigError, match=why):
            given = Options(**{**SETTINGS, "target_model_path": "m", "train_data_path": "t", **bad})
            given.check()
            drafter_config(describe(str(tiny_checkpoint("llama", tmp_path / "m", num_hidden_layers=6))), given, {})


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"num_hidden_layers": "x"}, "num_hidden_layers is 'x', expected a whole number from 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1"),
        ({"block_size": "x"}, "block_size is 'x', expected a whole number"),
        ({"dflash_config": 5}, "dflash_config is 5, expected an object"),
        ({"dflash_config": {"mask_token_id": "x"}}, "mask_token_id is 'x', expected a whole number"),
        ({"dflash_config": {"target_layer_ids": 2}}, "target_layer_ids is 2, expected a list"),
        ({"layer_types": ["full_attention"]}, "layer_types: 1 entries for 2 layers"),
        ({"layer_types": 5}, "layer_types is 5, expected a list"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "layers in windows are served"),
        ({"markov_rank": 4}, "markov_rank: drafters of DSpark's kind"),
    ],
)
def test_a_drafters_file_of_other_kinds_is_refused(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    """What would be left out, and trained as something else, too."""
    model = describe(str(tiny_checkpoint("llama", tmp_path / "m", num_hidden_layers=6)))
    options = Options(**{**SETTINGS, "target_model_path": "m", "train_data_path": "t"})
    with pytest.raises(ConfigError, match=why):
        drafter_config(model, options, given)
    usual = {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "markov_rank": None,
        "block_size": None,
    }
    assert drafter_config(model, options, usual)["layer_types"] == ["full_attention"] * options.draft_num_hidden_layers


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, questions to it, and a training on its answers."""
    folder = tmp_path_factory.mktemp("blocks")
    tiny_checkpoint("llama", folder / "model", num_hidden_layers=6)
    words = " ".join(CORPUS).split()
    asked = [" ".join(words[at : at + 3]) for at in range(46)]
    lines = [json.dumps({"messages": [{"role": "user", "content": one}]}) for one in asked]
    (folder / "asked.jsonl").write_text("\n".join(lines) + "\n")
    with Bars() as bars:
        assert train(options(folder, "trained"), bars) == 0
    return folder


def options(place: Path, output: str, **settings: Any) -> Options:
    paths = {"target_model_path": str(place / "model"), "train_data_path": str(place / "asked.jsonl")}
    return Options(**{**SETTINGS, **paths, "output_dir": str(place / output), **settings})


@pytest.mark.slow
def test_a_trained_drafter_gives_more_tokens_a_step(place: Path) -> None:
    lines = read_metrics(place / "trained")
    looks = [line["accept_length"] for line in lines if "accept_length" in line]
    assert looks[-1] > max(1.5, looks[0] + 0.4), looks
    accuracy = [line["accuracy"] for line in lines if "accuracy" in line]
    assert len(accuracy[-1]) == 3 and sum(one[0] for one in accuracy[-8:]) > 2 * sum(one[0] for one in accuracy[:8])
    survival = [line["accepted_at"] for line in lines if "accepted_at" in line][-1]
    assert len(survival) == 3 and sorted(survival, reverse=True) == survival


@pytest.mark.slow
def test_its_file_is_of_the_original_layout(place: Path) -> None:
    folder = checkpoints.found_in(place / "trained")[-1]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert config["block_size"] == 4 and config["dflash_config"]["target_layer_ids"] == [1, 2, 3]
    assert read(config, "d").layers == (2, 3, 4)
    names = set(load_file(folder / "model.safetensors"))
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.1.self_attn.k_norm.weight"} <= names
    assert not any("embed" in name or "lm_head" in name or "d2t" in name for name in names)


@pytest.mark.slow
def test_the_server_accepts_what_the_trainer_said(place: Path, tmp_path: Path) -> None:
    """The same answers, with drafts of its file by the engine; one whose layers are noise drafts next to nothing."""
    rows = [json.loads(line) for line in (place / "trained" / "held_out.jsonl").read_text().splitlines()]
    folder = checkpoints.found_in(place / "trained")[-1]
    weights = load_file(folder / "model.safetensors")
    noise = {name: torch.randn_like(one) if name.startswith("layers") else one for name, one in weights.items()}
    save_file(noise, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    said = [line for line in read_metrics(place / "trained") if "accept_length" in line][-1]
    found: list[float] = []
    for drafter in (folder, tmp_path):
        values = {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": str(drafter)}
        model = str(place / "model")
        with phloem.Engine(model_path=model, threads=1, disable_speculative_adaptive=True, **values) as engine:
            tokens = steps = 0
            for row in rows:
                sampling = {"temperature": 0, "max_new_tokens": SETTINGS["eval_tokens"]}
                answer: Any = engine.generate(input_ids=row["input_ids"], sampling_params=sampling)
                assert answer["output_ids"] == row["output_ids"]
                steps += answer["meta_info"]["spec_verify_ct"] - 1
                tokens += len(row["output_ids"]) - 1  # the first one is the prompt's
        assert said["tokens"] == tokens
        found.append(tokens / steps)
    # The engine keeps features as bfloat16: one draft in a hundred may be another.
    assert found[0] == pytest.approx(said["accept_length"], rel=0.02) and found[1] < 1.2, (found, said)


@pytest.mark.slow
def test_a_training_that_stops_goes_on_to_the_bit(place: Path) -> None:
    few = {"max_num_steps": 12, "eval_prompts": 6, "eval_interval": 100, "init": "random"}
    with Bars() as bars:
        train(options(place, "whole", **few), bars)
        train(options(place, "part", **few, save_interval=5, max_minutes=1e-9), bars)
        train(options(place, "part", **few, save_interval=5, resume=True), bars)
    ended = [load_file(checkpoints.found_in(place / one)[-1] / "model.safetensors") for one in ("whole", "part")]
    assert all(torch.equal(one, ended[1][name]) for name, one in ended[0].items())
