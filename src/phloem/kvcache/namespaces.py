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
