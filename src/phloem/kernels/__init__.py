"""Floor 1: the op table, its torch reference, and the native and Triton kernels that fill it."""
