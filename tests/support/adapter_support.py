"""PEFT adapters for tiny checkpoints, made by PEFT itself, and what its models answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


def plain_adapter(base: Path, out: Path, seed: int = 1, rank: int = 4, strong: float = 0.3) -> Path:
    """A random adapter of all dense linear layers of a checkpoint, as PEFT saves one, without PEFT."""
    generator, made = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    with safe_open(base / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            module, _, what = name.rpartition(".")
            if what != "weight" or not module.endswith("_proj") or ".experts." in module or "kv_b" in module:
                continue
            outputs, inputs = file.get_slice(name).get_shape()
            for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = strong * torch.randn(shape, generator=generator)
                made[f"base_model.model.{module}.lora_{side}.weight"] = values
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in made})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    out.mkdir(parents=True)
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(made, out / "adapter_model.safetensors")
    return out
