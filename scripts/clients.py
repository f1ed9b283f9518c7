"""Tries clients and gateways of other makers against a Phloem server, unchanged, and writes the table of what works.

    python scripts/clients.py                                  # all; environments are kept in build/clients
    python scripts/clients.py --only openai,smg                # the others keep their last result
    python scripts/clients.py --url http://127.0.0.1:30000     # a server that runs already

Starts `phloem serve demo`, the embedded default model, makes an environment for each client, installs it from the
package index (never torch: what needs it is skipped and says so), and runs `scripts/client_checks.py` in it. What was
tried, with its version, goes to docs/compatibility.md; what was skipped stands there with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHECKS = Path(__file__).with_name("client_checks.py")
MODEL = "demo"
SECONDS = 200  # of one check
START_SECONDS = 180
MISSING = "No module named"  # what a client's own imports say


@dataclass(frozen=True)
class Client:
    """`packages` are installed with what they depend on, `bare` without; `launch`: a gateway's arguments; `shares`: it
    sees the packages of the environment that runs this script, torch among them."""

    name: str
    packages: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    launch: tuple[str, ...] = ()
    shares: bool = False

    @property
    def package(self) -> str:
        """The one whose version counts."""
        return re.split(r"[\[=]", (self.bare or self.packages)[0])[0]


CLIENTS = [
    Client("openai", ("openai",)),
    Client("anthropic", ("anthropic",)),
    Client("litellm", ("litellm",)),
    Client("langchain-openai", ("langchain-openai",)),
    Client("llama-index-llms-openai-like", ("llama-index-llms-openai-like",)),
    Client("instructor", ("instructor",)),
    Client("pydantic-ai", ("pydantic-ai-slim[openai]",)),
    Client("openai-agents", ("openai-agents",)),
    Client("lm-eval", ("lm-eval[api]",)),
    Client("guidellm", ("guidellm",)),
    Client(
        "sglang",
        (
            "numpy",
            "requests",
            "aiohttp",
            "tqdm",
            "pydantic",
            "transformers",
            "msgspec",
            "orjson",
            "pillow",
            "ipython",
            "pyzmq",
            "datasets",
            "psutil",
            "pybase64",
        ),
        bare=("sglang==0.5.23",),
        shares=True,
    ),
    Client("sglang-router", ("sglang-router==0.3.2",), launch=("-m", "sglang_router.launch_router")),
    Client("smg", ("smg==1.13.0",), launch=("-m", "smg", "launch")),
]
UNTRIED = {
    "trl": "its `VLLMClient` imports torch and vLLM; it asks for `return_token_ids` and `return_tokens_as_token_ids`, "
    "which are not here",
    "guidellm of today": "it needs torch, which is not installed for it: the version above is the newest without",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already; default: start one")
    parser.add_argument("--model", default=MODEL, help="its model's name")
    parser.add_argument("--tokenizer", help="for clients that bring none: a folder or hub id")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "clients", help="environments and results")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "compatibility.md")
    options = parser.parse_args()
    chosen = [name for name in options.only.split(",") if name]
    unknown = set(chosen) - {client.name for client in CLIENTS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(client.name for client in CLIENTS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    with contextlib.nullcontext(options.url) if options.url else serve() as url:
        for client in CLIENTS:
            if not chosen or client.name in chosen:
                results[client.name] = attempt(client, url, options)
                kept.write_text(json.dumps(results, indent=1))
    options.output.write_text(page(results))
    failed = sum(1 for result in results.values() for error in result["checks"].values() if error)
    print(f"{options.output}: {len(results)} clients, {failed} checks failed")
    return 0


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """A server of the default model on a free port."""
    command = [sys.executable, "-m", "phloem", "serve", "demo", "--served-model-name", MODEL, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max-total-tokens", "32768"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        found = next((m for line in process.stdout if (m := re.search(r"at (http://\S+)$", line.strip()))), None)
        if found is None:
            raise SystemExit("the server did not start: try `phloem serve demo`")
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def attempt(client: Client, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Install and ask: {"version", "skipped", "checks": check -> error or ""}."""
    print(f"{client.name}: ", end="", flush=True)
    home = options.work / client.name
    problem = install(client, home)
    if problem:
        print(f"skipped: {problem}")
        return {"version": "", "skipped": problem, "checks": {}}
    python = str(home / "bin" / "python")
    code = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    checks: dict[str, str] = {}
    with gateway(client, python, url, home) if client.launch else contextlib.nullcontext(url) as address:
        for name in known_checks(client.name):
            checks[name] = run_check(python, client.name, name, address, options)
            print("." if not checks[name] else "F", end="", flush=True)
    print(f" {version}", *(f"\n    {name}: {error}" for name, error in checks.items() if error))
    return {"version": version, "skipped": "", "checks": checks}


