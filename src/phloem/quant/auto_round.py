"""AutoRound checkpoints: one of the layouts of GPTQ, AWQ or compressed-tensors, as `packing_format` says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.quant import Method, Report, awq, compressed_tensors, gptq

if TYPE_CHECKING:
    from collections.abc import Mapping

QUANT_METHODS = ("auto-round", "intel/auto-round")
_READERS = {
    "gptq": gptq.configure,
    "auto_gptq": gptq.configure,
    "auto_awq": awq.configure,
    "awq": awq.configure,
    "llm_compressor": compressed_tensors.configure,
}


def configure(config: Mapping[str, Any], report: Report) -> Method:
    packing = str(config.get("packing_format") or "auto_round:auto_gptq")
    reader = _READERS.get(packing.partition(":")[2] or packing)
    if reader is None:
        known = ", ".join(f"auto_round:{name}" for name in _READERS)
        raise ModelLoadError(f"AutoRound packing_format {packing!r} is not read; known: {known}")
    return reader({**config, "version": "gemm", "checkpoint_format": "gptq"}, report)


METHOD = Method("auto_round", configure=configure)
