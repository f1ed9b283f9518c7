"""A base with an adapter worked into its weights, as a checkpoint of its own.

The tensors are the base's, file by file, in the base's types; what the adapter changes is computed in float32. A head
that is tied to the embedding is written out where the adapter changes but one of the two.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch

from phloem.adapters._peft import AdapterFile, Module, read, refuse, some, token_ids
from phloem.adapters._sites import bare
from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint

    Note = Callable[[str], None]

HEAD, EMBEDDING, INDEX = "lm_head", "embed_tokens", "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# What a training writes beside an adapter and the model needs with it.
_FROM_ADAPTER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
)  # fmt: skip


def merge(base: Checkpoint, adapter: Path, out: Path, note: Note) -> int:
    """Write the merged checkpoint to a new folder; how many tensors the adapter has changed.

    Args:
        note: called with a line for each file.

    Raises:
        BadRequest: the adapter is wrong, or of another base; nothing is left behind.
        ModelLoadError: the base is quantised, or no safetensors checkpoint, or the folder is there already.
    """
    if base.format != "safetensors" or base.config.get("quantization_config"):
        raise ModelLoadError(f"{base.path}: an adapter is merged into a safetensors checkpoint that is not quantised")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelLoadError(f"{out} is there already: the merged checkpoint needs a new folder")
    file = read(adapter)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        changed = _Merger(base, file, note).write(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return changed


class _Merger:
    def __init__(self, base: Checkpoint, file: AdapterFile, note: Note) -> None:
        self.base, self.file, self.note = base, file, note
        self.tied = bool(base.config.get("tie_word_embeddings"))
        self.parts = {path: _keys(path) for path in base.files}
        names = [key for keys in self.parts.values() for key in keys]
        by_bare = {bare(name.removesuffix(".weight")): name for name in names if name.endswith(".weight")}
        self.embedding = next((name for name in names if name.endswith(f"{EMBEDDING}.weight")), "")
        self.has_head = bare(HEAD) in by_bare
        self.changes: dict[str, Module] = {}  # tensor of the base -> what changes it
        self.head: Module | None = None  # of a tied head
        nowhere: list[str] = []
        for name, module in file.modules.items():
            target = by_bare.get(bare(name))
            if target is not None:
                self.changes[target] = module
            elif bare(name) == HEAD and self.tied and self.embedding:
                self.head = module
            else:
                nowhere.append(name)
        if nowhere:
            raise refuse(file.path, f"{len(nowhere)} modules are not in the base: {some(nowhere)}")
        # Tokens that were trained by themselves are a tied head's too.
        along = self.embedding in self.changes and only_tokens(self.changes[self.embedding])
        along = along or bool(file.config.get("ensure_weight_tying"))
        alone = self.tied and not self.has_head and self.embedding in self.changes and not along
        self.untie = self.head is not None or alone
        self.changed = 0

    def write(self, out: Path) -> int:
        from safetensors.torch import save_file

        for number, (path, keys) in enumerate(self.parts.items(), 1):
            tensors = self._merged(path, keys)
            save_file(tensors, str(out / path.name), metadata={"format": "pt"})
            self.note(f"{path.name}: {len(tensors)} tensors, {number} of {len(self.parts)} files")
        self._copy(out)
        return self.changed

    def _merged(self, path: Path, keys: list[str]) -> dict[str, Tensor]:
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for key in keys:
                found[key] = file.get_tensor(key)
        biases = {key: f"{key.removesuffix('.weight')}.bias" for key in keys if key in self.changes}
        if self.untie and self.embedding in found:
            own, head = found[self.embedding], self.head
            found[f"{HEAD}.weight"] = own.clone() if head is None else self._changed(f"{HEAD}.weight", own, head)
        for key, bias in biases.items():
            module = self.changes[key]
            found[key] = self._changed(key, found[key], module)
            if module.bias is not None or module.up_bias is not None:
                found[bias] = self._bias(bias, found, module)
        return found

    def _changed(self, key: str, weight: Tensor, module: Module) -> Tensor:
        self.changed += 1
        whole = weight.float()
        if module.whole is not None:
            whole = self._same(key, module.whole.float(), weight)
        if module.tokens is not None:
            ids = token_ids(self.file, key.removesuffix(".weight"), module.tokens, len(whole))
            whole = whole.index_copy(0, torch.tensor(ids), self._same(key, module.tokens.float(), whole[: len(ids)]))
        if module.embedding:
            whole = whole + self._same(key, (module.scale * module.embedding["B"] @ module.embedding["A"]).T, weight)
        if module.down is not None and module.up is not None:
            delta = module.scale * (module.up.float() @ module.down.float())
            flip = self.file.fan_in_fan_out
            whole = whole + self._same(key, delta.T if flip else delta, weight)
            if module.magnitude is not None:
                rows = whole.norm(dim=0 if flip else 1)
                factor = module.magnitude.float() / rows
                whole = whole * (factor if flip else factor[:, None])
        return whole.to(weight.dtype).contiguous()

    def _same(self, key: str, new: Tensor, old: Tensor) -> Tensor:
        if new.shape != old.shape:
            other = f" (it names {self.file.base!r} as its base)" if self.file.base else ""
            why = f"it is of another base{other}: {key} is {list(old.shape)}, the adapter's is {list(new.shape)}"
            raise refuse(self.file.path, why)
        return new

    def _bias(self, key: str, found: dict[str, Tensor], module: Module) -> Tensor:
        old = found.get(key)
        if old is None:
            raise refuse(self.file.path, f"{key} is not in the base, and its config has no place for it")
        new = old.float() if module.bias is None else self._same(key, module.bias.float(), old)
        if module.up_bias is not None:
            new = new + module.scale * module.up_bias.float()
        return new.to(old.dtype)

    def _copy(self, out: Path) -> None:
        """All but the weights; tokenizer and chat template are the adapter's where it has them."""
        for path in sorted(self.base.path.iterdir()):
            if path.is_file() and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, out / path.name)
        for name in _FROM_ADAPTER:
            if (self.file.path / name).is_file():
                shutil.copyfile(self.file.path / name, out / name)
        if not self.untie:
            return
        config: dict[str, Any] = json.loads((out / "config.json").read_text())
        config.get("text_config", config)["tie_word_embeddings"] = False
        config["tie_word_embeddings"] = False
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if (out / INDEX).is_file():
            index: dict[str, Any] = json.loads((out / INDEX).read_text())
            index["weight_map"][f"{HEAD}.weight"] = index["weight_map"][self.embedding]
            (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def only_tokens(module: Module) -> bool:
    return module.tokens is not None and module.whole is None and not module.embedding


def _keys(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: {error}") from None
