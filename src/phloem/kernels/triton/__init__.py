"""Triton kernels, one file per subject."""
