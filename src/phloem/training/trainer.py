"""The training itself: steps over the texts, looks at held-out prompts, checkpoints.

The order of the texts follows from the seed and the epoch alone, so a step's number says all about it, and a training
that goes on from a checkpoint does, to the bit, what one without the pause does.
"""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from phloem.core.errors import ConfigError
from phloem.platforms._facts import mixed
from phloem.training import checkpoints
from phloem.training.accept import Accepted
from phloem.training.courses import course_of
from phloem.training.head import Packed
from phloem.training.loss import Lesson
from phloem.training.options import Options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phloem.training.checkpoints import Map
    from phloem.training.loss import Told
    from phloem.training.states import Library
    from phloem.training.target import States, Target

# What a training that goes on may have otherwise: nothing of this changes what a step does.
FREE = (
    *("output_dir", "hidden_states_dir", "hidden_states_bytes", "max_minutes", "eval_interval", "log_interval"),
    *("save_interval", "keep_checkpoints", "save_dtype", "resume", "threads", "num_draft_tokens", "target_model_path"),
    *("train_data_path", "eval_data_path", "capture_url", "capture_dir"),
)


@dataclass
class HeldOut:
    """A prompt with the model's greedy answer. `prompt`: tokens of the prompt."""

    states: States
    prompt: int


class Trainer:
    """One head or drafter, its optimiser, and where it stands (`step`: steps that are done)."""

    def __init__(
        self, options: Options, target: Target, library: Library, count: int, words: Map | None, sizes: Any
    ) -> None:
        """`count`: texts. `words`: an EAGLE-3 head's vocabulary. `sizes`: config.json of what is trained."""
        self.options, self.target, self.library = options, target, library
        self.device, self.config = target.device, sizes
        self.steps_per_epoch = -(-count // options.batch_size)
        whole = self.steps_per_epoch * options.num_epochs
        self.total = min(whole, options.max_num_steps) if options.max_num_steps else whole
        self._count = count
        self._orders: tuple[int, list[int]] = (-1, [])
        self._course = course_of(options, target, words, sizes)
        self.head, self.words = self._course.head, self._course.words
        learned = [one for one in self.head.parameters() if one.requires_grad]
        self.optimiser = torch.optim.AdamW(
            learned, lr=options.learning_rate, betas=(0.9, options.adam_beta2),
            weight_decay=options.weight_decay,
        )  # fmt: skip
        self.step, self.seconds, self.seen = 0, 0.0, 0
        self._type: torch.dtype = target.fast if options.dtype == "auto" else getattr(torch, options.dtype)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: it rises, then falls as a cosine."""
        options = self.options
        warm = max(1, round(options.warmup_ratio * self.total))
        if step < warm:
            return options.learning_rate * (step + 1) / warm
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, self.total - warm))))
        return options.learning_rate * (options.min_lr_ratio + (1 - options.min_lr_ratio) * fall)

    def numbers(self, step: int) -> list[int]:
        """Which texts a step sees."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._orders[0] != epoch:
            order = list(range(self._count))
            random.Random(self.options.seed * 1_000_003 + epoch).shuffle(order)
            self._orders = epoch, order
        return self._orders[1][at * self.options.batch_size : (at + 1) * self.options.batch_size]

    def lesson(self, states: Sequence[States]) -> Lesson:
        device = self.device
        joined = [
            torch.cat([vars(one)[name] for one in states]).to(device)
            for name in ("ids_S", "aux_SA", "mask_S", "last_SN", "best_S", "sum_S")
        ]
        packed = Packed(joined[0], joined[1].float(), tuple(len(one.ids_S) for one in states))
        return Lesson(packed, joined[2], joined[3].float(), joined[4], joined[5])

    def learn(self) -> tuple[Told, float]:
        """One step: (what it told, length of the gradient)."""
        options, began = self.options, monotonic()
        lesson = self.lesson(self.library.get(self.numbers(self.step)))
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step)
        with mixed(self.device, self._type):
            told = self._course.tell(lesson, self.step)
        self.optimiser.zero_grad(set_to_none=True)
        norm = 0.0
        if told.loss.requires_grad:
            told.loss.backward()
            norm = float(clip_grad_norm_(self.head.parameters(), options.max_grad_norm))
            if not math.isfinite(norm):
                raise ConfigError(f"step {self.step}: the gradient is {norm}: try a lower learning_rate")
            self.optimiser.step()
        self.step += 1
        self.seen += len(lesson.packed.ids_T)
        self.seconds += monotonic() - began
        return told, norm

    def look(self, held_out: Sequence[HeldOut]) -> Accepted:
        """Drafts for held-out answers."""
        found = Accepted()
        for one in held_out:
            packed = self.lesson([one.states]).packed
            with mixed(self.device, self._type):
                got = self._course.look(packed, one.prompt)
            found.steps, found.tokens = found.steps + got.steps, found.tokens + got.tokens
            found.drafts.update(got.drafts)
        return found

    # checkpoints

    @property
    def _d2t(self) -> Tensor:
        """Of what says all of the model's tokens: empty."""
        return torch.zeros(0, dtype=torch.int64) if self.words is None else self.words.d2t_D.cpu()

    def save(self, output: Path, options: dict[str, Any]) -> Path:
        """Raises NoSpace."""
        epoch = self.step // self.steps_per_epoch
        state = {
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "seen": self.seen,
            "options": options,
            "texts": self._count,
            "d2t": self._d2t,
        }
        name = f"epoch_{epoch}_step_{self.step}"
        save_dtype = self.options.save_dtype
        folder = checkpoints.save(output, name, self.head, self.config, self.words, save_dtype, state)
        checkpoints.keep_last(output, self.options.keep_checkpoints)
        return folder

    def resume(self, folder: Path, options: dict[str, Any]) -> None:
        """Stand where the checkpoint stands.

        Raises:
            ConfigError: it is of a training with other settings or other text.
            ModelLoadError: it cannot be read.
        """
        state = checkpoints.load_state(folder)
        before: dict[str, Any] = {**dataclasses.asdict(Options()), **state["options"]}
        differs = [name for name in options if name not in FREE and options[name] != before.get(name)]
        if differs:
            told = ", ".join(f"{name} was {before.get(name)!r}" for name in differs)
            raise ConfigError(f"{folder} is of a training with other settings: {told}", param="resume")
        if state["texts"] != self._count or not torch.equal(state["d2t"], self._d2t):
            raise ConfigError(f"{folder} is of a training on other text", param="resume")
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds, self.seen = state["step"], state["seconds"], state["seen"]
