"""The chat templates of a checkpoint as texts: where they may stand. `template.py` compiles them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from phloem.checkpoint.gguf_reader import GGUFFile
from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.checkpoint.describe import Checkpoint

TEKKEN = "tekken.json"
# A noncharacter behind the first character of what might be a control token in somebody's text: nothing reads it as one
# then, and the tokenizer takes the mark away again.
SPELLED = "\ufdd0"
_SYSTEM = 7  # the first version with a place of its own for instructions
# Mistral's plain instruct format: turns, and instructions in front or, before version 7, in the last turn.
_INSTRUCT = """{{- bos_token -}}
{%- if tools -%}
{{- raise_exception('the folder has no chat template: tools need one (--chat-template)') -}}
{%- endif -%}
{%- set found = namespace(said='', last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set found.last = loop.index0 -%}{%- endif -%}
{%- if message.role in ('system', 'developer') and not OWN -%}
{%- set found.said = found.said + message.contentPLAIN + '\\n\\n' -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role in ('system', 'developer') -%}
{%- if OWN -%}{{- '[SYSTEM_PROMPT]' + message.contentPLAIN + '[/SYSTEM_PROMPT]' -}}{%- endif -%}
{%- elif message.role == 'user' -%}
{{- '[INST]' + (found.said if loop.index0 == found.last else '') + message.contentPLAIN + '[/INST]' -}}
{%- elif message.role == 'assistant' -%}
{{- message.contentPLAIN + eos_token -}}
{%- else -%}
{{- raise_exception('role ' + message.role + ': the folder has no chat template that knows it (--chat-template)') -}}
{%- endif -%}
{%- endfor -%}"""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be absent ({} then)."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelLoadError(f"{path}: a JSON object is expected, not {type(found).__name__}")
    return found


def find_sources(checkpoint: Checkpoint) -> dict[str, str]:
    """The texts by name; "default" is the usual one. Raises `ModelLoadError` for a file that cannot be read."""
    path = checkpoint.tokenizer_path
    if path.suffix == ".gguf":
        same = checkpoint.gguf is not None and checkpoint.gguf.path == path
        file = checkpoint.gguf if same and checkpoint.gguf is not None else GGUFFile.open(path)
        return _gguf_sources(file.metadata)
    directory = path if path.is_dir() else path.parent
    found: dict[str, str] = {}
    for config in (read_json(directory / "chat_template.json"), read_json(directory / "tokenizer_config.json")):
        found = _named(config.get("chat_template")) | found
    files: list[tuple[str, Path]] = [("default", directory / "chat_template.jinja")]
    files += [(file.stem, file) for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))]
    for name, file in files:
        if file.is_file():
            found[name] = file.read_text(encoding="utf-8", errors="replace")
    if not found and checkpoint.gguf is not None:
        return _gguf_sources(checkpoint.gguf.metadata)
    if not found and (directory / TEKKEN).is_file() and not (directory / "tokenizer.json").is_file():
        return {"default": _instruct(read_json(directory / TEKKEN))}
    return found


def _instruct(tekken: dict[str, Any]) -> str:
    """The plain format of a `tekken.json`, in which control tokens that a message spells stay text."""
    own, listed = tekken_version(tekken.get("config")) >= _SYSTEM, tekken.get("special_tokens")
    texts = (
        [str(entry.get("token_str")) for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    )
    firsts = sorted({"[", "<", *(text[0] for text in texts if text)})
    plain = "".join(f".replace({json.dumps(one)}, {json.dumps(one + SPELLED)})" for one in firsts)
    return _INSTRUCT.replace("OWN", str(own).lower()).replace("PLAIN", plain)


def tekken_version(config: Any) -> int:
    """The number of `config.version` in a `tekken.json`: "v7", "v7m1"; 0: it has none."""
    match = re.match(r"v(\d+)", str(config.get("version"))) if isinstance(config, dict) else None
    return int(match[1]) if match else 0


def _named(value: Any) -> dict[str, str]:
    """`chat_template` of a tokenizer configuration: one text, or a list of {name, template}."""
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else []
    return {
        str(entry["name"]): entry["template"]
        for entry in entries
        if isinstance(entry, dict) and "name" in entry and isinstance(entry.get("template"), str)
    }


def _gguf_sources(metadata: dict[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    found = {"default": metadata[key]} if isinstance(metadata.get(key), str) else {}
    for name, value in metadata.items():
        if name.startswith(key + ".") and isinstance(value, str):
            found[name[len(key) + 1 :]] = value
    return found
