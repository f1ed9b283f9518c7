"""Many servers behind one address: phloem router --worker-urls http://a:30000 http://b:30000."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, get_type_hints

from phloem.core.config import environment_of
from phloem.router.serve import run
from phloem.router.settings import Settings
from phloem.router.tokens import Tokens

_SECTIONS = {
    "address": "Address and bodies",
    "workers": "Workers",
    "pairs": "Prefill and decode servers",
    "pods": "Pods of Kubernetes",
    "policy": "Choice of a worker",
    "retries": "Retries and circuit breaker",
    "limits": "Limits and keys",
}
_REPEATED = ("prefill", "decode")  # options that may come several times, each with parts of its own


def main(argv: list[str]) -> int:
    settings = parse(argv)
    return run(settings, None if settings.model_path is None else Tokens(settings.model_path))


def parse(argv: list[str]) -> Settings:
    """Raises ConfigError for a value, and SystemExit for a flag, that is wrong."""
    parser = argparse.ArgumentParser(prog="phloem router", description=__doc__, allow_abbrev=False)
    groups = {name: parser.add_argument_group(title) for name, title in _SECTIONS.items()}
    hints = get_type_hints(Settings)
    for spec in dataclasses.fields(Settings):
        flags = [f"--{name.replace('_', '-')}" for name in (spec.name, *spec.metadata["also"])]
        groups[spec.metadata["group"]].add_argument(*flags, dest=spec.name, **_how(hints[spec.name], spec))
    values: dict[str, Any] = vars(parser.parse_args(argv))
    given: dict[str, Any] = {name: _frozen(value) for name, value in values.items()}
    return Settings(**_with_keys(given)).checked()


def _with_keys(given: dict[str, Any]) -> dict[str, Any]:
    """Keys that only the environment says, so that they need not stand on a command line."""
    ours, theirs = environment_of("PHLOEM_API_KEY"), environment_of("PHLOEM_WORKER_API_KEY")
    if ours and not given["api_key"]:
        given["api_key"] = (ours,)
    if theirs and given["worker_api_key"] is None:
        given["worker_api_key"] = theirs
    return given


def _how(kind: Any, spec: dataclasses.Field[Any]) -> dict[str, Any]:
    """An option's keywords. Texts of help may hold percent signs."""
    shown = "" if spec.default in (None, (), "") else f" [{_shown(spec.default)}]"
    found: dict[str, Any] = {"default": spec.default, "help": (spec.metadata["help"] + shown).replace("%", "%%")}
    if kind is bool:
        return {**found, "action": argparse.BooleanOptionalAction if spec.default else "store_true"}
    if spec.name in _REPEATED:
        return {**found, "default": [], "nargs": "+", "action": "append", "metavar": "TEXT"}
    if kind == tuple[str, ...]:
        return {**found, "nargs": "+", "metavar": "TEXT"}
    if kind in (int, float):
        return {**found, "type": kind, "metavar": "N" if kind is int else "X"}
    return {**found, "metavar": "TEXT"}


def _frozen(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(" ".join(item) if isinstance(item, list) else item for item in value)


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
