"""Towers that are transformers' own before language models of ours, against transformers alone, and over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import edited
from test_doors import door, image, user
from vision_support import picture, png

from phloem.core.errors import BadRequest, ModelLoadError, PhloemError
from phloem.llm import Engine
from phloem.testing.checkpoints import write_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
SQUARE = {"size": {"height": 16, "width": 16}}
# What is special: features of several layers; tiles with their numbers, windows; a picture in a frame.
KINDS: dict[str, dict[str, Any]] = {
    "vipllava": {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 6, "vision_feature_layer": [-1, -2, 1],
    },
    "aya_vision": {
        "text_config": {"model_type": "cohere2", "head_dim": 16, "sliding_window": 6, **TEXT}, "vision_config": SIGLIP,
        "image_token_index": 6,
    },
    "deepseek_vl": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": SIGLIP, "image_token_id": 6},
}  # fmt: skip
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vipllava": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 16}, "crop_size": SQUARE["size"]}),
    "aya_vision": ("GotOcr2ImageProcessorPil", {**SQUARE, "crop_to_patches": True, "max_patches": 4}),
    "deepseek_vl": ("DeepseekVLImageProcessorPil", SQUARE),
}
PICTURES = [picture(1, 24, 16), picture(2, 17, 40)]
TEXTS = {"no": [], "<image>one": [0], "a <image> in the middle, <image> at its end": [1, 0]}
SETTINGS: dict[str, Any] = {"ops": "reference", "dtype": "float32", "max_total_tokens": 4096, "threads": 1}


class Theirs:
    def __init__(self, name: str, path: Path) -> None:
        import transformers

        kind, settings = PROCESSORS[name]
        self.name = name
        self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor: Any = getattr(transformers, kind)(**settings)

    def __call__(self, ids: list[int], which: list[int], count: int) -> tuple[torch.Tensor, list[int]]:
        """Log probabilities of every row, and so many greedy tokens."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if which:
            images = [PICTURES[number] for number in which]
            inputs["pixel_values"] = self.processor(images=images, return_tensors="pt").pixel_values
        more = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            # Their class leaves out the factor of Cohere2's logits, which the language model's own class has.
            factor = 0.0625 if self.name == "aya_vision" else 1.0
            logits = (factor * self.model(**inputs).logits[0].float()).log_softmax(-1)
            return logits, self.model.generate(**inputs, **more)[0, len(ids) :].tolist()


def written(name: str, path: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **json.loads(json.dumps(KINDS[name])))
    model: Any = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.15)
    model.save_pretrained(path)
    write_tokenizer(path, TEXT["vocab_size"], takes=("image",))
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name][1]))
    return path


@pytest.fixture(scope="module", params=[*KINDS])
def made(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Theirs, Path]]:
    torch.set_num_threads(1)
    path = written(request.param, tmp_path_factory.mktemp(request.param))
    yield Theirs(request.param, path), path


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_size": 5, "page_size": 4}])
def test_logits_and_greedy_text_are_those_of_transformers(made: Any, settings: dict[str, Any]) -> None:
    theirs, path = made
    alone: list[list[int]] = []
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    with Engine(model_path=str(path), debug_invariants=True, **(SETTINGS | settings)) as engine:
        for text, which in TEXTS.items():
            found: Any = engine.generate(
                text,
                image_data=[png(PICTURES[number]) for number in which] or None,
                sampling_params=params,
                return_logprob=True,
                logprob_start_len=0,
                return_prompt_token_ids=True,
            )
            ids, told = found["meta_info"]["prompt_token_ids"], found["meta_info"]["input_token_logprobs"]
            logits, wanted = theirs(ids, which, 6)
            worst = max(abs(told[at + 1][0] - float(logits[at, one])) for at, one in enumerate(ids[1:]))
            assert worst < 1e-4, f"{text}: {worst}"
            assert found["output_ids"] == wanted
            alone.append(wanted)
        info = engine.get_server_info()
        assert info["internal_states"][0]["pictures_encoded"] == 2
        engine.flush_cache()
        shown = [[png(PICTURES[number]) for number in which] for which in TEXTS.values()]
        found = engine.generate([*TEXTS] * 2, image_data=shown * 2, sampling_params=params)
        assert [answer["output_ids"] for answer in found] == alone * 2  # texts and pictures in the same steps


