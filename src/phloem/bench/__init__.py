"""Benchmarks; results are JSON lines."""
