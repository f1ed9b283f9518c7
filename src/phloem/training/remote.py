"""States by a server that runs: it captures them between its steps, and both see the folder that they go through."""

from __future__ import annotations

import http.client
import json
import secrets
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from safetensors.torch import load_file

from phloem.core.errors import ConfigError, PhloemError
from phloem.speculation.capture import Captured

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS = 600.0
TOKENS = 4096  # of one request
ANSWER_BYTES = 64 << 20


class Remote:
    """A server that was started with --enable-spec-capture. `folder`: its --spec-capture-dir, as it is seen here."""

    def __init__(self, url: str, folder: Path, layers: tuple[int, ...], hidden_size: int) -> None:
        """Raises ConfigError for an address or a folder that is none."""
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a bracket that does not close, a port that is no number
            known = False
        if not known or any(char.isspace() for char in url):
            raise ConfigError(f"capture_url: {url!r}: expected http://HOST:PORT or https://", param="capture_url")
        if not folder.is_dir():
            raise ConfigError(f"capture_dir: {folder} is no folder here", param="capture_dir")
        self._url, self._folder, self._layers, self._hidden_size = url.rstrip("/"), folder, layers, hidden_size
        self._store, self._count = f"train-{secrets.token_hex(6)}", 0

    def capture(self, texts: Sequence[Sequence[int]]) -> list[Captured]:
        """States of whole texts.

        Raises:
            PhloemError: the server cannot be reached, refuses, or serves another model.
        """
        found: list[Captured] = []
        some: list[list[int]] = []
        for text in texts:
            if some and sum(map(len, some)) + len(text) > TOKENS:
                found += self._of(some)
                some = []
            some.append(list(text))
        return [*found, *(self._of(some) if some else [])]

    def _of(self, texts: list[list[int]]) -> list[Captured]:
        names = [f"{self._count + at:08d}" for at in range(len(texts))]
        self._count += len(texts)
        body = {
            "input_ids": texts,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            # Of its own, so that no prompt of a training stands among those that are served.
            "extra_key": [f"{self._store}-{name}" for name in names],
            "spec_capture": [{"store_id": self._store, "sample_id": name, "gen": 0} for name in names],
        }
        answers = self._post(body)
        found: list[Captured] = []
        for text, name, answer in zip(texts, names, answers, strict=True):
            told = answer.get("meta_info", {}).get("spec_capture") or {}
            if tuple(told.get("layers") or ()) != self._layers:
                raise PhloemError(f"{self._url} captures layers {told.get('layers')}, not {list(self._layers)}")
            path = self._folder / self._store / f"{name}.safetensors"
            try:
                tensors = load_file(path)
                states = Captured(tensors["aux"].squeeze(0), tensors["last_hidden"].squeeze(0))
                path.unlink()
            except Exception as error:
                raise PhloemError(f"{path} cannot be read: {error}; is capture_dir the server's folder?") from None
            sizes = (len(text), len(self._layers) * self._hidden_size), (len(text), self._hidden_size)
            if (tuple(states.aux_TA.shape), tuple(states.last_TN.shape)) != sizes:
                raise PhloemError(f"{self._url} serves another model: its states are {tuple(states.aux_TA.shape)}")
            found.append(states)
        return found

    def _post(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/generate", data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                answer: Any = json.loads(reply.read(ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            raise PhloemError(f"capture_url: {self._url} answers {error.code}: {said}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise PhloemError(f"capture_url: {self._url} cannot be asked: {error}") from None
        answers = cast("list[Any]", answer if isinstance(answer, list) else [answer])
        if len(answers) != len(body["input_ids"]) or not all(isinstance(one, dict) for one in answers):
            raise PhloemError(f"capture_url: {self._url} answers otherwise than /generate of Phloem does")
        return cast("list[dict[str, Any]]", answers)