@pytest.mark.slow
def test_pictures_come_over_http(made: Any) -> None:
    _, path = made

    async def run() -> None:
        async with door(path) as http:
            assert (await http.get("/model_info")).json()["has_image_understanding"] is True
            decisions = (await http.get("/server_info")).json()["decisions"]
            assert [one[1] for one in decisions if one[0] == "tower"] == ["transformers"]
            asked = {"messages": user(image(png(PICTURES[0])), "What?"), "temperature": 0, "max_tokens": 4}
            first = (await http.post("/v1/chat/completions", json=asked)).json()
            again = (await http.post("/v1/chat/completions", json=asked)).json()
            cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached == first["usage"]["prompt_tokens"] - 1
            texts = [one["choices"][0]["message"]["content"] for one in (first, again)]
            assert texts[0] == texts[1]
            bad = {"messages": user(image("data:image/png;base64,AAAA"), "What?"), "max_tokens": 4}
            found = await http.post("/v1/chat/completions", json=bad)
            assert found.status_code == 400 and found.json()["error"]["param"].startswith("messages[0].content[0]")
            film = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
            found = await http.post("/v1/chat/completions", json={"messages": user(film, "What?"), "max_tokens": 4})
            assert found.status_code == 400 and "takes no videos" in found.text

    asyncio.run(run())


@pytest.mark.slow
def test_a_tower_without_its_tensors_is_refused(tmp_path: Path) -> None:
    def towerless(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: values for name, values in stored.items() if "multi_modal_projector" not in name}

    path = edited(written("vipllava", tmp_path / "whole"), tmp_path / "part", towerless)
    write_tokenizer(path, TEXT["vocab_size"], takes=("image",))
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS["vipllava"][1]))
    with Engine(model_path=str(path), model_impl="phloem", **SETTINGS) as engine:
        told: Any = engine.generate("no picture", sampling_params={"max_new_tokens": 2})
        assert told["meta_info"]["completion_tokens"] >= 1
        with pytest.raises(BadRequest, match="not supported yet: image_data"):
            engine.generate("<image>", image_data=png(PICTURES[0]))
    with pytest.raises(ModelLoadError, match=r"the tower of vipllava: .* tensors are missing"):
        Engine(model_path=str(path), **SETTINGS)


@pytest.mark.slow
def test_another_tower_comes_from_disk_and_its_tensors_are_refused_by_name(made: Any, tmp_path: Path) -> None:
    theirs, path = made

    def trained(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: 1.5 * tensor if "language_model" not in name else tensor for name, tensor in stored.items()}

    other = edited(path, tmp_path / "trained", trained)
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (path / file).exists() and not (other / file).exists():
            (other / file).write_text((path / file).read_text())

    def told(engine: Engine) -> list[float]:
        found: Any = engine.generate(
            "<image>one", image_data=png(PICTURES[0]), sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True, logprob_start_len=0,
        )  # fmt: skip
        return [entry[0] for entry in found["meta_info"]["input_token_logprobs"][1:]]

    with Engine(model_path=str(path), **SETTINGS) as engine:
        before = told(engine)
        name = next(key for key in theirs.model.state_dict() if "vision" in key)
        for sent in (name, name.removeprefix("model.")):
            with pytest.raises(PhloemError, match=f"{sent}: the tower is run by transformers' code"):
                engine.update_weights_from_tensor([(sent, theirs.model.state_dict()[name])])
        assert told(engine) == before
        assert engine.update_weights_from_disk(str(other))[0]
        after = told(engine)
    with Engine(model_path=str(other), **SETTINGS) as engine:
        wanted = told(engine)
    assert after == pytest.approx(wanted, abs=1e-5) and after != pytest.approx(before, abs=1e-3)


@pytest.mark.slow
def test_without_its_tower_a_picture_is_refused_and_a_warning_tells_why(
    made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from phloem.checkpoint.describe import describe

    theirs, path = made
    with caplog.at_level("WARNING"):
        assert describe(str(path), model_impl="phloem").seen is None
    assert f"{theirs.name}: of a checkpoint with towers the language model alone is served" in caplog.text
