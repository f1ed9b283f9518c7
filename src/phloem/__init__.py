"""Phloem: a serving engine for large language and multimodal models."""
