"""Kernels compiled and loaded before the engine is ready."""