def known_checks(client: str) -> list[str]:
    sys.path.insert(0, str(CHECKS.parent))
    import client_checks

    return list(client_checks.CHECKS.get(client, {}))


def install(client: Client, home: Path) -> str:
    """Why it cannot be had; empty where it is there."""
    if (home / "ready").exists():
        return ""
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    (home / "no-torch.txt").write_text("torch<0\n")
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    orders = [[*pip, "-c", str(home / "no-torch.txt"), *client.packages]]
    if client.bare:
        orders.append([*pip, "--no-deps", *client.bare])
    for order in orders:
        done = subprocess.run(order, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            if "torch" in done.stderr and "conflict" in done.stderr.lower():
                return "it needs torch, which this script does not install"
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return shorten((lines or done.stderr.splitlines() or ["pip failed"])[-1])
    if client.shares:
        (site,) = home.glob("lib/python*/site-packages")
        (site / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (home / "ready").touch()
    return ""


@contextlib.contextmanager
def gateway(client: Client, python: str, url: str, home: Path) -> Iterator[str]:
    """The gateway in front of the server, once it knows that the server is healthy."""
    port, metrics = free_port(), free_port()
    command = [python, *client.launch, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", url]
    with (home / "gateway.log").open("w") as log:
        process = subprocess.Popen([*command, "--prometheus-port", str(metrics)], stdout=log, stderr=log)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/readiness", timeout=5):
                break
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_check(python: str, client: str, name: str, url: str, options: argparse.Namespace) -> str:
    """Its error; empty where it passed."""
    command = [python, str(CHECKS), client, name, url, options.model, options.tokenizer or "gpt2"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else shorten(lines[-1] if lines else f"exit status {done.returncode}")


def shorten(text: str) -> str:
    return re.sub(r"/\S*/", "", " ".join(text.split()))[:200].replace("|", "/")


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Clients and gateways that were tried",
        "",
        "Made by `python scripts/clients.py`, which anyone can run: it serves the embedded default model, installs",
        "each client unchanged into an environment of its own, and asks with it. The checks are in",
        "`scripts/client_checks.py`; only what ran stands here as working.",
        "",
        "| client | version | works | does not | not tried: the client misses a package |",
        "| --- | --- | --- | --- | --- |",
    ]
    tried = [client.name for client in CLIENTS if results.get(client.name, {}).get("checks")]
    for name in tried:
        checks = results[name]["checks"]
        works = "; ".join(check for check, error in checks.items() if not error) or "nothing"
        missing = {check for check, error in checks.items() if MISSING in error}
        fails = "; ".join(f"{check}: `{error}`" for check, error in checks.items() if error and check not in missing)
        left = "; ".join(f"{check}: `{checks[check]}`" for check in checks if check in missing)
        lines.append(f"| {name} | {results[name]['version']} | {works} | {fails} | {left} |")
    skipped = [(c.name, results[c.name]["skipped"]) for c in CLIENTS if results.get(c.name, {}).get("skipped")]
    lines += ["", "Not tried, and why:", "", *(f"- {name}: {why}" for name, why in [*skipped, *UNTRIED.items()])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
