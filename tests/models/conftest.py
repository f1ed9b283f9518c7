"""Fixtures of the tests of models: one thread, and tiny checkpoints with transformers' answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import PROMPT, reference

from phloem.checkpoint.families import family
from phloem.testing.checkpoints import tiny_checkpoint


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints by family and what differs, each written and run through transformers once."""
    kept: dict[str, tuple[Path, torch.Tensor]] = {}

    def get(name: str, **overrides: Any) -> tuple[Path, torch.Tensor]:
        key = f"{name} {overrides}"
        if key not in kept:
            family_name, _, variant = name.partition("-")
            overrides = {**(family(family_name).variants[variant] if variant else {}), **overrides}
            path = tiny_checkpoint(family_name, tmp_path_factory.mktemp("tiny"), **overrides)
            kept[key] = path, reference(path, PROMPT)
        return kept[key]

    return get
