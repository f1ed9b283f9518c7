"""What is trained, and by which loss: an EAGLE-3 head, or a DFlash drafter. The trainer knows steps and files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phloem.training import block, checkpoints
from phloem.training.accept import accepted, accepted_blocks
from phloem.training.block import BlockDrafter, anchors_of, labels_of, losses_of, weighted
from phloem.training.flex import chosen
from phloem.training.head import Eagle3
from phloem.training.loss import Told, tell
from phloem.training.low_rank import add_low_rank

if TYPE_CHECKING:
    from torch import nn

    from phloem.training.accept import Accepted
    from phloem.training.checkpoints import Map
    from phloem.training.head import Packed
    from phloem.training.loss import Lesson
    from phloem.training.options import Options
    from phloem.training.target import Target

ROWS = 512  # places whose logits over the whole vocabulary are there at once


class Course(Protocol):
    """One way of training."""

    @property
    def head(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def words(self) -> Map | None:
        """Its vocabulary; None: the model's."""
        ...

    def tell(self, lesson: Lesson, step: int) -> Told:
        """The loss of a batch; `step`: of the training, from 0."""
        ...

    def look(self, packed: Packed, prompt: int) -> Accepted:
        """Drafts for one held-out answer, whose prompt has so many tokens."""
        ...


def course_of(options: Options, target: Target, words: Map | None, sizes: dict[str, Any]) -> Course:
    """`words`: an EAGLE-3 head's vocabulary. `sizes`: config.json of what is trained. Raises PhloemError."""
    torch.manual_seed(options.seed)
    longest = max(options.max_length, options.eval_tokens) * 2
    if words is None:
        return BlockCourse(options, target, BlockDrafter(sizes, longest + sizes["block_size"]).to(target.device))
    positions = longest + options.ttt_length + options.looked_drafts
    return HeadCourse(options, target, Eagle3(sizes, positions).to(target.device), words)


class HeadCourse:
    """An EAGLE-3 head."""

    def __init__(self, options: Options, target: Target, head: Eagle3, words: Map) -> None:
        self._options, self._target, self.head = options, target, head
        self.words = checkpoints.Map(words.d2t_D.to(target.device), words.t2d_V.to(target.device))
        head.attends = chosen(options.attention, target.device)
        rows_DN = target.choose(self.words.ids_D)
        if options.draft_model_path:
            checkpoints.begin_from(head, Path(options.draft_model_path))
        elif options.init == "target":
            begin_with(head, rows_DN, target.norm())
        if options.lora_rank:
            add_low_rank(head, options.lora_rank, options.lora_alpha)

    def tell(self, lesson: Lesson, step: int) -> Told:
        del step
        target, options, words = self._target, self._options, self.words
        vocabulary = words.ids_D, words.t2d_V
        return tell(
            self.head, lesson, target.embed, target.says, vocabulary, options.ttt_length, options.ttt_decay
        )  # fmt: skip

    def look(self, packed: Packed, prompt: int) -> Accepted:
        most = self._options.looked_drafts
        return accepted(self.head, packed, [prompt], self._target.embed, self.words.ids_D, most)


class BlockCourse:
    """A DFlash drafter: blocks that begin at places drawn anew in each step."""

    words: Map | None = None

    def __init__(self, options: Options, target: Target, drafter: BlockDrafter) -> None:
        self._options, self._target, self.head = options, target, drafter
        target.choose(torch.arange(target.model.vocab_size, device=target.device))
        if options.draft_model_path:
            checkpoints.begin_from(drafter, Path(options.draft_model_path))
        elif options.init == "target":
            block.begin_with(drafter, target.norm())

    def tell(self, lesson: Lesson, step: int) -> Told:
        options, packed, size = self._options, lesson.packed, self.head.size
        anchors_A = anchors_of(packed, lesson.mask_T, options.num_anchors, options.seed * 1_000_003 + step)
        if not len(anchors_A):
            return Told(torch.zeros((), device=anchors_A.device), [0.0] * (size - 1), [0.0] * (size - 1), [], 0)
        labels, learned = labels_of(packed, lesson.mask_T, anchors_A, size)
        out_ABN = self.head(packed, anchors_A, size, self._target.embed)
        loss_n, right_n = self._judged(out_ABN[:, 1:][learned], labels[learned])
        place_n = learned.nonzero()[:, 1] + 1
        total = weighted(loss_n, place_n.float(), options.loss_decay_gamma)
        count = torch.bincount(place_n, minlength=size)[1:].clamp(min=1)
        sums = (torch.bincount(place_n, one.detach().float(), minlength=size)[1:] for one in (loss_n, right_n))
        losses, accuracies = ((one / count).tolist() for one in sums)
        return Told(total, losses, accuracies, [], len(place_n))

    def _judged(self, hidden_nN: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """As `losses_of`, some rows at a time: logits over a whole vocabulary are computed again for the gradient."""

        def judge(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            return losses_of(self._target.says(rows), labels)

        if len(hidden_nN) <= ROWS:
            return judge(hidden_nN, labels_n)
        pairs = zip(hidden_nN.split(ROWS), labels_n.split(ROWS), strict=True)
        parts: list[Any] = [checkpoint(judge, *pair, use_reentrant=False) for pair in pairs]
        return torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])

    def look(self, packed: Packed, prompt: int) -> Accepted:
        options, target = self._options, self._target
        width, limit = min(self.head.size, 1 + options.looked_drafts), options.eval_tokens
        return accepted_blocks(self.head, packed, (prompt, prompt + limit), (target.embed, target.says), width)


def begin_with(head: Eagle3, rows_DN: Tensor, norm_N: Tensor | None) -> None:
    """The model's own head and last norm, and its highest auxiliary state as what the layer adds to."""
    size = head.sizes.hidden
    with torch.no_grad():
        head.lm_head.weight.copy_(rows_DN)
        if norm_N is not None:
            head.norm.weight.copy_(norm_N)
        head.fc.weight.mul_(0.1)
        head.fc.weight[:, 2 * size :] += torch.eye(size, device=rows_DN.device)
