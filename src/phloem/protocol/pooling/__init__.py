"""Embeddings, reranking and classification as data."""
