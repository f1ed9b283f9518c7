"""How long an update of all weights from tensors of this process takes, beside a plain copy of as many bytes.

    python examples/rl/demo_folder.py MODEL
    python benchmarks/updates.py MODEL [--rounds 6]

MODEL is a folder of safetensors; it is served in bfloat16, and its tensors are sent in that type. The first round of
either touches memory for the first time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import load_file

import phloem
from phloem.bench._report import context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of safetensors")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(options.model.glob("*.safetensors")):
        tensors |= {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    if not tensors:
        parser.error(f"{options.model} has no safetensors files")
    size = sum(tensor.nbytes for tensor in tensors.values())
    source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    copies: list[float] = []
    updates: list[float] = []
    with phloem.Engine(model_path=str(options.model), dtype="bfloat16", log_level="warning") as engine:
        for _ in range(options.rounds):
            begun = perf_counter()
            target.copy_(source)
            copies.append(perf_counter() - begun)
            begun = perf_counter()
            engine.update_weights_from_tensor(list(tensors.items()))
            updates.append(perf_counter() - begun)
    print(f"{len(tensors)} tensors, {size / 1e6:.0f} MB, best of {options.rounds}:")
    print(f"  a copy    {min(copies):.3f} s, {size / min(copies) / 1e9:.1f} GB/s")
    print(f"  an update {min(updates):.3f} s, {min(updates) / min(copies):.1f} times a copy")
    print(json.dumps({**context(), "tensors": len(tensors), "bytes": size, "copies_s": copies, "updates_s": updates}))


if __name__ == "__main__":
    main()
