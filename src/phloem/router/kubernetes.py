"""Servers that are pods: found by their labels through Kubernetes' own API, as they come, get ready, and go.

Each selector is listed, then watched. A watch that ends, breaks or is silent begins with a list again, at least once a
minute: an event that was lost is made up for then. While the API cannot be asked, the servers that are known stay;
whether they are well the gateway sees for itself. https://kubernetes.io/docs/reference/using-api/api-concepts/
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from phloem.core.config import environment_of
from phloem.core.errors import BadRequest, ConfigError, NotFound
from phloem.router.pairs import DECODE, PREFILL, REGULAR
from phloem.router.settings import BOOTSTRAP_PORT
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from phloem.router.fleet import Fleet
    from phloem.router.settings import Settings

_log = log.get("router")

WATCH_SECONDS = 55  # that a watch lasts
SILENCE = 65.0  # and after which it has broken, if the API did not end it
TALK = 10.0  # to connect, and between two parts of a list
PAGE = 500  # pods of one answer
FIRST_WAIT, MOST_WAIT = 1.0, 30.0  # between tries, while the API cannot be asked
DENIED = "the account of this pod may not list pods: give it a Role with get, list and watch of pods"


class Trouble(Exception):
    """The API said no, or nothing of use."""


@dataclass(frozen=True)
class Access:
    """Where the API is. `account`: the folder with `token`, `ca.crt` and `namespace` of a service account."""

    url: str
    account: Path
    namespace: str

    @staticmethod
    def of(settings: Settings) -> Access:
        """Raises ConfigError: this is no pod, and nobody says where the API is."""
        host, port = environment_of("KUBERNETES_SERVICE_HOST"), environment_of("KUBERNETES_SERVICE_PORT") or "443"
        url = settings.kubernetes_api
        if url is None:
            if host is None:
                text = "service_discovery: this is no pod of Kubernetes; kubernetes_api says where its API is"
                raise ConfigError(text, param="service_discovery")
            url = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        account = Path(settings.kubernetes_account)
        namespace = settings.service_discovery_namespace
        if namespace is None:
            with contextlib.suppress(OSError):
                namespace = (account / "namespace").read_text().strip()
        if not namespace:
            text = f"service_discovery_namespace: none is said, nor in {account / 'namespace'}"
            raise ConfigError(text, param="service_discovery_namespace")
        return Access(url.rstrip("/"), account, namespace)

    def client(self) -> httpx.AsyncClient:
        """With the token as it is now: Kubernetes renews it. Raises ConfigError: the certificate is of no use."""
        token, authority = "", self.account / "ca.crt"
        with contextlib.suppress(OSError):
            token = (self.account / "token").read_text().strip()
        verify: ssl.SSLContext | bool = True
        if self.url.startswith("https:") and authority.exists():
            try:
                verify = ssl.create_default_context(cafile=str(authority))
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"kubernetes_account: {authority}: {error}", param="kubernetes_account") from None
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return httpx.AsyncClient(base_url=self.url, headers=headers, verify=verify, timeout=TALK, trust_env=False)


@dataclass(frozen=True)
class Found:
    """A pod that serves."""

    url: str
    role: str
    bootstrap_port: int
    name: str


class Discovery:
    """Adds to a fleet, and removes from it, what it found itself: other servers are none of its business."""

    def __init__(self, fleet: Fleet, settings: Settings, access: Access) -> None:
        self._fleet, self._settings, self._access = fleet, settings, access
        self._pods: dict[str, dict[str, Found]] = {}  # by selector, by uid
        self._added: dict[str, Found] = {}  # by address
        self.listed: dict[str, int] = {}  # how often each selector's pods were listed

    def selectors(self) -> list[tuple[str, str]]:
        """Label selectors as the API takes them, and of which part the pods are."""
        chosen = self._settings
        given = ((chosen.selector, REGULAR), (chosen.prefill_selector, PREFILL), (chosen.decode_selector, DECODE))
        return [(",".join(labels), role) for labels, role in given if labels]

    async def run(self) -> None:
        await asyncio.gather(*(self._follow(selector, role) for selector, role in self.selectors()))

    async def _follow(self, selector: str, role: str) -> None:
        wait = FIRST_WAIT
        while True:
            begun = self.listed.get(selector, 0)
            try:
                async with self._access.client() as client:
                    version = await self._list(client, selector, role)
                    await self._watch(client, selector, role, version)
            except (Trouble, httpx.HTTPError, ConfigError) as error:
                _log.warning("pods %s: %s; asked again", selector, error or type(error).__name__)
            except Exception:
                _log.exception("pods %s could not be followed; asked again", selector)
            wait = FIRST_WAIT if self.listed.get(selector, 0) > begun else min(2 * wait, MOST_WAIT)
            await asyncio.sleep(wait)

    async def _list(self, client: httpx.AsyncClient, selector: str, role: str) -> str:
        """All pods that there are; gives the version of the list."""
        found: dict[str, Found] = {}
        version, more = "", ""
        while True:
            asked: dict[str, Any] = {"labelSelector": selector, "limit": PAGE}
            answer = await client.get(self._path(), params=asked | ({"continue": more} if more else {}))
            if answer.status_code == 410:  # the list has grown too old to be gone on with
                found, more = {}, ""
                continue
            body = _body(answer.status_code, answer.content)
            for pod in _list_of(body.get("items")):
                self._take(found, pod, role)
            about = _dict_of(body.get("metadata"))
            version, more = str(about.get("resourceVersion") or ""), str(about.get("continue") or "")
            if not more:
                break
        self._pods[selector] = found
        self.listed[selector] = self.listed.get(selector, 0) + 1
        self._settle()
        return version

    async def _watch(self, client: httpx.AsyncClient, selector: str, role: str, version: str) -> None:
        """Until the API ends it, or says that it has to be listed anew."""
        asked = {"labelSelector": selector, "watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true"}
        asked["timeoutSeconds"] = str(WATCH_SECONDS)
        limits = httpx.Timeout(TALK, read=SILENCE)
        async with client.stream("GET", self._path(), params=asked, timeout=limits) as answer:
            if answer.status_code != 200:
                _body(answer.status_code, await answer.aread())
            try:
                async with asyncio.timeout(SILENCE):
                    async for event in _events(answer.aiter_lines()):
                        if not self._event(event, selector, role):
                            return
            except (TimeoutError, httpx.ReadTimeout):
                return

    def _event(self, event: dict[str, Any], selector: str, role: str) -> bool:
        """False: what comes behind it is of no use."""
        kind, pod = event.get("type"), _dict_of(event.get("object"))
        if kind == "ERROR":
            return False
        if kind == "DELETED":
            self._pods[selector].pop(_uid(pod), None)
        elif kind in ("ADDED", "MODIFIED"):
            self._pods[selector].pop(_uid(pod), None)
            self._take(self._pods[selector], pod, role)
        else:
            return True
        self._settle()
        return True

    def _take(self, found: dict[str, Found], pod: dict[str, Any], role: str) -> None:
        """Where it serves, and is not about to end."""
        about, status = _dict_of(pod.get("metadata")), _dict_of(pod.get("status"))
        ready = any(
            item.get("type") == "Ready" and item.get("status") == "True" for item in _list_of(status.get("conditions"))
        )
        address = status.get("podIP")
        if not ready or about.get("deletionTimestamp") or not isinstance(address, str) or not address:
            return
        url = f"http://{f'[{address}]' if ':' in address else address}:{self._settings.service_discovery_port}"
        said = str(_dict_of(about.get("annotations")).get(self._settings.bootstrap_port_annotation, ""))
        port = int(said) if said.isdecimal() and 0 < int(said) < 65536 else BOOTSTRAP_PORT
        found[_uid(pod)] = Found(url, role, port, str(about.get("name") or ""))

    def _settle(self) -> None:
        """The fleet as the pods are. A pod that two selectors find is what the first of them says."""
        wanted: dict[str, Found] = {}
        for pods in self._pods.values():
            for one in pods.values():
                wanted.setdefault(one.url, one)
        for url, one in list(self._added.items()):
            if wanted.get(url) != one:
                del self._added[url]
                _log.info("pod %s serves no more at %s", one.name, url)
                with contextlib.suppress(NotFound):
                    self._fleet.remove(url)
        for url, one in wanted.items():
            if url in self._added:
                continue
            try:
                worker = self._fleet.add(
                    url, labels={"pod": one.name}, role=one.role, bootstrap_port=one.bootstrap_port
                )
            except BadRequest as error:
                if error.code != "worker_exists":
                    _log.warning("pod %s: %s", one.name, error.message)
                continue  # somebody has added it by hand
            self._added[worker.url] = one

    def _path(self) -> str:
        return f"/api/v1/namespaces/{self._access.namespace}/pods"


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.strip():
            try:
                event: Any = json.loads(line)
            except ValueError:
                raise Trouble(f"an event is no JSON: {line[:100]!r}") from None
            if isinstance(event, dict):
                yield event


def _body(status: int, content: bytes) -> dict[str, Any]:
    """Raises Trouble."""
    try:
        found: Any = json.loads(content)
    except ValueError:
        found = None
    if status == 200 and isinstance(found, dict):
        return found
    said = f": {found['message']}" if isinstance(found, dict) and "message" in found else ""
    raise Trouble(f"the API answers {status}{said:.300}" + (f"; {DENIED}" if status in (401, 403) else ""))


def _dict_of(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list_of(value: Any) -> Iterable[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _uid(pod: dict[str, Any]) -> str:
    about = _dict_of(pod.get("metadata"))
    return str(about.get("uid") or about.get("name") or "")
