"""Parts of a pipeline that are on the device while they are used, and in the host's memory otherwise (`offload`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

TEXT, PICTURES = "text encoders", "VAE"


class Parts:
    """Args: a pipeline's components, where they are used, and whether they leave again.

    A group is all of what one stage uses: the text encoders, each transformer by its own name, and what pictures are
    read and written with.
    """

    def __init__(self, components: Mapping[str, Any], device: torch.device, offload: bool) -> None:
        self._device, self._host = device, torch.device("cpu")
        self._groups: dict[str, list[torch.nn.Module]] = {}
        for name, part in components.items() if offload else ():
            if isinstance(part, torch.nn.Module):
                self._groups.setdefault(_group(name), []).append(part)
        self.here: str | None = None  # the group on the device; None: none is, or all are and stay
        self.moves = 0

    def use(self, group: str) -> None:
        """Bring it here, once the one that is here has left. A move that fails leaves nothing of it here."""
        if not self._groups or group == self.here:
            return
        before, self.here = self.here, None
        self._send(before, self._host)
        try:
            self._send(group, self._device)
        except BaseException:
            self._send(group, self._host)
            raise
        self.here = group
        self.moves += 1

    def _send(self, group: str | None, place: torch.device) -> None:
        for part in self._groups.get(group or "", []):
            part.to(place)


def _group(name: str) -> str:
    if name.startswith("transformer"):
        return name
    return TEXT if name.startswith("text_encoder") else PICTURES
