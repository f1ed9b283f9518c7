"""A head for a model that sees: states of conversations with pictures, and a whole training through the public door."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vision_support import picture, png, seeing_checkpoint

import phloem
from phloem.cli import main
from phloem.core.errors import ConfigError
from phloem.speculation.capture import capture, open_target
from phloem.testing.checkpoints import CORPUS
from phloem.text.template import load_template
from phloem.text.tokenizer import load_tokenizer
from phloem.training import checkpoints
from phloem.training.data import BadData, Reader, read_rows
from phloem.training.report import read_metrics
from phloem.training.seeing import Eyes, reader_of
from phloem.training.target import described, head_config

LAYERS = 6
FAMILIES = ["qwen2_5_vl", "llava", "qwen3_vl"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose pictures are placed in turns, one where they are not, and one that adds to deeper layers too."""
    return seeing_checkpoint(request.param, tmp_path_factory.mktemp(request.param), num_hidden_layers=LAYERS)


def uri(seed: int, width: int = 24, height: int = 16) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture(seed, width, height))).decode()


def conversation(seed: int = 1) -> list[dict[str, Any]]:
    """Two turns, a picture in each."""
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri(seed)}}, text("the dog")]},
        {"role": "assistant", "content": "a page table"},
        {"role": "user", "content": [text("and this: "), {"type": "image", "image": uri(seed + 1, 16, 32)}]},
        {"role": "assistant", "content": "Paris is sugar"},
    ]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def reader(model: Path, folder: Path, length: int = 400) -> Reader:
    checkpoint = described(str(model))
    tokenizer = load_tokenizer(checkpoint)
    template = load_template(checkpoint, None, tokenizer)
    sees = reader_of(str(model))
    assert sees is not None
    return Reader(tokenizer, template, length, checkpoint.vocab_size, eyes=Eyes(sees, template, [folder]))


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.slow
def test_the_mask_is_over_the_answers_and_pictures_have_as_many_tokens_as_they_take(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png(picture(1, 24, 16)))
    by_path = conversation()
    by_path[0]["content"][0] = {"type": "image", "image": "a.png"}
    rows = read_rows(written(tmp_path / "rows.jsonl", {"messages": conversation()}, {"conversations": by_path}))
    one = reader(model, tmp_path)
    sample, again = one.samples(rows, "rows.jsonl")
    assert sample.ids == again.ids and sample.mask == again.mask
    assert [item.digest for item in sample.media] == [item.digest for item in again.media]
    said = [token for token, its in zip(sample.ids, sample.mask, strict=True) if its]
    words = one.tokenizer.decode(said)
    assert "a page table" in words and "Paris is sugar" in words and "dog" not in words and "this" not in words
    assert len(sample.media) == 2
    for item in sample.media:
        for start, count in item.spans:
            assert set(sample.ids[start : start + count]) == {item.token}
            assert not any(sample.mask[start : start + count])
    placeholders = sum(token == sample.media[0].token for token in sample.ids)
    assert placeholders == sum(item.count for item in sample.media)
    # What the engine makes of the same conversation.
    with phloem.Engine(model_path=str(model), max_total_tokens=800, max_running_requests=2) as engine:
        asked = conversation()[:3]
        answer: Any = engine.generate(
            input_ids=engine.encode_chat(asked), image_data=engine.pictures_of(asked),
            sampling_params={"max_new_tokens": 1}, return_prompt_token_ids=True,
        )  # fmt: skip
    prompt = answer["meta_info"]["prompt_token_ids"]
    assert list(sample.ids[: len(prompt)]) == prompt


@pytest.mark.slow
def test_states_are_those_of_the_engine(model: Path, tmp_path: Path) -> None:
    """The logits that follow from captured states give the log probabilities that a running engine gives; a text
    without pictures beside them is none the worse."""
    rows = read_rows(written(tmp_path / "rows.jsonl", {"messages": conversation()}, {"text": "the dog a page table"}))
    pictured, plain = reader(model, tmp_path).samples(rows, "rows.jsonl")
    target = open_target(str(model), device="cpu", dtype="float32", threads=1)
    both = capture(target, [pictured.ids, plain.ids], media=[pictured.media, ()])
    (alone,) = capture(target, [plain.ids])
    torch.testing.assert_close(both[1].last_TN, alone.last_TN, atol=1e-4, rtol=1e-4)
    logits = target.head(both[0].last_TN.to(torch.float32)).log_softmax(-1)
    got = logits[:-1].gather(1, torch.tensor(pictured.ids[1:])[:, None]).squeeze(1)
    asked = conversation()
    settings: dict[str, Any] = {"max_total_tokens": 800, "max_running_requests": 2, "dtype": "float32"}
    with phloem.Engine(model_path=str(model), ops="reference", **settings) as engine:
        shown, whole = asked[:3], list(pictured.ids)
        prompt: Any = engine.generate(
            input_ids=engine.encode_chat(shown), image_data=engine.pictures_of(shown),
            sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0,
            return_prompt_token_ids=True,
        )  # fmt: skip
    told = [one[0] for one in prompt["meta_info"]["input_token_logprobs"]]
    ids = prompt["meta_info"]["prompt_token_ids"]
    assert whole[: len(ids)] == ids
    compared = [at for at in range(1, len(ids)) if ids[at] != pictured.media[0].token]
    assert len(compared) > 20
    for at in compared:
        assert told[at] == pytest.approx(float(got[at - 1]), abs=1e-3), at


