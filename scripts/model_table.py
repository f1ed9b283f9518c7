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
HEAD = """# Models

Written by `python scripts/model_table.py` from the files in `src/phloem/models/`; `config.json`'s `model_type` chooses
the file. Every family but the aliases is compared with its class in `transformers` on tiny random checkpoints in
float32, largest difference of logits 1e-4: a whole prompt, prefill in chunks, decode, a request on another one's pages,
a mixed batch; and each rank's share of a mesh with the slices of the whole (`tests/models`). "Cases" counts the tiny
checkpoints. GGUF: the architecture that is read from GGUF files; a converted file is compared with the same class.

What a step of a family asks for and the CPU's own kernels lack is done by torch, and such a step is not recorded: layer
norms, plain routers other than softmax, latent attention. The start says so.

Families marked "no text" do not generate: see [embeddings](embeddings.md). Hidden states and labels are compared with
`AutoModel`, `AutoModelForSequenceClassification` and `...ForTokenClassification`, texts of mixed lengths in a batch.
Every decoder whose layers keep keys and values serves for embeddings and labels too.

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
    return f"| `{name}` | {what} | {f'`{facts.gguf.architecture}`' if facts.gguf else ''} | {cases} |"


def page() -> str:
    return HEAD + "\n".join(row(name) for name in FAMILIES.names()) + "\n"


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
