"""PEFT adapters for tiny checkpoints, made by PEFT itself, and what its models answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(base: Path, out: Path, seed: int = 1, strong: float = 1.0, **config: Any) -> Path:
    """A random adapter of a checkpoint, saved by PEFT. `strong`: by which its B matrices are multiplied."""
    peft: Any = pytest.importorskip("peft", reason="PEFT writes the adapters")
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **config}
    made = peft.get_peft_model(model, peft.LoraConfig(**{"init_lora_weights": False, **settings}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.mul_(strong)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith(".bias") and settings.get("bias", "none") != "none":
                parameter.normal_(0.0, 0.3)
    made.save_pretrained(out)
    return out


def logprobs(base: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
    """[T, V] log-probabilities behind every token, by transformers with PEFT."""
    import peft
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        return model.eval()(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def ours(engine: Any, tokens: list[int], vocab: int, **fields: Any) -> torch.Tensor:
    """The same from an engine, [T - 1, V]: the last token's are not among a prompt's logprobs."""
    answer = engine.generate(
        input_ids=tokens,
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=vocab,
        **fields,
    )
    found = torch.zeros(len(tokens) - 1, vocab)
    for row, pairs in enumerate(answer["meta_info"]["input_top_logprobs"][1:]):
        for value, token, *_ in pairs:
            found[row, token] = value
    return found
