"""What became of a quantised checkpoint's matrices: which keep their bits, which are unpacked, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

VALUES = "the op table reads values here, and no packed rows"


@dataclass
class Report:
    """Filled while weights are read. `method` as the checkpoint names it; `anew`: the method of `--quantization`."""

    method: str
    anew: str = ""
    _kept: dict[str, str] = field(default_factory=dict)
    _unpacked: dict[str, str] = field(default_factory=dict)

    def kept(self, name: str, kind: str) -> None:
        self._kept[name] = kind

    def unpacked(self, name: str, why: str) -> None:
        self._unpacked[name] = why

    @property
    def noted(self) -> bool:
        """Whether anything was."""
        return bool(self._kept or self._unpacked)

    @property
    def packed(self) -> bool:
        """Whether most matrices keep their bits."""
        return len(self._kept) > len(self._unpacked)

    def decision(self, dtype: str) -> tuple[str, str]:
        """(What was read, what became of it and why), as decisions are printed."""
        parts = [f"{count} matrices keep their bits as {kind}" for kind, count in Counter(self._kept.values()).items()]
        then = f"quantised anew ({self.anew})" if self.anew else f"unpacked to {dtype}"
        parts += [f"{count} are {then}: {why}" for why, count in Counter(self._unpacked.values()).items()]
        return self.method, "; ".join(parts) or "every matrix is plain in the file"
