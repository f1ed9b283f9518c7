"""Small things that callers import from the runtime, and how weights are serialised."""

from sglang._missing import missing
from sglang.srt.utils._serialise import MultiprocessingSerializer
from sglang.srt.utils.common import (
    add_prometheus_middleware,
    assert_pkg_version,
    get_bool_env_var,
    is_cuda,
    is_hip,
    is_npu,
    kill_process_tree,
    set_prometheus_multiproc_dir,
    set_ulimit,
)

__all__ = [
    "MultiprocessingSerializer",
    "add_prometheus_middleware",
    "assert_pkg_version",
    "get_bool_env_var",
    "is_cuda",
    "is_hip",
    "is_npu",
    "kill_process_tree",
    "set_prometheus_multiproc_dir",
    "set_ulimit",
]
__getattr__ = missing(__name__)
