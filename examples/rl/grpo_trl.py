"""GRPO by TRL's own trainer: its `rollout_func` plays two turns with a tool on a running server.

    python examples/rl/demo_folder.py MODEL
    phloem serve MODEL --dtype float32 --enable-deterministic-inference
    python examples/rl/grpo_trl.py --url http://127.0.0.1:30000 --model MODEL --steps 30 --log steps.jsonl

Needs `trl` (1.16) and `datasets`. MODEL is a folder with a chat template. In its first turn the model may ask for a
secret digit, by a question mark; the tool then answers with it. In its second turn the model is to say it. A program
gives half of the reward for asking and half for saying it. What the tool says is masked out of the loss
(`env_mask`).

Ids go in and out: the second turn goes on from the very ids of the first, which the server has in its cache. When the
trainer has made a step, its weights are copied into memory that the server, on the same machine, reads: only handles go
over HTTP, with the step as their version. For one answer to each prompt the trainer's own model computes what the
server said of its tokens: `logprob_diff` is how far they are apart.
"""

from __future__ import annotations

import base64
import json
import tempfile
import time
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import httpx
import torch
from datasets import Dataset
from grpo import arguments
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

TOKENS = 8  # of a turn
DIGITS = "3752"
TASK = "Which digit is the secret? Ask the tool, and then say it."
BRIEF = {"role": "system", "content": "You ask short questions."}


class Lent:
    """A copy of a model's weights in shared memory, made once and filled anew for each push."""

    def __init__(self, model: torch.nn.Module) -> None:
        # Handles that another process may open; the default ones are for a process's own children.
        torch.multiprocessing.set_sharing_strategy("file_system")
        self._copies = {name: tensor.detach().clone().share_memory_() for name, tensor in _weights(model).items()}
        self._handles = base64.b64encode(bytes(ForkingPickler.dumps(list(self._copies.items())))).decode()

    def push(self, http: httpx.Client, model: torch.nn.Module, version: str) -> None:
        for name, tensor in _weights(model).items():
            self._copies[name].copy_(tensor)
        body = {"serialized_named_tensors": [self._handles], "weight_version": version}
        http.post("/update_weights_from_tensor", json=body).raise_for_status()


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return found


