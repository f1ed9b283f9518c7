"""Group-relative policy optimisation against a running server: roll out, reward, train, push the weights, again.

    phloem serve MODEL --dtype float32 --enable-deterministic-inference
    python examples/rl/grpo.py --url http://127.0.0.1:30000 --model MODEL --steps 30

Token ids go in and out, the log probabilities of the sampled tokens come from the server, and what the trainer computes
for them differs by the rounding of float32: `logprob_diff` says by how much at each step. Weights go as safetensors in
the body of one request, with the step as their version; every answer says which version made it.

The task is a toy, so that it runs on two cores in a minute: answers are to be made of the first half of the vocabulary.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM

TOKENS = 24  # of an answer
PIECE = 1 << 20  # bytes


@dataclass
class Step:
    reward: float  # mean over all answers
    logprob_diff: float  # mean |server - trainer| over all tokens
    version: str  # of the weights that made the answers


def roll_out(http: httpx.Client, prompts: list[list[int]], group: int, seed: int) -> list[dict[str, Any]]:
    """`group` answers to each prompt, prompt by prompt. The prompt is computed once for all of its answers."""
    params = {
        "temperature": 1.0,
        "n": group,
        "max_new_tokens": TOKENS,
        "ignore_eos": True,
        "sampling_seed": seed,
    }
    body = {"input_ids": prompts, "sampling_params": params, "return_logprob": True}
    answer = http.post("/generate", json=body)
    answer.raise_for_status()
    return answer.json()


def push(http: httpx.Client, model: torch.nn.Module, version: str) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    blob = save(tensors)
    # In pieces: httpx copies what is left of one large piece again and again.
    pieces = (blob[at : at + PIECE] for at in range(0, len(blob), PIECE))
    answer = http.post(
        "/update_weights_from_tensor",
        content=pieces,
        headers={"content-type": "application/octet-stream", "content-length": str(len(blob))},
        params={"weight_version": version},
    )
    answer.raise_for_status()


def logprobs_of(model: torch.nn.Module, prompts: list[list[int]], outputs: list[list[int]]) -> torch.Tensor:
    """[answers, TOKENS] of the trainer's own model; all prompts are equally long."""
    ids = torch.tensor([prompt + output for prompt, output in zip(prompts, outputs, strict=True)])
    start = len(prompts[0])
    logits = model(ids).logits[:, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)


def train(url: str, path: str, steps: int, group: int = 16, rate: float = 1e-2, seed: int = 1) -> list[Step]:
    """Train the checkpoint at `path`, which the server at `url` serves. Gives what each step saw."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(3, vocabulary, (4, 6)).tolist()
    found: list[Step] = []
    with httpx.Client(base_url=url, timeout=300) as http:
        push(http, model, "step-0")
        for step in range(steps):
            answers = roll_out(http, prompts, group, seed=step)
            outputs = [answer["output_ids"] for answer in answers]
            asked = [prompt for prompt in prompts for _ in range(group)]
            old = torch.tensor([[p for p, *_ in a["meta_info"]["output_token_logprobs"]] for a in answers])
            rewards = (torch.tensor(outputs) < vocabulary // 2).float().mean(1)
            grouped = rewards.view(-1, group)
            advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1)
            new = logprobs_of(model, asked, outputs)
            loss = -(advantages[:, None] * (new - old).exp()).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            versions = {answer["meta_info"]["weight_version"] for answer in answers}
            assert len(versions) == 1, versions
            diff = (new.detach() - old).abs().mean().item()
            found.append(Step(rewards.mean().item(), diff, versions.pop()))
            push(http, model, f"step-{step + 1}")
    return found


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every example of this folder asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--model", required=True, help="the folder that the server serves")
    parser.add_argument("--steps", type=int, default=30)
    return parser


def main() -> None:
    options = arguments(__doc__).parse_args()
    for number, step in enumerate(train(options.url, options.model, options.steps)):
        print(f"step {number}: reward {step.reward:.3f}, logprob diff {step.logprob_diff:.2e}, weights {step.version}")


if __name__ == "__main__":
    main()
