"""What a piece of work takes of a device's memory, by the counters of torch's allocator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def peak_of(api: Any, device: torch.device, work: Callable[[], None]) -> int:
    """Run `work`; bytes that the allocator took from the device for it at most, fragments included, and gave back.

    What is taken outside the allocator and stays (code of kernels, workspaces of libraries) is not in it: a look at
    the free memory afterwards sees that. `api`: torch.cuda, torch.xpu, or what stands in for it in a test.
    """
    api.synchronize(device)
    api.empty_cache()
    before = api.memory_reserved(device)
    api.reset_peak_memory_stats(device)
    work()
    api.synchronize(device)
    peak = max(0, api.max_memory_reserved(device) - before)
    api.empty_cache()
    return peak