@dataclass
class Rollouts:
    """TRL's `rollout_func`: gives the ids of two turns each, and what a reward function is to know of them."""

    http: httpx.Client
    tokenizer: PreTrainedTokenizerBase
    group: int  # answers to a prompt
    lent: Lent | None = None
    pushed: int = -1  # step whose weights the server has
    seen: list[dict[str, float]] = field(default_factory=list)  # of each call, what `__call__` says of it
    began: float = field(default_factory=time.monotonic)

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        step = trainer.state.global_step
        if step != self.pushed:
            model = trainer.accelerator.unwrap_model(trainer.model)
            self.lent = self.lent or Lent(model)
            self.lent.push(self.http, model, f"step-{step}")
            self.pushed = step
        started = [self._ids(prompt) for prompt in prompts]
        first = self._generate(started, seed=2 * step)
        heard, asked, digits = [], [], []
        for at, turn in enumerate(first):
            asks = "?" in self.tokenizer.decode(turn["output_ids"])
            digits.append(DIGITS[len(self._text(prompts[at])) % len(DIGITS)])
            told = f" Tool: the secret is {digits[-1]}. Answer:" if asks else " Tool: nobody asked. Answer:"
            heard.append(self.tokenizer.encode(told, add_special_tokens=False))
            asked.append(asks)
        longer = [start + one["output_ids"] + tool for start, one, tool in zip(started, first, heard, strict=True)]
        second = self._generate(longer, seed=2 * step + 1)
        turns = list(zip(first, heard, second, strict=True))
        parts = [(len(one["output_ids"]), len(tool), len(two["output_ids"])) for one, tool, two in turns]
        found: dict[str, list[Any]] = {
            "prompt_ids": started,
            "completion_ids": [one["output_ids"] + tool + two["output_ids"] for one, tool, two in turns],
            "logprobs": [_logprobs(one) + [0.0] * len(tool) + _logprobs(two) for one, tool, two in turns],
            "env_mask": [[1] * own + [0] * told + [1] * then for own, told, then in parts],
            "asked": asked,
            "said": [
                digit in self.tokenizer.decode(two["output_ids"]) for digit, two in zip(digits, second, strict=True)
            ],
        }
        self._note(found, [one["meta_info"] for one in second], trainer)
        return found

    def _note(self, found: dict[str, list[Any]], second: list[dict[str, Any]], trainer: GRPOTrainer) -> None:
        said = found["said"]
        versions = {one["weight_version"] for one in second}
        assert len(versions) == 1, versions
        apart = [self._apart(trainer, found, at) for at in range(0, len(said), self.group)]
        self.seen.append(
            {
                "version": float(versions.pop().removeprefix("step-")),
                "asked": sum(found["asked"]) / len(said),
                "said": sum(said) / len(said),
                "logprob_diff": sum(apart) / len(apart),
                "cached": sum(one["cached_tokens"] for one in second) / sum(one["prompt_tokens"] for one in second),
                "seconds": time.monotonic() - self.began,
            }
        )

    def _apart(self, trainer: GRPOTrainer, found: dict[str, list[Any]], at: int) -> float:
        """Mean |server - trainer| over the tokens of one answer that the model sampled."""
        prompt, output = found["prompt_ids"][at], found["completion_ids"][at]
        ids = torch.tensor([prompt + output])
        with torch.no_grad():
            logits = trainer.accelerator.unwrap_model(trainer.model)(ids).logits[0, len(prompt) - 1 : -1].float()
        own = logits.log_softmax(-1).gather(-1, torch.tensor(output)[:, None]).squeeze(-1)
        mask = torch.tensor(found["env_mask"][at]).bool()
        return (own - torch.tensor(found["logprobs"][at])).abs()[mask].mean().item()

    def _text(self, prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else prompt[-1]["content"]

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _generate(self, prompts: list[list[int]], seed: int) -> list[dict[str, Any]]:
        usual = {"temperature": 1.0, "max_new_tokens": TOKENS, "ignore_eos": True}
        params = [usual | {"sampling_seed": seed * len(prompts) + at} for at in range(len(prompts))]
        body = {"input_ids": prompts, "sampling_params": params, "return_logprob": True}
        answer = self.http.post("/generate", json=body)
        answer.raise_for_status()
        return answer.json()


def _logprobs(turn: dict[str, Any]) -> list[float]:
    return [value for value, *_ in turn["meta_info"]["output_token_logprobs"]]


def reward(prompts: list[Any], asked: list[bool], said: list[bool], **_: Any) -> list[float]:
    """Half for a question, and half for the secret, which the model knows from the tool alone."""
    return [0.5 * ask + 0.5 * (ask and say) for ask, say in zip(asked, said, strict=True)]


def train(url: str, path: str, steps: int, group: int = 8, rate: float = 1e-4, log: str = "") -> list[dict[str, float]]:
    """Train the checkpoint at `path`, which the server at `url` serves. Gives of each step its mean reward and what
    `Rollouts` has seen; `log`: a file that has a line of each as it is made."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template:
        rows: list[Any] = [[BRIEF, {"role": "user", "content": TASK + "!" * at}] for at in range(len(DIGITS))]
    else:
        rows = [TASK + "!" * at for at in range(len(DIGITS))]
    with tempfile.TemporaryDirectory() as folder, httpx.Client(base_url=url, timeout=600) as http:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, max_steps=steps, learning_rate=rate, num_generations=group,
            per_device_train_batch_size=group, max_completion_length=4 * TOKENS, temperature=1.0, beta=0.0,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        rollouts, lines, numbers = Rollouts(http, tokenizer, group), list[dict[str, float]](), count()

        def scored(**fields: Any) -> list[float]:
            values = reward(**fields)
            step = {"step": next(numbers), "reward": sum(values) / len(values)} | rollouts.seen[-1]
            lines.append({name: round(value, 8) for name, value in step.items()})
            if log:
                with Path(log).open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
            return values

        trainer = GRPOTrainer(
            path, scored, config, train_dataset=Dataset.from_dict({"prompt": rows}), processing_class=tokenizer,
            rollout_func=rollouts,
        )  # fmt: skip
        trainer.train()
        return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--log", default="", help="a file for a line of JSON for each step")
    options = parser.parse_args()
    for step in train(options.url, options.model, options.steps, options.group, options.rate, options.log):
        print(
            f"step {step['step']}: reward {step['reward']:.3f}, logprob diff {step['logprob_diff']:.2e}, weights "
            f"step-{step['version']:.0f}, {step['cached']:.0%} of the second turns cached"
        )


if __name__ == "__main__":
    main()