@pytest.mark.slow
def test_a_head_is_trained_on_answers_to_pictures_and_serves(model: Path, tmp_path: Path) -> None:
    """`phloem train-draft`: the model answers, states are taken, the head learns; then the engine drafts with it, and
    says what it says without."""
    words = " ".join(CORPUS).split()
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": uri(at % 4)}, text(words[at])]}]}
        for at in range(18)
    ]
    rows += [{"messages": [{"role": "user", "content": words[at]}]} for at in range(6)]
    path, output = written(tmp_path / "asked.jsonl", *rows), tmp_path / "head"
    flags = {
        "train-data-path": path, "output-dir": output, "generate": 24, "generate-tokens": 24, "eval-prompts": 4,
        "eval-tokens": 24, "ttt-length": 2, "num-epochs": 6, "batch-size": 4, "learning-rate": "3e-3",
        "draft-vocab-size": 160, "log-interval": 1, "threads": 1, "generate-temperature": 0, "eval-interval": 100,
        "hidden-states-dir": tmp_path / "states", "hidden-states-dtype": "float32",
    }  # fmt: skip
    argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    assert main(["train-draft", str(model), *argv]) == 0
    lengths = [line["accept_length"] for line in read_metrics(output) if "accept_length" in line]
    assert lengths[-1] > lengths[0] + 0.3, lengths
    lines = [json.loads(line) for line in (output / "generated.jsonl").read_text().splitlines()]
    assert sum("messages" in line for line in lines) > 10 and all(line["output_ids"] for line in lines)
    head = checkpoints.found_in(output)[-1]
    asked = rows[2]["messages"]
    params = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    settings: dict[str, Any] = {"max_total_tokens": 800, "max_running_requests": 2, "chunked_prefill_size": 16}
    drafts = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(head)}
    found: list[Any] = []
    for values in ({}, {**drafts, "disable_speculative_adaptive": True, "speculative_num_steps": 3}):
        with phloem.Engine(model_path=str(model), **settings, **values) as engine:
            for _ in range(2):  # the second time from the prefix tree
                found.append(
                    engine.generate(
                        input_ids=engine.encode_chat(asked), image_data=engine.pictures_of(asked),
                        sampling_params=params,
                    )
                )  # fmt: skip
    assert len({tuple(one["output_ids"]) for one in found}) == 1
    assert all(one["meta_info"]["spec_num_proposed_drafts"] > 10 for one in found[2:])


def test_a_head_s_positions_are_those_of_the_tokens(model: Path) -> None:
    config = head_config(described(str(model)), 64, {})
    assert not any("mrope" in json.dumps(config.get(name)) for name in ("rope_parameters", "rope_scaling"))
    assert config["rope_theta"] == 10000.0 and config["num_hidden_layers"] == 1


def test_pictures_that_cannot_be_had_are_told_with_their_line(model: Path, tmp_path: Path) -> None:
    one = reader(model, tmp_path)
    broken = conversation()
    broken[0]["content"][0]["image_url"]["url"] = "nowhere.png"
    rows = read_rows(written(tmp_path / "rows.jsonl", {"messages": conversation()}, {"messages": broken}))
    with pytest.raises(BadData, match="line 2"):
        one.samples(rows, "rows.jsonl")
    short = reader(model, tmp_path, length=12)
    with pytest.raises(BadData, match="1 rows with no words of the assistant within max_length"):
        short.samples(rows[:1], "rows.jsonl")
    one.eyes = None
    with pytest.raises(BadData, match="the model takes none"):
        one.samples(rows[:1], "rows.jsonl")


@pytest.mark.slow
def test_pictures_that_see_themselves_both_ways_are_refused(tmp_path: Path) -> None:
    model = seeing_checkpoint("gemma3", tmp_path / "gemma3", num_hidden_layers=LAYERS)
    rows = read_rows(written(tmp_path / "rows.jsonl", {"messages": conversation()}))
    (sample,) = reader(model, tmp_path).samples(rows, "rows.jsonl")
    target = open_target(str(model), device="cpu", threads=1)
    with pytest.raises(ConfigError, match="both ways"):
        capture(target, [sample.ids], media=[sample.media])
