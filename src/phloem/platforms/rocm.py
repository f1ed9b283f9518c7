"""AMD GPUs. torch names them "cuda" too; what differs from `cuda.py` is who is available, and what each can do."""

from __future__ import annotations

from typing import ClassVar

import torch

from phloem.platforms import cuda
from phloem.platforms._facts import StepFacts


def is_available() -> tuple[bool, str]:
    if torch.version.hip is None:
        return False, f"this torch ({torch.__version__}) is built without ROCm"
    if not torch.cuda.is_available():
        return False, "no AMD GPU with a working driver was found"
    props = torch.cuda.get_device_properties(torch.cuda.current_device())
    return True, f"{props.name}, {props.total_memory / 2**30:.0f} GiB, {props.gcnArchName}"


class Platform(cuda.Platform):
    name = "rocm"
    facts: ClassVar[StepFacts] = StepFacts(records_idle=True, meets="nccl")

    def target(self) -> tuple[str, int | str, int]:
        props = torch.cuda.get_device_properties(self.device)
        return "hip", str(props.gcnArchName).split(":")[0], int(props.warp_size)

    def attention_backends(self) -> list[str]:
        return ["triton", "reference"]

    def dtype(self, checkpoint: str | None) -> tuple[torch.dtype, str]:
        if checkpoint in ("float32", "float16"):
            return getattr(torch, checkpoint), "the checkpoint's own type"
        return torch.bfloat16, "AMD's matrix cores compute in it"
