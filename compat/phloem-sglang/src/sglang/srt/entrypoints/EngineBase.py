"""What callers derive their own engines from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from sglang._missing import missing


class EngineBase(ABC):
    """An engine as trainers know it: in this process, or behind HTTP."""

    @abstractmethod
    def generate(self, *args: Any, **fields: Any) -> Any: ...

    @abstractmethod
    def flush_cache(self) -> Any: ...

    @abstractmethod
    def update_weights_from_tensor(self, *args: Any, **fields: Any) -> Any: ...

    @abstractmethod
    def release_memory_occupation(self, *args: Any, **fields: Any) -> Any: ...

    @abstractmethod
    def resume_memory_occupation(self, *args: Any, **fields: Any) -> Any: ...

    @abstractmethod
    def shutdown(self) -> None: ...

    def load_lora_adapter(self, lora_name: str, lora_path: str) -> Any:
        raise NotImplementedError

    def unload_lora_adapter(self, lora_name: str) -> Any:
        raise NotImplementedError


__getattr__ = missing(__name__)
