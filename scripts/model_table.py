"""Write docs/models.md: every family that has a file, what its file says, and what it is compared with.

python scripts/model_table.py            # write the page
python scripts/model_table.py --check    # exit with 1 if the page is not what would be written
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

from phloem.checkpoint.families import FAMILIES, family

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
FORMATS = """
## Weight formats

What `config.json` (`quantization_config`, `compression_config`), `hf_quant_config.json`, `quantize_config.json` or
`quant_config.json` may name, and what the CPU's kernels make of it. Kept: rows stay packed, as the GGUF type named;
the rest is unpacked to the model's type while it is loaded, and `--quantization int8` or `int4` packs it anew. The
start counts both, with the reason (decision `weights`). GPUs keep float8 and integers
([which](gpu.md#narrow-weights)); the reference ops unpack all. Activations stay in 16 bits (but for the native kernels'
own bytes beside integers, and a GPU's float8 beside float8), so scales of activations are not used. What the file holds
decides: plain matrices beside quantised ones, and several formats in one file, are served.

Every row is compared bit for bit with values packed by an independent packer, whole and by tensor-parallel shares;
compressed-tensors with its own library, bitsandbytes with its own where it is installed; logits and greedy tokens with
the dequantised model (`tests/models/test_stored_formats.py`, `tests/models/test_quantised_served.py`).

| `quant_method` | what is read | kept on CPU | refused |
| --- | --- | --- | --- |
| `fp8`, `fbgemm_fp8` | e4m3, e5m2; one scale, per output, per block | no | |
| `compressed-tensors` | pack-quantized, 2 to 4 bits | `Q4_0`, with zero points `Q4_1` | sparse-24, transforms |
| | pack-quantized, 5 to 8 bits | `Q8_0`, without zero points | |
| | int-quantized | `Q8_0`, without zero points | |
| | float-quantized, mxfp8, nvfp4-pack-quantized | no | |
| | mxfp4-pack-quantized | `Q5_0`, exactly | |
| `awq` | gemm, 4 bits | `Q4_1` | gemv, marlin |
| `gptq` | v1, v2, 2 to 8 bits, act-order | as pack-quantized; act-order: no | marlin |
| `auto-round`, `intel/auto-round` | packed as GPTQ, AWQ, compressed-tensors | as those | |
| `bitsandbytes` | nf4, fp4, nested scales | no | |
| | int8 (`SCB`) | `Q8_0` | orders other than by row |
| `mxfp4` | gpt-oss's stacked experts | no | |
| `modelopt`, `modelopt_fp4`, `modelopt_mixed` | FP8, FP8 by channel or block, NVFP4, mixed | no | AWQ kinds, INT8 |
| `hqq`, `torchao`, `quark`, `w4afp8`, `aqlm`, `eetq`, `quanto` | | | all, with a remedy |

Made while a 16-bit checkpoint is loaded (`--quantization`): `int4` (`Q4_1`), `int8` (`Q8_0`), `mxfp4` (`Q5_0`), `fp8`
(values of e4m3 with a scale per output, in the model's type). Written by
`phloem quantize MODEL OUT --to int4|int8|fp8`: int4 with zero points, int8 and FP8 with a scale per output,
all in compressed-tensors' layout.

What each costs is told by `phloem bench accuracy` (perplexity of the language reference that ships with Python): see
[benchmarks](benchmarks.md#quality-accuracy).
"""
HEAD = """# Models

Written by `python scripts/model_table.py` from the files in `src/phloem/models/`; `config.json`'s `model_type` chooses
the file. Every family but the aliases is compared with its class in `transformers` on tiny random checkpoints in
float32, largest difference of logits 1e-4: a whole prompt, prefill in chunks, decode, a request on another one's pages,
a mixed batch; and each rank's share of a mesh with the slices of the whole (`tests/models`). "Cases" counts the tiny
checkpoints. GGUF: the architecture that is read from GGUF files; a converted file is compared with the same class.

Through the whole engine greedy tokens are those of `transformers`, 64 behind a text longer than chunks and windows:
alone, on a prefix hit, in a batch of three; and four rows in a pool that is too small for all their keys, so that
some lose their pages and begin again, have the tokens that each has alone (Mistral's windows and states such as
Mamba's fit in it). The suite does so for some families, `pytest --every tests/models/test_families_served.py` for
each and for their variants too. On 2026-11-30, with `transformers` 5.23, all 92 families that generate passed both,
without the variants.

What a step of a family asks for and the CPU's own kernels lack is done by torch, and such a step is not recorded:
activations of plain MLPs but GELU, and prompts of latent attention. Latent attention is native for rows of up to 64 new
tokens, over a cache in bfloat16, which is what such a model gets unless a type is named; longer rows are products of
matrices by torch ([why](benchmarks.md#prompts-of-latent-attention-on-a-cpu)). The start says so.

Families marked "no text" do not generate: see [embeddings](embeddings.md). Hidden states and labels are compared with
`AutoModel`, `AutoModelForSequenceClassification` and `...ForTokenClassification`, texts of mixed lengths in a batch.
Every decoder whose layers keep keys and values serves for embeddings and labels too.

Families marked "diffusion" write block after block ([diffusion models](diffusion-llm.md)). `transformers` has none of
them but DiffusionGemma: logits and answers are compared with dense references of the tests' own
(`tests/support/dense_denoisers.py`).

Folders in Mistral's own format (`params.json` and `consolidated*.safetensors`, no config.json) are read as `mistral`,
`ministral3` or `mistral4` (Large 3), plain or with FP8 matrices; their towers are left out. Where `tekken.json` is the
only tokenizer it is read as it is; without a chat template turns are written in the plain instruct format (`[INST]`,
and `[SYSTEM_PROMPT]` from version 7 on), which has no tools.

GGUF files of GLM-4.7-Flash say `deepseek2`, those of Bamba `granitehybrid`. Value heads of Qwen3.5 lie in another order
there, which one rank reads and several do not. q, k and v in one tensor (`--fuse-qkv`) and gate and up in one are read
for every family; of `qwen2vl`, `qwen3vl` and `qwen3vlmoe` the language model serves, for texts alone. Where the
converter fills a table of layers' inputs up with zeros (Gemma 3n) tokens read the row that the model has for them.
Rerankers are served where the file has the whole head: RoBERTa's and XLM-R's. No architecture exists for Helium,
VaultGemma, LongCat-Flash, OPT, MPNet, DeBERTa, GTE or SDAR; LLaDA 2's is not read, nor Nomic's with experts.

Models without a row here are run by transformers' own code over our pages, where that can be done: see
[the fallback](fallback.md).

| `model_type` | | GGUF | cases |
| --- | --- | --- | --- |
"""


def about(name: str) -> str:
    """The first sentence of a family's file."""
    source = (ROOT / "src" / "phloem" / "models" / f"{name}.py").read_text()
    text = ast.get_docstring(ast.parse(source)) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def row(name: str) -> str:
    facts = family(name)
    cases = "alias" if facts.tiny is None else str(1 + len(facts.variants))
    what = about(name) if facts.encoder is None else f"{about(name)}; no text"
    what = f"{what}; diffusion" if facts.diffusion is not None else what
    gguf = family(facts.gguf_family).gguf if facts.gguf_family else facts.gguf
    arch = "" if gguf is None else f"`{gguf.written_as or gguf.architecture}`"
    return f"| `{name}` | {what} | {arch} | {cases} |"


def page() -> str:
    return HEAD + "\n".join(row(name) for name in FAMILIES.names()) + "\n" + FORMATS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1: the page is out of date")
    if parser.parse_args(argv).check:
        fresh = PAGE.exists() and PAGE.read_text() == page()
        print("up to date" if fresh else "docs/models.md is out of date: python scripts/model_table.py")
        return 0 if fresh else 1
    PAGE.write_text(page())
    print(f"{len(FAMILIES.names())} families")
    return 0


if __name__ == "__main__":
    sys.exit(main())
