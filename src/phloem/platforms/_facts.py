"""How steps run on a kind of machine, as one value: what differs from device to device outside of the op tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

import torch


def float8_of(architecture: str) -> torch.dtype:
    """The e4m3 that a GPU computes in, by its architecture's name (`gcnArchName` on AMD GPUs, "" elsewhere).

    MI300 (gfx940 to gfx942) has a kind of its own, without zeros of either sign and with 240 as its largest value;
    every other GPU, AMD's later ones among them (gfx950, gfx12), has the Open Compute Project's, which ends at 448.
    """
    return torch.float8_e4m3fnuz if architecture.startswith("gfx94") else torch.float8_e4m3fn


def own_float8() -> torch.dtype:
    """That of the current GPU; the common kind where there is none."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return float8_of("")
    return float8_of(torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """Facts that the engine's runner asks for. The defaults are those of a device beside the host.

    `on_host`: giving a step to the device computes it, and its values are in the host's memory then. Whoever waits for
    the step before it is answered just before, and recorded steps' inputs are written in place.
    `masks_ahead`: the host is idle while a step computes, so that a thread can fill the grammars' masks meanwhile.
    `patience`: how often a bucket of rows is wanted before it is recorded.
    `records_idle`: steps are recorded while nothing is asked for.
    `compiles`: steps are compiled whole, by the table's `compiler`, and nothing runs op by op.
    `exchanges`: packages that move rows between such devices, to the ranks of their experts.
    `meets`: by what ranks that have such a device each meet (`distributed.choose`); "": there are no such ranks.
    """

    on_host: bool = False
    masks_ahead: bool = True
    patience: int = 2
    records_idle: bool = False
    compiles: bool = False
    exchanges: tuple[str, ...] = ()
    meets: str = ""


def in_host_memory(device: torch.device) -> bool:
    """Whether tensors of this device lie in the process's own memory."""
    return device.type == "cpu"


def mixed(device: torch.device, kind: torch.dtype) -> torch.autocast:
    """A block whose products are of this type (torch's automatic mixed precision)."""
    return torch.autocast(device.type, kind, enabled=kind != torch.float32)
