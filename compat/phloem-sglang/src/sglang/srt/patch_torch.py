"""SGLang changes how torch pickles tensors on GPUs; those of the host need nothing."""

from sglang._missing import missing


def monkey_patch_torch_reductions() -> None:
    """Nothing to do: `MultiprocessingSerializer` names shared memory of the host by itself."""


__getattr__ = missing(__name__)
