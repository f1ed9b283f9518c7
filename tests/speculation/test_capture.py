"""What heads that draft are trained on: hidden states of the model, as its own layers give them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phloem.checkpoint.describe import describe
from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.models._common import Decoder
from phloem.speculation.capture import aux_layers, capture, open_target
from phloem.speculation.capturing import capturer
from phloem.testing.checkpoints import tiny_checkpoint

TEXTS = [[5, 9, 300, 7, 7, 21], [8], [5, 9, 11]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("target"), num_hidden_layers=6)


def loaded(path: Path) -> Decoder:
    model = load_model(describe(str(path)), BuildContext(Ops(), torch.float32, torch.device("cpu")))
    assert isinstance(model, Decoder)
    return model


def test_the_three_layers_are_those_of_the_paper() -> None:
    assert aux_layers(32) == (2, 16, 29) and aux_layers(6) == (2, 3, 3)
    with pytest.raises(ValueError, match="no three of them"):
        aux_layers(2)


def test_states_are_those_of_transformers(path: Path) -> None:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = capture(loaded(path), TEXTS)
    for text, states in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            want = theirs(torch.tensor([text]), output_hidden_states=True)
        # `hidden_states[i]` enters layer i; the last one is behind the norm.
        aux_TA = torch.cat([want.hidden_states[number][0] for number in aux_layers(6)], -1)
        assert torch.allclose(states.aux_TA, aux_TA, atol=2e-4)
        assert torch.allclose(states.last_TN, want.hidden_states[-1][0], atol=2e-4)


def test_the_model_is_left_as_it_was(path: Path) -> None:
    model = loaded(path)
    assert capture(model, TEXTS, layers=[0])[0].aux_TA.shape == (6, 32) and model.tap is None
    with pytest.raises(ValueError, match="not among 0 to 5"):
        capture(model, TEXTS, layers=[6])
    with pytest.raises(ValueError, match="empty text"):
        capture(model, [[1], []])


def test_a_model_opened_by_its_path_gives_them_too(path: Path) -> None:
    want = capture(loaded(path), TEXTS)
    found = capture(open_target(str(path), dtype="float32", threads=1), TEXTS)
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a.aux_TA, b.aux_TA, atol=0.1) and a.last_TN.shape == b.last_TN.shape
        assert a.aux_TA.requires_grad is False and not a.aux_TA.is_inference()


def test_layers_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recurrent or latent"):
        capture(loaded(tiny_checkpoint("mamba", tmp_path)), TEXTS, layers=[0])


def test_a_folder_for_states_without_capturing_is_refused() -> None:
    config = Config.from_flat({"model_path": "x", "spec_capture_dir": "somewhere"}).speculative
    with pytest.raises(ConfigError, match="spec_capture_dir: no states are captured"):
        capturer(config, None, 384, 128, "")
