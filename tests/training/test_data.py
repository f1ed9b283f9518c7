"""Texts to learn from, and settings: what is taken, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phloem.checkpoint.describe import describe
from phloem.cli import main
from phloem.core.errors import ConfigError
from phloem.testing.checkpoints import tiny_checkpoint
from phloem.text.template import from_source, load_template
from phloem.text.tokenizer import load_tokenizer
from phloem.training.data import BadData, Reader, read_rows
from phloem.training.options import Options, from_file

TURNS = [
    {"role": "user", "content": "The fox?"},
    {"role": "assistant", "content": "It jumps."},
    {"role": "user", "content": "The dog?"},
    {"role": "assistant", "content": "It does not mind."},
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=6)


def reader(target: Path, **settings: Any) -> Reader:
    checkpoint = describe(str(target))
    tokenizer = load_tokenizer(checkpoint)
    values: dict[str, Any] = {"max_length": 200, "vocab_size": checkpoint.vocab_size, **settings}
    return Reader(tokenizer, load_template(checkpoint, None, tokenizer), **values)


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def learned(one: Reader, path: Path) -> list[str]:
    """What of each text is learned, runs apart."""
    texts = list[str]()
    for sample in one.samples(read_rows(path), str(path)):
        ids = [token if said else None for token, said in zip(sample.ids, sample.mask, strict=True)]
        runs: list[list[int]] = [[]]
        for token in ids:
            if token is None:
                runs.append([])
            else:
                runs[-1].append(token)
        texts.append("|".join(one.tokenizer.decode(run, skip_special_tokens=False) for run in runs if run))
    return texts


def test_the_mask_is_over_answers_and_their_ends(target: Path, tmp_path: Path) -> None:
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in TURNS]
    path = written(tmp_path / "a.jsonl", {"messages": TURNS}, {"id": "x", "conversations": sharegpt}, "")
    said = "It jumps.<|im_end|>\n|It does not mind.<|im_end|>\n"
    assert learned(reader(target), path) == [said, said]
    assert learned(reader(target, last_turn=True), path) == ["It does not mind.<|im_end|>\n"] * 2


def test_a_template_that_rewrites_earlier_turns_gives_those_no_mask(target: Path, tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}(thought)"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    one = reader(target)
    one.template = from_source(source)
    assert learned(one, written(tmp_path / "a.jsonl", {"messages": TURNS})) == [
        "(thought)It does not mind.<|im_end|>\n"
    ]


def test_plain_text_and_token_ids_are_taken_as_they_are(target: Path, tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", {"text": "The quick brown fox."}, {"input_ids": [5, 6], "output_ids": [7, 8, 9]}
    )
    one = reader(target)
    assert learned(one, path)[0] == "The quick brown fox."
    sample = one.samples(read_rows(path), "")[1]
    assert sample.ids == (5, 6, 7, 8, 9) and sample.mask == (False, False, True, True, True)
    rows = read_rows(path)
    assert [asked.ids for asked in one.prompts(rows, "")] == [one.tokenizer.encode("The quick brown fox.")[:32], [5, 6]]


def test_long_texts_are_cut_and_those_left_without_an_answer_are_counted(target: Path, tmp_path: Path) -> None:
    question = {"messages": [{"role": "user", "content": "word " * 60}, TURNS[1]]}
    path = written(tmp_path / "a.jsonl", question, {"messages": TURNS}, {"messages": TURNS[:1]}, {"text": "a"})
    one = reader(target, max_length=60)
    found = one.samples(read_rows(path), str(path))
    assert len(found) == 1 and len(found[0].ids) <= 60
    assert one.left_out == {"no words of the assistant within max_length": 2, "an answer too short": 1}
    empty = written(tmp_path / "b.jsonl", question)
    with pytest.raises(BadData, match="nothing to learn from: 1 rows with no words of the assistant within max_length"):
        reader(target, max_length=60).samples(read_rows(empty), "b.jsonl")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ({"prompt": "a"}, "line 2: expected messages, conversations or a text"),
        ({"text": ""}, "line 2: expected messages"),
        ({"messages": []}, "line 2: messages: expected a list"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, r"line 2: messages\[1\]: expected role and content"),
        ({"conversations": [{"from": 3, "value": "a"}]}, r"line 2: conversations\[0\]"),
        ({"input_ids": [1], "output_ids": [True]}, "line 2: input_ids and output_ids"),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, line: Any, told: str) -> None:
    with pytest.raises(BadData, match=told):
        read_rows(written(tmp_path / "a.jsonl", {"text": "fine"}, line))


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="No such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(BadData, match="not UTF-8"):
        read_rows(tmp_path / "a.jsonl")
    with pytest.raises(BadData, match="nothing in it"):
        read_rows(written(tmp_path / "b.jsonl", "", ""))


def test_a_template_that_refuses_a_row_is_told_with_its_line(target: Path, tmp_path: Path) -> None:
    one = reader(target)
    one.template = from_source("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadData, match=r"a.jsonl, line 1: roles must alternate"):
        one.samples(read_rows(written(tmp_path / "a.jsonl", {"messages": TURNS})), "a.jsonl")


@pytest.mark.parametrize("row", [{"input_ids": [1, 384], "output_ids": [2]}, {"input_ids": [1], "output_ids": [1e30]}])
def test_a_token_that_the_model_has_not_is_told_with_its_line(target: Path, tmp_path: Path, row: Any) -> None:
    given = {name: [int(one) for one in ids] for name, ids in row.items()}
    rows, one = read_rows(written(tmp_path / "a.jsonl", {"text": "fine"}, given)), reader(target)
    for asked in (one.samples, one.prompts):
        with pytest.raises(BadData, match=r"a.jsonl, line 2: token id \d+ is not in \[0, 384\)"):
            asked(rows, "a.jsonl")


def test_a_row_without_a_question_is_told_with_its_line(target: Path, tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path / "a.jsonl", {"messages": TURNS}, {"messages": TURNS[1:2]}))
    with pytest.raises(BadData, match=r"a.jsonl, line 2: there is no question in it"):
        reader(target).prompts(rows, "a.jsonl")


# settings


def test_yaml_with_sections_and_other_names_is_read(tmp_path: Path) -> None:
    found = from_file(
        {
            "model": {"target_model_path": "demo", "draft-vocab-size": 512},
            "training": {"lr": "3e-4", "num_epochs": 3, "total_steps": 40, "max_grad_norm": 1},
            "train_data_path": "a.jsonl",
            "runtime": {"threads": None},
        },
        tmp_path,
    )
    assert (found.target_model_path, found.draft_vocab_size, found.learning_rate) == ("demo", 512, 3e-4)
    assert (found.max_num_steps, found.max_grad_norm, found.train_data_path) == (40, 1.0, "a.jsonl")
    assert found.threads is None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"training": {"learning_rat": 1}}, "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ({"trainer": {}}, "unknown section 'trainer'"),
        ({"training": {"lr": 1e-4}, "learning_rate": 1e-4}, "given twice"),
        ({"batch_size": "two"}, "batch_size is 'two': expected int"),
        ({"resume": 1}, "resume is 1: expected bool"),
        ({"init": "zeros"}, "none of target, random"),
        ({"learning_rate": "fast"}, "learning_rate"),
    ],
)
def test_yaml_that_says_nothing_known_is_refused(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        from_file(values, tmp_path)


def test_yaml_of_other_letters_than_utf_8_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_bytes("lr: 1".encode("utf-16"))
    assert main(["train-draft", "demo", "--config", str(tmp_path / "a.yaml")]) == 1
    assert "a.yaml is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_model_path": ""}, "--target-model-path"),
        ({"ttt_length": 0}, "ttt_length is 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"hidden_states_bytes": "lots"}, "hidden_states_bytes"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"threads": 0}, "threads is 0"),
        ({"seed": 10**20}, "seed is 100000000000000000000"),
        ({"max_length": 10**12}, "max_length is 1000000000000: expected 1048576 or less"),
        ({"hidden_states_bytes": "-5"}, "hidden_states_bytes is -5"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], told: str) -> None:
    values: dict[str, Any] = {"target_model_path": "demo", "train_data_path": "a.jsonl", **settings}
    with pytest.raises(ConfigError, match=told):
        Options(**values).check()


def test_models_that_no_head_can_be_trained_for_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "a.jsonl", {"messages": TURNS})
    for family, told in (("llama", "4 or more"), ("bert", "does not generate")):
        model = tiny_checkpoint(family, tmp_path / family)
        assert (
            main(["train-draft", str(model), "--train-data-path", str(data), "--output-dir", str(tmp_path / "o")]) == 1
        )
        assert told in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
