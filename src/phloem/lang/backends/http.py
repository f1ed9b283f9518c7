"""A Phloem or SGLang server over HTTP, and one that is started for the program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from phloem.core.errors import BadRequest, EngineDead, PhloemError, QueueFull, Unauthorized
from phloem.lang.backends._native import NativeBackend
from phloem.lang.chat import FORMATS, ChatFormat, by_model_name, derive

TIMEOUT = httpx.Timeout(3600.0, connect=10.0)
_KINDS: dict[int, type[PhloemError]] = {400: BadRequest, 401: Unauthorized, 404: BadRequest, 422: BadRequest}


class RuntimeEndpoint(NativeBackend):
    """A running server.

    Args:
        base_url: such as `http://127.0.0.1:30000`.
        api_key: sent as a bearer token.
        verify: a file of certificates, or False to check none.
        chat_template_name: one of `phloem.lang.chat.FORMATS`; None asks the server for its template.
        sharing: see `NativeBackend`.

    Raises:
        EngineDead: there is no server at that address, or it does not serve.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: str | bool | None = None,
        chat_template_name: str | None = None,
        sharing: bool = True,
    ) -> None:
        super().__init__(sharing)
        self.base_url = base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=TIMEOUT,
            verify=True if verify is None else verify,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )
        if chat_template_name is not None:
            if chat_template_name not in FORMATS:
                raise BadRequest(f"unknown chat_template_name {chat_template_name!r}; known: {', '.join(FORMATS)}")
            self._format = FORMATS[chat_template_name]
        self.model_info: dict[str, Any] = self._call("GET", "/get_model_info")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._lost(error) from None
        if response.status_code != 200:
            raise _error(response)
        return response.json() if response.content.strip()[:1] in (b"{", b"[") else response.text

    def _lost(self, error: httpx.HTTPError) -> EngineDead:
        return EngineDead(f"no answer from {self.base_url}: {type(error).__name__}: {error}")

    def post(self, body: dict[str, Any]) -> Any:
        return self._call("POST", "/generate", body)

    def post_stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream("POST", "/generate", json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    response.read()
                    raise _error(response)
                for line in response.iter_lines():
                    if line.startswith("data:") and line != "data: [DONE]":
                        answer = json.loads(line[5:])
                        if "error" in answer:
                            raise PhloemError(str(answer["error"].get("message", answer["error"])))
                        yield answer
        except httpx.HTTPError as error:
            raise self._lost(error) from None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        answer = self._call("POST", "/tokenize", {"prompt": text, "add_special_tokens": add_special_tokens})
        return answer["tokens"]

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        answer = self._call("POST", "/detokenize", {"tokens": ids, "skip_special_tokens": False})
        return answer["text"]

    def make_format(self) -> ChatFormat:
        def render(messages: list[dict[str, Any]], generate: bool) -> str:
            asked = {"messages": messages, "add_generation_prompt": generate, "add_special_tokens": False}
            return self._decode(self._call("POST", "/tokenize", asked)["tokens"])

        try:
            bos = self._decode(self.encode("", True))
            found = derive(render, bos)
        except (BadRequest, KeyError):  # a server without these routes
            found = None
        return found or by_model_name(str(self.model_info.get("model_path", "")))

    def flush_cache(self) -> bool:
        try:
            self._call("POST", "/flush_cache")
        except BadRequest:
            return False
        return True

    def get_server_info(self) -> dict[str, Any]:
        return self._call("GET", "/get_server_info")

    def get_model_name(self) -> str:
        return str(self.model_info.get("model_path", "unknown"))

    def shutdown(self) -> None:
        self._http.close()


def _error(response: httpx.Response) -> PhloemError:
    try:
        body = response.json()
        problem = body.get("error", body)
        message = problem.get("message", problem) if isinstance(problem, dict) else problem
    except ValueError:
        message = response.text[:500]
    kind = _KINDS.get(response.status_code, QueueFull if response.status_code in (429, 503) else PhloemError)
    return kind(f"HTTP {response.status_code}: {message}")


class Runtime(RuntimeEndpoint):
    """A server of its own process for the time of a program: `phloem serve` with these settings, on a free port."""

    def __init__(self, model_path: str = "demo", **settings: Any) -> None:
        command = [sys.executable, "-m", "phloem", "serve", model_path, "--port", "0", "--log-level", "warning"]
        for name, value in settings.items():
            flag = f"--{name.replace('_', '-')}"
            command += [flag] if value is True else [flag, str(value)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            super().__init__(self._wait(command))
        except BaseException:
            self._end()
            raise

    def _wait(self, command: list[str]) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = re.search(r"at (http://\S+)$", line.strip())
            if found:
                # Whatever else it prints is read, so that it never waits for a reader.
                threading.Thread(target=self._process.stdout.read, daemon=True).start()
                return found.group(1)
        raise EngineDead(f"the server did not start: {' '.join(command)} ended with status {self._process.wait()}")

    @property
    def url(self) -> str:
        return self.base_url

    @property
    def endpoint(self) -> RuntimeEndpoint:
        return self

    def shutdown(self) -> None:
        super().shutdown()
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


BACKEND = RuntimeEndpoint
