"""Which requests may share computed prefixes: those of one namespace."""

from __future__ import annotations


def namespace(salt: str = "", adapter: str = "", weight_version: str = "") -> str:
    """One string for what the content of pages depends on beside the tokens; no two triples give the same one.

    Args:
        salt: what a client wants kept apart.
        adapter: a name that no other load of an adapter has had.
        weight_version: of the base weights.
    """
    if not (salt or adapter or weight_version):
        return ""
    return f"{len(salt)}:{len(adapter)}:{salt}{adapter}{weight_version}"


def parts(name: str) -> tuple[str, str, str]:
    """The salt, adapter and weight version that `namespace` made a name of."""
    if not name:
        return "", "", ""
    salt, adapter, text = name.split(":", 2)
    first, second = int(salt), int(salt) + int(adapter)
    return text[:first], text[first:second], text[second:]
